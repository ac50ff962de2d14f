"""TensorRT plans: the lowered graph against the engine, real builds with TensorRT for RTX, and what is refused."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from programs import build_csrc

torch = pytest.importorskip("torch", reason="exporting needs torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet import cli, planfile, trt_plugin  # noqa: E402
from goslet.backends.ort import OrtBackend  # noqa: E402
from goslet.commands import plan as plan_command  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    BackendError,
    BackendUnavailableError,
    ContainerError,
    DependencyError,
    InputError,
    OutputError,
)
from goslet.export import export_engine, plan, streamed, trt_builder  # noqa: E402
from goslet.export.models import matrix_state, rwkv4, rwkv7  # noqa: E402
from goslet.export.trt_graph import lower, plugin_nodes  # noqa: E402
from goslet.machine import Gpu  # noqa: E402
from goslet.session import Engine  # noqa: E402
from goslet.weights import decode  # noqa: E402

from .test_compensate import with_random_residuals  # noqa: E402

SHAPE = {"n_layer": 3, "n_embd": 128, "head_size": 64, "vocab_size": 256, "seed": 3}
MODELS = {
    "4": random_rwkv4(n_layer=3, n_embd=128, vocab_size=256, seed=3),
    "5.2": random_rwkv5("5.2", **SHAPE),
    "6": random_rwkv6(**SHAPE, rank_mix=32, rank_decay=32),
    "7": random_rwkv7(**SHAPE, rank_w=32, rank_a=32, rank_v=32, rank_g=64),
}
TOKENS = [5, 99, 200, 7, 131, 64]
# f16 products round inputs, weights' scales and outputs by 2^-11 each; over three layers of two branches, with errors
# that add like independent ones, some 2^-11 · sqrt(3 · 6) = 2e-3 of range; bf16 eight times that.
LIMITS = {"f16": 6e-3, "bf16": 5e-2}

HAS_RTX = importlib.util.find_spec("tensorrt_rtx_bindings") is not None
needs_rtx = pytest.mark.skipif(
    not HAS_RTX, reason="TensorRT for RTX is not installed (tools/requirements-test.txt), which builds without a GPU"
)


# int3 is int4 to a plan, whatever the version.
FORMATS = [*itertools.product(MODELS, ("f16", "int8", "int4")), ("7", "int3"), ("6", "int4-residuals")]


class _Engines:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, version: str, quant: str) -> Path:
        path = self._folder / f"{version}-{quant}.goslet"
        if quant.endswith("-residuals") and not path.exists():
            with_random_residuals(self(version, quant.removesuffix("-residuals")), path)
        elif not path.exists():
            save(MODELS[version], self._folder / f"{version}.pth")
            export_engine(self._folder / f"{version}.pth", path, quant=quant)
        return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> _Engines:
    """Engines by version and quantization."""
    return _Engines(tmp_path_factory.mktemp("engines"))


def run_lowered(model: onnx.ModelProto, path: Path, operators: list[type[OpRun]] | None = None) -> NDArray[np.float32]:
    """The logits [T, V] after each token, by ONNX Runtime, or by onnx's own evaluator with operators of ours."""
    if operators is None:
        options = onnxruntime.SessionOptions()
        # Its fused products would round activations to 8 bits, which TensorRT's do not.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        run = session.run
    else:
        evaluator = ReferenceEvaluator(model, new_ops=operators)
        names = list(evaluator.output_names)
        run = evaluator.run
    rows = []
    with EngineFile.open(path) as file:
        state = {
            f"state_in.{tensor.name}": np.full((1, *tensor.shape), tensor.init, np.float32)
            for tensor in file.state_spec.tensors
        }
        embedding = decode(file.weight("emb.weight"))
    for token in TOKENS:
        found = dict(zip(names, run(None, {"x": embedding[token : token + 1], **state}), strict=True))
        rows.append(found["logits"][0])
        state = {name: found[name.replace("state_in.", "state_out.")] for name in state}
    return np.array(rows)


def expected_logits(path: Path) -> NDArray[np.float32]:
    with EngineFile.open(path) as file:
        engine = Engine(file, OrtBackend(file, 1, exact=True), None)
        return engine.session().feed(TOKENS, all_logits=True)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
@pytest.mark.parametrize(("version", "quant"), FORMATS)
def test_the_lowered_graph_computes_what_the_engine_does(
    version: str, quant: str, precision: str, engines: _Engines
) -> None:
    """The very graph that TensorRT gets, with the functions' bodies in it, against the engine's own in float32."""
    path = engines(version, quant)
    with EngineFile.open(path) as file:
        model = lower(file, precision=precision, plugins=False).whole()
    assert not model.functions and all(not node.domain for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)
    try:
        found = run_lowered(model, path)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        assert precision == "bf16"
        pytest.skip(f"ONNX Runtime has no bf16 product on the CPU: {str(error)[:80]}")
    expected = expected_logits(path)
    assert np.abs(found - expected).max() <= LIMITS[precision] * np.abs(expected).max()


def _operator(name: str, domain: str, compute: Any) -> type[OpRun]:
    def run(self: OpRun, *inputs: NDArray[Any], **attributes: Any) -> tuple[NDArray[Any], ...]:
        return compute(inputs, attributes)

    return type(name, (OpRun,), {"op_domain": domain, "_run": run})


def _torch_operator(name: str, reference: Any) -> type[OpRun]:
    def compute(inputs: tuple[NDArray[Any], ...], attributes: dict[str, Any]) -> tuple[NDArray[Any], ...]:
        assert attributes["plugin_version"] == "1" and attributes["plugin_namespace"] == ""
        return tuple(part.numpy() for part in reference(*(torch.from_numpy(part.copy()) for part in inputs)))

    return _operator(name, "goslet", compute)


@pytest.mark.parametrize(("version", "quant"), [case for case in FORMATS if case[1] != "f16"])
def test_the_graph_of_plugins_computes_the_same(version: str, quant: str, engines: _Engines, csrc_build: Path) -> None:
    """With our product kernel, as the host's model of CUDA runs it, for each GosletProduct: packed as it reads."""
    build_csrc(csrc_build, "goslet_cuda_host")
    library = ctypes.CDLL(str(csrc_build / "libgoslet_cuda_host.so"))

    def aligned(values: NDArray[Any]) -> NDArray[Any]:
        room = np.empty(values.nbytes + 16, np.uint8)
        start = -room.ctypes.data % 16
        placed = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        placed[...] = values
        return placed

    def product(inputs: tuple[NDArray[Any], ...], attributes: dict[str, Any]) -> tuple[NDArray[Any], ...]:
        x, weights, scales = (aligned(part) for part in inputs)
        assert (x.dtype, weights.dtype, scales.dtype) == (np.float16, np.int32, np.float16)
        y = aligned(np.full((len(x), len(weights)), np.nan, np.float16))
        code = library.goslet_cuda_product(
            1, attributes["bits"], *(ctypes.c_int64(size) for size in (attributes["group"], *x.shape, len(weights))),
            *(ctypes.c_void_p(part.ctypes.data) for part in (x, weights, scales, y)), None,
        )  # fmt: skip
        assert code == 0
        return (y,)

    path = engines(version, quant)
    with EngineFile.open(path) as file:
        model = lower(file, weights="plugin").whole()
        n_matrices = sum(entry.format.group is not None for name, entry in file.tensors.items() if name != "emb.weight")
    assert len(plugin_nodes(model)) == 3 + n_matrices
    operators = [
        _operator("GosletProduct", "", product),
        _torch_operator("Wkv4", rwkv4.wkv4),
        _torch_operator("Wkv5", matrix_state.wkv),
        _torch_operator("Wkv6", matrix_state.wkv),
        _torch_operator("Wkv7", rwkv7.wkv7),
    ]
    expected = expected_logits(path)
    assert np.abs(run_lowered(model, path, operators) - expected).max() <= LIMITS["f16"] * np.abs(expected).max()


def test_the_state_and_the_recurrence_stay_float32(engines: _Engines) -> None:
    with EngineFile.open(engines("7", "int4")) as file:
        model = lower(file, batch=3).whole()
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_value == 3
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16:
            assert all(user.op_type in ("MatMul",) for user in model.graph.node if node.output[0] in user.input)
        if node.op_type == "Wkv7":
            assert all(makers[name].op_type != "Cast" or makers[name].attribute[0].i == 1 for name in node.input[:-1])


# ---------------------------------------------------------------------------------------------------------- real builds


@pytest.fixture(scope="module")
def plugin(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin library, built where nvcc and TensorRT's headers are."""
    path = tmp_path_factory.mktemp("plugin") / "libgoslet_trt.so"
    made = subprocess.run([repository / "tools/build_cuda", "--plugin", path, "89"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the plugin library cannot be built here: {made.stderr.strip().splitlines()[-1]}")
    return path


@needs_rtx
@pytest.mark.parametrize(("version", "quant"), FORMATS)
def test_a_plan_of_plain_layers_builds(version: str, quant: str, engines: _Engines, tmp_path: Path) -> None:
    phases = set()
    report = plan.build_plan(
        engines(version, quant), target="rtx", plain=True, output=tmp_path / "x.plan",
        progress=lambda phase, done, total: phases.add(phase),
    )  # fmt: skip
    assert report.plugin_layers == 0 and report.warnings == () and phases
    assert report.tensorrt_version.startswith("1.7")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan"]


@needs_rtx
@pytest.mark.parametrize("quant", ["f16", "int8", "int4"])
@pytest.mark.parametrize("version", MODELS)
def test_a_plan_with_our_plugins_builds(
    version: str, quant: str, engines: _Engines, plugin: Path, tmp_path: Path
) -> None:
    report = plan.build_plan(engines(version, quant), target="rtx", plugin=plugin, output=tmp_path / "x.plan")
    with EngineFile.open(engines(version, quant)) as file:
        n_products = sum(entry.format.group is not None for name, entry in file.tensors.items() if name != "emb.weight")
        key = planfile.PlanKey(
            file.model_id, file.weights_sha256, "rtx", "tensorrt_rtx", report.tensorrt_version, "", "", 1,
            "f16", "plugin", 1,
        )  # fmt: skip
    assert report.plugin_layers == 3 + n_products and report.warnings == ()
    with planfile.PlanFile(tmp_path / "x.plan") as file:
        content = bytes(file.plan)
        assert file.key == key
        names = {"4": ("aa", "bb", "pp")}.get(version[0], ("wkv",))
        assert file.in_place == {f"{layer}.{name}" for layer in range(3) for name in names}
    assert len(content) == report.size_bytes
    assert f"Wkv{version[0]}".encode() in content
    assert (b"GosletProduct" in content) == (quant != "f16")


@needs_rtx
def test_weights_of_four_bits_stay_so_in_a_plan(plugin: Path, tmp_path: Path) -> None:
    """Of a model that is nearly all products, int4 takes half of int8's bytes and a quarter of f16's."""
    save(random_rwkv7(n_layer=2, n_embd=512, head_size=64, vocab_size=4096), tmp_path / "x.pth")
    sizes = {}
    for quant in ("f16", "int8", "int4"):
        export_engine(tmp_path / "x.pth", tmp_path / f"{quant}.goslet", quant=quant)
        report = plan.build_plan(tmp_path / f"{quant}.goslet", target="rtx", plugin=plugin)
        sizes[quant] = report.size_bytes
        with EngineFile.open(tmp_path / f"{quant}.goslet") as file:
            stored = sum(e.size_bytes + e.scales_size_bytes for name, e in file.tensors.items() if name != "emb.weight")
        # What is not weights is code for five kinds of GPU, some megabytes; padding of small LoRAs the rest.
        assert stored < report.size_bytes < 1.1 * stored + 6e6
    assert sizes["int4"] < sizes["int8"] < sizes["f16"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_the_command_writes_onnx_and_a_line_for_a_jetson(
    engines: _Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", str(engines("7", "int4")), "--target", "orin", "-o", "my model.onnx"]) == 0
    said = capsys.readouterr()
    assert said.out == (
        "/usr/src/tensorrt/bin/trtexec '--onnx=my model.onnx' '--saveEngine=my model.engine' --stronglyTyped "
        "--staticPlugins=./libgoslet_trt.so\n"
    )
    assert "my model.onnx and my model.onnx.data: " in said.err and "goslet plan ENGINE --target local" in said.err
    model = onnx.load("my model.onnx")  # with its weights, by the name that they have now
    assert not model.functions and len(plugin_nodes(model)) > 3
    assert sorted(os.listdir()) == ["my model.onnx", "my model.onnx.data"]
    assert cli.main(["plan", str(engines("7", "int4")), "--target", "orin", "-o", "my model.onnx"]) == 1
    assert "--force" in capsys.readouterr().err
    again = ["plan", str(engines("7", "int8")), "--target", "orin", "-o", "my model.onnx", "--force"]
    assert cli.main(again) == 0, capsys.readouterr().err
    products = [node for node in onnx.load("my model.onnx").graph.node if node.op_type == "GosletProduct"]
    assert {attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"} == {8}
    assert sorted(os.listdir()) == ["my model.onnx", "my model.onnx.data"]


def test_a_plan_replaces_neither_its_engine_nor_a_file_that_is_there(
    engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "rwkv7-0.1B"
    engine.write_bytes(engines("7", "int4").read_bytes())
    for target in ("orin", "local"):
        with pytest.raises(OutputError, match="is also the engine"):
            plan.build_plan(engine, target=target, plain=True, output=engine, overwrite=True)
    data = tmp_path / "rwkv7-0.1B.orin.onnx.data"  # after the whole name: 0.1B and 0.4B are two models
    data.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        plan.build_plan(engine, target="orin")
    assert data.read_text() == "precious"
    plan.build_plan(engine, target="orin", overwrite=True)
    assert data.stat().st_size > 1000

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"x\.onnx\.data: the file is larger than"):
            plan.build_plan(engine, target="orin", output=tmp_path / "x.onnx")
        monkeypatch.setattr(planfile, "PACKAGES", {"tensorrt_rtx": ("json",)})
        with pytest.raises(OutputError, match=r"x\.plan: the file is larger than"):
            plan.build_plan(engine, target="rtx", plain=True, output=tmp_path / "x.plan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == [engine.name, "rwkv7-0.1B.orin.onnx", data.name]


def test_a_model_and_its_weights_appear_together_or_not_at_all(
    engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before and after each step that another program could see."""
    model, data = tmp_path / "x.onnx", tmp_path / "x.onnx.data"

    def build(overwrite: bool) -> None:
        plan.build_plan(engines("7", "int4"), target="orin", output=model, overwrite=overwrite)

    for overwrite in (False, True):
        for name in ("replace" if overwrite else "link", "fsync", *(["unlink"] if overwrite else [])):
            for count in range(1, 6):
                for after in (False, True):
                    if overwrite:
                        model.write_text("old"), data.write_text("old")
                    real, left = getattr(os, name), [count]

                    def interrupted(*arguments: Any, real: Any = real, left: Any = left, after: bool = after) -> None:
                        left[0] -= 1
                        if left[0] == 0 and not after:
                            raise KeyboardInterrupt
                        real(*arguments)
                        if left[0] == 0:
                            raise KeyboardInterrupt

                    monkeypatch.setattr(os, name, interrupted)
                    ended = False
                    try:
                        build(overwrite)
                        ended = True
                    except KeyboardInterrupt:
                        pass
                    monkeypatch.undo()
                    names, place = sorted(os.listdir(tmp_path)), (overwrite, name, count, after)
                    if not ended and names == ["x.onnx", "x.onnx.data"]:
                        assert model.read_bytes() == data.read_bytes() == b"old", place
                    else:
                        assert names == (["x.onnx", "x.onnx.data"] if ended else []), place
                    for file in (model, data):
                        file.unlink(missing_ok=True)

    save_model = streamed.save_beside

    def save_while_another_writes(*arguments: Any) -> bytes:
        model.write_text("precious")
        return save_model(*arguments)

    monkeypatch.setattr(streamed, "save_beside", save_while_another_writes)
    with pytest.raises(OutputError, match="exists already"):
        plan.build_plan(engines("7", "int4"), target="orin", output=model)
    assert model.read_text() == "precious" and os.listdir(tmp_path) == ["x.onnx"]


def test_names_that_are_not_utf8(engines: _Engines, tmp_path: Path) -> None:
    """The model would have to name its weights' file."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    with pytest.raises(OutputError, match=r"no UTF-8.*-o"):
        plan.build_plan(engines("7", "int4"), target="orin", output=Path(os.fsdecode(b"\xff.onnx")))
    assert plan.build_plan(engines("7", "int4"), target="orin", output=folder / "x.onnx").size_bytes > 100_000


@needs_rtx
def test_tensorrt_meets_no_name_of_the_users(engines: _Engines, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff o'clock"))
    folder.mkdir()
    plan.build_plan(engines("7", "int4"), target="rtx", plain=True, output=folder / "x.plan")
    assert os.listdir(folder) == ["x.plan"]


def test_weights_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = random_rwkv7(n_layer=1, n_embd=64, head_size=32, vocab_size=256)
    tensors["blocks.0.ffn.key.weight"][0, 0] = 1e5
    save(tensors, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.key\.weight: .*float16.*found 100000.*bf16"):
        plan.build_plan(tmp_path / "x.goslet", target="orin")
    assert sorted(os.listdir(tmp_path)) == ["x.goslet", "x.pth"]
    assert plan.build_plan(tmp_path / "x.goslet", target="orin", precision="bf16").size_bytes > 100_000


class _Config:
    """The part of a builder's configuration that keeps times."""

    def create_timing_cache(self, known: bytes) -> bytes | None:
        return None if known == b"garbage" else known

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.times = cache
        return ignore_mismatch


def test_a_timing_cache_never_costs_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, times, config = tmp_path / "x.plan.timing", tmp_path / "timing", _Config()
    assert trt_builder._read_times(config, str(path)) and config.times == b""
    times.write_bytes(b"some")
    assert plan._keep_times(times, path) == ()
    assert trt_builder._read_times(config, str(path)) and config.times == b"some"
    assert capsys.readouterr().out == ""
    path.write_text("garbage")
    assert not trt_builder._read_times(config, str(path))
    assert "is no timing cache and is left alone" in json.loads(capsys.readouterr().out)["warning"]
    assert path.read_text() == "garbage"
    path.unlink()
    path.mkdir()
    assert not trt_builder._read_times(config, str(path))
    assert "cannot be read and is left alone" in json.loads(capsys.readouterr().out)["warning"]
    (warning,) = plan._keep_times(times, path)
    assert "the timing cache is not kept: " in warning and "is a folder" in warning
    assert sorted(os.listdir(tmp_path)) == ["timing", "x.plan.timing"]


@needs_rtx
def test_the_builder_looks_for_no_library_in_the_current_folder(
    engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "builder" / "trt_builder.py"
    script.parent.mkdir()
    script.write_text("import json, os; print(json.dumps({'error': os.environ['LD_LIBRARY_PATH']}))")
    monkeypatch.setattr(plan, "__file__", str(script.with_name("plan.py")))
    monkeypatch.setattr(planfile, "PACKAGES", {"tensorrt_rtx": ("tensorrt_rtx_bindings",)})
    for known in (None, "", ":/opt/somewhere:"):
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        if known is not None:
            monkeypatch.setenv("LD_LIBRARY_PATH", known)
        with pytest.raises(BackendError) as caught:
            plan.build_plan(engines("7", "int4"), target="rtx", plain=True, output=tmp_path / "x.plan")
        parts = str(caught.value).partition("TensorRT: ")[2].partition(";")[0].split(":")
        assert all(part.startswith("/") for part in parts), parts
        assert ("/opt/somewhere" in parts) == bool(known)


def test_arguments_that_cannot_be_used(engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engines("7", "int4")
    wrong: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "target": ({"target": "mars"}, InputError, "orin"),
        "precision": ({"target": "orin", "precision": "f8"}, InputError, "bf16"),
        "weights": ({"target": "orin", "weights": "both"}, InputError, "qdq"),
        "plain with our weights": ({"target": "orin", "weights": "plugin", "plain": True}, InputError, "plain"),
        "plain with a library": (
            {"target": "orin", "plain": True, "plugin": "x.so"},
            InputError,
            "--plain or --plugin",
        ),
        "a folder": ({"target": "orin", "output": f"{tmp_path}/x/"}, OutputError, "names a folder"),
        "no sessions": ({"target": "orin", "batch": 0}, InputError, "256"),
        "level": ({"target": "orin", "optimization_level": 6}, InputError, "0 to 5"),
        "a folder that is not there": ({"target": "orin", "output": tmp_path / "no/x.onnx"}, OutputError, "folder"),
    }
    for arguments, error, words in wrong.values():
        with pytest.raises(error, match=words):
            plan.build_plan(path, **arguments)
    monkeypatch.setattr(
        planfile, "PACKAGES", {"tensorrt": ("no_such_tensorrt",), "tensorrt_rtx": ("no_such_tensorrt",)}
    )
    monkeypatch.setattr(plan, "gpu", lambda: None)
    with pytest.raises(BackendUnavailableError, match=r"no CUDA device here.*--target rtx"):
        plan.build_plan(path, target="local")
    monkeypatch.setattr(plan, "gpu", lambda: Gpu("Orin", "8.7"))
    with pytest.raises(DependencyError, match="apt install python3-libnvinfer"):
        plan.build_plan(path, target="local")
    monkeypatch.setattr(planfile, "PACKAGES", {"tensorrt": ("json",), "tensorrt_rtx": ("json",)})
    with pytest.raises(BackendUnavailableError, match=r"plugin: .*no file .*none\.so.*tools/build_cuda --plugin"):
        plan.build_plan(path, target="rtx", plugin=tmp_path / "none.so", output=tmp_path / "x.plan")
    monkeypatch.setattr(trt_plugin, "plugin_version", lambda library: 7)
    with pytest.raises(BackendUnavailableError, match=r"another version \(expected 1, found 7\).*tools/build_cuda"):
        plan.build_plan(path, target="rtx", plugin=path, output=tmp_path / "x.plan")
    assert plan_command.TARGETS == plan.TARGETS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ('print(\'{"error": "out of memory"}\')', "TensorRT: out of memory"),
        ("import os; print('x'); os.abort()", "ended without a plan"),
        ("import sys; sys.exit('bad\\nluck')", "bad; luck"),
        ("", "ended without a plan"),
    ],
)
def test_a_builder_that_fails_is_one_line_and_no_file(
    program: str, words: str, engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is killed, which TensorRT's own can be for memory: it is a process of its own."""
    script = tmp_path / "builder" / "trt_builder.py"
    script.parent.mkdir()
    script.write_text(program)
    monkeypatch.setattr(plan, "__file__", str(script.with_name("plan.py")))
    monkeypatch.setattr(planfile, "PACKAGES", {"tensorrt": ("json",), "tensorrt_rtx": ("json",)})
    with pytest.raises(BackendError, match=words) as caught:
        plan.build_plan(engines("7", "int4"), target="rtx", plain=True, output=tmp_path / "x.plan")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["builder"]


@needs_rtx
def test_a_file_that_is_no_plugin_library(engines: _Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the graph is lowered; and where only TensorRT refuses it, TensorRT's reason is told."""
    (tmp_path / "lib.so").write_text("nothing")
    arguments: dict[str, Any] = {"target": "rtx", "plugin": tmp_path / "lib.so", "output": tmp_path / "x.plan"}
    with pytest.raises(BackendUnavailableError, match=r"lib\.so: cannot be loaded as a plugin library: .*too short"):
        plan.build_plan(engines("7", "int4"), **arguments)
    monkeypatch.setattr(trt_plugin, "plugin_version", lambda library: 1)
    with pytest.raises(BackendError, match=r"lib\.so: .*too short.*tools/build_cuda --plugin"):
        plan.build_plan(engines("7", "int4"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["lib.so"]


def test_the_line_for_a_jetson_names_a_library_by_its_path(engines: _Engines, tmp_path: Path) -> None:
    def line(**more: Any) -> str:
        return plan.build_plan(
            engines("7", "int4"), target="orin", output=tmp_path / "x.onnx", overwrite=True, **more
        ).command

    assert line(plugin="lib.so").endswith(" --staticPlugins=./lib.so")
    assert line(plugin="/opt/lib.so").endswith(" --staticPlugins=/opt/lib.so")
    assert line(plain=True, optimization_level=3).endswith(" --stronglyTyped --builderOptimizationLevel=3")
    for name, made in (("x.engine", "x.engine.engine"), ("m-0.1B", "m-0.1B.engine")):
        report = plan.build_plan(engines("7", "int4"), target="orin", output=tmp_path / name, plain=True)
        assert f"--onnx={name} --saveEngine={made} " in report.command


KEY = planfile.PlanKey("m", "w", "local", "tensorrt", "10.3.0", "Orin", "8.7", 1, "f16", "plugin", 1)


def test_plan_files_that_are_damaged(tmp_path: Path) -> None:
    """What a plan is of is checked where plans are run: tests/runtime/test_trt.py."""
    path = tmp_path / "x.plan"
    planfile.write_plan(path, KEY, ["0.wkv"], b"plan" * 1000, overwrite=False)
    with planfile.PlanFile(path) as file:
        assert (file.key, file.in_place, bytes(file.plan)) == (KEY, {"0.wkv"}, b"plan" * 1000)
    whole = path.read_bytes()
    for position in (3, 9, 20, 100, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ContainerError):
            planfile.PlanFile(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ContainerError):
        planfile.PlanFile(path)
    for changed in ({"batch": "1"}, {"batch": True}, {"device": None}, {"precision": "f8"}):
        with pytest.raises(ContainerError, match="key"):
            planfile.PlanKey.from_json({**vars(KEY), **changed})


def test_lowering_needs_no_torch(engines: _Engines, tmp_path: Path) -> None:
    """A device builds its plans without it."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from goslet.export.plan import build_plan\n"
        "print(build_plan(sys.argv[1], target='thor', output=sys.argv[2]).size_bytes)"
    )
    words = [str(engines("7", "int4")), str(tmp_path / "x.onnx")]
    ran = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) > 100_000
