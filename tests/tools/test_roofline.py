"""The bounds for Jetsons: the bytes of a token against real engines, and the guide against the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a version's tensors are described with torch")
pytest.importorskip("onnx", reason="exporting needs onnx")

import roofline
from random_checkpoint import SHAPES, random_rwkv7

import goslet
from goslet.benchmark import bytes_per_token
from goslet.enginefile import EngineFile
from goslet.export.models import rwkv7
from goslet.spec import EMBEDDING

REPORTS = Path(roofline.__file__).parent / "reports"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REPORTS / "roofline-jetson.json").read_text())
    return found


@pytest.mark.parametrize("quant", roofline.QUANTS)
def test_the_bytes_are_those_in_an_engines_header(quant: str, tiny_engines: dict[str, Path]) -> None:
    with EngineFile.open(tiny_engines[quant]) as file:
        stored = {name: t.size_bytes + t.scales_size_bytes for name, t in file.tensors.items()}
        spec, state_bytes = file.spec, file.state_spec.size_bytes
        assert roofline.stored_tensors(spec, quant) == dict(file.tensors)
    row_bytes = stored[EMBEDDING] // spec.vocab_size
    found = roofline.traffic(spec, quant)
    assert found.bytes_per_token == sum(stored.values()) - stored[EMBEDDING] + row_bytes + 2 * state_bytes
    with goslet.open(tiny_engines[quant]) as engine:
        # The benchmark counts what a step reads; the state is written too.
        assert found.bytes_per_token == bytes_per_token(engine) + state_bytes


def test_the_released_shapes_are_those_of_the_checkpoints_that_are_made() -> None:
    shape = {"n_layer": 2, "n_embd": 64, "rank_w": 8, "rank_a": 12, "rank_v": 16, "rank_g": 24}
    made = {name: tuple(tensor.shape) for name, tensor in random_rwkv7(**shape).items()}  # type: ignore[arg-type]
    assert roofline.spec_of(shape) == rwkv7.read_spec(made, None)


def test_the_bytes_are_those_of_the_engines_that_were_measured() -> None:
    measured = json.loads((REPORTS / "bench-cpu.json").read_text())["shapes"]
    compared = 0
    for shape in SHAPES.keys() & measured.keys():
        spec = roofline.spec_of(SHAPES[shape])
        for quant in roofline.QUANTS:
            read_bytes = measured[shape]["contenders"][f"goslet {quant}"]["bytes_per_token"]
            if quant == "f16":  # measured when the embedding's row was of 16 bits too, which is float32 now
                read_bytes += 2 * spec.n_embd
            assert roofline.traffic(spec, quant).bytes_per_token == read_bytes + rwkv7.state_spec(spec).size_bytes
            compared += 1
    assert compared >= 6


def test_a_bound_is_bandwidth_over_bytes_and_none_where_it_does_not_fit() -> None:
    module = roofline.Module("x", "x", 1, 50.0, "")
    assert roofline.bound(roofline.Traffic(100_000_000, 1 << 30), module) == 500.0
    assert roofline.bound(roofline.Traffic(100_000_000, (1 << 30) + 1), module) is None


def test_the_report_is_what_the_tool_computes(report: dict[str, Any]) -> None:
    assert report == roofline.make_report()
    assert report["label"] == "computed bounds, not measurements"


def test_the_guide_shows_the_report(report: dict[str, Any], repository: Path) -> None:
    guide = (repository / "tools/jetson/README.md").read_text()
    assert "\n".join(roofline.tables(report)) in guide


def test_the_tool_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--out", str(tmp_path / "x.json")]) == 0
    printed = capsys.readouterr().out
    assert printed == "\n".join(roofline.tables(json.loads((tmp_path / "x.json").read_text()))) + "\n"
    assert roofline.LABEL in printed.splitlines()[0]
    assert max(map(len, printed.splitlines())) <= 80
