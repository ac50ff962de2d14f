"""Random models of every version with what PyPI's rwkv computes for them: the oracle of the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save
from torch import Tensor

from goslet.export.oracles import ORACLES, run_program

N_TOKENS = 200

_NARROW = {"n_layer": 2, "n_embd": 32, "vocab_size": 40}
_PLAIN: dict[str, dict[str, Any]] = {
    "one layer": {"n_layer": 1, "n_embd": 48, "vocab_size": 97},
    "odd sizes": {"n_layer": 2, "n_embd": 36, "vocab_size": 257, "n_ffn": 70},
    "six layers": {"n_layer": 6, "n_embd": 128, "vocab_size": 301},
    "tiny activations": _NARROW,
}
_HEADS: dict[str, dict[str, Any]] = {
    "one layer, heads of 16": {"n_layer": 1, "n_embd": 48, "head_size": 16, "vocab_size": 97},
    "heads of 12, odd sizes": {"n_layer": 2, "n_embd": 36, "head_size": 12, "vocab_size": 257, "n_ffn": 70},
    "heads of 64, six layers": {"n_layer": 6, "n_embd": 128, "head_size": 64, "vocab_size": 301},
    "heads of 8, tiny activations": {**_NARROW, "head_size": 8},
}
_SEVEN: dict[str, dict[str, Any]] = {
    "one layer, heads of 16": {"n_layer": 1, "n_embd": 48, "head_size": 16, "vocab_size": 97, "rank_g": 20},
    "heads of 32": {"n_layer": 2, "n_embd": 96, "head_size": 32, "vocab_size": 257, "rank_v": 8, "rank_a": 24},
    "a single head of 64": {"n_layer": 3, "n_embd": 64, "head_size": 64, "vocab_size": 2, "rank_w": 4, "rank_a": 4},
    "heads of 64, six layers, odd ranks": {
        "n_layer": 6,
        "n_embd": 128,
        "head_size": 64,
        "vocab_size": 301,
        "rank_w": 7,
        "rank_a": 13,
        "rank_v": 5,
        "rank_g": 31,
    },
    "heads of 8, narrow channel mix": {
        "n_layer": 4,
        "n_embd": 40,
        "head_size": 8,
        "vocab_size": 64,
        "n_ffn": 72,
        "rank_w": 16,
        "unused": False,
    },
    "tiny activations and keys": {**_NARROW, "head_size": 8},
}
_RANKS = {"rank_w": 16, "rank_a": 16, "rank_v": 16, "rank_g": 16}
_SIX = {"rank_mix": 12, "rank_decay": 20}


def _each(
    version: str, make: Callable[..., dict[str, Tensor]], shapes: dict[str, dict[str, Any]], **common: Any
) -> dict[str, Callable[..., dict[str, Tensor]]]:
    return {f"{version}: {name}": partial(make, **{**common, **shape}) for name, shape in shapes.items()}


# rwkv's DeepEmbed has matrices of 32 x 32 and no other size.
MODELS: dict[str, Callable[..., dict[str, Tensor]]] = {
    **_each("4", random_rwkv4, _PLAIN),
    **_each("5.0", partial(random_rwkv5, "5.0"), _HEADS, first="time_first"),
    **_each("5.1", partial(random_rwkv5, "5.1"), _HEADS),
    **_each("5.2", partial(random_rwkv5, "5.2"), _HEADS),
    **_each("6", random_rwkv6, _HEADS, **_SIX),
    **_each("7", random_rwkv7, _SEVEN, **_RANKS),
    **_each("7a", random_rwkv7, _SEVEN, rank_s=32, **_RANKS),
}


@dataclass(frozen=True)
class Golden:
    """A checkpoint, tokens, and logits [T, V] and states that rwkv computes from them."""

    path: Path
    tokens: np.ndarray
    logits: np.ndarray
    states: list[np.ndarray]


def _shrink(tensors: dict[str, Tensor]) -> None:
    """Make every eps matter: a residual of a variance near LayerNorm's eps, keys near the norm's floor, zero keys."""
    for name, tensor in tensors.items():
        if ".ln0." in name or name.endswith(("att.output.weight", "ffn.value.weight")):
            tensor *= 2e-3
        if name.endswith(".k_k"):
            tensor[..., :8] *= 1e-12
            tensor[..., 8:16] = 0


def _environment(name: str) -> str:
    version = name.split(":")[0]
    return version if version.startswith("7") else "old"


def compute_goldens(folder: Path) -> dict[str, Golden]:
    """What rwkv computes for each of `MODELS`."""
    rng = np.random.default_rng(3)
    oracle = ORACLES["rwkv"]
    goldens: dict[str, Golden] = {}
    for environment in ("old", "7", "7a"):
        names = [name for name in MODELS if _environment(name) == environment]
        paths, tokens = [], []
        for seed, name in enumerate(names):
            tensors = MODELS[name](seed=seed)
            if "tiny" in name:
                _shrink(tensors)
            paths.append(folder / f"{environment}-{seed}.pth")
            save(tensors, paths[-1])
            tokens.append(rng.integers(0, tensors["emb.weight"].shape[0], N_TOKENS))
        out, tokens_file = folder / f"{environment}.npz", folder / f"{environment}-tokens.npy"
        np.save(tokens_file, np.stack(tokens))
        run_program(oracle, environment, tokens_file, out, paths)
        results = np.load(out)
        for index, name in enumerate(names):
            n_states = sum(key.startswith(f"state_{index}_") for key in results)
            states = [results[f"state_{index}_{part}"] for part in range(n_states)]
            goldens[name] = Golden(paths[index], tokens[index], results[f"logits_{index}"], states)
    return goldens
