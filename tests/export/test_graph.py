"""The step graph: its signature, its validity, and that onnx's own evaluator computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

import onnx  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.graph import OPSET  # noqa: E402
from goslet.export.models import rwkv7, version_named  # noqa: E402
from goslet.export.models.blocks import EagerOps  # noqa: E402
from goslet.export.valid_onnx import check_graph  # noqa: E402
from goslet.spec import EMBEDDING  # noqa: E402
from goslet.weights import decode  # noqa: E402

# Two float32 evaluations of the same formulas in different orders; so small a model sums at most 256 products.
LIMIT = 1e-5


@pytest.fixture(scope="module", params=["f32", "bf16", "int4"])
def engine(request: pytest.FixtureRequest, tiny_engines: dict[str, Path]) -> EngineFile:
    return EngineFile.open(tiny_engines[request.param])


def graph_of(engine: EngineFile) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(bytes(engine.graph_bytes))


def torch_step(engine: EngineFile, tokens: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and states of a batch of tokens, each from a random state of its own; the states are returned by name."""
    weights = {name: torch.from_numpy(decode(engine.weight(name))) for name in engine.tensors}
    version = version_named(engine.spec.version)
    generator = torch.Generator().manual_seed(5)
    before = {t.name: torch.randn(len(tokens), *t.shape, generator=generator) for t in engine.state_spec.tensors}
    logits, after = version.step(engine.spec, EagerOps(weights), (weights[EMBEDDING][tokens],), before)
    flat = {f"state_in.{name}": tensor.numpy() for name, tensor in before.items()}
    flat |= {f"state_out.{name}": tensor.numpy() for name, tensor in after.items()}
    return logits.numpy(), flat


def test_signature(engine: EngineFile) -> None:
    model = graph_of(engine)
    spec = engine.spec

    def described(values: list[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
        assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in values)
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    states = {tensor.name: ["B", *tensor.shape] for tensor in engine.state_spec.tensors}
    matrix = ["B", spec.n_head, spec.head_size, spec.head_size]
    assert states["0.wkv"] == matrix
    assert states["1.att_shift"] == states["1.ffn_shift"] == ["B", spec.n_embd]
    expected_inputs = {"x": ["B", spec.n_embd], **{f"state_in.{name}": shape for name, shape in states.items()}}
    expected_outputs = {"logits": ["B", spec.vocab_size], **{f"state_out.{n}": shape for n, shape in states.items()}}
    inputs, outputs = described(list(model.graph.input)), described(list(model.graph.output))
    assert list(inputs.items()) == list(expected_inputs.items())
    assert list(outputs.items()) == list(expected_outputs.items())


def test_is_valid_onnx_with_full_shape_inference(engine: EngineFile) -> None:
    model = graph_of(engine)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "goslet": 1}
    check_graph(model)


def test_a_broken_graph_does_not_pass_the_check(engine: EngineFile) -> None:
    model = graph_of(engine)
    head = next(initializer for initializer in model.graph.initializer if initializer.name == "head.weight")
    head.dims[0] += 32
    with pytest.raises(onnx.shape_inference.InferenceError):
        check_graph(model)


def test_holds_no_weights_and_names_every_one(engine: EngineFile) -> None:
    model = graph_of(engine)
    names = set()
    for initializer in model.graph.initializer:
        assert initializer.data_location == onnx.TensorProto.EXTERNAL
        assert not initializer.raw_data
        location = {entry.key: entry.value for entry in initializer.external_data}["location"]
        assert location == initializer.name
        names.add(initializer.name.removesuffix(".scale"))
    assert names == set(engine.tensors) - {EMBEDDING}


def test_is_born_quantized(tiny_engines: dict[str, Path]) -> None:
    # ONNX has no integers of 3 bits.
    types = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4, "int3": onnx.TensorProto.INT4}
    for quant, onnx_type in types.items():
        with EngineFile.open(tiny_engines[quant]) as engine:
            model = graph_of(engine)
            stored = {initializer.name: initializer for initializer in model.graph.initializer}
            dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
            products = {name: node for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
            for node in dequantized:
                attributes = {a.name: a.i for a in node.attribute}
                assert attributes == {"axis": 0, "block_size": 32}
                assert node.output[0] in products
            assert len(dequantized) == len({n for n, entry in engine.tensors.items() if len(entry.shape) == 2}) - 1
            name = "blocks.0.ffn.key.weight"
            assert engine.tensors[name].format.name == quant
            assert stored[name].data_type == onnx_type
            assert list(stored[name].dims) == [*reversed(engine.tensors[name].shape)]


def test_wkv_is_one_operator_a_layer_with_a_standard_body(engine: EngineFile) -> None:
    model = graph_of(engine)
    calls = [node for node in model.graph.node if node.domain == "goslet"]
    assert [node.op_type for node in calls] == ["Wkv7"] * engine.spec.n_layer
    (function,) = model.functions
    assert (function.domain, function.name) == ("goslet", "Wkv7")
    assert all(node.domain == "" for node in function.node)


def test_the_operators_body_equals_its_plain_form() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(3, 2, 8, generator=generator) for _ in range(6)]
    inputs.append(torch.randn(3, 2, 8, 8, generator=generator))
    function = rwkv7.WKV7.function()
    names = list(function.input)
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    results = ReferenceEvaluator(function).run(None, feeds, attributes={})
    for found, expected in zip(results, rwkv7.wkv7(*inputs), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=LIMIT * np.abs(expected.numpy()).max())


def test_wkv7_is_the_recurrence_of_the_paper() -> None:
    """The plain form against the formula S·(diag(w) - κ̂ᵀ(κ̂·a)) + vᵀk with matrices written out, in float64."""
    generator = torch.Generator().manual_seed(4)
    r, w, k, v, kappa, a = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(6))
    state = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    transition = torch.diag(w) - torch.outer(kappa, kappa * a)
    expected = state @ transition + torch.outer(v, k)
    y, new = rwkv7.wkv7(*(t[None, None] for t in (r, w, k, v, kappa, a)), state[None, None])
    torch.testing.assert_close(new[0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(y[0, 0], expected @ r, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quant", ["f32", "int4"])
def test_reference_evaluator_equals_torch(
    quant: str, tiny_engines: dict[str, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """onnx's ReferenceEvaluator on the self-contained model, with a batch of three different tokens and states."""
    path = tmp_path / "step.onnx"
    export_engine(tiny_checkpoint, tmp_path / "x.goslet", quant=quant, onnx=path)
    model = onnx.load(path)
    tokens = [3, 200, 77]
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        logits, flat = torch_step(engine, tokens)
    inputs = {name: value for name, value in flat.items() if name.startswith("state_in.")}
    names = [output.name for output in model.graph.output]
    results = dict(zip(names, ReferenceEvaluator(model).run(None, {"token": np.array(tokens), **inputs}), strict=True))
    for name, found in results.items():
        expected = logits if name == "logits" else flat[name]
        assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max(), name


def test_group_that_does_not_divide_the_width(tmp_path: Path) -> None:
    """Widths 40 and 72 leave short groups of 32; the checker and ONNX Runtime take them, and verify passes."""
    from goslet.export.verify import verify_engine

    save(
        random_rwkv7(n_layer=1, n_embd=40, head_size=8, vocab_size=50, n_ffn=72, rank_w=3, rank_a=5, rank_g=7, seed=9),
        tmp_path / "x.pth",
    )
    for quant in ("int8", "int4", "int3"):
        export_engine(tmp_path / "x.pth", tmp_path / f"{quant}.goslet", quant=quant)
        report = verify_engine(tmp_path / f"{quant}.goslet", tmp_path / "x.pth")
        assert report.passed, report
