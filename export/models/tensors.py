"""What tensors an engine holds, and how each is made from those of a checkpoint.

A version states its engine's tensors as `TensorRule`s. Most are one tensor of the checkpoint under its own name; the
others are computed from some (a decay's exponentials, the embedding with ln0 applied) and have names of their own.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from ...errors import MissingTensorError, TensorShapeError
from ...spec import EMBEDDING, ModelSpec

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# How a layer's tuned initial state ends in trainers' files; no version's model has a tensor of that name.
TIME_STATE = ".att.time_state"
# Every LayerNorm of the authors' own models, whatever the version.
LAYER_NORM_EPS = 1e-5


class Kind(enum.Enum):
    """What a tensor is for; recipes choose its storage format by this."""

    EMBEDDING = "embedding"
    HEAD = "head"
    PROJECTION = "projection"
    CHANNEL_MIX = "channel_mix"
    LORA = "lora"
    VECTOR = "vector"


@dataclass(frozen=True)
class Source:
    """A tensor that the checkpoint must have.

    Attributes:
        name: its name in RWKV's own files.
        shape: its shape there; axes of size 1 are not counted when it is compared.
        by_token: its rows belong to tokens, so that any of them can be read alone.
    """

    name: str
    shape: Shape
    by_token: bool = False


@dataclass(frozen=True)
class TensorRule:
    """One tensor of the engine.

    Attributes:
        name: its name in the engine, and in the graph and the program.
        shape: its shape there: [out, in] for a matrix, flat for a vector.
        kind: what it is for.
        sources: the checkpoint's tensors that it is made of.
        derive: makes it from them, in float32, given in their order and shapes. With sources by token it may be given
            some of their rows, and then gives the same rows of the result.
        input_sparse: a matrix whose inputs are often exactly zero (relu²), so that an engine may skip their columns.
        beside: where `derive` changes the numbers of a single source: tensors of the checkpoint that must be there in
            these shapes for the source's name to mean what `derive` takes it for.
    """

    name: str
    shape: Shape
    kind: Kind
    sources: tuple[Source, ...]
    derive: Callable[..., Tensor]
    input_sparse: bool = False
    beside: tuple[Source, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is stored as a matrix [out, in], and so may be quantized."""
        return self.kind is not Kind.VECTOR

    @property
    def by_token(self) -> bool:
        """Whether any of its rows can be made alone."""
        return any(source.by_token for source in self.sources)

    @property
    def layout(self) -> str:
        """How it lies in the engine (`goslet.layouts`); the embedding is gathered by rows, never multiplied."""
        if not self.is_matrix or self.kind is Kind.EMBEDDING:
            return "rows"
        return "columns" if self.input_sparse else "tiles"


def without_first_norm(rule: TensorRule) -> TensorRule:
    """A rule for a model that has no ln0: its embedding is what the checkpoint holds."""
    if rule.name != EMBEDDING:
        return rule
    return replace(rule, sources=rule.sources[:1], derive=lambda embedding: embedding)


class Rules:
    """Collects a version's rules in the order of use; names without a shape of their own are vectors of the width.

    Args:
        spec: the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._width = spec.n_embd
        self._rules: list[TensorRule] = []

    def embedding(self) -> None:
        """The embedding, with ln0 applied to every row: it follows directly."""
        width, vocab_size, eps = self._width, self._spec.vocab_size, self._spec.layer_norm_eps

        def derive(embedding: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return functional.layer_norm(embedding, (width,), scale, bias, eps)

        sources = (
            Source(EMBEDDING, (vocab_size, width), by_token=True),
            Source("blocks.0.ln0.weight", (width,)),
            Source("blocks.0.ln0.bias", (width,)),
        )
        self.derived(EMBEDDING, (vocab_size, width), Kind.EMBEDDING, sources, derive)

    def vector(self, name: str, *shape: int) -> None:
        """A vector, or what the checkpoint has in another shape and the engine flat."""
        source = Source(name, shape or (self._width,))
        self.derived(name, (math.prod(source.shape),), Kind.VECTOR, (source,), lambda tensor: tensor.reshape(-1))

    def computed(
        self, name: str, source: str, shape: Shape, compute: Callable[[Tensor], Tensor], *, beside: tuple[Source, ...]
    ) -> None:
        """A vector of the width that is computed from one tensor of the checkpoint."""

        def derive(tensor: Tensor) -> Tensor:
            return compute(tensor).reshape(-1)

        self.derived(name, (self._width,), Kind.VECTOR, (Source(source, shape),), derive, beside=beside)

    def norm(self, name: str) -> None:
        """A norm's weight and bias."""
        self.vector(f"{name}.weight")
        self.vector(f"{name}.bias")

    def matrix(self, name: str, n_out: int, n_in: int, kind: Kind, *, input_sparse: bool = False) -> None:
        """A matrix that the checkpoint stores as [out, in]."""
        source = Source(name, (n_out, n_in))
        self.derived(name, (n_out, n_in), kind, (source,), lambda tensor: tensor, input_sparse=input_sparse)

    def lora(self, names: tuple[str, str], n_in: int, rank: int, n_out: int) -> None:
        """A LoRA, whose two matrices the checkpoint stores as [in, rank] and [rank, out]: each tells how both lie."""
        down, up = Source(names[0], (n_in, rank)), Source(names[1], (rank, n_out))
        for source, other in ((down, up), (up, down)):
            shape = source.shape[::-1]
            self.derived(source.name, shape, Kind.LORA, (source,), lambda tensor: tensor.T, beside=(other,))

    def derived(
        self,
        name: str,
        shape: Shape,
        kind: Kind,
        sources: tuple[Source, ...],
        derive: Callable[..., Tensor],
        *,
        input_sparse: bool = False,
        beside: tuple[Source, ...] = (),
    ) -> None:
        """Any other tensor."""
        self._rules.append(TensorRule(name, shape, kind, sources, derive, input_sparse, beside))

    def all(self) -> tuple[TensorRule, ...]:
        """Every rule so far."""
        return tuple(self._rules)


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


def shape_of(shapes: Shapes, name: str, n_axes: int) -> Shape:
    """A tensor's shape, where a dimension of the model is read from it.

    Raises:
        MissingTensorError, TensorShapeError: it is absent, has another number of axes, or is empty.
    """
    if name not in shapes:
        raise MissingTensorError(
            "the checkpoint lacks a tensor", place=name, expected=f"{n_axes} axes", found="nothing"
        )
    shape = shapes[name]
    if len(shape) != n_axes or 0 in shape:
        raise TensorShapeError("a tensor has the wrong shape", place=name, expected=f"{n_axes} axes", found=list(shape))
    return shape
