"""The storage formats of a weight: their bytes, their rounding, and what they refuse.

Bounds. With u = 2^-24, half a unit in the last place of float32, and a scale s that covers its group (no clipping),
|w - ŵ| <= s/2 plus the rounding of the quotient w/s, which is at most u |w/s| <= 127 u before it is rounded to an
integer, so (1/2 + 2^-17) s. Nothing else rounds: integer x fp16 scale has at most 19 significant bits.
A scale is rounded to fp16 with a relative error of at most 2^-11, so amax/s <= 127 (1 + 2^-11) < 127.07: clipping to
127 costs less than s/2, and likewise for int4 and int3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from goslet.errors import InputError, QuantizationError, TensorValueError
from goslet.weights import (
    INTEGER_RANGES,
    SIGNED_SCALES,
    EncodedWeight,
    WeightFormat,
    as_int4,
    decode,
    decode_rows,
    encode,
    encode_values,
    quantized_values,
)

pytestmark = pytest.mark.filterwarnings("error")

GROUPS = (32, 64, 128)
FLOATS = [WeightFormat(name) for name in ("f32", "f16", "bf16")]
INTEGERS = [WeightFormat(name, group) for name in ("int8", "int4", "int3") for group in GROUPS]
TOP = {"int8": 127, "int4": 7, "int3": 3}
SEARCHED = [fmt for fmt in INTEGERS if fmt.name != "int8"]
BOUND = 0.5 + 2.0**-17

finite_f32 = st.floats(-60000, 60000, width=32)
small_matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 300)), elements=finite_f32)
WIDE_RANGE = [0, 1e-45, -1e-40, 3e-38, 1e-9, -(2.0**-25), 2.0**-24, 5e-7, 1e-3, -0.5, 3, -1e5, 1.9e5]
wide_range_matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 140)),
    elements=st.sampled_from([float(np.float32(value)) for value in WIDE_RANGE]),
)


def normal(n: int, k: int, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * spread).astype(np.float32)


def spread_scales(encoded: EncodedWeight) -> np.ndarray:
    """float64 [N, K]: each number's scale."""
    assert encoded.scales is not None
    return np.repeat(encoded.scales.astype(np.float64), encoded.format.group, axis=1)[:, : encoded.shape[1]]


def grouped(array: np.ndarray, group: int) -> np.ndarray:
    """[N, groups, group], short groups padded with zeros."""
    n, k = array.shape
    padded = np.zeros((n, -(-k // group) * group), array.dtype)
    padded[:, :k] = array
    return padded.reshape(n, -1, group)


def plain(array: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """float64 [N, K]: round-to-nearest with the scale amax / 7, for int3 amax / 3, as anyone would write it."""
    w = grouped(array, fmt.group_size)
    top = np.float32(TOP[fmt.name])
    scales = (np.abs(w).max(axis=2, keepdims=True) / top).astype(np.float16).astype(np.float32)
    scales[scales == 0] = 1
    values = np.clip(np.rint(w / scales), -top - 1, top)
    return (values.astype(np.float64) * scales).reshape(len(array), -1)[:, : array.shape[1]]


def group_errors(array: np.ndarray, decoded: np.ndarray, group: int) -> np.ndarray:
    """float64 [N, groups]: squared errors."""
    return (grouped(decoded.astype(np.float64) - array.astype(np.float64), group) ** 2).sum(axis=2)


# --------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize(
    "arguments",
    [
        ("int3",),
        ("int2", 32),
        ("",),
        ("int4",),
        ("int8", None),
        ("int4", 16),
        ("int4", 33),
        ("int8", 256),
        ("f32", 32),
        ("bf16", 64),
    ],
    ids=str,
)
def test_unknown_formats_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(QuantizationError):
        WeightFormat(*arguments)


def test_sizes() -> None:
    assert WeightFormat("int4", 32).bits_per_weight(2048) == 4.5
    assert WeightFormat("int4", 128).bits_per_weight(2048) == 4.125
    assert WeightFormat("int8", 64).bits_per_weight(2048) == 8.25
    assert WeightFormat("bf16").bits_per_weight(7) == 16
    assert WeightFormat("int3", 32).bits_per_weight(2048) == 3.5
    assert WeightFormat("int3", 128).bits_per_weight(2048) == 3.125
    # 33 numbers: 13 bytes of three bits and two scales.
    assert WeightFormat("int3", 32).bits_per_weight(33) == 8 * (13 + 4) / 33
    # 33 numbers: 17 bytes of nibbles and two scales.
    assert WeightFormat("int4", 32).bits_per_weight(33) == 8 * (17 + 4) / 33
    huge = (1 << 40, 1 << 40)
    assert WeightFormat("int4", 32).data_size_bytes(huge) == 1 << 79
    assert WeightFormat("int4", 32).scales_size_bytes(huge) == 1 << 76


@pytest.mark.parametrize("fmt", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 127, 128, 129, 257])
def test_sizes_are_those_of_the_arrays(fmt: WeightFormat, k: int) -> None:
    encoded = encode(normal(3, k), fmt, "w")
    assert encoded.data.nbytes == fmt.data_size_bytes((3, k))
    assert (encoded.scales.nbytes if encoded.scales is not None else 0) == fmt.scales_size_bytes((3, k))
    assert encoded.size_bytes * 8 == pytest.approx(3 * k * fmt.bits_per_weight(k))


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (1, 1, 1, 9)])
def test_float_formats_take_any_shape(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)
    encoded = encode(array, fmt, "w")
    assert encoded.shape == shape
    assert (decode(encoded) == array).all()


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_integer_formats_take_matrices_only(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match=r"att\.k: cannot be stored as int"):
        encode(np.zeros(shape, np.float32), fmt, "att.k")


@pytest.mark.parametrize("fmt", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_empty_tensors_are_refused(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError):
        encode(np.zeros(shape, np.float32), fmt, "w")


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2), np.float16), [[1.0]], np.zeros((2, 2), ">f4")])
def test_only_float32_is_taken(array: Any) -> None:
    with pytest.raises(InputError, match="float32"):
        encode(array, WeightFormat("f16"), "w")


def test_arrays_that_do_not_fit_the_format_are_refused() -> None:
    good = encode(normal(4, 64), WeightFormat("int4", 32), "w")
    assert good.scales is not None
    for data, scales in (
        (good.data[:3], good.scales),
        (good.data, good.scales[:, :1]),
        (good.data, None),
        (good.data, good.scales.astype(np.float32)),
        (good.data.view(np.int8), good.scales),
        (np.asfortranarray(good.data), good.scales),
        (good.data.reshape(-1), good.scales),
    ):
        with pytest.raises(InputError):
            EncodedWeight(good.format, good.shape, data, scales)
    with pytest.raises(InputError):
        EncodedWeight(WeightFormat("f32"), (1, 1), np.zeros((1, 4), np.uint8), good.scales)


# ------------------------------------------------------------------------------------------------------ float formats


def test_float_bytes_are_little_endian() -> None:
    array = np.array([1.0, -2.5], np.float32)
    assert encode(array, WeightFormat("f32"), "w").data.tobytes() == bytes.fromhex("0000803f 000020c0")
    assert encode(array, WeightFormat("f16"), "w").data.tobytes() == bytes.fromhex("003c 00c1")
    assert encode(array, WeightFormat("bf16"), "w").data.tobytes() == bytes.fromhex("803f 20c0")


def bf16_bits(array: np.ndarray) -> np.ndarray:
    return encode(array, WeightFormat("bf16"), "w").data.view(np.uint16)


@given(hnp.arrays(np.uint32, 64))
def test_bf16_rounds_to_nearest_even(bits: np.ndarray) -> None:
    array = bits.view(np.float32)
    array = np.where(np.abs(array) < 3.3e38, array, np.float32(0))  # also drops NaN; near 3.39e38 bf16 overflows
    found = bf16_bits(array)
    below = np.abs(array).view(np.uint32) >> 16  # magnitude rounded toward zero; bf16 bits order like magnitudes
    lower = (below << 16).view(np.float32).astype(np.float64)
    upper = ((below + 1) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    magnitude = np.abs(array).astype(np.float64)
    up = (upper - magnitude < magnitude - lower) | ((upper - magnitude == magnitude - lower) & (below % 2 == 1))
    sign = np.signbit(array).astype(np.uint32) << 15
    assert (found == (below + up + sign)).all()


def test_bf16_equals_torch() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's own rounding")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    array = bits.view(np.float32)
    array = array[np.isfinite(array) & (np.abs(array) < 3.38e38)]
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (bf16_bits(array) == expected).all()
    assert (
        decode(encode(array, WeightFormat("bf16"), "w")) == torch.from_numpy(array).bfloat16().float().numpy()
    ).all()


@pytest.mark.parametrize(
    ("name", "largest", "too_large"),
    [("f16", 65519.99, 65520.0), ("bf16", 3.3961e38, 3.3962e38)],
)
def test_overflow_of_float_formats_is_an_error(name: str, largest: float, too_large: float) -> None:
    array = np.ones((3, 5), np.float32)
    array[2, 1] = -np.float32(largest)
    assert np.isfinite(decode(encode(array, WeightFormat(name), "w"))).all()
    array[2, 1] = -np.float32(too_large)
    with pytest.raises(TensorValueError, match=rf"head\[2, 1\]: a number is too large for {name}"):
        encode(array, WeightFormat(name), "head")


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_float_formats_are_within_half_a_unit(fmt: WeightFormat) -> None:
    array = np.concatenate([normal(100, 300), normal(100, 300, seed=1, spread=1e-7)])
    error = np.abs(decode(encode(array, fmt, "w")).astype(np.float64) - array)
    # Half a unit in the last place of 24, 11 and 8 significant bits; f16 is subnormal below 2^-14, in steps of 2^-24.
    half_unit = {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8}[fmt.name]
    floor = 2.0**-25 if fmt.name == "f16" else 0
    assert (error <= np.maximum(half_unit * np.abs(array.astype(np.float64)), floor)).all()


def test_strides_do_not_matter() -> None:
    array = normal(40, 66)
    for fmt in (*FLOATS, *INTEGERS):
        expected = encode(array, fmt, "w")
        for other in (np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2], array[::-1].copy()[::-1]):
            found = encode(other, fmt, "w")
            assert (found.data == expected.data).all()
            assert found.scales is None or (found.scales == expected.scales).all()


# ---------------------------------------------------------------------------------------------------- integer formats


@pytest.mark.parametrize("fmt", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_refused_with_their_index(fmt: WeightFormat, value: float) -> None:
    # 700 x 130 numbers take more than one block; the bad one is in the second.
    array = normal(700, 130)
    array[611, 129] = value
    with pytest.raises(TensorValueError, match=r"blocks\.3\.ffn\.key\[611, 129\]: a number is not finite"):
        encode(array, fmt, "blocks.3.ffn.key")


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_scales_beyond_fp16_are_refused_by_name(fmt: WeightFormat) -> None:
    array = normal(700, 130)
    array[611, 129] = -65504.0 * TOP[fmt.name]
    assert np.isfinite(decode(encode(array, fmt, "w"))).all()
    array[611, 129] *= 1.01
    group = 129 // fmt.group_size
    with pytest.raises(TensorValueError, match=rf"head\[611, group {group}\]: a number is too large for {fmt}"):
        encode(array, fmt, "head")
    array[611, 129] = 3e38
    with pytest.raises(TensorValueError, match="too large"):
        encode(array, fmt, "head")


def test_int4_nibbles() -> None:
    # Scale 1 and the numbers are the integers themselves; 7 elements, so the last byte is padded with zero.
    array = np.array([[7, -7, 0, 1, -1, 3, -4]], np.float32)
    encoded = encode(array, WeightFormat("int4", 32), "w")
    assert encoded.scales is not None and encoded.scales.tolist() == [[1.0]]
    assert encoded.data.tobytes() == bytes([0x97, 0x10, 0x3F, 0x0C])
    assert quantized_values(encoded).tolist() == array.tolist()


def test_int3_bits() -> None:
    # The largest, 4, is positive: with a scale of -1 it is -4, and nothing is lost.
    array = np.array([[4, -3, 0, 1, -1, 2, -2, 3, 1]], np.float32)
    encoded = encode(array, WeightFormat("int3", 32), "w")
    values = quantized_values(encoded)[0].tolist()
    assert encoded.scales is not None and encoded.scales.tolist() == [[-1.0]]
    assert values == [-4, 3, 0, -1, 1, -2, 2, -3, -1]
    bits = sum((value & 7) << 3 * index for index, value in enumerate(values))
    assert encoded.data.tobytes() == bits.to_bytes(4, "little")


def test_int3_as_int4_is_the_same_numbers() -> None:
    encoded = encode(normal(9, 67), WeightFormat("int3", 32), "w")
    wide = as_int4(encoded)
    assert encoded.scales is not None and wide.scales is not None
    assert (encoded.scales < 0).any() and (encoded.scales > 0).any() and (wide.scales > 0).all()
    assert wide.format == WeightFormat("int4", 32)
    assert quantized_values(wide).max() == 4
    assert (decode(wide) == decode(encoded)).all()
    with pytest.raises(InputError, match="int3"):
        as_int4(wide)


def test_int8_bytes() -> None:
    array = np.array([[127, -127, 0, 1, -1]], np.float32)
    encoded = encode(array, WeightFormat("int8", 32), "w")
    assert encoded.data.tobytes() == bytes([127, 129, 0, 1, 255])
    assert quantized_values(encoded).tolist() == array.tolist()


@given(
    st.sampled_from(INTEGERS),
    st.integers(1, 4),
    st.integers(1, 260),
    st.integers(0, 1 << 30),
)
def test_values_are_packed_exactly(fmt: WeightFormat, n: int, k: int, seed: int) -> None:
    bits = np.random.default_rng(seed)
    low, high = INTEGER_RANGES[fmt.name]
    values = bits.integers(low, high + 1, (n, k)).astype(np.int8)
    scales = bits.uniform(1e-7, 100, (n, fmt.groups(k))).astype(np.float16)
    if fmt.name in SIGNED_SCALES:
        scales *= bits.choice([-1, 1], scales.shape).astype(np.float16)
    encoded = encode_values(values, scales, fmt)
    assert (quantized_values(encoded) == values).all()
    assert (decode(encoded).astype(np.float64) == values * spread_scales(encoded)).all(), "decoding must be exact"
    if fmt.name != "int8":
        used = k * int(fmt.name[-1]) % 8
        assert used == 0 or (encoded.data[:, -1] >> used == 0).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(QuantizationError, match="scale"):
        encode_values(np.zeros((1, 32), np.int8), np.full((1, 1), scale, np.float16), WeightFormat("int8", 32))


@pytest.mark.parametrize("scale", [0.0, -0.0, np.nan, -np.inf])
def test_bad_signed_scales_are_refused(scale: float) -> None:
    with pytest.raises(QuantizationError, match="finite and not zero"):
        encode_values(np.zeros((1, 32), np.int8), np.full((1, 1), scale, np.float16), WeightFormat("int3", 32))


@pytest.mark.parametrize(("name", "value"), [("int4", 8), ("int4", -9), ("int3", 4), ("int3", -5), ("int8", -128)])
def test_bad_values_are_refused(name: str, value: int) -> None:
    values = np.zeros((1, 32), np.int8)
    values[0, 5] = value
    with pytest.raises(QuantizationError, match="out of range"):
        encode_values(values, np.ones((1, 1), np.float16), WeightFormat(name, 32))


def test_integers_of_float_formats() -> None:
    encoded = encode(normal(2, 2), WeightFormat("f32"), "w")
    with pytest.raises(InputError):
        quantized_values(encoded)
    with pytest.raises(QuantizationError):
        encode_values(np.zeros((1, 1), np.int8), np.ones((1, 1), np.float16), WeightFormat("f32"))


@settings(deadline=None, derandomize=True)
@given(array=st.one_of(small_matrices, wide_range_matrices), group=st.sampled_from(GROUPS))
def test_int8_error_is_at_most_half_a_scale(array: np.ndarray, group: int) -> None:
    encoded = encode(array, WeightFormat("int8", group), "w")
    error = np.abs(array.astype(np.float64) - decode(encoded))
    assert (error <= BOUND * spread_scales(encoded)).all()


@settings(deadline=None, derandomize=True)
@given(array=st.one_of(small_matrices, wide_range_matrices), fmt=st.sampled_from(SEARCHED))
def test_a_search_is_never_worse_than_plain_rounding(array: np.ndarray, fmt: WeightFormat) -> None:
    ours = group_errors(array, decode(encode(array, fmt, "w")), fmt.group_size)
    others = group_errors(array, plain(array, fmt).astype(np.float32), fmt.group_size)
    # Both are float64 sums over at most 128 squares of exact differences. int3's plain scale may have the other sign,
    # which matters only to numbers half-way between two integers: both neighbours are as near, up to rounding.
    assert (ours <= others * (1 + (1e-13 if fmt.name == "int4" else 1e-4))).all()


@settings(deadline=None, derandomize=True)
@given(array=st.one_of(small_matrices, wide_range_matrices), fmt=st.sampled_from(INTEGERS))
def test_scales_are_positive_and_zero_groups_have_scale_one(array: np.ndarray, fmt: WeightFormat) -> None:
    encoded = encode(array, fmt, "w")
    assert encoded.scales is not None
    sizes = np.abs(encoded.scales) if fmt.name in SIGNED_SCALES else encoded.scales
    assert (sizes > 0).all() and np.isfinite(encoded.scales).all()
    values = grouped(quantized_values(encoded), fmt.group_size)
    assert (encoded.scales[~values.any(axis=2)] == 1).all()
    low, high = INTEGER_RANGES[fmt.name]
    assert low <= values.min() and values.max() <= high


@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("fmt", SEARCHED, ids=str)
def test_the_search_lessens_the_error_of_normal_weights(fmt: WeightFormat, spread: float) -> None:
    array = normal(64, 1024, spread=spread)
    ours = group_errors(array, decode(encode(array, fmt, "w")), fmt.group_size)
    others = group_errors(array, plain(array, fmt), fmt.group_size)
    assert (ours <= others * (1 + 1e-4)).all()
    # Of plain rounding's squared error on normal numbers a dense grid reaches, in groups of 32 to 128, 0.78 to 0.74 in
    # int4, and 0.51 to 0.46 in int3, whose positive scales alone would reach 0.62 to 0.51.
    assert ours.sum() < {"int4": 0.82, "int3": 0.53}[fmt.name] * others.sum()


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_subnormal_scales_clip_nothing(fmt: WeightFormat) -> None:
    # amax / top runs over fp16's subnormal scales, whose rounding to nearest could be off by a third.
    tops = np.linspace(2.0**-24, 2.0**-14, 997) * TOP[fmt.name]
    array = (tops[:, None] * np.linspace(-1, 1, 32)).astype(np.float32)
    encoded = encode(array, fmt, "w")
    error = np.abs(array.astype(np.float64) - decode(encoded))
    if fmt.name == "int8":
        assert (error <= BOUND * spread_scales(encoded)).all()
    # A search may clip; its error is still no more than that of a scale rounded up to a whole step of 2^-24.
    covering = np.ceil(tops / TOP[fmt.name] / 2.0**-24) * 2.0**-24
    assert (np.sqrt((error**2).mean(axis=1)) <= BOUND * covering).all()


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_groups_below_every_scale(fmt: WeightFormat) -> None:
    # The smallest scale is 2^-24: half of it and less becomes zero, more becomes the nearest multiple.
    array = np.zeros((4, 32), np.float32)
    array[0, 3] = 2.0**-25
    array[1, 3] = 1e-42
    array[2, 3] = -1.7 * 2.0**-24
    encoded = encode(array, fmt, "w")
    assert encoded.scales is not None
    assert encoded.scales[[0, 1, 3]].tolist() == [[1], [1], [1]]
    decoded = decode(encoded)
    assert not decoded[[0, 1, 3]].any()
    assert abs(decoded[2, 3] - array[2, 3]) <= 2.0**-25


def test_short_groups_are_quantized_by_themselves() -> None:
    array = normal(5, 70)
    array[:, 64:] *= 1000
    whole = encode(array, WeightFormat("int4", 64), "w")
    first = encode(np.ascontiguousarray(array[:, :64]), WeightFormat("int4", 64), "w")
    last = encode(np.ascontiguousarray(array[:, 64:]), WeightFormat("int4", 64), "w")
    assert (decode(whole) == np.concatenate([decode(first), decode(last)], axis=1)).all()


def test_blocks_do_not_show() -> None:
    array = normal(1100, 130)  # two blocks and a bit
    for fmt in INTEGERS:
        whole = encode(array, fmt, "w")
        rows = [encode(array[index : index + 1], fmt, "w") for index in (0, 503, 504, 505, 1099)]
        for index, row in zip((0, 503, 504, 505, 1099), rows, strict=True):
            assert (whole.data[index] == row.data[0]).all()
            assert whole.scales is not None and row.scales is not None
            assert (whole.scales[index] == row.scales[0]).all()


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("fmt", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("k", [1, 33, 64, 129])
def test_decode_rows_equals_decode(fmt: WeightFormat, k: int) -> None:
    encoded = encode(normal(50, k), fmt, "w")
    whole = decode(encoded)
    assert whole.dtype == np.float32 and whole.shape == (50, k)
    for rows in ([], [0], [49, 0, 0, 17], np.arange(50), np.array([3], np.uint8)):
        found = decode_rows(encoded, rows)
        assert found.dtype == np.float32
        assert (found == whole[np.asarray(rows, int)]).all() and found.shape == (len(rows), k)


@pytest.mark.parametrize("fmt", [*FLOATS, *INTEGERS], ids=str)
def test_decoding_never_shares_memory(fmt: WeightFormat) -> None:
    encoded = encode(normal(4, 64), fmt, "w")
    before = decode(encoded)
    decode(encoded)[:] = 9
    decode_rows(encoded, [0, 1, 2, 3])[:] = 9
    assert (decode(encoded) == before).all()


@pytest.mark.parametrize("rows", [[-1], [4], [0, 1 << 62], [0.0], [[0]], [True], ["0"]], ids=str)
def test_rows_that_are_not_there(rows: Any) -> None:
    encoded = encode(normal(4, 64), WeightFormat("int4", 32), "w")
    with pytest.raises(InputError):
        decode_rows(encoded, rows)


def test_rows_of_a_vector() -> None:
    with pytest.raises(InputError, match="is not a matrix"):
        decode_rows(encode(np.zeros(4, np.float32), WeightFormat("f32"), "w"), [0])


def test_decode_rows_reads_only_those_rows() -> None:
    class Watched(np.ndarray):
        taken: tuple[int, ...] = ()

        def __getitem__(self, key: Any) -> Any:
            Watched.taken = np.asarray(key).shape
            return np.asarray(self)[key]

    encoded = encode(normal(1000, 64), WeightFormat("int8", 32), "w")
    watched = EncodedWeight(encoded.format, encoded.shape, encoded.data.view(Watched), encoded.scales)
    decode_rows(watched, [7, 8])
    assert Watched.taken == (2,)


def test_memory_stays_near_the_result() -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    array = normal(4096, 1024)
    tracemalloc.start()
    try:
        encoded = encode(array, WeightFormat("int4", 32), "w")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A block of 2^16 numbers needs a few float32 arrays of its size, here ten; the source has 64 blocks.
    assert peak_bytes < encoded.size_bytes + 10 * 4 * (1 << 16)
    assert math.prod(encoded.shape) * 4 > 3 * peak_bytes
