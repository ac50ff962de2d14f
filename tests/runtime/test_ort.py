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


def test_products_of_quantized_weights_are_fused(
    tiny_engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is dequantized on every step would still be right, and some ten times slower."""
    onnx = pytest.importorskip("onnx", reason="the optimized graph is read with onnx")

    class Recording(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Recording)
    with goslet.open(tiny_engines["int4"]) as engine:
        matrices = [name for name, entry in engine.file.tensors.items() if len(entry.shape) == 2]
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(matrices) - 1, "all but the embedding"
    assert not any(node.op_type == "DequantizeLinear" for node in nodes)
    assert not any(node.domain == "goslet" for node in nodes)


def test_onnxruntime_that_is_not_installed(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"goslet\[ort\]"):
        goslet.open(tiny_engine)
