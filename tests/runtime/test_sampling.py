"""Sampling: the distribution that is drawn from, the penalties, and the search for stop texts in a stream."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goslet.errors import InputError, NonFiniteError, TokenError
from goslet.sampling import Sampler, SamplingOptions, StopMatcher, UncountedTokens


def random_logits(seed: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * scale).astype(np.float32)


def naive_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0
) -> np.ndarray:
    """float64 [V]: the definition, by a full sort."""
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    keep = np.ones(len(logits), bool)
    if top_p < 1:
        reached = np.flatnonzero(np.cumsum(probabilities[order]) >= top_p)[0]
        keep &= probabilities >= probabilities[order[reached]]
    if top_k:
        keep[order[top_k:]] = False
    keep &= probabilities >= min_p * probabilities.max()
    reshaped = np.where(keep, probabilities ** (1 / temperature), 0)
    return reshaped / reshaped.sum()


def drawn(distribution: np.ndarray, bits: np.random.PCG64) -> int:
    """The token that the next 64 random bits select by inverse distribution function, in the order of ids."""
    return int(np.searchsorted(np.cumsum(distribution), bits.random_raw() / 2**64, side="right"))


CASES = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.7, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.85},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.6},
    {"temperature": 0.8, "top_k": 3, "top_p": 0.99},
    {"temperature": 2.5, "top_k": 10_000, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocab_size", [2, 256, 5000])
def test_draws_what_the_definition_draws(case: dict[str, float], vocab_size: int) -> None:
    # Weights are exact to 3e-7, so a draw differs from float64's only within 3e-7 of a boundary: with these fixed
    # seeds, none of the 60 draws does.
    sampler = Sampler(SamplingOptions(seed=11, **case), vocab_size)
    bits = np.random.PCG64(11)
    for trial in range(60):
        logits = random_logits(trial, vocab_size)
        assert sampler.sample(logits) == drawn(naive_distribution(logits, **case), bits)


@pytest.mark.parametrize("case", [c for c in CASES if c["top_p"] < 1 and "min_p" not in c], ids=str)
def test_keeps_what_the_rwkv_package_keeps(case: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the rwkv package needs torch")
    utils = pytest.importorskip("rwkv.utils", reason="compares with PyPI's rwkv, of the test extra")
    seen = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: seen.append(p) or 0)
    sampler = Sampler(SamplingOptions(seed=5, **case), 1000)
    bits = np.random.PCG64(5)
    for trial in range(40):
        logits = random_logits(trial, 1000)
        utils.PIPELINE.sample_logits(None, torch.from_numpy(logits.copy()), **case)
        # The package sums in float32, at most 1000 * 6e-8 away: the seeds are such that no draw or edge is so near.
        assert sampler.sample(logits) == drawn(seen[-1].astype(np.float64), bits)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_frequencies_follow_the_distribution(case: dict[str, float]) -> None:
    logits = random_logits(3, 12, scale=1.0)
    expected = naive_distribution(logits, **case)
    sampler = Sampler(SamplingOptions(seed=2024, **case), 12)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=12)
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_square = ((counts - draws * expected)[likely] ** 2 / (draws * expected[likely])).sum()
    # At most 11 degrees of freedom: 31.3 is exceeded by chance once in a thousand, and the seed is fixed.
    assert chi_square < 31.3


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([0, 3, 3, -1], np.float32)
    for options in (SamplingOptions(temperature=0), SamplingOptions(top_k=1, temperature=3.0, seed=0)):
        sampler = Sampler(options, 4)
        assert {sampler.sample(logits) for _ in range(50)} == {1}


def test_temperature_close_to_zero_is_greedy() -> None:
    for temperature in (5e-324, 1e-30, 1e-3):
        sampler = Sampler(SamplingOptions(temperature=temperature, seed=0), 3)
        assert {sampler.sample(np.array([-1e30, 1, 1.5], np.float32)) for _ in range(50)} == {2}


def test_a_very_large_temperature_is_uniform_over_what_is_kept() -> None:
    sampler = Sampler(SamplingOptions(temperature=1e6, top_k=2, seed=0), 4)
    draws = [sampler.sample(np.array([9, -9, 5, 5.5], np.float32)) for _ in range(400)]
    assert set(draws) == {0, 3}
    assert 140 < draws.count(0) < 260  # 200 within six standard deviations of 10


@pytest.mark.parametrize("top_p", [0.0, 1e-12, 0.3])
def test_a_tiny_top_p_keeps_at_least_one(top_p: float) -> None:
    sampler = Sampler(SamplingOptions(top_p=top_p, seed=0), 3)
    assert {sampler.sample(np.array([1, 2, 1.5], np.float32)) for _ in range(50)} == {1}


def test_top_p_keeps_every_tie_at_its_edge() -> None:
    logits = np.log(np.array([0.25, 0.5, 0.125, 0.125], np.float32))
    draws = [Sampler(SamplingOptions(top_p=0.8, seed=seed), 4).sample(logits) for seed in range(200)]
    assert set(draws) == {0, 1, 2, 3}
    draws = [Sampler(SamplingOptions(top_p=0.7, seed=seed), 4).sample(logits) for seed in range(200)]
    assert set(draws) == {0, 1}


def test_top_k_keeps_the_lowest_ids_of_a_tie() -> None:
    draws = [Sampler(SamplingOptions(top_k=2, seed=seed), 5).sample(np.zeros(5, np.float32)) for seed in range(200)]
    assert set(draws) == {0, 1}


def test_a_uniform_distribution_keeps_everything_under_top_p() -> None:
    sampler = Sampler(SamplingOptions(top_p=0.01, seed=1), 50)
    assert len({sampler.sample(np.zeros(50, np.float32)) for _ in range(1000)}) == 50


def test_penalties_equal_a_naive_loop() -> None:
    presence, frequency, decay, uncounted = 0.3, 0.7, 0.9, {2, 3}
    options = SamplingOptions(
        presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay, temperature=0, seed=1
    )
    sampler = Sampler(options, 40, uncounted)
    counts: dict[int, float] = {}
    chosen = set()
    for step in range(300):
        logits = random_logits(step, 40, scale=0.5)
        penalized = logits.astype(np.float64)
        for token, count in counts.items():
            penalized[token] -= presence + count * frequency
        token = sampler.sample(logits)
        # float32 holds these numbers to 1e-6, and the largest two are further apart than that at every step here.
        assert token == int(np.argmax(penalized))
        sampler.observe(token)
        chosen.add(token)
        for other in counts:
            counts[other] *= decay
        if token not in uncounted:
            counts[token] = counts.get(token, 0) + 1
    assert chosen == set(range(40))  # grown past the first 16 slots, and both uncounted tokens were met


def test_the_repeat_penalty_equals_a_naive_loop() -> None:
    """Over the last 64 tokens, each once, and on the side of 0 where its logit is; not on uncounted tokens."""
    options = SamplingOptions(temperature=0, repeat_penalty=1.3, logit_bias={5: -math.inf})
    sampler, written = Sampler(options, 40, uncounted={0, 3}), []
    for trial in range(150):
        logits = random_logits(trial, 40, 1.0) + np.linspace(1, 0, 40, dtype=np.float32)
        expected = logits.copy()
        expected[5] = -np.inf
        for token in range(40):
            if token in written[-64:] and token not in (0, 3):
                expected[token] = (
                    expected[token] / np.float32(1.3) if expected[token] > 0 else expected[token] * np.float32(1.3)
                )
        token = sampler.fork().sample(logits) if trial % 2 else sampler.sample(logits)
        assert token == int(np.argmax(expected))
        written.append(token)
        sampler.observe(token)
    assert len(set(written)) > 20  # the penalty had its say


def test_an_uncounted_token_repeats_for_ever() -> None:
    logits = np.array([0, 1, 0.5], np.float32)
    options = SamplingOptions(presence_penalty=10, frequency_penalty=10, temperature=0)
    for uncounted, expected in (({1}, [1, 1, 1]), (set(), [1, 2, 0])):
        sampler, tokens = Sampler(options, 3, uncounted), []
        for _ in range(3):
            tokens.append(sampler.sample(logits))
            sampler.observe(tokens[-1])
        assert tokens == expected


def test_logit_bias_adds_and_forbids() -> None:
    logits = np.array([5, 1, 0], np.float32)
    assert Sampler(SamplingOptions(temperature=0, logit_bias={0: -math.inf}), 3).sample(logits) == 1
    assert Sampler(SamplingOptions(temperature=0, logit_bias={2: 7.5, 0: -1}), 3).sample(logits) == 2
    free = Sampler(SamplingOptions(seed=0, top_k=3, top_p=0.999, temperature=100, logit_bias={0: -math.inf}), 3)
    assert {free.sample(logits) for _ in range(200)} == {1, 2}
    assert logits.tolist() == [5, 1, 0]


def test_forbidding_every_token_is_refused() -> None:
    with pytest.raises(InputError, match="logit_bias: forbids every token"):
        Sampler(SamplingOptions(logit_bias={0: -math.inf, 1: -math.inf}), 2)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(TokenError, match=r"logit_bias: is outside the vocabulary .*below 2, found 2"):
        Sampler(SamplingOptions(logit_bias={2: 1.0}), 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_name_the_first_index(bad: float) -> None:
    logits = np.zeros(300, np.float32)
    logits[[70, 200]] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match=r"logits\[70\]: is not finite"):
            Sampler(SamplingOptions(temperature=temperature), 300).sample(logits)


def test_logits_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"logits: has the wrong shape \(expected \[4\], found \(1, 4\)\)"):
        Sampler(SamplingOptions(), 4).sample(np.zeros((1, 4), np.float32))


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([3.4e38, -3.4e38, 3.4e38], np.float32)
    assert {Sampler(SamplingOptions(seed=s), 3).sample(logits) for s in range(50)} == {0, 2}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature: is out of range"),
        ({"temperature": math.nan}, "temperature: is out of range"),
        ({"temperature": math.inf}, "temperature: is out of range"),
        ({"temperature": "1"}, "temperature: is not a number"),
        ({"top_k": -1}, "top_k: is out of range"),
        ({"top_k": 2.0}, "top_k: is not a whole number"),
        ({"top_k": True}, "top_k: is not a whole number"),
        ({"top_p": 1.01}, r"top_p: is out of range \(expected 0 to 1, found 1.01\)"),
        ({"top_p": -0.01}, "top_p: is out of range"),
        ({"presence_penalty": math.inf}, "presence_penalty: is out of range"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: is out of range"),
        ({"penalty_decay": 1.5}, "penalty_decay: is out of range"),
        ({"min_p": 1.5}, "min_p: is out of range"),
        ({"repeat_penalty": 0}, "repeat_penalty: is out of range"),
        ({"seed": -1}, "seed: is out of range"),
        ({"seed": 2**64}, "seed: is out of range"),
        ({"seed": 1.5}, "seed: is not a whole number"),
        ({"logit_bias": [1]}, "logit_bias: is not a mapping"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias token: is out of range"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]: is out of range"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]: is out of range"),
        ({"stop": ""}, "stop: is empty"),
        ({"stop": ("a", "")}, "stop: is empty"),
        ({"stop": (1,)}, "stop: is not text"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_one_stop_text_is_not_taken_for_its_letters() -> None:
    assert SamplingOptions(stop="End").stop == ("End",)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_tokens_for_ever() -> None:
    # Recorded once: integer arithmetic and PCG64's guaranteed bits make them the same on every platform.
    sampler = Sampler(SamplingOptions(seed=42, temperature=0.9, top_p=0.95), 64)
    logits = np.linspace(-3, 3, 64, dtype=np.float32)
    tokens = [sampler.sample(logits) for _ in range(12)]
    assert tokens == [61, 56, 62, 60, 44, 63, 61, 61, 46, 56, 55, 63]


def test_another_process_draws_the_same() -> None:
    program = (
        "import numpy as np; from goslet.sampling import Sampler, SamplingOptions\n"
        "sampler = Sampler(SamplingOptions(seed=7), 500)\n"
        "logits = np.random.default_rng(1).standard_normal(500).astype(np.float32)\n"
        "print([sampler.sample(logits) for _ in range(50)])"
    )
    runs = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_no_seed_draws_differently() -> None:
    logits = np.zeros(65536, np.float32)
    assert len({Sampler(SamplingOptions(), 65536).sample(logits) for _ in range(8)}) > 1


def test_a_fork_goes_on_alike_and_apart() -> None:
    options = SamplingOptions(seed=3, presence_penalty=0.5, frequency_penalty=0.5)

    def go_on(sampler: Sampler, steps: int) -> list[int]:
        tokens = []
        for step in range(steps):
            tokens.append(sampler.sample(random_logits(step, 100, 1.0)))
            sampler.observe(tokens[-1])
        return tokens

    original = Sampler(options, 100)
    go_on(original, 30)
    twin, other = original.fork(), original.fork()
    go_on(other, 7)
    assert go_on(twin, 60) == go_on(original, 60)


class Letters:
    texts = ("", " ", "\n\n", "a", "7", " 42", "٣", "x1", "\u3000")

    def decode(self, tokens: list[int]) -> str:
        if max(tokens) >= len(self.texts):
            raise TokenError("is outside the vocabulary")
        return "".join(self.texts[token] for token in tokens)


def test_whitespace_and_digits_are_uncounted() -> None:
    uncounted = UncountedTokens(Letters())
    for _ in range(2):
        assert {token for token in range(12) if token in uncounted} == {1, 2, 4, 5, 8}
        assert np.int64(4) in uncounted and "4" not in uncounted


def naive_search(text: str, stop: list[str]) -> tuple[str, str | None]:
    """What comes before the stop that ends first (of those, the longest), by trying every end."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if text[start:end] in stop:
                return text[:start], text[start:end]
    return text, None


LETTERS = st.text("ab\n", max_size=30)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3))
def test_stops_are_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    emitted = "".join(matcher.feed(piece) for piece in pieces)
    emitted += matcher.flush()
    assert (emitted, matcher.matched) == naive_search("".join(pieces), stop)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(LETTERS, st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3))
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    emitted = matcher.feed(text)
    held = text[len(emitted) :]
    assert matcher.matched is not None or held == "" or any(s.startswith(held) and s != held for s in stop)


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.feed(p) for p in ("Hello\n", "User", "x\n", "User: hi", "more")] == ["Hello", "", "\nUserx", "", ""]
    assert matcher.matched == "\nUser:"
    assert matcher.flush() == ""


def test_what_is_held_at_the_end_comes_out() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the EN") == "the "
    assert matcher.flush() == "EN"
    assert matcher.matched is None
