"""What is no checkpoint, is cut off, or is of a kind that goslet does not run, is refused by its own name."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.enginefile import ENGINE_MAGIC  # noqa: E402
from goslet.errors import CheckpointError  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402

SHAPE = {"n_layer": 2, "n_embd": 32, "head_size": 8, "vocab_size": 19}
RANKS = {"rank_w": 4, "rank_a": 5, "rank_v": 6, "rank_g": 7}
DOWNLOAD = "download"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_rwkv7(**SHAPE, **RANKS)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError, match=path.name) as caught, open_checkpoint(path) as checkpoint:
        checkpoint.weights()
    assert caught.value.remedy
    return str(caught.value)


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return content.getvalue()


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, weight=np.zeros(3))
    return content.getvalue()


def onnx_graph() -> bytes:
    onnx = pytest.importorskip("onnx", reason="exporting needs onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


OTHERS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 382\n", "git-lfs"),
    "page": (b"<!DOCTYPE html>\n<html><head>", "web page"),
    "page, lower case": (b"\n <html>", "web page"),
    "answer": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "server's answer"),
    "gzip": (gzip.compress(b"x" * 99), "gzip"),
    "xz": (b"\xfd7zXZ\x00" + b"x" * 40, "compressed archive"),
    "tar": (tar(), "tar archive"),
    "npz": (npz(), "zip archive of other things"),
    "npy": (b"\x93NUMPY\x01\x00" + b"x" * 40, "numpy"),
    "engine": (ENGINE_MAGIC + b"x" * 40, "engine already"),
    "ggjt": (b"tjgg" + b"\x03\x00\x00\x00" * 9, "old ggml format"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + b"x" * 40, "TensorFlow Lite"),
    "json": (b'{"model_type": "rwkv7"}', "JSON"),
    "zeros": (bytes(4096), "begins with zeros"),
    "noise": (b"\xfe\xdc" * 32, "no kind that goslet knows"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_another_kind_are_named(kind: str, tmp_path: Path) -> None:
    content, said = OTHERS[kind]
    (tmp_path / "x.pth").write_bytes(content)
    found = refusal(tmp_path / "x.pth")
    assert said in found
    # Another file is not had by another download, but for those that a broken one leaves.
    assert (DOWNLOAD in found) == (kind in ("page", "page, lower case", "answer", "zeros"))


def test_an_onnx_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(onnx_graph())
    assert "ONNX graph" in refusal(tmp_path / "x.pth")


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    assert "TorchScript" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("form", ["x.pth", "x.safetensors", "old.pth"])
def test_only_what_is_cut_off_is_to_be_downloaded_again(
    form: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / form
    if form.startswith("old"):
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save(tensors, path)
    content = path.read_bytes()
    for part in (0.001, 0.1, 0.5, 0.99):
        path.write_bytes(content[: max(20, int(len(content) * part))])
        found = refusal(path)
        assert "cut off" in found, part
        assert DOWNLOAD in found


def test_what_is_damaged_but_whole_is_not(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    (tmp_path / "x.safetensors").write_bytes(content[: size + 4] + b"!!!!" + content[size + 8 :])
    assert DOWNLOAD not in refusal(tmp_path / "x.safetensors")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02.")
    assert DOWNLOAD not in refusal(tmp_path / "x.pth")


NAMES = {
    "blocks.0.ffnPre.key.weight": "--pre_ffn",
    "head_q.weight": "--head_qk",
    "blocks.1.tiny_q.weight": "--tiny_att_dim",
    "pos_emb_x": "--my_pos_emb",
    "blocks.1.att.k_proj.weight": "hybrid",
    "blocks.1.ffn.gate_proj.weight": "hybrid",
    "blocks.1.att.qkv.q.weight": "RWKV-7b",
    "blocks.1.rosa_v.emb": "RWKV-8",
    "blocks.0.att.time_mix_x": "renamed for web-rwkv",
}


@pytest.mark.parametrize("name", NAMES)
def test_versions_and_options_that_goslet_does_not_run(
    name: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Beside a whole RWKV-7, so that nothing but the name tells."""
    save({**tensors, name: torch.zeros(4, 4)}, tmp_path / "x.pth")
    found = refusal(tmp_path / "x.pth")
    assert NAMES[name] in found
    assert name in found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.0.self_attn.time_mixer.receptance.weight", "model.layers.0.mlp.gate_proj.weight"], "ARWKV"),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.time_decay_w1"], "QRWKV"),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"], "is a transformer"),
        (["model.layers.0.attn.r_proj.weight", "model.embeddings.weight"], "give the folder"),
        (["rwkv.blocks.0.attention.key.weight", "rwkv.embeddings.weight", "head.weight"], "give the folder"),
        (["blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B"], "--adapter"),
        (["blocks.0.att.time_state"], "--state"),
    ],
)
def test_files_without_rwkvs_own_names(names: list[str], said: str, tmp_path: Path) -> None:
    save({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")
