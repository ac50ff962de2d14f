"""Files of tensors that belong beside a model: adapters and tuned states, in whatever container they lie.

web-rwkv (Ai00, RWKV-Runner) keeps them as ``.st``: a safetensors file whose numbers are all float16, and in which
``time_state`` and a LoRA's first matrix, called ``lora.0`` there, are turned. A turned LoRA has names of its own, but
nothing inside a file tells a turned state, as it is square. So the file's name decides, as it does for those who made
it: what is called ``.st`` and is float16 throughout is web-rwkv's, anything else lies as the trainers save it. Where
that is a guess it is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError, TensorShapeError
from ..models.tensors import TIME_STATE
from .kinds import kind_of
from .rwkv_file import load_pth_level, load_safetensors
from .wrapped import own_names

_WEB_RWKV_SUFFIX = ".st"
_WEB_RWKV_LORA = {".lora.0": ".lora_A", ".lora.1": ".lora_B"}
_PEFT_PREFIX = "base_model.model."


class Beside(NamedTuple):
    """What such a file holds.

    Attributes:
        tensors: as trainers save them, by their names without what wrappers put into these.
        notes: what there is to say about how the file was read, a sentence each.
        long_names: the same tensors' names as PEFT knew them: all that stands behind the prefix of its own.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    long_names: Mapping[str, str]


def load_beside(path: Path) -> Beside:
    """The tensors of an adapter or a tuned state.

    Raises:
        CheckpointError: it cannot be read, is no file of tensors, or two names in it become one.
        UnsafeCheckpointError: it is a pickle that would run code.
        DependencyError: it is a safetensors file and safetensors is not installed.
    """
    kind = kind_of(path)
    if kind not in ("pth", "safetensors"):
        raise CheckpointError(
            "is no adapter and no state, which lie in a file of tensors",
            file=path,
            expected="a .pth, .safetensors or .st file",
            found="a folder" if kind == "hf" else kind.upper(),
            remedy="give the file that the trainer saved",
        )
    tensors, notes = load_pth_level(path) if kind == "pth" else (load_safetensors(path), ())
    if kind == "safetensors":
        tensors, notes = _as_trained(tensors, path)
    tensors = _without_peft_prefix(tensors, path)
    long_names, more = own_names({name: name for name in tensors}, path)
    return Beside({own: tensors[name] for own, name in long_names.items()}, notes + more, long_names)


def _without_peft_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names behind the one prefix that PEFT always writes, of which there is nothing to say."""
    renamed = {name[max(0, name.find(_PEFT_PREFIX)) :].removeprefix(_PEFT_PREFIX): name for name in tensors}
    if len(renamed) != len(tensors):
        raise CheckpointError("two tensors stand for one", file=path, place=next(iter(renamed))[:100])
    return {new: tensors[name] for new, name in renamed.items()}


def _as_trained(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A safetensors file's tensors as trainers save them, which those converted for web-rwkv are not."""
    has_state = any(name.endswith(TIME_STATE) for name in tensors)
    has_lora = any(name.endswith(tuple(_WEB_RWKV_LORA)) for name in tensors)
    if not has_state and not has_lora:
        return tensors, ()
    halves = all(tensor.dtype is torch.float16 for tensor in tensors.values())
    # Only web-rwkv's converter names a LoRA so.
    converted = has_lora or (halves and path.suffix.lower() == _WEB_RWKV_SUFFIX)
    if not converted:
        said = "its time_state is taken as it lies, as trainers save it; a state that was converted for web-rwkv or "
        said += "Ai00 lies the other way round, and is turned back if its name ends in .st"
        return tensors, (said,) if halves else ()
    found = {}
    for name, tensor in tensors.items():
        suffix = next((end for end in _WEB_RWKV_LORA if name.endswith(end)), "")
        if name.endswith(TIME_STATE) or suffix == ".lora.0":
            if tensor.ndim < 2:
                raise TensorShapeError("is not a matrix", file=path, place=name[:100], found=list(tensor.shape))
            tensor = tensor.transpose(-1, -2)
        found[name.removesuffix(suffix) + _WEB_RWKV_LORA.get(suffix, "")] = tensor
    if has_lora:
        return found, ("its matrices were turned back, as its names are those of files converted for web-rwkv or Ai00",)
    said = "its time_state was turned back, because .st is what files are called that were converted for web-rwkv or "
    return found, (said + "Ai00; give one that was not another ending",)
