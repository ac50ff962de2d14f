"""RWKV-7 "Goose" and its variant 7a: recognition, tensors, the one-token step and its recurrence.

Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), section 4, and the released
inference code where the two differ (the value residual's direction) and for 7a's DeepEmbed. x is the residual stream
of D numbers, in H heads of N.

DeepEmbed gives every token a matrix [R, R] in every layer, which scales the channel mix's hidden layer together with
two small ones that all tokens share. The matrices depend on the token alone, so they follow the embedded token in its
row of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import no_type_check

import torch
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from ...errors import CheckpointError
from ...spec import EMBEDDING, ModelSpec, StateSpec, StateTensor
from .blocks import Operator, Ops, State, head_norm, lerp, residual_step
from .program import Program, product
from .tensors import LAYER_NORM_EPS, Kind, Rules, Shapes, Source, TensorRule, count_layers, shape_of

NAMES = ("7", "7a")
NORM_EPS = 64e-5
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


def read_spec(shapes: Shapes, norm_eps: float | None) -> ModelSpec:
    """The model's dimensions from its tensors' shapes; `norm_eps` overrides the group norm's eps of 64e-5.

    Raises:
        MissingTensorError, TensorShapeError: a tensor that tells a dimension is absent or has the wrong rank.
        CheckpointError: heads do not make up the width, or blocks are not numbered from 0 without a gap.
    """
    vocab_size, n_embd = shape_of(shapes, "emb.weight", 2)
    n_layer = count_layers(shapes)
    n_head, head_size = shape_of(shapes, "blocks.0.att.r_k", 2)
    if n_head * head_size != n_embd:
        raise CheckpointError(
            "heads do not make up the width",
            place="blocks.0.att.r_k",
            expected=f"{n_embd} numbers",
            found=[n_head, head_size],
        )
    letters = "wavg" if n_layer > 1 else "wag"
    ranks = {letter: shape_of(shapes, f"blocks.{int(letter == 'v')}.att.{letter}1", 2)[1] for letter in letters}
    deep = "blocks.0.ffn.s_emb.weight" in shapes
    if deep:
        ranks["s"] = shape_of(shapes, "blocks.0.ffn.s1", 2)[1]
    return ModelSpec(
        version="7a" if deep else "7",
        n_layer=n_layer,
        n_embd=n_embd,
        n_ffn=shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=head_size,
        vocab_size=vocab_size,
        norm_eps=NORM_EPS if norm_eps is None else norm_eps,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks=ranks,
    )


def unused(spec: ModelSpec) -> Collection[str]:
    """Layer 0 defines the first value, so nothing reads its value-residual LoRA; official files carry it anyway."""
    return tuple(f"blocks.0.att.v{part}" for part in "012")


def tensor_rules(spec: ModelSpec, names: Collection[str]) -> tuple[TensorRule, ...]:
    """Every tensor of an RWKV-7 engine, in the order of use."""
    width, hidden = spec.n_embd, spec.n_ffn
    rules = Rules(spec)
    if spec.version == "7a":
        _deep_embedding(rules, spec)
    else:
        rules.embedding()
    for layer in range(spec.n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        rules.norm(f"blocks.{layer}.ln1")
        for letter in "rwkvag":
            rules.vector(f"{att}.x_{letter}")
        for letter in "wavg" if layer else "wag":
            if letter != "g":
                rules.vector(f"{att}.{letter}0")
            rank = spec.ranks[letter]
            rules.lora((f"{att}.{letter}1", f"{att}.{letter}2"), width, rank, width)
        rules.vector(f"{att}.k_k")
        rules.vector(f"{att}.k_a")
        rules.vector(f"{att}.r_k", spec.n_head, spec.head_size)
        for part in ("receptance", "key", "value", "output"):
            rules.matrix(f"{att}.{part}.weight", width, width, Kind.PROJECTION)
        rules.norm(f"{att}.ln_x")
        rules.norm(f"blocks.{layer}.ln2")
        rules.vector(f"{ffn}.x_k")
        rules.matrix(f"{ffn}.key.weight", hidden, width, Kind.CHANNEL_MIX)
        if spec.version == "7a":
            rules.vector(f"{ffn}.s0", hidden)
            rules.lora((f"{ffn}.s1", f"{ffn}.s2"), width, spec.ranks["s"], hidden)
        rules.matrix(f"{ffn}.value.weight", width, hidden, Kind.CHANNEL_MIX, input_sparse=True)
    rules.norm("ln_out")
    rules.matrix("head.weight", spec.vocab_size, width, Kind.HEAD)
    return rules.all()


def _deep_embedding(rules: Rules, spec: ModelSpec) -> None:
    """7a's embedding: behind the embedded token x every layer's matrix s_emb[token] + s_emb_x · x."""
    width, size = spec.n_embd, spec.ranks["s"] ** 2

    def derive(embedding: Tensor, scale: Tensor, bias: Tensor, *deep: Tensor) -> Tensor:
        x = functional.layer_norm(embedding, (width,), scale, bias, spec.layer_norm_eps)
        matrices = (own + x @ shared.T for own, shared in zip(deep[::2], deep[1::2], strict=True))
        return torch.cat([x, *matrices], 1)

    deep_sources = [
        source
        for layer in range(spec.n_layer)
        for source in (
            Source(f"blocks.{layer}.ffn.s_emb.weight", (spec.vocab_size, size), by_token=True),
            Source(f"blocks.{layer}.ffn.s_emb_x.weight", (size, width)),
        )
    ]
    sources = (
        Source(EMBEDDING, (spec.vocab_size, width), by_token=True),
        Source("blocks.0.ln0.weight", (width,)),
        Source("blocks.0.ln0.bias", (width,)),
        *deep_sources,
    )
    rules.derived(EMBEDDING, (spec.vocab_size, sum(spec.input_sizes)), Kind.EMBEDDING, sources, derive)


def state_spec(spec: ModelSpec) -> StateSpec:
    """Per layer the two shift vectors and the WKV matrix, rows by value and columns by key."""
    matrix = (spec.n_head, spec.head_size, spec.head_size)
    tensors = []
    for layer in range(spec.n_layer):
        tensors.append(StateTensor(f"{layer}.att_shift", (spec.n_embd,), "channel"))
        tensors.append(StateTensor(f"{layer}.wkv", matrix, "head,value,key"))
        tensors.append(StateTensor(f"{layer}.ffn_shift", (spec.n_embd,), "channel"))
    return StateSpec(tuple(tensors))


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


def _channel_mix(spec: ModelSpec, ops: Ops, layer: int, x: Tensor, previous: Tensor, deep: Sequence[Tensor]) -> Tensor:
    ffn = f"blocks.{layer}.ffn"
    hidden = torch.relu(ops.linear(f"{ffn}.key.weight", lerp(x, previous, ops.vector(f"{ffn}.x_k"))))
    hidden = hidden * hidden
    if deep:
        rank = spec.ranks["s"]
        low = ops.linear(f"{ffn}.s1", x).unsqueeze(1) @ deep[layer].reshape(-1, rank, rank)
        hidden = hidden * (ops.linear(f"{ffn}.s2", low.squeeze(1)) + ops.vector(f"{ffn}.s0"))
    return ops.linear(f"{ffn}.value.weight", hidden)


def step(spec: ModelSpec, ops: Ops, token: Sequence[Tensor], state: State) -> tuple[Tensor, dict[str, Tensor]]:
    """One token, as `blocks.Version.step` says; `token` is the embedded token and, in 7a, every layer's matrix."""
    x, *deep = token
    v_first: Tensor | None = None

    def time_mix(layer: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal v_first
        y, wkv, v_first = _time_mix(spec, ops, layer, x, state[f"{layer}.att_shift"], state[f"{layer}.wkv"], v_first)
        return y, {f"{layer}.wkv": wkv}

    def channel_mix(layer: int, x: Tensor) -> Tensor:
        return _channel_mix(spec, ops, layer, x, state[f"{layer}.ffn_shift"], deep)

    return residual_step(spec, ops, x, time_mix, channel_mix)


def program(spec: ModelSpec) -> Program:
    """The same token as `step`, as the native engine runs it: eight fused steps a layer, ten in 7a."""
    width, eps = spec.n_embd, spec.layer_norm_eps
    pieces = ["x", *(f"deep_{layer}" for layer in range(spec.n_layer) if spec.version == "7a")]
    steps = Program(dict(zip(pieces, spec.input_sizes, strict=True)))
    mixed = {letter: steps.register(f"mixed_{letter}", width) for letter in "rwkvag"}
    r, w, k, v, a, g, y = (steps.register(name, width) for name in ("r", "w", "k", "v", "a", "g", "y"))
    first_value, value_mix = steps.register("first_value", width), steps.register("value_mix", width)
    hidden = steps.register("hidden", spec.n_ffn)
    low = {letter: steps.register(f"low_{letter}", rank) for letter, rank in spec.ranks.items()}
    normed = steps.register("normed", width) if spec.version == "7a" else None
    scale = steps.register("scale", spec.ranks["s"]) if normed else ""
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
        steps.wkv(
            7,
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
        steps.linear(product(f"{att}.output.weight", y, "x", combine="add"))
        steps.norm_shift(
            x="x",
            norm=f"blocks.{layer}.ln2",
            eps=eps,
            shift=f"{layer}.ffn_shift",
            mixes={f"{ffn}.x_k": mixed["k"]},
            normed=normed,
        )
        key = product(f"{ffn}.key.weight", mixed["k"], hidden, activation="relu_squared")
        if normed is None:
            steps.linear(key)
        else:
            steps.linear(key, product(f"{ffn}.s1", normed, low["s"]))
            steps.token_product(x=low["s"], matrix=f"deep_{layer}", out=scale)
            steps.linear(
                product(f"{ffn}.s2", scale, hidden, bias=f"{ffn}.s0", combine="gate", operands=[hidden]),
            )
        steps.linear(product(f"{ffn}.value.weight", hidden, "x", combine="add"))
    steps.logits(x="x", norm="ln_out", eps=eps, weight="head.weight")
    return steps
