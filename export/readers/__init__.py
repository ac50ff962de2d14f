"""Reading checkpoints, one file for each form that people have; `read_model` tells them apart by content."""

from __future__ import annotations

from pathlib import Path

from .ggml_file import read_ggml
from .gguf_file import read_gguf
from .hf_folder import read_folder
from .kinds import kind_of
from .rwkv_file import read_pth, read_safetensors
from .stored import OnlyHere, StoredModel, StoredTensor

__all__ = ["OnlyHere", "StoredModel", "StoredTensor", "read_model"]

_READERS = {"pth": read_pth, "safetensors": read_safetensors, "gguf": read_gguf, "ggml": read_ggml}


def read_model(path: Path) -> StoredModel:
    """The tensors of a checkpoint, under RWKV's own names.

    Raises:
        CheckpointError: it is of none of the known forms, or not readable.
    """
    kind = kind_of(path)
    return read_folder(path, read_model) if kind == "hf" else _READERS[kind](path)
