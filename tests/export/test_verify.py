"""`verify` passes for sound engines and fails for the fault it is there to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile, TensorSource, write_engine  # noqa: E402
from goslet.errors import ChecksumError  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402
from goslet.weights import EncodedWeight  # noqa: E402


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "int8", "int4"])
def test_sound_engine_passes(quant: str, tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    report = verify_engine(tiny_engines[quant], tiny_checkpoint)
    assert report.passed, report
    assert {check.name for check in report.checks} == {"logits", "att_shift", "wkv", "ffn_shift"}
    if quant == "f32":
        assert all(check.limit == 3e-5 for check in report.checks)
        assert report.divergence["kl_bits_per_token"] < 1e-9
    else:
        assert report.divergence["kl_bits_per_token"] > 1e-9
    assert report.to_json()["passed"] is True


def test_quantization_costs_what_its_bits_suggest(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    cost = {
        quant: verify_engine(tiny_engines[quant], tiny_checkpoint).divergence["kl_bits_per_token"]
        for quant in ("f16", "int8", "int4")
    }
    assert cost["f16"] < cost["int8"] < cost["int4"]


def test_another_checkpoint_fails(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    save(random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=256), tmp_path / "other.pth")
    report = verify_engine(tiny_engines["f32"], tmp_path / "other.pth")
    assert not report.same_model
    assert not report.passed
    assert report.divergence == {}


def test_a_graph_that_is_not_the_step_fails(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """One sign flipped in the graph (an Add of the recurrence becomes a Sub) is found, within int4's limits too."""
    import onnx

    for quant in ("f32", "int4"):
        path = tmp_path / f"{quant}.goslet"
        with EngineFile.open(tiny_engines[quant]) as file:
            model = onnx.ModelProto.FromString(bytes(file.graph_bytes))
            node = next(node for node in model.functions[0].node if node.op_type == "Add")
            node.op_type = "Sub"
            weights: dict[str, EncodedWeight] = {name: file.weight(name) for name in file.tensors}
            write_engine(
                path,
                spec=file.spec,
                state_spec=file.state_spec,
                model_id=file.model_id,
                graph=model.SerializeToString(),
                graph_info={"format": "onnx", "opset": 21},
                tensors=[TensorSource(n, w.format, w.shape, lambda w=w: w) for n, w in weights.items()],
                tokenizer=("bytes", b""),
                program=None,
                provenance={},
                overwrite=False,
            )
            del weights
        report = verify_engine(path, tiny_checkpoint)
        assert report.same_model
        assert not report.passed
        assert any(check.name == "wkv" and not check.passed for check in report.checks)


def test_a_flipped_weight_bit_is_found_by_checksum(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = bytearray(tiny_engines["int8"].read_bytes())
    with EngineFile.open(tiny_engines["int8"]) as file:
        view = np.frombuffer(content, np.uint8)
        row = file.weight("head.weight").data.reshape(-1)[:64].tobytes()
        position = view.tobytes().index(row)
    content[position] ^= 0x10
    path = tmp_path / "x.goslet"
    path.write_bytes(content)
    EngineFile.open(path).close()
    with pytest.raises(ChecksumError, match="weights"):
        verify_engine(path, tiny_checkpoint)
