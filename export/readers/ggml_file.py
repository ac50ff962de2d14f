"""rwkv.cpp's ``.bin`` files, for RWKV-4 to 7: mapped, and dequantized tensor by tensor.

Sources: RWKV/rwkv.cpp, ``docs/FILE_FORMAT.md`` and ``python/convert_pytorch_to_ggml.py``. A header of six integers is
followed by the tensors, each with its name, type and axes, the fastest first. The converter turns the LoRA of 6 and 7,
stacks 7's shares, and stores some vectors behind exponentials: 4's decay as -exp(d), 5's as exp(-exp(d)), and
``time_first`` of 5 as its exponential. Here these are undone; see `_before`.

The blocks of its quantized types are those of GGUF, except in version 100 of the format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError, DependencyError
from ..models.tensors import Shape
from .stored import ConvertedTensor, StoredModel, StoredTensor, shares

MAGIC = b"fmgg"  # 0x67676d66, the lowest byte first

_HEADER = struct.Struct("<4s5i")
_TENSOR = struct.Struct("<3i")
_OLD_VERSION, _VERSION = 100, 101
_FLOATS = {0: "<f4", 1: "<f2"}
# By rwkv.cpp's numbers; those that are not here have been removed from it.
_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q5_0",
    8: "Q5_1",
    9: "Q8_0",
    11: "Q2_K",
    12: "Q3_K",
    13: "Q4_K",
    14: "Q5_K",
    15: "Q6_K",
}
_MAX_AXES = 3
_MAX_NAME_BYTES = 256
_STACKED = "rwkvag"
_LORA7 = tuple(f".att.{letter}{number}" for letter in "wavg" for number in "12")
_LORA6 = (".time_maa_w1", ".time_maa_w2", ".time_decay_w1", ".time_decay_w2")
# Units in the last place of an exponential's argument and result in which libraries may differ.
_ULPS = 4
_EPS = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class _MappedTensor:
    """A tensor where it is mapped: floats in their shape, or rows of blocks as bytes along the last axis."""

    data: NDArray[np.generic]
    dtype: str
    shape: Shape

    @property
    def readable(self) -> bool:
        return True

    def read(self, rows: slice) -> Tensor:
        """Some rows in float32."""
        if self.dtype in ("F32", "F16"):
            return torch.from_numpy(np.array(self.data[rows], np.float32))
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        numbers = dequantize(self.data[rows], GGMLQuantizationType[self.dtype])
        return torch.from_numpy(np.array(numbers, np.float32))


def read_ggml(path: Path) -> StoredModel:
    """The tensors of a model in rwkv.cpp's format.

    Raises:
        CheckpointError: it is cut off, damaged, or of a version or type that rwkv.cpp itself gave up.
        DependencyError: it is quantized and gguf is not installed.
    """
    # Not closed: the mapping lives as long as the tensors that look into it.
    content = np.memmap(path, np.uint8, "r")
    if content.size < _HEADER.size:
        raise _cut_off(path, "the header", _HEADER.size, content.size)
    _, version, n_vocab, n_embd, n_layers, _ = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version not in (_OLD_VERSION, _VERSION):
        raise CheckpointError(
            "is of a version of the ggml format that is not rwkv.cpp's",
            file=path,
            place="bytes 4 to 8",
            expected=f"{_OLD_VERSION} or {_VERSION}",
            found=version,
            remedy="give the .pth that it was made from",
        )
    raw: dict[str, _MappedTensor] = {}
    for name, tensor in _tensors(content, version, path):
        if name in raw:
            raise CheckpointError("holds a tensor twice", file=path, place=name[:100])
        raw[name] = tensor
    embedding = raw.get("emb.weight")
    if embedding is not None and embedding.shape != (n_vocab, n_embd):
        raise CheckpointError(
            "has an embedding of other axes than its header says",
            file=path,
            place="emb.weight",
            expected=[n_vocab, n_embd],
            found=list(embedding.shape),
        )
    layers = {name.split(".")[1] for name in raw if name.startswith("blocks.")}
    if len(layers) != n_layers:
        raise CheckpointError(
            "has another number of layers than its header says",
            file=path,
            place="bytes 16 to 20",
            expected=n_layers,
            found=len(layers),
            remedy="the file is incomplete or damaged: download it again, or convert the .pth again",
        )
    own: dict[str, StoredTensor] = {}
    convert = _converter(raw, n_embd)
    for name, tensor in raw.items():
        own.update(convert(name, tensor))
    return StoredModel("ggml", own, notes=_notes(raw))


def _tensors(content: NDArray[np.uint8], version: int, path: Path) -> Iterator[tuple[str, _MappedTensor]]:
    """Every tensor; nothing is allocated for one before it is known to lie in the file."""
    at = _HEADER.size
    while at < content.size:
        place = f"byte {at}"
        if at + _TENSOR.size > content.size:
            raise _cut_off(path, place, at + _TENSOR.size, content.size)
        n_axes, name_bytes, type_number = _TENSOR.unpack(content[at : at + _TENSOR.size].tobytes())
        at += _TENSOR.size
        if not 1 <= n_axes <= _MAX_AXES or not 1 <= name_bytes <= _MAX_NAME_BYTES:
            raise CheckpointError(
                "has no tensor where one must begin",
                file=path,
                place=place,
                expected=f"1 to {_MAX_AXES} axes and a name of 1 to {_MAX_NAME_BYTES} bytes",
                found=f"{n_axes} and {name_bytes}",
                remedy="the file is damaged: convert the .pth again",
            )
        named = at + 4 * n_axes
        if named + name_bytes > content.size:
            raise _cut_off(path, place, named + name_bytes, content.size)
        shape = tuple(reversed(struct.unpack(f"<{n_axes}i", content[at:named].tobytes())))
        name = content[named : named + name_bytes].tobytes().decode("utf-8", "replace")
        at = named + name_bytes
        row_bytes = _row_bytes(name, type_number, shape, version, path)
        size_bytes = row_bytes
        for size in shape[:-1]:
            size_bytes *= size
        if at + size_bytes > content.size:
            raise _cut_off(path, name[:100], at + size_bytes, content.size)
        data: NDArray[np.generic]
        if type_number in _FLOATS:
            data = np.ndarray(shape, _FLOATS[type_number], content, at)
        else:
            data = np.ndarray((*shape[:-1], row_bytes), np.uint8, content, at)
        yield name, _MappedTensor(data, _TYPES[type_number], shape)
        at += size_bytes


def _row_bytes(name: str, type_number: int, shape: Shape, version: int, path: Path) -> int:
    """Bytes of a tensor's numbers along its last axis."""
    old = type_number not in _FLOATS and version == _OLD_VERSION
    if type_number not in _TYPES or old:
        raise CheckpointError(
            "is quantized in a form that rwkv.cpp itself gave up in May 2023"
            if old
            else "has a tensor of unknown type",
            file=path,
            place=name[:100],
            expected="F32 or F16" if old else ", ".join(_TYPES.values()),
            found=f"type {type_number}",
            remedy="convert the .pth again with a newer rwkv.cpp, or give the .pth itself",
        )
    if min(shape) < 1:
        raise CheckpointError("has a tensor with an empty axis", file=path, place=name[:100], found=list(shape))
    if type_number in _FLOATS:
        return shape[-1] * np.dtype(_FLOATS[type_number]).itemsize
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise DependencyError(
            "gguf is not installed, which reading quantized tensors needs", file=path, remedy="pip install gguf"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[_TYPES[type_number]]]
    if shape[-1] % block:
        raise CheckpointError(
            "has rows that are no whole blocks",
            file=path,
            place=name[:100],
            expected=f"a multiple of {block} numbers",
            found=shape[-1],
        )
    return shape[-1] // block * block_bytes


def _cut_off(path: Path, place: str, expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        "is cut off",
        file=path,
        place=place,
        expected=f"at least {expected} bytes",
        found=f"{found} bytes",
        remedy="check that the download is complete",
    )


Renamed = Iterator[tuple[str, StoredTensor]]


def _converter(raw: dict[str, _MappedTensor], n_embd: int) -> Callable[[str, _MappedTensor], Renamed]:
    """What undoes the conversion of a version, which is told as the converter tells it."""
    if "blocks.0.att.k_k" in raw:
        return _from7
    if "blocks.0.att.time_maa_x" in raw:
        return partial(_from6, n_embd=n_embd)
    if "blocks.0.att.ln_x.weight" in raw:
        return partial(_from5, n_embd=n_embd, gated="blocks.0.att.gate.weight" in raw)
    return _from4


def _from4(name: str, stored: _MappedTensor) -> Renamed:
    if name.endswith(".time_decay"):
        yield name, ConvertedTensor(stored, stored.shape, _before(_minus_exp, lambda x: torch.log(-x)))
    else:
        yield name, stored


def _from5(name: str, stored: _MappedTensor, *, n_embd: int, gated: bool) -> Renamed:
    if not name.endswith((".time_decay", ".time_first", ".time_faaaa")):
        yield name, stored
        return
    shape = _by_head(stored.shape, n_embd, gated)
    if name.endswith(".time_decay"):
        yield name, ConvertedTensor(stored, shape, _before(_double_exp, lambda x: torch.log(-torch.log(x))))
    elif name.endswith(".time_first"):
        yield name, ConvertedTensor(stored, shape, _before(torch.exp, torch.log))
    else:
        yield name, ConvertedTensor(stored, shape, lambda tensor: tensor)


def _from6(name: str, stored: _MappedTensor, *, n_embd: int) -> Renamed:
    if name.endswith(_LORA6) and len(stored.shape) > 1:
        shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])
        yield name, ConvertedTensor(stored, shape, lambda tensor: tensor.transpose(-1, -2))
    elif name.endswith(".time_faaaa"):
        yield name, ConvertedTensor(stored, _by_head(stored.shape, n_embd, True), lambda tensor: tensor)
    elif name.endswith(".time_decay"):
        yield name, ConvertedTensor(stored, (int(np.prod(stored.shape)),), lambda tensor: tensor)
    else:
        yield name, stored


def _from7(name: str, stored: _MappedTensor) -> Renamed:
    if name.endswith(_LORA7) and len(stored.shape) == 2:
        yield name, ConvertedTensor(stored, stored.shape[::-1], lambda tensor: tensor.T)
    elif name.endswith(".att.x_rwkvag"):
        for letter, share in shares(stored, _STACKED).items():
            yield f"{name.removesuffix(_STACKED)}{letter}", share
    else:
        yield name, stored


def _by_head(shape: Shape, n_embd: int, gated: bool) -> Shape:
    """Axes of what is [heads, size] or [heads] in RWKV's own files, behind which the converter puts some of size 1.

    It drops the axis of a single head, which a gated model of n_embd heads would look like; there is none such.
    """
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return (1, n_embd) if gated and shape == (n_embd,) else shape


def _minus_exp(tensor: Tensor) -> Tensor:
    return -torch.exp(tensor)


def _double_exp(tensor: Tensor) -> Tensor:
    return torch.exp(-torch.exp(tensor))


def _before(forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What gives the numbers that `forward` was taken of.

    Released models are bfloat16 or float16: where all numbers are `forward` of such ones, they are exactly those;
    otherwise they are the nearest float32 to `inverse`, which an engine's exponentials take back to what was stored.
    Numbers that no `forward` gives become NaN, which are refused where they are read.
    """

    def recover(stored: Tensor) -> Tensor:
        # Beyond these the exponentials are 0 or 1, whatever is in them.
        wanted = inverse(stored.double()).clamp(-104.0, 104.0)
        for dtype in (torch.bfloat16, torch.float16):
            guess = wanted.to(dtype).float()
            given = forward(guess)
            near = _ULPS * _EPS * (1 + torch.exp(guess).clamp(max=1e4)) * stored.abs() + torch.finfo(torch.float32).tiny
            if bool(((given - stored).abs() <= near).all()):
                return guess
        return wanted.float()

    return recover


def _notes(raw: dict[str, _MappedTensor]) -> tuple[str, ...]:
    notes = []
    kinds = sorted({tensor.dtype for tensor in raw.values()} - {"F32", "F16"})
    if kinds:
        notes.append(
            f"the file's matrices were quantized by rwkv.cpp ({', '.join(kinds)}): the model is what that left of it"
        )
    if "blocks.0.att.ln_x.weight" in raw and "blocks.0.att.time_mix_k" in raw:
        notes.append(
            "rwkv.cpp runs RWKV-5 with a group norm's eps of 1e-5 where its authors' code has 64e-5, which is taken; "
            "--norm-eps 1e-5 gives rwkv.cpp's numbers"
        )
    return tuple(notes)
