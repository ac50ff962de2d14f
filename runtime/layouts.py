"""How the numbers of a weight lie in an engine file: as plain rows, or packed for the native engine's kernels.

- ``rows``: as `goslet.weights` stores them; the only layout of vectors.
- ``tiles`` and ``columns``: padded and reordered as the top of ``csrc/kernels/matrix.h`` says; matrices only.

Packing loses nothing: `unpack` gives back the bytes that `pack` was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, QuantizationError
from .weights import (
    PLACES,
    SCALE_BYTES,
    ByteArray,
    EncodedWeight,
    Float16Array,
    WeightFormat,
    pack_threes,
    unpack_threes,
)

LAYOUTS = ("rows", "tiles", "columns")

_COLUMN_PADDING = 32  # kColumnPadding of csrc/kernels/matrix.h
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 3}
# What one output contributes to a tile at a time: a number, two of int8's, or eight of int4's.
_TILE_WORDS = {"f32": "<u4", "f16": "<u2", "bf16": "<u2", "int8": "<u2", "int4": "<u4"}
_COLUMN_WORDS = {"f32": "<u4", "f16": "<u2", "bf16": "<u2", "int8": "u1"}
# What turns two's complement, as rows hold it, into a number and half of the range, as packed layouts do.
_OFFSETS = {"int4": np.array([0x88], np.uint8), "int3": np.array([0x24, 0x49, 0x92], np.uint8)}
# Bytes of padded rows that are reordered at once: their temporaries stay in a core's cache.
_BLOCK_BYTES = 1 << 18

_Words = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in one of the layouts.

    Attributes:
        format: how its numbers are stored.
        layout: ``rows``, ``tiles`` or ``columns``.
        shape: the tensor's shape without padding, [N, K] for a matrix.
        data: uint8 [`layout_data_bytes`], contiguous.
        scales: float16 [`layout_scales_bytes` / 2], contiguous; None without groups.

    Raises:
        QuantizationError: format or layout cannot hold the shape.
        InputError: data or scales have not the size and type that follow.
    """

    format: WeightFormat
    layout: str
    shape: tuple[int, ...]
    data: ByteArray
    scales: Float16Array | None

    def __post_init__(self) -> None:
        n_data = layout_data_bytes(self.format, self.layout, self.shape)
        n_scales = layout_scales_bytes(self.format, self.layout, self.shape) // SCALE_BYTES
        _check_flat(self.data, np.uint8, n_data, "data")
        if self.format.is_integer:
            _check_flat(self.scales, np.float16, n_scales, "scales")
        elif self.scales is not None:
            raise InputError("has no scales", place=f"format {self.format}")

    @property
    def size_bytes(self) -> int:
        """Bytes of data and scales, padding included."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _check_flat(array: Any, dtype: type, size: int, place: str) -> None:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.shape != (size,)
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        expected = f"contiguous {np.dtype(dtype).name} [{size}]"
        raise InputError("is not the array that the layout needs", place=place, expected=expected, found=found)


def check_layout(fmt: WeightFormat, layout: str, shape: Sequence[int], name: str) -> None:
    """Refuse a shape that the format or the layout cannot hold.

    Raises:
        QuantizationError: there is no such layout, it holds only matrices, or `WeightFormat.check_shape` refuses.
    """
    fmt.check_shape(shape, name)
    if layout not in LAYOUTS:
        raise QuantizationError(
            "is not a layout", place=name, expected=", ".join(LAYOUTS), found=f"layout {layout!r}"[:100]
        )
    if layout != "rows" and (len(shape) != 2 or fmt.name == PLACES):
        raise QuantizationError(
            f"cannot be laid out in {layout}",
            place=name,
            expected="a matrix of weights",
            found=f"{fmt} of shape {list(shape)}",
            remedy="lay it out in rows",
        )


def layout_data_bytes(fmt: WeightFormat, layout: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` in a layout, padding included, without its scales.

    Raises:
        QuantizationError: format or layout cannot hold the shape.
    """
    check_layout(fmt, layout, shape, "weight")
    if layout == "rows":
        return fmt.data_size_bytes(shape)
    return _round_up(shape[0], _stored_together(fmt, layout)) * _padded_row_bytes(fmt, shape[1])


def layout_scales_bytes(fmt: WeightFormat, layout: str, shape: Sequence[int]) -> int:
    """Bytes of the scales of a tensor of `shape` in a layout, padding included; 0 without groups.

    Raises:
        QuantizationError: format or layout cannot hold the shape.
    """
    check_layout(fmt, layout, shape, "weight")
    if layout == "rows" or not fmt.is_integer:
        return fmt.scales_size_bytes(shape)
    return SCALE_BYTES * _round_up(shape[0], _stored_together(fmt, layout)) * fmt.groups(shape[1])


def pack(weight: EncodedWeight, layout: str) -> PackedWeight:
    """A weight in a layout; ``rows`` shares the weight's memory.

    Raises:
        QuantizationError: the layout cannot hold the shape.
    """
    fmt, shape = weight.format, weight.shape
    check_layout(fmt, layout, shape, "weight")
    if layout == "rows":
        scales = None if weight.scales is None else weight.scales.reshape(-1)
        return PackedWeight(fmt, layout, shape, weight.data.reshape(-1), scales)
    n_out = shape[0]
    data = np.empty(layout_data_bytes(fmt, layout, shape), np.uint8)
    stored = _view(data, fmt, layout, shape)
    row_bytes, padded_row_bytes = weight.data.shape[1], _padded_row_bytes(fmt, shape[1])
    together = _stored_together(fmt, layout)
    for start, stop in _blocks(n_out, padded_row_bytes, together):
        rows = np.zeros((stop - start, padded_row_bytes), np.uint8)
        kept = min(stop, n_out) - start
        rows[:kept, :row_bytes] = weight.data[start : start + kept]
        _offset(rows, fmt)
        _store(stored, rows, start, fmt, layout)
    if weight.scales is None:
        return PackedWeight(fmt, layout, shape, data, None)
    padded = np.zeros((_round_up(n_out, together), weight.scales.shape[1]), np.float16)
    padded[:n_out] = weight.scales
    laid = padded.reshape(-1, together, padded.shape[1]).transpose(0, 2, 1)
    return PackedWeight(fmt, layout, shape, data, np.ascontiguousarray(laid).reshape(-1))


def unpack(packed: PackedWeight) -> EncodedWeight:
    """The weight as plain rows, whatever the padding holds; shares memory only where the layout is ``rows``."""
    fmt, shape, layout = packed.format, packed.shape, packed.layout
    if layout == "rows":
        scales = None if packed.scales is None else packed.scales.reshape(shape[0], -1)
        return EncodedWeight(fmt, shape, packed.data.reshape(*shape[:-1], -1), scales)
    n_out, n_in = shape
    data = np.empty((n_out, fmt.row_size_bytes(n_in)), np.uint8)
    stored = _view(packed.data, fmt, layout, shape)
    together = _stored_together(fmt, layout)
    for start, stop in _blocks(n_out, _padded_row_bytes(fmt, n_in), together):
        rows = _load(stored, start, stop, fmt, layout)
        kept = min(stop, n_out) - start
        data[start : start + kept] = rows[:kept, : data.shape[1]]
    _offset(data, fmt)
    kept_bits = n_in * _BITS[fmt.name] % 8
    if kept_bits:
        data[:, -1] &= np.uint8((1 << kept_bits) - 1)
    if packed.scales is None:
        return EncodedWeight(fmt, shape, data, None)
    groups = fmt.groups(n_in)
    laid = packed.scales.reshape(-1, groups, together).transpose(0, 2, 1).reshape(-1, groups)
    return EncodedWeight(fmt, shape, data, np.ascontiguousarray(laid[:n_out]))


def _offset(rows: ByteArray, fmt: WeightFormat) -> None:
    """Change the integers of rows, in place, between two's complement and their offset form."""
    if fmt.name in _OFFSETS:
        rows ^= np.resize(_OFFSETS[fmt.name], rows.shape[1])


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _stored_together(fmt: WeightFormat, layout: str) -> int:
    """Outputs in a tile or a block of columns: stored_together of csrc/kernels/matrix.h."""
    return 8 if layout == "tiles" else 128 if fmt.name in _OFFSETS else 64


def _padded_row_bytes(fmt: WeightFormat, n_in: int) -> int:
    return _round_up(n_in, _COLUMN_PADDING) * _BITS[fmt.name] // 8


def _blocks(n_out: int, row_bytes: int, together: int) -> Iterator[tuple[int, int]]:
    """First and last output, the last one padded and excluded, of multiples of `together` outputs."""
    n_padded = _round_up(n_out, together)
    step = _round_up(max(1, _BLOCK_BYTES // row_bytes), together)
    for start in range(0, n_padded, step):
        yield start, min(start + step, n_padded)


def _view(data: ByteArray, fmt: WeightFormat, layout: str, shape: Sequence[int]) -> _Words:
    """The packed numbers with an axis for everything that is reordered.

    Tiles: words [tile, columns of a word, output]. Columns: numbers [block, column, output], and for int4 bytes
    [block, pair of columns, column of the pair, half of the block, lane, byte of the lane]. For int3, tiles are bytes
    [tile, columns of a word, plane, output, column of the byte], columns bytes [block, column, half, byte of the half].
    """
    n_inputs = _round_up(shape[1], _COLUMN_PADDING)
    together = _stored_together(fmt, layout)
    n_blocks = -(-shape[0] // together)
    if fmt.name == "int3":
        shape_of = (n_inputs // 32, 3, 8, 4) if layout == "tiles" else (n_inputs, 2, 24)
        return data.reshape(n_blocks, *shape_of)
    if layout == "tiles":
        return data.view(_TILE_WORDS[fmt.name]).reshape(n_blocks, -1, together)
    if fmt.name == "int4":
        return data.reshape(n_blocks, n_inputs // 2, 2, 2, 8, 4)
    return data.view(_COLUMN_WORDS[fmt.name]).reshape(n_blocks, n_inputs, together)


def _store(stored: _Words, rows: ByteArray, start: int, fmt: WeightFormat, layout: str) -> None:
    """Put padded rows, int4's already offset by 8, where outputs from `start` on belong."""
    together = _stored_together(fmt, layout)
    place = slice(start // together, (start + rows.shape[0]) // together)
    if fmt.name == "int3":
        stored[place] = _three_tiles(rows) if layout == "tiles" else _three_columns(rows)
        return
    if layout == "columns" and fmt.name == "int4":
        # Outputs 8s + j: those of an even s fill the low half of byte s / 2 of lane j, those of an odd s the high half.
        low, high = np.moveaxis(rows.reshape(-1, 2, 4, 2, 8, rows.shape[1]), 3, 0)
        stored[place, :, 0] = (low & np.uint8(0x0F) | high << np.uint8(4)).transpose(0, 4, 1, 3, 2)
        stored[place, :, 1] = (low >> np.uint8(4) | high & np.uint8(0xF0)).transpose(0, 4, 1, 3, 2)
        return
    words = rows.view((_TILE_WORDS if layout == "tiles" else _COLUMN_WORDS)[fmt.name])
    if fmt.name == "int4":
        words = _swap(_swap(words, 8, 0x0000FF00), 4, 0x00F000F0)
    stored[place] = words.reshape(-1, together, words.shape[1]).transpose(0, 2, 1)


def _load(stored: _Words, start: int, stop: int, fmt: WeightFormat, layout: str) -> ByteArray:
    """Undo `_store`: padded rows [stop - start, bytes], int4's still offset by 8."""
    n_rows = stop - start
    together = _stored_together(fmt, layout)
    place = slice(start // together, stop // together)
    if fmt.name == "int3":
        return _rows_of_three_tiles(stored[place]) if layout == "tiles" else _rows_of_three_columns(stored[place])
    if layout == "columns" and fmt.name == "int4":
        even, odd = (stored[place, :, c].transpose(0, 2, 4, 3, 1) for c in (0, 1))
        rows = np.empty((n_rows // 128, 2, 4, 2, 8, stored.shape[1]), np.uint8)
        rows[:, :, :, 0] = even & np.uint8(0x0F) | odd << np.uint8(4)
        rows[:, :, :, 1] = even >> np.uint8(4) | odd & np.uint8(0xF0)
        return rows.reshape(n_rows, -1)
    words = np.ascontiguousarray(stored[place].transpose(0, 2, 1)).reshape(n_rows, -1)
    if fmt.name == "int4":
        words = _swap(_swap(words, 4, 0x00F000F0), 8, 0x0000FF00)
    return words.view(np.uint8)


def _three_tiles(rows: ByteArray) -> ByteArray:
    """Padded rows of int3, offset by 4, as [tile, columns of a word, plane, output, column of the byte]."""
    n_rows, n_in = len(rows), rows.shape[1] * 8 // 3
    # Byte i of an output has columns 4q + i, q from 0 to 7.
    q = unpack_threes(rows, n_in).reshape(n_rows // 8, 8, n_in // 32, 8, 4).transpose(3, 0, 2, 1, 4)
    planes = np.empty((n_rows // 8, n_in // 32, 3, 8, 4), np.uint8)
    for plane in range(3):
        planes[:, :, plane] = q[2 * plane] | q[2 * plane + 1] << np.uint8(3)
    planes[:, :, 0] |= q[6] << np.uint8(6)
    planes[:, :, 1] |= q[7] << np.uint8(6)
    planes[:, :, 2] |= (q[6] & np.uint8(4)) << np.uint8(4) | (q[7] & np.uint8(4)) << np.uint8(5)
    return planes


def _rows_of_three_tiles(planes: ByteArray) -> ByteArray:
    """Undo `_three_tiles`."""
    first, second, third = np.moveaxis(planes, 2, 0)
    seven = np.uint8(7)
    q = np.stack([field for plane in (first, second, third) for field in (plane & seven, plane >> np.uint8(3) & seven)])
    sixth = first >> np.uint8(6) | third >> np.uint8(4) & np.uint8(4)
    last = second >> np.uint8(6) | third >> np.uint8(5) & np.uint8(4)
    whole = np.concatenate([q, sixth[None], last[None]]).transpose(1, 3, 2, 0, 4)
    return pack_threes(whole.reshape(8 * len(planes), -1))


def _three_columns(rows: ByteArray) -> ByteArray:
    """Padded rows of int3, offset by 4, as bytes [block, column, half of the block, 24]."""
    n_rows, n_in = len(rows), rows.shape[1] * 8 // 3
    # Outputs 8s + j are bits 3s to 3s + 2 of lane j.
    numbers = unpack_threes(rows, n_in).reshape(n_rows // 128, 2, 8, 8, n_in)
    lanes = np.zeros((n_rows // 128, n_in, 2, 8), "<u4")
    for s in range(8):
        lanes |= numbers[:, :, s].transpose(0, 3, 1, 2).astype(np.uint32) << np.uint32(3 * s)
    parts = lanes.view(np.uint8).reshape(*lanes.shape, 4)
    low, high = parts[..., :2].reshape(*lanes.shape[:3], 16), parts[..., 2]
    return np.concatenate([low, high], axis=3)


def _rows_of_three_columns(stored: ByteArray) -> ByteArray:
    """Undo `_three_columns`."""
    n_blocks, n_in = stored.shape[:2]
    parts = np.zeros((n_blocks, n_in, 2, 8, 4), np.uint8)
    parts[..., :2] = stored[..., :16].reshape(n_blocks, n_in, 2, 8, 2)
    parts[..., 2] = stored[..., 16:]
    lanes = parts.view("<u4")
    numbers = (lanes >> np.arange(0, 24, 3, dtype=np.uint32)).astype(np.uint8) & np.uint8(7)
    return pack_threes(numbers.transpose(0, 2, 4, 3, 1).reshape(128 * n_blocks, n_in))


def _swap(words: _Words, shift: int, mask: int) -> _Words:
    """Exchange the bits of 32-bit words under `mask` with those `shift` above; its own inverse.

    The middle bytes, then the middle nibbles of each half: that pairs column i with column i + 4.
    """
    difference = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
    swapped: _Words = words ^ difference ^ (difference << np.uint32(shift))
    return swapped
