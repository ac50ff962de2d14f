"""flash-linear-attention's names and forms of RWKV-6 and 7's tensors, turned into RWKV's own.

Source: fla's ``utils/convert_from_rwkv6.py`` and ``convert_from_rwkv7.py``. LoRA matrices lie the other way round, a
LoRA's first numbers are its bias, and ln0 is ``pre_norm``. RWKV-6's five shares come in the order r, w, k, v, g there,
and w, k, v, r, g in RWKV's own files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import TensorShapeError
from .stored import ConvertedTensor, StoredTensor, shares, turned

Named = Iterator[tuple[str, StoredTensor]]

_TOP = {
    "embeddings.weight": "emb.weight",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "lm_head.weight": "head.weight",
}
# The model without its head is saved without this.
_PREFIX = "model."
_LAYER = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)
_OF_FLA = re.compile(r"(?:model\.)?layers\.\d+\.attn\.", re.ASCII)
_OF_FLA7 = re.compile(_OF_FLA.pattern + r"(?:[rk]_k|k_a|x_x|[wavg]_lora\..+)", re.ASCII)
_PARTS = {
    "pre_norm": "ln0",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn.g_norm": "att.ln_x",
    "attn.o_proj": "att.output",
}
_PARTS7 = {
    **_PARTS,
    "attn.r_proj": "att.receptance",
    "attn.k_proj": "att.key",
    "attn.v_proj": "att.value",
}
_PARTS6 = {
    **_PARTS,
    "attn.r_proj.linear": "att.receptance",
    "attn.k_proj.linear": "att.key",
    "attn.v_proj.linear": "att.value",
    "attn.g_proj.linear": "att.gate",
    "ffn.key.linear": "ffn.key",
    "ffn.receptance.linear": "ffn.receptance",
    "ffn.value": "ffn.value",
}
_WHOLE6 = {
    "attn.x_proj.0.mu": "att.time_maa_x",
    "attn.bonus": "att.time_faaaa",
    "attn.w_proj.linear.lora.2.bias": "att.time_decay",
    "ffn.key.mu": "ffn.time_maa_k",
    "ffn.receptance.mu": "ffn.time_maa_r",
}
_TURNED6 = {
    "attn.w_proj.linear.lora.0.weight": "att.time_decay_w1",
    "attn.w_proj.linear.lora.2.weight": "att.time_decay_w2",
}
_ORDER6 = "rwkvg"
_OWN_ORDER6 = "wkvrg"
_LORA7 = re.compile(r"attn\.([wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)", re.ASCII)
_LORA7_PARTS = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}
_ORDER7 = "rwkvag"


def is_fla7(name: str) -> bool:
    """Whether a tensor's name is one that only RWKV-7 has there."""
    return _OF_FLA7.fullmatch(name) is not None


def is_fla(name: str) -> bool:
    """Whether a tensor's name is that of an attention there, of any version."""
    return _OF_FLA.match(name) is not None


def from_fla7(name: str, stored: StoredTensor) -> Named:
    """An RWKV-7's tensor under its own name, or, of stacked ones, each.

    Raises:
        TensorShapeError: it has not the form that its name says.
    """
    block, part = _place(name)
    lora = _LORA7.fullmatch(part)
    stem, _, ending = part.rpartition(".")
    if not block:
        yield part, stored
    elif lora is not None:
        number = _LORA7_PARTS[lora[2]]
        yield f"{block}.att.{lora[1]}{number}", stored if number == "0" else turned(stored)
    elif part == "attn.x_x":
        for letter, share in shares(stored, _ORDER7).items():
            yield f"{block}.att.x_{letter}", share
    elif stem in _PARTS7:
        yield f"{block}.{_PARTS7[stem]}.{ending}", stored
    else:
        yield f"{block}.{part.replace('attn.', 'att.', 1)}", stored


def from_fla6(name: str, stored: StoredTensor) -> Named:
    """An RWKV-6's tensor under its own name, or, of stacked ones, each.

    Raises:
        TensorShapeError: it has not the form that its name says.
    """
    block, part = _place(name)
    stem, _, ending = part.rpartition(".")
    if not block:
        yield part, stored
    elif part in _WHOLE6:
        yield f"{block}.{_WHOLE6[part]}", stored
    elif part in _TURNED6:
        yield f"{block}.{_TURNED6[part]}", turned(stored)
    elif part == "attn.x_bias":
        for letter, share in shares(stored, _ORDER6).items():
            yield f"{block}.att.time_maa_{letter}", share
    elif part == "attn.x_proj.0.linear.weight":
        rank, width = _five(stored, 0)
        yield f"{block}.att.time_maa_w1", ConvertedTensor(stored, (width, 5 * rank), _down)
    elif part == "attn.x_proj.2.weight":
        rank, width = _five(stored, 1)
        yield f"{block}.att.time_maa_w2", ConvertedTensor(stored, (5, rank, width), _up)
    elif stem in _PARTS6:
        yield f"{block}.{_PARTS6[stem]}.{ending}", stored
    else:
        yield f"{block}.{part}", stored


def _place(name: str) -> tuple[str, str]:
    """A tensor's block in RWKV's own words, empty for one outside all layers, and the rest of its name."""
    inner = name.removeprefix(_PREFIX)
    found = _LAYER.fullmatch(inner)
    return ("", _TOP.get(inner, name)) if found is None else (f"blocks.{int(found[1])}", found[2])


def _five(stored: StoredTensor, axis: int) -> tuple[int, int]:
    """The rank and the width of a matrix that stacks five LoRAs along an axis."""
    if len(stored.shape) != 2 or stored.shape[axis] % 5:
        raise TensorShapeError(
            "does not stack five LoRAs", expected=f"a multiple of 5 on axis {axis}", found=list(stored.shape)
        )
    return stored.shape[axis] // 5, stored.shape[1 - axis]


def _in_own_order(pieces: tuple[Tensor, ...]) -> list[Tensor]:
    return [pieces[_ORDER6.index(letter)] for letter in _OWN_ORDER6]


def _down(tensor: Tensor) -> Tensor:
    return torch.cat(_in_own_order(tensor.chunk(5))).T


def _up(tensor: Tensor) -> Tensor:
    return torch.stack([piece.T for piece in _in_own_order(tensor.chunk(5, 1))])
