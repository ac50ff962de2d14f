"""What a model reads to be calibrated: chunks of a text, each from a fresh state, some of them held out.

Needs no torch: an engine is recalibrated (`goslet.export.recalibration`) where nothing but the runtime is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..reading import MAX_TEXT_BYTES, read_file
from ..tokenizer import Tokenizer

CALIBRATION_TOKENS = 8192
CHUNK_TOKENS = 256
MIN_TOKENS = 2 * CHUNK_TOKENS

# One chunk in so many is held out, and no more than so many.
_HELD_OUT_SHARE = 16
_MOST_HELD_OUT = 4


def calibration_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer, n_tokens: int) -> NDArray[np.int32]:
    """Chunks of a text, spread over all of it.

    Args:
        path: a UTF-8 text.
        tokenizer: the model's.
        n_tokens: how many tokens are wanted; whole chunks are taken, and fewer where the text has not as many.

    Returns:
        int32 [chunks, `CHUNK_TOKENS`], at least two.

    Raises:
        InputError: the file cannot be read, is not text or has fewer than `MIN_TOKENS` tokens, or fewer are wanted.
    """
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < MIN_TOKENS:
        raise InputError(
            "are too few to calibrate on",
            place="calibration tokens",
            expected=f"{MIN_TOKENS} or more",
            found=repr(n_tokens),
        )
    ids = np.array(tokenizer.encode(_text(Path(path))), np.int32)
    available = len(ids) // CHUNK_TOKENS
    if len(ids) < MIN_TOKENS:
        raise InputError(
            "is too short to calibrate on",
            file=path,
            expected=f"{MIN_TOKENS} tokens or more",
            found=len(ids),
            remedy="give a longer text of the kind that the model will read",
        )
    wanted = min(n_tokens // CHUNK_TOKENS, available)
    starts = [index * (len(ids) - CHUNK_TOKENS) // (wanted - 1) for index in range(wanted)]
    return np.stack([ids[start : start + CHUNK_TOKENS] for start in starts])


def _text(path: Path) -> str:
    try:
        data = read_file(path, MAX_TEXT_BYTES)
    except OSError as error:
        raise InputError(
            f"the text cannot be read: {error.strerror or error}", file=path, remedy="check the name"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "is not UTF-8 text",
            file=path,
            place=f"byte {error.start}",
            found=f"0x{data[error.start]:02x}",
            remedy="give a text file, or convert it",
        ) from error
    if "\0" in text:
        raise InputError(
            "is not text",
            file=path,
            place=f"byte {data.index(0)}",
            found="0x00",
            remedy="give a text file",
        )
    return text


def held_out_chunks(n_chunks: int) -> list[int]:
    """Which chunks are held out, spread evenly."""
    count = min(_MOST_HELD_OUT, max(1, n_chunks // _HELD_OUT_SHARE))
    return [(2 * index + 1) * n_chunks // (2 * count) for index in range(count)]
