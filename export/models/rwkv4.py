"""RWKV-4: recognition, tensors, the one-token step and its recurrence.

Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), section 3 and appendix D, whose numerator
and denominator are kept apart from a shared exponent, so that nothing overflows. x is the residual stream of D numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import no_type_check

import torch
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset
from torch import Tensor

from ...errors import CheckpointError
from ...spec import ModelSpec, StateSpec, StateTensor
from .blocks import Operator, Ops, State, gated_channel_mix, lerp, residual_step
from .program import Program, product
from .program import gated_channel_mix as gated_channel_mix_steps
from .tensors import LAYER_NORM_EPS, Kind, Rules, Shapes, Source, TensorRule, count_layers, shape_of

NAMES = ("4",)
# The exponent of an empty past: exp(-1e30 - anything) is 0.
EMPTY = -1e30

_goslet = Opset("goslet", 1)


def wkv4(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, aa: Tensor, bb: Tensor, pp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The WKV-4 recurrence for one token (RWKV-4 paper, appendix on numerical stability), in plain form.

    Args:
        k: key [B, D].
        v: value [B, D].
        w: what a step adds to the exponents of the past, -exp(time_decay) [D].
        u: what the present token's exponent has over it, time_first [D].
        aa: numerator, divided by exp(pp) [B, D].
        bb: denominator, divided by exp(pp) [B, D].
        pp: the largest exponent so far [B, D].

    Returns:
        the weighted mean of values [B, D], and the new aa, bb and pp.
    """
    now = torch.maximum(pp, u + k)
    past_share, share = torch.exp(pp - now), torch.exp(u + k - now)
    wkv = (past_share * aa + share * v) / (past_share * bb + share)
    top = torch.maximum(pp + w, k)
    past_share, share = torch.exp(pp + w - top), torch.exp(k - top)
    return wkv, past_share * aa + share * v, past_share * bb + share, top


@script(_goslet, default_opset=op)
@no_type_check  # onnxscript reads the source; its operators take tensors of any type
def Wkv4(k, v, w, u, aa, bb, pp):  # noqa: D103 - an ONNX function; `wkv4` documents it
    first = op.Add(u, k)
    now = op.Max(pp, first)
    past_share = op.Exp(op.Sub(pp, now))
    share = op.Exp(op.Sub(first, now))
    wkv = op.Div(
        op.Add(op.Mul(past_share, aa), op.Mul(share, v)),
        op.Add(op.Mul(past_share, bb), share),
    )
    decayed = op.Add(pp, w)
    top = op.Max(decayed, k)
    old_share = op.Exp(op.Sub(decayed, top))
    new_share = op.Exp(op.Sub(k, top))
    aa_out = op.Add(op.Mul(old_share, aa), op.Mul(new_share, v))
    bb_out = op.Add(op.Mul(old_share, bb), new_share)
    return wkv, aa_out, bb_out, top


WKV4 = Operator(
    name="Wkv4",
    reference=wkv4,
    output_shapes=lambda k, v, w, u, aa, bb, pp: (v.shape, aa.shape, bb.shape, pp.shape),
    function=Wkv4.to_function_proto,
)
OPERATORS = (WKV4,)


def recognise(shapes: Shapes) -> bool:
    """Whether the tensors are RWKV-4's: a decay as in 5 and 6, but no norm behind the time mix."""
    return "blocks.0.att.time_decay" in shapes and "blocks.0.att.ln_x.weight" not in shapes


def read_spec(shapes: Shapes, norm_eps: float | None) -> ModelSpec:
    """The model's dimensions from its tensors' shapes.

    Raises:
        MissingTensorError, TensorShapeError: a tensor that tells a dimension is absent or has the wrong rank.
        CheckpointError: blocks are not numbered from 0 without a gap, or `norm_eps` is given: there is no such norm.
    """
    if norm_eps not in (None, LAYER_NORM_EPS):
        raise CheckpointError(
            "has no group norm whose eps could be set", place="norm_eps", found=norm_eps, remedy="leave it out"
        )
    vocab_size, n_embd = shape_of(shapes, "emb.weight", 2)
    return ModelSpec(
        version="4",
        n_layer=count_layers(shapes),
        n_embd=n_embd,
        n_ffn=shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=1,
        vocab_size=vocab_size,
        norm_eps=LAYER_NORM_EPS,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks={},
    )


def unused(spec: ModelSpec) -> Collection[str]:
    """Nothing: every tensor is read."""
    return ()


def tensor_rules(spec: ModelSpec, names: Collection[str]) -> tuple[TensorRule, ...]:
    """Every tensor of an RWKV-4 engine; `shift_*` are 1 - time_mix_*, the share of the token before."""
    width, hidden = spec.n_embd, spec.n_ffn
    rules = Rules(spec)
    rules.embedding()
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        beside = (Source(f"{att}.time_decay", (width,)), Source(f"{att}.time_first", (width,)))
        rules.norm(f"blocks.{layer}.ln1")
        for letter in "kvr":
            rules.computed(
                f"{att}.shift_{letter}", f"{att}.time_mix_{letter}", (width,), lambda mix: 1 - mix, beside=beside
            )
        rules.computed(
            f"{att}.decay", f"{att}.time_decay", (width,), lambda decay: -torch.exp(decay), beside=beside[1:]
        )
        rules.vector(f"{att}.time_first")
        for part in ("receptance", "key", "value", "output"):
            rules.matrix(f"{att}.{part}.weight", width, width, Kind.PROJECTION)
        rules.norm(f"blocks.{layer}.ln2")
        for letter in "kr":
            rules.computed(
                f"{ffn}.shift_{letter}", f"{ffn}.time_mix_{letter}", (width,), lambda mix: 1 - mix, beside=beside
            )
        rules.matrix(f"{ffn}.key.weight", hidden, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.receptance.weight", width, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.value.weight", width, hidden, Kind.CHANNEL_MIX, input_sparse=True)
    rules.norm("ln_out")
    rules.matrix("head.weight", spec.vocab_size, width, Kind.HEAD)
    return rules.all()


def state_spec(spec: ModelSpec) -> StateSpec:
    """Per layer the two shift vectors, and numerator, denominator and exponent of the time mix."""
    shape = (spec.n_embd,)
    tensors = []
    for layer in range(spec.n_layer):
        tensors.append(StateTensor(f"{layer}.att_shift", shape, "channel"))
        tensors.append(StateTensor(f"{layer}.aa", shape, "channel"))
        tensors.append(StateTensor(f"{layer}.bb", shape, "channel"))
        tensors.append(StateTensor(f"{layer}.pp", shape, "channel", init=EMPTY))
        tensors.append(StateTensor(f"{layer}.ffn_shift", shape, "channel"))
    return StateSpec(tuple(tensors))


def step(spec: ModelSpec, ops: Ops, token: Sequence[Tensor], state: State) -> tuple[Tensor, dict[str, Tensor]]:
    """One token, as `blocks.Version.step` says; `token` is the embedded token alone."""

    def time_mix(layer: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        att = f"blocks.{layer}.att"
        previous = state[f"{layer}.att_shift"]
        r, k, v = (
            ops.linear(f"{att}.{part}.weight", lerp(x, previous, ops.vector(f"{att}.shift_{part[0]}")))
            for part in ("receptance", "key", "value")
        )
        old = [state[f"{layer}.{part}"] for part in ("aa", "bb", "pp")]
        wkv, aa, bb, pp = ops.call(WKV4, k, v, ops.vector(f"{att}.decay"), ops.vector(f"{att}.time_first"), *old)
        y = ops.linear(f"{att}.output.weight", torch.sigmoid(r) * wkv)
        return y, {f"{layer}.aa": aa, f"{layer}.bb": bb, f"{layer}.pp": pp}

    def channel_mix(layer: int, x: Tensor) -> Tensor:
        return gated_channel_mix(ops, layer, x, state[f"{layer}.ffn_shift"], "shift_")

    (x,) = token
    return residual_step(spec, ops, x, time_mix, channel_mix)


def program(spec: ModelSpec) -> Program:
    """The same token as `step`, as the native engine runs it: seven fused steps a layer."""
    width = spec.n_embd
    steps = Program({"x": width})
    mixed = {letter: steps.register(f"mixed_{letter}", width) for letter in "rkv"}
    r, k, v, y = (steps.register(name, width) for name in ("r", "k", "v", "y"))
    for layer in range(spec.n_layer):
        att = f"blocks.{layer}.att"
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln1",
            eps=spec.layer_norm_eps,
            shift=f"{layer}.att_shift",
            mixes={f"{att}.shift_{letter}": register for letter, register in mixed.items()},
        )
        steps.linear(
            product(f"{att}.receptance.weight", mixed["r"], r, activation="sigmoid"),
            product(f"{att}.key.weight", mixed["k"], k),
            product(f"{att}.value.weight", mixed["v"], v),
        )
        steps.wkv(
            4,
            r=r,
            k=k,
            v=v,
            decay=f"{att}.decay",
            first=f"{att}.time_first",
            aa=f"{layer}.aa",
            bb=f"{layer}.bb",
            pp=f"{layer}.pp",
            out=y,
        )
        steps.linear(product(f"{att}.output.weight", y, "x", combine="add"))
        gated_channel_mix_steps(steps, spec, layer, "shift_")
    steps.logits(x="x", norm="ln_out", eps=spec.layer_norm_eps, weight="head.weight")
    return steps
