"""Adapters and tuned states in every container that people have, told apart by what is in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv6, random_rwkv7, save  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from goslet.errors import CheckpointError, GosletError, MissingTensorError, UnsafeCheckpointError  # noqa: E402
from goslet.export.adapters import read_adapter  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.readers.beside import load_beside  # noqa: E402
from goslet.export.tuned_state import read_tuned_state  # noqa: E402
from goslet.spec import ModelSpec  # noqa: E402

Tensors = dict[str, torch.Tensor]
SHAPE = {"n_layer": 2, "n_embd": 48, "head_size": 16, "vocab_size": 256}
MODELS = {
    "6": random_rwkv6(**SHAPE, rank_mix=8, rank_decay=8, seed=3),
    "7": random_rwkv7(**SHAPE, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3),
}
KEY = "blocks.1.ffn.key"
# Numbers that float16 holds, so that every container holds the same.
STATE = {
    f"blocks.{layer}.att.time_state": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(layer))
    .half()
    .float()
    for layer in range(2)
}
LORA = {
    f"{KEY}.lora_A": torch.randn(4, 48, generator=torch.Generator().manual_seed(5)).half().float(),
    f"{KEY}.lora_B": torch.randn(192, 4, generator=torch.Generator().manual_seed(6)).half().float(),
}


def turned(tensors: Tensors) -> Tensors:
    """As web-rwkv's converter writes them: names, halves, and the last two axes of two kinds of tensors swapped."""
    converted = {}
    for name, tensor in tensors.items():
        renamed = name.replace("lora_A", "lora.0").replace("lora_B", "lora.1").lower()
        half = tensor.half()
        swap = any(part in renamed for part in ("time_state", "lora.0"))
        converted[renamed] = (half.transpose(-1, -2) if swap else half).contiguous()
    return converted


def st(tensors: Tensors, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def containers(tensors: Tensors, folder: Path) -> dict[str, tuple[Path, bool]]:
    """The same tensors in every container, under names that say so or say something else; whether a note is due."""
    small = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save(tensors, folder / "plain.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(tensors, folder / "pickle.safetensors")
    st(tensors, folder / "plain.safetensors")
    st(tensors, folder / "named.pth")
    st(tensors, folder / "whole.st")
    st(small, folder / "halves.safetensors")
    torch.save(small, folder / "halves.pth")
    torch.save(small, folder / "pickle.st")
    st(turned(tensors), folder / "converted.st")
    torch.save({f"_forward_module.{name}": tensor for name, tensor in tensors.items()}, folder / "wrapped.pth")
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "lightning.ckpt")
    st({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "prefixed.safetensors")
    noted = {"halves.safetensors", "converted.st", "lightning.ckpt", "prefixed.safetensors"}
    return {path.name: (path, path.name in noted) for path in folder.iterdir()}


@pytest.mark.parametrize("version", MODELS)
def test_a_state_is_the_same_from_every_container(version: str, tmp_path: Path) -> None:
    """A state is square, so that of what is float16 throughout the name alone tells which way it lies; it is said."""
    save(MODELS[version], tmp_path / "base.pth")
    with open_checkpoint(tmp_path / "base.pth") as source:
        spec = source.spec
    folder = tmp_path / "states"
    folder.mkdir()
    files = containers(STATE, folder)
    expected = read_tuned_state(folder / "plain.pth", spec)
    own = STATE["blocks.1.att.time_state"]
    np.testing.assert_array_equal(expected["1.wkv"], own if version == "7" else own.transpose(1, 2))
    for name, (path, noted) in files.items():
        notes: list[str] = []
        found = read_tuned_state(path, spec, note=notes.append)
        for part, values in expected.items():
            np.testing.assert_array_equal(found[part], values, name)
        assert bool(notes) == noted, (name, notes)
        adapter = read_adapter(path, None)
        assert adapter is not None and bool(adapter.notes) == noted
        with open_checkpoint(tmp_path / "base.pth", adapter=adapter) as changed:
            assert torch.equal(changed.tuned_state["blocks.1.att.time_state"].read(slice(None)), own), name
            assert set(adapter.notes) <= set(changed.notes)
    assert "turned back" in " ".join(load_beside(folder / "converted.st")[1])
    assert "as it lies" in " ".join(load_beside(folder / "halves.safetensors")[1])


def test_a_lora_is_the_same_from_every_container(tmp_path: Path) -> None:
    """Of a LoRA that was converted for web-rwkv its names tell."""
    save(MODELS["7"], tmp_path / "base.pth")
    folder = tmp_path / "adapters"
    folder.mkdir()
    files = containers(LORA, folder)
    st(turned(LORA), folder / "converted.safetensors")
    files["converted.safetensors"] = (folder / "converted.safetensors", True)
    base = MODELS["7"][f"{KEY}.weight"].float()
    expected = base + 3.0 * (LORA[f"{KEY}.lora_B"] @ LORA[f"{KEY}.lora_A"])
    for name, (path, _) in files.items():
        with open_checkpoint(tmp_path / "base.pth", adapter=read_adapter(path, 12.0)) as source:
            assert torch.equal(source.source(source.sources[f"{KEY}.weight"]), expected), name


def spec_of(version: str) -> ModelSpec:
    sizes = {"n_layer": 2, "n_embd": 48, "n_ffn": 192, "vocab_size": 256, "head_size": 16}
    return ModelSpec(version=version, **sizes, norm_eps=64e-5, layer_norm_eps=1e-5, ranks={})


BAD: dict[str, tuple[bytes, type[GosletError], str]] = {
    "empty": (b"", CheckpointError, "is empty"),
    "text": (b"not a file of tensors", CheckpointError, "of no kind that goslet knows"),
    "GGUF": (b"GGUF" + bytes(40), CheckpointError, "GGUF.*file that the trainer saved"),
    "a safetensors file that is cut off": (b"\x40" + bytes(7) + b"{" + b" " * 80, CheckpointError, "not a readable"),
    "a pickle that calls": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", UnsafeCheckpointError, "never runs"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_tensors(name: str, tmp_path: Path) -> None:
    content, error, words = BAD[name]
    for suffix in ("pth", "safetensors", "st"):
        path = tmp_path / f"bad.{suffix}"
        path.write_bytes(content)
        for read in (lambda path: read_adapter(path, None), lambda path: read_tuned_state(path, spec_of("7"))):
            with pytest.raises(error, match=words) as caught:
                read(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_state(tmp_path: Path) -> None:
    torch.save(LORA, tmp_path / "lora.pth")
    with pytest.raises(MissingTensorError, match=r"lora\.pth.*time_state.*state tuning"):
        read_tuned_state(tmp_path / "lora.pth", spec_of("7"))
    st({"blocks.0.att.time_state": torch.zeros(16).half()}, tmp_path / "flat.st")
    with pytest.raises(CheckpointError, match="not a matrix"):
        load_beside(tmp_path / "flat.st")
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no tensor"):
        read_adapter(tmp_path / "none.safetensors", None)
    with pytest.raises(CheckpointError, match="folder"):
        load_beside(tmp_path)
