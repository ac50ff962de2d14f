"""The quality table: its sums against naive ones, its equal bytes, and a whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are made with torch")
pytest.importorskip("onnx", reason="exporting needs onnx")

import quality
from quality import Comparison, Method, Row


def test_divergence_and_top1_equal_naive_sums(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    own, other = (random.normal(0, 3, (2, 5, 7)).astype(np.float32) for _ in range(2))
    lanes = random.integers(0, 7, (2, 6))

    class Fixed:
        def __init__(self, logits: np.ndarray) -> None:
            self.logits = logits

        def read(self, tokens: np.ndarray, last: int) -> np.ndarray:
            (index,) = [i for i, lane in enumerate(lanes) if (lane[:-1] == tokens).all()]
            return self.logits[index, -last:].copy()

    comparison = Comparison(lanes, 31, [], tmp_path)
    first = comparison.measure(Row("f32", "goslet", 1, 1.0), Fixed(own))
    row = comparison.measure(Row("x", "goslet", 1, 1.0), Fixed(other))
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (own, other))
    assert row.divergence == pytest.approx((p * np.log2(p / q)).sum(-1).mean())
    assert row.top1 == (own.argmax(-1) == other.argmax(-1)).mean()
    costs = [-np.log2(np.take_along_axis(x, lanes[:, 1:, None], -1)).sum() for x in (p, q)]
    assert first.bits_per_byte == pytest.approx(costs[0] / 31)
    assert row.bits_per_byte == pytest.approx(costs[1] / 31)
    assert row.more_than_f32 == pytest.approx(costs[1] / costs[0] - 1)
    assert (first.top1, first.divergence, first.more_than_f32, first.more_stderr) == (1, 0, 0, 0)


def test_the_standard_error_is_that_of_a_ratio() -> None:
    # Lanes that all cost the same part more have no error, however different they are.
    own = np.array([1.0, 5.0, 2.0])
    assert quality.relative(1.02 * own, own) == pytest.approx((0.02, 0), abs=1e-12)
    # Against what drawing the lanes again and again gives: their ratio's spread, to a few percent of it.
    random = np.random.default_rng(1)
    own = random.normal(100, 20, (4000, 64))
    other = 1.01 * own + random.normal(0, 3, own.shape)
    found = [quality.relative(b, a) for a, b in zip(own, other, strict=True)]
    spread = np.std([ratio for ratio, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.05)


def test_lanes_begin_where_documents_do() -> None:
    lanes = quality.cut_lanes(range(1, 64 * 3 + 5), 0)
    assert lanes.shape == (64, 4)
    assert (lanes[:, 0] == 0).all()
    assert (lanes[:, 1:].flatten() == np.arange(1, 64 * 3 + 1)).all()
    assert (quality.cut_lanes(range(128), None) == np.arange(128).reshape(64, 2)).all()
    with pytest.raises(ValueError, match="128 tokens"):
        quality.cut_lanes(range(127), 0)


def row(name: str, program: str, size_bytes: int, bits: float, more: float, divergence: float = 0.01) -> Row:
    return Row(name, program, size_bytes, bits, bits_per_byte=1 + more, more_than_f32=more, divergence=divergence)


def test_verdicts_compare_at_equal_bytes() -> None:
    rival = row("Q4_K_M, importance matrix", "llama.cpp", 1000, 5.0, 0.005)
    smaller, larger = row("int4", "goslet", 1000, 4.5, 0.004), row("int4 group 32", "goslet", 1001, 5.1, 0.001)
    assert [held for _, held in quality.verdicts([smaller, rival])] == [True, True, None, None]
    assert [held for _, held in quality.verdicts([larger, rival])] == [None, False, None, None]
    unlike = row("int4", "goslet", 1000, 4.5, 0.004, divergence=0.011)
    assert [held for _, held in quality.verdicts([unlike, rival])] == [True, False, None, None]
    wrong = [row("int8 group 32", "goslet", 2000, 8.5, 0.0011), row("int3", "goslet", 700, 3.5, 0.05)]
    assert [held for _, held in quality.verdicts(wrong)] == [False, None, False, False]


def test_budgets_are_no_larger_than_the_files_that_they_are_compared_with() -> None:
    rows = [row(name, "llama.cpp", 1, 5.12345, 0) for name in ("Q4_0", "Q4_K_M", "Q4_K_M, importance matrix")]
    rows += [row("F16", "llama.cpp", 1, 16.3, 0), row("Q4_0", "goslet", 1, 4.5, 0)]
    (method,) = quality.matched_methods(rows)
    assert method == Method("--bits 5.123, the size of Q4_0 and Q4_K_M", {"bits": 5.123}, True)


def test_what_cannot_be_had_is_named(
    texts: list[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A format that goslet does not have, and a llama.cpp that computes something else, if only by a rounding.
    monkeypatch.setattr(quality, "SAME_MODEL_BITS", -1.0)
    monkeypatch.setattr(quality, "CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(quality, "METHODS", (quality.METHODS[0], Method("int4 group 7", {"quant": "int4", "group": 7})))
    out = tmp_path / "report.json"
    assert quality.main([*texts, "--checkpoint", str(tiny_checkpoint), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["f32"]
    unknown, llama = report["not_run"]
    assert "int4 group 7: group: no such group size" in unknown
    assert "computes another model" in llama or "is not installed" in llama


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    words = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    (tmp_path / "text.txt").write_text(words * 4)
    (tmp_path / "calibrate.txt").write_text(words[::-1] * 40)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": words.strip() + " " + w}) + "\n" for w in "abc"))
    return [
        *("--text", str(tmp_path / "text.txt"), "--calibrate", str(tmp_path / "calibrate.txt")),
        *("--lambada", str(tmp_path / "words.jsonl"), "--limit", "2", "--tokenizer", "bytes", "--threads", "1"),
    ]


def test_a_whole_run(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from random_checkpoint import random_rwkv7, save

    checkpoint = tmp_path / "model.pth"
    save(random_rwkv7(n_layer=2, n_embd=64, vocab_size=256, rank_w=8, rank_a=12, rank_v=16, rank_g=24), checkpoint)
    monkeypatch.setattr(quality, "CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(quality, "LLAMA_METHODS", (("F16", False), ("Q4_0", True)))
    monkeypatch.setattr(quality, "METHODS", (*quality.METHODS[:2], Method("int4 gptq", {"quant": "int4"}, True)))
    out = tmp_path / "report.json"
    assert quality.main([*texts, "--checkpoint", str(checkpoint), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    rows: dict[str, Any] = {f"{row['program']} {row['name']}": row for row in report["rows"]}
    assert list(rows)[:3] == ["goslet f32", "goslet f16", "goslet int4 gptq"]
    assert rows["goslet int4 gptq"]["divergence"] > rows["goslet f16"]["divergence"] > 0
    assert rows["goslet f32"]["lambada"]["examples"] == 2
    # Padding of matrices so small counts.
    assert 32 < rows["goslet f32"]["bits_per_weight"] < 36
    assert 4 < rows["goslet int4 gptq"]["bits_per_weight"] < 12
    if report["not_run"]:
        pytest.skip(report["not_run"][0])
    # float16 weights on both sides, so that they agree as two ways to sum float32 do.
    ours, theirs = rows["goslet f16"], rows["llama.cpp F16"]
    assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-3)
    assert theirs["lambada"]["perplexity"] == pytest.approx(ours["lambada"]["perplexity"], rel=1e-2)
    (matched,) = [row for name, row in rows.items() if "the size of Q4_0" in name]
    assert matched["size_bytes"] <= rows["llama.cpp Q4_0, importance matrix"]["size_bytes"]
    assert rows["llama.cpp Q4_0, importance matrix"]["types"]["Q4_0"] > 0
    assert printed.count("\n| ") == len(rows) + 1


def test_the_importance_matrix_is_what_calibration_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")
    from bench_contenders import Unavailable
    from gguf_rwkv7 import tensor_types, write_gguf
    from quality_llama import importance, load_library, quantize

    from goslet.export.calibration import MomentsFile, collect_moments
    from goslet.export.checkpoint import open_checkpoint

    tokens = np.random.default_rng(0).integers(0, 256, (4, 512), np.int32)
    with open_checkpoint(tiny_checkpoint) as source:
        collect_moments(source, source.model_id(), tokens, tmp_path / "moments")
        with MomentsFile(tmp_path / "moments") as moments:
            columns = importance(source, moments)
            head = next(rule for rule in source.rules if rule.name == "head.weight")
            assert (columns["output.weight"] == moments.inputs(head).moments.diagonal().numpy()).all()
    write_gguf(tiny_checkpoint, tmp_path / "F16.gguf")
    assert set(columns) <= set(tensor_types(tmp_path / "F16.gguf"))
    try:
        load_library()
    except Unavailable as error:
        pytest.skip(str(error))
    for name, weights in {"with": columns, "without": None}.items():
        quantize(tmp_path / "F16.gguf", tmp_path / name, "Q4_0", weights)
    assert (tmp_path / "with").stat().st_size == (tmp_path / "without").stat().st_size
    assert (tmp_path / "with").read_bytes() != (tmp_path / "without").read_bytes()
