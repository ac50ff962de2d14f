"""From logits to the next token, and from streamed text to a stop: what RWKV users expect of a sampler.

The order of things, as in the sampler of PyPI's ``rwkv``: bias and penalties change the logits; top-p, top-k and min-p
are chosen from the distribution at temperature 1; the temperature reshapes what is left; one token is drawn. Min-p and
the repeat penalty are llama.cpp's.

Where this differs from that sampler, on purpose:

* ``top_p = 1`` is off. (There, rounding of a float32 sum below 1 can leave only the likeliest token.)
* Among tokens of equal probability at the edge, top-p keeps all (as there) and top-k the lowest ids (there: any).
* Top-k may keep fewer than k tokens only because top-p keeps fewer; both look at the whole distribution (as there).
* Tokens of whitespace or digits only take no penalty at all. (There they add no count, but still pay the presence
  penalty, and line breaks are counted. Nor does llama.cpp's repeat penalty leave them out.)
* The repeat penalty looks back at what was written alone. (In llama.cpp the prompt counts too.)

Drawing uses float32 additions and multiplications, integer sums and numpy's PCG64, whose bit stream is guaranteed:
the same seed and logits give the same token on every platform, whatever its exponential function rounds to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, NonFiniteError, TokenError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

MAX_ADJUSTMENT = 1e6  # of a penalty or bias: far past use, and too small to overflow a float32 logit
MAX_REPEAT_PENALTY = 100.0
REPEAT_LAST_TOKENS = 64  # that the repeat penalty looks back at: what llama.cpp does unless it is told otherwise
MAX_SEED = (1 << 64) - 1

_UNCOUNTED = " \t\r\n\f\v\u00a0\u3000" + "0123456789"
_WEIGHT_BITS = 38  # the likeliest token weighs 2**38, so 2**24 tokens sum to less than 2**63
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 to 9 bits, so that n * _LN2_HIGH is exact for |n| < 2**14
_LN2_LOW = np.float32(-2.12194440e-4)
_TAYLOR = tuple(np.float32(1 / math.factorial(power)) for power in range(6, -1, -1))


class TokenDecoder(Protocol):
    """The part of a tokenizer that `UncountedTokens` needs."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        ...


def _number(option: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError("is not a number", place=option, expected=f"{low:g} to {high:g}", found=repr(value))
    if not low <= value <= high:
        raise InputError("is out of range", place=option, expected=f"{low:g} to {high:g}", found=value)
    return float(value)


def _whole_number(option: str, value: Any, high: float = math.inf) -> int:
    expected = "0 or more" if high == math.inf else f"0 to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError("is not a whole number", place=option, expected=expected, found=repr(value))
    if not 0 <= value <= high:
        raise InputError("is out of range", place=option, expected=expected, found=value)
    return int(value)


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens and when to stop.

    Attributes:
        temperature: 0 (greedy) or more; applied after top-k and top-p.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probability sums to this; 1 keeps all.
        min_p: keep the tokens that are at least this many times as likely as the likeliest; 0 keeps all.
        presence_penalty: taken from the logit of every token that was emitted before.
        frequency_penalty: taken from the logit once per count of a token.
        repeat_penalty: what the logits of the tokens among the last 64 are divided by where they are above 0, and
            multiplied by where they are below; 1 changes nothing.
        penalty_decay: what a count is multiplied by at every further token.
        logit_bias: added to the logits of these token ids; -inf forbids a token.
        seed: of the random draws, 0 to 2**64 - 1; None draws differently every time.
        stop: texts that end the generation; one text or several.

    Raises:
        InputError: an option has the wrong type or is out of range; it is named.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    penalty_decay: float = 0.996
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        clean: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, 0, MAX_ADJUSTMENT),
            "top_k": _whole_number("top_k", self.top_k),
            "top_p": _number("top_p", self.top_p, 0, 1),
            "min_p": _number("min_p", self.min_p, 0, 1),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -MAX_ADJUSTMENT, MAX_ADJUSTMENT),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -MAX_ADJUSTMENT, MAX_ADJUSTMENT),
            "repeat_penalty": _number(
                "repeat_penalty", self.repeat_penalty, 1 / MAX_REPEAT_PENALTY, MAX_REPEAT_PENALTY
            ),
            "penalty_decay": _number("penalty_decay", self.penalty_decay, 0, 1),
            "seed": None if self.seed is None else _whole_number("seed", self.seed, MAX_SEED),
            "stop": _stop_texts(self.stop),
        }
        if not isinstance(self.logit_bias, Mapping):
            raise InputError("is not a mapping", place="logit_bias", expected="{token: bias}", found=self.logit_bias)
        bias = {}
        for token, value in self.logit_bias.items():
            key = _whole_number("logit_bias token", token)
            place = f"logit_bias[{key}]"
            bias[key] = -math.inf if value == -math.inf else _number(place, value, -MAX_ADJUSTMENT, MAX_ADJUSTMENT)
        clean["logit_bias"] = MappingProxyType(bias)
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were written change what is written next."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repeat_penalty != 1


# The decoding parameters: the fields that say how tokens are chosen, whatever the text is.
DECODING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "penalty_decay",
)


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError("is not text", place="stop", expected="a text or several", found=repr(stop))
    if "" in texts:
        raise InputError("is empty", place="stop", expected="at least one character", remedy="leave it out")
    return tuple(texts)


class UncountedTokens(Container[int]):
    """The ids of tokens that are whitespace or digits only, which RWKV users never penalize.

    A token's text is looked at when it is first asked for: that of all of a World vocabulary takes 0.3 s.
    """

    def __init__(self, tokenizer: TokenDecoder) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __contains__(self, token: object) -> bool:
        if not isinstance(token, int | np.integer):
            return False
        known = self._known.get(int(token))
        if known is None:
            try:
                text = self._tokenizer.decode([int(token)])
            except TokenError:  # a model may have rows past its tokenizer's vocabulary
                text = ""
            known = self._known[int(token)] = bool(text) and not text.strip(_UNCOUNTED)
        return known


def _exponential_weights(x: FloatArray) -> IntArray:
    """``floor(2**38 * exp(x))`` for x ≤ 0, to 3e-7 of each value; the same integers on every platform.

    x = n ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite's two-part ln 2), and exp(r) by its Taylor polynomial.
    """
    x = np.maximum(x, np.float32(-60))
    n = np.rint(x * _LOG2_E)
    x -= n * _LN2_HIGH
    x -= n * _LN2_LOW
    value = np.full_like(x, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value *= x
        value += coefficient
    exponent = n.astype(np.int32)
    exponent += 127 + _WEIGHT_BITS
    exponent <<= 23
    value *= exponent.view(np.float32)
    return value.astype(np.int64)


class Sampler:
    """Draws tokens from logits, and remembers what it must for the penalties.

    Args:
        options: how to choose.
        vocab_size: V, the number of logits.
        uncounted: token ids that take no penalty (`UncountedTokens`).

    Raises:
        InputError: a bias names a token outside the vocabulary, or forbids every token.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int, uncounted: Container[int] = ()) -> None:
        self.options = options
        self.vocab_size = vocab_size
        self._uncounted = uncounted
        self._random = np.random.PCG64(options.seed)
        for token in options.logit_bias:
            if token >= vocab_size:
                limit = f"below {vocab_size}"
                raise TokenError("is outside the vocabulary", place="logit_bias", expected=limit, found=token)
        self._bias_ids = np.array(list(options.logit_bias), np.int64)
        self._bias = np.array(list(options.logit_bias.values()), np.float32)
        if np.count_nonzero(self._bias == -np.inf) == vocab_size:
            raise InputError("forbids every token", place="logit_bias", remedy="leave at least one token")
        self._slots: dict[int, int] = {}
        self._last: deque[int] = deque(maxlen=REPEAT_LAST_TOKENS)
        self._ids = np.zeros(16, np.int64)
        self._counts = np.zeros(16, np.float64)

    def sample(self, logits: FloatArray) -> int:
        """Choose the next token; call `observe` with the token that is then emitted.

        Args:
            logits: float32 [V]; not changed.

        Raises:
            InputError: the logits have the wrong shape.
            NonFiniteError: a logit is NaN or infinite; the first such index is named.
        """
        logits = self._adjusted(logits)
        if self.options.temperature == 0:
            return int(np.argmax(logits))
        with np.errstate(over="ignore"):
            kept = self._kept(logits)
            x = (logits if kept is None else logits[kept]) - logits.max()
            if self.options.temperature != 1:
                x *= np.float32(min(1 / self.options.temperature, 1e30))
        sums = np.cumsum(_exponential_weights(x))
        draw = (int(self._random.random_raw()) * int(sums[-1])) >> 64
        index = int(np.searchsorted(sums, draw, side="right"))
        return index if kept is None else int(kept[index])

    def observe(self, token: int) -> None:
        """Count an emitted token; every earlier count decays first."""
        seen = len(self._slots)
        self._counts[:seen] *= self.options.penalty_decay
        self._last.append(token)
        if token in self._uncounted:
            return
        if token not in self._slots:
            if seen == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._slots[token] = seen
            self._ids[seen] = token
        self._counts[self._slots[token]] += 1

    def fork(self) -> Sampler:
        """An independent sampler that goes on exactly as this one would."""
        twin = Sampler(self.options, self.vocab_size, self._uncounted)
        twin._random.state = self._random.state
        twin._slots = dict(self._slots)
        twin._last = self._last.copy()
        twin._ids = self._ids.copy()
        twin._counts = self._counts.copy()
        return twin

    def _adjusted(self, logits: FloatArray) -> FloatArray:
        """A copy of the logits with bias and penalties; finite but for forbidden tokens."""
        if np.shape(logits) != (self.vocab_size,):
            raise InputError("has the wrong shape", place="logits", expected=[self.vocab_size], found=np.shape(logits))
        adjusted = np.array(logits, np.float32)
        finite = np.isfinite(adjusted)
        if not finite.all():
            index = int(np.argmin(finite))
            raise NonFiniteError(
                "is not finite",
                place=f"logits[{index}]",
                found=float(adjusted[index]),
                remedy="run `goslet verify`: the checkpoint or this backend overflows",
            )
        if len(self._bias_ids):
            adjusted[self._bias_ids] += self._bias
        if self.options.repeat_penalty != 1 and self._last:
            again = np.array([token for token in {*self._last} if token not in self._uncounted], np.int64)
            values, factor = adjusted[again], np.float32(self.options.repeat_penalty)
            adjusted[again] = np.where(values > 0, values / factor, values * factor)
        seen = len(self._slots)
        if seen and (self.options.presence_penalty or self.options.frequency_penalty):
            penalty = self.options.presence_penalty + self._counts[:seen] * self.options.frequency_penalty
            adjusted[self._ids[:seen]] -= penalty.astype(np.float32)
        return adjusted

    def _kept(self, logits: FloatArray) -> IntArray | None:
        """The ids that top-p, top-k and min-p leave, ascending; None where all are off."""
        top_k, top_p, min_p = self.options.top_k, self.options.top_p, self.options.min_p
        by_rank, by_mass = 0 < top_k < self.vocab_size, top_p < 1
        if not by_rank and not by_mass and min_p == 0:
            return None
        top = logits.max()
        lowest = top + np.float32(math.log(min_p)) if min_p > 0 else np.float32(-np.inf)
        if not by_rank and not by_mass:
            return np.flatnonzero(logits >= lowest)
        if by_mass:
            weights = _exponential_weights(logits - top)
            goal = math.ceil(top_p * int(weights.sum()))
        # Sorting 65536 numbers takes longer than all the rest, and the kept ones are nearly always close to the top.
        for reach in (3, 5, 7, 10, 15, np.inf):
            ids = np.flatnonzero(logits >= top - np.float32(reach))
            if (by_rank and len(ids) >= top_k) or (by_mass and weights[ids].sum() >= goal):
                break
        kept = weights[ids] >= _mass_edge(weights[ids], goal) if by_mass else np.ones(len(ids), np.bool_)
        if by_rank:
            kept &= _largest(logits[ids], top_k)
        kept &= logits[ids] >= lowest
        return ids[kept]


def _mass_edge(weights: IntArray, goal: int) -> np.int64:
    """The weight down to which the largest weights must be taken to sum to at least `goal`."""
    falling = np.sort(weights)[::-1]
    reached = int(np.searchsorted(np.cumsum(falling), goal))
    return np.int64(falling[min(reached, len(falling) - 1)])


def _largest(values: FloatArray, count: int) -> NDArray[np.bool_]:
    """Marks the `count` largest values, of equal ones the first."""
    if count >= len(values):
        return np.ones(len(values), np.bool_)
    edge = np.partition(values, len(values) - count)[len(values) - count]
    marks: NDArray[np.bool_] = values > edge
    marks[np.flatnonzero(values == edge)[: count - np.count_nonzero(marks)]] = True
    return marks


class StopMatcher:
    """Watches streamed text for stop texts, and holds back what might become one.

    The match that ends first counts, and among those that end together the one that starts first; so the result does
    not depend on how the text was cut into pieces.

    Args:
        stop: texts to look for, none of them empty.

    Attributes:
        held: what is held back now.
        matched: the stop text that was found, or None; after a match no more text comes out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = _stop_texts(stop)
        self.held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece of text and return what is safe to emit, which never contains a stop text."""
        if self.matched is not None:
            return ""
        text = self.held + piece
        ends = ((start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0)
        first = min(ends, default=None)
        if first is not None:
            _, start, self.matched = first
            self.held = ""
            return text[:start]
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                break
        else:
            length = 0
        self.held = text[len(text) - length :]
        return text[: len(text) - length]

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        held, self.held = self.held, ""
        return held
