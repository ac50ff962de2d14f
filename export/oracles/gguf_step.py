"""RWKV-6 and 7 as llama.cpp computes them, in numpy, on what the package gguf dequantizes: plain, slow, an oracle.

    python -m goslet.export.oracles.gguf_step OUT.npz TOKENS.npy MODEL.gguf …

Names, orders and shapes are those of the file, every matrix [out, in]; nothing is renamed to RWKV's own names, which is
what this stands against. A layer reads all tokens before the next one begins, so that every tensor is dequantized once.
Sources: llama.cpp's ``rwkv6-base.cpp`` and ``rwkv7-base.cpp``; the papers of both versions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.float64]
HEAD_NORM_EPS = 64e-5  # fixed in llama.cpp; the format has no key for it
KEY_NORM_FLOOR = 1e-12
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.ASCII)


class _Model:
    """The tensors of a file, or of all parts of one that is split, and its metadata."""

    def __init__(self, path: Path) -> None:
        part = _PART.search(path.name)
        paths = sorted(path.parent.glob(f"{path.name[: part.start()]}-*-of-{part[1]}.gguf")) if part else [path]
        readers = [gguf.GGUFReader(one) for one in paths]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._fields = {name: field for reader in readers for name, field in reader.fields.items()}
        self.architecture = self._fields["general.architecture"].contents()
        self.eps = float(self.number("attention.layer_norm_epsilon", 1e-5))
        self.n_head = int(self.number("embedding_length")) // int(self.number("wkv.head_size"))

    def number(self, key: str, default: float = 0) -> float:
        field = self._fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __call__(self, name: str) -> Array:
        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        if tensor.tensor_type.name in ("F32", "F16"):  # gguf's tables take every file for little-endian
            return np.asarray(tensor.data, np.float64).reshape(shape)
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float64).reshape(shape)

    def norm(self, x: Array, name: str) -> Array:
        return _normed(x, self.eps) * self(f"{name}.weight") + self(f"{name}.bias")


def logits(path: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [T, V] after each of the tokens [T], from a fresh state."""
    model = _Model(path)
    mixes = {"rwkv6": _time_mix6, "rwkv7": _time_mix7}[model.architecture]
    x = model.norm(model("token_embd.weight")[tokens], "token_embd_norm")
    rescale = int(model.number("rescale_every_n_layers"))
    shared: dict[str, Array] = {}
    for layer in range(int(model.number("block_count"))):
        block = f"blk.{layer}."

        def at(name: str, block: str = block) -> Array:
            return model(f"{block}{name}.weight")

        # llama.cpp halves x every few layers and what it adds is stored so; undone here, so that eps means the same.
        factor = 2.0 ** (layer // rescale) if rescale else 1.0
        x = x + factor * mixes(model, block, at, model.norm(x, f"{block}attn_norm"), shared)
        gated = f"{block}channel_mix_receptance.weight" in model
        x = x + factor * _channel_mix(gated, at, model.norm(x, f"{block}attn_norm_2"))
    made = model.norm(x, "output_norm") @ model("output.weight").T
    return made.astype(np.float32)


def _time_mix7(model: _Model, block: str, at: Callable[[str], Array], x: Array, shared: dict[str, Array]) -> Array:
    shift = _shifted(x) - x
    mixed = [x + shift * share for share in at("time_mix_lerp_fused").reshape(6, -1)]
    x_r, x_w, x_k, x_v, x_a, x_g = mixed

    def lora(letter: str, given: Array, between: Callable[[Array], Array]) -> Array:
        return between(given @ at(f"time_mix_{letter}1").T) @ at(f"time_mix_{letter}2").T

    r, k, v = (given @ at(f"time_mix_{name}").T for given, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value")))
    w = np.exp(-np.exp(-0.5) * _sigmoid(lora("w", x_w, np.tanh) + at("time_mix_w0")))
    a = _sigmoid(lora("a", x_a, lambda h: h) + at("time_mix_a0"))
    gate = lora("g", x_g, _sigmoid)
    if "first value" in shared:
        v = v + (shared["first value"] - v) * _sigmoid(lora("v", x_v, lambda h: h) + at("time_mix_v0"))
    else:
        shared["first value"] = v
    heads = (len(x), model.n_head, -1)
    kappa = (k * at("time_mix_k_k")).reshape(heads)
    kappa = kappa / np.maximum(np.linalg.norm(kappa, axis=-1, keepdims=True), KEY_NORM_FLOOR)
    k = k + k * (a - 1) * at("time_mix_k_a")
    r, w, k, v, a = (vector.reshape(heads) for vector in (r, w, k, v, a))
    size = v.shape[-1]
    state = np.zeros((model.n_head, size, size))  # (head, value, key)
    y = np.empty_like(v)
    for t in range(len(x)):
        removed = state @ kappa[t][..., None]
        state = state * w[t][:, None] - removed * (kappa[t] * a[t])[:, None] + v[t][..., None] * k[t][:, None]
        y[t] = (state @ r[t][..., None])[..., 0]
    y = _head_normed(y, at("time_mix_ln"), model(f"{block}time_mix_ln.bias"))
    bonus = (r * k * at("time_mix_r_k").reshape(1, *heads[1:])).sum(-1, keepdims=True) * v
    mixed_in: Array = ((y + bonus.reshape(len(x), -1)) * gate) @ at("time_mix_output").T
    return mixed_in


def _time_mix6(model: _Model, block: str, at: Callable[[str], Array], x: Array, shared: dict[str, Array]) -> Array:
    shift = _shifted(x) - x
    if f"{block}time_mix_lerp_fused.weight" in model:
        shares = at("time_mix_lerp_fused").reshape(5, -1)
    else:
        shares = np.stack([at(f"time_mix_lerp_{letter}").reshape(-1) for letter in "wkvrg"])
    inner = np.tanh((x + shift * at("time_mix_lerp_x").reshape(-1)) @ at("time_mix_w1").T).reshape(len(x), 5, -1)
    x_w, x_k, x_v, x_r, x_g = (
        x + shift * (share + inner[:, i] @ at("time_mix_w2")[i].T) for i, share in enumerate(shares)
    )
    r, k, v, gate = (
        given @ at(f"time_mix_{name}").T
        for given, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"), (x_g, "gate"))
    )
    decay = np.tanh(x_w @ at("time_mix_decay_w1").T) @ at("time_mix_decay_w2").T + at("time_mix_decay").reshape(-1)
    heads = (len(x), model.n_head, -1)
    r, w, k, v = (vector.reshape(heads) for vector in (r, np.exp(-np.exp(decay)), k, v))
    first = at("time_mix_first").reshape(*heads[1:])
    state = np.zeros((model.n_head, k.shape[-1], v.shape[-1]))  # (head, key, value)
    y = np.empty_like(v)
    for t in range(len(x)):
        written = k[t][..., None] * v[t][:, None]
        y[t] = np.einsum("hk,hkv->hv", r[t], state + first[..., None] * written)
        state = state * w[t][..., None] + written
    y = _head_normed(y, at("time_mix_ln"), model(f"{block}time_mix_ln.bias"))
    mixed_in: Array = (y * gate * _sigmoid(gate)) @ at("time_mix_output").T
    return mixed_in


def _channel_mix(gated: bool, at: Callable[[str], Array], x: Array) -> Array:
    shift = _shifted(x) - x
    hidden = np.maximum((x + shift * at("channel_mix_lerp_k").reshape(-1)) @ at("channel_mix_key").T, 0) ** 2
    y: Array = hidden @ at("channel_mix_value").T
    if gated:
        y = y * _sigmoid((x + shift * at("channel_mix_lerp_r").reshape(-1)) @ at("channel_mix_receptance").T)
    return y


def _shifted(x: Array) -> Array:
    """Of each token the one before it, and zeros before the first."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def _normed(x: Array, eps: float) -> Array:
    made: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return made


def _head_normed(y: Array, weight: Array, bias: Array) -> Array:
    return _normed(y, HEAD_NORM_EPS).reshape(len(y), -1) * weight + bias


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def main(out: str, tokens_file: str, *paths: str) -> None:
    """Write the logits of each file's model."""
    tokens = np.load(tokens_file)
    results: dict[str, Any] = {f"logits_{i}": logits(Path(path), tokens[i]) for i, path in enumerate(paths)}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
