"""tools/onnx_runtimes.py, and another runtime than ONNX Runtime on the portable form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="ONNX Runtime says what is right")

import onnx
import onnx_runtimes
from onnx import numpy_helper
from onnx_runtimes import Runtime, attempts, is_right, make_models, model_name, run_driver, table


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.mark.parametrize("quant", ["f32", "int4"])
@pytest.mark.parametrize("batch", [None, 1])
def test_tract_runs_the_portable_form(quant: str, batch: int | None, models: Path) -> None:
    pytest.importorskip("tract", reason="tools/requirements-test.txt pins it")
    found = run_driver(sys.executable, "tract", models / model_name(quant, "portable", batch), models / f"{quant}.npz")
    assert is_right(found), found


def test_a_model_with_one_other_number_is_wrong(models: Path, tmp_path: Path) -> None:
    """What calls a runtime right must see one number of one vector that is off."""
    model = onnx.load(models / model_name("f32", "portable", None))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.1.att.x_r")
    array = numpy_helper.to_array(tensor).copy()
    array.flat[5] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "x.onnx")
    found = run_driver(sys.executable, "onnxruntime", tmp_path / "x.onnx", models / "f32.npz")
    assert "said" not in found and not is_right(found)


def test_a_model_that_does_not_load_is_told_in_the_runtimes_words(models: Path, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    found = run_driver(sys.executable, "onnxruntime", tmp_path / "x.onnx", models / "f32.npz")
    assert "rror" in found["said"] and not is_right(found)


def test_flags_are_tried_when_the_numbers_are_wrong_and_a_batch_when_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def driver(python: Path, name: str, model: Path, task: Path, flags: tuple[str, ...]) -> dict[str, Any]:
        if "batch" not in model.name:
            return {"said": "no such shape"}
        return {"logits": 1e-7 if flags else 0.01, "state": np.float32(1e-7).item(), "load_s": 0.0, "tokens_s": 0.0}

    monkeypatch.setattr(onnx_runtimes, "run_driver", driver)
    runtime = Runtime("Some Runtime", "1.2", "some", (), ("precise=1",))
    tried = attempts(runtime, tmp_path / "python", tmp_path, "f32", "portable")
    assert [(a["batch"], a["flags"], a["right"]) for a in tried] == [
        (None, [], False), (1, [], False), (None, ["precise=1"], False), (1, ["precise=1"], True)
    ]  # fmt: skip
    failed = [{"batch": None, "flags": [], "right": False, "said": "a | b"}]
    models = {"portable f32": tried, "portable int4": tried, "onnxruntime f32": failed, "onnxruntime int4": failed}
    text = table(
        {
            "shape": onnx_runtimes.SHAPE,
            "runtimes": [
                {"runtime": "Some Runtime", "version": "1.2", "models": models},
                {"runtime": "Other", "version": "3", "not_run": "needs clang, which is not here"},
            ],
        }
    )
    assert "| 1.0e-07 | 1.0e-07 | no: a / b | no: a / b |" in text
    assert "portable f32: `precise=1` (else 1.0e-02); portable f32: a batch of 1" in text
    assert "| Other | 3 | not run: needs clang, which is not here |" in text
