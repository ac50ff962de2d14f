"""A .pth that another program has packed again: torch maps records where they lie, and would read packed bytes."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.errors import CheckpointError  # noqa: E402
from goslet.export.adapters import read_adapter  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.readers import rwkv_file  # noqa: E402
from goslet.export.readers.beside import load_beside  # noqa: E402

Tensors = dict[str, torch.Tensor]
BIAS = "blocks.0.ln1.bias"
METHODS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """With a bias of zeros, whose compressed bytes and what lies behind them are finite numbers."""
    made = random_rwkv7(n_layer=1, n_embd=64, vocab_size=40, rank_w=8, rank_a=8, rank_v=8, rank_g=8, unused=False)
    return {**{n: t.bfloat16() for n, t in made.items()}, BIAS: torch.zeros(64, dtype=torch.bfloat16)}


def packed(source: Path, out: Path, method: int, which: Callable[[str, bytes], bool]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content, compress_type=method if which(name, content) else zipfile.ZIP_STORED)
    return out


def said(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(CheckpointError, match=path.name) as caught:
        read(path)
    return str(caught.value)


def opened(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.model_id()


READERS: dict[str, Callable[[Path], object]] = {
    "model": opened,
    "adapter": lambda path: read_adapter(path, None),
    "beside": load_beside,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_compressed_record_is_refused_whoever_reads_it(
    ending: str, method: str, reader: str, tensors: Tensors, tmp_path: Path
) -> None:
    save(tensors, tmp_path / "plain.pth")
    path = tmp_path / f"x.{ending}"
    packed(tmp_path / "plain.pth", path, METHODS[method], lambda name, content: "/data/" in name and not any(content))
    text = said(READERS[reader], path)
    assert "compressed" in text
    assert "save it with torch.save again" in text


def test_what_is_packed_again_without_compression_is_read(tensors: Tensors, tmp_path: Path) -> None:
    save(tensors, tmp_path / "plain.pth")
    packed(tmp_path / "plain.pth", tmp_path / "x.pth", zipfile.ZIP_STORED, lambda name, content: True)
    assert opened(tmp_path / "x.pth") == opened(tmp_path / "plain.pth")


def test_an_encrypted_record_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    save(tensors, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    name = b"/data/0"
    directory = content.rindex(name + b"PK") if name + b"PK" in content else content.rindex(name)
    entry = content.rindex(b"PK\x01\x02", 0, directory)
    content[entry + 8] |= 1
    (tmp_path / "x.pth").write_bytes(content)
    assert "encrypted" in said(opened, tmp_path / "x.pth")


@pytest.mark.parametrize("reader", READERS)
def test_the_pickle_of_an_archive_has_a_bound(
    reader: str, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored one above it; a compressed one is refused before its size is of interest."""
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02](" + 100_000 * b"K\x01" + b"e.")
        archive.writestr("a/version", "3\n")
    assert "compressed" in said(READERS[reader], tmp_path / "bomb.pth")
    save(tensors, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        size_bytes = next(record.file_size for record in archive.infolist() if record.filename.endswith("data.pkl"))
    assert size_bytes / len(tensors) < 200  # of which the bound has room for far more than any model has
    monkeypatch.setattr(rwkv_file, "_MAX_PICKLE_BYTES", size_bytes)
    rwkv_file.load_pth(tmp_path / "x.pth")
    monkeypatch.setattr(rwkv_file, "_MAX_PICKLE_BYTES", size_bytes - 1)
    text = said(READERS[reader], tmp_path / "x.pth")
    assert "data.pkl" in text
    assert "save the model's state_dict alone" in text


def test_every_flip_in_the_directory_is_read_or_an_error(tmp_path: Path) -> None:
    """zipfile fails with many types, before and behind the question whether a file is an archive."""
    path = tmp_path / "x.pth"
    save({"blocks.0.att.key.weight": torch.zeros(2, 2)}, path)
    whole = path.read_bytes()
    for at in range(whole.index(b"PK\x01\x02"), len(whole)):
        for mask in (0x80, 0x09):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            try:
                load_beside(path)
            except CheckpointError as error:
                assert path.name in str(error)


@pytest.mark.parametrize("end", ["1e999", "-1e999", "NaN", '"4"', "null", "[]", "1" + 400 * "0"])
def test_ends_of_safetensors_that_are_no_places(end: str, tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % end.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    said(opened, path)
    said(load_beside, path)
