"""The figures that the texts show are those of the reports beside them, which the tools wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

SHAPES = ("0.1b", "0.4b", "1.5b")


def report(repository: Path, name: str) -> Any:
    return json.loads((repository / "tools" / name).read_text())


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line is `header`."""
    lines = text.splitlines()
    found = []
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.fixture
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


@pytest.fixture
def measured(repository: Path) -> str:
    return (repository / "tools/reports/README.md").read_text()


def quality(found: dict[str, Any]) -> dict[str, str]:
    more = f"{100 * found['more_than_f32']:+.2f}%"
    return {
        "bytes": f"{found['size_bytes']:,}",
        "bits per weight": f"{found['bits_per_weight']:.2f}",
        "bits per byte": f"{found['bits_per_byte']:.4f}",
        "more than f32": more,
        "more, with its error": f"{more} ± {100 * found['more_stderr']:.2f}",
        "same likeliest token": f"{100 * found['top1']:.1f}%",
        "divergence": f"{found['divergence']:.5f}",
    }


@pytest.mark.parametrize("where", ["readme", "measured"])
def test_quality(where: str, repository: Path, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(where)
    known = {
        f"{row['program']} {row['name']}": quality(row)
        for row in report(repository, "reports/quality-demo.json")["rows"]
    }
    columns = ["bytes", "bits per weight", "more than f32", "divergence"]
    if where == "measured":
        columns = ["bytes", "bits per weight", "bits per byte", "more than f32", "same likeliest token", "divergence"]
    found = rows(text, f"| | {' | '.join(columns)} |")
    assert len(found) >= 8
    for name, *cells in found:
        wanted = re.sub(r", (not )?calibrated$|, its size$", "", name)
        (shown,) = [row for full, row in known.items() if full == wanted or full.startswith(f"{wanted}, the size")]
        if where == "measured":
            columns[3] = "more, with its error"
        for column, cell in zip(columns, cells, strict=True):
            assert cell in (shown[column], ""), (name, column)


def test_speed(readme: str, measured: str, repository: Path) -> None:
    shapes = report(repository, "reports/bench-cpu.json")["shapes"]

    def ratio(kind: str, of: str, over: str, shape: str) -> str:
        (found,) = [entry for entry in shapes[shape][kind] if (entry["of"], entry["over"]) == (of, over)]
        shown = f"{found['ratio']['median']:.2f}"
        return shown if kind == "prefill" else f"{shown} ({found['ratio_at_equal_bytes']:.2f})"

    def decode(name: str, shape: str) -> str:
        median = shapes[shape]["contenders"][name]["decode_tokens_per_s"]["median"]
        return f"{median:.1f}" if shape == "1.5b" else f"{median:.0f}"

    expected = {
        **{name: [decode(name, shape) for shape in SHAPES] for name in ("goslet int4", "goslet int8")},
        **{
            f"{of} over {over} (at equal bytes)": [ratio("decode_ratios", of, over, shape) for shape in SHAPES]
            for of, over in (("goslet int4", "llama.cpp Q4_0"), ("goslet int8", "llama.cpp Q8_0"))
        },
        "goslet f16 over llama.cpp F16": [
            ratio("decode_ratios", "goslet f16", "llama.cpp F16", shape).partition(" ")[0] for shape in SHAPES
        ],
        "prefill of 512 tokens, goslet int4 over llama.cpp's fastest type": [
            ratio("prefill", "goslet int4", "llama.cpp F16", shape) for shape in SHAPES
        ],
    }  # fmt: skip
    assert {
        name: cells for name, *cells in rows(readme, "| decoding, tokens per second | 0.1B | 0.4B | 1.5B |")
    } == expected
    header = "| 0.1B | decode | MB per token | share of bandwidth | prefill, 512 tokens |"
    for name, speed, megabytes, share, _ in rows(measured, header):
        found = shapes["0.1b"]["contenders"][name.replace("ONNX Runtime", "ort").replace("rwkv 0.8.32,", "rwkv")]
        median, p5, p95 = (found["decode_tokens_per_s"][key] for key in ("median", "p5", "p95"))
        assert speed == f"{median:.1f} ({p5:.1f} to {p95:.1f})", name
        assert megabytes == f"{found['bytes_per_token'] / 1e6:.1f}", name
        assert share == f"{100 * found['share_of_bandwidth']['median']:.0f}%", name


def test_what_a_gpu_said(repository: Path) -> None:
    said = report(repository, "results/gpu-check-nvidia-h200.json")
    checks = [check for check in said["checks"] if check["status"] == "passed"]
    compared = [check for check in checks if "limit" in check]
    in_place = [check for check in checks if "in place" in check["name"]]
    replays = {check["name"].split()[2] for check in checks if check["name"].startswith("graph replay")}
    refusals = [check for check in checks if check["name"].startswith("refusal")]
    words = " ".join((repository / "csrc/trt/README.md").read_text().split())
    assert f"on an H200: {len(compared)} comparisons with float64, {len(in_place)} that in place" in words
    assert (len(replays), len(refusals)) == (3, 6) and "three replays of a step in a CUDA graph, six refusals" in words
    status = {check["name"]: check["status"] for check in said["checks"]}
    assert status["compute-sanitizer memcheck"] == "passed" and "memcheck without errors" in words
    assert status["compute-sanitizer racecheck"] == "not run" and "race check not run" in words


def test_what_an_export_costs(readme: str, repository: Path) -> None:
    (found,) = [row for row in report(repository, "reports/export-cost.json")["results"] if row["model"] == "7-1.5b"]
    cost = f"takes {found['duration_s']:.0f} s and {found['peak_anonymous_bytes'] / 1e9:.1f} GB"
    assert f"1.5B to int4 {cost}" in " ".join(readme.split())
