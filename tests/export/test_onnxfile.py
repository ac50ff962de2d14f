"""ONNX files by themselves: valid as written, fast without an option, and right from the first token."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the files here")

import onnx  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.graph import check_graph  # noqa: E402

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
