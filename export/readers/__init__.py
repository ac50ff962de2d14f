"""Reading checkpoints, one file for each form that people have; `read_model` tells them apart by content."""

from __future__ import annotations

import struct
from pathlib import Path

from ...errors import CheckpointError
from .gguf_file import read_gguf
from .hf_folder import read_folder
from .rwkv_file import read_pth, read_safetensors
from .stored import StoredModel, StoredTensor

__all__ = ["StoredModel", "StoredTensor", "read_model", "sniff"]

_READERS = {"pth": read_pth, "safetensors": read_safetensors, "gguf": read_gguf}


def read_model(path: Path) -> StoredModel:
    """The tensors of a checkpoint, under RWKV's own names.

    Raises:
        CheckpointError: it is of none of the known forms, or not readable.
    """
    kind = sniff(path)
    return read_folder(path, read_model) if kind == "hf" else _READERS[kind](path)


def sniff(path: Path) -> str:
    """What a file is by its content: ``pth``, ``safetensors`` or ``gguf``, and ``hf`` for any folder.

    Raises:
        CheckpointError: it cannot be read, or is none of these.
    """
    try:
        size_bytes = path.stat().st_size
        if path.is_dir():
            return "hf"
        if not path.is_file():
            raise CheckpointError("is not a regular file", file=path, expected="a .pth, .safetensors or .gguf file")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=path, remedy="check the path and its permissions"
        ) from None
    if not head:
        raise CheckpointError("is empty", file=path, expected="a .pth, .safetensors or .gguf file", found="0 bytes")
    if head[:4] == b"GGUF":
        return "gguf"
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size_bytes:
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pth"
    raise CheckpointError(
        "is neither a .pth nor a .safetensors nor a .gguf file, or is cut off",
        file=path,
        place="byte 0",
        expected="a zip archive, a pickle, GGUF or a safetensors header",
        found=head[:8].hex(" "),
        remedy="check that the download is complete",
    )
