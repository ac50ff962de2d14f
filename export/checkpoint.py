"""Checkpoints: a model of a known version whose every tensor is there, whatever file it lies in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import (
    CheckpointError,
    ExtraTensorError,
    HeaderError,
    MissingTensorError,
    TensorShapeError,
    TensorValueError,
)
from ..spec import ModelSpec
from ..tokenizer import Tokenizer
from .adapters import Adapter, merged
from .models import recognise
from .models.blocks import Version
from .models.tensors import TIME_STATE, Shape, Shapes, Source, TensorRule, squeezed, without_first_norm
from .readers import OnlyHere, StoredTensor, read_model

NAMES_SHOWN = 5
# Numbers of an embedding that are made at a time.
_BLOCK_NUMBERS = 1 << 25
_ALL = slice(None)


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint whose every tensor has the name, shape and dtype that its version expects.

    Attributes:
        path: the file or folder.
        format: ``"pth"``, ``"safetensors"``, ``"hf"``, ``"gguf"`` or ``"ggml"``.
        version: the RWKV version's module.
        spec: the model's dimensions.
        rules: the engine's tensors, and how each is made.
        tokenizer: a vocabulary file that belongs to the model, or what reads the vocabulary in the model's own file,
            where there is one.
        tuned_state: a tuned initial state that lies beside the model's tensors or in an adapter: ``time_state`` of its
            layers by their names in the file, or none.
        notes: what the owner should know of how the file was read, a sentence each.
        only_here: why no other program reads the same from the same path, where that is so.
    """

    path: Path
    format: str
    version: Version
    spec: ModelSpec
    rules: tuple[TensorRule, ...]
    tokenizer: Path | Callable[[], Tokenizer] | None
    tuned_state: Mapping[str, StoredTensor]
    notes: tuple[str, ...]
    only_here: OnlyHere | None
    _tensors: Mapping[str, StoredTensor]

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every tensor that the engine is made of, by name."""
        return {source.name: source for rule in self.rules for source in rule.sources}

    def source(self, source: Source, rows: slice = _ALL) -> Tensor:
        """A tensor of the checkpoint in float32 and the shape that its version expects.

        Raises:
            TensorValueError: it holds NaN or infinity.
        """
        tensor = self._tensors[source.name].read(rows)
        tensor = tensor.reshape((tensor.shape[0], *source.shape[1:]) if source.by_token else source.shape)
        finite = torch.isfinite(tensor)
        if not finite.all():
            index = [int(i) for i in torch.nonzero(~finite)[0]]
            value = float(tensor[tuple(index)])
            index[0] += rows.start or 0
            raise TensorValueError(
                "a tensor holds NaN or infinity",
                file=self.path,
                place=f"{source.name}{index}",
                expected="finite numbers",
                found=value,
                remedy="the checkpoint is damaged or its training diverged; use another",
            )
        return tensor

    def tensor(self, rule: TensorRule) -> Tensor:
        """A tensor of the engine in float32, contiguous.

        Raises:
            TensorValueError: one of its sources holds NaN or infinity.
        """
        return rule.derive(*(self.source(source) for source in rule.sources)).contiguous()

    def blocks(self, rule: TensorRule) -> Iterator[Tensor]:
        """The same in pieces of some rows, where those can be made alone, and otherwise in one."""
        if not rule.by_token:
            yield self.tensor(rule)
            return
        shared = {source.name: self.source(source) for source in rule.sources if not source.by_token}
        n_rows, width = rule.shape
        step = max(1, _BLOCK_NUMBERS // width)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            sources = (self.source(s, rows) if s.by_token else shared[s.name] for s in rule.sources)
            yield rule.derive(*sources).contiguous()

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the engine by name, as `tensor` gives it."""
        return {rule.name: self.tensor(rule) for rule in self.rules}

    def model_id(self) -> str:
        """The model's id: SHA-256, as 64 hex digits, of its sources' names, shapes and float32 values in name order.

        Files of another form or dtype that hold the same values, and every quantization of the model, share it.
        """
        digest = hashlib.sha256(b"goslet model 2\n")
        for name in sorted(self.sources):
            source = self.sources[name]
            digest.update(json.dumps([name, list(source.shape)]).encode() + b"\n")
            digest.update(self.source(source).contiguous().numpy().data.cast("B"))
        return digest.hexdigest()


@contextmanager
def open_checkpoint(
    path: str | os.PathLike[str], *, norm_eps: float | None = None, adapter: Adapter | None = None
) -> Iterator[Checkpoint]:
    """Open and recognise a checkpoint.

    Args:
        path: an RWKV ``.pth``, ``.safetensors``, ``.st``, ``.gguf`` or rwkv.cpp ``.bin`` file, told apart by content,
            not by name, or a Hugging Face folder.
        norm_eps: eps of the per-head group norm, where the checkpoint was trained with another than its version's.
        adapter: merged into the model.

    Raises:
        CheckpointError: the file cannot be read or is not a known model.
        UnsafeCheckpointError: the file is a pickle that would run code.
        MissingTensorError, ExtraTensorError, TensorShapeError: the tensors are not those that the version needs.
    """
    path = Path(path)
    try:
        model = read_model(path)
        if adapter is not None:
            model = merged(model, adapter)
        tuned = {name: tensor for name, tensor in model.tensors.items() if name.endswith(TIME_STATE)}
        tensors = {name: tensor for name, tensor in model.tensors.items() if name not in tuned}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        version = recognise(shapes or {name: tensor.shape for name, tensor in tuned.items()})
        spec = version.read_spec(shapes, model.norm_eps if norm_eps is None else norm_eps)
        if model.layer_norm_eps is not None:
            spec = replace(spec, layer_norm_eps=model.layer_norm_eps)
        spec = _checked(spec)
        rules = version.tensor_rules(spec, shapes.keys())
        if not model.first_norm:
            rules = tuple(without_first_norm(rule) for rule in rules)
        checkpoint = Checkpoint(
            path,
            model.format,
            version,
            spec,
            rules,
            model.tokenizer,
            tuned,
            model.notes,
            model.only_here,
            tensors,
        )
        _check_beside(rules, shapes)
        _validate(checkpoint.sources, shapes, version.unused(spec))
        for name in checkpoint.sources:
            if not tensors[name].readable:
                raise CheckpointError(
                    "a tensor has a dtype that goslet does not read",
                    place=name,
                    expected="float32, float16 or bfloat16",
                    found=tensors[name].dtype,
                )
    except CheckpointError as error:
        raise _in_file(error, path) from None
    yield checkpoint


def _in_file(error: CheckpointError, path: Path) -> CheckpointError:
    """The error with the file's name, where it does not name one of its own."""
    path = path if error.file is None else Path(error.file)
    return type(error)(
        error.problem, file=path, place=error.place, expected=error.expected, found=error.found, remedy=error.remedy
    )


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


def _check_beside(rules: tuple[TensorRule, ...], shapes: Shapes) -> None:
    """What a rule takes a tensor for by its name must be what those beside it say; absent ones are `_validate`'s."""
    for rule in rules:
        for other in rule.beside:
            found = shapes.get(other.name)
            if found is not None and squeezed(found) != squeezed(other.shape):
                source = rule.sources[0]
                raise TensorShapeError(
                    "the name says what the shapes contradict",
                    place=f"{source.name} of shape {list(shapes.get(source.name, ()))}",
                    expected=f"beside {other.name} of shape {list(other.shape)}",
                    found=list(found),
                    remedy="the file is damaged, or was converted for another program: give the original checkpoint",
                )


def _validate(sources: Mapping[str, Source], shapes: Shapes, unused: Collection[str]) -> None:
    expected: dict[str, Shape] = {name: source.shape for name, source in sources.items()}
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
