"""Activations in two terms: for ONNX Runtime's products with 8-bit weights, and of no effect anywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="exporting needs onnx")
pytest.importorskip("torch", reason="exporting needs torch")

from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from random_checkpoint import random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.backends import Rounding  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.activations import JOIN, SPLIT, split, whole  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402
from goslet.weights import WeightFormat  # noqa: E402

# In groups of 64: a whole number of them, a part of one, and two and a part of a third.
WIDTHS = {"whole groups": 128, "part of a group": 20, "last group is a part": 140}


def product(n_in: int, n_out: int = 3, group: int = 64) -> onnx.ModelProto:
    """y [B, n_out] = x [B, n_in] with 8-bit weights, as the step graph has it."""
    rng = np.random.default_rng(1)
    weights = rng.integers(-127, 128, (n_in, n_out)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (-(-n_in // group), n_out)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w.scale"], ["w.float"], axis=0, block_size=group, name="d"),
        helper.make_node("MatMul", ["x", "w.float"], ["y"], name="m"),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", n_out])],
        [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(scales, "w.scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("goslet", 1)])


def terms_of(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What the product is given."""
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    (name,) = (node.input[0] for node in probe.graph.node if node.op_type == "MatMul")
    probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return np.asarray(ReferenceEvaluator(probe).run([name], {"x": x})[0])


@pytest.mark.parametrize("n_in", WIDTHS.values(), ids=WIDTHS)
def test_the_first_term_is_on_the_levels_of_its_group_and_the_second_is_the_rest(n_in: int) -> None:
    model = product(n_in)
    split(model)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(2).standard_normal((3, n_in)).astype(np.float32) * 10
    x[1] = 0
    both = terms_of(model, x).reshape(2, 3, n_in)
    np.testing.assert_allclose(both.sum(0), x, rtol=1e-6, atol=0)
    for start in range(0, n_in, 64):
        part, first, rest = x[:, start : start + 64], *both[:, :, start : start + 64]
        level = np.abs(part).max(1, keepdims=True) / 127
        counts = first / np.where(level == 0, 1, level)
        np.testing.assert_allclose(counts, np.round(counts), rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.abs(first).max(1, keepdims=True), 127 * level, rtol=1e-6)
        assert (np.abs(rest) <= level * 0.5001).all()


@pytest.mark.parametrize("n_in", WIDTHS.values(), ids=WIDTHS)
def test_the_product_is_the_same_and_whole_undoes_all_of_it(n_in: int) -> None:
    model = product(n_in)
    plain = model.SerializeToString(deterministic=True)
    split(model)
    assert {node.op_type for node in model.graph.node if node.domain} == {SPLIT, JOIN}
    x = np.random.default_rng(3).standard_normal((2, n_in)).astype(np.float32)
    expected = ReferenceEvaluator(onnx.ModelProto.FromString(plain)).run(None, {"x": x})[0]
    found = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    whole(model)
    assert model.SerializeToString(deterministic=True) == plain


@pytest.mark.parametrize("group", [32, 128])
def test_int8_in_onnx_runtime_errs_like_activations_of_16_bits(group: int, tmp_path: Path) -> None:
    """Ranks of 20 and 140 in groups of 32 or 128: parts of a group, and more than one."""
    shape = {"n_layer": 2, "n_embd": 192, "head_size": 32, "vocab_size": 64}
    save(random_rwkv7(**shape, rank_w=20, rank_a=140, rank_v=32, rank_g=128), tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="int8", group=group)
    with goslet.open(tmp_path / "x.goslet", backend="ort", threads=1) as engine:
        assert engine.backend.activation_rounding(WeightFormat("int8", group)) == Rounding(16, group)
    report = verify_engine(tmp_path / "x.goslet", tmp_path / "x.pth", backend="ort", threads=1)
    assert report.passed, report
    (logits,) = (check for check in report.checks if check.name == "ort logits")
    # One rounding to 8 bits errs some hundred times as much as this allows.
    assert logits.limit < 1e-3


@pytest.mark.parametrize("quant", ["int4", "f16"])
def test_engines_with_fewer_bits_or_none_are_left_alone(quant: str, tmp_path: Path) -> None:
    save(random_rwkv7(n_layer=2, n_embd=32, head_size=8, vocab_size=19), tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant=quant)
    with EngineFile.open(tmp_path / "x.goslet") as file:
        assert SPLIT.encode() not in bytes(file.graph_bytes)
    with goslet.open(tmp_path / "x.goslet", backend="ort", threads=1) as engine:
        expected = Rounding(8, 32) if quant == "int4" else None
        found = engine.backend.activation_rounding(WeightFormat(quant, 32 if quant == "int4" else None))
        assert found == expected
