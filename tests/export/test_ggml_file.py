"""rwkv.cpp's files: the model that they were made from, and one error for each way in which one can be wrong."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
gguf = pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")

from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.errors import CheckpointError  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402

Tensors = dict[str, torch.Tensor]
WIDE = {"n_layer": 2, "n_embd": 32, "vocab_size": 19, "n_ffn": 64}
RANKS = {"rank_w": 4, "rank_a": 5, "rank_v": 6, "rank_g": 7}
MAKERS: dict[str, Callable[..., Tensors]] = {
    "4": partial(random_rwkv4, **WIDE),
    "5.0": partial(random_rwkv5, "5.0", **WIDE, head_size=8, first="time_first"),
    "5.1": partial(random_rwkv5, "5.1", **WIDE, head_size=8),
    "5.2": partial(random_rwkv5, "5.2", **WIDE, head_size=8),
    "5.2 one head": partial(random_rwkv5, "5.2", **WIDE, head_size=32),
    "6": partial(random_rwkv6, **WIDE, head_size=8, rank_mix=3, rank_decay=32),
    "6 one head": partial(random_rwkv6, **WIDE, head_size=32, rank_mix=3, rank_decay=5),
    "7": partial(random_rwkv7, **WIDE, **RANKS, head_size=8),
}
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}
KEPT_WIDE = ("time_", "k_k", "k_a", "r_k", "x_rwkvag", "x_k", "w0", "a0", "v0")


def entry(name: str, numbers: np.ndarray, kind: int, shape: tuple[int, ...]) -> bytes:
    head = struct.pack("<3i", len(shape), len(name.encode()), kind) + struct.pack(f"<{len(shape)}i", *reversed(shape))
    return head + name.encode() + numbers.tobytes()


def converted(name: str, x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """A tensor as RWKV/rwkv.cpp's python/convert_pytorch_to_ggml.py changes it."""
    seven, six = "blocks.0.att.k_k" in tensors, "blocks.0.att.time_maa_x" in tensors
    five, gated = "blocks.0.att.ln_x.weight" in tensors, "blocks.0.att.gate.weight" in tensors
    if ".time_" in name:
        x = x.squeeze()
    if seven:
        return x.T if name[-3:-1] in (".w", ".a", ".v", ".g") and name[-1] in "12" else x
    if six:
        if "time_faaaa" in name:
            return x.unsqueeze(-1)
        if "time_maa_w1" in name or "time_decay_w" in name:
            return x.T
        if "time_maa_w2" in name:
            return x.transpose(1, 2)
        return x.reshape(tensors["blocks.0.att.time_faaaa"].shape[0], -1, 1) if "time_decay" in name else x
    if five:
        if "time_decay" in name:
            y = torch.exp(-torch.exp(x))
            return y.unsqueeze(-1) if gated else y.reshape(-1, 1, 1)
        if "time_first" in name:
            return torch.exp(x).reshape(-1, 1, 1)
        return x.unsqueeze(-1) if "time_faaaa" in name else x
    return -torch.exp(x) if "time_decay" in name else x


def write(
    tensors: Tensors,
    path: Path,
    *,
    half: bool = False,
    quantized: str = "",
    version: int = 101,
    n_layer: int = 2,
    extra: bytes = b"",
) -> None:
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if "blocks.0.att.k_k" in tensors:
        for layer in range(2):
            mixes = [tensors.pop(f"blocks.{layer}.att.x_{letter}") for letter in "rwkvag"]
            tensors[f"blocks.{layer}.att.x_rwkvag"] = torch.cat(mixes)
    vocab_size, width = tensors["emb.weight"].shape
    pieces = [struct.pack("<4s5i", b"fmgg", version, vocab_size, width, n_layer, TYPES.get(quantized, int(half)))]
    for name, tensor in tensors.items():
        x = converted(name, tensor, tensors).contiguous().numpy()
        kind = 0
        shape = x.shape
        if half and x.ndim > 1 and not any(part in name for part in KEPT_WIDE):
            kind, x = 1, x.astype(np.float16)
        if quantized and x.ndim == 2 and name.endswith(".weight") and name not in ("emb.weight", "head.weight"):
            kind, x = TYPES[quantized], gguf.quants.quantize(x, gguf.GGMLQuantizationType[quantized])
        pieces.append(entry(name, x, kind, shape))
    path.write_bytes(b"".join(pieces) + extra)


def identity(path: Path) -> tuple[str, str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec.version, checkpoint.model_id()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError, match=path.name) as caught, open_checkpoint(path) as checkpoint:
        checkpoint.weights()
    return str(caught.value)


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, False), (torch.float16, False), (torch.float16, True)])
def test_a_converted_file_is_the_model_that_it_was_made_from(
    version: str, dtype: torch.dtype, half: bool, tmp_path: Path
) -> None:
    tensors = MAKERS[version](dtype=dtype)
    save(tensors, tmp_path / "x.pth")
    write(tensors, tmp_path / "x.bin", half=half)
    assert identity(tmp_path / "x.bin") == identity(tmp_path / "x.pth")


@pytest.mark.parametrize("version", ["4", "5.0", "5.2"])
def test_exponentials_of_float32_come_back_to_the_last_places(version: str, tmp_path: Path) -> None:
    """What the engine computes from the recovered numbers is what rwkv.cpp has stored.

    The logarithm is rounded to float32, u = 2^-24 of it; behind exp(-exp(d)), |d|·exp(d)·u at most 2·e·u with decays
    below 1, and as much again for each exponential: 8 u bounds all of it.
    """
    tensors = MAKERS[version]()
    save(tensors, tmp_path / "x.pth")
    write(tensors, tmp_path / "x.bin")
    with open_checkpoint(tmp_path / "x.bin") as found, open_checkpoint(tmp_path / "x.pth") as plain:
        assert found.spec == plain.spec
        ours, theirs = found.weights(), plain.weights()
    for name, tensor in theirs.items():
        if name.endswith((".decay", ".bonus")):
            assert ((ours[name] - tensor).abs() <= 8 * 2**-24 * tensor.abs()).all(), name
        else:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("quantized", TYPES)
@pytest.mark.parametrize("version", ["4", "7"])
def test_quantized_tensors_are_what_gguf_makes_of_them(version: str, quantized: str, tmp_path: Path) -> None:
    tensors = MAKERS[version](dtype=torch.float16)
    write(tensors, tmp_path / "x.bin", half=True, quantized=quantized)
    with open_checkpoint(tmp_path / "x.bin") as checkpoint:
        assert any(quantized in note for note in checkpoint.notes)
        source = checkpoint.sources["blocks.1.ffn.value.weight"]
        found = checkpoint.source(source)
        rows = checkpoint.sources["emb.weight"]
        assert torch.equal(checkpoint.source(rows, slice(3, 7)), checkpoint.source(rows)[3:7])
    kind = gguf.GGMLQuantizationType[quantized]
    plain = tensors["blocks.1.ffn.value.weight"].float().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(plain, kind), kind)
    assert np.array_equal(found.numpy(), expected)
    assert not np.array_equal(found.numpy(), plain)


def test_what_rwkv_cpp_computes_otherwise_is_said(tmp_path: Path) -> None:
    write(MAKERS["5.2"](), tmp_path / "x.bin")
    with open_checkpoint(tmp_path / "x.bin") as checkpoint:
        assert any("1e-5" in note for note in checkpoint.notes)


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("n_layer", [-1, 0, 1, 3])
def test_a_header_of_another_number_of_layers(n_layer: int, version: str, tmp_path: Path) -> None:
    """As a file is whose last layers are missing, which holds a smaller model."""
    write(MAKERS[version](), tmp_path / "x.bin", n_layer=n_layer)
    assert f"another number of layers than its header says (expected {n_layer}, found 2)" in refusal(tmp_path / "x.bin")


def test_files_that_rwkv_cpp_gave_up(tmp_path: Path) -> None:
    write(MAKERS["4"](), tmp_path / "plain.bin", version=100)
    identity(tmp_path / "plain.bin")
    write(MAKERS["4"](), tmp_path / "old.bin", version=100, quantized="Q4_0")
    assert "gave up" in refusal(tmp_path / "old.bin")
    write(MAKERS["4"](), tmp_path / "llama.bin", version=1)
    assert "expected 100 or 101, found 1" in refusal(tmp_path / "llama.bin")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (entry("x", np.zeros(2, np.float32), 6, (2,)), "unknown type"),
        (entry("x", np.zeros(0, np.float32), 0, (0,)), "empty axis"),
        (entry("x", np.zeros(0, np.float32), 0, (-1, 5)), "empty axis"),
        (entry("x", np.zeros(0, np.float32), 0, (2**31 - 1,) * 3), "cut off"),
        (entry("x", np.zeros(2, np.float32), 2, (2,)), "no whole blocks"),
        (entry("emb.weight", np.zeros(2, np.float32), 0, (2,)), "twice"),
        (struct.pack("<3i", 4, 1, 0), "1 to 3 axes"),
        (struct.pack("<3i", 1, 2**30, 0), "a name of 1 to 256 bytes"),
        (struct.pack("<3i", 1, 200, 0), "cut off"),
        (b"\0", "cut off"),
        (entry("\x1b[31m", np.zeros(1, np.float32), 0, (1,)), "not known"),
    ],
)
def test_odd_headers(extra: bytes, said: str, tmp_path: Path) -> None:
    """Sizes are checked before anything is read: a few bytes may claim 2^93 numbers."""
    write(MAKERS["4"](), tmp_path / "x.bin", extra=extra)
    assert said in refusal(tmp_path / "x.bin")


def test_another_embedding_than_the_header_says(tmp_path: Path) -> None:
    tensors = MAKERS["7"]()
    write(tensors, tmp_path / "x.bin")
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[8:12] = struct.pack("<i", 20)
    (tmp_path / "x.bin").write_bytes(content)
    assert "[20, 32], found [19, 32]" in refusal(tmp_path / "x.bin")


def test_decays_that_no_exponential_gives(tmp_path: Path) -> None:
    tensors = MAKERS["4"]()
    write(tensors, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    name = b"blocks.1.att.time_decay"
    at = content.index(name) + len(name)
    (tmp_path / "x.bin").write_bytes(content[:at] + struct.pack("<f", 1.5) + content[at + 4 :])
    assert "NaN or infinity" in refusal(tmp_path / "x.bin")


def test_truncated_and_flipped_files_give_typed_errors_or_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write(MAKERS["7"](dtype=torch.float16), path, half=True, quantized="Q5_1")
    content = path.read_bytes()
    dice = random.Random(0)
    for size in [0, 3, 4, 23, 24, 30, *(dice.randrange(len(content)) for _ in range(60))]:
        path.write_bytes(content[:size])
        assert path.name in refusal(path)
    for _ in range(150):
        changed = bytearray(content)
        changed[dice.randrange(len(content) // 20)] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        try:
            with open_checkpoint(path) as checkpoint:
                checkpoint.weights()
        except CheckpointError as error:
            assert path.name in str(error)
