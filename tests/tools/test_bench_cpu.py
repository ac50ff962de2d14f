"""The speed comparison: the GGUF writer against llama.cpp itself, whole runs at a tiny shape, and the report's sums."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are made with torch")
pytest.importorskip("onnx", reason="exporting needs onnx")

import bench_cpu
from bench_contenders import Contender, Unavailable, Worker, open_runner
from bench_cpu import TINY, Measured, agreement, decode_ratio, groups, markdown, prepare, shape_report

# float32 on both sides, sums of up to 1024 products in another order over two layers.
F32_LIMIT = 1e-4
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 512)


def llama() -> None:
    """Skip where llama.cpp cannot be run."""
    pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")
    from bench_contenders import import_llama

    try:
        import_llama()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(cache: Path) -> Path:
    import torch
    from random_checkpoint import random_rwkv7, save

    path = cache / "tiny.pth"
    save(random_rwkv7(**TINY, dtype=torch.bfloat16), path)
    return path


# ----------------------------------------------------------------------------------------------------------- contenders


def eager_logits(checkpoint: Path) -> np.ndarray:
    """The export's own step in float32 on the first tokens, [T, V]."""
    import torch

    from goslet.export.checkpoint import open_checkpoint
    from goslet.export.models.blocks import EagerOps
    from goslet.spec import EMBEDDING

    with open_checkpoint(checkpoint) as source, torch.no_grad():
        weights = source.weights()
        state = {t.name: torch.full((1, *t.shape), t.init) for t in source.version.state_spec(source.spec).tensors}
        rows = []
        for token in TOKENS[:12]:
            pieces = (weights[EMBEDDING][token : token + 1],)
            row, state = source.version.step(source.spec, EagerOps(weights), pieces, state)
            rows.append(row[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("unused", [True, False])
def test_llama_cpp_computes_the_same_from_our_gguf(tmp_path: Path, unused: bool) -> None:
    llama()
    from gguf_rwkv7 import write_gguf
    from random_checkpoint import random_rwkv7, save

    # Ranks that differ show a tensor that stands for another one, or one that is transposed.
    save(random_rwkv7(**{**TINY, "rank_a": 48, "rank_v": 16, "rank_g": 64}, unused=unused), tmp_path / "x.pth")
    write_gguf(tmp_path / "x.pth", tmp_path / "x.gguf", "F32")
    expected = eager_logits(tmp_path / "x.pth")
    # llama.cpp's library can end a process: it runs in one of its own.
    script = (
        "import sys, numpy as np; from pathlib import Path; from bench_contenders import *\n"
        "runner = open_runner(Contender('x', 'llama.cpp', 'F32'), Path(sys.argv[1]), 1); runner.reset()\n"
        "tokens = np.load(sys.argv[2])\n"
        "np.save(sys.argv[3], np.stack([runner.feed(tokens[i : i + 1]).copy() for i in range(len(tokens))]))\n"
        "runner.reset(); np.save(sys.argv[4], runner.feed(tokens))\n"
    )
    np.save(tmp_path / "tokens.npy", TOKENS[: len(expected)])
    names = ("x.gguf", "tokens.npy", "steps.npy", "prompt.npy")
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    scale = np.abs(expected).max()
    assert np.abs(np.load(tmp_path / "steps.npy") - expected).max() <= F32_LIMIT * scale
    assert np.abs(np.load(tmp_path / "prompt.npy") - expected[-1]).max() <= F32_LIMIT * scale


def test_bytes_per_token_counts_every_weight_that_a_step_reads_once(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")
    from gguf_rwkv7 import bytes_per_token, write_gguf

    from goslet.export.checkpoint import open_checkpoint

    write_gguf(checkpoint, tmp_path / "x.gguf", "F32")
    with open_checkpoint(checkpoint) as source:
        spec = source.spec
        numbers = sum(int(np.prod(s.shape)) for name, s in source.sources.items() if name != "emb.weight")
    state = spec.n_layer * spec.n_embd * (2 + spec.head_size)
    assert bytes_per_token(tmp_path / "x.gguf") == 4 * (numbers + spec.n_embd + state)


def test_another_group_norm_eps_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")
    from gguf_rwkv7 import write_gguf

    import goslet.export.checkpoint as reading

    plain = reading.open_checkpoint
    monkeypatch.setattr(reading, "open_checkpoint", lambda path: plain(path, norm_eps=1e-5))
    with pytest.raises(ValueError, match="group norm"):
        write_gguf(checkpoint, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    llama()
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(Unavailable, match=r"cannot load x\.gguf"):
        Worker(Contender("x", "llama.cpp", "F16"), tmp_path / "x.gguf", 1, TOKENS, tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Unavailable, match="llama_cpp"):
        open_runner(Contender("x", "llama.cpp", "F16"), tmp_path / "x.gguf", 1)
    monkeypatch.setattr(bench_cpu.importlib.util, "find_spec", lambda name: None if name == "rwkv" else object())
    with pytest.raises(Unavailable, match="rwkv is not installed"):
        prepare(checkpoint.parent, "tiny", Contender("x", "rwkv", "f32"), 1)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu.shutil, "disk_usage", lambda path: FullDisk)
    with pytest.raises(Unavailable, match=r"0\.0 GB free"):
        prepare(tmp_path, "0.1b", Contender("goslet int8", "goslet", "int8"), 1)
    assert not list(tmp_path.iterdir())


class FullDisk:
    """What shutil.disk_usage gives for a full disk."""

    free = 0


# ----------------------------------------------------------------------------------------------------------- whole runs


def environment() -> dict[str, str]:
    tools = str(Path(bench_cpu.__file__).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([tools, *filter(None, [os.environ.get("PYTHONPATH")])])}


def bench(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, bench_cpu.__file__, "--cache", str(cache), "--threads", "1", "--shapes", "tiny"]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_run_measures_whoever_is_there_and_names_the_others(cache: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("rwkv", reason="needs rwkv")
    chosen = ["rwkv f32", "ort int8", "goslet int8", "llama.cpp Q8_0"]
    run = bench(cache, "--contenders", ",".join(chosen), "--rounds", "1", "--json", str(tmp_path / "report.json"))
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    found, skipped = report["shapes"]["tiny"]["contenders"], report["skipped"]["tiny"]
    assert set(found) | set(skipped) == set(chosen)
    assert {"rwkv f32", "ort int8"} <= set(found)
    for name, row in found.items():
        assert row["slices"] == 1
        assert 0 < row["decode_tokens_per_s"]["p5"] <= row["decode_tokens_per_s"]["median"]
        assert row["prefill_tokens_per_s"]["median"] > 0
        assert row["share_of_bandwidth"]["median"] > 0
        # rwkv, another implementation of the same weights, is the reference.
        if name != "rwkv f32":
            assert row["agreement"]["reference"] == "rwkv f32"
            assert row["agreement"]["agrees"], (name, row["agreement"])
    for name, reason in skipped.items():
        assert reason
        assert f"Left out at tiny: {name}: {reason}" in out
    assert "| rwkv f32 |" in out


def test_ctrl_c_stops_the_workers(cache: Path, checkpoint: Path) -> None:
    pytest.importorskip("rwkv", reason="needs rwkv")
    run = bench(cache, "--contenders", "rwkv f32", "--rounds", "100000")
    assert run.stderr is not None
    for line in run.stderr:
        if "round 1 of" in line:
            break
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
    run.communicate(timeout=30)
    assert run.returncode == 130
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the run is still there")


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--shapes", "9b"], ["--contenders", "goslet int9"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            bench_cpu.main(["--cache", str(tmp_path), *arguments])
    assert "unknown: 'goslet int9'; expected one of goslet f16" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the report


def measured(bytes_per_token: int, *decode: float, agrees: bool | None = None) -> Measured:
    row = Measured(bytes_per_token, 512, None if agrees is None else {"agrees": agrees})
    row.decode, row.prefill, row.bandwidths_gb_s = list(decode), [10.0, 20.0], [1.0] * len(decode)
    return row


def test_ratios_are_of_slices_of_one_round() -> None:
    # The machine was half as fast in the second round: the ratio is 2 in both.
    found = {"goslet int4": measured(80, 200, 100), "llama.cpp Q4_0": measured(100, 100, 50)}
    ratio = decode_ratio(found, "goslet int4", "llama.cpp Q4_0")
    assert ratio["ratio"] == {"median": 2.0, "p5": 2.0, "p95": 2.0}
    assert ratio["ratio_at_equal_bytes"] == pytest.approx(1.6)


def test_a_share_of_bandwidth_is_bytes_read_over_bytes_that_can_be_read() -> None:
    ours = measured(5_000_000, 100, 50, 50)
    ours.bandwidths_gb_s = [1.0, 0.5, 0.5]  # a neighbour reads, and the share stays
    row: dict[str, Any] = shape_report({"goslet int4": ours})["contenders"]["goslet int4"]
    assert row["share_of_bandwidth"] == pytest.approx({"median": 0.5, "p5": 0.5, "p95": 0.5})


def test_who_computes_something_else_is_not_compared() -> None:
    found = {"goslet int4": measured(80, 200), "llama.cpp Q4_0": measured(100, 100, agrees=False)}
    report = shape_report(found)
    assert report["decode_ratios"] == []
    assert report["prefill"] == []
    machine = {"cpu": "x", "cores": 2, "threads": 2}
    spread_of_one = {"median": 1.0, "p5": 1.0, "p95": 1.0}
    whole = {
        "machine": machine,
        "bandwidth_gb_s": spread_of_one,
        "rounds": 1,
        "shapes": {"tiny": report},
        "skipped": {},
    }
    assert "| llama.cpp Q4_0 (void: its logits disagree) |" in markdown(whole)


def test_agreement_is_lost_with_a_wrong_tensor_and_with_nan(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from random_checkpoint import save

    right = eager_logits(checkpoint)[-1]
    weights = torch.load(checkpoint, weights_only=True)
    weights["blocks.1.att.x_r"], weights["blocks.1.att.x_w"] = weights["blocks.1.att.x_w"], weights["blocks.1.att.x_r"]
    save(weights, tmp_path / "swapped.pth")
    swapped = eager_logits(tmp_path / "swapped.pth")[-1]
    assert agreement("x", right, right.copy(), 16)["agrees"]
    assert not agreement("x", right, swapped, 16)["agrees"]
    assert not agreement("x", right, np.full_like(right, np.nan), 4)["agrees"]


def test_contenders_that_are_compared_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = bench_cpu.CONTENDERS
    assert groups(everyone, "tiny") == [list(everyone)]
    monkeypatch.setattr(bench_cpu, "available_bytes", lambda: 10 * bench_cpu.n_weights("1.5b"))
    divided = groups(everyone, "1.5b")
    assert len(divided) > 1
    assert [contender for group in divided for contender in group] == list(everyone)
    for pair in bench_cpu.PAIRS:
        assert any({contender.name for contender in group} >= set(pair) for group in divided)
