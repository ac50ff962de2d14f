"""ggml's blocks of quantized numbers, decoded one number at a time: the reference for reading through gguf's tables.

Source: ggml's ``ggml-common.h`` (what lies where) and ``ggml-quants.c`` (what it means).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Decoder = Callable[[bytes], Iterator[float]]

# Where half floats lie within a block, so that random bytes can be given finite scales.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
}
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FOUR_BIT_FLOATS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def random_blocks(kind: str, n_rows: int, n_blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    """Rows of blocks: every bit random, but for scales, which are random and finite."""
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (n_rows * n_blocks, block_bytes), dtype=np.uint8)
    for place in HALVES[kind]:
        scales = rng.uniform(-0.1, 0.1, len(raw)).astype("<f2")
        raw[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(118, 130, len(raw))  # a power of two
    return raw.reshape(n_rows, -1)


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _nibbles(block: bytes, at: int) -> Iterator[int]:
    """16 bytes: the low halves of all, then the high ones."""
    yield from (byte & 15 for byte in block[at : at + 16])
    yield from (byte >> 4 for byte in block[at : at + 16])


def _q4_0(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * (q - 8) for q in _nibbles(block, 2))


def _q4_1(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * q + _half(block, 2) for q in _nibbles(block, 4))


def _fifth_bit(block: bytes, at: int) -> Iterator[int]:
    high = struct.unpack_from("<I", block, at)[0]
    return (q + 16 * (high >> i & 1) for i, q in enumerate(_nibbles(block, at + 4)))


def _q5_0(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * (q - 16) for q in _fifth_bit(block, 2))


def _q5_1(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * q + _half(block, 2) for q in _fifth_bit(block, 4))


def _q8_0(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * q for q in struct.unpack_from("<32b", block, 2))


def _places() -> Iterator[tuple[int, int, int]]:
    """The half of 128 numbers, the quarter of 32 in it and the place in that, of 256 numbers."""
    return ((n // 128, n // 32 % 4, n % 32) for n in range(256))


def _q2_k(block: bytes) -> Iterator[float]:
    for n, (half, quarter, i) in enumerate(_places()):
        scale = block[n // 16]
        q = block[16 + 32 * half + i] >> 2 * quarter & 3
        yield _half(block, 80) * (scale & 15) * q - _half(block, 82) * (scale >> 4)


def _q3_k(block: bytes) -> Iterator[float]:
    scales = block[96:108]
    for n, (half, quarter, i) in enumerate(_places()):
        j = n // 16
        low = scales[j] & 15 if j < 8 else scales[j - 8] >> 4
        scale = low | (scales[8 + j % 4] >> 2 * (j // 4) & 3) << 4
        q = (block[32 + 32 * half + i] >> 2 * quarter & 3) - (0 if block[i] >> (4 * half + quarter) & 1 else 4)
        yield _half(block, 108) * (scale - 32) * q


def _scale_and_least(packed: bytes, j: int) -> tuple[int, int]:
    """Six bits each, of eight groups, in 12 bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def _q45_k(block: bytes, bits: int) -> Iterator[float]:
    numbers = 16 if bits == 4 else 48
    for n in range(256):
        group, i = n // 32, n % 32
        q = block[numbers + 32 * (group // 2) + i] >> 4 * (group % 2) & 15
        if bits == 5:
            q |= (block[16 + i] >> group & 1) << 4
        scale, least = _scale_and_least(block[4:16], group)
        yield _half(block, 0) * scale * q - _half(block, 2) * least


def _q6_k(block: bytes) -> Iterator[float]:
    for half, quarter, i in _places():
        low = block[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
        high = block[128 + 32 * half + i] >> 2 * quarter & 3
        scale = struct.unpack_from("b", block, 192 + 8 * half + 2 * quarter + i // 16)[0]
        yield _half(block, 208) * scale * ((low | high << 4) - 32)


def _iq4_nl(block: bytes) -> Iterator[float]:
    return (_half(block, 0) * _NONLINEAR[q] for q in _nibbles(block, 2))


def _iq4_xs(block: bytes) -> Iterator[float]:
    high = struct.unpack_from("<H", block, 2)[0]
    for group in range(8):
        scale = block[4 + group // 2] >> 4 * (group % 2) & 15 | (high >> 2 * group & 3) << 4
        yield from (_half(block, 0) * (scale - 32) * _NONLINEAR[q] for q in _nibbles(block, 8 + 16 * group))


def _mxfp4(block: bytes) -> Iterator[float]:
    return (2.0 ** (block[0] - 127) * _FOUR_BIT_FLOATS[q] for q in _nibbles(block, 1))


def _tq1_0(block: bytes) -> Iterator[float]:
    """Five trits in a byte, as the first digits after the point of a fraction in base three."""
    for first, n_bytes, n_trits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for trit in range(n_trits):
            for byte in block[first : first + n_bytes]:
                yield _half(block, 52) * ((byte * 3**trit % 256 * 3 >> 8) - 1)


def _tq2_0(block: bytes) -> Iterator[float]:
    return (_half(block, 64) * ((block[32 * half + i] >> 2 * quarter & 3) - 1) for half, quarter, i in _places())


DECODERS: dict[str, Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda block: _q45_k(block, 4),
    "Q5_K": lambda block: _q45_k(block, 5),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}


def decoded(kind: str, rows: NDArray[np.uint8], block_bytes: int) -> NDArray[np.float64]:
    """The numbers of rows of blocks."""
    return np.array(
        [
            [x for at in range(0, len(row), block_bytes) for x in DECODERS[kind](row[at : at + block_bytes])]
            for row in (row.tobytes() for row in rows)
        ]
    )
