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
from goslet.evaluation import evaluate_text
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
