"""ONNX files by themselves: valid as written, fast without an option, and right from the first token."""

from __future__ import annotations

import base64
import errno
import itertools
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the files here")

import onnx  # noqa: E402
import onnx.parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet import output  # noqa: E402
from goslet.chat import BUILT_IN  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import OutputError  # noqa: E402
from goslet.export import export_engine, streamed  # noqa: E402
from goslet.export.onnxfile import metadata, self_contained, write_onnx  # noqa: E402
from goslet.export.streamed import StreamedModel, check_written, write_beside, write_streamed  # noqa: E402
from goslet.export.valid_onnx import check_graph  # noqa: E402
from goslet.spec import StateSpec, StateTensor  # noqa: E402

from .test_compensate import with_random_residuals  # noqa: E402

# Groups of 32 are whole along the widths and short along 7a's ranks.
_SHAPE = {"n_layer": 2, "n_embd": 64, "vocab_size": 256}
_RANKS = {"rank_w": 8, "rank_a": 12, "rank_v": 16, "rank_g": 24}
MODELS = {
    "4": partial(random_rwkv4, **_SHAPE),
    "5.2": partial(random_rwkv5, "5.2", head_size=16, **_SHAPE),
    "6": partial(random_rwkv6, head_size=16, **_SHAPE),
    "7": partial(random_rwkv7, head_size=16, **_RANKS, **_SHAPE),
    "7a": partial(random_rwkv7, head_size=16, rank_s=8, **_RANKS, **_SHAPE),
}
QUANTS = ("f32", "f16", "bf16", "int8", "int4", "int3")


class _Files:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, version: str, quant: str) -> Path:
        """The ONNX file; the engine lies beside it."""
        path = self._folder / f"{version}-{quant}.onnx"
        if not path.exists():
            checkpoint = self._folder / f"{version}.pth"
            if not checkpoint.exists():
                save(MODELS[version](seed=4), checkpoint)
            export_engine(checkpoint, path.with_suffix(".goslet"), quant=quant, onnx=path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> _Files:
    """ONNX files by version and quantization."""
    return _Files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(("version", "quant"), [*itertools.product(MODELS, QUANTS)])
def test_passes_the_full_check_as_written(version: str, quant: str, files: _Files) -> None:
    onnx.checker.check_model(files(version, quant), full_check=True)


def test_a_description_that_disagrees_does_not_pass_our_check(files: _Files) -> None:
    """As every quantized file had one: its matrices were described as what they were before they were quantized."""
    with EngineFile.open(files("7", "int8").with_suffix(".goslet")) as engine:
        model = onnx.ModelProto.FromString(bytes(engine.graph_bytes))
    check_graph(model)
    matrix = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8)
    described = onnx.helper.make_tensor_value_info(matrix.name, onnx.TensorProto.FLOAT, list(matrix.dims))
    model.graph.value_info.append(described)
    with pytest.raises(onnx.shape_inference.InferenceError, match=matrix.name):
        check_graph(model)


@pytest.mark.parametrize(("version", "quant"), [*itertools.product(MODELS, ("int8", "int4", "int3"))])
def test_products_are_fused_without_an_option(version: str, quant: str, files: _Files, tmp_path: Path) -> None:
    """A weight that is dequantized at every step would still be right, and slower than float."""
    path = files(version, quant)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with EngineFile.open(path.with_suffix(".goslet")) as engine:
        matrices = [name for name, entry in engine.tensors.items() if len(entry.shape) == 2]
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(matrices) - 1, "all but the embedding"
    assert not any(node.op_type == "Gemm" for node in nodes)


def test_products_with_residuals_are_fused_too(files: _Files, tmp_path: Path) -> None:
    with_random_residuals(files("7", "int4").with_suffix(".goslet"), tmp_path / "x.goslet")
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        write_onnx(engine, tmp_path / "x.onnx")
        integers = [name for name, entry in engine.tensors.items() if entry.format.group is not None]
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "x.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(integers) - 1, "all but the embedding"


def begin(metadata: Mapping[str, str], batch: int) -> dict[str, NDArray[np.float32]]:
    """The first states, as `goslet.export.onnxfile` tells users to make them."""
    state = {}
    for name, (shape, value) in json.loads(metadata["goslet.state"]).items():
        tuned = metadata.get(f"goslet.state.{name}")
        one = np.full(shape, value, "<f4") if tuned is None else np.frombuffer(base64.b64decode(tuned), "<f4")
        state[f"state_in.{name}"] = np.repeat(one.reshape(1, *shape), batch, 0)
    return state


@pytest.mark.parametrize(
    ("version", "tuned"), [*((version, False) for version in MODELS), ("5.2", True), ("6", True), ("7", True)]
)
def test_a_run_from_the_onnx_file_alone_equals_the_engine(version: str, tuned: bool, tmp_path: Path) -> None:
    """In ONNX Runtime and in onnx's own evaluator, from the first token on, one text alone and three at once.

    Both multiply in float32, in orders of their own: see LIMIT in test_graph.py. Without their tuned states these
    models are off by 0.4 to 0.8 of the range. RWKV-4's -1e30 matters only beside keys far below zero: states are
    compared too.
    """
    save(MODELS[version](seed=4), tmp_path / "x.pth")
    state = None
    if tuned:
        state = tmp_path / "state.pth"
        generator = torch.Generator().manual_seed(1)
        torch.save(
            {f"blocks.{layer}.att.time_state": torch.randn(4, 16, 16, generator=generator) for layer in range(2)}, state
        )
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32", state=state, onnx=tmp_path / "x.onnx")
    texts = np.array([[3, 250, 7, 7], [0, 1, 2, 3], [99, 98, 97, 96]])
    with goslet.open(tmp_path / "x.goslet", backend="ort") as engine:
        expected = np.stack([engine.session().feed(text, all_logits=True) for text in texts])
        model_id, fresh = engine.file.model_id, engine.session().state.front
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "x.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["goslet.rwkv_version"] == version and metadata["goslet.model_id"] == model_id
    assert metadata["goslet.version"] == goslet.__version__ and metadata["goslet.tokenizer"] == "bytes"
    assert json.loads(metadata["goslet.chat"]) == BUILT_IN["world"].to_json()
    for run in (session.run, evaluator.run):
        for rows in (texts[:1], texts):
            found = []
            state_in = begin(metadata, len(rows))
            for name, array in state_in.items():
                np.testing.assert_array_equal(array, np.stack([fresh[name.removeprefix("state_in.")]] * len(rows)))
            for tokens in rows.T:
                logits, *after = run(None, {"token": tokens, **state_in})
                state_in = dict(zip(state_in, after, strict=True))
                found.append(logits)
            error = np.abs(np.stack(found, 1) - expected[: len(rows)]).max()
            assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("place", [None, *range(12)])
def test_a_state_that_begins_with_several_numbers_is_given_whole(place: int | None, files: _Files) -> None:
    """Wherever the one is that differs."""
    with EngineFile.open(files("7", "f32").with_suffix(".goslet")) as engine:
        first = StateTensor("s", (3, 2, 2), "head,value,key")
        own = np.full(first.shape, -2.5, np.float32)
        if place is not None:
            own.flat[place] = 7
        said = metadata(
            SimpleNamespace(
                **{
                    name: getattr(engine, name) for name in ("spec", "model_id", "provenance", "tokenizer_kind", "chat")
                },
                state_spec=StateSpec((first,)),
                initial_state={"s": own},
            )
        )
    assert ("goslet.state.s" in said) == (place is not None)
    np.testing.assert_array_equal(begin(said, 2)["state_in.s"], np.stack([own, own]))


@pytest.mark.parametrize("quant", QUANTS)
def test_a_model_beyond_the_end_of_one_file(
    quant: str, files: _Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit lowered: two files, which hold the very model that one does."""
    one = files("7", quant)
    monkeypatch.setattr(streamed, "MAX_FILE_BYTES", 10_000)
    with EngineFile.open(one.with_suffix(".goslet")) as engine:
        written = write_onnx(engine, tmp_path / "x.onnx")
    assert written == (tmp_path / "x.onnx", tmp_path / "x.onnx.data")
    assert sorted(os.listdir(tmp_path)) == ["x.onnx", "x.onnx.data"]
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    inside, beside = onnx.load(one), onnx.load(tmp_path / "x.onnx")
    for tensor in beside.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    for tensor in inside.graph.initializer:
        tensor.ClearField("data_location")
    assert inside == beside
    inputs = {"token": np.array([3])}
    results = []
    for path in (one, tmp_path / "x.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        state = begin(session.get_modelmeta().custom_metadata_map, 1)
        results.append(session.run(["logits"], {**inputs, **state})[0])
    np.testing.assert_array_equal(*results)


def test_a_second_file_that_is_there_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr("goslet.export.exporter.MAX_FILE_BYTES", 10_000)
    data = tmp_path / "x.onnx.data"
    data.write_text("precious")
    stages: list[str] = []

    def export(**more: bool) -> None:
        export_engine(
            tiny_checkpoint,
            tmp_path / "x.goslet",
            onnx=tmp_path / "x.onnx",
            progress=lambda stage, done, total: stages.append(stage),
            **more,
        )

    with pytest.raises(OutputError, match=r"x\.onnx\.data: exists already"):
        export()
    assert not stages and data.read_text() == "precious" and os.listdir(tmp_path) == ["x.onnx.data"]
    export(overwrite=True)
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    with pytest.raises(OutputError, match="is also the checkpoint"):
        export_engine(data, tmp_path / "y.goslet", onnx=tmp_path / "x.onnx", overwrite=True)


def small_model(number: float) -> StreamedModel:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) <float[1] w> { y = Add(x, w) }'
    )
    model.graph.initializer.add(name="w", dims=[1], data_type=onnx.TensorProto.FLOAT)
    return StreamedModel(model, {"w": lambda: np.array([number], "<f4").tobytes()})


# What fails at which of its calls. The weights get their name first, and before that nothing has one.
GONE = OSError(errno.EIO, "the disk is gone")
FAILURES: dict[str, tuple[str, int, BaseException]] = {
    "a weight": ("", 0, GONE),
    "a short weight": ("", 0, GONE),
    "the weights' sync": ("os.fsync", 1, GONE),
    "the weights' name": ("goslet.output._rename", 1, GONE),
    "the model's name": ("goslet.output._rename", 2, GONE),
    "Ctrl-C between the names": ("goslet.output._rename", 2, KeyboardInterrupt()),
}


@pytest.mark.parametrize("there", ["nothing", "both", "the model", "the weights"])
@pytest.mark.parametrize("failure", FAILURES)
def test_of_a_model_and_its_weights_both_are_there_or_neither(
    failure: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model beside the weights of another is the worst of all: it loads, and computes something else."""
    path, data = tmp_path / "x.onnx", tmp_path / "x.onnx.data"
    overwrite = there != "nothing"
    before = {"nothing": [], "both": [path, data], "the model": [path], "the weights": [data]}[there]
    for old in before:
        old.write_text("old")
    lazy = small_model(2)
    if failure == "a weight":
        lazy.weights["w"] = lambda: 1 // 0
    elif failure == "a short weight":
        lazy.weights["w"] = lambda: b"xy"
    else:
        place, which, error = FAILURES[failure]
        original, calls = (output._rename, os.fsync)[place == "os.fsync"], itertools.count(1)

        def failing(*given: Any) -> Any:
            if next(calls) == which:
                raise error
            return original(*given)

        monkeypatch.setattr(place, failing)
    with pytest.raises((OutputError, ZeroDivisionError, KeyboardInterrupt)):
        write_beside(lazy, path, overwrite)
    # What was there is there still, or none of it where its replacing had begun.
    left = sorted(tmp_path.iterdir())
    assert left in ([], before)
    assert all(old.read_text() == "old" for old in left)
    if "name" not in failure:
        assert left == before
    monkeypatch.undo()
    write_beside(small_model(3), path, True)
    assert sorted(tmp_path.iterdir()) == [path, data]
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": np.ones(1, "f4")})
    assert found[0] == 4


def test_weights_are_made_one_by_one_and_written_as_protobuf_would(files: _Files, tmp_path: Path) -> None:
    """The same model to protobuf, and never two weights in memory."""
    with EngineFile.open(files("6", "int8").with_suffix(".goslet")) as engine:
        source = self_contained(engine)
        alive: list[str] = []

        class Watched(bytes):
            def __del__(self) -> None:
                alive.pop()

        def watched(name: str) -> bytes:
            assert not alive, "the weight before is still there"
            alive.append(name)
            return Watched(source.weights[name]())

        lazy = StreamedModel(source.model, {name: partial(watched, name) for name in source.weights})
        write_streamed(lazy, tmp_path / "x.onnx", False)
        assert onnx.load(tmp_path / "x.onnx") == source.whole()


def test_our_check_sees_what_is_in_the_written_file(files: _Files, tmp_path: Path) -> None:
    model = onnx.load(files("7", "f32"))
    check_written(str(files("7", "f32")))
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.raw_data = head.raw_data[:-4]
    onnx.save(model, tmp_path / "short.onnx")
    with pytest.raises(OutputError, match=r"head\.weight.*not written whole"):
        check_written(str(tmp_path / "short.onnx"))
    head.raw_data += bytes(4)
    head.dims[1] -= 1
    head.raw_data = head.raw_data[: 4 * head.dims[0] * head.dims[1]]
    onnx.save(model, tmp_path / "narrow.onnx")
    with pytest.raises(onnx.shape_inference.InferenceError):
        check_written(str(tmp_path / "narrow.onnx"))
