#!/usr/bin/env python3
"""Writes RWKV checkpoints with random weights of trained scale, at any shape: for tests and for speed, not for text.

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


class _Maker:
    """Random tensors in the official names, from one generator."""

    def __init__(self, seed: int, dtype: torch.dtype, width: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._width = width
        self.tensors: dict[str, Tensor] = {}

    def normal(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        """Normally distributed numbers."""
        numbers = torch.randn(*shape, generator=self._generator) * scale + mean
        self.tensors[name] = numbers.to(self._dtype)

    def uniform(self, name: str, *shape: int, low: float, high: float) -> None:
        """Numbers spread evenly."""
        numbers = torch.rand(*shape, generator=self._generator) * (high - low) + low
        self.tensors[name] = numbers.to(self._dtype)

    def norm(self, name: str) -> None:
        """A norm's weight and bias."""
        self.normal(f"{name}.weight", self._width, scale=0.15, mean=1.0)
        self.normal(f"{name}.bias", self._width, scale=0.1)

    def matrix(self, name: str, n_out: int, n_in: int, scale: float = 1.0) -> None:
        """A matrix [out, in] that keeps the size of its input."""
        self.normal(name, n_out, n_in, scale=scale * n_in**-0.5)

    def turned(self, name: str, n_in: int, n_out: int, scale: float = 1.0) -> None:
        """A matrix [in, out] that keeps the size of its input."""
        self.normal(name, n_in, n_out, scale=scale * n_in**-0.5)


def random_rwkv4(
    *,
    n_layer: int,
    n_embd: int,
    vocab_size: int = 50277,
    n_ffn: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a random RWKV-4 in the official names and shapes; arguments as for `random_rwkv7`."""
    make, width, hidden = _Maker(seed, dtype, n_embd), n_embd, n_ffn or 4 * n_embd
    make.normal("emb.weight", vocab_size, width, scale=0.5)
    make.norm("blocks.0.ln0")
    for layer in range(n_layer):
        att = f"blocks.{layer}.att"
        make.norm(f"blocks.{layer}.ln1")
        make.norm(f"blocks.{layer}.ln2")
        make.uniform(f"{att}.time_decay", width, low=-5.0, high=2.0)
        make.uniform(f"{att}.time_first", width, low=-2.0, high=2.0)
        for letter in "kvr":
            make.uniform(f"{att}.time_mix_{letter}", 1, 1, width, low=0.0, high=1.0)
        for part in ("key", "value", "receptance", "output"):
            make.matrix(f"{att}.{part}.weight", width, width)
        _gated_channel_mix(make, layer, width, hidden, "time_mix_")
    make.norm("ln_out")
    make.matrix("head.weight", vocab_size, width)
    return make.tensors


def random_rwkv5(
    version: str,
    *,
    n_layer: int,
    n_embd: int,
    head_size: int = 64,
    vocab_size: int = 65536,
    n_ffn: int | None = None,
    first: str = "time_faaaa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a random RWKV-5 in the official names and shapes; other arguments as for `random_rwkv7`.

    Args:
        version: 5.0, 5.1 or 5.2.
        first: ``time_faaaa``, or ``time_first`` as in older files, whose exponential counts.
    """
    make, width, hidden = _Maker(seed, dtype, n_embd), n_embd, n_ffn or round(3.5 * n_embd)
    n_head = width // head_size
    by_head = (n_head, head_size) if version == "5.2" else (n_head,)
    letters = "kvr" if version == "5.0" else "kvrg"
    make.normal("emb.weight", vocab_size, width, scale=0.5)
    make.norm("blocks.0.ln0")
    for layer in range(n_layer):
        att = f"blocks.{layer}.att"
        make.norm(f"blocks.{layer}.ln1")
        make.norm(f"blocks.{layer}.ln2")
        # First, because rwkv tells versions and heads by the order of names, which must do for a single layer.
        make.norm(f"{att}.ln_x")
        make.uniform(f"{att}.time_decay", *by_head, low=-5.0, high=1.0)
        make.normal(f"{att}.{first}", *by_head, scale=0.5)
        for letter in letters:
            make.uniform(f"{att}.time_mix_{letter}", 1, 1, width, low=0.0, high=1.0)
        for part in ("receptance", "key", "value", "output", *(["gate"] if "g" in letters else [])):
            make.matrix(f"{att}.{part}.weight", width, width)
        _gated_channel_mix(make, layer, width, hidden, "time_mix_")
    make.norm("ln_out")
    make.matrix("head.weight", vocab_size, width)
    return make.tensors


def random_rwkv6(
    *,
    n_layer: int,
    n_embd: int,
    head_size: int = 64,
    vocab_size: int = 65536,
    n_ffn: int | None = None,
    rank_mix: int = 32,
    rank_decay: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a random RWKV-6 in the official names and shapes; other arguments as for `random_rwkv7`.

    Args:
        rank_mix, rank_decay: LoRA ranks of the five shares and of the decay.
    """
    make, width, hidden = _Maker(seed, dtype, n_embd), n_embd, n_ffn or round(3.5 * n_embd)
    make.normal("emb.weight", vocab_size, width, scale=0.5)
    make.norm("blocks.0.ln0")
    for layer in range(n_layer):
        att = f"blocks.{layer}.att"
        make.norm(f"blocks.{layer}.ln1")
        make.norm(f"blocks.{layer}.ln2")
        for letter in "xwkvrg":
            make.uniform(f"{att}.time_maa_{letter}", 1, 1, width, low=0.0, high=1.0)
        make.turned(f"{att}.time_maa_w1", width, 5 * rank_mix)
        make.normal(f"{att}.time_maa_w2", 5, rank_mix, width, scale=0.3 * rank_mix**-0.5)
        make.uniform(f"{att}.time_decay", 1, 1, width, low=-5.0, high=0.0)
        make.turned(f"{att}.time_decay_w1", width, rank_decay)
        make.turned(f"{att}.time_decay_w2", rank_decay, width)
        make.normal(f"{att}.time_faaaa", width // head_size, head_size, scale=0.5)
        for part in ("receptance", "key", "value", "output", "gate"):
            make.matrix(f"{att}.{part}.weight", width, width)
        make.norm(f"{att}.ln_x")
        _gated_channel_mix(make, layer, width, hidden, "time_maa_")
    make.norm("ln_out")
    make.matrix("head.weight", vocab_size, width)
    return make.tensors


def _gated_channel_mix(make: _Maker, layer: int, width: int, hidden: int, mix: str) -> None:
    ffn = f"blocks.{layer}.ffn"
    for letter in "kr":
        make.uniform(f"{ffn}.{mix}{letter}", 1, 1, width, low=0.0, high=1.0)
    make.matrix(f"{ffn}.key.weight", hidden, width)
    make.matrix(f"{ffn}.receptance.weight", width, width)
    make.matrix(f"{ffn}.value.weight", width, hidden)


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
    rank_s: int = 0,
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
        n_ffn: hidden width of the channel mix; 4·D by default, 3.5·D in versions 5 and 6.
        rank_w, rank_a, rank_v, rank_g: LoRA ranks.
        rank_s: side of DeepEmbed's matrices, which makes it a 7a; 0 for none.
        unused: whether layer 0 carries the value-residual LoRA that nothing reads, as released files do.
        seed: of the generator; the same arguments give the same tensors.
        dtype: of all tensors.
    """
    make, width, hidden = _Maker(seed, dtype, n_embd), n_embd, n_ffn or 4 * n_embd
    make.normal("emb.weight", vocab_size, width, scale=0.5)
    make.norm("blocks.0.ln0")
    for layer in range(n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        make.norm(f"blocks.{layer}.ln1")
        make.norm(f"blocks.{layer}.ln2")
        for letter in "rwkvag":
            make.uniform(f"{att}.x_{letter}", 1, 1, width, low=0.0, high=1.0)
        for letter, rank in (("w", rank_w), ("a", rank_a), ("v", rank_v), ("g", rank_g)):
            if letter == "v" and layer == 0 and not unused:
                continue
            if letter == "w":
                make.uniform(f"{att}.w0", 1, 1, width, low=-6.0, high=1.0)
            elif letter != "g":
                make.normal(f"{att}.{letter}0", 1, 1, width, scale=0.8)
            make.turned(f"{att}.{letter}1", width, rank)
            make.turned(f"{att}.{letter}2", rank, width)
        make.normal(f"{att}.k_k", 1, 1, width, scale=0.2, mean=0.85)
        make.normal(f"{att}.k_a", 1, 1, width, scale=0.2, mean=1.0)
        make.normal(f"{att}.r_k", width // head_size, head_size, scale=0.2)
        for part in ("receptance", "key", "value", "output"):
            make.matrix(f"{att}.{part}.weight", width, width)
        make.norm(f"{att}.ln_x")
        make.uniform(f"{ffn}.x_k", 1, 1, width, low=0.0, high=1.0)
        make.matrix(f"{ffn}.key.weight", hidden, width)
        make.matrix(f"{ffn}.value.weight", width, hidden)
        if rank_s:
            make.normal(f"{ffn}.s_emb.weight", vocab_size, rank_s**2, scale=0.7 * rank_s**-0.5)
            make.normal(f"{ffn}.s_emb_x.weight", rank_s**2, width, scale=0.7 * (rank_s * width) ** -0.5)
            make.normal(f"{ffn}.s0", 1, 1, hidden, scale=0.3, mean=1.0)
            make.turned(f"{ffn}.s1", width, rank_s)
            make.turned(f"{ffn}.s2", rank_s, hidden, scale=0.5)
    make.norm("ln_out")
    make.matrix("head.weight", vocab_size, width)
    return make.tensors


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
