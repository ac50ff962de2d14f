"""How one weight is stored, and what the stored bytes mean: the reference that every kernel is held to.

A matrix is [out_features N, in_features K] with rows contiguous along K, all bytes little-endian:

- ``f32``, ``f16``, ``bf16``: the numbers one after another, of any shape.
- ``u16``: places of inputs, from 0 to 65535, likewise; no weight is stored so.
- ``int8``: one byte a number, from -127 to 127.
- ``int4``: two's-complement nibbles from -8 to 7, the number with the even index in the low nibble, every row padded
  with zero to whole bytes.
- ``int3``: two's complement of 3 bits from -4 to 3; the number with index i takes bits 3i to 3i + 2 of its row, counted
  from the lowest bit of the first byte, and every row is padded with zero to whole bytes.

Integers are group-wise: each row is cut into groups of 32, 64 or 128 numbers (the last may be short), each group has
one fp16 scale, and number = integer x scale. That product fits in 19 bits, so it is exact in float32. Scales are
positive, but ``int3``'s may be negative: with so few integers, it matters which end of the range has one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, QuantizationError, TensorValueError

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
PLACES = "u16"
INTEGER_BITS = {"int8": 8, "int4": 4, "int3": 3}
INTEGER_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3)}
# Whose scales may be negative. The encoders here choose the sign that puts a group's largest magnitude on the side with
# one integer more; trying both signs gains less than 0.5% of the root-mean-square error on normal, t(5) and uniform
# numbers, where positive scales alone lose 1% to 13%. Tried on the demonstration model and given up: the odd integers
# from -7 to 7, which need no sign, diverge 9%, 1% and 4% more in groups of 32, 64 and 128 with error feedback, and 12%,
# 7% and 5% more without; the uneven -7, -4, -2, -1, 0, 1, 3, 5 in groups of 64 diverges 4% more with it and 6% less
# without.
SIGNED_SCALES = frozenset({"int3"})
FORMAT_NAMES = (*FLOAT_BYTES, *INTEGER_BITS)
GROUPS = (32, 64, 128)
_NUMBER_BYTES = {**FLOAT_BYTES, PLACES: 2}
SCALE_BYTES = 2

# Numbers that are worked on at once: few enough that a block and its temporaries stay in a core's cache.
_BLOCK_NUMBERS = 1 << 16
_SMALLEST_SCALE = np.float32(2.0**-24)
_LARGEST_SCALE = np.float32(65504)
_SMALLEST_NORMAL_SCALE = np.float32(2.0**-14)
# Scales that are tried, as divisors of a group's largest magnitude; the first is the plain one, which clips nothing.
# Above 8 with int4 and above 4 with int3 the largest is clipped, which pays in a group with one outlier. On normal,
# t(5) and uniform numbers int4's come within 0.5% of the root-mean-square error of 53 divisors from 5.5 to 12; int3's,
# which were added one by one, each the best beside those before it, within 1% of 41 divisors from 3 to 7 with either
# sign.
DIVISORS = {
    "int8": (127.0,),
    "int4": (7.0, 6.2, 6.5, 6.75, 7.2, 7.4, 7.6, 7.8, 8.0, 8.2, 8.4, 8.7, 9.0, 9.5, 10.2, 11.0),
    "int3": (3.0, 3.2, 3.4, 3.8, 4.0, 4.3, 4.6, 4.8, 5.1, 5.8, 6.4),
}
# A candidate must be better by more than the rounding of both sums (128 terms and 2 roundings each, 2 x 130 x 2^-24),
# so that the chosen one is never worse than plain.
_MARGIN = np.float32(1 - 2e-5)
# Byte -> its two signed nibbles, low first.
_NIBBLES = (((np.arange(256)[:, None] >> np.array([0, 4])) & 15 ^ 8) - 8).astype(np.int8)

Float32Array = npt.NDArray[np.float32]
Float16Array = npt.NDArray[np.float16]
Int8Array = npt.NDArray[np.int8]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WeightFormat:
    """A storage format.

    Attributes:
        name: ``f32``, ``f16``, ``bf16``, ``int8``, ``int4``, ``int3`` or ``u16``.
        group: numbers that share a scale, 32, 64 or 128, for the integer formats; None for the others.

    Raises:
        QuantizationError: there is no such format.
    """

    name: str
    group: int | None = None

    def __post_init__(self) -> None:
        if self.name in _NUMBER_BYTES:
            if self.group is not None:
                raise QuantizationError("has no groups", place=f"format {self.name}", found=f"group {self.group}")
        elif self.name not in INTEGER_BITS:
            known = ", ".join(FORMAT_NAMES)
            raise QuantizationError("is not a weight format", place=repr(self.name), expected=known)
        elif self.group not in GROUPS:
            raise QuantizationError(
                "has no such group", place=f"format {self.name}", expected="32, 64 or 128", found=self.group
            )

    def __str__(self) -> str:
        return self.name if self.group is None else f"{self.name}/{self.group}"

    @property
    def is_integer(self) -> bool:
        """Whether numbers are stored as integers with scales."""
        return self.group is not None

    def check_shape(self, shape: Sequence[int], name: str) -> None:
        """Refuse a shape that this format cannot hold.

        Raises:
            QuantizationError: an axis is missing or empty, or an integer format is asked for something that is not a
                matrix.
        """
        if not shape or any(size < 1 for size in shape):
            raise QuantizationError("has no numbers to store", place=name, found=f"shape {list(shape)}")
        if self.is_integer and len(shape) != 2:
            raise QuantizationError(
                f"cannot be stored as {self}",
                place=name,
                expected="a matrix",
                found=f"shape {list(shape)}",
                remedy="store it as f32, f16 or bf16",
            )

    @property
    def group_size(self) -> int:
        """Numbers that share a scale, for an integer format.

        Raises:
            QuantizationError: this format has no groups.
        """
        if self.group is None:
            raise QuantizationError("has no groups", place=f"format {self.name}")
        return self.group

    def row_size_bytes(self, k: int) -> int:
        """Bytes of a row of `k` numbers, without its scales."""
        return k * _NUMBER_BYTES[self.name] if not self.is_integer else -(-k * INTEGER_BITS[self.name] // 8)

    def groups(self, k: int) -> int:
        """Scales of a row of `k` numbers."""
        return 0 if self.group is None else -(-k // self.group)

    def data_size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape`, without its scales."""
        return math.prod(shape[:-1]) * self.row_size_bytes(shape[-1])

    def scales_size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the scales of a tensor of `shape`."""
        return SCALE_BYTES * math.prod(shape[:-1]) * self.groups(shape[-1])

    def bits_per_weight(self, k: int) -> float:
        """Bits that one number of a row of `k` takes, its share of the scales and of the row's padding included."""
        return 8 * (self.row_size_bytes(k) + SCALE_BYTES * self.groups(k)) / k


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """A stored weight.

    Attributes:
        format: how it is stored.
        shape: the tensor's shape, [N, K] for a matrix.
        data: uint8, contiguous, of `shape` with the last axis replaced by its bytes.
        scales: float16 [N, ceil(K / group)], contiguous; None without groups.

    Raises:
        QuantizationError: the format cannot hold the shape.
        InputError: data or scales have not the shape and type that follow.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    data: ByteArray
    scales: Float16Array | None

    def __post_init__(self) -> None:
        self.format.check_shape(self.shape, "weight")
        data_shape = (*self.shape[:-1], self.format.row_size_bytes(self.shape[-1]))
        _check_array(self.data, np.uint8, data_shape, "data")
        if self.format.is_integer:
            _check_array(self.scales, np.float16, (self.shape[0], self.format.groups(self.shape[1])), "scales")
        elif self.scales is not None:
            raise InputError("has no scales", place=f"format {self.format}")

    @property
    def size_bytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _check_array(array: Any, dtype: type, shape: tuple[int, ...], place: str) -> None:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.shape != shape
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(
            "is not the array that the format needs",
            place=place,
            expected=f"contiguous {np.dtype(dtype).name} {list(shape)}",
            found=found,
        )


def _row_blocks(n_rows: int, k: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_NUMBERS // k)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


# ------------------------------------------------------------------------------------------------------------ encoding


def encode(array: npt.NDArray[Any], fmt: WeightFormat, name: str) -> EncodedWeight:
    """Store a tensor, rounding every number to a near one that the format has.

    Floating formats round to nearest, ties to even; f32 shares the memory of a contiguous `array`. ``int8`` takes the
    scale amax / 127 of each group. ``int4`` takes amax / 7 and ``int3`` amax / 3, or one of a few scales near it where
    that lessens the group's squared error (`DIVISORS`, `SIGNED_SCALES`). The scale is rounded to fp16 first (upwards
    where fp16 is subnormal, so that nothing is clipped), then the integers are chosen for the rounded scale. A group
    whose numbers all become 0 has the scale 1.

    Args:
        array: float32, of any strides; [N, K] for the integer formats.
        fmt: the format.
        name: the tensor's name, for errors.

    Raises:
        TensorValueError: a number is NaN or infinite, or too large for the format or for an fp16 scale.
        QuantizationError: the format cannot hold the shape.
        InputError: `array` is not float32.
    """
    _check_float32(array, name)
    fmt.check_shape(array.shape, name)
    if fmt.name == "f32":
        matrix = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        for rows in _row_blocks(*matrix.shape):
            _refuse(~np.isfinite(matrix[rows]), matrix[rows], rows.start, array.shape, name, "is not finite")
        return EncodedWeight(fmt, array.shape, matrix.view(np.uint8).reshape(*array.shape[:-1], -1), None)
    return encode_blocks([array], array.shape, fmt, name)


def encode_blocks(
    blocks: Iterable[npt.NDArray[Any]], shape: Sequence[int], fmt: WeightFormat, name: str
) -> EncodedWeight:
    """As `encode`, for a tensor that comes in pieces of its first axis, so that it is never whole in float32.

    Args:
        blocks: float32, one behind the other along the first axis, of `shape` otherwise.
        shape: the tensor's.
        fmt: the format.
        name: the tensor's name, for errors.

    Raises:
        TensorValueError, QuantizationError: as `encode`.
        InputError: a block is not float32, or they do not make up `shape`.
    """
    shape = tuple(shape)
    fmt.check_shape(shape, name)
    k = shape[-1]
    n_rows = math.prod(shape[:-1])
    data = np.empty((n_rows, fmt.row_size_bytes(k)), np.uint8)
    scales = np.empty((n_rows, fmt.groups(k)), np.float16) if fmt.is_integer else None
    end = 0
    for block in blocks:
        _check_float32(block, name)
        matrix = block.reshape(-1, k) if block.shape[1:] == shape[1:] else block.reshape(0, k)
        start, end = end, end + matrix.shape[0]
        if matrix.shape[0] == 0 or end > n_rows:
            raise InputError("a block does not fit", place=name, expected=list(shape), found=list(block.shape))
        for part in _row_blocks(matrix.shape[0], k):
            rows = slice(start + part.start, start + part.stop)
            if scales is not None:
                values, scales[rows] = _quantize(matrix[part], rows.start, shape, fmt, name)
                data[rows] = _pack(values, fmt)
            else:
                data[rows] = _narrow(matrix[part], rows.start, shape, fmt, name)
    if end != n_rows:
        raise InputError("blocks are missing", place=name, expected=n_rows, found=end)
    return EncodedWeight(fmt, shape, data.reshape(*shape[:-1], -1), scales)


def _check_float32(array: Any, name: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError("is not an array of float32", place=name, found=found, remedy="convert it first")


def _narrow(block: Float32Array, first_row: int, shape: tuple[int, ...], fmt: WeightFormat, name: str) -> ByteArray:
    """Rows of a floating format as bytes."""
    _refuse(~np.isfinite(block), block, first_row, shape, name, "is not finite")
    block = np.ascontiguousarray(block)
    if fmt.name == "f32":
        return block.view(np.uint8)
    narrow = _to_f16(block) if fmt.name == "f16" else _to_bf16(block)
    exponent = 0x7C00 if fmt.name == "f16" else 0x7F80
    _refuse((narrow & exponent) == exponent, block, first_row, shape, name, f"is too large for {fmt}")
    stored: ByteArray = narrow.view(np.uint8)
    return stored


def encode_values(values: Int8Array, scales: Float16Array, fmt: WeightFormat) -> EncodedWeight:
    """Store integers and scales that something else chose.

    Args:
        values: int8 [N, K], within the format's range.
        scales: float16 [N, ceil(K / group)], positive and finite; with `SIGNED_SCALES` negative or positive.
        fmt: an integer format.

    Raises:
        QuantizationError: the format is not an integer one, or values or scales are out of range.
    """
    if not fmt.is_integer:
        raise QuantizationError("does not store integers", place=f"format {fmt}")
    fmt.check_shape(values.shape, "values")
    low, high = INTEGER_RANGES[fmt.name]
    if not (low <= int(values.min()) and int(values.max()) <= high):
        raise QuantizationError(
            "is out of range",
            place=f"{fmt} values",
            expected=f"{low} to {high}",
            found=f"{values.min()} to {values.max()}",
        )
    signed = fmt.name in SIGNED_SCALES
    if not (np.isfinite(scales) & ((np.abs(scales) if signed else scales) > 0)).all():
        wanted = "finite and not zero" if signed else "positive and finite"
        raise QuantizationError(f"holds a scale that is not {wanted}", place=f"{fmt} scales")
    return EncodedWeight(fmt, values.shape, _pack(values, fmt), np.ascontiguousarray(scales))


def encode_places(places: npt.NDArray[np.integer[Any]]) -> EncodedWeight:
    """Store places of inputs, whole numbers [N, K] from 0 to 65535, as ``u16``.

    Raises:
        QuantizationError: there are none, or one is out of range.
    """
    fmt = WeightFormat(PLACES)
    fmt.check_shape(places.shape, "places")
    if int(places.min()) < 0 or int(places.max()) > 0xFFFF:
        raise QuantizationError(
            "is out of range", place="places", expected="0 to 65535", found=f"{places.min()} to {places.max()}"
        )
    stored = np.ascontiguousarray(places, "<u2")
    return EncodedWeight(fmt, places.shape, stored.view(np.uint8), None)


def _refuse(
    bad: npt.NDArray[np.bool_],
    block: Float32Array,
    first_row: int,
    shape: tuple[int, ...],
    name: str,
    problem: str,
) -> None:
    """Raise for the first number marked in `bad`; `block` is the rows from `first_row` on of a tensor of `shape`."""
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        index = np.unravel_index((first_row + row) * block.shape[1] + column, shape)
        raise TensorValueError(
            f"a number {problem}",
            place=f"{name}{[int(i) for i in index]}",
            found=float(block[row, column]),
            remedy="the checkpoint is damaged, or its training diverged",
        )


def _to_f16(block: Float32Array) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        narrow: npt.NDArray[np.uint16] = block.astype("<f2").view(np.uint16)
    return narrow


def _to_bf16(block: Float32Array) -> npt.NDArray[np.uint16]:
    # Adding just under half of the last kept bit, and one more if that bit is set, rounds ties to even.
    bits = block.view(np.uint32)
    narrow: npt.NDArray[np.uint16] = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return narrow


def _quantize(
    block: Float32Array, first_row: int, shape: tuple[int, ...], fmt: WeightFormat, name: str
) -> tuple[Int8Array, Float16Array]:
    """Values int8 [R, K] and scales [R, groups] of some rows of a matrix of `shape`, from `first_row` on."""
    n_rows, k = block.shape
    groups = fmt.groups(k)
    padded = np.zeros((n_rows, groups * fmt.group_size), np.float32)
    padded[:, :k] = block
    # Groups side by side, so that one scale per group broadcasts along a long contiguous axis.
    w = np.ascontiguousarray(padded.reshape(n_rows * groups, fmt.group_size).T)
    amax: Float32Array = np.maximum(w.max(axis=0), -w.min(axis=0))
    if not np.isfinite(amax).all():
        _refuse(~np.isfinite(block), block, first_row, shape, name, "is not finite")
    plain = _round_scales(amax / np.float32(DIVISORS[fmt.name][0]))
    if np.isinf(plain).any():
        row, group = divmod(int(np.argmax(amax)), groups)
        raise TensorValueError(
            f"a number is too large for {fmt}, whose scales are fp16",
            place=f"{name}[{first_row + row}, group {group}]",
            found=f"a largest magnitude of {amax.max()}",
            remedy="store it as f32 or bf16",
        )
    scales = plain.astype(np.float32)
    scales[amax == 0] = 1
    if fmt.name in SIGNED_SCALES:
        scales[w.max(axis=0) == amax] *= -1
    q = np.empty_like(w)
    if len(DIVISORS[fmt.name]) > 1:
        scales = _search_scales(w, amax, scales, q, fmt.name)
    _round_values(w, scales, fmt.name, out=q)
    scales[~q.any(axis=0)] = 1
    values = q.T.astype(np.int8, order="C").reshape(n_rows, -1)[:, :k]
    return values, scales.astype(np.float16).reshape(n_rows, groups)


def _round_scales(scales: Float32Array) -> Float16Array:
    """The nearest fp16, but the next larger one where fp16 is subnormal and its relative error could be any.

    The least result is 2^-24, the smallest positive fp16, also for a scale that is 0 in float32.
    """
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    low = (scales < _SMALLEST_NORMAL_SCALE) & (rounded.astype(np.float32) < scales)
    rounded[low] = np.nextafter(rounded[low], np.float16(1))
    rounded[rounded == 0] = _SMALLEST_SCALE
    return rounded


def _round_values(w: Float32Array, scales: Float32Array, format_name: str, out: Float32Array) -> None:
    """The integers, as float32, for numbers w [group, G] and scales [G]."""
    np.divide(w, scales, out=out)
    np.rint(out, out=out)
    np.clip(out, *INTEGER_RANGES[format_name], out=out)


def _search_scales(
    w: Float32Array, amax: Float32Array, plain: Float32Array, buffer: Float32Array, format_name: str
) -> Float32Array:
    """For each group the scale of least squared error among `plain` and others of its sign; w is [group, G]."""
    best: Float32Array = plain.copy()
    least = _squared_error(w, plain, buffer, format_name)
    for divisor in DIVISORS[format_name][1:]:
        wanted = np.clip(amax / np.float32(divisor), _SMALLEST_SCALE, _LARGEST_SCALE)
        scales = np.copysign(wanted.astype(np.float16).astype(np.float32), plain)
        error = _squared_error(w, scales, buffer, format_name)
        better = error < least * _MARGIN
        best = np.where(better, scales, best)
        least = np.where(better, error, least)
    return best


def _squared_error(w: Float32Array, scales: Float32Array, buffer: Float32Array, format_name: str) -> Float32Array:
    _round_values(w, scales, format_name, out=buffer)
    np.multiply(buffer, scales, out=buffer)
    np.subtract(buffer, w, out=buffer)
    np.multiply(buffer, buffer, out=buffer)
    total: Float32Array = buffer.sum(axis=0)
    return total


def _pack(values: Int8Array, fmt: WeightFormat) -> ByteArray:
    numbers = np.ascontiguousarray(values).view(np.uint8)
    if fmt.name == "int8":
        return numbers
    if fmt.name == "int3":
        return pack_threes(numbers & np.uint8(7))
    packed: ByteArray = numbers[:, 0::2] & np.uint8(15)
    packed[:, : values.shape[1] // 2] |= numbers[:, 1::2] << np.uint8(4)
    return packed


def pack_threes(numbers: ByteArray) -> ByteArray:
    """Numbers of 3 bits, uint8 [R, K] from 0 to 7, as the bytes of ``int3``'s rows, uint8 [R, ceil(3K / 8)]."""
    n_rows, k = numbers.shape
    eights = np.zeros((n_rows, -(-k // 8), 8), np.uint8)
    eights.reshape(n_rows, -1)[:, :k] = numbers
    words = np.zeros(eights.shape[:2], "<u4")
    for index in range(8):
        words |= eights[:, :, index].astype(np.uint32) << np.uint32(3 * index)
    packed = words.view(np.uint8).reshape(n_rows, -1, 4)[:, :, :3].reshape(n_rows, -1)
    return np.ascontiguousarray(packed[:, : -(-3 * k // 8)])


def unpack_threes(data: ByteArray, k: int) -> ByteArray:
    """Undo `pack_threes`: uint8 [R, k] from 0 to 7."""
    n_rows, n_words = len(data), -(-k // 8)
    padded = np.zeros((n_rows, 3 * n_words), np.uint8)
    padded[:, : data.shape[1]] = data
    words = np.zeros((n_rows, n_words, 4), np.uint8)
    words[:, :, :3] = padded.reshape(n_rows, n_words, 3)
    shifts = np.arange(0, 24, 3, dtype=np.uint32)
    eights = (words.view("<u4") >> shifts).astype(np.uint8) & np.uint8(7)
    numbers: ByteArray = eights.reshape(n_rows, 8 * n_words)[:, :k]
    return numbers


# ------------------------------------------------------------------------------------------------------------ decoding


def decode(encoded: EncodedWeight) -> Float32Array:
    """The stored numbers, float32 of the tensor's shape, exactly."""
    k = encoded.shape[-1]
    out = np.empty((math.prod(encoded.shape[:-1]), k), np.float32)
    data = encoded.data.reshape(out.shape[0], -1)
    for rows in _row_blocks(out.shape[0], k):
        out[rows] = _decode_rows(
            encoded.format, k, data[rows], None if encoded.scales is None else encoded.scales[rows]
        )
    return out.reshape(encoded.shape)


def decode_rows(encoded: EncodedWeight, row_indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Float32Array:
    """Some rows of a matrix, float32 [len(row_indices), K]; only those rows are read.

    Raises:
        InputError: the weight is not a matrix, or a row is not there.
    """
    indices = np.asarray(row_indices)
    if len(encoded.shape) != 2:
        raise InputError("is not a matrix, so it has no rows", found=f"shape {list(encoded.shape)}")
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise InputError("row indices must be a list of whole numbers", found=f"{indices.dtype} {list(indices.shape)}")
    if indices.size and not (indices.min() >= 0 and indices.max() < encoded.shape[0]):
        raise InputError(
            "a row is not there", expected=f"0 to {encoded.shape[0] - 1}", found=f"{indices.min()} to {indices.max()}"
        )
    indices = indices.astype(np.intp)
    scales = None if encoded.scales is None else encoded.scales[indices]
    return _decode_rows(encoded.format, encoded.shape[1], encoded.data[indices], scales)


def quantized_values(encoded: EncodedWeight) -> Int8Array:
    """The stored integers, int8 [N, K].

    Raises:
        InputError: the weight is not stored as integers.
    """
    if not encoded.format.is_integer:
        raise InputError("stores no integers", place=f"format {encoded.format}")
    if encoded.format.name == "int8":
        values: Int8Array = encoded.data.view(np.int8).copy()
        return values
    return np.ascontiguousarray(_unpack(encoded.data, encoded.shape[1], encoded.format))


def as_int4(encoded: EncodedWeight) -> EncodedWeight:
    """The same numbers in ``int4`` with positive scales, for what knows no integers of 3 bits.

    A negative scale becomes positive, and its integers, then from -3 to 4, change their signs.

    Raises:
        InputError: the weight is not stored in ``int3``.
    """
    if encoded.format.name != "int3" or encoded.scales is None:
        raise InputError("has other integers", place=f"format {encoded.format}", expected="int3")
    group, k = encoded.format.group_size, encoded.shape[1]
    signs = np.where(encoded.scales < 0, np.int8(-1), np.int8(1))
    values = quantized_values(encoded) * np.repeat(signs, group, axis=1)[:, :k]
    scales = np.abs(encoded.scales)
    wide = WeightFormat("int4", group)
    return EncodedWeight(wide, encoded.shape, _pack(values, wide), scales)


def _unpack(data: ByteArray, k: int, fmt: WeightFormat) -> Int8Array:
    if fmt.name == "int8":
        return data.view(np.int8)
    if fmt.name == "int3":
        offset: Int8Array = (unpack_threes(data, k) ^ np.uint8(4)).view(np.int8) - np.int8(4)
        return offset
    values: Int8Array = _NIBBLES[data].reshape(data.shape[0], 2 * data.shape[1])[:, :k]
    return values


def _decode_rows(fmt: WeightFormat, k: int, data: ByteArray, scales: Float16Array | None) -> Float32Array:
    """Float32 [R, K] of R rows; copies, never a view."""
    if scales is None:
        if fmt.name == "bf16":
            wide: Float32Array = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
            return wide
        return data.view({"f32": "<f4", "f16": "<f2", PLACES: "<u2"}[fmt.name]).astype(np.float32)
    values = _unpack(data, k, fmt)
    spread = np.repeat(scales.astype(np.float32), fmt.group_size, axis=1)[:, :k]
    product: Float32Array = np.multiply(values, spread, dtype=np.float32)
    return product
