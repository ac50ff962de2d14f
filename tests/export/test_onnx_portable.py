"""The portable ONNX form: every version and format against the engine's own step, and what the file may hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the engine's graph here")

import onnx  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from onnx import ModelProto, TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402
from torch import Tensor  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import GosletError, InputError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.compensate import Compensation  # noqa: E402
from goslet.export.models.blocks import EagerOps, token_pieces  # noqa: E402
from goslet.export.onnx_portable import check_portable, portable_form  # noqa: E402
from goslet.export.streamed import StreamedModel  # noqa: E402
from goslet.residuals import effective_weight  # noqa: E402
from goslet.spec import EMBEDDING  # noqa: E402

# float32 keeps 4e-7 of range here, in any runtime. That is a property of these numbers: other seeds have a head whose
# norm divides by what nearly cancels, and lose a digit more.
LIMIT = 1e-6
# What float64 is off by that has eps and the like from float32.
DOUBLE_LIMIT = 1e-7
# Two sessions at once.
TOKENS = np.array([[3, 40], [17, 60], [60, 60]])
# Widths that are no multiple of a group, ranks below one, and a prime one.
_SIZES = {"n_layer": 2, "n_embd": 48, "n_ffn": 72, "vocab_size": 61}
_HEADS = {**_SIZES, "head_size": 16}
_RANKS = {"rank_w": 12, "rank_a": 37, "rank_v": 5, "rank_g": 40}
MODELS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "4": partial(random_rwkv4, **_SIZES, seed=0),
    "5.0": partial(random_rwkv5, "5.0", **_HEADS, seed=4),
    "5.1": partial(random_rwkv5, "5.1", **_HEADS, seed=7),
    "5.2": partial(random_rwkv5, "5.2", **_HEADS, seed=7),
    "6": partial(random_rwkv6, **_HEADS, rank_mix=12, rank_decay=37, seed=5),
    "7": partial(random_rwkv7, **_HEADS, **_RANKS, seed=2),
    "7a": partial(random_rwkv7, **_HEADS, **_RANKS, rank_s=8, seed=1),
}
Arrays = dict[str, NDArray[Any]]
Step = Callable[[Arrays], Arrays]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(version: str) -> Path:
        path = folder / f"{version}.pth"
        if not path.exists():
            save(MODELS[version](), path)
        return path

    return checkpoint


def exported(checkpoint: Path, folder: Path, quant: str, **more: object) -> tuple[Path, ModelProto]:
    """An engine, and the portable model of it."""
    engine, path = folder / f"{quant}.goslet", folder / f"{quant}.onnx"
    export_engine(checkpoint, engine, quant=quant, onnx=path, onnx_form="portable", **more)  # type: ignore[arg-type]
    return engine, onnx.load(path)


def exact(engine: Path, checkpoint: Path) -> tuple[Arrays, Arrays]:
    """What sessions of an engine begin with, and what its step gives in float64: all logits, and the last state."""
    with EngineFile.open(engine) as file, open_checkpoint(checkpoint) as source:
        version, spec = source.version, file.spec
        own = {rule.name: torch.from_numpy(effective_weight(file, rule.name)).double() for rule in source.rules}
        state = {
            tensor.name: torch.full((2, *tensor.shape), tensor.init, dtype=torch.float64)
            for tensor in file.state_spec.tensors
        }
    begin = {f"state_in.{name}": value.float().numpy() for name, value in state.items()}
    logits = []
    for tokens in TOKENS:
        pieces = token_pieces(own[EMBEDDING][tokens], spec)
        found, state = version.step(spec, EagerOps(own), pieces, state)
        logits.append(found)
    return begin, {
        "logits": torch.stack(logits).numpy(),
        **{f"state_out.{name}": value.numpy() for name, value in state.items()},
    }


def run(step: Step, begin: Arrays) -> Arrays:
    """All logits [T, B, V] and the last state, when a model's own outputs are fed back."""
    state, logits = dict(begin), []
    for tokens in TOKENS:
        found = step({"token": tokens, **state})
        logits.append(found["logits"])
        state = {name: found[name.replace("state_in", "state_out")] for name in begin}
    return {**found, "logits": np.stack(logits)}


def ort(model: ModelProto) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def reference(model: ModelProto) -> Step:
    evaluator = ReferenceEvaluator(model)
    names = [value.name for value in model.graph.output]
    return lambda inputs: dict(zip(names, evaluator.run(names, inputs), strict=True))


def in_double(model: ModelProto) -> Step:
    """The same numbers and operators, computed in float64."""
    double = ModelProto()
    double.CopyFrom(model)
    for tensor in double.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for node in double.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.DOUBLE
    step = reference(double)
    return lambda inputs: step(
        {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in inputs.items()}
    )


def check(model: ModelProto, begin: Arrays, expected: Arrays) -> None:
    onnx.checker.check_model(model, full_check=True)
    for runtime, limit in ((in_double, DOUBLE_LIMIT), (ort, LIMIT), (reference, LIMIT)):
        found = run(runtime(model), begin)
        for name, values in expected.items():
            error = np.abs(found[name] - values).max() / (np.abs(values).max() or 1.0)
            assert error <= limit, (name, runtime)


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "int8", "int4", "int3"])
@pytest.mark.parametrize("version", MODELS)
def test_equals_the_engines_step(version: str, quant: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    engine, model = exported(checkpoints(version), tmp_path, quant)
    check(model, *exact(engine, checkpoints(version)))


def test_weights_of_a_matrix(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole groups as they are, smaller ones where they would be ragged, none where the rank is small or prime."""
    _, model = exported(checkpoints("7"), tmp_path, "int4")
    found = {
        tensor.name: (TensorProto.DataType.Name(tensor.data_type), list(tensor.dims))
        for tensor in model.graph.initializer
    }
    att, ffn = "blocks.1.att", "blocks.1.ffn"
    expected = {
        f"{att}.w2": ("INT8", [12, 48]), f"{att}.w2.scale": ("FLOAT", [1, 48]),  # one group
        f"{att}.g2": ("INT8", [5, 8, 48]), f"{att}.g2.scale": ("FLOAT", [5, 1, 48]),  # 40 numbers: 32 and 8
        f"{att}.a2": ("FLOAT", [37, 48]),
        f"{att}.key.weight": ("INT8", [3, 16, 48]), f"{att}.key.weight.scale": ("FLOAT", [3, 1, 48]),
        f"{ffn}.value.weight": ("INT8", [9, 8, 48]), f"{ffn}.value.weight.scale": ("FLOAT", [9, 1, 48]),
        "emb.weight": ("INT8", [61, 3, 16]), "emb.weight.scale": ("FLOAT", [61, 3, 1]),
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert f"{att}.a2.scale" not in found


def test_residuals_beside_quantized_matrices(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "x.pth"
    save(random_rwkv4(n_layer=1, n_embd=48, vocab_size=256), path)
    compensation = Compensation(rank=3, low_rank="svd", share=0.05, sparse="magnitude")
    engine, model = exported(path, tmp_path, "int4", compensation=compensation, calibrate=text, calibration_tokens=512)
    assert any(node.op_type == "Gather" and node.attribute[0].i == 1 for node in model.graph.node)
    check(model, *exact(engine, path))


@pytest.mark.parametrize("form", ["onnxruntime", "portable"])
def test_a_fixed_batch(form: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    export_engine(
        checkpoints("7"), tmp_path / "x.goslet", quant="int8", onnx=path, onnx_form=form, onnx_batch=len(TOKENS[0])
    )
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == len(TOKENS[0])
    found = run(ort(model), exact(tmp_path / "x.goslet", checkpoints("7"))[0])
    assert found["logits"].shape == (*TOKENS.shape, 61)


def test_what_the_file_says_of_itself_is_kept(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    paths = {form: tmp_path / f"{form}.onnx" for form in ("onnxruntime", "portable")}
    for form, path in paths.items():
        export_engine(checkpoints("4"), tmp_path / "x.goslet", onnx=path, onnx_form=form, overwrite=True)
    said = [{entry.key: entry.value for entry in onnx.load(path).metadata_props} for path in paths.values()]
    assert said[0] == said[1] and "goslet.state" in said[0]


def test_a_form_or_batch_that_does_not_exist_is_refused(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for wrong in ({"onnx_form": "onnx"}, {"onnx_batch": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            export_engine(checkpoints("4"), tmp_path / "x.goslet", onnx=tmp_path / "x.onnx", **wrong)
    assert os.listdir(tmp_path) == []


def _add_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.BFLOAT16


def _add_operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "Expand"


def _add_domain(model: ModelProto) -> None:
    model.graph.node[0].domain = "goslet"


def _add_opset(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("goslet", 1))


def _add_function(model: ModelProto) -> None:
    model.functions.add(name="Wkv7", domain="goslet")


def _add_value_info(model: ModelProto) -> None:
    model.graph.value_info.add(name="x")


@pytest.mark.parametrize("change", [_add_type, _add_operator, _add_domain, _add_opset, _add_function, _add_value_info])
def test_what_does_not_belong_in_a_portable_file_is_found(
    change: Callable[[ModelProto], None], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    _, model = exported(checkpoints("4"), tmp_path, "f32")
    check_portable(model)
    change(model)
    with pytest.raises(GosletError, match="the portable form has no such"):
        check_portable(model)


def test_an_operator_that_it_has_no_words_for_is_named(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    export_engine(checkpoints("4"), tmp_path / "x.goslet", quant="f32", onnx=tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Softsign"
    with pytest.raises(GosletError, match="no words for the operator :Softsign"):
        portable_form(StreamedModel(model, {}))
