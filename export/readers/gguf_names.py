"""llama.cpp's names and forms of RWKV-6 and 7's tensors, turned into RWKV's own.

Source: llama.cpp's ``conversion/rwkv.py``. LoRA matrices are turned, the shares of the token before are one stacked
tensor, RWKV-7's bonus is flat, and RWKV-6 may store its output and value matrices divided by a power of two that grows
every few layers, which is undone here and is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .stored import ConvertedTensor, StoredTensor, shares, turned

_TOP = {"token_embd": "emb", "token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out", "output": "head"}
_BLOCK = {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}
_MATRIX = re.compile(r"(time|channel)_mix_(key|value|receptance|output|gate)", re.ASCII)
_ROOM = {"time": "att", "channel": "ffn"}
# The order in which the shares of the token before are stacked.
_STACKED = {"rwkv6": "wkvrg", "rwkv7": "rwkvag"}
_PLAIN = {
    "rwkv6": {"lerp_x": "time_maa_x", "first": "time_faaaa", "decay": "time_decay"}
    | {f"lerp_{letter}": f"time_maa_{letter}" for letter in "wkvrg"},
    "rwkv7": {name: name for name in ("w0", "a0", "v0", "k_k", "k_a")},
}
_TURNED = {
    "rwkv6": {"w1": "time_maa_w1", "decay_w1": "time_decay_w1", "decay_w2": "time_decay_w2"},
    "rwkv7": {f"{letter}{part}": f"{letter}{part}" for letter in "wavg" for part in "12"},
}
_SHARES = {"rwkv6": "time_maa_", "rwkv7": "x_"}
_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)

ARCHITECTURES = tuple(_STACKED)


def from_gguf(
    name: str, stored: StoredTensor, architecture: str, head_size: int, rescale: int
) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor under its own name, or, of stacked ones, each; what is unknown keeps its name, by which it is refused.

    Args:
        name: its name in the file.
        stored: the tensor.
        architecture: ``rwkv6`` or ``rwkv7``.
        head_size: N.
        rescale: after how many layers the divisor of RWKV-6's output and value matrices doubles; 0 for never.

    Raises:
        TensorShapeError: it has not the axes that its name says.
    """
    stem, _, ending = name.rpartition(".")
    found = _NAME.fullmatch(name)
    if found is None:
        yield (f"{_TOP[stem]}.{ending}" if stem in _TOP else name), stored
        return
    layer, part, ending = int(found[1]), found[2], found[3]
    block = f"blocks.{layer}"
    matrix = _MATRIX.fullmatch(part)
    inner = part.removeprefix("time_mix_")
    if part in _BLOCK:
        yield f"{block}.{_BLOCK[part]}.{ending}", stored
    elif matrix is not None:
        divided = architecture == "rwkv6" and rescale and part in ("time_mix_output", "channel_mix_value")
        if divided:
            factor = 2.0 ** min(layer // rescale, 127)  # beyond that no float32 is left to divide
            stored = ConvertedTensor(stored, stored.shape, lambda tensor: tensor * factor)
        yield f"{block}.{_ROOM[matrix[1]]}.{matrix[2]}.{ending}", stored
    elif part in ("channel_mix_lerp_k", "channel_mix_lerp_r"):
        yield f"{block}.ffn.{_SHARES[architecture]}{part[-1]}", stored
    elif part == "time_mix_lerp_fused":
        for letter, share in shares(stored, _STACKED[architecture]).items():
            yield f"{block}.att.{_SHARES[architecture]}{letter}", share
    elif part.startswith("time_mix_") and inner in _TURNED[architecture]:
        yield f"{block}.att.{_TURNED[architecture][inner]}", turned(stored)
    elif architecture == "rwkv6" and inner == "w2" and len(stored.shape) == 3:
        n, width, rank = stored.shape
        yield (
            f"{block}.att.time_maa_w2",
            ConvertedTensor(stored, (n, rank, width), lambda tensor: tensor.permute(0, 2, 1)),
        )
    elif architecture == "rwkv7" and inner == "r_k" and stored.shape and stored.shape[-1] % head_size == 0:
        heads = (stored.shape[-1] // head_size, head_size)
        yield f"{block}.att.r_k", ConvertedTensor(stored, heads, lambda tensor: tensor)
    elif part.startswith("time_mix_") and inner in _PLAIN[architecture]:
        yield f"{block}.att.{_PLAIN[architecture][inner]}", stored
    else:
        yield name, stored
