"""Adapters: merged weights against the trainers' own forward formulas, and engines against those of merged models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv4, random_rwkv6, random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    CheckpointError,
    ExtraTensorError,
    GosletError,
    InputError,
    MissingTensorError,
    TensorShapeError,
    TensorValueError,
)
from goslet.export import export_engine  # noqa: E402
from goslet.export.adapters import read_adapter  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402

Tensors = dict[str, torch.Tensor]
SHAPE = {"n_layer": 2, "n_embd": 48, "head_size": 16, "vocab_size": 256}
MODELS: dict[str, Tensors] = {
    "4": random_rwkv4(n_layer=2, n_embd=48, vocab_size=256),
    "6": random_rwkv6(**SHAPE, rank_mix=8, rank_decay=8, seed=3),
    "7": random_rwkv7(**SHAPE, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3),
}
SEVEN = MODELS["7"]
KEY = "blocks.1.ffn.key"  # [192, 48]
ALPHA = 12.0


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def merged_weight(tmp_path: Path, adapter: Tensors, alpha: float | None, name: str = KEY) -> torch.Tensor:
    save(SEVEN, tmp_path / "x.pth")
    save(adapter, tmp_path / "adapter.pth")
    with open_checkpoint(tmp_path / "x.pth", adapter=read_adapter(tmp_path / "adapter.pth", alpha)) as source:
        return source.source(source.sources[name + ".weight"])


def assert_acts_as(weight: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Two orders of summation of some fifty products in float32 differ by less than 1e-5 of range."""
    x = normal(7, weight.shape[1], seed=9)
    expected = forward(x)
    assert (x @ weight.T - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = x @ SEVEN[KEY + ".weight"].float().T
    assert (base - expected).abs().max() > 1e-2 * expected.abs().max(), "the adapter must matter"


@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_lora_adds_its_scaled_product(rank: int, tmp_path: Path) -> None:
    down, up = normal(rank, 48), normal(192, rank)
    weight = merged_weight(tmp_path, {f"{KEY}.lora_A": down, f"{KEY}.lora_B": up}, ALPHA)
    base = SEVEN[KEY + ".weight"].float()
    assert_acts_as(weight, lambda x: x @ base.T + ALPHA / rank * ((x @ down.T) @ up.T))


@pytest.mark.parametrize("suffix", ["bone", "disha"])
@pytest.mark.parametrize("rank", [1, 8, 16, 20, 64])
def test_bone_shares_one_matrix_between_groups_of_inputs(suffix: str, rank: int, tmp_path: Path) -> None:
    """The trainer's forward: inputs padded to groups of r, summed over groups, times D; 20 and 64 need padding."""
    shared = normal(rank, 192)
    weight = merged_weight(tmp_path, {f"{KEY}.{suffix}": shared}, None)
    base = SEVEN[KEY + ".weight"].float()

    def forward(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % rank))
        return x @ base.T + padded.reshape(len(x), -1, rank).sum(1) @ shared

    assert_acts_as(weight, forward)


@pytest.mark.parametrize("suffix", ["bone", "disha"])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_bat_multiplies_and_adds_block_by_block(suffix: str, rank: int, tmp_path: Path) -> None:
    change = normal(48 // rank, rank, rank) / rank**0.5
    weight = merged_weight(tmp_path, {f"{KEY}.{suffix}": change}, None)
    base = SEVEN[KEY + ".weight"].float()
    expected = base.clone()
    for a in range(192 // rank):
        for b in range(48 // rank):
            rows, columns = slice(a * rank, (a + 1) * rank), slice(b * rank, (b + 1) * rank)
            expected[rows, columns] += base[rows, columns] @ change[b] + change[b]
    assert_acts_as(weight, lambda x: x @ expected.T)


@pytest.mark.parametrize("version", MODELS)
def test_an_engine_with_an_adapter_is_that_of_the_merged_model(version: str, tmp_path: Path) -> None:
    """LoRA, bone and a tensor trained as a whole, all in one file; the merged model is put together here."""
    model = MODELS[version]
    value = "blocks.0.att.value"
    adapter = {
        f"{KEY}.lora_A": normal(4, 48),
        f"{KEY}.lora_B": normal(len(model[f"{KEY}.weight"]), 4),
        f"{value}.bone": normal(8, 48),
        "blocks.1.ln2.weight": normal(48),
    }
    merged = {name: tensor.float() for name, tensor in model.items()}
    product = adapter[f"{KEY}.lora_B"] @ adapter[f"{KEY}.lora_A"]
    merged[f"{KEY}.weight"] = merged[f"{KEY}.weight"] + ALPHA / 4 * product
    merged[f"{value}.weight"] = merged[f"{value}.weight"] + adapter[f"{value}.bone"].repeat(6, 1).T
    merged["blocks.1.ln2.weight"] = adapter["blocks.1.ln2.weight"]
    save(model, tmp_path / "x.pth")
    save(adapter, tmp_path / "adapter.pth")
    save(merged, tmp_path / "merged.pth")
    changed = {"adapter": tmp_path / "adapter.pth", "alpha": ALPHA}
    report = export_engine(tmp_path / "x.pth", tmp_path / "a.goslet", quant="int8", **changed)
    plain = export_engine(tmp_path / "x.pth", tmp_path / "plain.goslet", quant="int8")
    expected = export_engine(tmp_path / "merged.pth", tmp_path / "b.goslet", quant="int8")
    assert report.model_id == expected.model_id != plain.model_id
    with EngineFile.open(tmp_path / "a.goslet") as one, EngineFile.open(tmp_path / "b.goslet") as other:
        assert one.provenance["adapter"] == "adapter.pth" and one.provenance["alpha"] == ALPHA
        for name in one.tensors:
            np.testing.assert_array_equal(one.packed(name).data, other.packed(name).data, name)
    assert verify_engine(tmp_path / "a.goslet", tmp_path / "x.pth", **changed).passed
    assert verify_engine(tmp_path / "a.goslet", tmp_path / "x.pth").differences == (
        f"model id (exported with --adapter adapter.pth --alpha {ALPHA})",
    )


def time_states() -> Tensors:
    return {f"blocks.{layer}.att.time_state": normal(3, 16, 16, seed=layer) for layer in range(2)}


def test_a_state_becomes_the_initial_state_wherever_it_lies(tmp_path: Path) -> None:
    """As --state, as an adapter, or merged into the checkpoint; --state goes first."""
    save(SEVEN, tmp_path / "x.pth")
    save(time_states(), tmp_path / "state.pth")
    save({**SEVEN, **time_states()}, tmp_path / "both.pth")
    save({name: -tensor for name, tensor in time_states().items()}, tmp_path / "other.pth")
    state = tmp_path / "state.pth"
    exports = {
        "state": (tmp_path / "x.pth", {"state": state}),
        "adapter": (tmp_path / "x.pth", {"adapter": state}),
        "checkpoint": (tmp_path / "both.pth", {}),
        "first": (tmp_path / "both.pth", {"adapter": tmp_path / "other.pth", "state": state}),
    }
    expected = time_states()["blocks.1.att.time_state"].numpy()
    for name, (checkpoint, options) in exports.items():
        export_engine(checkpoint, tmp_path / f"{name}.goslet", quant="f32", **options)
        with goslet.open(tmp_path / f"{name}.goslet") as engine:
            np.testing.assert_array_equal(engine.session().state.front["1.wkv"], expected, name)
    ids = {EngineFile.open(tmp_path / f"{name}.goslet").model_id for name in exports}
    assert len(ids) == 1, "a state does not make another model"


LORA = {f"{KEY}.lora_A": normal(4, 48), f"{KEY}.lora_B": normal(192, 4)}
BAD: dict[str, tuple[Tensors, float | None, type[GosletError], str]] = {
    "ranks that differ": ({**LORA, f"{KEY}.lora_B": normal(192, 5)}, ALPHA, TensorShapeError, "does not fit"),
    "rank zero": ({f"{KEY}.lora_A": normal(0, 48), f"{KEY}.lora_B": normal(192, 0)}, ALPHA, TensorShapeError, "rank"),
    "another width": ({**LORA, f"{KEY}.lora_A": normal(4, 64)}, ALPHA, TensorShapeError, "does not fit"),
    "half of a LoRA": ({f"{KEY}.lora_A": normal(4, 48)}, ALPHA, MissingTensorError, "lora_B"),
    "the other half": ({f"{KEY}.lora_B": normal(192, 4)}, ALPHA, MissingTensorError, "lora_A"),
    "a LoRA without alpha": (LORA, None, InputError, "lora_alpha"),
    "alpha for bone": ({f"{KEY}.bone": normal(8, 192)}, ALPHA, InputError, "LoRA"),
    "bone of another width": ({f"{KEY}.bone": normal(8, 48)}, None, TensorShapeError, "does not fit"),
    "bone that is one number": ({f"{KEY}.bone": torch.ones(())}, None, TensorShapeError, "does not fit"),
    "a state of a layer that is not there": (
        {"blocks.99.att.time_state": normal(3, 16, 16)},
        None,
        ExtraTensorError,
        r"adapter\.pth.*does not have",
    ),
    "bat whose blocks do not fit": ({f"{KEY}.bone": normal(3, 15, 15)}, None, TensorShapeError, "does not fit"),
    "bat with too few blocks": ({f"{KEY}.bone": normal(2, 16, 16)}, None, TensorShapeError, "does not fit"),
    "a vector's bone": ({"blocks.0.ln1.bone": normal(8, 48)}, None, TensorShapeError, "matrix"),
    "a tensor of another shape": ({"blocks.0.ln1.weight": normal(49)}, None, TensorShapeError, "does not fit"),
    "a layer that is not there": (
        {"blocks.9.ffn.key.lora_A": normal(4, 48), "blocks.9.ffn.key.lora_B": normal(192, 4)},
        ALPHA,
        ExtraTensorError,
        "does not have",
    ),
    "peft's names": ({"base_model.model.x.lora_A.weight": normal(4, 48)}, None, ExtraTensorError, "does not have"),
    "NaN": ({**LORA, f"{KEY}.lora_A": normal(4, 48) * torch.nan}, ALPHA, TensorValueError, "finite"),
    "integers": ({f"{KEY}.bone": torch.ones(8, 192, dtype=torch.int8)}, None, TensorValueError, "int8"),
    "half of the states": ({"blocks.0.att.time_state": normal(3, 16, 16)}, None, MissingTensorError, "time_state"),
    "a whole model": (MODELS["7"], None, CheckpointError, "whole model"),
    "nothing": ({}, None, CheckpointError, "no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_does_not_fit_is_one_error_and_no_file(name: str, tmp_path: Path) -> None:
    tensors, alpha, error, words = BAD[name]
    save(SEVEN, tmp_path / "x.pth")
    torch.save(tensors, tmp_path / "adapter.pth")
    with pytest.raises(error, match=words) as caught:
        export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", adapter=tmp_path / "adapter.pth", alpha=alpha)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.pth", "x.pth"]


def test_alpha_alone_and_files_that_are_not_there(tmp_path: Path) -> None:
    save(SEVEN, tmp_path / "x.pth")
    with pytest.raises(InputError, match="without an adapter"):
        export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", alpha=ALPHA)
    with pytest.raises(CheckpointError, match="no file"):
        export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", adapter=tmp_path / "absent.pth")
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="positive"):
            read_adapter(tmp_path / "x.pth", alpha)


def test_a_lora_beside_the_whole_tensor_changes_that_tensor_in_any_order(tmp_path: Path) -> None:
    whole = normal(192, 48, seed=5)
    parts = {f"{KEY}.weight": whole, **LORA}
    expected = whole + ALPHA / 4 * LORA[f"{KEY}.lora_B"] @ LORA[f"{KEY}.lora_A"]
    for order in (parts, dict(reversed(parts.items()))):
        assert (merged_weight(tmp_path, order, ALPHA) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_adapter_in_eight_bits_is_read(tmp_path: Path) -> None:
    change = normal(8, 192).to(torch.float8_e4m3fn)
    found = merged_weight(tmp_path, {f"{KEY}.bone": change}, None)
    expected = SEVEN[f"{KEY}.weight"].float() + change.float()[torch.arange(48) % 8].T
    assert torch.equal(found, expected)
