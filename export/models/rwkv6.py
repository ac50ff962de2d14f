"""RWKV-6 "Finch": recognition, tensors and the one-token step.

Source: Peng et al., "Eagle and Finch" (2024), section 4. The shares of the token before and the decay depend on the
token, each through a LoRA; the checkpoint stacks the LoRA of the five shares, in the order w, k, v, r, g, and the
engine holds them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import CheckpointError
from ...spec import ModelSpec
from . import matrix_state
from .blocks import Ops, State, gated_channel_mix, head_norm, lerp, residual_step
from .matrix_state import state_spec
from .program import Program, product
from .program import gated_channel_mix as gated_channel_mix_steps
from .tensors import LAYER_NORM_EPS, Kind, Rules, Shapes, Source, TensorRule, count_layers, shape_of

__all__ = ["NAMES", "OPERATORS", "program", "read_spec", "recognise", "state_spec", "step", "tensor_rules", "unused"]

NAMES = ("6",)
NORM_EPS = 64e-5
# As the checkpoint stacks them.
LETTERS = "wkvrg"

WKV6 = matrix_state.operator("Wkv6")
OPERATORS = (WKV6,)


def recognise(shapes: Shapes) -> bool:
    """Whether the tensors are RWKV-6's: only this version has time_maa_*."""
    return "blocks.0.att.time_maa_x" in shapes


def read_spec(shapes: Shapes, norm_eps: float | None) -> ModelSpec:
    """The model's dimensions from its tensors' shapes; `norm_eps` overrides the group norm's eps of 64e-5.

    Raises:
        MissingTensorError, TensorShapeError: a tensor that tells a dimension is absent or has the wrong rank.
        CheckpointError: heads do not make up the width, or blocks are not numbered from 0 without a gap.
    """
    vocab_size, n_embd = shape_of(shapes, "emb.weight", 2)
    n_head, head_size = shape_of(shapes, "blocks.0.att.time_faaaa", 2)
    if n_head * head_size != n_embd:
        raise CheckpointError(
            "heads do not make up the width",
            place="blocks.0.att.time_faaaa",
            expected=f"{n_embd} numbers",
            found=[n_head, head_size],
        )
    return ModelSpec(
        version="6",
        n_layer=count_layers(shapes),
        n_embd=n_embd,
        n_ffn=shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=head_size,
        vocab_size=vocab_size,
        norm_eps=NORM_EPS if norm_eps is None else norm_eps,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks={
            "mix": shape_of(shapes, "blocks.0.att.time_maa_w2", 3)[1],
            "decay": shape_of(shapes, "blocks.0.att.time_decay_w1", 2)[1],
        },
    )


def unused(spec: ModelSpec) -> Collection[str]:
    """Nothing: every tensor is read."""
    return ()


def tensor_rules(spec: ModelSpec, names: Collection[str]) -> tuple[TensorRule, ...]:
    """Every tensor of an RWKV-6 engine; `time_maa_k1` and `time_maa_k2` are the LoRA of k's share, and so on."""
    width, hidden, rank, decay_rank = spec.n_embd, spec.n_ffn, spec.ranks["mix"], spec.ranks["decay"]
    rules = Rules(spec)
    rules.embedding()
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        rules.norm(f"blocks.{layer}.ln1")
        for letter in "x" + LETTERS:
            rules.vector(f"{att}.time_maa_{letter}")
        down = (Source(f"{att}.time_maa_w1", (width, len(LETTERS) * rank)),)
        up = (Source(f"{att}.time_maa_w2", (len(LETTERS), rank, width)),)
        for index, letter in enumerate(LETTERS):
            part = slice(index * rank, (index + 1) * rank)
            rules.derived(
                f"{att}.time_maa_{letter}_down",
                (rank, width),
                Kind.LORA,
                down,
                lambda w1, part=part: w1[:, part].T,
                beside=up,
            )
            rules.derived(
                f"{att}.time_maa_{letter}_up",
                (width, rank),
                Kind.LORA,
                up,
                lambda w2, at=index: w2[at].T,
                beside=down,
            )
        rules.vector(f"{att}.time_decay")
        rules.lora((f"{att}.time_decay_w1", f"{att}.time_decay_w2"), width, decay_rank, width)
        rules.vector(f"{att}.time_faaaa", spec.n_head, spec.head_size)
        for part_name in ("receptance", "key", "value", "gate", "output"):
            rules.matrix(f"{att}.{part_name}.weight", width, width, Kind.PROJECTION)
        rules.norm(f"{att}.ln_x")
        rules.norm(f"blocks.{layer}.ln2")
        for letter in "kr":
            rules.vector(f"{ffn}.time_maa_{letter}")
        rules.matrix(f"{ffn}.key.weight", hidden, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.receptance.weight", width, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.value.weight", width, hidden, Kind.CHANNEL_MIX, input_sparse=True)
    rules.norm("ln_out")
    rules.matrix("head.weight", spec.vocab_size, width, Kind.HEAD)
    return rules.all()


def step(spec: ModelSpec, ops: Ops, token: Sequence[Tensor], state: State) -> tuple[Tensor, dict[str, Tensor]]:
    """One token, as `blocks.Version.step` says; `token` is the embedded token alone."""
    heads = (spec.n_head, spec.head_size)

    def time_mix(layer: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        att = f"blocks.{layer}.att"
        previous = state[f"{layer}.att_shift"]
        base = lerp(x, previous, ops.vector(f"{att}.time_maa_x"))

        def mixed(letter: str) -> Tensor:
            low = torch.tanh(ops.linear(f"{att}.time_maa_{letter}_down", base))
            share = ops.vector(f"{att}.time_maa_{letter}") + ops.linear(f"{att}.time_maa_{letter}_up", low)
            return lerp(x, previous, share)

        r, k, v = (
            ops.linear(f"{att}.{part}.weight", mixed(part[0])).reshape(-1, *heads)
            for part in ("receptance", "key", "value")
        )
        g = functional.silu(ops.linear(f"{att}.gate.weight", mixed("g")))
        low = torch.tanh(ops.linear(f"{att}.time_decay_w1", mixed("w")))
        exponent = ops.vector(f"{att}.time_decay") + ops.linear(f"{att}.time_decay_w2", low)
        w = torch.exp(-torch.exp(exponent)).reshape(-1, *heads)
        bonus = ops.vector(f"{att}.time_faaaa").reshape(heads)
        y, wkv = ops.call(WKV6, r, k, v, w, bonus, state[f"{layer}.wkv"])
        y = head_norm(y, ops, f"{att}.ln_x", spec.norm_eps) * g
        return ops.linear(f"{att}.output.weight", y), {f"{layer}.wkv": wkv}

    def channel_mix(layer: int, x: Tensor) -> Tensor:
        return gated_channel_mix(ops, layer, x, state[f"{layer}.ffn_shift"], "time_maa_")

    (x,) = token
    return residual_step(spec, ops, x, time_mix, channel_mix)


def program(spec: ModelSpec) -> Program:
    """The same token as `step`, as the native engine runs it: ten fused steps a layer."""
    width = spec.n_embd
    steps = Program({"x": width})
    base, normed, previous, y = (steps.register(name, width) for name in ("base", "normed", "previous", "y"))
    mixed = {letter: steps.register(f"mixed_{letter}", width) for letter in LETTERS}
    low = {letter: steps.register(f"low_{letter}", spec.ranks["mix"]) for letter in LETTERS}
    r, k, v, w, g = (steps.register(name, width) for name in "rkvwg")
    low_decay = steps.register("low_decay", spec.ranks["decay"])
    for layer in range(spec.n_layer):
        att = f"blocks.{layer}.att"
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln1",
            eps=spec.layer_norm_eps,
            shift=f"{layer}.att_shift",
            mixes={f"{att}.time_maa_x": base},
            normed=normed,
            previous=previous,
        )
        steps.linear(
            *(product(f"{att}.time_maa_{i}_down", base, low[i], activation="tanh") for i in LETTERS),
        )
        steps.linear(
            *(
                product(
                    f"{att}.time_maa_{i}_up",
                    low[i],
                    mixed[i],
                    bias=f"{att}.time_maa_{i}",
                    combine="lerp",
                    operands=[normed, previous],
                )
                for i in LETTERS
            )
        )
        steps.linear(
            product(f"{att}.receptance.weight", mixed["r"], r),
            product(f"{att}.key.weight", mixed["k"], k),
            product(f"{att}.value.weight", mixed["v"], v),
            product(f"{att}.gate.weight", mixed["g"], g, activation="silu"),
            product(f"{att}.time_decay_w1", mixed["w"], low_decay, activation="tanh"),
        )
        steps.linear(
            product(f"{att}.time_decay_w2", low_decay, w, bias=f"{att}.time_decay", activation="double_exp"),
        )
        steps.wkv(
            6,
            r=r,
            k=k,
            v=v,
            w=w,
            g=g,
            bonus=f"{att}.time_faaaa",
            norm=f"{att}.ln_x",
            eps=spec.norm_eps,
            state=f"{layer}.wkv",
            head_size=spec.head_size,
            out=y,
        )
        steps.linear(product(f"{att}.output.weight", y, "x", combine="add"))
        gated_channel_mix_steps(steps, spec, layer, "time_maa_")
    steps.logits(x="x", norm="ln_out", eps=spec.layer_norm_eps, weight="head.weight")
    return steps
