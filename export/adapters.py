"""Adapters: what fine-tuning saves beside a model, merged into its tensors as they are read.

The forms are those of RWKV's trainers (RWKV-PEFT, RWKV-LM-LoRA). Of a matrix W [out, in] called ``X.weight``:

- LoRA: ``X.lora_A`` [r, in] and ``X.lora_B`` [out, r]; W + alpha / r · B·A. The alpha of training is not in the file.
- bone and DiSHA: ``X.bone`` or ``X.disha`` D [r, out]; W[o, i] + D[i mod r, o]: every r inputs share D.
- bat, which older files also call bone: the same names, M [in / r, r, r]; with W cut into blocks W_ab of r rows and
  columns, each becomes W_ab + W_ab·M_b + M_b.
- Any tensor under the model's own name, trained as a whole, takes the model's place; and ``blocks.N.att.time_state``
  is a tuned initial state (`goslet.export.tuned_state`).

PiSSA's files look like LoRA's, but their products are to be added to a model that other matrices were taken from; merge
those with their trainer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import (
    CheckpointError,
    ExtraTensorError,
    InputError,
    MissingTensorError,
    TensorShapeError,
    TensorValueError,
)
from .models.tensors import TIME_STATE, squeezed
from .readers.rwkv_file import load_pth, load_safetensors
from .readers.stored import ConvertedTensor, FloatTensor, StoredModel, StoredTensor

Merge = Callable[[Tensor], Tensor]

_LORA = (".lora_A", ".lora_B")
_BLOCKS = (".bone", ".disha")


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by name, each plain and finite.

    Attributes:
        path: the file.
        alpha: what LoRA's products are multiplied by, times 1 / r; None where it is not known.
        tensors: float32, by the file's names.
    """

    path: Path
    alpha: float | None
    tensors: dict[str, Tensor]


def read_adapter(path: str | os.PathLike[str] | None, alpha: float | None) -> Adapter | None:
    """Read an adapter; it meets its model in `merged`.

    Args:
        path: a ``.pth`` or ``.safetensors`` file; None for no adapter, and then None is returned.
        alpha: the ``lora_alpha`` of training; for LoRA alone.

    Raises:
        CheckpointError: the file cannot be read, or is no adapter.
        TensorValueError: a tensor is not finite.
        InputError: alpha is not a positive number, is missing although the file holds LoRA, or given although it holds
            none or there is no file.
    """
    if path is None:
        if alpha is not None:
            raise InputError("is given without an adapter", place="alpha", remedy="give the adapter, or leave it out")
        return None
    path = Path(path)
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InputError("is not a positive number", place="alpha", found=alpha)
    if not path.is_file():
        raise CheckpointError("is no file", file=path, remedy="check the path")
    tensors = load_safetensors(path) if path.suffix == ".safetensors" else load_pth(path)
    if not tensors:
        raise CheckpointError("holds no tensor", file=path, expected="an adapter")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or not torch.isfinite(tensor.float()).all():
            raise TensorValueError("is not finite numbers", file=path, place=name[:100], found=str(tensor.dtype))
    has_lora = any(name.endswith(_LORA) for name in tensors)
    if has_lora and alpha is None:
        raise InputError(
            "is needed to merge a LoRA, whose file does not say it",
            file=path,
            place="alpha",
            remedy="give the lora_alpha of training (--alpha)",
        )
    if not has_lora and alpha is not None:
        raise InputError(
            "belongs to a LoRA, which this adapter is not", file=path, place="alpha", remedy="leave it out"
        )
    return Adapter(path, alpha, {name: tensor.detach().float() for name, tensor in tensors.items()})


def merged(model: StoredModel, adapter: Adapter) -> StoredModel:
    """A model with the adapter in it; nothing is computed before a tensor is read.

    Raises:
        CheckpointError: the file is a whole model, of which nothing of this one would be left.
        MissingTensorError: half of a LoRA is missing.
        ExtraTensorError: the adapter changes a tensor that the model does not have.
        TensorShapeError: a tensor does not fit the one that it changes, or the two of a LoRA have different ranks.
    """
    if model.tensors.keys() <= adapter.tensors.keys():
        raise CheckpointError(
            "is a whole model, not an adapter of one",
            file=adapter.path,
            expected="some of the model's tensors, or changes of them",
            remedy="export it by itself",
        )
    tensors = dict(model.tensors)
    # Whole tensors first: a change of one that is there too is a change of what took the model's place.
    for name, tensor in sorted(adapter.tensors.items(), key=lambda item: item[0].endswith((*_LORA, *_BLOCKS))):
        stem, dot, kind = name.rpartition(".")
        suffix = dot + kind
        if suffix == _LORA[1] and stem + _LORA[0] in adapter.tensors:
            continue  # merged with its other half
        target = stem + ".weight" if suffix in (*_LORA, *_BLOCKS) else name
        known = f"{name.removesuffix(TIME_STATE)}.ln1.weight" if name.endswith(TIME_STATE) else target
        if known not in tensors:
            raise ExtraTensorError(
                "the adapter changes a tensor that the model does not have",
                file=adapter.path,
                place=name[:100],
                expected="tensors of the model, or their lora_A and lora_B, bone or disha",
                remedy="it belongs to another model or version, or is of a form that goslet does not merge",
            )
        if suffix in _LORA:
            tensors[target] = _changed(tensors[target], _lora(adapter, stem, tensors[target]))
        elif suffix in _BLOCKS:
            tensors[target] = _changed(tensors[target], _blocks(adapter, name, tensors[target]))
        else:
            if target in tensors and squeezed(tensors[target].shape) != squeezed(tensor.shape):
                raise _misfit(adapter, name, list(tensors[target].shape))
            tensors[target] = FloatTensor(tensor)
    return replace(model, tensors=tensors)


def _changed(base: StoredTensor, merge: Merge) -> StoredTensor:
    return ConvertedTensor(base, base.shape, merge)


def _misfit(adapter: Adapter, name: str, expected: object) -> TensorShapeError:
    return TensorShapeError(
        "the adapter does not fit the model",
        file=adapter.path,
        place=name[:100],
        expected=expected,
        found=list(adapter.tensors[name].shape),
        remedy="use the model that it was trained on",
    )


def _matrix(adapter: Adapter, name: str, base: StoredTensor) -> tuple[int, int]:
    if len(base.shape) != 2:
        raise _misfit(adapter, name, "a change of a matrix")
    return base.shape[0], base.shape[1]


def _lora(adapter: Adapter, stem: str, base: StoredTensor) -> Merge:
    for suffix, other in (_LORA, _LORA[::-1]):
        if stem + suffix not in adapter.tensors:
            raise MissingTensorError(
                "a LoRA lacks one of its two", file=adapter.path, place=stem + suffix, found=stem + other
            )
    down, up = (adapter.tensors[stem + suffix] for suffix in _LORA)
    n_out, n_in = _matrix(adapter, stem + _LORA[0], base)
    if down.ndim != 2 or down.shape[1] != n_in or not down.shape[0]:
        raise _misfit(adapter, stem + _LORA[0], f"[rank, {n_in}]")
    rank = down.shape[0]
    if tuple(up.shape) != (n_out, rank):
        raise _misfit(adapter, stem + _LORA[1], [n_out, rank])
    assert adapter.alpha is not None
    scale = adapter.alpha / rank
    return lambda weight: weight + scale * (up @ down)


def _blocks(adapter: Adapter, name: str, base: StoredTensor) -> Merge:
    n_out, n_in = _matrix(adapter, name, base)
    change = adapter.tensors[name]
    if change.ndim == 2 and change.shape[0] and change.shape[1] == n_out:
        places = torch.arange(n_in) % change.shape[0]
        return lambda weight: weight + change[places].T
    size = change.shape[-1] if change.ndim == 3 else 0
    fits = size and tuple(change.shape) == (n_in / size, size, size) and n_out % size == 0
    if not fits:
        raise _misfit(
            adapter, name, f"[rank, {n_out}], or [{n_in} / rank, rank, rank] with a rank that divides {n_out}"
        )

    def merge(weight: Tensor) -> Tensor:
        blocks = weight.reshape(n_out // size, size, n_in // size, size).transpose(1, 2)
        return (blocks + blocks @ change + change).transpose(1, 2).reshape(n_out, n_in)

    return merge
