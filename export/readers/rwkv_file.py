"""RWKV's own files: a ``.pth`` or a ``.safetensors``, memory-mapped, one tensor at a time.

A ``.pth`` is a pickle, but it is only ever read by torch's restricted unpickler, which builds tensors and refuses
everything else; no code from the file runs.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, DependencyError, UnsafeCheckpointError, first_line
from .stored import CONVERTED, WRAPPED, FloatTensor, StoredModel
from .webrwkv import undone
from .wrapped import check_alone, one_level, own_names

# What trainers keep beside a model, and what only holds values.
_HARMLESS: list[Any] = [argparse.Namespace]
_ZIP = b"PK\x03\x04"
# What torch's unpickler takes grows with the pickle, some hundred bytes of time and memory for each of its own. A
# tensor needs about 150 of them, so that this is room for 400,000 and for what trainers keep beside.
_MAX_PICKLE_BYTES = 64 << 20


def read_pth(path: Path) -> StoredModel:
    """The tensors of a ``.pth``.

    Raises:
        CheckpointError: it is not a readable dictionary of plain tensors, holds several models, or is one file out of
            a folder of transformers'.
        UnsafeCheckpointError: it is a pickle that would run code.
    """
    held, notes = load_pth_level(path)
    check_alone(held, path)
    tensors, more = own_names(held, path)
    return StoredModel(
        "pth",
        {name: FloatTensor(tensor) for name, tensor in tensors.items()},
        notes=notes + more,
        only_here=WRAPPED if notes or tensors.keys() != held.keys() else None,
    )


def read_safetensors(path: Path) -> StoredModel:
    """The tensors of a ``.safetensors`` file in RWKV's own names, or web-rwkv's.

    Raises:
        CheckpointError: it is not readable, holds several models, may mean two things, or is one file out of a folder
            of transformers'.
        TensorShapeError: some of it lies as RWKV's own files do and some as web-rwkv's.
        DependencyError: safetensors is not installed.
    """
    held = load_safetensors(path)
    check_alone(held, path)
    tensors, notes = own_names(held, path)
    own, more = undone({name: FloatTensor(tensor) for name, tensor in tensors.items()}, path)
    only_here = CONVERTED if more else WRAPPED if tensors.keys() != held.keys() else None
    return StoredModel("safetensors", own, notes=notes + more, only_here=only_here)


def load_pth(path: Path) -> dict[str, Tensor]:
    """As `read_pth`, as torch's own tensors; for files of any names, which are kept."""
    return load_pth_level(path)[0]


def load_pth_level(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """As `load_pth`, and what there is to say about the rest of the file."""
    archive = _is_archive(path)
    # Of a path torch takes the ending for the form, and maps nothing but a path.
    mapped = archive and path.suffix.lower() != ".safetensors"
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
            warnings.simplefilter("ignore")
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower() or "unsupported class" in str(error).lower():
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UnsafeCheckpointError(
                "is a pickle that does more than hold tensors, and goslet never runs code from a file",
                file=path,
                expected="a dictionary of tensors",
                found=wanted and f"a call of {wanted[1][:100]}",
                remedy="where you trust who made it, load it with the program that saved it, and save its state_dict "
                "alone with torch.save, or as .safetensors",
            ) from error
        raise _unreadable_pth(path, archive, error) from error
    except Exception as error:  # a damaged pickle can fail anywhere in torch
        raise _unreadable_pth(path, archive, error) from error
    tensors, notes = one_level(content, path)
    for name, tensor in tensors.items():
        _check_plain(name, tensor, path)
    return tensors, notes


def _is_archive(path: Path) -> bool:
    """Whether it is a zip archive, whole and of records that hold their bytes as they are.

    torch maps the archive and takes every record's bytes where they lie, whatever packed them.

    Raises:
        CheckpointError: the directory is damaged, it is an archive of other things, a record is compressed or
            encrypted, or the pickle is too large.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # a damaged directory can fail anywhere in zipfile
        raise _damaged_pth(path, error) from error
    names = [record.filename for record in records]
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            "is a zip archive of other things, not what torch.save writes",
            file=path,
            expected="data.pkl in it",
            found=", ".join(name[:40] for name in names[:3]),
            remedy="unpack it, and give the checkpoint inside",
        )
    if any("/code/" in name for name in names):
        raise CheckpointError(
            "is a TorchScript program, not a checkpoint",
            file=path,
            remedy="save its state_dict with torch.save, or as .safetensors",
        )
    for record in records:
        encrypted = record.flag_bits & 1
        if encrypted or record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise CheckpointError(
                "was packed again by another program than torch, which stores every record as it is",
                file=path,
                place=record.filename[:100],
                expected="a stored record",
                found="an encrypted one" if encrypted else "a compressed one",
                remedy="load it with torch.load and save it with torch.save again, or pack it without compression "
                "(zip -0)",
            )
        if record.filename.endswith("data.pkl") and record.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(
                "has a pickle that is too large for the names of a model's tensors",
                file=path,
                place=record.filename[:100],
                expected=f"at most {_MAX_PICKLE_BYTES} bytes",
                found=f"{record.file_size} bytes",
                remedy="save the model's state_dict alone",
            )
    return True


def _unreadable_pth(path: Path, archive: bool, error: Exception) -> CheckpointError:
    """Why torch failed. A zip archive's directory is at its end: where that is missing, the file was cut off."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    ended = isinstance(error, EOFError) or "EOF" in str(error) or "ran out of input" in str(error).lower()
    if (zipped and not archive) or (not zipped and ended):
        return CheckpointError(
            "is a .pth file that is cut off",
            file=path,
            expected="the archive's directory at its end" if zipped else "the pickle's end",
            found=f"{path.stat().st_size} bytes",
            remedy="check that the download is complete",
        )
    return _damaged_pth(path, error)


def _damaged_pth(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"is not a readable .pth file: {first_line(error)}",
        file=path,
        remedy="it is damaged, or holds something else than torch.save writes: compare its checksum with its source's",
    )


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


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """As `read_safetensors`, as torch's own tensors; for files of any names, which are kept."""
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
        wanted = _safetensors_bytes(path)
        if wanted is not None and wanted > path.stat().st_size:
            raise CheckpointError(
                "is a .safetensors file that is cut off",
                file=path,
                expected=f"{wanted} bytes, by its header",
                found=f"{path.stat().st_size} bytes",
                remedy="check that the download is complete",
            ) from error
        raise CheckpointError(
            f"is not a readable .safetensors file: {first_line(error)}",
            file=path,
            remedy="it is damaged: compare its checksum with its source's",
        ) from error


def _safetensors_bytes(path: Path) -> int | None:
    """How long a file is by its own header, None where that says nothing."""
    try:
        with path.open("rb") as file:
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            if header_bytes > path.stat().st_size:
                return None
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return int(8 + header_bytes + max(int(end) for end in ends))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error):
        return None
