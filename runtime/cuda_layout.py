"""How quantized weights lie for the CUDA kernels, as ``csrc/include/goslet_cuda.h`` says at ``goslet_cuda_product``.

Nothing of goslet is imported here, so that ``tools/gpu_check.py`` can use this file where goslet is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PADDED_TO = 128
# Packed together, because four bits become 32 on the way.
_ROWS = 1024
# GOSLET_CUDA_VERSION: of the kernels' interface and of this layout.
PLUGIN_VERSION = 1


def padded_inputs(n_in: int) -> int:
    """The number of inputs that the kernels see."""
    return -(-n_in // PADDED_TO) * PADDED_TO


def pack_weights(numbers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """The bytes of a matrix's weights.

    Args:
        numbers: signed numbers [n_out, n_in]: -8 to 7 for 4 bits, -128 to 127 for 8.
        bits: 4 or 8.

    Returns:
        uint8 [n_out, padded_inputs(n_in) · bits / 8].
    """
    packed = [_pack_rows(numbers[begin : begin + _ROWS], bits) for begin in range(0, len(numbers), _ROWS)]
    return np.concatenate(packed)


def _pack_rows(numbers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    n_out, n_in = numbers.shape
    whole = np.zeros((n_out, padded_inputs(n_in)), np.int8)
    whole[:, :n_in] = numbers
    if bits == 4:
        # (step, j, c, i, odd): word 4c + j of a step has eight inputs, the even ones in its low half.
        pairs = (whole + 8).astype(np.uint32).reshape(n_out, -1, 4, 4, 4, 2)
        shifts = 4 * np.arange(4, dtype=np.uint32)[:, None] + np.array([0, 16], np.uint32)
        words = (pairs << shifts).sum((-2, -1), dtype=np.uint32).astype("<u4").transpose(0, 1, 3, 2)
        return np.ascontiguousarray(words).view(np.uint8).reshape(n_out, -1)
    return _flat(whole.view(np.uint8).reshape(n_out, -1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5))


def _flat(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(packed).reshape(len(packed), -1)


def pack_scales(scales: NDArray[Any], n_in: int, group: int) -> NDArray[np.float16]:
    """The scales of a matrix's groups, with zeros for the padded ones.

    Args:
        scales: [n_out, ⌈n_in / group⌉].
        n_in: inputs.
        group: inputs that share a scale.

    Returns:
        float16 [n_out, padded_inputs(n_in) / group].
    """
    whole = np.zeros((len(scales), padded_inputs(n_in) // group), np.float16)
    whole[:, : scales.shape[1]] = scales
    return whole
