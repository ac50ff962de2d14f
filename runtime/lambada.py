"""LAMBADA: whether a model knows a passage's last word, which only its wide context tells.

Source: Paperno et al., "The LAMBADA dataset: Word prediction requiring a broad discourse context" (2016), as
lm-evaluation-harness's task ``lambada_openai`` reads it: a passage is cut at its last space. What comes before the
space is the context; the space and all after it are the target, with whatever quotes or line breaks are in it. Both are
encoded by `goslet.evaluation.encode_pair`, and every passage begins with a fresh state and the end-of-document token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, BinaryIO

from .errors import InputError
from .evaluation import Score, encode_pair, needed_tokenizer, score_continuations
from .session import Engine

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Lambada:
    """How well last words were predicted.

    Attributes:
        accuracy: share of the passages whose target greedy decoding would have written, every token of it.
        accuracy_stderr: standard error of that share, 0 for a single passage.
        perplexity: exp of the mean over passages of -ln of the probability of the target, all its tokens together.
        examples: passages.
    """

    accuracy: float
    accuracy_stderr: float
    perplexity: float
    examples: int

    @classmethod
    def of(cls, scores: Iterable[Score]) -> Lambada:
        """What the targets' scores come to; at least one."""
        nats, right, count = 0.0, 0, 0
        for found in scores:
            nats += found.nats
            right += found.greedy
            count += 1
        accuracy, mean = right / count, nats / count
        stderr = math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1))
        # exp of more than 709 nats is beyond float64: a model that is as wrong as that.
        return cls(accuracy, stderr, math.exp(mean) if mean < 709 else math.inf, count)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def read_lambada(file: BinaryIO, name: str, limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Contexts and targets of a file with a JSON object a line, ``{"text": ...}``; line by line, blank lines left out.

    Args:
        file: the file, opened for bytes.
        name: its name, for errors.
        limit: at most this many; None is all.

    Raises:
        InputError: a line is not such an object, or its text is one word; the line is named.
    """
    return islice(_passages(file, name), limit)


def _passages(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if not line.isspace():
            yield _cut(line, name, f"line {number}")


def _cut(line: bytes, name: str, place: str) -> tuple[str, str]:
    """A line's context and target."""
    if len(line) > MAX_LINE_BYTES:
        raise InputError("is too long", file=name, place=place, expected=f"at most {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "is not JSON", file=name, place=place, expected='{"text": "..."} on each line', found=repr(line[:40])
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(
            "has no text",
            file=name,
            place=place,
            expected='{"text": "..."}',
            found=f"keys {', '.join(record) or 'none'}"[:80] if isinstance(record, dict) else type(record).__name__,
        )
    context, space, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise InputError(
            "has no last word after others" if text.strip() else "holds an empty text",
            file=name,
            place=place,
            expected="words with a space before the last, and none after it",
            found=repr(text[-40:]),
        )
    return context, space + word


def evaluate_lambada(
    engine: Engine,
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Lambada:
    """Predict the last word of every passage of a file, each from a fresh state.

    The file is read twice, first to find what is wrong with it, and one passage is in memory at a time.

    Args:
        engine: an engine with a tokenizer.
        path: a file as `read_lambada` reads it.
        limit: the first so many passages, at least one; None is all.
        progress: called with the stage's name, the passages done and the passages in all.

    Raises:
        TokenizerError: the engine has no tokenizer.
        InputError: the file has no passage, is a pipe, or a line of it cannot be used.
        OSError: the file cannot be read.
        NonFiniteError: the engine gave NaN or infinity.
    """
    tokenizer = needed_tokenizer(engine)
    name = os.fspath(path)
    session = engine.session()

    def scores(file: BinaryIO, total: int) -> Iterator[Score]:
        for done, (context, target) in enumerate(read_lambada(file, name, limit), 1):
            before, after = encode_pair(tokenizer, context, target)
            session.reset()
            yield score_continuations(session, before, [after])[0]
            if progress is not None:
                progress("evaluating", done, total)

    with open(path, "rb") as file:
        if not file.seekable():
            raise InputError("cannot be read twice", file=name, found="a pipe", remedy="save it to a file first")
        total = sum(1 for _ in read_lambada(file, name, limit))
        if total == 0:
            raise InputError("has no passage", file=name, expected='{"text": "..."} on each line', found="no line")
        file.seek(0)
        return Lambada.of(scores(file, total))
