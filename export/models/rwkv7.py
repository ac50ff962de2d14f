"""RWKV-7 "Goose": recognition, tensors, the one-token step and its recurrence.

Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4, and the released
inference code where the two differ (the value residual's direction). x is the residual stream of D numbers, in H
heads of N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import no_type_check

import torch
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from ...errors import CheckpointError, MissingTensorError, TensorShapeError
from ...spec import ModelSpec, StateSpec, StateTensor
from .blocks import Kind, Operator, Ops, Shape, Shapes, TensorRule, count_layers, head_norm, layer_norm, lerp
from .program import Program, product

NAME = "7"
NORM_EPS = 64e-5
LAYER_NORM_EPS = 1e-5
KEY_NORM_FLOOR = 1e-12
DECAY_SCALE = -math.exp(-0.5)

_goslet = Opset("goslet", 1)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The WKV-7 recurrence for one token (RWKV-7 paper, equations 16 and 17), in plain form.

    Args:
        r: receptance [B, H, N].
        w: decay [B, H, N], within (0.545, 1).
        k: key, already scaled by the in-context learning rate [B, H, N].
        v: value [B, H, N].
        kappa: removal key, normalised per head [B, H, N].
        a: in-context learning rate [B, H, N].
        state: [B, H, N (value), N (key)].

    Returns:
        y [B, H, N], read from the new state, and the new state in the shape of the old.
    """
    removed = state @ kappa.unsqueeze(-1)
    new_state = state * w.unsqueeze(-2) - removed @ (kappa * a).unsqueeze(-2) + v.unsqueeze(-1) @ k.unsqueeze(-2)
    return (new_state @ r.unsqueeze(-1)).squeeze(-1), new_state


@script(_goslet, default_opset=op)
@no_type_check  # onnxscript reads the source; its operators take tensors of any type
def Wkv7(r, w, k, v, kappa, a, state):  # noqa: D103 - an ONNX function; `wkv7` documents it
    last = op.Constant(value_ints=[-1])
    second_last = op.Constant(value_ints=[-2])
    removed = op.MatMul(state, op.Unsqueeze(kappa, last))
    erased = op.MatMul(removed, op.Unsqueeze(op.Mul(kappa, a), second_last))
    written = op.MatMul(op.Unsqueeze(v, last), op.Unsqueeze(k, second_last))
    state_out = op.Add(op.Sub(op.Mul(state, op.Unsqueeze(w, second_last)), erased), written)
    y = op.Squeeze(op.MatMul(state_out, op.Unsqueeze(r, last)), last)
    return y, state_out


WKV7 = Operator(
    name="Wkv7",
    reference=wkv7,
    output_shapes=lambda r, w, k, v, kappa, a, state: (r.shape, state.shape),
    function=Wkv7.to_function_proto,
)
OPERATORS = (WKV7,)


def recognise(shapes: Shapes) -> bool:
    """Whether the tensors are RWKV-7's: only this version has the bonus r_k and the removal key's scale k_k."""
    return any(name.startswith("blocks.") and name.endswith((".att.r_k", ".att.k_k")) for name in shapes)


def _shape(shapes: Shapes, name: str, n_axes: int) -> Shape:
    if name not in shapes:
        raise MissingTensorError(
            "the checkpoint lacks a tensor", place=name, expected=f"{n_axes} axes", found="nothing"
        )
    shape = shapes[name]
    if len(shape) != n_axes or 0 in shape:
        raise TensorShapeError("a tensor has the wrong shape", place=name, expected=f"{n_axes} axes", found=list(shape))
    return shape


def read_spec(shapes: Shapes, norm_eps: float | None) -> ModelSpec:
    """The model's dimensions from its tensors' shapes; `norm_eps` overrides the group norm's eps of 64e-5.

    Raises:
        MissingTensorError, TensorShapeError: a tensor that tells a dimension is absent or has the wrong rank.
        CheckpointError: heads do not make up the width, or blocks are not numbered from 0 without a gap.
    """
    vocab_size, n_embd = _shape(shapes, "emb.weight", 2)
    n_layer = count_layers(shapes)
    n_head, head_size = _shape(shapes, "blocks.0.att.r_k", 2)
    if n_head * head_size != n_embd:
        raise CheckpointError(
            "heads do not make up the width",
            place="blocks.0.att.r_k",
            expected=f"{n_embd} numbers",
            found=[n_head, head_size],
        )
    letters = "wavg" if n_layer > 1 else "wag"
    ranks = {letter: _shape(shapes, f"blocks.{int(letter == 'v')}.att.{letter}1", 2)[1] for letter in letters}
    return ModelSpec(
        version=NAME,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ffn=_shape(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=head_size,
        vocab_size=vocab_size,
        norm_eps=NORM_EPS if norm_eps is None else norm_eps,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks=ranks,
    )


def unused(spec: ModelSpec) -> frozenset[str]:
    """Layer 0 defines the first value, so nothing reads its value-residual LoRA; official files carry it anyway."""
    return frozenset(f"blocks.0.att.v{part}" for part in "012")


def tensor_rules(spec: ModelSpec) -> tuple[TensorRule, ...]:
    """Every tensor of an RWKV-7 model, in the order of use."""
    width, hidden = spec.n_embd, spec.n_ffn
    rules = [TensorRule("emb.weight", (spec.vocab_size, width), Kind.EMBEDDING)]

    def vector(name: str, *shape: int) -> None:
        rules.append(TensorRule(name, shape or (width,), Kind.VECTOR))

    def norm(name: str) -> None:
        vector(f"{name}.weight")
        vector(f"{name}.bias")

    norm("blocks.0.ln0")
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        norm(f"blocks.{layer}.ln1")
        for letter in "rwkvag":
            vector(f"{att}.x_{letter}")
        for letter in "wavg" if layer else "wag":
            if letter != "g":
                vector(f"{att}.{letter}0")
            rank = spec.ranks[letter]
            rules.append(TensorRule(f"{att}.{letter}1", (width, rank), Kind.LORA, input_first=True))
            rules.append(TensorRule(f"{att}.{letter}2", (rank, width), Kind.LORA, input_first=True))
        vector(f"{att}.k_k")
        vector(f"{att}.k_a")
        vector(f"{att}.r_k", spec.n_head, spec.head_size)
        for part in ("receptance", "key", "value", "output"):
            rules.append(TensorRule(f"{att}.{part}.weight", (width, width), Kind.PROJECTION))
        norm(f"{att}.ln_x")
        norm(f"blocks.{layer}.ln2")
        vector(f"{ffn}.x_k")
        rules.append(TensorRule(f"{ffn}.key.weight", (hidden, width), Kind.CHANNEL_MIX))
        rules.append(TensorRule(f"{ffn}.value.weight", (width, hidden), Kind.CHANNEL_MIX, input_sparse=True))
    norm("ln_out")
    rules.append(TensorRule("head.weight", (spec.vocab_size, width), Kind.HEAD))
    return tuple(rules)


def state_spec(spec: ModelSpec) -> StateSpec:
    """Per layer the two shift vectors and the WKV matrix, rows by value and columns by key."""
    matrix = (spec.n_head, spec.head_size, spec.head_size)
    tensors = []
    for layer in range(spec.n_layer):
        tensors.append(StateTensor(f"{layer}.att_shift", (spec.n_embd,), "channel"))
        tensors.append(StateTensor(f"{layer}.wkv", matrix, "head,value,key"))
        tensors.append(StateTensor(f"{layer}.ffn_shift", (spec.n_embd,), "channel"))
    return StateSpec(tuple(tensors))


def folded(spec: ModelSpec) -> frozenset[str]:
    """ln0 follows the embedding directly, so it is applied to every row at export."""
    return frozenset({"blocks.0.ln0.weight", "blocks.0.ln0.bias"})


def fold_embedding(weights: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
    """ln0 of every row of the embedding, float32 [V, D]."""
    scale, bias = weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
    return functional.layer_norm(weights["emb.weight"], (spec.n_embd,), scale, bias, spec.layer_norm_eps)


def _time_mix(
    spec: ModelSpec, ops: Ops, layer: int, x: Tensor, previous: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    att = f"blocks.{layer}.att"

    def mixed(letter: str) -> Tensor:
        return lerp(x, previous, ops.vector(f"{att}.x_{letter}"))

    def up(letter: str, hidden: Tensor) -> Tensor:
        return ops.linear(f"{att}.{letter}2", hidden)

    def down(letter: str, mixed_x: Tensor) -> Tensor:
        return ops.linear(f"{att}.{letter}1", mixed_x)

    def heads(flat: Tensor) -> Tensor:
        return flat.reshape(-1, spec.n_head, spec.head_size)

    x_v = mixed("v")
    r = ops.linear(f"{att}.receptance.weight", mixed("r"))
    k = ops.linear(f"{att}.key.weight", mixed("k"))
    v = ops.linear(f"{att}.value.weight", x_v)
    w = torch.exp(DECAY_SCALE * torch.sigmoid(ops.vector(f"{att}.w0") + up("w", torch.tanh(down("w", mixed("w"))))))
    a = torch.sigmoid(ops.vector(f"{att}.a0") + up("a", down("a", mixed("a"))))
    g = up("g", torch.sigmoid(down("g", mixed("g"))))
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(ops.vector(f"{att}.v0") + up("v", down("v", x_v)))
    kappa = heads(k * ops.vector(f"{att}.k_k"))
    kappa = kappa / torch.linalg.vector_norm(kappa, dim=-1, keepdim=True).clamp_min(KEY_NORM_FLOOR)
    k = k * (1 + (a - 1) * ops.vector(f"{att}.k_a"))
    r, k, v = heads(r), heads(k), heads(v)
    y, wkv = ops.call(WKV7, r, heads(w), k, v, kappa, heads(a), wkv)
    bonus = (r * k * ops.vector(f"{att}.r_k").reshape(spec.n_head, spec.head_size)).sum(-1, keepdim=True) * v
    y = head_norm(y, ops, f"{att}.ln_x", spec.norm_eps) + bonus.flatten(1)
    return ops.linear(f"{att}.output.weight", y * g), wkv, v_first


def _channel_mix(ops: Ops, layer: int, x: Tensor, previous: Tensor) -> Tensor:
    ffn = f"blocks.{layer}.ffn"
    hidden = torch.relu(ops.linear(f"{ffn}.key.weight", lerp(x, previous, ops.vector(f"{ffn}.x_k"))))
    return ops.linear(f"{ffn}.value.weight", hidden * hidden)


def step(spec: ModelSpec, ops: Ops, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One token.

    Args:
        spec: the model's dimensions.
        ops: gives weights and operators.
        x: the embedded token with ln0 folded in [B, D].
        state: the tensors of `state_spec`, each with a leading batch axis.

    Returns:
        logits [B, V] and the new state under the same names.
    """
    new_state: dict[str, Tensor] = {}
    v_first = None
    for layer in range(spec.n_layer):
        h = layer_norm(x, ops, f"blocks.{layer}.ln1", spec.layer_norm_eps)
        y, wkv, v_first = _time_mix(spec, ops, layer, h, state[f"{layer}.att_shift"], state[f"{layer}.wkv"], v_first)
        x = x + y
        new_state[f"{layer}.att_shift"] = h
        new_state[f"{layer}.wkv"] = wkv
        h = layer_norm(x, ops, f"blocks.{layer}.ln2", spec.layer_norm_eps)
        x = x + _channel_mix(ops, layer, h, state[f"{layer}.ffn_shift"])
        new_state[f"{layer}.ffn_shift"] = h
    logits = ops.linear("head.weight", layer_norm(x, ops, "ln_out", spec.layer_norm_eps))
    return logits, new_state


def program(spec: ModelSpec) -> Program:
    """The same token as `step`, as the native engine runs it: eight fused steps a layer."""
    width, eps = spec.n_embd, spec.layer_norm_eps
    steps = Program("x", width)
    mixed = {letter: steps.register(f"mixed_{letter}", width) for letter in "rwkvag"}
    r, w, k, v, a, g, y = (steps.register(name, width) for name in ("r", "w", "k", "v", "a", "g", "y"))
    first_value, value_mix = steps.register("first_value", width), steps.register("value_mix", width)
    hidden = steps.register("hidden", spec.n_ffn)
    low = {letter: steps.register(f"low_{letter}", rank) for letter, rank in spec.ranks.items()}
    low_activations = {"w": "tanh", "g": "sigmoid"}
    up = {"w": (w, "decay"), "a": (a, "sigmoid"), "v": (value_mix, "sigmoid"), "g": (g, "none")}
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        letters = "wavg" if layer else "wag"
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln1",
            eps=eps,
            shift=f"{layer}.att_shift",
            mixes={f"{att}.x_{letter}": register for letter, register in mixed.items()},
        )
        steps.linear(
            product(f"{att}.receptance.weight", mixed["r"], r),
            product(f"{att}.key.weight", mixed["k"], k),
            product(f"{att}.value.weight", mixed["v"], v),
            *(product(f"{att}.{i}1", mixed[i], low[i], activation=low_activations.get(i, "none")) for i in letters),
        )
        steps.linear(
            *(
                product(f"{att}.{i}2", low[i], up[i][0], bias=None if i == "g" else f"{att}.{i}0", activation=up[i][1])
                for i in letters
            )
        )
        steps.wkv7(
            r=r,
            w=w,
            k=k,
            v=v,
            a=a,
            g=g,
            first_value=first_value,
            value_mix=value_mix if layer else None,
            k_k=f"{att}.k_k",
            k_a=f"{att}.k_a",
            r_k=f"{att}.r_k",
            norm=f"{att}.ln_x",
            eps=spec.norm_eps,
            state=f"{layer}.wkv",
            head_size=spec.head_size,
            out=y,
        )
        steps.linear(product(f"{att}.output.weight", y, "x", add=True))
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln2",
            eps=eps,
            shift=f"{layer}.ffn_shift",
            mixes={f"{ffn}.x_k": mixed["k"]},
        )
        steps.linear(product(f"{ffn}.key.weight", mixed["k"], hidden, activation="relu_squared"))
        steps.linear(product(f"{ffn}.value.weight", hidden, "x", add=True))
    steps.logits(x="x", norm="ln_out", eps=eps, weight="head.weight")
    return steps
