"""The header of a GGUF file: its keys, and where its tensors lie. Every length is checked before it is believed.

Source: ggml's ``docs/gguf.md``, versions 2 and 3, of either byte order. The package gguf reads headers too, but goes on
behind the end of a damaged one and names neither the tensor nor the number of a type that it does not know.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ..models.tensors import Shape

_KNOWN_VERSIONS = (2, 3)
_MAX_AXES = 4
_MAX_NAME_BYTES = 1 << 16
_DEFAULT_ALIGNMENT_BYTES = 32
# The kinds of values, by number: how `struct` calls the fixed ones, then the others.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DOWNLOAD = "check that the download is complete"

# A number, a truth, a text, an array of numbers, or an array of texts as they are stored.
Value = int | float | bool | str | NDArray[Any] | list[bytes]


@dataclass(frozen=True)
class GgufEntry:
    """A tensor as the header describes it.

    Attributes:
        name: its name.
        shape: rows first, as in PyTorch.
        type_number: how its numbers are stored, as ggml counts the types.
        start_bytes: where it begins in the file.
    """

    name: str
    shape: Shape
    type_number: int
    start_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A file's header.

    Attributes:
        path: the file.
        byte_order: ``<`` or ``>``, as numpy and `struct` write it.
        values: its keys and their values.
        entries: its tensors, in the order of the header.
        data: the whole file, mapped: bytes.
    """

    path: Path
    byte_order: str
    values: Mapping[str, Value]
    entries: tuple[GgufEntry, ...]
    data: NDArray[np.uint8]

    def number(self, key: str, otherwise: int) -> int:
        """A whole number that is not below 0, or `otherwise` where the key is not there.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.values.get(key, otherwise)
        if type(value) is not int or value < 0:
            raise CheckpointError(
                "is not a whole number",
                file=self.path,
                place=key,
                found=str(value)[:60],
                remedy="convert the model again from its .pth or folder",
            )
        return value


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, which stays mapped.

    Raises:
        CheckpointError: it is damaged, cut off, of another version or cannot be read.
    """
    try:
        if path.stat().st_size < 24:
            raise CheckpointError("is too short for a GGUF file", file=path, remedy=_DOWNLOAD)
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=path, remedy="check the path and its permissions"
        ) from None
    if data[:4].tobytes() != b"GGUF":
        raise CheckpointError("is not a GGUF file", file=path, place="offset 0 bytes", expected="GGUF")
    # The version is a small number, which shows the order of the bytes.
    order = ">" if data[4:6].tobytes() == b"\0\0" else "<"
    cursor = _Cursor(path, data.data, order)
    version = cursor.number("I")
    if version not in _KNOWN_VERSIONS:
        raise CheckpointError(
            "is of a GGUF version that goslet does not read",
            file=path,
            expected=" or ".join(map(str, _KNOWN_VERSIONS)),
            found=version,
            remedy="convert the model again with a newer converter" if version < 2 else "install a newer goslet",
        )
    # At least a name's length, axes, type and place; a name's length, a kind and a value.
    n_tensors, n_keys = cursor.count("tensors", 24), cursor.count("keys", 13)
    values: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.text(_MAX_NAME_BYTES)
        if key in values:
            raise CheckpointError("a key is there twice", file=path, place=key[:100])
        values[key] = cursor.value(cursor.number("I"), key)
    entries: dict[str, GgufEntry] = {}
    for _ in range(n_tensors):
        entry = _entry(cursor, path)
        if entry.name in entries:
            raise CheckpointError("two tensors have one name", file=path, place=entry.name[:100])
        entries[entry.name] = entry
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError("is not a power of two", file=path, place="general.alignment", found=str(alignment)[:60])
    start = -(-cursor.at // alignment) * alignment
    placed = tuple(GgufEntry(e.name, e.shape, e.type_number, start + e.start_bytes) for e in entries.values())
    return GgufHeader(path, order, values, placed, data)


class _Cursor:
    """Reads one thing after the other, none beyond the file's end."""

    def __init__(self, path: Path, data: memoryview, order: str) -> None:
        self.at = 4  # behind the magic
        self._path = path
        self._data = data
        self._order = order

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        self._need(size, "a number")
        value = struct.unpack_from(self._order + code, self._data, self.at)[0]
        self.at += size
        return value

    def count(self, what: str, item_bytes: int) -> int:
        """How many items follow, each of at least some bytes."""
        n: int = self.number("Q")
        self._need(n * item_bytes, f"{n} {what}")
        return n

    def content(self) -> bytes:
        size: int = self.number("Q")
        self._need(size, f"a text of {size} bytes")
        self.at += size
        return bytes(self._data[self.at - size : self.at])

    def text(self, limit_bytes: int) -> str:
        content = self.content()
        if len(content) > limit_bytes:
            raise CheckpointError(
                "has a name that is too long", file=self._path, place=f"offset {self.at} bytes", found=len(content)
            )
        return content.decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> Value:
        if kind in _NUMBERS:
            number: int | float | bool = self.number(_NUMBERS[kind])
            return number
        if kind == _STRING:
            return self.content().decode("utf-8", errors="replace")
        if kind == _ARRAY:
            item = self.number("I")
            if item == _STRING:
                return [self.content() for _ in range(self.count("texts", 8))]
            if item in _NUMBERS:
                dtype = np.dtype(self._order + _NUMBERS[item])
                n = self.count("numbers", dtype.itemsize)
                self.at += n * dtype.itemsize
                return np.frombuffer(self._data, dtype, n, self.at - n * dtype.itemsize)
            kind = item
        raise CheckpointError(
            "is a value of a kind that goslet does not read", file=self._path, place=key[:100], found=f"kind {kind}"
        )

    def _need(self, size_bytes: int, what: str) -> None:
        if size_bytes > len(self._data) - self.at:
            raise CheckpointError(
                f"ends before {what} of its header",
                file=self._path,
                place=f"offset {self.at} bytes",
                expected=f"{size_bytes} bytes",
                found=f"{len(self._data) - self.at} bytes",
                remedy=_DOWNLOAD,
            )


def _entry(cursor: _Cursor, path: Path) -> GgufEntry:
    """A tensor's description; its place counts from where the tensors begin."""
    name = cursor.text(_MAX_NAME_BYTES)
    n_axes = cursor.number("I")
    if not 1 <= n_axes <= _MAX_AXES:
        raise CheckpointError(
            "a tensor has a wrong number of axes",
            file=path,
            place=name[:100],
            expected=f"1 to {_MAX_AXES}",
            found=n_axes,
        )
    sizes = [int(cursor.number("Q")) for _ in range(n_axes)]
    if not 0 < math.prod(sizes) < 1 << 62:
        raise CheckpointError("a tensor has an impossible shape", file=path, place=name[:100], found=sizes[::-1])
    return GgufEntry(name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q"))
