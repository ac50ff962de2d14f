"""Writers of folders as libraries save their models, from tensors in RWKV's own names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def n_layers(tensors: Mapping[str, torch.Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def write_config(folder: Path, config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def save_fla(
    tensors: Tensors, folder: Path, *, head_dim: int = 64, shards: int = 1, fused: bool = False, **config: Any
) -> None:
    """As fla's converter writes an RWKV-7: https://github.com/fla-org/flash-linear-attention, convert_from_rwkv7.py."""
    parts = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "ffn": "ffn"}
    inner = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
    top = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks.0.att.v") and name[-1] in "012":
            continue
        words = name.split(".")
        if words[0] != "blocks":
            renamed[top.get(name, name.replace("ln_out", "model.norm"))] = tensor
            continue
        words[0], words[2] = "model.layers", parts[words[2]]
        if words[2] == "attn" and len(words[3]) == 2 and words[3][0] in "wavg" and words[3][1] in "012":
            letter, number = words[3]
            words[3] = f"{letter}_lora.lora." + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[number]
            tensor = tensor.T if number in "12" else tensor.reshape(-1)
        elif words[2] == "attn":
            words[3] = inner.get(words[3], words[3])
        renamed[".".join(words)] = tensor
    if fused:
        for layer in range(n_layers(tensors)):
            names = [f"model.layers.{layer}.attn.x_{letter}" for letter in "rwkvag"]
            renamed[f"model.layers.{layer}.attn.x_x"] = torch.cat([renamed.pop(name).reshape(1, -1) for name in names])
    write_config(folder, {"model_type": "rwkv7", "norm_eps": 1e-5, "head_dim": head_dim}, config)
    save_shards(renamed, folder, shards, save_file)


def save_fla6(tensors: Tensors, folder: Path, *, shards: int = 1, **config: Any) -> None:
    """As fla's converter writes an RWKV-6: the same repository, convert_from_rwkv6.py."""
    renamed: Tensors = {
        "model.embeddings.weight": tensors["emb.weight"],
        "lm_head.weight": tensors["head.weight"],
        **{f"model.norm.{part}": tensors[f"ln_out.{part}"] for part in ("weight", "bias")},
        **{f"model.layers.0.pre_norm.{part}": tensors[f"blocks.0.ln0.{part}"] for part in ("weight", "bias")},
    }
    for layer in range(n_layers(tensors)):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        for their, own in {"attn_norm": "ln1", "ffn_norm": "ln2", "attn.g_norm": "att.ln_x"}.items():
            for part in ("weight", "bias"):
                renamed[f"{theirs}{their}.{part}"] = tensors[f"{ours}{own}.{part}"]
        attn, att, ffn = f"{theirs}attn.", f"{ours}att.", f"{ours}ffn."
        renamed[f"{attn}x_proj.0.mu"] = tensors[f"{att}time_maa_x"].reshape(-1)
        w, k, v, r, g = tensors[f"{att}time_maa_w1"].chunk(5, 1)
        renamed[f"{attn}x_proj.0.linear.weight"] = torch.cat((r, w, k, v, g), 1).T
        w, k, v, r, g = tensors[f"{att}time_maa_w2"]
        renamed[f"{attn}x_proj.2.weight"] = torch.cat((r, w, k, v, g), 0).T
        renamed[f"{attn}x_bias"] = torch.stack([tensors[f"{att}time_maa_{i}"].reshape(-1) for i in "rwkvg"])
        for letter, name in {"r": "receptance", "k": "key", "v": "value", "g": "gate"}.items():
            renamed[f"{attn}{letter}_proj.linear.weight"] = tensors[f"{att}{name}.weight"]
        renamed[f"{attn}w_proj.linear.lora.0.weight"] = tensors[f"{att}time_decay_w1"].T
        renamed[f"{attn}w_proj.linear.lora.2.weight"] = tensors[f"{att}time_decay_w2"].T
        renamed[f"{attn}w_proj.linear.lora.2.bias"] = tensors[f"{att}time_decay"].reshape(-1)
        renamed[f"{attn}bonus"] = tensors[f"{att}time_faaaa"]
        renamed[f"{attn}o_proj.weight"] = tensors[f"{att}output.weight"]
        for name, mix in {"key": "k", "receptance": "r"}.items():
            renamed[f"{theirs}ffn.{name}.linear.weight"] = tensors[f"{ffn}{name}.weight"]
            renamed[f"{theirs}ffn.{name}.mu"] = tensors[f"{ffn}time_maa_{mix}"].reshape(-1)
        renamed[f"{theirs}ffn.value.weight"] = tensors[f"{ffn}value.weight"]
    write_config(folder, {"model_type": "rwkv6", "norm_eps": 1e-5}, config)
    save_shards(renamed, folder, shards, save_file)


def save_shards(tensors: Tensors, folder: Path, shards: int, save_file: Callable[..., None]) -> None:
    if shards == 1:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for index in range(shards):
        file_name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[index::shards]
        save_file({name: tensors[name].contiguous() for name in names}, folder / file_name)
        places |= dict.fromkeys(names, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_old(tensors: Tensors, folder: Path, kind: str, **config: Any) -> None:
    """As transformers' own RWKV-4, and the 5 and 6 after it, name RWKV's tensors."""
    letters = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        name = name if name.startswith("head.") else f"rwkv.{name}"
        name = name.replace("rwkv.emb.", "rwkv.embeddings.").replace(".att.", ".attention.")
        name = name.replace(".ffn.", ".feed_forward.").replace(".ln0.", ".pre_ln.")
        if ".time_mix_" in name:
            name = name[:-1] + letters[name[-1]]
        renamed[name] = tensor
    write_config(folder, {"model_type": kind}, config)
    torch.save(renamed, folder / "pytorch_model.bin")


def save_native(tensors: Tensors, folder: Path, **config: Any) -> None:
    """As transformers' own RWKV-7 is saved: huggingface/transformers, pull request 47787."""
    head_dim = tensors["blocks.0.att.r_k"].shape[1]
    write_config(folder, {"model_type": "rwkv7", "norm_eps": 1e-5, "head_dim": head_dim}, config)
    renamed = {name if name.startswith("head.") else f"rwkv7.{name}": tensor for name, tensor in tensors.items()}
    save_shards(renamed, folder, 1, save_file)
