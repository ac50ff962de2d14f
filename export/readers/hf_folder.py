"""Hugging Face folders: fla's RWKV-6 and 7, and the RWKV-4, 5 and 6 that keep RWKV's own forms under longer names.

A folder holds ``config.json`` and one file of weights or an index of several.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, MissingTensorError
from ..models.tensors import LAYER_NORM_EPS
from .fla_names import from_fla6, from_fla7
from .rwkv_file import load_pth, load_safetensors
from .stored import FloatTensor, StoredModel, StoredTensor

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_HEAD_SIZE = 1 << 16
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("rwkv_vocab_v20230424.txt", "rwkv_vocab.txt", "tokenizer.json")

_OLD_PARTS = (
    ("rwkv.embeddings.", "emb."),
    ("rwkv.ln_out.", "ln_out."),
    ("rwkv.blocks.", "blocks."),
    (".attention.", ".att."),
    (".feed_forward.", ".ffn."),
    (".pre_ln.", ".ln0."),
    (".time_mix_key", ".time_mix_k"),
    (".time_mix_value", ".time_mix_v"),
    (".time_mix_receptance", ".time_mix_r"),
    (".time_mix_gate", ".time_mix_g"),
)


def read_folder(path: Path) -> StoredModel:
    """The tensors of a Hugging Face folder.

    Raises:
        CheckpointError: it is no such folder, of another model, or its files do not fit together.
        MissingTensorError: a file of the index is not there, or lacks a tensor.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "is a folder without a config.json, so no Hugging Face model",
            file=path,
            remedy="give the .pth, .safetensors or .gguf file itself",
        )
    config = _read_json(path / "config.json", "check its permissions")
    kind = str(config.get("model_type", ""))
    if kind not in ("rwkv7", "rwkv6", "rwkv5", "rwkv"):
        raise CheckpointError(
            "is of a kind that goslet does not read",
            file=path / "config.json",
            place="model_type",
            expected="rwkv7, rwkv6, rwkv5 or rwkv",
            found=kind[:60],
        )
    raw = _load(path)
    if kind == "rwkv7":
        own_names = from_fla7
    elif any(name.startswith("model.layers.") for name in raw):
        own_names = from_fla6
    else:
        own_names = _from_old
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in raw.items():
        for own_name, stored in own_names(name, FloatTensor(tensor)):
            if own_name in tensors:
                raise CheckpointError("two tensors stand for one", file=path, place=name[:100], found=own_name)
            tensors[own_name] = stored
    told, bonus = config.get("head_dim", 64), tensors.get("blocks.0.att.r_k")
    if kind == "rwkv7" and bonus is not None and len(bonus.shape) == 2 and bonus.shape[1] != told:
        raise CheckpointError(
            "states another size of heads than the tensors have",
            file=path / "config.json",
            place="head_dim",
            expected=bonus.shape[1],
            found=str(told)[:40],
        )
    vocabulary = next((path / name for name in _VOCABULARIES if (path / name).is_file()), None)
    norm_eps = _norm_eps(config, path) if kind == "rwkv7" else None
    return StoredModel("hf", tensors, norm_eps=norm_eps, tokenizer=vocabulary)


def _read_json(path: Path, purpose: str) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path, remedy=purpose) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", file=path, found=type(value).__name__)
    return value


def _norm_eps(config: Mapping[str, Any], path: Path) -> float | None:
    """fla's eps is that of every LayerNorm, and times the head's size that of the norm by head."""
    eps, head_size = config.get("norm_eps", LAYER_NORM_EPS), config.get("head_dim", 64)
    numbers = (
        isinstance(eps, float) and math.isfinite(eps) and type(head_size) is int and 0 < head_size <= _MAX_HEAD_SIZE
    )
    if not numbers or eps != LAYER_NORM_EPS:
        raise CheckpointError(
            "has another eps than RWKV's LayerNorms",
            file=path / "config.json",
            place="norm_eps, head_dim",
            expected=f"{LAYER_NORM_EPS:g} and a size",
            found=f"{eps}, {head_size}"[:60],
        )
    return round(float(eps) * int(head_size), 12)


def _load(path: Path) -> dict[str, Tensor]:
    index = next((path / name for name in _INDICES if (path / name).is_file()), None)
    if index is None:
        single = next((path / name for name in _SINGLE if (path / name).is_file()), None)
        if single is None:
            raise CheckpointError("holds no weights", file=path, expected=" or ".join((*_SINGLE, *_INDICES)))
        return _load_file(single)
    places = _read_json(index, "the index of the weights' files").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError("has no map of weights", file=index, place="weight_map")
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(set(places.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError("names a file elsewhere", file=index, found=file_name[:100])
        if not (path / file_name).is_file():
            raise MissingTensorError(
                "a file of weights is missing", file=index, place=file_name, remedy="download the whole folder"
            )
        content = _load_file(path / file_name)
        for name, tensor in content.items():
            if places.get(name) != file_name:
                raise CheckpointError(
                    "a file holds a tensor that the index places elsewhere",
                    file=path / file_name,
                    place=name[:100],
                    expected=str(places.get(name, "nowhere"))[:100],
                    remedy="the files are of different models or versions; download the whole folder again",
                )
            tensors[name] = tensor
    for name, file_name in places.items():
        if name not in tensors:
            raise MissingTensorError("a file lacks a tensor of the index", file=path / file_name, place=name[:100])
    return tensors


def _load_file(path: Path) -> dict[str, Tensor]:
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pth(path)


def _from_old(name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    for theirs, ours in _OLD_PARTS:
        name = name.replace(theirs, ours)
    yield name, stored
