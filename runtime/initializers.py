"""What the step graph calls its weights, and how an engine's stored weights become them.

Engines store a matrix as rows [out, in]; ONNX multiplies from the right, so the graph's initializer of the same name is
[in, out], with float32 scales [⌈in / group⌉, out] beside it under the name plus ``.scale``. Vectors are as stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import _native
from .spec import EMBEDDING
from .weights import EncodedWeight

if TYPE_CHECKING:
    from .enginefile import EngineFile

SCALE_SUFFIX = ".scale"


def graph_initializers(file: EngineFile) -> dict[str, NDArray[np.uint8]]:
    """The raw bytes of every initializer of an engine's graph, by name; the embedding is not one."""
    buffers: dict[str, NDArray[np.uint8]] = {}
    for name in file.tensors:
        if name == EMBEDDING:
            continue
        weight = file.weight(name)
        if len(weight.shape) == 1:
            buffers[name] = weight.data.reshape(-1).view(np.uint8)
            continue
        buffers[name] = _transposed(weight)
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
