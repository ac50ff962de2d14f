"""The tool that measures ONNX files in plain ONNX Runtime; its numbers are held by the report alone."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="it is what is measured")

import onnx_speed


def test_measures_every_format_beside_float(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "x.json"
    words = ["--models", str(tiny_checkpoint), "--threads", "1", "--rounds", "2", "--json", str(report)]
    assert onnx_speed.main(words) == 0
    (model,) = json.loads(report.read_text())["models"]
    assert list(model["results"]) == ["f32", "int8", "int4", "int3"]
    for quant in onnx_speed.QUANTS:
        result = model["results"][quant]
        assert result["file_bytes"] < model["results"]["f32"]["file_bytes"]
        # Steps of 1/127 of a group's largest number, and of 1/32258 against int8: float32 would give 1e-6.
        low, high = (2e-6, 5e-4) if quant == "int8" else (1e-4, 5e-2)
        assert low < result["activations_of_range"] < high
