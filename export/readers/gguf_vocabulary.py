"""The vocabulary inside a GGUF file: RWKV's, whose tokens llama.cpp's converter writes as the inside of Python's bytes.

Source: llama.cpp's ``conversion/base.py``: id 0 is a control token, then a token for every line of the World's file,
then padding, marked as unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import TokenizerError
from ...tokenizer import Tokenizer, vocabulary_of

_MODEL = "tokenizer.ggml.model"
_TOKENS = "tokenizer.ggml.tokens"
_TYPES = "tokenizer.ggml.token_type"
# How llama.cpp marks tokens that a text can spell: normal ones and those that a user added.
_SPELLED = frozenset({1, 4})
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([^x]))", re.DOTALL)
_LETTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
_OTHERWISE = "give another vocabulary (--tokenizer)"


def vocabulary(values: Mapping[str, Any], path: Path) -> tuple[Callable[[], Tokenizer] | None, tuple[str, ...]]:
    """What reads the vocabulary when it is wanted, or None, and what the owner should know.

    Args:
        values: the file's keys.
        path: the file, for errors.
    """
    kind = values.get(_MODEL)
    if kind == "rwkv":
        return lambda: _read(values, path), ()
    if kind in (None, "none", "no_vocab"):
        return None, ()
    return None, (
        f"the vocabulary inside {path.name}, of kind {str(kind)[:20]}, is not read: for text give the model's "
        "tokenizer.json (--tokenizer)",
    )


def _read(values: Mapping[str, Any], path: Path) -> Tokenizer:
    tokens, types = values.get(_TOKENS), values.get(_TYPES)
    if not isinstance(tokens, list) or (types is not None and len(types) != len(tokens)):
        raise TokenizerError("the vocabulary is not there or not whole", file=path, place=_TOKENS, remedy=_OTHERWISE)
    # Where no types are stored, only the first token is known to be no text.
    spelled = (
        [token > 0 for token in range(len(tokens))] if types is None else [int(kind) in _SPELLED for kind in types]
    )
    bytes_of_id = {token: _unescaped(text, token, path) for token, text in enumerate(tokens) if spelled[token]}
    return vocabulary_of(bytes_of_id, path)


def _unescaped(text: bytes, token: int, path: Path) -> bytes:
    content = _ESCAPE.sub(_meant, text)
    if b"\\" in _ESCAPE.sub(b"", text):
        raise TokenizerError(
            "a token ends within an escape", file=path, place=f"{_TOKENS}[{token}]", found=text[:60], remedy=_OTHERWISE
        )
    return content


def _meant(found: re.Match[bytes]) -> bytes:
    return bytes.fromhex(found[1].decode()) if found[1] else _LETTERS.get(found[2], found[2])
