"""GGUF files as llama.cpp writes them, for RWKV-6 and 7, split ones too: mapped, and dequantized tensor by tensor.

`gguf_header` reads what a file says of itself, `gguf_names` and `gguf_keys` what names and keys mean, and
`gguf_vocabulary` the tokens. Which types can be dequantized is for the package gguf to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError, DependencyError, MissingTensorError, TensorShapeError
from ..models.tensors import Shape
from .gguf_header import GgufEntry, GgufHeader, read_header
from .gguf_keys import HEAD_SIZE, RESCALE, settings
from .gguf_names import ARCHITECTURES, from_gguf
from .gguf_vocabulary import vocabulary
from .stored import StoredModel, StoredTensor

# Those that lie in the file as numbers; all others are blocks of bytes that only gguf's tables know.
_PLAIN_NUMBERS = {"F32": "f4", "F16": "f2"}
_NO_BLOCKS = frozenset({*_PLAIN_NUMBERS, "BF16"})
# How llama.cpp counts types that the package may be too old to know.
_NEWER_TYPES = {41: "Q1_0", 42: "Q2_0"}
_HYBRIDS = {"rwkv6qwen2": "RWKV-6", "arwkv7": "RWKV-7"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.ASCII)
_REQUANTIZE = "make the file again as F16, BF16 or Q8_0"


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor where it is mapped; `data` has its rows along the first axes, those of blocks as bytes."""

    data: NDArray[Any]
    kind: Any
    shape: Shape
    readable: bool = True

    @property
    def dtype(self) -> str:
        return str(self.kind.name)

    def read(self, rows: slice) -> Tensor:
        """Some rows in float32, whatever the order of their bytes."""
        if self.dtype in _PLAIN_NUMBERS:
            # The mapped array knows the order of its bytes, which gguf's own conversion drops.
            return torch.from_numpy(np.array(self.data[rows], np.float32))
        if len(self.shape) == 1:
            return _decoded(self.data, self.kind)[rows]  # its rows are numbers, which begin within a block
        return _decoded(self.data[rows], self.kind)


def _decoded(data: NDArray[np.uint8], kind: Any) -> Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(np.ascontiguousarray(data), kind), np.float32))


def read_gguf(path: Path) -> StoredModel:
    """The tensors of an RWKV-6 or 7 in GGUF; of a split model all parts, whichever is given.

    Raises:
        CheckpointError: it is damaged, of another architecture, or contradicts itself.
        MissingTensorError: a part of a split model is missing.
        TensorShapeError: a tensor has not the axes that llama.cpp gives it.
        DependencyError: gguf is not installed.
    """
    try:
        import gguf  # noqa: F401 - its tables are used later, and a missing package is said at once
    except ModuleNotFoundError as error:
        raise DependencyError(
            "gguf is not installed, which reading this file needs", file=path, remedy="pip install gguf"
        ) from error
    parts = _parts(read_header(path))
    header = parts[0]
    architecture = _architecture(header)
    head_size = header.number(f"{architecture}.{HEAD_SIZE}", 0)
    if head_size < 1:
        raise CheckpointError(
            "has no size of heads",
            file=header.path,
            place=f"{architecture}.{HEAD_SIZE}",
            expected="a number above 0",
            found=head_size,
            remedy="convert the model again from its .pth or folder",
        )
    rescale = header.number(f"{architecture}.{RESCALE}", 0)
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        _check_places(part)
        for entry in part.entries:
            stored = _stored(part, entry, header)
            try:
                for name, renamed in from_gguf(entry.name, stored, architecture, head_size, rescale):
                    if name in tensors:
                        raise CheckpointError(
                            "two tensors stand for one", file=part.path, place=entry.name[:100], found=name[:100]
                        )
                    tensors[name] = renamed
            except TensorShapeError as error:
                raise TensorShapeError(
                    error.problem, file=part.path, place=entry.name[:100], expected=error.expected, found=error.found
                ) from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    said = settings(header.values, architecture, head_size, shapes, header.path)
    tokenizer, notes = vocabulary(header.values, header.path)
    return StoredModel(
        "gguf", tensors, layer_norm_eps=said.layer_norm_eps, tokenizer=tokenizer, notes=(*said.notes, *notes)
    )


def _architecture(header: GgufHeader) -> str:
    """What kind of model it is, which is one of ours."""
    found = str(header.values.get("general.architecture", ""))
    if header.values.get("general.type", "model") != "model":
        raise CheckpointError(
            "is no model",
            file=header.path,
            place="general.type",
            expected="model",
            found=str(header.values["general.type"])[:60],
            remedy="give the model's own file; adapters are merged from a trainer's file (--adapter)",
        )
    if found in _HYBRIDS:
        raise CheckpointError(
            f"is a hybrid, an attention model's network around {_HYBRIDS[found]}'s recurrence (QRWKV, ARWKV)",
            file=header.path,
            place="general.architecture",
            expected=" or ".join(ARCHITECTURES),
            found=found,
            remedy="goslet reads RWKV models themselves; llama.cpp runs this one",
        )
    if found not in ARCHITECTURES:
        raise CheckpointError(
            "is of an architecture that goslet does not read from GGUF",
            file=header.path,
            place="general.architecture",
            expected=" or ".join(ARCHITECTURES),
            found=found[:60] or "nothing",
            remedy="give an RWKV-6 or 7, or another version as .pth or .safetensors",
        )
    return found


def _parts(given: GgufHeader) -> list[GgufHeader]:
    """All parts of a split model in their order, found beside the one that is given by their names."""
    count = given.number("split.count", 0)
    if count < 2:
        return [given]
    number, path = given.number("split.no", 0), given.path
    found = _PART.fullmatch(path.name)
    if found is None or (int(found[2]), int(found[3])) != (number + 1, count):
        raise CheckpointError(
            "is a part of a split model, and its name does not say which, so that the others cannot be found",
            file=path,
            expected=f"a name that ends in -{number + 1:05}-of-{count:05}.gguf",
            found=path.name[-60:],
            remedy="give the parts their own names back",
        )
    paths = [path.with_name(f"{found[1]}-{index + 1:05}-of-{count:05}.gguf") for index in range(count)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise MissingTensorError(
            "a part of the model is missing" if len(missing) == 1 else f"{len(missing)} parts of the model are missing",
            file=path,
            place=missing[0],
            expected=f"{count} parts beside each other",
            found=count - len(missing),
            remedy="download all parts into one folder",
        )
    parts = [given if index == number else read_header(part) for index, part in enumerate(paths)]
    for index, part in enumerate(parts):
        said = part.number("split.no", 0), part.number("split.count", 0)
        if said != (index, count):
            raise CheckpointError(
                "is a part of another model",
                file=part.path,
                place="split.no, split.count",
                expected=f"{index}, {count}",
                found=f"{said[0]}, {said[1]}",
                remedy="download all parts of the model again",
            )
        _check_same(part, parts[0], "general.architecture")
        _check_same(part, given, "split.tensors.count")
    told, held = given.number("split.tensors.count", 0), sum(len(part.entries) for part in parts)
    if "split.tensors.count" in given.values and told != held:
        raise CheckpointError(
            "the parts are not of one model, or not all of its tensors",
            file=path,
            place="split.tensors.count",
            expected=told,
            found=held,
            remedy="download all parts of the model again",
        )
    return parts


def _check_same(part: GgufHeader, other: GgufHeader, key: str) -> None:
    """Where both say it."""
    if key in part.values and key in other.values and part.values[key] != other.values[key]:
        raise CheckpointError(
            "is a part of another model",
            file=part.path,
            place=key,
            expected=str(other.values[key])[:60],
            found=str(part.values[key])[:60],
            remedy="download all parts of the model again",
        )


def _stored(part: GgufHeader, entry: GgufEntry, first: GgufHeader) -> _GgufTensor:
    """A tensor, mapped; `first` is the part that has the keys."""
    import gguf

    kind = _kind(part, entry)
    if kind.name not in _PLAIN_NUMBERS and part.byte_order == ">":
        # Some writers swap the scales within blocks, others do not.
        raise CheckpointError(
            "is a big-endian GGUF with quantized tensors, in which writers differ",
            file=part.path,
            place=entry.name[:100],
            expected="F32 or F16 in this byte order",
            found=kind.name,
            remedy="convert the model again without --bigendian, or to F16",
        )
    version = first.values.get("general.quantization_version", gguf.GGML_QUANT_VERSION)
    if kind.name not in _NO_BLOCKS and version != gguf.GGML_QUANT_VERSION:
        raise CheckpointError(
            "is quantized in another version of ggml's formats",
            file=first.path,
            place="general.quantization_version",
            expected=gguf.GGML_QUANT_VERSION,
            found=str(version)[:60],
            remedy="quantize the model again",
        )
    data = part.data[entry.start_bytes : entry.start_bytes + _size_bytes(entry, kind)]
    if kind.name in _PLAIN_NUMBERS:
        dtype = np.dtype(part.byte_order + _PLAIN_NUMBERS[kind.name])
        return _GgufTensor(data.view(dtype).reshape(entry.shape), kind, entry.shape)
    return _GgufTensor(data.reshape(*entry.shape[:-1], -1), kind, entry.shape)


def _kind(part: GgufHeader, entry: GgufEntry) -> Any:
    """The tensor's type as gguf knows it, which can be read and fits its shape."""
    import gguf

    number = entry.type_number
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        known = f", {_NEWER_TYPES[number]} in llama.cpp" if number in _NEWER_TYPES else ""
        raise CheckpointError(
            "a tensor is of a type that the package gguf does not know",
            file=part.path,
            place=entry.name[:100],
            expected=_readable_types(),
            found=f"type {number}{known}",
            remedy=f"{_REQUANTIZE}, or try a newer gguf (pip install --upgrade gguf)",
        ) from None
    if kind.name not in _PLAIN_NUMBERS and not _dequantizes(kind):
        raise CheckpointError(
            "a tensor is of a type that the package gguf does not decode",
            file=part.path,
            place=entry.name[:100],
            expected=_readable_types(),
            found=kind.name,
            remedy=_REQUANTIZE,
        )
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if entry.shape[-1] % block:
        raise TensorShapeError(
            "a tensor's rows are not whole blocks",
            file=part.path,
            place=entry.name[:100],
            expected=f"a multiple of {block}, for {kind.name}",
            found=entry.shape[-1],
        )
    return kind


def _size_bytes(entry: GgufEntry, kind: Any) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(entry.shape) // block * block_bytes


@cache
def _dequantizes(kind: Any) -> bool:
    """Whether gguf's tables decode a type; asked with a block of zeros."""
    import gguf

    try:
        with np.errstate(all="ignore"):
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _readable_types() -> str:
    import gguf

    types: Iterable[Any] = gguf.GGMLQuantizationType
    return ", ".join(kind.name for kind in types if kind.name in _PLAIN_NUMBERS or _dequantizes(kind))


def _check_places(part: GgufHeader) -> None:
    """Every tensor in the file, and none in another's place."""
    end, before, size_bytes = 0, "the header", len(part.data)
    for entry in sorted(part.entries, key=lambda entry: entry.start_bytes):
        if entry.start_bytes < end:
            raise CheckpointError(
                "a tensor lies over another", file=part.path, place=entry.name[:100], found=before[:100]
            )
        end, before = entry.start_bytes + _size_bytes(entry, _kind(part, entry)), entry.name
        if end > size_bytes:
            raise CheckpointError(
                "a tensor ends behind the file",
                file=part.path,
                place=before[:100],
                expected=f"at most {size_bytes} bytes",
                found=f"{end} bytes",
                remedy="check that the download is complete",
            )
