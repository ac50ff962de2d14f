"""What the step graph calls its weights, and how an engine's stored weights become them.

`EngineFile.weight` gives a matrix as rows [out, in]; ONNX multiplies from the right, so the graph's initializer of the
same name is [in, out], with float32 scales [⌈in / group⌉, out] beside it under the name plus ``.scale``. Vectors are as
stored. ONNX has no integers of 3 bits, so ``int3`` becomes the same numbers in INT4 when it is loaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _native
from .errors import HeaderError
from .spec import EMBEDDING
from .weights import EncodedWeight, WeightFormat, as_int4

if TYPE_CHECKING:
    from .enginefile import EngineFile

SCALE_SUFFIX = ".scale"
# The function of a graph that gives products with 8-bit weights their activations as two terms
# (`goslet.export.activations`); graphs of older engines have none.
SPLIT = "TwoTerms"
# TensorProto.DataType of onnx.proto.
ONNX_TYPES = {"f32": 1, "f16": 10, "bf16": 16, "int8": 3, "int4": 22, "int3": 22, "u16": 4}
_ONNX_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 4, "u16": 16}


class Initializer(NamedTuple):
    """What a weight is in the graph.

    Attributes:
        onnx_type: its type, as a number of ONNX's.
        shape: its shape, [in, out] for a matrix.
        size_bytes: length of its data; 4-bit numbers lie two to a byte.
    """

    onnx_type: int
    shape: tuple[int, ...]
    size_bytes: int


def expected_initializers(file: EngineFile) -> dict[str, Initializer]:
    """What `graph_initializers` gives, by name, told from the header alone.

    Raises:
        HeaderError: a tensor is neither vector nor matrix, or is called as another one's scales.
    """
    expected: dict[str, Initializer] = {}
    for name, entry in file.tensors.items():
        if name == EMBEDDING:
            continue
        if len(entry.shape) > 2:
            raise HeaderError(
                "is neither a vector nor a matrix",
                file=file.path,
                place=f"tensor {name}",
                found=f"shape {list(entry.shape)}",
                remedy="export the engine again",
            )
        made = weight_initializers(name, entry.format, entry.shape)
        for key in made.keys() & expected.keys():
            raise HeaderError(
                "is the name of a tensor and of another one's scales",
                file=file.path,
                place=f"tensor {key}",
                remedy="export the engine again",
            )
        expected |= made
    return expected


def weight_initializers(name: str, stored_as: WeightFormat, shape: tuple[int, ...]) -> dict[str, Initializer]:
    """The initializers, by name, that a weight of the given format and stored shape becomes: itself, and its scales."""
    made = {name: _initializer(stored_as.name, shape[::-1])}
    if stored_as.is_integer:
        n_out, n_in = shape
        made[name + SCALE_SUFFIX] = _initializer("f32", (stored_as.groups(n_in), n_out))
    return made


def _initializer(format_name: str, shape: tuple[int, ...]) -> Initializer:
    return Initializer(ONNX_TYPES[format_name], shape, -(-math.prod(shape) * _ONNX_BITS[format_name] // 8))


def graph_initializers(file: EngineFile) -> dict[str, NDArray[np.uint8]]:
    """The raw bytes of every initializer of an engine's graph, by name; the embedding is not one.

    They are as `expected_initializers` says, which also says which engines have none.
    """
    buffers: dict[str, NDArray[np.uint8]] = {}
    for name in file.tensors:
        if name != EMBEDDING:
            # No name is given to the weight, which may be a copy and must not be in memory with the next one.
            buffers |= weight_buffers(name, file.weight(name))
    return buffers


def weight_buffers(name: str, weight: EncodedWeight) -> dict[str, NDArray[np.uint8]]:
    """The raw bytes of the initializers that one stored tensor becomes, by name; `weight_initializers` lists them."""
    if weight.format.name == "int3":
        weight = as_int4(weight)
    if len(weight.shape) == 1:
        return {name: weight.data.reshape(-1).view(np.uint8)}
    buffers = {name: _transposed(weight)}
    if weight.scales is not None:
        buffers[name + SCALE_SUFFIX] = np.ascontiguousarray(weight.scales.T, np.float32).reshape(-1).view(np.uint8)
    return buffers


def _transposed(weight: EncodedWeight) -> NDArray[np.uint8]:
    n_out, n_in = weight.shape
    rows = weight.data.reshape(n_out, -1)
    if weight.format.name == "int4":
        return _native.transpose_int4(rows, n_in)
    element_bytes = rows.shape[1] // n_in
    elements = rows.reshape(-1).view(f"u{element_bytes}").reshape(n_out, n_in)
    return np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)
