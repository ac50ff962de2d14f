"""A long conversation: memory stays flat and the state does not drift."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the reference needs torch")
pytest.importorskip("onnxruntime", reason="the ort backend needs onnxruntime")

N_TOKENS = 100_000
GROWTH_LIMIT_BYTES = 1 << 20
# The same limit as for 200 tokens: the state's decays forget rounding errors as they forget tokens.
DRIFT_LIMIT = 3e-5


def test_a_hundred_thousand_tokens(repository: Path, tmp_path: Path) -> None:
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    save(
        random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=64, rank_w=4, rank_a=4, rank_g=4, seed=3),
        tmp_path / "x.pth",
    )
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    command = [sys.executable, repository / "tools/soak.py", tmp_path / "x.goslet", "--tokens", str(N_TOKENS), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    report = json.loads(done.stdout)
    assert report["tokens"] == N_TOKENS
    assert report["finite"]
    assert len(report["largest_state_by_mark"]) == 10
    # A state that grew with the tokens would be ten times as large at the end.
    assert report["largest_state_by_mark"][-1] < 2 * report["largest_state_by_mark"][0]
    assert report["growth_bytes"] <= GROWTH_LIMIT_BYTES
    assert report["drift"] <= DRIFT_LIMIT, report["drift_by_mark"]
