"""RWKV-5 "Eagle": recognition, tensors and the one-token step of 5.0, 5.1 and 5.2.

Source: Peng et al., "Eagle and Finch" (2024), section 4, for 5.2; the released inference code for what came before.
They differ in the decay, one for each head in 5.0 and 5.1 and one for each channel in 5.2, and in the gate, which 5.0
has not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import CheckpointError, TensorShapeError
from ...spec import ModelSpec
from . import matrix_state
from .blocks import Ops, State, gated_channel_mix, head_norm, lerp, residual_step
from .matrix_state import state_spec
from .program import Program, product
from .program import gated_channel_mix as gated_channel_mix_steps
from .tensors import LAYER_NORM_EPS, Kind, Rules, Shape, Shapes, Source, TensorRule, count_layers, shape_of, squeezed

__all__ = ["NAMES", "OPERATORS", "program", "read_spec", "recognise", "state_spec", "step", "tensor_rules", "unused"]

NAMES = ("5.0", "5.1", "5.2")
NORM_EPS = 64e-5

WKV5 = matrix_state.operator("Wkv5")
OPERATORS = (WKV5,)


def recognise(shapes: Shapes) -> bool:
    """Whether the tensors are RWKV-5's: the norm behind the time mix that 4 lacks, and not the mixes of 6."""
    return (
        "blocks.0.att.time_decay" in shapes
        and "blocks.0.att.ln_x.weight" in shapes
        and "blocks.0.att.time_mix_k" in shapes
    )


def read_spec(shapes: Shapes, norm_eps: float | None) -> ModelSpec:
    """The model's dimensions from its tensors' shapes; `norm_eps` overrides the group norm's eps of 64e-5.

    Raises:
        MissingTensorError, TensorShapeError: a tensor that tells a dimension is absent or has the wrong rank.
        CheckpointError: heads do not make up the width, or blocks are not numbered from 0 without a gap.
    """
    vocab_size, n_embd = shape_of(shapes, "emb.weight", 2)
    name = "blocks.0.att.time_decay"
    decay = shapes[name]
    by_channel = _by_channel(decay)
    n_head = decay[0] if decay else 0
    if not n_head or n_embd % n_head or squeezed(decay) != squeezed((n_head, n_embd // n_head if by_channel else 1)):
        raise CheckpointError(
            "heads do not make up the width",
            place=name,
            expected=f"[heads] or [heads, numbers in a head], together {n_embd} numbers",
            found=list(shapes[name]),
        )
    bonus = next((bonus for part in ("faaaa", "first") if (bonus := f"blocks.0.att.time_{part}") in shapes), name)
    if _by_channel(shapes[bonus]) != by_channel:
        raise TensorShapeError(
            "the name says what the shapes contradict",
            place=f"{bonus} of shape {list(shapes[bonus])}",
            expected="beside it a time_decay of the same axes",
            found=list(shapes[name]),
            remedy="the file is damaged, or was converted for another program: give the original checkpoint",
        )
    gated = "blocks.0.att.gate.weight" in shapes
    if by_channel and not gated:
        raise CheckpointError("has decays by channel, as in 5.2, but no gate", place="blocks.0.att.gate.weight")
    return ModelSpec(
        version="5.2" if by_channel else "5.1" if gated else "5.0",
        n_layer=count_layers(shapes),
        n_embd=n_embd,
        n_ffn=shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=n_embd // n_head,
        vocab_size=vocab_size,
        norm_eps=NORM_EPS if norm_eps is None else norm_eps,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks={},
    )


def _by_channel(shape: Shape) -> bool:
    """By axes and not by sizes: a model of a single head has [1, D] in 5.2 and [1] before."""
    return len(shape) > 1 and shape[1] != 1


def unused(spec: ModelSpec) -> Collection[str]:
    """Nothing: every tensor is read."""
    return ()


def _letters(spec: ModelSpec) -> str:
    return "rkv" if spec.version == "5.0" else "rkvg"


def tensor_rules(spec: ModelSpec, names: Collection[str]) -> tuple[TensorRule, ...]:
    """Every tensor of an RWKV-5 engine.

    `shift_*` are 1 - time_mix_*, the share of the token before. Decay and bonus are spread to one number a channel.
    The bonus is `time_faaaa` as it is or, in 5.0 and 5.1, `time_first` behind exp, whichever the checkpoint has.
    """
    width, hidden = spec.n_embd, spec.n_ffn
    by_head: Shape = (spec.n_head, spec.head_size) if spec.version == "5.2" else (spec.n_head,)

    def spread(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: compute(tensor).reshape(spec.n_head, -1).expand(spec.n_head, spec.head_size)

    rules = Rules(spec)
    rules.embedding()
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        decay = (Source(f"{att}.time_decay", by_head),)
        mixes = tuple(Source(f"{att}.time_mix_{letter}", (width,)) for letter in _letters(spec))
        rules.norm(f"blocks.{layer}.ln1")
        for letter in _letters(spec):
            rules.computed(
                f"{att}.shift_{letter}", f"{att}.time_mix_{letter}", (width,), lambda mix: 1 - mix, beside=decay
            )
        rules.computed(
            f"{att}.decay",
            f"{att}.time_decay",
            by_head,
            spread(lambda x: torch.exp(-torch.exp(x))),
            beside=(Source(f"{att}.ln_x.weight", (width,)), *mixes),
        )
        if f"{att}.time_first" in names:
            by_heads = (Source(f"{att}.time_decay", (spec.n_head,)),)
            rules.computed(f"{att}.bonus", f"{att}.time_first", (spec.n_head,), spread(torch.exp), beside=by_heads)
        else:
            rules.computed(f"{att}.bonus", f"{att}.time_faaaa", by_head, spread(lambda x: x), beside=decay)
        for part in ("receptance", "key", "value", "output"):
            rules.matrix(f"{att}.{part}.weight", width, width, Kind.PROJECTION)
        if "g" in _letters(spec):
            rules.matrix(f"{att}.gate.weight", width, width, Kind.PROJECTION)
        rules.norm(f"{att}.ln_x")
        rules.norm(f"blocks.{layer}.ln2")
        for letter in "kr":
            rules.computed(
                f"{ffn}.shift_{letter}", f"{ffn}.time_mix_{letter}", (width,), lambda mix: 1 - mix, beside=decay
            )
        rules.matrix(f"{ffn}.key.weight", hidden, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.receptance.weight", width, width, Kind.CHANNEL_MIX)
        rules.matrix(f"{ffn}.value.weight", width, hidden, Kind.CHANNEL_MIX, input_sparse=True)
    rules.norm("ln_out")
    rules.matrix("head.weight", spec.vocab_size, width, Kind.HEAD)
    return rules.all()


_PARTS = {"r": "receptance", "k": "key", "v": "value", "g": "gate"}


def step(spec: ModelSpec, ops: Ops, token: Sequence[Tensor], state: State) -> tuple[Tensor, dict[str, Tensor]]:
    """One token, as `blocks.Version.step` says; `token` is the embedded token alone."""
    heads = (spec.n_head, spec.head_size)

    def time_mix(layer: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        att = f"blocks.{layer}.att"
        previous = state[f"{layer}.att_shift"]
        products = {
            letter: ops.linear(f"{att}.{_PARTS[letter]}.weight", lerp(x, previous, ops.vector(f"{att}.shift_{letter}")))
            for letter in _letters(spec)
        }
        r, k, v = (products[letter].reshape(-1, *heads) for letter in "rkv")
        decay, bonus = (ops.vector(f"{att}.{name}").reshape(heads) for name in ("decay", "bonus"))
        y, wkv = ops.call(WKV5, r, k, v, decay, bonus, state[f"{layer}.wkv"])
        y = head_norm(y, ops, f"{att}.ln_x", spec.norm_eps)
        if "g" in products:
            y = y * functional.silu(products["g"])
        return ops.linear(f"{att}.output.weight", y), {f"{layer}.wkv": wkv}

    def channel_mix(layer: int, x: Tensor) -> Tensor:
        return gated_channel_mix(ops, layer, x, state[f"{layer}.ffn_shift"], "shift_")

    (x,) = token
    return residual_step(spec, ops, x, time_mix, channel_mix)


def program(spec: ModelSpec) -> Program:
    """The same token as `step`, as the native engine runs it: seven fused steps a layer."""
    width, letters = spec.n_embd, _letters(spec)
    steps = Program({"x": width})
    mixed = {letter: steps.register(f"mixed_{letter}", width) for letter in letters}
    made = {letter: steps.register(letter, width) for letter in letters}
    y = steps.register("y", width)
    for layer in range(spec.n_layer):
        att = f"blocks.{layer}.att"
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln1",
            eps=spec.layer_norm_eps,
            shift=f"{layer}.att_shift",
            mixes={f"{att}.shift_{letter}": mixed[letter] for letter in letters},
        )
        activations = {"g": "silu"}
        steps.linear(
            *(
                product(
                    f"{att}.{_PARTS[letter]}.weight",
                    mixed[letter],
                    made[letter],
                    activation=activations.get(letter, "none"),
                )
                for letter in letters
            )
        )
        steps.wkv(
            5,
            r="r",
            k="k",
            v="v",
            g=made.get("g"),
            decay=f"{att}.decay",
            bonus=f"{att}.bonus",
            norm=f"{att}.ln_x",
            eps=spec.norm_eps,
            state=f"{layer}.wkv",
            head_size=spec.head_size,
            out=y,
        )
        steps.linear(product(f"{att}.output.weight", y, "x", combine="add"))
        gated_channel_mix_steps(steps, spec, layer, "shift_")
    steps.logits(x="x", norm="ln_out", eps=spec.layer_norm_eps, weight="head.weight")
    return steps
