#!/usr/bin/env python3
"""Writes an RWKV-7 checkpoint as GGUF, so that llama.cpp can be measured on the weights that goslet is measured on.

    tools/gguf_rwkv7.py CHECKPOINT -o OUT.gguf [--type F16|F32]

Names, shapes and types are those of llama.cpp's own converter, as of the version that llama-cpp-python 0.3.36 brings:
F16 leaves vectors and the decay's LoRA in F32. The file has no vocabulary and takes token ids. Quantize it with
llama.cpp's `llama_model_quantize`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from goslet.spec import EMBEDDING

# Only writing needs torch: a process that measures llama.cpp goes without.
if TYPE_CHECKING:
    from torch import Tensor

    from goslet.export.checkpoint import Checkpoint

ARCHITECTURE = "rwkv7"
TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
MIX_ORDER = "rwkvag"
# llama.cpp takes a value-residual LoRA in layer 0 too, of the in-context learning rate's rank, and never reads it.
UNREAD = tuple(f"blk.0.time_mix_v{part}.weight" for part in "012")
CONTEXT_TOKENS = 1 << 20  # llama.cpp asks for a length; a recurrent model has none

_BLOCK_NAMES = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.k_k": "time_mix_k_k",
    "att.k_a": "time_mix_k_a",
    "att.r_k": "time_mix_r_k",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "att.ln_x": "time_mix_ln",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
    **{f"att.{letter}{part}": f"time_mix_{letter}{part}" for letter in "wavg" for part in "012"},
}
_NAMES = {EMBEDDING: "token_embd.weight", "head.weight": "output.weight"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor; KeyError for a tensor that RWKV-7 does not have."""
    if name in _NAMES:
        return _NAMES[name]
    stem, _, ending = name.rpartition(".")
    if ending not in ("weight", "bias"):
        stem, ending = name, "weight"
    if stem == "ln_out":
        return f"output_norm.{ending}"
    _, layer, part = stem.split(".", 2)
    if part == "ln0":
        return f"token_embd_norm.{ending}"
    return f"blk.{layer}.{_BLOCK_NAMES[part]}.{ending}"


def _tensors(source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Names in llama.cpp's form and float32 tensors, matrices [out, in], one at a time."""
    import torch

    for name, wanted in source.sources.items():
        part = name.rpartition(".")[2]
        if ".att.x_" in name:
            # The six mixing vectors of a layer are one tensor there, which stands where the first of them is met.
            if part == f"x_{MIX_ORDER[0]}":
                block = name.removesuffix(part)
                mixes = [source.source(source.sources[f"{block}x_{letter}"]).reshape(1, 1, -1) for letter in MIX_ORDER]
                yield (
                    f"{block.replace('blocks', 'blk').removesuffix('att.')}time_mix_lerp_fused.weight",
                    torch.stack(mixes),
                )
            continue
        tensor = source.source(wanted)
        if name.startswith("blocks.") and part[:1] in "wavg" and part[1:] in ("1", "2"):
            tensor = tensor.T  # stored as [in, out]
        elif part == "r_k":
            tensor = tensor.flatten()
        yield gguf_name(name), tensor
        if name.startswith("blocks.0.att.a"):
            yield gguf_name(name.replace("att.a", "att.v")), tensor


def _stored(name: str, tensor: Tensor, kind: str) -> NDArray[Any]:
    stays = tensor.ndim != 2 or name.endswith(("time_mix_w1.weight", "time_mix_w2.weight"))
    return tensor.contiguous().numpy().astype(np.float32 if kind == "F32" or stays else np.float16)


def write_gguf(checkpoint: Path, path: Path, kind: str = "F16") -> None:
    """Write the checkpoint's weights, tensor by tensor.

    Args:
        checkpoint: an RWKV-7 ``.pth`` or ``.safetensors`` file.
        path: the file to write.
        kind: ``F16`` or ``F32``.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not a known model.
        ValueError: it is not RWKV-7, or its group norm has another eps than the one fixed in llama.cpp.
    """
    from goslet.export.checkpoint import open_checkpoint

    with open_checkpoint(checkpoint) as source:
        spec = source.spec
        if spec.version != "7" or spec.norm_eps != 64e-5:
            raise ValueError(f"{checkpoint}: llama.cpp runs RWKV-7 with a group norm's eps of 64e-5")
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_context_length(CONTEXT_TOKENS)
        writer.add_embedding_length(spec.n_embd)
        writer.add_block_count(spec.n_layer)
        writer.add_feed_forward_length(spec.n_ffn)
        writer.add_head_count(0)
        writer.add_layer_norm_eps(spec.layer_norm_eps)
        writer.add_wkv_head_size(spec.head_size)
        writer.add_decay_lora_rank(spec.ranks["w"])
        writer.add_iclr_lora_rank(spec.ranks["a"])
        writer.add_value_residual_mix_lora_rank(spec.ranks.get("v", spec.ranks["a"]))
        writer.add_gate_lora_rank(spec.ranks["g"])
        writer.add_token_shift_count(2)
        writer.add_file_type(TYPES[kind])
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(spec.vocab_size)
        # Twice over the tensors, shapes first: the whole model need not lie in memory.
        for name, tensor in _tensors(source):
            stored = _stored(name, tensor, kind)
            writer.add_tensor_info(name, stored.shape, stored.dtype, stored.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(source):
            writer.write_tensor_data(_stored(name, tensor, kind))
        writer.close()


def bytes_per_token(path: Path) -> int:
    """Bytes that llama.cpp's step must read of a file: every weight once, one row of the embedding, and the state."""
    reader = gguf.GGUFReader(path)
    size_bytes = 0
    for tensor in reader.tensors:
        if tensor.name == _NAMES[EMBEDDING]:
            size_bytes += tensor.n_bytes // int(tensor.shape[1])
        elif tensor.name not in UNREAD:
            size_bytes += tensor.n_bytes

    def number(key: str) -> int:
        return int(reader.fields[f"{ARCHITECTURE}.{key}"].contents())

    # Two shift vectors and the WKV matrices, float32.
    return size_bytes + 4 * number("block_count") * number("embedding_length") * (2 + number("wkv.head_size"))


def tensor_types(path: Path) -> dict[str, str]:
    """The storage type of every tensor of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an RWKV-7 .pth or .safetensors file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .gguf file to write")
    parser.add_argument("--type", choices=sorted(TYPES), default="F16")
    options = parser.parse_args(arguments)
    write_gguf(options.checkpoint, options.output, options.type)
    return 0


if __name__ == "__main__":
    sys.exit(main())
