"""How well an engine predicts a text: bits per byte and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import InputError, NonFiniteError, TokenizerError
from .session import Engine

MAX_CHUNK_TOKENS = 256
MAX_CHUNK_LOGITS = 1 << 22  # 32 MB in float64


@dataclass(frozen=True)
class Evaluation:
    """A text's cost under a model. Tokens and bytes are those that were predicted.

    Attributes:
        bits_per_byte: mean of -log2 of the probability that the text's next token got, per UTF-8 byte.
        perplexity: exp of the mean negative log probability per token.
        tokens: tokens predicted.
        bytes: UTF-8 bytes of these tokens; all of the text's where the tokenizer has an end-of-document token, from
            which the first token is predicted.
        uncounted_bytes: bytes of the first token where nothing could predict it; otherwise 0.
    """

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    uncounted_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def evaluate_text(engine: Engine, text: str, *, progress: Callable[[str, int, int], None] | None = None) -> Evaluation:
    """Predict every token of a text from all that comes before it, with one state carried from end to end.

    Args:
        engine: an engine with a tokenizer.
        text: what to predict.
        progress: called with the stage's name, the tokens done and the tokens in all.

    Raises:
        TokenizerError: the engine has no tokenizer.
        InputError: the text has no token that could be predicted.
        NonFiniteError: the engine gave NaN or infinity; the token's position is named.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise TokenizerError(
            "this engine has no tokenizer, so no text can be evaluated",
            file=engine.file.path,
            remedy="export it with --tokenizer",
        )
    tokens = tokenizer.encode(text)
    n_bytes = len(text.encode("utf-8"))
    uncounted_bytes = 0
    if tokenizer.end_token is not None:
        tokens = [tokenizer.end_token, *tokens]
    elif tokens:
        uncounted_bytes = len(tokenizer.decode_bytes(tokens[:1]))
    if len(tokens) < 2:
        raise InputError(
            "there is no token to predict", place="text", expected="a longer text", found=f"{n_bytes} bytes"
        )
    nats = _negative_log_likelihood(engine, tokens, progress)
    counted_bytes, counted_tokens = n_bytes - uncounted_bytes, len(tokens) - 1
    return Evaluation(
        bits_per_byte=nats / math.log(2) / counted_bytes,
        perplexity=float(np.exp(nats / counted_tokens)),
        tokens=counted_tokens,
        bytes=counted_bytes,
        uncounted_bytes=uncounted_bytes,
    )


def _negative_log_likelihood(
    engine: Engine, tokens: list[int], progress: Callable[[str, int, int], None] | None
) -> float:
    """The sum over tokens[1:] of -ln p(token | all before it), in float64."""
    session = engine.session()
    chunk = max(1, min(MAX_CHUNK_TOKENS, MAX_CHUNK_LOGITS // engine.spec.vocab_size))
    ids = np.array(tokens, np.int64)
    n_targets = len(ids) - 1
    nats = 0.0
    for start in range(0, n_targets, chunk):
        end = min(start + chunk, n_targets)
        logits = session.feed(ids[start:end], all_logits=True).astype(np.float64)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise NonFiniteError(
                "the logits are not finite",
                place=f"after token {start + int(np.argmin(finite))} of the text",
                remedy="run `goslet verify`: the checkpoint or this backend overflows",
            )
        targets = logits[np.arange(end - start), ids[start + 1 : end + 1]]
        top = logits.max(axis=1, keepdims=True)
        logits -= top
        np.exp(logits, out=logits)
        nats += float((np.log(logits.sum(axis=1)) + top[:, 0] - targets).sum())
        if progress is not None:
            progress("evaluating", end, n_targets)
    return nats
