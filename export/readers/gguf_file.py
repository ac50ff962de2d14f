"""GGUF files as llama.cpp's converter writes them, for RWKV-6 and 7: mapped, and dequantized tensor by tensor.

Names and forms are those of llama.cpp's ``conversion/rwkv.py``: LoRA matrices are turned, the shares of the token
before are one stacked tensor, RWKV-7's bonus is flat, and RWKV-6 may store its output and value matrices divided by a
power of two that grows every few layers, which is undone here and is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, DependencyError, TensorShapeError, first_line
from ..models.tensors import Shape
from .stored import ConvertedTensor, StoredModel, StoredTensor, shares, turned

_READABLE = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"})
# Those that lie in the file as numpy arrays; all others are blocks of bytes that only gguf's tables know.
_PLAIN_NUMBERS = frozenset({"F32", "F16"})
_TOP = {"token_embd": "emb", "token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out", "output": "head"}
_BLOCK = {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}
_MATRIX = re.compile(r"(time|channel)_mix_(key|value|receptance|output|gate)", re.ASCII)
_ROOM = {"time": "att", "channel": "ffn"}
# The order in which the shares of the token before are stacked.
_STACKED = {"rwkv6": "wkvrg", "rwkv7": "rwkvag"}
_PLAIN = {
    "rwkv6": {"lerp_x": "time_maa_x", "first": "time_faaaa", "decay": "time_decay"}
    | {f"lerp_{letter}": f"time_maa_{letter}" for letter in "wkvrg"},
    "rwkv7": {name: name for name in ("w0", "a0", "v0", "k_k", "k_a")},
}
_TURNED = {
    "rwkv6": {"w1": "time_maa_w1", "decay_w1": "time_decay_w1", "decay_w2": "time_decay_w2"},
    "rwkv7": {f"{letter}{part}": f"{letter}{part}" for letter in "wavg" for part in "12"},
}
_SHARES = {"rwkv6": "time_maa_", "rwkv7": "x_"}
_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor where it is mapped; `data` has its rows along the first axes, quantized ones as bytes."""

    data: Any
    kind: Any
    shape: Shape

    @property
    def dtype(self) -> str:
        return str(self.kind.name)

    @property
    def readable(self) -> bool:
        return self.dtype in _READABLE

    def read(self, rows: slice) -> Tensor:
        """Some rows in float32, whatever the order of their bytes."""
        if self.dtype in _PLAIN_NUMBERS:
            # The mapped array knows the order of its bytes, which gguf's own conversion drops.
            return torch.from_numpy(np.array(self.data[rows], np.float32))
        from gguf.quants import dequantize

        return torch.from_numpy(np.array(dequantize(self.data[rows], self.kind), np.float32))


def read_gguf(path: Path) -> StoredModel:
    """The tensors of an RWKV-6 or 7 in GGUF.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
        TensorShapeError: a tensor has not the axes that llama.cpp gives it.
        DependencyError: gguf is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise DependencyError(
            "gguf is not installed, which reading this file needs", file=path, remedy="pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        architecture = _field(reader, "general.architecture")
        head_size = _field(reader, f"{architecture}.wkv.head_size")
        rescale = _field(reader, f"{architecture}.rescale_every_n_layers") or 0
    except Exception as error:  # a damaged file can fail anywhere in gguf
        raise CheckpointError(
            f"is not a readable GGUF file: {first_line(error)}",
            file=path,
            remedy="check that the download is complete",
        ) from error
    if architecture not in _STACKED:
        raise CheckpointError(
            "is of an architecture that goslet does not read from GGUF",
            file=path,
            place="general.architecture",
            expected="rwkv6 or rwkv7",
            found=str(architecture)[:60],
        )
    if type(head_size) is not int or head_size < 1 or type(rescale) is not int or rescale < 0:
        raise CheckpointError("has no size of heads", file=path, place=f"{architecture}.wkv.head_size", found=head_size)
    _check_places(reader, path)
    _check_byte_order(reader, path)
    tensors: dict[str, StoredTensor] = {}
    for item in reader.tensors:
        stored = _GgufTensor(item.data, item.tensor_type, tuple(int(size) for size in reversed(item.shape.tolist())))
        try:
            for name, renamed in _renamed(item.name, stored, architecture, head_size, rescale):
                if name in tensors:
                    raise CheckpointError(
                        "two tensors stand for one", file=path, place=item.name[:100], found=name[:100]
                    )
                tensors[name] = renamed
        except TensorShapeError as error:
            raise TensorShapeError(
                error.problem, file=path, place=item.name[:100], expected=error.expected, found=error.found
            ) from None
    return StoredModel("gguf", tensors)


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_places(reader: Any, path: Path) -> None:
    """Every tensor in the file, and none in another's place."""
    end, before = 0, "the header"
    for item in sorted(reader.tensors, key=lambda item: int(item.data_offset)):
        start, size_bytes = int(item.data_offset), int(item.n_bytes)
        if start < end:
            raise CheckpointError("a tensor lies over another", file=path, place=item.name[:100], found=before[:100])
        end, before = start + size_bytes, item.name
    if end > path.stat().st_size:
        raise CheckpointError(
            "a tensor ends behind the file",
            file=path,
            place=before[:100],
            expected=f"at most {path.stat().st_size} bytes",
            found=f"{end} bytes",
            remedy="check that the download is complete",
        )


def _check_byte_order(reader: Any, path: Path) -> None:
    """Blocks in a file of the other byte order are refused: some writers swap the scales inside them, others do not."""
    if reader.byte_order == "I":
        return
    for item in reader.tensors:
        if item.tensor_type.name not in _PLAIN_NUMBERS:
            raise CheckpointError(
                f"is a {reader.endianess.name.lower()}-endian GGUF with quantized tensors, in which writers differ",
                file=path,
                place=item.name[:100],
                expected="F32 or F16 in this byte order",
                found=item.tensor_type.name,
                remedy="convert the model again without --bigendian, or to F16",
            )


def _renamed(
    name: str, stored: StoredTensor, architecture: str, head_size: int, rescale: int
) -> Iterator[tuple[str, StoredTensor]]:
    """RWKV's own names and forms; what is unknown keeps its name, by which it is refused later."""
    stem, _, ending = name.rpartition(".")
    found = _NAME.fullmatch(name)
    if found is None:
        yield (f"{_TOP[stem]}.{ending}" if stem in _TOP else name), stored
        return
    layer, part, ending = int(found[1]), found[2], found[3]
    block = f"blocks.{layer}"
    matrix = _MATRIX.fullmatch(part)
    inner = part.removeprefix("time_mix_")
    if part in _BLOCK:
        yield f"{block}.{_BLOCK[part]}.{ending}", stored
    elif matrix is not None:
        divided = architecture == "rwkv6" and rescale and part in ("time_mix_output", "channel_mix_value")
        if divided:
            factor = 2.0 ** (layer // rescale)
            stored = ConvertedTensor(stored, stored.shape, lambda tensor: tensor * factor)
        yield f"{block}.{_ROOM[matrix[1]]}.{matrix[2]}.{ending}", stored
    elif part in ("channel_mix_lerp_k", "channel_mix_lerp_r"):
        yield f"{block}.ffn.{_SHARES[architecture]}{part[-1]}", stored
    elif part == "time_mix_lerp_fused":
        for letter, share in shares(stored, _STACKED[architecture]).items():
            yield f"{block}.att.{_SHARES[architecture]}{letter}", share
    elif part.startswith("time_mix_") and inner in _TURNED[architecture]:
        yield f"{block}.att.{_TURNED[architecture][inner]}", turned(stored)
    elif architecture == "rwkv6" and inner == "w2" and len(stored.shape) == 3:
        n, width, rank = stored.shape
        yield (
            f"{block}.att.time_maa_w2",
            ConvertedTensor(stored, (n, rank, width), lambda tensor: tensor.permute(0, 2, 1)),
        )
    elif architecture == "rwkv7" and inner == "r_k" and stored.shape and stored.shape[-1] % head_size == 0:
        heads = (stored.shape[-1] // head_size, head_size)
        yield f"{block}.att.r_k", ConvertedTensor(stored, heads, lambda tensor: tensor)
    elif part.startswith("time_mix_") and inner in _PLAIN[architecture]:
        yield f"{block}.att.{_PLAIN[architecture][inner]}", stored
    else:
        yield name, stored
