"""What every reader gives: tensors under RWKV's own names and in its own shapes, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import TensorShapeError
from ...tokenizer import Tokenizer
from ..models.tensors import Shape, squeezed

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class StoredTensor(Protocol):
    """A tensor in a file.

    Attributes:
        shape: its shape in RWKV's own files, whatever it is in this one.
        dtype: how its numbers are stored, for people.
        readable: whether goslet reads that.
    """

    @property
    def shape(self) -> Shape: ...  # noqa: D102 - the class says it
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def readable(self) -> bool: ...  # noqa: D102

    def read(self, rows: slice) -> Tensor:
        """Some rows, all with `slice(None)`, in float32."""
        ...


@dataclass(frozen=True)
class FloatTensor:
    """A tensor that torch has mapped from a file."""

    tensor: Tensor

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """Its type as torch calls it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def readable(self) -> bool:
        """Whether it is of one of the floating types that models are stored in."""
        return self.tensor.dtype in _FLOATS

    def read(self, rows: slice) -> Tensor:
        """Some rows in float32; a copy, unless that is its type."""
        return self.tensor.detach()[rows].to(torch.float32) if self.tensor.ndim else self.tensor.detach().float()


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor that a file holds in another form than RWKV's own files do.

    Attributes:
        source: what the file holds.
        shape: the shape that it has here.
        convert: from all of it, in float32, to that shape.
    """

    source: StoredTensor
    shape: Shape
    convert: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> str:
        """As the file has it."""
        return self.source.dtype

    @property
    def readable(self) -> bool:
        """Whether goslet reads that."""
        return self.source.readable

    def read(self, rows: slice) -> Tensor:
        """Some rows of the converted tensor in float32."""
        return self.convert(self.source.read(slice(None))).reshape(self.shape)[rows]


@dataclass(frozen=True)
class Zeros:
    """A tensor that a file leaves out because all of it is zero."""

    shape: Shape
    dtype: str = "float32"
    readable: bool = True

    def read(self, rows: slice) -> Tensor:
        """Some rows of it in float32."""
        return torch.zeros(self.shape)[rows]


def turned(source: StoredTensor) -> ConvertedTensor:
    """A matrix that the file holds the other way round.

    Raises:
        TensorShapeError: it is no matrix.
    """
    if len(source.shape) != 2:
        raise TensorShapeError("is not a matrix", expected="2 axes", found=list(source.shape))
    return ConvertedTensor(source, (source.shape[1], source.shape[0]), lambda tensor: tensor.T)


def shares(source: StoredTensor, letters: str) -> dict[str, ConvertedTensor]:
    """The shares of the token before, one vector for each letter, that a file stacks into one tensor.

    Raises:
        TensorShapeError: it stacks another number of them.
    """
    shape = squeezed(source.shape)
    if len(shape) != 2 or shape[0] != len(letters):
        raise TensorShapeError(
            "does not stack a share for each projection", expected=f"{len(letters)} rows", found=list(source.shape)
        )

    def row(index: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.reshape(shape)[index]

    return {letter: ConvertedTensor(source, shape[1:], row(index)) for index, letter in enumerate(letters)}


@dataclass(frozen=True)
class OnlyHere:
    """Why another program that reads this form of file does not take the same model from this one.

    Attributes:
        found: what the file is instead.
        remedy: what such a program reads.
    """

    found: str
    remedy: str


WRAPPED = OnlyHere(
    "a checkpoint with what a trainer puts around a model's names or tensors",
    "save the model's tensors alone, under RWKV's own names, and give that file",
)
CONVERTED = OnlyHere("a checkpoint that was converted for web-rwkv", "give the .pth that it was made from")


@dataclass(frozen=True)
class StoredModel:
    """What a reader found.

    Attributes:
        format: ``"pth"``, ``"safetensors"``, ``"hf"``, ``"gguf"`` or ``"ggml"``.
        tensors: every tensor by RWKV's own name.
        norm_eps: eps of the per-head group norm where the file says it.
        layer_norm_eps: eps of every LayerNorm where the file says it.
        tokenizer: a vocabulary file that belongs to the model, or what reads the vocabulary in the model's own file,
            where there is one.
        notes: what the owner should know of how the file was read, a sentence each.
        first_norm: whether the model has ln0, the norm of what comes out of the embedding.
        only_here: why no other program reads the same from the same path, where that is so.
    """

    format: str
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    norm_eps: float | None = None
    layer_norm_eps: float | None = None
    tokenizer: Path | Callable[[], Tokenizer] | None = None
    notes: tuple[str, ...] = ()
    first_norm: bool = True
    only_here: OnlyHere | None = None
