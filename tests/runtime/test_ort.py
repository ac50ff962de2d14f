"""What is ONNX Runtime's own about the ort backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet.errors import BackendError, DependencyError

from .rewriting import rewritten

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="this is about ONNX Runtime")


class OldOptions(onnxruntime.SessionOptions):
    """Session options as they were up to ONNX Runtime 1.23, the last version for Python 3.10."""

    def __getattribute__(self, name: str) -> object:
        if name == "add_external_initializers_from_files_in_memory":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4", "int3"])
def test_old_versions_get_their_weights_from_files(
    quant: str, tiny_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with goslet.open(tiny_engines[quant], backend="ort") as engine:
        expected = engine.session().feed([1, 2, 3])
    monkeypatch.setattr(onnxruntime, "SessionOptions", OldOptions)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with goslet.open(tiny_engines[quant], backend="ort") as engine:
        assert list(tmp_path.iterdir()) == [], "the files are gone as soon as the engine is open"
        np.testing.assert_array_equal(engine.session().feed([1, 2, 3]), expected)


def test_old_version_without_room_for_its_files(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "SessionOptions", OldOptions)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(BackendError, match="TMPDIR"):
        goslet.open(tiny_engine, backend="ort")


@pytest.mark.parametrize("name", ["step.onnx", "model.onnx", "a..b"])
def test_no_tensor_takes_the_place_of_the_graph(
    name: str, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where weights go to files, whatever an engine may call a tensor is another file than the graph's."""
    onnx = pytest.importorskip("onnx", reason="the graph is edited with onnx")
    with goslet.open(tiny_engine, backend="ort") as engine:
        expected = engine.session().feed([1, 2, 3])
        model = onnx.ModelProto.FromString(bytes(engine.file.graph_bytes))
    renamed = next(value for value in model.graph.initializer if value.name == "ln_out.bias")
    renamed.name = renamed.external_data[0].value = name
    for node in model.graph.node:
        node.input[:] = [name if value == "ln_out.bias" else value for value in node.input]
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString(), renamed={"ln_out.bias": name})
    monkeypatch.setattr(onnxruntime, "SessionOptions", OldOptions)
    with goslet.open(path, backend="ort") as engine:
        np.testing.assert_array_equal(engine.session().feed([1, 2, 3]), expected)


def test_graph_that_onnx_runtime_refuses_is_not_printed_about(
    tiny_engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is edited with onnx")
    with goslet.open(tiny_engine, backend="ort") as engine:
        model = onnx.ModelProto.FromString(bytes(engine.file.graph_bytes))
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "MatMul"
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    capfd.readouterr()
    with pytest.raises(BackendError, match=r"x\.goslet: section graph: ONNX Runtime refuses"):
        goslet.open(path, backend="ort")
    assert capfd.readouterr() == ("", "")


def test_step_that_fails_is_not_printed_about_and_keeps_the_state(
    tiny_engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Logits that turn out twice as many as they are declared: ONNX Runtime must not write past their buffer."""
    onnx = pytest.importorskip("onnx", reason="the graph is edited with onnx")
    with goslet.open(tiny_engine, backend="ort") as engine:
        model = onnx.ModelProto.FromString(bytes(engine.file.graph_bytes))
    for node in model.graph.node:
        node.output[:] = ["once" if name == "logits" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Concat", ["once", "once"], ["logits"], axis=0))
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    capfd.readouterr()
    with goslet.open(path, backend="ort") as engine:
        session = engine.session()
        with pytest.raises(BackendError, match="token 0 of this feed"):
            session.feed([1])
        assert session.tokens_seen == 0
        assert not any(view.any() for view in session.state.front.values())
    assert capfd.readouterr() == ("", "")


def signature_edits() -> dict[str, Callable[[Any], None]]:
    """Edits of a graph after which its inputs or outputs are not float32 with a free first axis, by whose they are."""

    def wide_logits(model: Any) -> None:
        output = next(value for value in model.graph.output if value.name == "logits")
        output.type.tensor_type.elem_type = DOUBLE
        for node in model.graph.node:
            node.output[:] = ["narrow" if name == "logits" else name for name in node.output]
        node = model.graph.node.add(op_type="Cast", input=["narrow"], output=["logits"])
        node.attribute.add(name="to", type=2, i=DOUBLE)

    def wide_x(model: Any) -> None:
        next(value for value in model.graph.input if value.name == "x").type.tensor_type.elem_type = DOUBLE
        for node in model.graph.node:
            node.input[:] = ["narrow" if name == "x" else name for name in node.input]
        del model.graph.value_info[:]
        cast = type(model.graph.node[0])(op_type="Cast", input=["x"], output=["narrow"])
        cast.attribute.add(name="to", type=2, i=1)
        model.graph.node.insert(0, cast)

    def fixed_x(model: Any) -> None:
        axis = next(value for value in model.graph.input if value.name == "x").type.tensor_type.shape.dim[0]
        axis.dim_value = 1

    def shapeless_x(model: Any) -> None:
        next(value for value in model.graph.input if value.name == "x").type.tensor_type.ClearField("shape")

    return {"logits": wide_logits, "x": wide_x, "x ": fixed_x, " x": shapeless_x}


DOUBLE = 11


@pytest.mark.parametrize("name", signature_edits())
def test_inputs_and_outputs_of_another_type_or_batch(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is edited with onnx")
    with goslet.open(tiny_engine, backend="ort") as engine:
        model = onnx.ModelProto.FromString(bytes(engine.file.graph_bytes))
    signature_edits()[name](model)
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    with pytest.raises(BackendError, match=rf"x\.goslet: {name.strip()}: .*expected tensor\(float\) \['B', "):
        goslet.open(path, backend="ort")


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
    with goslet.open(tiny_engines["int4"], backend="ort") as engine:
        matrices = [name for name, entry in engine.file.tensors.items() if len(entry.shape) == 2]
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(matrices) - 1, "all but the embedding"
    assert not any(node.op_type == "DequantizeLinear" for node in nodes)
    assert not any(node.domain == "goslet" for node in nodes)


def test_onnxruntime_that_is_not_installed(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"goslet\[ort\]"):
        goslet.open(tiny_engine, backend="ort")


def test_nothing_is_written_to_the_home_folder(tiny_engine: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry keeps a device id and a log there unless told not to before it is imported."""
    program = "import sys, goslet; goslet.open(sys.argv[1], backend='ort').session().feed([1, 2])"
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "ORT_DISABLE_TELEMETRY")}
    environment["HOME"] = environment["XDG_CACHE_HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", program, tiny_engine], check=True, env=environment, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_activations_are_rounded_in_use_and_not_when_exact(tiny_engines: dict[str, Path]) -> None:
    """Speed comes from int8 activations; without them int8 runs at about one token a second on real models."""
    from goslet.backends.ort import OrtBackend
    from goslet.session import Engine

    with goslet.open(tiny_engines["int4"], backend="ort") as engine:
        in_use = engine.session().feed([1, 2, 3])
        exact = Engine(engine.file, OrtBackend(engine.file, exact=True), None).session().feed([1, 2, 3])
    error = np.abs(in_use - exact).max() / np.abs(exact).max()
    # int8 steps of 1/127 of a group's largest number give about 1e-3 to 1e-2 here; float32 would give 1e-6.
    assert 1e-4 < error < 5e-2
