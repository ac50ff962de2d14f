"""Reading other people's files whole, as far as they may reasonably go: a pipe or a device may have no end."""

from __future__ import annotations

from typing import Any, BinaryIO

from .errors import InputError
from .output import Path

# More than any evaluation's text; a prompt of that length is some fifteen million tokens; a template is a page.
MAX_TEXT_BYTES = 1 << 30
MAX_PROMPT_BYTES = 64 << 20
MAX_SETTINGS_BYTES = 1 << 20

_PIECE_BYTES = 1 << 20
_SHOWN = 100


def read_bounded(file: BinaryIO, most_bytes: int, *, name: Path | None = None, place: str | None = None) -> bytes:
    """All of an open file.

    Args:
        file: where to read, a pipe too.
        most_bytes: how long it may be.
        name: its name, for errors.
        place: what it is, where it has no name.

    Raises:
        InputError: it is longer.
        OSError: reading failed.
    """
    data = bytearray()
    while piece := file.read(min(_PIECE_BYTES, most_bytes + 1 - len(data))):
        data += piece
        if len(data) > most_bytes:
            raise InputError(
                "goes on for longer than goslet reads",
                file=name,
                place=place,
                expected=f"at most {most_bytes} bytes",
                remedy="give a part of it, and look whether it has an end",
            )
    return bytes(data)


def read_file(path: Path, most_bytes: int) -> bytes:
    """All of a file, as `read_bounded`.

    Raises:
        InputError: it is longer.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return read_bounded(file, most_bytes, name=path)


def check_unicode(value: Any, name: Path, place: str) -> None:
    """Fail if a text of a JSON value has half a surrogate pair, which JSON may spell and UTF-8 cannot.

    Args:
        value: what a file holds, keys included.
        name: the file, for errors.
        place: what the value is called.

    Raises:
        InputError: there is one; its place is named.
    """
    left = [(place, value)]
    while left:
        place, one = left.pop()
        if isinstance(one, dict):
            for key, inner in one.items():
                left += ((f"{place}.{key}"[:_SHOWN], text) for text in (key, inner))
        elif isinstance(one, list):
            left += ((f"{place}[{index}]"[:_SHOWN], inner) for index, inner in enumerate(one))
        elif isinstance(one, str) and any("\ud800" <= character <= "\udfff" for character in one):
            raise InputError(
                "has half a surrogate pair, which is no character",
                file=name,
                place=place.encode("ascii", "backslashreplace").decode("ascii"),
                expected="both \\u of a pair, or the character itself",
                found=ascii(one)[:_SHOWN],
            )
