"""Folders as libraries save them: fla's RWKV-6 and 7, transformers' RWKV-4 and coming RWKV-7, the RWKV-5 and 6 that
come with their own code; and a folder around one of RWKV's own files.

A folder holds ``config.json`` and one file of weights or an index of several. Tensors' names tell whose it is, whatever
``model_type`` says; what ``config.json`` says of the numbers is held to tables (`goslet.export.readers.configs`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, MissingTensorError
from ..models.tensors import LAYER_NORM_EPS
from .configs import FLA6, FLA7, NATIVE7, OLD, Family, check_config, check_eps, flag, positive
from .fla_names import Named, from_fla6, from_fla7, is_fla, is_fla7
from .kinds import kind_of
from .rwkv_file import load_pth, load_safetensors
from .stored import FloatTensor, OnlyHere, StoredModel, StoredTensor, Zeros
from .webrwkv import undone
from .wrapped import own_names

CONFIG = "config.json"
EMBEDDING, HEAD = "emb.weight", "head.weight"
# As transformers looks for them, whose `from_pretrained` every library here uses; the first is taken.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
_ALONE = (".pth", ".pt", ".safetensors", ".st", ".gguf", ".bin")
_VOCABULARIES = ("rwkv_vocab_v20230424.txt", "rwkv_vocab.txt", "tokenizer.json")
# The group norm's eps in the code of RWKV's authors.
_OWN_NORM_EPS = 64e-5
_AROUND_ONE = "a folder around one of RWKV's own files"
_ROWS = 4096

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

Tensors = dict[str, StoredTensor]


def read_folder(path: Path, read_file: Callable[[Path], StoredModel]) -> StoredModel:
    """The tensors of a folder.

    Args:
        path: the folder.
        read_file: reads one of RWKV's own files.

    Raises:
        CheckpointError: it is no such folder, of another model, or its files do not fit together.
        MissingTensorError: a file of the index is not there, or lacks a tensor.
    """
    file = path / CONFIG
    config = _read_json(file, "check its permissions") if file.is_file() else {}
    weights, ignored = _weights(path, config)
    vocabulary = next((path / name for name in _VOCABULARIES if (path / name).is_file()), None)
    kind = str(config.get("model_type", "rwkv"))
    if weights is None or not file.is_file():
        model = _of_one_file(path, weights or _only_file(path, kind), read_file)
        model = replace(model, tokenizer=vocabulary or model.tokenizer)
        return _by_config(model, dict(model.tensors), _own_family(model.tensors), config, file) if config else model
    raw, in_safetensors = _load(weights)
    notes = [f"{weights.name} is read, as transformers does, and not {', '.join(ignored)} beside it"] if ignored else []
    family, renamed = _family(raw)
    if family is None:
        raw, more = own_names(raw, weights)
        notes += more
        if not any(name.startswith("blocks.") for name in raw):
            if "rwkv" not in kind:
                raise _of_another_kind(file, kind)
            # A hybrid, say: its tensors tell what it is.
            return StoredModel("hf", {name: FloatTensor(tensor) for name, tensor in raw.items()})
        family = _own_family(raw)
    held: Tensors = {name: FloatTensor(tensor) for name, tensor in raw.items()}
    if renamed is _as_it_is and in_safetensors:
        held, more = undone(held, weights)
        notes += more
    tensors: Tensors = {}
    for name, tensor in held.items():
        for own_name, stored in renamed(name, tensor):
            if own_name in tensors:
                raise CheckpointError("two tensors stand for one", file=path, place=name[:100], found=own_name)
            tensors[own_name] = stored
    # transformers would make numbers of its own for every name that it does not find.
    only_here = OnlyHere(_AROUND_ONE, "give the .pth that it was made from") if renamed is _as_it_is else None
    model = StoredModel("hf", {}, tokenizer=vocabulary, notes=tuple(notes), only_here=only_here)
    return _by_config(model, tensors, family, config, file)


def _of_one_file(path: Path, weights: Path, read_file: Callable[[Path], StoredModel]) -> StoredModel:
    """The model of a folder around one of RWKV's own files."""
    model = None if weights.name.endswith(_INDEX) else read_file(weights)
    if model is None or _family(model.tensors)[0] is not None:
        raise CheckpointError(
            f"holds a library's model without its {CONFIG}, which says how its norms are computed",
            file=path,
            expected=CONFIG,
            remedy="download the whole folder",
        )
    return replace(
        model,
        notes=(f"{weights.name} is read, the one checkpoint in {path.name}", *model.notes),
        only_here=model.only_here or OnlyHere(_AROUND_ONE, f"give {weights}"),
    )


def _by_config(
    model: StoredModel, tensors: Tensors, family: Family, config: Mapping[str, Any], file: Path
) -> StoredModel:
    """The model as its folder's config.json completes it."""
    notes = list(model.notes)
    if flag(config, "tie_word_embeddings", False, file):
        notes += _tied(tensors)
    elif EMBEDDING in tensors and HEAD not in tensors:
        raise MissingTensorError(
            "has no head, and its config.json does not tie it to the embedding",
            file=file.parent,
            place=HEAD,
            expected="a head among the tensors, or tie_word_embeddings: true",
            remedy="download the whole folder; a model without a head, as base classes save it, predicts nothing",
        )
    first_norm = _norms(tensors, family, config, file)
    if model.layer_norm_eps is not None:
        check_eps(config, model.layer_norm_eps, file)
    notes += check_config(config, family, {name: tensor.shape for name, tensor in tensors.items()}, file)
    norm_eps, layer_norm_eps = model.norm_eps, model.layer_norm_eps
    # What a file says of its own numbers is not changed by what a config leaves out.
    if layer_norm_eps is None or config.get(family.eps or "head_size_divisor") is not None:
        norm_eps, said = _eps(tensors, family, config, file)
        layer_norm_eps = said if layer_norm_eps is None else layer_norm_eps
    if norm_eps not in (None, _OWN_NORM_EPS):
        notes.append(
            f"the group norm's eps is {norm_eps:g}, as {family.library} computes it from {CONFIG}; RWKV's own code has "
            f"{_OWN_NORM_EPS:g}, for weights that were trained there: --norm-eps {_OWN_NORM_EPS:g}"
        )
    return replace(
        model,
        tensors=tensors,
        norm_eps=norm_eps,
        layer_norm_eps=layer_norm_eps,
        notes=tuple(notes),
        first_norm=first_norm,
    )


def _eps(tensors: Tensors, family: Family, config: Mapping[str, Any], file: Path) -> tuple[float | None, float | None]:
    """Eps of the group norm and of the LayerNorms, each None where it is the version's own."""
    if family is OLD:
        divisor = positive(config, "head_size_divisor", 8.0, file)
        # There is a group norm from version 5 on.
        return (_rounded(LAYER_NORM_EPS * divisor**2) if "blocks.0.att.ln_x.weight" in tensors else None), None
    eps = positive(config, "norm_eps", LAYER_NORM_EPS, file)
    if family is FLA6:
        return eps, eps
    bonus = tensors.get("blocks.0.att.r_k")
    if bonus is None or len(bonus.shape) != 2:
        return None, eps
    return _rounded(eps * bonus.shape[1]), eps


def _rounded(eps: float) -> float:
    """Without the last bits of a product, so that 64 times 1e-5 is 64e-5."""
    return float(f"{eps:.12g}")


def _tied(tensors: Tensors) -> list[str]:
    """One matrix for embedding and head, where the file has one; with two, each keeps its own, as in transformers."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is not None and head is not None:
        if embedding.shape == head.shape and all(
            torch.equal(embedding.read(rows), head.read(rows))
            for rows in (slice(start, start + _ROWS) for start in range(0, embedding.shape[0], _ROWS))
        ):
            return []
        return [
            f"{CONFIG} ties the head to the embedding, but both are there and differ: each keeps its own, as in "
            "transformers from 5 on (before, the embedding was taken for both)"
        ]
    if embedding is not None:
        tensors[HEAD] = embedding
    elif head is not None:
        tensors[EMBEDDING] = head
    return [f"head and embedding are one matrix, as {CONFIG} says"]


def _norms(tensors: Tensors, family: Family, config: Mapping[str, Any], file: Path) -> bool:
    """Zeros for the biases that the LayerNorms do not have; whether there is a norm behind the embedding."""
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    layer_norms = ["ln_out", *(f"blocks.{block}.{norm}" for block in blocks for norm in ("ln1", "ln2"))]
    first_norm = "norm_first" not in family.read or flag(config, "norm_first", True, file)
    if first_norm:
        layer_norms.append("blocks.0.ln0")
    else:
        _must_lack(tensors, "blocks.0.ln0.weight", "norm_first", file)
    if "norm_bias" in family.read and not flag(config, "norm_bias", True, file):
        for norm in layer_norms:
            _must_lack(tensors, f"{norm}.bias", "norm_bias", file)
            if f"{norm}.weight" in tensors:
                tensors[f"{norm}.bias"] = Zeros(tensors[f"{norm}.weight"].shape)
    return first_norm


def _must_lack(tensors: Tensors, name: str, key: str, file: Path) -> None:
    if name in tensors:
        raise CheckpointError(
            "says that there is no such tensor, but it is there",
            file=file,
            place=key,
            expected=f"true, or no {name}",
            found="false",
            remedy="config.json and weights are of different models; download the whole folder again",
        )


# --------------------------------------------------------------------------------------------------------- whose it is


def _family(names: Mapping[str, Any]) -> tuple[Family | None, Callable[[str, StoredTensor], Named]]:
    """Whose tensors they are, and how their names become RWKV's own; none where no library's are among them."""
    if any(map(is_fla7, names)):
        return FLA7, from_fla7
    if any(map(is_fla, names)):
        return FLA6, from_fla6
    if any(name.startswith("rwkv7.") for name in names):
        return NATIVE7, _from_native
    if any(name.startswith("rwkv.") for name in names):
        return OLD, from_old
    return None, _as_it_is


def _own_family(names: Mapping[str, Any]) -> Family:
    """Whose keys a config.json has that lies beside tensors in RWKV's own names."""
    return NATIVE7 if any(name.endswith((".att.r_k", ".att.k_k")) for name in names) else OLD


def _as_it_is(name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    yield name, stored


def _from_native(name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """transformers' RWKV-7 keeps RWKV's own names and forms under a prefix; source: pull request 47787 there."""
    yield name.removeprefix("rwkv7."), stored


def from_old(name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor of transformers' RWKV, or of the RWKV-5 and 6 that go by its names, under RWKV's own."""
    for theirs, ours in _OLD_PARTS:
        name = name.replace(theirs, ours)
    yield name, stored


def _of_another_kind(file: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        "is of a kind that goslet does not read",
        file=file,
        place="model_type",
        expected="rwkv7, rwkv6, rwkv5 or rwkv",
        found=kind[:60],
    )


# ------------------------------------------------------------------------------------------------------- what is in it


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


def _weights(path: Path, config: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """The file or index that transformers would load, and the others' names."""
    there = [name for name in _WEIGHTS if (path / name).is_file()]
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not (path / named).is_file():
            raise CheckpointError(
                "names weights that are not in the folder",
                file=path / CONFIG,
                place="transformers_weights",
                found=str(named)[:100],
                remedy="download the whole folder",
            )
        there = [named, *(name for name in there if name != named)]
    return (path / there[0], there[1:]) if there else (None, [])


def _only_file(path: Path, kind: str) -> Path:
    """The one checkpoint in a folder that no library has saved."""
    if "rwkv" not in kind:
        raise _of_another_kind(path / CONFIG, kind)
    try:
        found = sorted(item for item in path.iterdir() if item.suffix in _ALONE and item.is_file())
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=path, remedy="check the path and its permissions"
        ) from None
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            "holds no weights",
            file=path,
            expected=f"{CONFIG} and {' or '.join(_WEIGHTS)}, or one file ending in {', '.join(_ALONE)}",
            remedy="download the whole folder, or give the file itself",
        )
    raise CheckpointError(
        "holds several files of weights and no index that says which belong to the model",
        file=path,
        expected=" or ".join(_WEIGHTS),
        found=", ".join(item.name for item in found[:5]) + (", …" if len(found) > 5 else ""),
        remedy="give the one file that you mean, or, for shards, download their index too",
    )


def _load(weights: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file or of an index, and whether they lie in safetensors, as web-rwkv's converter writes."""
    if not weights.name.endswith(_INDEX):
        return _load_file(weights)
    path = weights.parent
    places = _read_json(weights, "the index of the weights' files").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError("has no map of weights", file=weights, place="weight_map")
    tensors: dict[str, Tensor] = {}
    in_safetensors = False
    for file_name in sorted(set(places.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError("names a file elsewhere", file=weights, found=file_name[:100])
        if not (path / file_name).is_file():
            raise MissingTensorError(
                "a file of weights is missing", file=weights, place=file_name, remedy="download the whole folder"
            )
        content, safe = _load_file(path / file_name)
        in_safetensors = in_safetensors or safe
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
    return tensors, in_safetensors


def _load_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    if kind_of(path) == "safetensors":
        return load_safetensors(path), True
    return load_pth(path), False
