"""What trainers and wrappers put around a model: one level more of dictionaries, and longer names.

Lightning, DeepSpeed and many a training loop save the tensors one level down, beside numbers about the training.
Lightning's strategies, DataParallel, torch.compile and FSDP put a word before every name, or between its parts.
Nothing of this changes a number, so it is taken off; what is left out is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ...errors import CheckpointError

T = TypeVar("T")

# In the order in which they are preferred where a file has several.
_LEVELS = ("state_dict", "model_state_dict", "model", "module")
# Wrappers of single modules, whose words may stand anywhere in a name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", re.ASCII
)
_BLOCK = re.compile(r"(?:^|(?<=\.))blocks\.\d+\.", re.ASCII)
# What transformers' own RWKV-7 puts before RWKV's names.
_NATIVE = "rwkv7."
# Dictionaries that have a model's names and are none: what an optimizer keeps of each tensor, and gradients.
_OPTIMIZER = re.compile(
    r"optimi[sz]er|exp_?avg|(?:^|[^a-z])(?:optims?|moment(?:s|um)?|grads?|gradients?)(?:$|[^a-z])", re.IGNORECASE
)
_AVERAGE = re.compile(r"average|(?:^|[^a-z])(?:ema|swa|avg)(?:$|[^a-z])", re.IGNORECASE)
_SHOWN = 60


def one_level(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of what a pickle holds: itself, or one dictionary in it.

    Args:
        content: what torch read from the file.
        path: the file.

    Returns:
        the tensors by the file's names, and what there is to say about the rest of the file.

    Raises:
        CheckpointError: there is no dictionary of tensors, or several and none of them is known to be the model; or
            the file holds a model in a form that its numbers cannot be had from.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            "does not hold a dictionary of tensors", file=path, expected="name → tensor", found=type(content).__name__
        )
    if "_strategy" in content and "_version" in content:
        raise CheckpointError(
            "was converted by the Python package rwkv for one of its strategies, which mixes the first norm into the "
            "embedding and rounds, so that the model's own numbers are no longer in it",
            file=path,
            place="_strategy, _version",
            found=content["_strategy"][:_SHOWN] if isinstance(content["_strategy"], str) else None,
            remedy="give the original .pth that it was converted from",
        )
    if all(isinstance(value, Tensor) for value in content.values()):
        return _named(content, path), ()
    inner = {
        str(key): value
        for key, value in content.items()
        if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values())
    }
    able = [key for key in inner if not _OPTIMIZER.search(key)]
    level = next((key for key in _LEVELS if key in inner), able[0] if len(able) == 1 else None)
    if level is None or any(isinstance(value, Tensor) for value in content.values()):
        raise _no_tensors(content, list(inner), able, path)
    tensors = _named(inner[level], path)
    if "ds_version" in content and any(tensor.numel() == 0 for tensor in tensors.values()):
        raise CheckpointError(
            "holds the names of a model whose numbers DeepSpeed (ZeRO stage 3) keeps in other files",
            file=path,
            place=level,
            remedy="run the zero_to_fp32.py that DeepSpeed put beside its files, and give the file that it writes",
        )
    others = [key for key in inner if key != level]
    note = f"the file's tensors were taken from '{level[:_SHOWN]}'"
    if _AVERAGE.search(level):
        note += ", by its name an average over the training, as no other model is in the file"
    if others:
        note += f"; {', '.join(repr(key[:_SHOWN]) for key in others)} beside it was left alone"
    return tensors, (note,)


def own_names(tensors: Mapping[str, T], path: Path) -> tuple[dict[str, T], tuple[str, ...]]:
    """Tensors without what wrappers put into their names: their words, and a prefix that all names have.

    Args:
        tensors: of a model or an adapter, by the file's names.
        path: the file.

    Returns:
        the same tensors under names such as ``blocks.0.att.key.weight``, as far as they are such, and what there is to
        say.

    Raises:
        CheckpointError: there are several models, each with a prefix of its own, two names become one, or the prefix
            says that it is the state of an optimizer.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in tensors}
    prefixes = _prefixes(bare.values())
    if len(prefixes) > 1 and "" not in prefixes:
        raise CheckpointError(
            "holds several models, each with a prefix of its own before the names",
            file=path,
            found=", ".join(sorted(prefix[:_SHOWN] for prefix in prefixes)[:4]),
            remedy="save the tensors of one of them alone",
        )
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if _OPTIMIZER.search(prefix):
        raise _optimizers(prefix, path)
    renamed: dict[str, T] = {}
    for name, tensor in tensors.items():
        own = bare[name].removeprefix(prefix)
        if own in renamed:
            raise CheckpointError("two tensors stand for one", file=path, place=name[:100], found=own[:100])
        renamed[own] = tensor
    return renamed, (f"the prefix '{prefix[:_SHOWN]}' was taken off the tensors' names",) if prefix else ()


def check_alone(names: Iterable[str], path: Path) -> None:
    """A model's file lies in no folder whose config.json must be read with it.

    Raises:
        CheckpointError: it is one file out of a folder of transformers'.
    """
    prefixes = _prefixes(_WRAPPERS.sub("", name) for name in names)
    if any(prefix.endswith(_NATIVE) for prefix in prefixes) and (path.parent / "config.json").is_file():
        raise CheckpointError(
            "is a single file of a Hugging Face folder, whose config.json says how its numbers are meant",
            file=path,
            remedy=f"give the folder {path.parent}",
        )


def _prefixes(names: Iterable[str]) -> set[str]:
    """What stands before RWKV's own names."""
    return {name[: found.start()] for name in names if (found := _BLOCK.search(name))}


def _named(content: Mapping[object, Tensor], path: Path) -> dict[str, Tensor]:
    for name in content:
        if not isinstance(name, str):
            raise CheckpointError(
                "holds a tensor whose name is not text", file=path, place=str(name)[:100], found=type(name).__name__
            )
    return {str(name): tensor for name, tensor in content.items()}


def _optimizers(place: str, path: Path) -> CheckpointError:
    return CheckpointError(
        "holds the state of an optimizer, not a model",
        file=path,
        place=place[:_SHOWN],
        remedy="give the model's file beside it (of DeepSpeed, …model_states.pt), or save the model's tensors alone",
    )


def _no_tensors(content: Mapping[object, object], inner: list[str], able: list[str], path: Path) -> CheckpointError:
    """Why no dictionary of tensors can be taken, of all and of those that may be a model."""
    if inner and not able:
        return _optimizers(inner[0], path)
    if len(inner) > 1:
        return CheckpointError(
            "holds several dictionaries of tensors, and goslet does not know which is the model",
            file=path,
            expected=f"one, or one called {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}",
            found=", ".join(key[:_SHOWN] for key in inner[:5]),
            remedy="save the model's alone: torch.save(torch.load(FILE)[NAME], 'model.pth')",
        )
    if "optimizer_state_dict" in content:
        return _optimizers("optimizer_state_dict", path)
    name, value = next((name, value) for name, value in content.items() if not isinstance(value, Tensor))
    return CheckpointError(
        "holds something that is not a tensor",
        file=path,
        place=str(name)[:100],
        expected=f"tensors alone, or one dictionary of them, called {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}",
        found=type(value).__name__,
        remedy="save the model's state_dict alone",
    )
