"""What kind of file it is, by its first bytes: one that a reader knows, or another that people have by mistake."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from ...enginefile import ENGINE_MAGIC
from ...errors import CheckpointError
from . import ggml_file

_EXPECTED = "a .pth, .safetensors, .st or .gguf file, rwkv.cpp's .bin, or a Hugging Face folder"
_HEAD_BYTES = 512
# A safetensors header is no longer, by the format's own reader.
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_UNPACK = "unpack it, and give the file inside"
_NOT_WEIGHTS = "give the checkpoint that it was made from"
_OTHERS = (
    (rb"version https://git-lfs", "is a pointer of git-lfs in place of the file", "run `git lfs pull` in its folder"),
    (
        rb"(?i)\s*<(!doctype|html)",
        "is a web page, saved in place of the file",
        "use the page's download link, on the hub the address with /resolve/ in place of /blob/",
    ),
    (rb"\s*<\?xml", "is a server's answer, saved in place of the file", "look into it, and download the file again"),
    (rb"\x1f\x8b", "is compressed by gzip", _UNPACK),
    (rb"BZh|\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|\x28\xb5\x2f\xfd|Rar!", "is a compressed archive", _UNPACK),
    (rb"(?s).{257}ustar", "is a tar archive", _UNPACK),
    (re.escape(ENGINE_MAGIC), "is an engine already", "run it: goslet run FILE"),
    (rb"GOSL", "is a state or another file that goslet made for an engine, not a model", _NOT_WEIGHTS),
    (rb"lmgg|tjgg|algg", "is of an old ggml format, which llama.cpp had before GGUF", _NOT_WEIGHTS),
    (rb"(?s)\x08[\x01-\x20](\x12|\x1a|\x3a).", "is an ONNX graph, not a checkpoint", _NOT_WEIGHTS),
    (rb"\x93NUMPY", "is a numpy array, not a checkpoint", _NOT_WEIGHTS),
    (rb"(?s).{4}TFL3", "is a TensorFlow Lite graph, not a checkpoint", _NOT_WEIGHTS),
    (rb"\x89HDF", "is an HDF5 file, which RWKV is not published in", _NOT_WEIGHTS),
    (rb"\s*[{\[]", "is a JSON text, not weights", "give the file of weights, or the folder that both lie in"),
    (rb"\x00{16}", "begins with zeros, as a download does that was begun and not finished", "download it again"),
)


def kind_of(path: Path) -> str:
    """How `path` is read: ``"hf"``, ``"pth"``, ``"safetensors"``, ``"gguf"`` or ``"ggml"``.

    Raises:
        CheckpointError: it is of another kind, or cannot be read.
    """
    try:
        size_bytes = path.stat().st_size
        if path.is_dir():
            return "hf"
        if not path.is_file():
            raise CheckpointError("is not a regular file", file=path, expected=_EXPECTED)
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=path, remedy="check the path and its permissions"
        ) from None
    if not head:
        raise CheckpointError("is empty", file=path, expected=_EXPECTED, found="0 bytes", remedy="download it again")
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:4] == ggml_file.MAGIC:
        return "ggml"
    if head[:4] == b"PK\x03\x04" or head[:2] in _PICKLES:
        return "pth"
    if len(head) > 8 and head[8:9] == b"{":
        header_bytes = struct.unpack("<Q", head[:8])[0]
        if header_bytes <= size_bytes - 8:
            return "safetensors"
        if header_bytes <= _MAX_HEADER_BYTES:
            raise CheckpointError(
                "is a .safetensors file that is cut off",
                file=path,
                place="the header",
                expected=f"more than {header_bytes} bytes",
                found=f"{size_bytes} bytes",
                remedy="check that the download is complete",
            )
    for pattern, problem, remedy in _OTHERS:
        if re.match(pattern, head):
            raise CheckpointError(problem, file=path, expected=_EXPECTED, remedy=remedy)
    raise CheckpointError(
        "is of no kind that goslet knows",
        file=path,
        place="byte 0",
        expected=_EXPECTED,
        found=head[:8].hex(" "),
        remedy="check that it is the file of weights itself",
    )
