"""How well an engine predicts: the bits per byte of a text, and what a continuation costs after its context.

All scoring is here, in one way: `score` takes logits and the tokens that followed, `evaluate_text` a whole text, and
`score_continuations` a context with what may follow it. LAMBADA (`goslet.lambada`) and the adapter to
lm-evaluation-harness (`goslet.lm_eval`) build on the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, NonFiniteError, TokenizerError
from .session import Engine, Session
from .tokenizer import Tokenizer

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


@dataclass(frozen=True)
class Score:
    """What a sequence of tokens costs after what came before it.

    Attributes:
        nats: the sum of -ln of the probability that each token got.
        greedy: whether each of them was the likeliest, so that greedy decoding would have written them.
    """

    nats: float
    greedy: bool


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
    tokenizer = needed_tokenizer(engine)
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
    nats = score_tokens(engine.session(), tokens, progress=progress).nats
    counted_bytes, counted_tokens = n_bytes - uncounted_bytes, len(tokens) - 1
    return Evaluation(
        bits_per_byte=nats / math.log(2) / counted_bytes,
        perplexity=float(np.exp(nats / counted_tokens)),
        tokens=counted_tokens,
        bytes=counted_bytes,
        uncounted_bytes=uncounted_bytes,
    )


def needed_tokenizer(engine: Engine) -> Tokenizer:
    """The engine's tokenizer.

    Raises:
        TokenizerError: it has none.
    """
    if engine.tokenizer is None:
        raise TokenizerError(
            "this engine has no tokenizer, so no text can be evaluated",
            file=engine.file.path,
            remedy="export it with --tokenizer",
        )
    return engine.tokenizer


def score_tokens(
    session: Session, tokens: Sequence[int], *, progress: Callable[[str, int, int], None] | None = None
) -> Score:
    """What tokens[1:] cost, each after all before it; the session moves on past all but the last.

    Args:
        session: where tokens[0] is fed.
        tokens: token ids [T], at least two.
        progress: called with the stage's name, the tokens done and the tokens in all.

    Raises:
        NonFiniteError: the engine gave NaN or infinity; the token's position is named.
    """
    chunk = max(1, min(MAX_CHUNK_TOKENS, MAX_CHUNK_LOGITS // session.engine.spec.vocab_size))
    ids = np.array(tokens, np.int64)
    n_targets = len(ids) - 1
    nats, greedy = 0.0, True
    for start in range(0, n_targets, chunk):
        end = min(start + chunk, n_targets)
        found = score(session.feed(ids[start:end], all_logits=True), ids[start + 1 : end + 1], first=start)
        nats += found.nats
        greedy = greedy and found.greedy
        if progress is not None:
            progress("evaluating", end, n_targets)
    return Score(nats, greedy)


def score(logits: NDArray[np.float32], targets: NDArray[np.int64], *, first: int = 0) -> Score:
    """What tokens cost under the logits that predicted them, in float64.

    Args:
        logits: float32 [T, V].
        targets: token ids [T].
        first: the position of logits[0] in its text, for errors.

    Raises:
        NonFiniteError: a logit is NaN or infinite; the position is named.
    """
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            "the logits are not finite",
            place=f"after token {first + int(np.argmin(finite))} of the text",
            remedy="run `goslet verify`: the checkpoint or this backend overflows",
        )
    greedy = bool((logits.argmax(axis=1) == targets).all())
    wide = logits.astype(np.float64)
    own = wide[np.arange(len(targets)), targets]
    top = wide.max(axis=1, keepdims=True)
    wide -= top
    np.exp(wide, out=wide)
    return Score(float((np.log(wide.sum(axis=1)) + top[:, 0] - own).sum()), greedy)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what continues it, cut as lm-evaluation-harness cuts them.

    White space at the context's end goes over to the continuation. Then both are encoded as one text, and what comes
    after the context's own ids is the continuation. Where the text's ids do not begin with the context's, since a token
    reaches across, the continuation is encoded by itself, so that what is fed always spells the text; the harness cuts
    by count alone there. The context begins with the end-of-document token where the tokenizer has one.

    Returns:
        Both as lists, neither empty.

    Raises:
        InputError: the continuation has no token, or nothing comes before it.
    """
    stem = context.rstrip()
    tail = context[len(stem) :] + continuation
    before = tokenizer.encode(stem)
    whole = tokenizer.encode(stem + tail)
    after = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(tail)
    if tokenizer.end_token is not None:
        before = [tokenizer.end_token, *before]
    elif not before:
        # Nothing marks a document's beginning: the first token is what the rest is predicted from.
        before, after = after[:1], after[1:]
    if not after:
        raise InputError(
            "there is no token to predict",
            place="continuation",
            expected="text, after a context where the tokenizer has no end-of-document token",
            found=repr(continuation)[:60],
        )
    return before, after


def score_continuations(
    session: Session, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Score]:
    """What each of several continuations costs after one context, which is read once.

    Args:
        session: where the context is fed; for one document, a fresh one. Its state is of no use afterwards.
        context: token ids, at least one.
        continuations: token ids, at least one in each.

    Raises:
        NonFiniteError: the engine gave NaN or infinity; the token's position is named.
    """
    logits = session.feed(context)[None]
    found = []
    for index, continuation in enumerate(continuations):
        one = score(logits, np.array(continuation[:1], np.int64), first=len(context) - 1)
        if len(continuation) > 1:
            # The last one may have the context's own state.
            rest = score_tokens(session.fork() if index + 1 < len(continuations) else session, continuation)
            one = Score(one.nats + rest.nats, one.greedy and rest.greedy)
        found.append(one)
    return found
