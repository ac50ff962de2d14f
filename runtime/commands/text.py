"""Text and tokens on their way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..session import Session
from .console import Interruption
from .flags import UsageError

PIECE_TOKENS = 32  # between two looks for Ctrl-C


def text_argument(flag: str, text: str) -> str:
    """A text from the command line, which must have been UTF-8 or in the locale's encoding.

    Raises:
        UsageError: it holds bytes that are neither.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag}: is not valid text in this locale's encoding (at character {error.start})") from error
    return text


def read_text(data: bytes, name: str) -> str:
    """Decode UTF-8, line ends as they are.

    Raises:
        InputError: the bytes are not UTF-8; the first bad one is named.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "is not UTF-8", place=f"{name}, byte {error.start}", found=f"0x{data[error.start]:02x}", remedy="convert it"
        ) from error


def feed_in_pieces(
    session: Session,
    tokens: Sequence[int],
    interruption: Interruption,
    progress: Callable[[str, int, int], None] | None = None,
) -> NDArray[np.float32] | None:
    """Feed tokens until all are fed or Ctrl-C came.

    Returns:
        float32 [V], the logits after the last token; None when not all were fed.
    """
    logits = None
    for start in range(0, len(tokens), PIECE_TOKENS):
        if interruption.requested:
            return None
        logits = session.feed(tokens[start : start + PIECE_TOKENS])
        if progress is not None:
            progress("reading the prompt", start, len(tokens))
    return logits
