"""How well and how fast: the commands eval and bench."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

import goslet
from goslet import _native, benchmark
from goslet.enginefile import EngineFile
from goslet.evaluation import Score, encode_pair, evaluate_text, score, score_continuations
from goslet.lambada import Lambada
from goslet.machine import cpu_model
from goslet.tokenizer import BytesTokenizer

from .command_line import Run, assert_one_line_error

# ----------------------------------------------------------------------------------------------------------------- eval


TEXT = "It was the best of times — it was the worst of times. " * 8


def bits_token_by_token(engine: goslet.Engine, tokens: list[int]) -> float:
    """-log2 p of tokens[1:], from one feed at a time and a softmax in float64."""
    session, bits = engine.session(), 0.0
    for token, successor in itertools.pairwise(tokens):
        logits = session.feed([token]).astype(np.float64)
        bits -= (logits[successor] - math.log(np.exp(logits).sum())) / math.log(2)
    return bits


def test_eval_equals_a_naive_sum(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    data = TEXT.encode("utf-8")
    with goslet.open(tiny_engine) as engine:
        bits = bits_token_by_token(engine, list(data))
    outcome = run("eval", tiny_engine, "--text", path, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert (report["tokens"], report["bytes"], report["uncounted_bytes"]) == (len(data) - 1, len(data) - 1, 1)
    # The same float32 logits either way, so only the order of float64 sums differs.
    assert report["bits_per_byte"] == pytest.approx(bits / report["bytes"], rel=1e-9)
    assert report["perplexity"] == pytest.approx(2 ** (bits / report["tokens"]), rel=1e-9)
    lines = run("eval", tiny_engine, "--text", path).out.splitlines()
    assert lines[0] == f"{report['bits_per_byte']:.4f} bits per byte"
    assert lines[-1].startswith("not counted: the first 1 bytes")


def test_eval_counts_every_byte_after_an_end_of_document_token(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BytesTokenizer, "end_token", property(lambda self: 10))
    data = TEXT.encode("utf-8")
    with goslet.open(tiny_engine) as engine:
        bits = bits_token_by_token(engine, [10, *data])
        result = evaluate_text(engine, TEXT)
    assert (result.tokens, result.bytes, result.uncounted_bytes) == (len(data), len(data), 0)
    assert result.bits_per_byte == pytest.approx(bits / len(data), rel=1e-9)


def test_eval_keeps_line_ends(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "crlf.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert json.loads(run("eval", tiny_engine, "--text", path, "--json").out)["bytes"] == 9


def test_eval_of_bad_texts(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, parts in (
        (b"", ["is empty"]),
        (b"a", ["no token to predict"]),
        (b"fine\xc3", ["byte 4", "is not UTF-8"]),
    ):
        path.write_bytes(content)
        assert_one_line_error(run("eval", tiny_engine, "--text", path), 1, *parts)
    assert_one_line_error(run("eval", tiny_engine, "--text", tmp_path / "none"), 1, "none", "No such file")


# -------------------------------------------------------------------------------------------------------- continuations


class Pieces(BytesTokenizer):
    """Bytes, but for two pairs of them that are one token, one of which reaches from a sentence into the next line."""

    pairs = ((b"he", 1), (b".\n", 2))

    @property
    def end_token(self) -> int | None:
        return 0

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        for pair, token in self.pairs:
            utf8 = utf8.replace(pair, bytes([token]))
        return list(utf8)


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("so t", " he", b"\0so t", b" \x01"),
        ("so t  ", "he", b"\0so t", b"  \x01"),  # white space goes to what follows it
        ("", "the", b"\0", b"t\x01"),
        (" \n", "a", b"\0", b" \na"),
        ("so h", "e", b"\0so h", b"e"),  # together they would be one token
        ("It was.", "\nSo", b"\0It was.", b"\nSo"),
    ],
)
def test_pairs_are_cut_as_the_harness_does_and_always_spell_the_text(
    context: str, continuation: str, before: bytes, after: bytes
) -> None:
    assert encode_pair(Pieces(), context, continuation) == (list(before), list(after))


def test_without_an_end_of_document_token_the_first_token_is_what_the_rest_follows() -> None:
    assert encode_pair(BytesTokenizer(), "", "abc") == (list(b"a"), list(b"bc"))
    for context, continuation in (("", "a"), ("a", "")):
        with pytest.raises(goslet.GosletError, match="no token to predict"):
            encode_pair(BytesTokenizer(), context, continuation)


def naive_scores(engine: goslet.Engine, context: bytes, continuation: bytes) -> tuple[float, bool]:
    """-ln p of a continuation and whether it is greedy, from one feed at a time and a softmax in float64."""
    session, nats, greedy = engine.session(), 0.0, True
    logits = [session.feed([token]).astype(np.float64) for token in context][-1]
    for token in continuation:
        nats -= logits[token] - math.log(np.exp(logits).sum())
        greedy = greedy and int(np.argmax(logits)) == token
        logits = session.feed([token]).astype(np.float64)
    return nats, greedy


def greedy_bytes(engine: goslet.Engine, context: bytes, count: int) -> bytes:
    session, found = engine.session(), []
    logits = session.feed(list(context))
    for _ in range(count):
        found.append(int(np.argmax(logits)))
        logits = session.feed(found[-1:])
    return bytes(found)


def test_continuations_of_one_context_equal_naive_sums(tiny_engine: Path) -> None:
    context = b"The old clock struck"
    with goslet.open(tiny_engine) as engine:
        likely = greedy_bytes(engine, context, 5)
        # The one that is greedy but for its last byte, beside longer and shorter ones, in both orders.
        almost = likely[:-1] + bytes([likely[-1] ^ 1])
        for continuations in ([b" ten", likely, b"x", almost], [almost, b"x", likely, b" ten"]):
            found = score_continuations(engine.session(), list(context), [list(one) for one in continuations])
            for one, other in zip(found, continuations, strict=True):
                nats, greedy = naive_scores(engine, context, other)
                # The same float32 logits either way, so only the order of float64 sums differs.
                assert one.nats == pytest.approx(nats, rel=1e-9)
                assert one.greedy == greedy == (other in (likely, b"x") and likely.startswith(other))


def test_logits_that_are_not_finite_are_named() -> None:
    logits = np.zeros((3, 8), np.float32)
    logits[1, 2] = np.nan
    with pytest.raises(goslet.GosletError, match="after token 11"):
        score(logits, np.zeros(3, np.int64), first=10)


# -------------------------------------------------------------------------------------------------------------- lambada

PASSAGES = [
    "She opened the door and there stood the man from the train",
    "“Well,” he said, “I never thought that I would see you here again, my friend.”\n\n“Nor I”",
    "Once upon a time",
]


def write_passages(path: Path, passages: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in passages), encoding="utf-8")
    return path


def cut(text: str) -> tuple[bytes, bytes]:
    """Context and target, in bytes."""
    at = text.rindex(" ")
    return text[:at].encode(), text[at:].encode()


def passage_that_is_known(engine: goslet.Engine) -> str:
    """A passage whose last word, of one letter, the model would write itself."""
    for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3):
        context = ("so " + "".join(letters)).encode()
        target = greedy_bytes(engine, context, 2)
        if target[0] == ord(" ") and chr(target[1]).isascii() and chr(target[1]).isalnum():
            return (context + target).decode()
    raise AssertionError("none of 17576 contexts is followed by a space: is the model that of conftest?")


def test_lambada_equals_naive_sums(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    with goslet.open(tiny_engine) as engine:
        passages = [*PASSAGES, passage_that_is_known(engine)]
        sums = [naive_scores(engine, *cut(text)) for text in passages]
    path = write_passages(tmp_path / "passages.jsonl", passages)
    path.write_bytes(b"\n" + path.read_bytes() + b" \n")  # blank lines are no passages
    outcome = run("eval", tiny_engine, "--lambada", path, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    right = [greedy for _, greedy in sums]
    assert right == [False, False, False, True]
    assert report["examples"] == 4
    assert report["accuracy"] == 0.25
    assert report["accuracy_stderr"] == pytest.approx(np.std(right, ddof=1) / 2)
    assert report["perplexity"] == pytest.approx(math.exp(np.mean([nats for nats, _ in sums])), rel=1e-9)

    limited = json.loads(run("eval", tiny_engine, "--lambada", path, "--limit", 2, "--json").out)
    assert (limited["examples"], limited["accuracy"], limited["accuracy_stderr"]) == (2, 0, 0)
    lines = run("eval", tiny_engine, "--lambada", path).out.splitlines()
    assert lines[0] == f"0.2500 accuracy (standard error {report['accuracy_stderr']:.4f}), 1 of 4 passages"
    assert lines[1] == f"{report['perplexity']:.4f} perplexity per last word"


def test_lambada_of_bad_files(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    good = b'{"text": "two words"}\n'
    for content, parts in (
        (b"", ["has no passage"]),
        (b"\n \n", ["has no passage"]),
        (good + b"two words\n", ["line 2", "is not JSON", "two words"]),
        (good + b"\n\xff\n", ["line 3", "is not JSON"]),
        (good + b"[" * 200_000, ["line 2", "is not JSON"]),
        (good + b"[1]\n", ["line 2", "has no text", "list"]),
        (b'{"txt": "two words"}', ["line 1", "has no text", "txt"]),
        (b'{"text": 3}', ["line 1", "has no text"]),
        (b'{"text": " \\n"}', ["line 1", "empty"]),
        (b'{"text": "one"}', ["line 1", "no last word", "one"]),
        (b'{"text": "ends in a space "}', ["line 1", "no last word"]),
        (b'{"text": "' + b"a " * (1 << 20) + b'"}', ["line 1", "too long"]),
    ):
        path.write_bytes(content)
        assert_one_line_error(run("eval", tiny_engine, "--lambada", path), 1, "passages.jsonl", *parts)
    assert_one_line_error(run("eval", tiny_engine, "--lambada", tmp_path / "none"), 1, "none", "No such file")
    path.write_bytes(good + b"not read\n")
    assert run("eval", tiny_engine, "--lambada", path, "--limit", 1).code == 0


def test_what_eval_measures_must_be_clear(run: Run, tiny_engine: Path) -> None:
    assert_one_line_error(run("eval", tiny_engine), 2, "--text", "--lambada")
    assert_one_line_error(run("eval", tiny_engine, "--text", "a", "--lambada", "b"), 2, "not allowed with")
    assert_one_line_error(run("eval", tiny_engine, "--text", "a", "--limit", 3), 2, "--limit", "--lambada")
    assert_one_line_error(run("eval", tiny_engine, "--lambada", "a", "--limit", 0), 2, "--limit", "1 or more")


def test_a_model_that_is_as_wrong_as_can_be_has_an_infinite_perplexity() -> None:
    assert Lambada.of([Score(2000.0, False)]) == Lambada(0.0, 0.0, math.inf, 1)


# ---------------------------------------------------------------------------------------------------------------- bench


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DECODE_S": 0.05, "PREFILL_S": 0.02, "STREAM_BYTES": 8 << 20}.items():
        monkeypatch.setattr(benchmark, name, value)


@pytest.mark.usefixtures("quick_bench")
@pytest.mark.parametrize("backend", ["native", "ort"])
def test_bench_reports_its_figures(backend: str, run: Run, tiny_engines: dict[str, Path]) -> None:
    outcome = run("bench", tiny_engines["int8"], "--json", "--threads", 2, "--backend", backend)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    rate = report["tokens_per_s"]
    assert 0 < rate["p5"] <= rate["median"] <= rate["p95"]
    assert report["decode_steps"] >= benchmark.MIN_STEPS
    assert report["machine"]["threads"] == 2
    assert report["machine"]["cpu"]
    assert report["backend"] == backend
    share = report["bytes_per_token"] * rate["median"] / (report["bandwidth_gb_s"] * 1e9)
    assert report["share_of_bandwidth"] == pytest.approx(share)

    inspected = json.loads(run("inspect", tiny_engines["int8"], "--json").out)
    stored_bytes = sum(entry["bytes"] for entry in inspected["formats"].values())
    with EngineFile.open(tiny_engines["int8"]) as file:
        embedding_bytes = file.weight("emb.weight").size_bytes
        skippable_bytes = sum(file.packed(f"blocks.{layer}.ffn.value.weight").data.nbytes for layer in range(2))
    expected = stored_bytes - embedding_bytes + embedding_bytes // 256 + inspected["state_size_bytes"]
    if backend == "ort":
        assert (report["density"], report["isa"]) == (None, None)
        assert report["bytes_per_token"] == expected
    else:
        # relu² of a random model's keys, which are as often negative as positive.
        assert 0.3 < report["density"] < 0.7
        assert report["isa"] in _native.available_isas()
        skipped_bytes = (1 - report["density"]) * skippable_bytes
        assert report["bytes_per_token"] == pytest.approx(expected - skipped_bytes, abs=2)  # each weight is rounded


@pytest.mark.usefixtures("quick_bench")
def test_bench_for_people(run: Run, tiny_engine: Path) -> None:
    lines = run("bench", tiny_engine).out.splitlines()
    assert cpu_model() in lines[0]
    assert "backend native (" in lines[0]
    assert lines[1].startswith("decode")
    assert lines[2].startswith("prefill")


def test_bandwidth_counts_the_slowest_thread() -> None:
    start_s = time.perf_counter()
    found = benchmark.stream_bandwidth_gb_s(3, 64 << 20)
    longest_s = time.perf_counter() - start_s
    # Every pass took less than the whole call, and reading cannot beat what one core's registers can take in.
    assert 64 * (1 << 20) / longest_s / 1e9 < found < 3 * 500
