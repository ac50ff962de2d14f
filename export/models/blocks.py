"""What every RWKV version's file is made of: operators, the way a step asks for weights, and the arithmetic shared.

A version's file (``rwkv7.py`` and so on) states its tensors as `TensorRule`s, writes its step once against the
`Ops` interface, and declares what is its own as an `Operator`. The same step then runs eagerly (`EagerOps`), with
emulated activation quantization (`verify`), or is traced to ONNX (`goslet.export.graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...spec import ModelSpec, StateSpec
from .program import Program
from .tensors import Shapes, TensorRule

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """A computation of RWKV's own, kept whole in the graph as ``goslet::<name>``.

    Attributes:
        name: the ONNX operator's name in the domain ``goslet``.
        reference: the plain form in PyTorch, tensors in, tensors out.
        output_shapes: the outputs' shapes from the inputs' tensors (the batch axis may be symbolic).
        function: builds the ONNX model-local function whose body is standard ONNX.
    """

    name: str
    reference: Callable[..., tuple[Tensor, ...]]
    output_shapes: Callable[..., tuple[Sequence[int | torch.SymInt], ...]]
    function: Callable[[], object]


class Ops(Protocol):
    """What a step asks for instead of touching weights itself."""

    def vector(self, name: str) -> Tensor:
        """The tensor `name` in float32, in its stored shape."""
        ...

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Matrix product of x [B, in] with the matrix `name` [out, in]: [B, out]."""
        ...

    def call(self, operator: Operator, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The operator's outputs."""
        ...


class EagerOps:
    """Runs a step in PyTorch on given weights.

    Args:
        weights: every tensor of the engine in its shape there, all of one floating dtype.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def vector(self, name: str) -> Tensor:
        """The tensor `name` in its stored shape."""
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Matrix product of x [B, in] with the matrix `name` [out, in]: [B, out]."""
        return x @ self.weights[name].T

    def call(self, operator: Operator, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The operator's outputs by its plain form."""
        return operator.reference(*inputs)


class Version(Protocol):
    """One RWKV version: a module in this package has all of this as top-level names."""

    NAMES: tuple[str, ...]
    OPERATORS: tuple[Operator, ...]

    def recognise(self, shapes: Shapes) -> bool:
        """Whether a checkpoint with these tensors is of this version."""
        ...

    def read_spec(self, shapes: Shapes, norm_eps: float | None) -> ModelSpec:
        """The model's dimensions, read from its tensors' shapes."""
        ...

    def unused(self, spec: ModelSpec) -> Collection[str]:
        """Names that released files carry although nothing reads them."""
        ...

    def tensor_rules(self, spec: ModelSpec, names: Collection[str]) -> tuple[TensorRule, ...]:
        """Every tensor of the engine, in the order of use; `names` are the checkpoint's, where it has a choice."""
        ...

    def state_spec(self, spec: ModelSpec) -> StateSpec:
        """The state's tensors."""
        ...

    def step(
        self, spec: ModelSpec, ops: Ops, token: Sequence[Tensor], state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One token.

        Args:
            spec: the model's dimensions.
            ops: gives weights and operators.
            token: the token's row of the embedding, cut into the pieces [B, size] of `spec.input_sizes`.
            state: the tensors of `state_spec`, each with a leading batch axis.

        Returns:
            logits [B, V] and the new state under the same names.
        """
        ...

    def program(self, spec: ModelSpec) -> Program:
        """The same computation as `step`, stated as the native engine's fused steps."""
        ...


def token_pieces(rows: Tensor, spec: ModelSpec) -> tuple[Tensor, ...]:
    """What `Version.step` takes as its token, from rows of the embedding [B, sum(spec.input_sizes)]."""
    pieces = []
    start = 0
    for size in spec.input_sizes:
        pieces.append(rows[:, start : start + size])
        start += size
    return tuple(pieces)


TimeMix = Callable[[int, Tensor], tuple[Tensor, dict[str, Tensor]]]
ChannelMix = Callable[[int, Tensor], Tensor]


def residual_step(
    spec: ModelSpec, ops: Ops, x: Tensor, time_mix: TimeMix, channel_mix: ChannelMix
) -> tuple[Tensor, dict[str, Tensor]]:
    """What every version's step has in common: two residual branches a layer behind LayerNorms, and the head.

    Args:
        spec: the model's dimensions.
        ops: gives weights.
        x: the embedded token [B, D].
        time_mix: from a layer's index and its normed input [B, D] to what is added to x, and the new state of its own
            parts under their full names.
        channel_mix: from a layer's index and its normed input [B, D] to what is added to x.

    Returns:
        logits [B, V] and the new state, shifts included.
    """
    new_state: dict[str, Tensor] = {}
    for layer in range(spec.n_layer):
        h = layer_norm(x, ops, f"blocks.{layer}.ln1", spec.layer_norm_eps)
        y, parts = time_mix(layer, h)
        x = x + y
        new_state |= {f"{layer}.att_shift": h, **parts}
        h = layer_norm(x, ops, f"blocks.{layer}.ln2", spec.layer_norm_eps)
        x = x + channel_mix(layer, h)
        new_state[f"{layer}.ffn_shift"] = h
    return ops.linear("head.weight", layer_norm(x, ops, "ln_out", spec.layer_norm_eps)), new_state


def gated_channel_mix(ops: Ops, layer: int, x: Tensor, previous: Tensor, mix: str) -> Tensor:
    """The channel mix of versions 4 to 6: sigmoid(W_r x_r) · W_v relu(W_k x_k)² (RWKV-4 paper, section 3.1).

    Args:
        ops: gives weights.
        layer: the layer's index.
        x: its normed input [B, D].
        previous: that of the last token.
        mix: how the share of `previous` is called, without its letter.
    """
    ffn = f"blocks.{layer}.ffn"
    hidden = torch.relu(ops.linear(f"{ffn}.key.weight", lerp(x, previous, ops.vector(f"{ffn}.{mix}k"))))
    r = ops.linear(f"{ffn}.receptance.weight", lerp(x, previous, ops.vector(f"{ffn}.{mix}r")))
    return torch.sigmoid(r) * ops.linear(f"{ffn}.value.weight", hidden * hidden)


def layer_norm(x: Tensor, ops: Ops, name: str, eps: float) -> Tensor:
    """LayerNorm of x [B, D] with the weight and bias called `name`."""
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], ops.vector(f"{name}.weight"), ops.vector(f"{name}.bias"), eps
    )


def head_norm(y: Tensor, ops: Ops, name: str, eps: float) -> Tensor:
    """Group norm of y [B, H, N] with one group per head, weight and bias [H·N] called `name`: [B, H·N]."""
    normed = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=eps).flatten(1)
    return normed * ops.vector(f"{name}.weight") + ops.vector(f"{name}.bias")


def lerp(x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
    """Token shift: x + (previous - x)·mix. Versions 4 and 5 store 1 - mix, and their rules turn it."""
    return x + (previous - x) * mix
