#!/usr/bin/env python3
"""Writes RWKV-7 checkpoints with random weights of trained scale, at any shape: for tests and for speed, not for text.

The scales imitate released models: activations stay of order one through the layers, decays spread over their whole
range, in-context learning rates and gates are neither closed nor saturated. A step on such weights exercises every
term of the recurrence; nothing else about them is meaningful.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {"n_layer": 12, "n_embd": 768, "rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128},
    "0.4b": {"n_layer": 24, "n_embd": 1024, "rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128},
    "1.5b": {"n_layer": 24, "n_embd": 2048, "rank_w": 96, "rank_a": 96, "rank_v": 64, "rank_g": 256},
    "2.9b": {"n_layer": 32, "n_embd": 2560, "rank_w": 96, "rank_a": 96, "rank_v": 64, "rank_g": 320},
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def random_rwkv7(
    *,
    n_layer: int,
    n_embd: int,
    head_size: int = 64,
    vocab_size: int = 65536,
    n_ffn: int | None = None,
    rank_w: int = 64,
    rank_a: int = 64,
    rank_v: int = 32,
    rank_g: int = 128,
    unused: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a random RWKV-7 in the official names and shapes.

    Args:
        n_layer: blocks.
        n_embd: width D, a multiple of `head_size`.
        head_size: N.
        vocab_size: V.
        n_ffn: hidden width of the channel mix; 4·D by default.
        rank_w, rank_a, rank_v, rank_g: LoRA ranks.
        unused: whether layer 0 carries the value-residual LoRA that nothing reads, as released files do.
        seed: of the generator; the same arguments give the same tensors.
        dtype: of all tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    width, hidden = n_embd, n_ffn or 4 * n_embd
    tensors: dict[str, Tensor] = {}

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale + mean).to(dtype)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(*shape, generator=generator) * (high - low) + low).to(dtype)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = normal(width, scale=0.15, mean=1.0)
        tensors[f"{name}.bias"] = normal(width, scale=0.1)

    tensors["emb.weight"] = normal(vocab_size, width, scale=0.5)
    norm("blocks.0.ln0")
    for layer in range(n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        norm(f"blocks.{layer}.ln1")
        norm(f"blocks.{layer}.ln2")
        for letter in "rwkvag":
            tensors[f"{att}.x_{letter}"] = uniform(1, 1, width, low=0.0, high=1.0)
        for letter, rank in (("w", rank_w), ("a", rank_a), ("v", rank_v), ("g", rank_g)):
            if letter == "v" and layer == 0 and not unused:
                continue
            if letter == "w":
                tensors[f"{att}.w0"] = uniform(1, 1, width, low=-6.0, high=1.0)
            elif letter != "g":
                tensors[f"{att}.{letter}0"] = normal(1, 1, width, scale=0.8)
            tensors[f"{att}.{letter}1"] = normal(width, rank, scale=width**-0.5)
            tensors[f"{att}.{letter}2"] = normal(rank, width, scale=rank**-0.5)
        tensors[f"{att}.k_k"] = normal(1, 1, width, scale=0.2, mean=0.85)
        tensors[f"{att}.k_a"] = normal(1, 1, width, scale=0.2, mean=1.0)
        tensors[f"{att}.r_k"] = normal(width // head_size, head_size, scale=0.2)
        for part in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{part}.weight"] = normal(width, width, scale=width**-0.5)
        norm(f"{att}.ln_x")
        tensors[f"{ffn}.x_k"] = uniform(1, 1, width, low=0.0, high=1.0)
        tensors[f"{ffn}.key.weight"] = normal(hidden, width, scale=width**-0.5)
        tensors[f"{ffn}.value.weight"] = normal(width, hidden, scale=hidden**-0.5)
    norm("ln_out")
    tensors["head.weight"] = normal(vocab_size, width, scale=width**-0.5)
    return tensors


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a checkpoint, as safetensors or as a .pth by the path's ending."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=sorted(SHAPES), help="a released model's shape")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .pth or .safetensors file to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    save(random_rwkv7(**SHAPES[options.shape], seed=options.seed, dtype=DTYPES[options.dtype]), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
