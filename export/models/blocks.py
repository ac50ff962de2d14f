"""What every RWKV version's file is made of: tensor rules, operators and the arithmetic that versions share.

A version's file (``rwkv7.py`` and so on) states its tensors as `TensorRule`s, writes its step once against the
`Ops` interface, and declares what is its own as an `Operator`. The same step then runs eagerly (`EagerOps`), with
emulated activation quantization (`verify`), or is traced to ONNX (`goslet.export.graph`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import MissingTensorError
from ...spec import ModelSpec, StateSpec
from .program import Program

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Kind(enum.Enum):
    """What a tensor is for; recipes choose its storage format by this."""

    EMBEDDING = "embedding"
    HEAD = "head"
    PROJECTION = "projection"
    CHANNEL_MIX = "channel_mix"
    LORA = "lora"
    VECTOR = "vector"


@dataclass(frozen=True)
class TensorRule:
    """One tensor that a version needs.

    Attributes:
        name: its name in the checkpoint and in the engine.
        shape: its shape in the checkpoint; axes of size 1 are not counted when it is compared.
        kind: what it is for.
        input_first: a matrix that the checkpoint stores as [in, out]; engines store every matrix as [out, in].
        input_sparse: a matrix whose inputs are often exactly zero (relu²), so that an engine may skip their columns.
    """

    name: str
    shape: Shape
    kind: Kind
    input_first: bool = False
    input_sparse: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is stored as a matrix [out, in], and so may be quantized."""
        return self.kind is not Kind.VECTOR

    @property
    def layout(self) -> str:
        """How it lies in the engine (`goslet.layouts`); the embedding is gathered by rows, never multiplied."""
        if not self.is_matrix or self.kind is Kind.EMBEDDING:
            return "rows"
        return "columns" if self.input_sparse else "tiles"

    @property
    def stored_shape(self) -> Shape:
        """Its shape in the engine: [out, in] for a matrix, flat for a vector."""
        if self.is_matrix:
            return (self.shape[1], self.shape[0]) if self.input_first else self.shape
        return (math.prod(self.shape),)


def squeezed(shape: Sequence[int]) -> Shape:
    """A shape without its axes of size 1, and at least one axis long."""
    return tuple(size for size in shape if size != 1) or (1,)


def count_layers(shapes: Shapes) -> int:
    """Blocks of a checkpoint, by its tensors' names.

    Raises:
        MissingTensorError: blocks are not numbered from 0 without a gap.
    """
    found = {part for name in shapes if name.startswith("blocks.") and (part := name.split(".")[1]).isdecimal()}
    n_layer = len(found)
    absent = [str(layer) for layer in range(n_layer) if str(layer) not in found]
    if absent or not n_layer:
        raise MissingTensorError(
            "the checkpoint lacks a block",
            place=f"blocks.{absent[0] if absent else 0}",
            expected="blocks numbered from 0 without a gap",
            found=f"block {max(found, key=len)[:40]}" if found else "no block",
            remedy="the file is incomplete or damaged",
        )
    return n_layer


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
        weights: every tensor in its stored shape (`TensorRule.stored_shape`), all of one floating dtype.
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

    NAME: str
    OPERATORS: tuple[Operator, ...]

    def recognise(self, shapes: Shapes) -> bool:
        """Whether a checkpoint with these tensors is of this version."""
        ...

    def read_spec(self, shapes: Shapes, norm_eps: float | None) -> ModelSpec:
        """The model's dimensions, read from its tensors' shapes."""
        ...

    def unused(self, spec: ModelSpec) -> frozenset[str]:
        """Names that released files carry although nothing reads them."""
        ...

    def tensor_rules(self, spec: ModelSpec) -> tuple[TensorRule, ...]:
        """Every tensor that the version needs, in the order of their use."""
        ...

    def state_spec(self, spec: ModelSpec) -> StateSpec:
        """The state's tensors."""
        ...

    def fold_embedding(self, weights: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
        """The embedding with everything folded into it that depends on the token alone, float32 [V, D]."""
        ...

    def folded(self, spec: ModelSpec) -> frozenset[str]:
        """Names of the tensors that `fold_embedding` consumes besides the embedding; engines do not store them."""
        ...

    def step(
        self, spec: ModelSpec, ops: Ops, x: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One token: x [B, D] and the state's tensors [B, …] to logits [B, V] and the new state."""
        ...

    def program(self, spec: ModelSpec) -> Program:
        """The same computation as `step`, stated as the native engine's fused steps."""
        ...


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
    """Token shift of versions 6 and 7: x + (previous - x)·mix."""
    return x + (previous - x) * mix
