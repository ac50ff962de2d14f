"""Packed layouts: every number lies where csrc/kernels/matrix.h says, and comes back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goslet.errors import InputError, QuantizationError
from goslet.layouts import LAYOUTS, PackedWeight, layout_data_bytes, layout_scales_bytes, pack, unpack
from goslet.weights import (
    FLOAT_BYTES,
    GROUPS,
    INTEGER_RANGES,
    EncodedWeight,
    WeightFormat,
    encode_values,
    quantized_values,
)

FORMATS = [WeightFormat(name) for name in FLOAT_BYTES] + [
    WeightFormat(name, group) for name in ("int8", "int4", "int3") for group in GROUPS
]
SHAPES = [(1, 1), (7, 33), (9, 31), (8, 32), (64, 64), (65, 100), (130, 257)]


def made(fmt: WeightFormat, n_out: int, n_in: int, seed: int = 0) -> EncodedWeight:
    rng = np.random.default_rng([seed, n_out, n_in])
    if not fmt.is_integer:
        data = rng.integers(0, 256, (n_out, n_in * FLOAT_BYTES[fmt.name]), np.uint8)
        return EncodedWeight(fmt, (n_out, n_in), data, None)
    low, high = INTEGER_RANGES[fmt.name]
    scales = rng.uniform(0.5, 2, (n_out, fmt.groups(n_in))).astype(np.float16)
    return encode_values(rng.integers(low, high + 1, (n_out, n_in), np.int8), scales, fmt)


def padded(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def by_the_text(weight: EncodedWeight, layout: str) -> tuple[bytes, list[float]]:
    """The comment at the top of csrc/kernels/matrix.h, one number at a time."""
    fmt, (n_out, n_in) = weight.format, weight.shape
    together = 8 if layout == "tiles" else 128 if fmt.name in ("int4", "int3") else 64
    outs, ins = padded(n_out, together), padded(n_in, 32)
    blocks = [range(first, first + together) for first in range(0, outs, together)]
    size = FLOAT_BYTES.get(fmt.name, 1)
    values = quantized_values(weight).tolist() if fmt.is_integer else []

    def number(o: int, c: int) -> bytes:
        if o >= n_out or c >= n_in:
            return bytes(size)
        if fmt.is_integer:
            return bytes([values[o][c] & 255])
        return weight.data[o, c * size : (c + 1) * size].tobytes()

    def nibble(o: int, c: int) -> int:
        return 8 + (values[o][c] if o < n_out and c < n_in else 0)

    def three(o: int, c: int) -> int:
        return 4 + (values[o][c] if o < n_out and c < n_in else 0)

    out = bytearray()
    if layout == "tiles":
        for tile in range(outs // 8):
            if fmt.name == "int3":
                for b in range(ins // 32):
                    n = [
                        [[three(8 * tile + o, 32 * b + 4 * q + i) for i in range(4)] for o in range(8)]
                        for q in range(8)
                    ]
                    for p, rest in enumerate(
                        (
                            lambda o, i, n=n: n[6][o][i] & 3,
                            lambda o, i, n=n: n[7][o][i] & 3,
                            lambda o, i, n=n: n[6][o][i] >> 2 | n[7][o][i] >> 2 << 1,
                        )
                    ):
                        for o in range(8):
                            for i in range(4):
                                out.append(n[2 * p][o][i] | n[2 * p + 1][o][i] << 3 | rest(o, i) << 6)
                continue
            if fmt.name == "int4":
                for b in range(ins // 8):
                    for o in range(8):
                        for c in range(4):
                            low, high = (nibble(8 * tile + o, 8 * b + half + c) for half in (0, 4))
                            out.append(low | high << 4)
            elif fmt.name == "int8":
                for p in range(ins // 2):
                    piece = bytearray(16)
                    for o in range(8):
                        for c in (2 * p, 2 * p + 1):
                            piece[2 * o + (c & 1)] = number(8 * tile + o, c)[0]
                    out += piece
            else:
                for c in range(ins):
                    for o in range(8):
                        out += number(8 * tile + o, c)
    else:
        for block in blocks:
            for c in range(ins):
                if fmt.name == "int3":
                    for first in (block.start, block.start + 64):
                        lanes = [sum(three(first + 8 * s + j, c) << (3 * s) for s in range(8)) for j in range(8)]
                        out += b"".join((lane & 0xFFFF).to_bytes(2, "little") for lane in lanes)
                        out += bytes(lane >> 16 for lane in lanes)
                elif fmt.name == "int4":
                    for first in (block.start, block.start + 64):
                        for j in range(8):
                            lane = sum(nibble(first + 8 * s + j, c) << (4 * s) for s in range(8))
                            out += lane.to_bytes(4, "little")
                else:
                    for o in block:
                        out += number(o, c)
    scales: list[float] = []
    if weight.scales is not None:
        stored = weight.scales.tolist()
        groups = range(len(stored[0]))
        scales = [stored[o][g] if o < n_out else 0.0 for block in blocks for g in groups for o in block]
    return bytes(out), scales


@pytest.mark.parametrize("layout", ["tiles", "columns"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_lies_where_the_kernels_look(fmt: WeightFormat, shape: tuple[int, int], layout: str) -> None:
    weight = made(fmt, *shape)
    packed = pack(weight, layout)
    data, scales = by_the_text(weight, layout)
    assert packed.data.tobytes() == data
    assert len(data) == layout_data_bytes(fmt, layout, shape)
    assert 2 * len(scales) == layout_scales_bytes(fmt, layout, shape)
    assert (packed.scales is None and not scales) or packed.scales.tolist() == scales


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    fmt=st.sampled_from(FORMATS),
    layout=st.sampled_from(LAYOUTS),
    n_out=st.integers(1, 200),
    n_in=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_there_and_back(fmt: WeightFormat, layout: str, n_out: int, n_in: int, seed: int) -> None:
    weight = made(fmt, n_out, n_in, seed)
    same(unpack(pack(weight, layout)), weight)


def same(found: EncodedWeight, weight: EncodedWeight) -> None:
    assert (found.format, found.shape) == (weight.format, weight.shape)
    assert found.data.tobytes() == weight.data.tobytes()
    assert (found.scales is None) == (weight.scales is None)
    assert weight.scales is None or found.scales.tobytes() == weight.scales.tobytes()


@pytest.mark.parametrize("layout", ["tiles", "columns"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_more_than_one_block(fmt: WeightFormat, layout: str) -> None:
    """2100 padded rows of at least 512 bytes are several of the blocks that are packed at once."""
    weight = made(fmt, 2051, 1023)
    same(unpack(pack(weight, layout)), weight)


@pytest.mark.parametrize("layout", ["tiles", "columns"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_unpacking_ignores_what_the_padding_holds(fmt: WeightFormat, layout: str) -> None:
    """Which bits are padding is told by packing all ones beside all zeros of the unpadded numbers."""
    weight = made(fmt, 7, 33)
    packed = pack(weight, layout)
    ones = np.full_like(weight.data, 0xFF)
    if fmt.name in ("int4", "int3"):
        ones[:, -1] = {"int4": 0x0F, "int3": 0x07}[fmt.name]  # of 33 numbers, the last byte has one
    scales = None if weight.scales is None else np.ones_like(weight.scales)
    empty = None if weight.scales is None else np.zeros_like(weight.scales)
    full = pack(EncodedWeight(fmt, weight.shape, ones, scales), layout)
    none = pack(EncodedWeight(fmt, weight.shape, np.zeros_like(ones), empty), layout)
    padding = ~(full.data ^ none.data)
    assert padding.any()
    filled = None
    if packed.scales is not None:
        filled = np.where(full.scales == none.scales, np.float16(3), packed.scales)
    same(unpack(PackedWeight(fmt, layout, weight.shape, packed.data ^ padding, filled)), weight)


def test_rows_share_memory() -> None:
    weight = made(WeightFormat("int4", 32), 5, 67)
    packed = pack(weight, "rows")
    assert np.shares_memory(packed.data, weight.data) and np.shares_memory(unpack(packed).data, weight.data)


@pytest.mark.parametrize("layout", ["tiles", "columns"])
def test_only_matrices_are_packed(layout: str) -> None:
    vector = EncodedWeight(WeightFormat("f32"), (4,), np.zeros(16, np.uint8), None)
    with pytest.raises(QuantizationError, match="a matrix"):
        pack(vector, layout)
    assert pack(vector, "rows").data.size == 16


def test_unknown_layouts_and_wrong_sizes_are_refused() -> None:
    fmt = WeightFormat("int8", 32)
    packed = pack(made(fmt, 9, 31), "tiles")
    with pytest.raises(QuantizationError, match="is not a layout"):
        pack(made(fmt, 9, 31), "diagonal")
    with pytest.raises(InputError, match="data"):
        PackedWeight(fmt, "tiles", (9, 31), packed.data[1:], packed.scales)
    with pytest.raises(InputError, match="scales"):
        PackedWeight(fmt, "tiles", (9, 31), packed.data, None)
