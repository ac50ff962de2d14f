"""What is ONNX Runtime's own about the ort backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import goslet
from goslet.errors import BackendError, DependencyError

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="this is about ONNX Runtime")


class OldOptions(onnxruntime.SessionOptions):
    """Session options as they were up to ONNX Runtime 1.23, the last version for Python 3.10."""

    def __getattribute__(self, name: str) -> object:
        if name == "add_external_initializers_from_files_in_memory":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4"])
def test_old_versions_get_their_weights_from_files(
    quant: str, tiny_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with goslet.open(tiny_engines[quant]) as engine:
        expected = engine.session().feed([1, 2, 3])
    monkeypatch.setattr(onnxruntime, "SessionOptions", OldOptions)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with goslet.open(tiny_engines[quant]) as engine:
        assert list(tmp_path.iterdir()) == [], "the files are gone as soon as the engine is open"
        np.testing.assert_array_equal(engine.session().feed([1, 2, 3]), expected)


def test_old_version_without_room_for_its_files(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "SessionOptions", OldOptions)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(BackendError, match="TMPDIR"):
        goslet.open(tiny_engine)


def test_products_of_quantized_weights_are_fused(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    """Dequantizing on every step would still be right, and some ten times slower."""
    onnx = pytest.importorskip("onnx", reason="the optimized graph is read with onnx")
    from goslet.enginefile import EngineFile
    from goslet.initializers import graph_initializers

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    with EngineFile.open(tiny_engines["int4"]) as file:
        weights = graph_initializers(file)
        options.add_external_initializers_from_files_in_memory(
            list(weights), list(weights.values()), [buffer.nbytes for buffer in weights.values()]
        )
        onnxruntime.InferenceSession(bytes(file.graph_bytes), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    fused = sum(node.op_type == "MatMulNBits" for node in nodes)
    # Every matrix but the embedding and the seven that lead out of a LoRA, whose ranks of 8 to 24 fill no group of 32.
    assert fused >= 2 * (4 + 2) + 7 + 1
    assert not any(node.domain == "goslet" for node in nodes)


def test_onnxruntime_that_is_not_installed(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"goslet\[ort\]"):
        goslet.open(tiny_engine)
