"""``adapter_config.json``: what Hugging Face's PEFT says of an adapter, and whether goslet merges what it says.

Every key that PEFT writes is in one of the tables here: it is used, it changes no number of the merged model, or the
adapter is refused by its name. Source: peft's ``tuners/lora/config.py``, ``tuners/miss/config.py`` and
``utils/peft_types.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
_LARGEST_BYTES = 1 << 20
_LARGEST_RANK = 1 << 16
_MERGE_WITH_PEFT = (
    "merge it with PEFT (PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(out)), and export "
    "the model that this makes"
)

# Kinds of adapters that goslet merges; "BONE" is what earlier versions of PEFT called MiSS.
MERGED_TYPES = ("LORA", "MISS", "BONE")
# Kinds that are no change of weights, so that nobody can merge them.
UNMERGEABLE_TYPES = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "POLY",
    "XLORA",
)

# Keys whose values go into the merged numbers.
USED_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "init_lora_weights",
    "init_weights",
    "mini_r",
)
# Keys that say which tensors were trained, and the file holds just those.
TOLD_BY_THE_FILE_KEYS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
)
# Keys of training, of where things came from, and of choices that other keys switch on.
WITHOUT_EFFECT_KEYS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "miss_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
)
# Keys that change what is computed in a way that is not merged here, unless they are off.
REFUSED_KEYS = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)

# How A and B began: beside the whole W, or beside what was left of W when their product was taken out of it.
PLAIN_BEGINNINGS = (True, False, "eva", "gaussian", "mica", "orthogonal")
RESIDUAL_BEGINNINGS = ("corda", "lora_ga", "olora", "pissa")
_PISSA_BY_FAST_SVD = re.compile(r"pissa_niter_\d+", re.ASCII)
_MISS_BEGINNINGS = (True, False, "bat", "mini")
# A pattern that is nothing but the end of a module's name; anything more is a regular expression.
_LITERAL = re.compile(r"\^?[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says.

    Attributes:
        path: the file.
        kind: ``LORA``, ``MISS`` or ``BONE``.
        rank: r of modules that `rank_pattern` does not name.
        alpha: lora_alpha of those that `alpha_pattern` does not name; None for other kinds than LoRA.
        rank_stabilized: whether a LoRA is scaled by alpha / sqrt(r) instead of alpha / r.
        rank_pattern: ranks by the end of a module's name, as the trained model had it; the first that fits counts.
        alpha_pattern: alphas likewise.
        dora: whether magnitudes belong to it.
        beginning: how the training of its matrices began; of MiSS ``bat`` and ``mini`` are forms.
        mini_rank: of MiSS's ``mini``, how many outputs have a matrix of their own; every other shares it.
    """

    path: Path
    kind: str
    rank: int
    alpha: float | None
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dora: bool
    beginning: bool | str
    mini_rank: int

    @property
    def took_out(self) -> bool:
        """Whether the trainer took the product at the beginning of training out of the model's matrices."""
        return self.kind == "LORA" and self.beginning not in PLAIN_BEGINNINGS

    def scale(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by.

        Args:
            module: its name in the model that was trained.
            rank: that of its matrices.

        Raises:
            CheckpointError: its matrices have another rank than it says.
        """
        told = _matched(self.rank_pattern, module, self.rank)
        if told != rank:
            raise CheckpointError(
                "states another rank than the adapter's tensors have",
                file=self.path,
                place="r, rank_pattern",
                expected=rank,
                found=f"{told} for {module[:80]}",
                remedy="give the config that was saved with these tensors",
            )
        assert self.alpha is not None
        alpha: float = _matched(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def without_module(self, modules: Collection[str]) -> list[str]:
        """The patterns that fit none of these modules, each behind its key."""
        return [
            f"{key} {name}"
            for key, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for name in pattern
            if not any(_fits(name, module) for module in modules)
        ]


def _matched(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for name, value in pattern.items() if _fits(name, module)), otherwise)


def _fits(name: str, module: str) -> bool:
    """Whether a pattern names a module: all of its name, or what is behind one of its dots (peft's utils/other.py)."""
    return re.fullmatch(rf"(?:.*\.)?(?:{name})", module) is not None


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Raises:
        CheckpointError: it cannot be read, holds values that no adapter has, or describes one that goslet does not
            merge.
    """
    values = _json(path)
    kind = values.get("peft_type")
    kind = kind.upper() if isinstance(kind, str) else kind
    if kind not in MERGED_TYPES:
        unmergeable = kind in UNMERGEABLE_TYPES
        raise CheckpointError(
            "is of a kind that changes no weights, so that it cannot become part of a model"
            if unmergeable
            else "is an adapter of a kind that goslet does not merge",
            file=path,
            place="peft_type",
            expected=" or ".join(MERGED_TYPES),
            found=str(kind)[:60],
            remedy="it runs in PEFT alone" if unmergeable else _MERGE_WITH_PEFT,
        )
    for key, value in values.items():
        known = key in USED_KEYS or key in TOLD_BY_THE_FILE_KEYS or key in WITHOUT_EFFECT_KEYS
        if not known and value not in (None, False, "", [], {}):
            raise CheckpointError(
                "asks for something that goslet does not merge"
                if key in REFUSED_KEYS
                else "has a key that this goslet does not know, so that merging might be wrong",
                file=path,
                place=key[:60],
                expected="a value that switches it off",
                found=repr(value)[:60],
                remedy=_MERGE_WITH_PEFT,
            )
    lora = kind == "LORA"
    beginning = values.get("init_lora_weights" if lora else "init_weights", True)
    if lora and isinstance(beginning, str):
        beginning = "pissa" if _PISSA_BY_FAST_SVD.fullmatch(beginning) else beginning.lower()
    known_beginnings = (*PLAIN_BEGINNINGS, *RESIDUAL_BEGINNINGS) if lora else _MISS_BEGINNINGS
    if not isinstance(beginning, bool | str) or beginning not in known_beginnings:
        raise CheckpointError(
            "was trained on a base that LoftQ quantized and changed"
            if beginning == "loftq"
            else "began its training in a way that goslet does not know",
            file=path,
            place="init_lora_weights" if lora else "init_weights",
            expected=", ".join(str(one).lower() for one in known_beginnings),
            found=repr(beginning)[:60],
            remedy=_MERGE_WITH_PEFT,
        )
    return AdapterConfig(
        path=path,
        kind=kind,
        rank=_whole(values, "r", path, 8 if lora else 64),
        alpha=_positive(values.get("lora_alpha", 8), "lora_alpha", path) if lora else None,
        rank_stabilized=_switch(values, "use_rslora", path),
        rank_pattern={
            key: _whole({key: value}, key, path, 0) for key, value in _pattern(values, "rank_pattern", path).items()
        },
        alpha_pattern={
            key: _positive(value, f"alpha_pattern {key}", path)
            for key, value in _pattern(values, "alpha_pattern", path).items()
        },
        dora=_switch(values, "use_dora", path),
        beginning=beginning,
        mini_rank=_whole(values, "mini_r", path, 1) if beginning == "mini" else 0,
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise CheckpointError("is too large for a config", file=path, expected=f"at most {_LARGEST_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path, remedy="check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=path, remedy="save the adapter again") from None
    if not isinstance(values, dict):
        raise CheckpointError("is not a JSON object", file=path, found=type(values).__name__)
    return values


def _wrong(path: Path, place: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        "has a value that no adapter has",
        file=path,
        place=place[:80],
        expected=expected,
        found=repr(found)[:60],
        remedy="give the config that was saved with the adapter",
    )


def _whole(values: Mapping[str, Any], key: str, path: Path, otherwise: int) -> int:
    value = values.get(key, otherwise)
    if type(value) is not int or not 0 < value <= _LARGEST_RANK:
        raise _wrong(path, key, f"a whole number from 1 to {_LARGEST_RANK}", value)
    return value


def _positive(value: object, place: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _wrong(path, place, "a number above 0", value)
    return float(value)


def _switch(values: Mapping[str, Any], key: str, path: Path) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise _wrong(path, key, "true or false", value)
    return value


def _pattern(values: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(path, key, "an object", value)
    expression = next((name for name in value if not _LITERAL.fullmatch(name)), None)
    if expression is not None:
        raise CheckpointError(
            "names modules by a regular expression, which goslet does not read",
            file=path,
            place=key,
            expected="ends of module names",
            found=expression[:60],
            remedy="name every module in full, with the same value for each",
        )
    return value
