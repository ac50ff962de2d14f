"""`verify` passes for sound engines and fails for the fault it is there to find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

import onnx  # noqa: E402
from random_checkpoint import random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile, TensorSource, write_engine  # noqa: E402
from goslet.errors import ChecksumError  # noqa: E402
from goslet.export import export_engine, verify  # noqa: E402
from goslet.export.verify import SAMPLE, verify_engine, weight_limit  # noqa: E402
from goslet.weights import GROUPS, INTEGER_RANGES, WeightFormat, decode, encode  # noqa: E402


@pytest.mark.parametrize("backend", ["native", "ort"])
@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "int8", "int4", "int3"])
def test_sound_engine_passes(quant: str, backend: str, tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    report = verify_engine(tiny_engines[quant], tiny_checkpoint, backend=backend)
    assert report.passed, report
    parts = ("logits", "att_shift", "wkv", "ffn_shift")
    steps = {check.name: check for check in report.checks if not check.name.startswith("weights")}
    assert set(steps) == {f"{what} {part}" for what in ("graph", backend) for part in parts}
    assert all(check.limit == 3e-5 for name, check in steps.items() if name.startswith("graph"))
    assert {check.name for check in report.checks if check.name not in steps} >= {"weights f32"}
    if quant == "f32":
        assert all(check.limit == 3e-5 for check in steps.values())
        assert report.divergence["kl_bits_per_token"] < 1e-9
    else:
        assert report.divergence["kl_bits_per_token"] > 1e-9
    assert report.to_json()["passed"] is True


@pytest.mark.parametrize("backend", ["native", "ort"])
@pytest.mark.parametrize("quant", ["f32", "int8"])
def test_what_float32_explains_is_measured_where_the_limit_is_too_small(
    quant: str, backend: str, tiny_engines: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that amplifies: the limit is below the errors, and the roundings of a sound step explain them."""
    monkeypatch.setattr(verify, "FLOAT_LIMIT", 2e-7)
    report = verify_engine(tiny_engines[quant], tiny_checkpoint, backend=backend)
    assert report.passed, report
    assert all(check.limit < 3e-5 for check in report.checks if check.name.startswith("graph"))


@pytest.mark.parametrize("quant", ["f16", "int8", "int4"])
def test_weights_below_float16s_smallest_step_are_what_it_can_hold(quant: str, tmp_path: Path) -> None:
    tensors = random_rwkv7(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
    tensors["blocks.1.ffn.value.weight"] *= 1e-6
    save(tensors, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant=quant)
    report = verify_engine(tmp_path / "x.goslet", tmp_path / "x.pth")
    assert report.passed, report


def test_quantization_costs_what_its_bits_suggest(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    cost = {
        quant: verify_engine(tiny_engines[quant], tiny_checkpoint).divergence["kl_bits_per_token"]
        for quant in ("f16", "int8", "int4", "int3")
    }
    assert cost["f16"] < cost["int8"] < cost["int4"] < cost["int3"]


def test_limits_of_weights_tell_them_from_zero() -> None:
    """A weight of zeros errs by its whole norm."""
    for name, group in itertools.product(INTEGER_RANGES, GROUPS):
        assert weight_limit(WeightFormat(name, group)) < 0.9


def test_another_checkpoint_fails(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    save(random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=256), tmp_path / "other.pth")
    report = verify_engine(tiny_engines["f32"], tmp_path / "other.pth")
    assert [difference.split()[0] for difference in report.differences] == [
        *("n_layer", "n_embd", "n_ffn", "ranks"),
        *("state", "tensors", "model"),
    ]
    assert report.differences[0] == "n_layer (2 in the engine, 1 in the checkpoint)"
    assert not report.passed
    assert report.checks == ()


def test_another_eps_fails_unless_it_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_engine(tiny_checkpoint, tmp_path / "x.goslet", quant="f32", norm_eps=1e-5)
    with EngineFile.open(tmp_path / "x.goslet") as file:
        assert file.provenance["norm_eps"] == 1e-5
    report = verify_engine(tmp_path / "x.goslet", tiny_checkpoint)
    assert report.differences == (
        "norm_eps (1e-05 in the engine, 0.00064 in the checkpoint; exported with --norm-eps 1e-05)",
    )
    assert not report.passed
    assert report.checks == ()
    assert verify_engine(tmp_path / "x.goslet", tiny_checkpoint, norm_eps=1e-5).passed


def rewritten(
    source: Path,
    target: Path,
    *,
    change_graph: Callable[[onnx.ModelProto], None] | None = None,
    weights: Mapping[str, str] | None = None,
    change_weight: Callable[[str, np.ndarray], np.ndarray] | None = None,
    change_program: Callable[[bytes], bytes] = bytes,
) -> Path:
    """A well-formed engine with valid checksums and a fault: another graph or program, swapped names, other weights."""
    with EngineFile.open(source) as file:
        model = onnx.ModelProto.FromString(bytes(file.graph_bytes))
        if change_graph is not None:
            change_graph(model)
        tensors = []
        for name, entry in file.tensors.items():
            stored = file.weight((weights or {}).get(name, name))
            if change_weight is not None:
                stored = encode(change_weight(name, decode(stored)), entry.format, name)
            tensors.append(TensorSource(name, entry.format, entry.shape, lambda stored=stored: stored, entry.layout))
        write_engine(
            target,
            spec=file.spec,
            state_spec=file.state_spec,
            model_id=file.model_id,
            graph=model.SerializeToString(),
            graph_info={"format": "onnx", "opset": 21},
            tensors=tensors,
            tokenizer=("bytes", b""),
            program=change_program(bytes(file.program_bytes or b"")),
            provenance=file.provenance,
            overwrite=False,
        )
        del tensors, stored
    return target


def failed(path: Path, checkpoint: Path) -> set[str]:
    """What kinds of check an engine fails: weights, graph or native."""
    report = verify_engine(path, checkpoint)
    assert report.differences == ()
    assert report.passed == all(check.passed for check in report.checks)
    return {check.name.split()[0] for check in report.checks if not check.passed}


def flip_a_sign(model: onnx.ModelProto) -> None:
    next(node for node in model.functions[0].node if node.op_type == "Add").op_type = "Sub"


def change_head_norm_eps(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon" and attribute.f > 1e-4:
                attribute.f = 1e-5


def swap_mixes(model: onnx.ModelProto) -> None:
    swap = {"blocks.1.att.x_a": "blocks.1.att.x_g", "blocks.1.att.x_g": "blocks.1.att.x_a"}
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]


@pytest.mark.parametrize("quant", ["f32", "int4"])
@pytest.mark.parametrize("fault", [flip_a_sign, change_head_norm_eps, swap_mixes])
def test_a_graph_that_is_not_the_step_fails(
    quant: str, fault: Callable, tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Also where int4's rounding would hide it: the graph is judged in float32."""
    path = rewritten(tiny_engines[quant], tmp_path / "x.goslet", change_graph=fault)
    assert "graph" in failed(path, tiny_checkpoint)


@pytest.mark.parametrize("quant", ["f32", "int8"])
@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b'"activation":"tanh"', b'"activation":"sigmoid"'),
        (b'"eps":0.00064', b'"eps":0.00001'),
        (b'"blocks.1.att.x_a"', b'"blocks.1.att.x_k"'),
        (b'"bias":"blocks.1.att.v0"', b'"bias":null'),
    ],
)
def test_a_program_that_is_not_the_step_fails(
    quant: str, was: bytes, becomes: bytes, tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In formats whose rounding of activations is fine enough; int4's 8 bits hide a wrong eps in so small a model."""

    def change(program: bytes) -> bytes:
        assert was in program
        return program.replace(was, becomes)

    path = rewritten(tiny_engines[quant], tmp_path / "x.goslet", change_program=change)
    assert failed(path, tiny_checkpoint) == {"native"}


@pytest.fixture(scope="module")
def fed_back(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in int4 whose integers were chosen with error feedback."""
    folder = tmp_path_factory.mktemp("fed-back")
    (folder / "text").write_text(SAMPLE * 3)
    export_engine(tiny_checkpoint, folder / "x.goslet", quant="int4", calibrate=folder / "text")
    return folder / "x.goslet"


@pytest.mark.parametrize("quant", ["f32", "int4", "fed back"])
def test_weights_that_are_not_the_checkpoints_fail(
    quant: str, tiny_engines: dict[str, Path], fed_back: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Whatever they are, graph and backend compute with them what they say; only the weights themselves tell."""
    swap = {"blocks.0.att.key.weight": "blocks.0.att.receptance.weight"}
    swap |= {value: key for key, value in swap.items()}
    source = fed_back if quant == "fed back" else tiny_engines[quant]
    wrong = {"integers", "scales"} if quant == "fed back" else {"weights"}

    assert failed(rewritten(source, tmp_path / "swapped", weights=swap), tiny_checkpoint) == wrong

    def transposed(name: str, value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value.T) if name == "blocks.1.att.output.weight" else value

    def without_head(name: str, value: np.ndarray) -> np.ndarray:
        return value * 0 if name == "head.weight" else value

    for fault in (transposed, without_head):
        path = rewritten(source, tmp_path / fault.__name__, change_weight=fault)
        kinds = failed(path, tiny_checkpoint)
        assert kinds, fault
        assert kinds <= wrong, fault


def test_backend_that_errs_more_than_its_rounding_explains(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are off by half more than rounded activations explain; the graph's checks still pass."""
    sound = verify_engine(tiny_engines["int4"], tiny_checkpoint)
    (limit,) = (check.limit for check in sound.checks if check.name == "native logits")
    run = verify._run_session
    calls = []

    def off(session: goslet.Session, tokens: list[int]) -> dict[str, np.ndarray]:
        outputs = run(session, tokens)
        calls.append(session)
        if len(calls) == 1:
            outputs["logits"] = outputs["logits"] + 1.5 * limit * np.abs(outputs["logits"]).max()
        return outputs

    monkeypatch.setattr(verify, "_run_session", off)
    report = verify_engine(tiny_engines["int4"], tiny_checkpoint)
    assert [check.name for check in report.checks if not check.passed] == ["native logits"]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["att_shift", "wkv", "ffn_shift"])
def test_a_nan_in_any_state_fails(
    layer: int,
    part: str,
    tiny_engines: dict[str, Path],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = verify._run_session

    def broken(session: goslet.Session, tokens: list[int]) -> dict[str, np.ndarray]:
        outputs = run(session, tokens)
        outputs[f"{layer}.{part}"].flat[0] = np.nan
        return outputs

    monkeypatch.setattr(verify, "_run_session", broken)
    report = verify_engine(tiny_engines["f32"], tiny_checkpoint, n_tokens=2)
    assert {check.name for check in report.checks if not check.passed} == {f"graph {part}", f"native {part}"}


def test_a_flipped_weight_bit_is_found_by_checksum(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = bytearray(tiny_engines["int8"].read_bytes())
    with EngineFile.open(tiny_engines["int8"]) as file:
        position = content.index(file.packed("head.weight").data[:64].tobytes())
    content[position] ^= 0x10
    path = tmp_path / "x.goslet"
    path.write_bytes(content)
    EngineFile.open(path).close()
    with pytest.raises(ChecksumError, match="weights"):
        verify_engine(path, tiny_checkpoint)
