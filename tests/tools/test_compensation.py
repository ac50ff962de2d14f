"""tools/compensation.py, without the minutes that it takes: what it tries, and what the text beside its report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")

import compensation
from quant_quality import DEMO

from goslet.export.compensate import LOW_RANK_METHODS, SPARSE_METHODS, Compensation


def test_every_method_is_tried_once_alone() -> None:
    tried = list(compensation.compensations())
    assert [one.low_rank for one in tried if not one.share] == [name for name in LOW_RANK_METHODS if name != "zero"]
    assert [one.sparse for one in tried if not one.rank] == list(SPARSE_METHODS)
    assert compensation.described(Compensation(rank=2, share=0.01)) == "--low-rank 2:weighted --sparse 0.01:magnitude"


def test_the_text_shows_the_report(repository: Path) -> None:
    report = json.loads((repository / "tools/reports/compensation.json").read_text())
    shown = (repository / "tools/reports/README.md").read_text().splitlines()
    for line in compensation.tables(report):
        assert not line or line in shown


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match=r"short\.txt: at least 128 tokens are needed"):
        compensation.Bench(
            DEMO / "rwkv7-demo.pth",
            DEMO / "tokenizer.json",
            tmp_path / "short.txt",
            tmp_path / "short.txt",
            tmp_path,
        )
