"""Reading checkpoints: RWKV ``.pth`` and ``.safetensors`` files, memory-mapped, one tensor at a time.

A ``.pth`` is a pickle, but it is only ever read by torch's restricted unpickler, which builds tensors and refuses
everything else; no code from the file runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import (
    CheckpointError,
    DependencyError,
    ExtraTensorError,
    HeaderError,
    MissingTensorError,
    TensorShapeError,
    TensorValueError,
    UnsafeCheckpointError,
    first_line,
)
from ..spec import EMBEDDING, ModelSpec
from .models import recognise
from .models.blocks import Shape, TensorRule, Version, squeezed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint whose every tensor has the name, shape and dtype that its version expects.

    Attributes:
        path: the file.
        format: ``"pth"`` or ``"safetensors"``.
        version: the RWKV version's module.
        spec: the model's dimensions.
        rules: the tensors that the version needs.
    """

    path: Path
    format: str
    version: Version
    spec: ModelSpec
    rules: tuple[TensorRule, ...]
    _tensors: Mapping[str, Tensor]

    def stored(self, rule: TensorRule) -> Tensor:
        """The tensor in its stored shape (matrices [out, in]) in float32, copied out of the file.

        Raises:
            TensorValueError: it holds NaN or infinity.
        """
        tensor = self._tensors[rule.name].detach().to(torch.float32)
        tensor = tensor.reshape(rule.shape if rule.is_matrix else rule.stored_shape)
        finite = torch.isfinite(tensor)
        if not finite.all():
            index = [int(i) for i in torch.nonzero(~finite)[0]]
            raise TensorValueError(
                "a tensor holds NaN or infinity",
                file=self.path,
                place=f"{rule.name}{index}",
                expected="finite numbers",
                found=float(tensor[tuple(index)]),
                remedy="the checkpoint is damaged or its training diverged; use another",
            )
        return tensor.T.contiguous() if rule.is_matrix and rule.input_first else tensor

    def weights(self) -> dict[str, Tensor]:
        """Every tensor by name, as `stored` gives it."""
        return {rule.name: self.stored(rule) for rule in self.rules}

    def for_engine(self, rule: TensorRule) -> Tensor:
        """The tensor as an engine stores it: the embedding with everything folded in, others as `stored` gives them."""
        if rule.name != EMBEDDING:
            return self.stored(rule)
        needed = self.version.folded(self.spec) | {EMBEDDING}
        weights = {rule.name: self.stored(rule) for rule in self.rules if rule.name in needed}
        return self.version.fold_embedding(weights, self.spec)

    def model_id(self) -> str:
        """The model's id: SHA-256, as 64 hex digits, of its names, stored shapes and float32 values in name order.

        Files of another dtype that hold the same values, and every quantization of the model, share it.
        """
        digest = hashlib.sha256(b"goslet model 1\n")
        for rule in sorted(self.rules, key=lambda rule: rule.name):
            digest.update(json.dumps([rule.name, list(rule.stored_shape)]).encode() + b"\n")
            digest.update(self.stored(rule).contiguous().numpy().data.cast("B"))
        return digest.hexdigest()


@contextmanager
def open_checkpoint(path: str | os.PathLike[str], *, norm_eps: float | None = None) -> Iterator[Checkpoint]:
    """Open and recognise a checkpoint.

    Args:
        path: an RWKV ``.pth`` or ``.safetensors`` file; told apart by content, not by name.
        norm_eps: eps of the per-head group norm, where the checkpoint was trained with another than its version's.

    Raises:
        CheckpointError: the file cannot be read or is not a known model.
        UnsafeCheckpointError: the file is a pickle that would run code.
        MissingTensorError, ExtraTensorError, TensorShapeError: the tensors are not those that the version needs.
    """
    path = Path(path)
    format_name = _sniff(path)
    tensors = _read_pth(path) if format_name == "pth" else _read_safetensors(path)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        version = recognise(shapes)
        spec = _checked(version.read_spec(shapes, norm_eps))
        rules = version.tensor_rules(spec)
        _validate(rules, shapes, version.unused(spec))
    except CheckpointError as error:
        raise _in_file(error, path) from None
    for rule in rules:
        dtype = tensors[rule.name].dtype
        if dtype not in DTYPES:
            raise CheckpointError(
                "a tensor has a dtype that goslet does not read",
                file=path,
                place=rule.name,
                expected="float32, float16 or bfloat16",
                found=str(dtype).removeprefix("torch."),
            )
    yield Checkpoint(path, format_name, version, spec, rules, tensors)


def _in_file(error: CheckpointError, path: Path) -> CheckpointError:
    return type(error)(
        error.problem, file=path, place=error.place, expected=error.expected, found=error.found, remedy=error.remedy
    )


def _sniff(path: Path) -> str:
    try:
        size_bytes = path.stat().st_size
        if path.is_dir():
            raise CheckpointError("is a folder", file=path, expected="a .pth or .safetensors file")
        if not path.is_file():
            raise CheckpointError("is not a regular file", file=path, expected="a .pth or .safetensors file")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=path, remedy="check the path and its permissions"
        ) from None
    if not head:
        raise CheckpointError("is empty", file=path, expected="a .pth or .safetensors file", found="0 bytes")
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size_bytes:
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pth"
    raise CheckpointError(
        "is neither a .pth nor a .safetensors file, or is cut off",
        file=path,
        place="byte 0",
        expected="a zip archive, a pickle or a safetensors header",
        found=head[:8].hex(" "),
        remedy="check that the download is complete",
    )


def _read_pth(path: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UnsafeCheckpointError(
                "is a pickle that does more than hold tensors, and goslet never runs code from a file",
                file=path,
                expected="a dictionary of tensors",
                remedy="save its state_dict with torch.save, or as .safetensors",
            ) from error
        raise CheckpointError("is not a readable .pth file", file=path, remedy="download it again") from error
    except Exception as error:  # a damaged pickle can fail anywhere in torch
        raise CheckpointError(
            f"is not a readable .pth file: {first_line(error)}",
            file=path,
            remedy="check that the download is complete",
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            "does not hold a dictionary of tensors", file=path, expected="name → tensor", found=type(content).__name__
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                "holds something that is not a tensor",
                file=path,
                place=str(name),
                expected="a tensor",
                found=type(tensor).__name__,
                remedy="save the model's state_dict alone",
            )
        _check_plain(name, tensor, path)
    return dict(content)


def _check_plain(name: str, tensor: Tensor, path: Path) -> None:
    """Only tensors whose numbers all lie in the file: a view can claim to be far larger than what was stored."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    if not plain or tensor.is_neg() or tensor.is_conj() or tensor.is_quantized:
        raise CheckpointError("is not a plain tensor", file=path, place=name, expected="a dense one on the CPU")
    size_bytes = tensor.numel() * tensor.element_size()
    if size_bytes > path.stat().st_size:
        raise CheckpointError(
            "a tensor is larger than the file",
            file=path,
            place=name,
            expected=f"at most {path.stat().st_size} bytes",
            found=f"{size_bytes} bytes",
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise DependencyError(
            "safetensors is not installed, which reading this file needs", file=path, remedy="pip install safetensors"
        ) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, RuntimeError, ValueError, OSError, AttributeError) as error:
        raise CheckpointError(
            f"is not a readable .safetensors file: {first_line(error)}",
            file=path,
            remedy="check that the download is complete",
        ) from error


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + rest


def _checked(spec: ModelSpec) -> ModelSpec:
    try:
        return ModelSpec.from_json(spec.to_json(), place="dimensions")
    except HeaderError as error:
        raise CheckpointError(
            "a dimension is out of range", place=error.place, expected=error.expected, found=error.found
        ) from error


def _validate(rules: tuple[TensorRule, ...], shapes: Mapping[str, Shape], unused: frozenset[str]) -> None:
    expected = {rule.name: rule.shape for rule in rules}
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise MissingTensorError(
            "the checkpoint lacks a tensor" if len(missing) == 1 else f"the checkpoint lacks {len(missing)} tensors",
            place=_listed(missing),
            expected=f"{missing[0]} of shape {list(expected[missing[0]])}",
            found="nothing",
            remedy="the file is incomplete or of another version",
        )
    for name, shape in expected.items():
        if squeezed(shapes[name]) != squeezed(shape):
            raise TensorShapeError(
                "a tensor has the wrong shape",
                place=name,
                expected=list(shape),
                found=list(shapes[name]),
                remedy="the file is damaged or of another version",
            )
    extra = [name for name in shapes if name not in expected and name not in unused]
    if extra:
        raise ExtraTensorError(
            "a tensor is not known to this version" if len(extra) == 1 else f"{len(extra)} tensors are not known",
            place=_listed(extra),
            expected="nothing more",
            found=f"{extra[0]} of shape {list(shapes[extra[0]])}",
            remedy="the file is of another version, or holds an adapter or optimizer state besides the model",
        )
