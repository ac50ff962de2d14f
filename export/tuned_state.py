"""Tuned initial states: what RWKV's trainers save as ``blocks.N.att.time_state`` when they tune nothing but the state.

Such a file holds one matrix [head, value, key] for every layer, of whatever version. That is RWKV-7's own state; those
of 5 and 6 are [head, key, value] in PyPI's ``rwkv`` and here, so there it is turned. (RWKV-PEFT also turns it in
version 7, but for a kernel whose interface is [key, value] in every version.) The same tensors may lie in an adapter,
or beside the model's own in a checkpoint that they were merged into.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CheckpointError, MissingTensorError, TensorShapeError, TensorValueError
from ..spec import ModelSpec
from .models.tensors import TIME_STATE, squeezed
from .readers.beside import load_beside
from .readers.stored import FloatTensor, StoredTensor


def read_tuned_state(
    path: str | os.PathLike[str], spec: ModelSpec, *, note: Callable[[str], None] | None = None
) -> dict[str, NDArray[np.float32]]:
    """The state's matrices in a model's own layout, float32 [H, N, N] by name (``0.wkv`` and so on).

    Args:
        path: a ``.pth`` or ``.safetensors`` file with ``blocks.N.att.time_state`` for every layer, or a ``.st`` of
            web-rwkv's (`goslet.export.readers.beside`), told apart by content; other tensors in it are not read.
        spec: the model that it was tuned for.
        note: called with each sentence that there is to say about how the file was read.

    Raises:
        CheckpointError: the file cannot be read, or the model is an RWKV-4, which has no such states.
        MissingTensorError, TensorShapeError, TensorValueError: a layer's matrix is not there, has another shape than
            the model's, or is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("is no file", file=path, remedy="check the path")
    tensors, notes, _ = load_beside(path)
    matrices = state_matrices({name: FloatTensor(tensor) for name, tensor in tensors.items()}, spec, path)
    if note is not None:
        for said in notes:
            note(said)
    return matrices


def state_matrices(tensors: Mapping[str, StoredTensor], spec: ModelSpec, path: Path) -> dict[str, NDArray[np.float32]]:
    """As `read_tuned_state`, from the tensors of the file `path`."""
    if spec.version == "4":
        raise CheckpointError("is for a model with matrix states, which RWKV-4 is not", file=path, place=TIME_STATE[1:])
    wanted = (spec.n_head, spec.head_size, spec.head_size)
    matrices = {}
    for layer in range(spec.n_layer):
        name = f"blocks.{layer}{TIME_STATE}"
        if name not in tensors:
            raise MissingTensorError(
                "holds no tuned state of a layer",
                file=path,
                place=name,
                expected=f"one of each of {spec.n_layer} layers",
                found=", ".join(sorted(tensors)[:3])[:100] or "nothing",
                remedy="give the file that state tuning saved for this model",
            )
        if squeezed(tensors[name].shape) != squeezed(wanted):
            raise TensorShapeError(
                "is the state of another model",
                file=path,
                place=name,
                expected=list(wanted),
                found=list(tensors[name].shape),
            )
        matrix = tensors[name].read(slice(None)).reshape(wanted)
        if not spec.version.startswith("7"):
            matrix = matrix.transpose(1, 2).contiguous()
        if not torch.isfinite(matrix).all():
            raise TensorValueError("a tensor holds NaN or infinity", file=path, place=name, expected="finite numbers")
        matrices[f"{layer}.wkv"] = matrix.numpy()
    if any(name.startswith(f"blocks.{spec.n_layer}.") for name in tensors):
        raise CheckpointError("is the state of a model with more layers", file=path, expected=f"{spec.n_layer} layers")
    return matrices
