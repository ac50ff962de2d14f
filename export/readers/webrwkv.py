"""What web-rwkv's converter makes of a checkpoint (its ``.st`` files, for web-rwkv, Ai00 and RWKV-Runner), undone.

Source: cryscan/web-rwkv, ``assets/scripts/convert_safetensors.py``. Such a file is a safetensors file in float16 where

- 4 is as RWKV's own;
- ``time_faaaa`` of 5 is called ``time_first``, which in RWKV's own files is another thing: its exponential counts; and
  5.1's numbers by head are spread to all numbers of a head;
- of 6, ``time_maa`` is called ``time_mix`` and ``time_faaaa`` ``time_first``, and the LoRA lie the other way round;
- of 7, the LoRA lie the other way round;
- tuned states lie the other way round.

Nothing in the file says so. It is told by names, shapes and types that contradict RWKV's own form, and where these
leave it open what a number means, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, TensorShapeError
from ..models.tensors import TIME_STATE
from .stored import ConvertedTensor, StoredTensor

Tensors = dict[str, StoredTensor]

_NOTE = "the file was converted for web-rwkv, which was undone: names and forms are RWKV's own again"
_NOTE_HALF = "; its numbers are those of float16, to which that conversion rounds"
_REMEDY = "give the .pth that it was made from"
_DECAY, _FIRST = ".att.time_decay", ".att.time_first"
_LORA6 = re.compile(r"blocks\.\d+\.att\.time_(?:mix|decay)_w[12]", re.ASCII)
_LORA7 = re.compile(r"blocks\.\d+\.att\.[wavg]([12])", re.ASCII)


def undone(tensors: Mapping[str, StoredTensor], path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of a safetensors file in RWKV's own names and forms.

    Args:
        tensors: as the file has them.
        path: the file.

    Returns:
        the tensors, as they are unless web-rwkv's converter made the file, and what there is to say.

    Raises:
        CheckpointError: it cannot be told whether the converter made it, and the numbers mean something else if so.
        TensorShapeError: some tensors lie as the converter leaves them and some do not.
    """
    own: Tensors | None
    if "blocks.0.att.time_mix_x" in tensors:
        own = _undo6(tensors)
    elif any(name.endswith(".att.r_k") for name in tensors):
        own = _undo7(tensors, path)
    elif "blocks.0.att.ln_x.weight" in tensors and f"blocks.0{_FIRST}" in tensors:
        own = _undo5(tensors, path)
    else:
        return dict(tensors), ()
    if own is None:
        return dict(tensors), ()
    for name in own:
        if name.endswith(TIME_STATE):
            own[name] = _last_two(own[name])
    return own, (_NOTE + (_NOTE_HALF if _all_half(tensors) else ""),)


def _undo5(tensors: Mapping[str, StoredTensor], path: Path) -> Tensors | None:
    if not _all_half(tensors):
        return None
    decay, first = tensors.get(f"blocks.0{_DECAY}"), tensors[f"blocks.0{_FIRST}"]
    if decay is None:
        return None
    if not _by_channel(decay):
        raise CheckpointError(
            "cannot be told from a file converted for web-rwkv, where time_first is what RWKV's own files call "
            "time_faaaa, and their time_first is another number",
            file=path,
            place=f"blocks.0{_FIRST}",
            expected="float32 or bfloat16, or time_faaaa",
            found="float16 throughout, as that converter writes",
            remedy=_REMEDY,
        )
    decays = [name for name in tensors if name.endswith(_DECAY)]
    firsts = [name for name in tensors if name.endswith(_FIRST)]
    spread = [*decays, *(firsts if _by_channel(first) else ())]
    by_head = all(_by_channel(tensors[name]) and _is_spread(tensors[name]) for name in spread)
    if not by_head and not _by_channel(first):
        return None  # no version has these together, which its rules say
    own: Tensors = {}
    for name, stored in tensors.items():
        if by_head and name in spread:
            stored = ConvertedTensor(stored, stored.shape[:1], lambda tensor: tensor[:, 0])
        own[name.replace("time_first", "time_faaaa") if _by_channel(first) else name] = stored
    return own


def _undo6(tensors: Mapping[str, StoredTensor]) -> Tensors:
    own: Tensors = {}
    for name, stored in tensors.items():
        if _LORA6.fullmatch(name):
            stored = _last_two(stored)
        own[name.replace("time_mix", "time_maa").replace("time_first", "time_faaaa")] = stored
    return own


def _undo7(tensors: Mapping[str, StoredTensor], path: Path) -> Tensors | None:
    embedding = tensors.get("emb.weight")
    if embedding is None or len(embedding.shape) != 2:
        return None
    width = embedding.shape[1]
    lora = {name: found[1] for name in tensors if (found := _LORA7.fullmatch(name))}
    plain: list[str] = []
    swapped: list[str] = []
    for name, which in lora.items():
        shape = tensors[name].shape
        if len(shape) != 2 or shape[0] == shape[1]:
            continue  # either way
        if width in shape:
            (plain if (shape[0] == width) == (which == "1") else swapped).append(name)
    if plain and swapped:
        raise TensorShapeError(
            "some LoRA matrices lie as in RWKV's own files and some the other way round, as web-rwkv's converter "
            "leaves them",
            file=path,
            place=f"{plain[0]}, {swapped[0]}",
            expected="all of them one way",
            found=f"{list(tensors[plain[0]].shape)}, {list(tensors[swapped[0]].shape)}",
            remedy=_REMEDY,
        )
    if not swapped:
        if lora and not plain and _all_half(tensors) and all(len(tensors[name].shape) == 2 for name in lora):
            raise CheckpointError(
                "has LoRA matrices as wide as high, and in a float16 file nothing says whether they lie as in RWKV's "
                "own files or the other way round, as web-rwkv's converter leaves them",
                file=path,
                place=next(iter(lora)),
                found=list(tensors[next(iter(lora))].shape),
                remedy=_REMEDY,
            )
        return None
    return {name: _last_two(stored) if name in lora else stored for name, stored in tensors.items()}


def _all_half(tensors: Mapping[str, StoredTensor]) -> bool:
    return all(stored.dtype == "float16" for stored in tensors.values())


def _by_channel(stored: StoredTensor) -> bool:
    return len(stored.shape) == 2 and stored.shape[1] > 1


def _is_spread(stored: StoredTensor) -> bool:
    numbers = stored.read(slice(None))
    return bool(torch.equal(numbers, numbers[:, :1].expand_as(numbers)))


def _last_two(stored: StoredTensor) -> StoredTensor:
    """The tensor with its last two axes swapped; one with fewer is left for the version's rules to refuse."""
    if len(stored.shape) < 2:
        return stored
    shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])

    def swap(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    return ConvertedTensor(stored, shape, swap)
