"""What an engine adds to a quantized matrix's outputs to make up for what quantization took.

With Q the stored matrix [out, in] its outputs are Q·x + up·(down·x) + kept·x: a low-rank residual of two thin matrices,
and a sparse one that holds a few numbers for each output, every one with the input that it belongs to. Either may be
absent. They lie in the engine as tensors named after the matrix:

- ``<name>.down`` [rank, in] and ``<name>.up`` [out, rank],
- ``<name>.kept`` [out, n] and ``<name>.kept_inputs`` [out, n], places in ``u16``.

`goslet.export.compensate` finds them at export, `goslet.recalibration` improves the low-rank ones without a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .enginefile import EngineFile, TensorSource
from .errors import HeaderError, InputError
from .spec import DOWN, KEPT, KEPT_INPUTS, RESIDUALS, UP
from .weights import WeightFormat, decode, encode, encode_places

Float32Array = NDArray[np.float32]
# Where sums of residuals are stored: half precision errs by 2^-11 of a number, far below what it makes up for.
RESIDUAL_FORMAT = WeightFormat("f16")


@dataclass(frozen=True, eq=False)
class Residual:
    """What is added to a matrix [out, in].

    Attributes:
        down: float32 [rank, in], or None.
        up: float32 [out, rank], or None as `down` is.
        kept: float32 [out, n], or None.
        kept_inputs: integers [out, n], the input that each number belongs to, or None as `kept` is.

    Raises:
        InputError: the shapes do not go together.
    """

    down: Float32Array | None = None
    up: Float32Array | None = None
    kept: Float32Array | None = None
    kept_inputs: NDArray[np.integer[Any]] | None = None

    def __post_init__(self) -> None:
        pair = (self.down is None) == (self.up is None) and (self.kept is None) == (self.kept_inputs is None)
        if pair and self.down is not None and self.up is not None:
            pair = self.down.ndim == self.up.ndim == 2 and self.down.shape[0] == self.up.shape[1]
        if pair and self.kept is not None and self.kept_inputs is not None:
            pair = self.kept.ndim == 2 and self.kept.shape == self.kept_inputs.shape
        if not pair:
            raise InputError(
                "is not a residual's", place="shapes", expected="[rank, in] and [out, rank], [out, n] twice"
            )

    @property
    def rank(self) -> int:
        """Columns of `up`; 0 where there are none."""
        return 0 if self.down is None else len(self.down)

    def added_to(self, matrix: Float32Array) -> Float32Array:
        """The matrix [out, in] that has the same outputs by itself."""
        total = matrix
        if self.down is not None and self.up is not None:
            total = total + self.up @ self.down
        if self.kept is not None and self.kept_inputs is not None:
            total = total.copy() if total is matrix else total
            np.add.at(total, (np.arange(len(total))[:, None], self.kept_inputs), self.kept)
        return total

    def stored(self) -> Residual:
        """This residual after a round trip through its format."""

        def rounded(array: Float32Array | None) -> Float32Array | None:
            return None if array is None else decode(encode(array, RESIDUAL_FORMAT, "residual"))

        return Residual(rounded(self.down), rounded(self.up), rounded(self.kept), self.kept_inputs)


def residual_of(file: EngineFile, name: str) -> Residual | None:
    """The residual of a matrix, or None.

    Raises:
        HeaderError: half of a pair is missing, or they do not go with the matrix.
        InputError: they do not go together.
    """

    def read(suffix: str, other: str) -> Float32Array | None:
        present = {name + suffix, name + other} & file.tensors.keys()
        return decode(file.weight(name + suffix)) if present else None

    if not any(name + suffix in file.tensors for suffix in RESIDUALS):
        return None
    places = read(KEPT_INPUTS, KEPT)
    kept_inputs = None if places is None else places.astype(int)
    n_out, n_in = file.tensors[name].shape
    shapes = {UP: (n_out, None), DOWN: (None, n_in), KEPT: (n_out, None), KEPT_INPUTS: (n_out, None)}
    for suffix, sizes in shapes.items():
        entry = file.tensors.get(name + suffix)
        found = () if entry is None else entry.shape
        if entry is not None and (
            len(found) != 2 or any(a not in (None, b) for a, b in zip(sizes, found, strict=True))
        ):
            raise HeaderError(
                "does not go with its matrix",
                file=file.path,
                place=f"tensor {name}{suffix}",
                expected=f"a shape beside [{n_out}, {n_in}]",
                found=list(found),
                remedy="export the engine again",
            )
    if kept_inputs is not None and int(kept_inputs.max()) >= n_in:
        raise HeaderError(
            "names an input that is not there",
            file=file.path,
            place=f"tensor {name}{KEPT_INPUTS}",
            expected=f"0 to {n_in - 1}",
            found=int(kept_inputs.max()),
            remedy="export the engine again",
        )
    return Residual(read(DOWN, UP), read(UP, DOWN), read(KEPT, KEPT_INPUTS), kept_inputs)


def effective_weight(file: EngineFile, name: str) -> Float32Array:
    """A tensor's numbers, float32 of its shape, with its residual added where it has one."""
    weight = decode(file.weight(name))
    residual = residual_of(file, name)
    return weight if residual is None else residual.added_to(weight)


def with_residuals(file: EngineFile, residuals: Mapping[str, Residual]) -> list[TensorSource]:
    """An engine's tensors, to be written again: each matrix with its residual in `residuals`, and no other residual."""
    sources = []
    for name, entry in file.tensors.items():
        if not name.endswith(RESIDUALS):
            produce = partial(file.weight, name)
            sources.append(TensorSource(name, entry.format, entry.shape, produce, entry.layout))
            if name in residuals:
                sources += tensor_sources(name, residuals[name])
    return sources


def tensor_sources(name: str, residual: Residual) -> list[TensorSource]:
    """The tensors that hold a matrix's residual, to be written; `down` is packed for products, the others are not."""
    sources = []
    for suffix, layout, array in (
        (DOWN, "tiles", residual.down),
        (UP, "rows", residual.up),
        (KEPT, "rows", residual.kept),
    ):
        if array is not None:
            weight = encode(np.ascontiguousarray(array, np.float32), RESIDUAL_FORMAT, name + suffix)
            sources.append(
                TensorSource(name + suffix, weight.format, weight.shape, lambda weight=weight: weight, layout)  # type: ignore[misc]
            )
    if residual.kept_inputs is not None:
        places = encode_places(residual.kept_inputs)
        sources.append(TensorSource(name + KEPT_INPUTS, places.format, places.shape, lambda: places))
    return sources
