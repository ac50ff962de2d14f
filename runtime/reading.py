"""Reading other people's files whole, as far as they may reasonably go: a pipe or a device may have no end."""

from __future__ import annotations

from typing import BinaryIO

from .errors import InputError
from .output import Path

# More than any evaluation's text; a prompt of that length is some fifteen million tokens; a template is a page.
MAX_TEXT_BYTES = 1 << 30
MAX_PROMPT_BYTES = 64 << 20
MAX_SETTINGS_BYTES = 1 << 20

_PIECE_BYTES = 1 << 20


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
