"""What becomes of the keys of a GGUF file, llama.cpp's architectures rwkv6 and rwkv7.

| key behind the architecture's name | what becomes of it |
|---|---|
| wkv.head_size | must be there: the size of heads N, which RWKV-7's tensors do not show and RWKV-6's must have |
| attention.layer_norm_epsilon | used: eps of every LayerNorm |
| rescale_every_n_layers | used in rwkv6: undoes the division of two matrices; rwkv7 has none |
| block_count, embedding_length, feed_forward_length, vocab_size | must be what the tensors have |
| attention.decay_lora_rank, iclr_lora_rank, value_residual_mix_lora_rank, gate_lora_rank (rwkv7) | the same |
| time_mix_extra_dim, time_decay_extra_dim (rwkv6) | the same |
| attention.head_count, head_count_kv | 0, as llama.cpp writes, or the number of heads; hybrids have fewer for keys |
| token_shift_count | 2: hybrids have 1 |
| attention.layer_norm_rms_epsilon | refused: hybrids have RMS norms |
| attention.group_norm_epsilon | 64e-5, which llama.cpp computes with whatever the file says |
| the scales, clamps and softcaps of `_NEUTRAL` | only with the value that changes nothing |
| context_length | no effect: a recurrent model has no limit |
| any other | not used, and the owner is told its name |

``general.quantization_version`` must be the one that the package gguf decodes. There is no key for the eps of the norm
by head: llama.cpp computes with 64e-5 for any size of heads.

Source: llama.cpp's ``conversion/rwkv.py``, ``src/llama-arch.cpp`` and ``src/models/rwkv*.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..models.tensors import LAYER_NORM_EPS, Shape, Shapes

HEAD_SIZE = "wkv.head_size"
RESCALE = "rescale_every_n_layers"
_LAYER_NORM_EPS = "attention.layer_norm_epsilon"
# What llama.cpp computes with.
_GROUP_NORM_EPS = 64e-5
_USED = frozenset({HEAD_SIZE, _LAYER_NORM_EPS})
_NO_EFFECT = frozenset({"context_length"})
_CONVERT = "convert the model again from its .pth or folder"


def _size(name: str, axis: int, divisor: int = 1) -> Callable[[Shapes], int | None]:
    def size(shapes: Shapes) -> int | None:
        shape: Shape = shapes.get(name, ())
        return shape[axis] // divisor if len(shape) > axis else None

    return size


def _n_layers(shapes: Shapes) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


# The dimension of the tensors that a key states; None where these do not show it.
AGREES: Mapping[str, Mapping[str, Callable[[Shapes], int | None]]] = {
    architecture: {
        "block_count": _n_layers,
        "embedding_length": _size("emb.weight", 1),
        "vocab_size": _size("emb.weight", 0),
        "feed_forward_length": _size("blocks.0.ffn.key.weight", 0),
        **own,
    }
    for architecture, own in {
        "rwkv6": {
            HEAD_SIZE: _size("blocks.0.att.time_faaaa", 1),
            "time_mix_extra_dim": _size("blocks.0.att.time_maa_w1", 1, divisor=5),
            "time_decay_extra_dim": _size("blocks.0.att.time_decay_w1", 1),
        },
        "rwkv7": {
            "attention.decay_lora_rank": _size("blocks.0.att.w1", 1),
            "attention.iclr_lora_rank": _size("blocks.0.att.a1", 1),
            # The first layer's is never read, and of another rank in llama.cpp's files.
            "attention.value_residual_mix_lora_rank": _size("blocks.1.att.v1", 1),
            "attention.gate_lora_rank": _size("blocks.0.att.g1", 1),
        },
    }.items()
}

# The values with which a key of llama.cpp's other architectures changes nothing; any other is refused by name.
NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "token_shift_count": (2,),
    "attention.layer_norm_rms_epsilon": (),
    "attention.group_norm_epsilon": (_GROUP_NORM_EPS,),
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "swin_norm": (0,),
    "use_parallel_residual": (0,),
}


@dataclass(frozen=True)
class GgufSettings:
    """What the keys say of a model's numbers.

    Attributes:
        layer_norm_eps: eps of every LayerNorm, or None where the file does not say.
        notes: what the owner should know, a sentence each.
    """

    layer_norm_eps: float | None
    notes: tuple[str, ...]


def settings(values: Mapping[str, Any], architecture: str, head_size: int, shapes: Shapes, path: Path) -> GgufSettings:
    """The settings of a model, every key of its architecture used or checked as the table above says.

    Args:
        values: the file's keys.
        architecture: ``rwkv6`` or ``rwkv7``.
        head_size: N.
        shapes: of the tensors under RWKV's own names.
        path: the file, for errors.

    Raises:
        CheckpointError: a key contradicts the tensors, or asks for something that the architecture does not have.
    """
    prefix = f"{architecture}."
    agrees, unknown = AGREES[architecture], []
    width = shapes.get("emb.weight", (0, 0))[-1]
    heads = (0, width // head_size)
    for name, value in values.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix)
        if key in agrees:
            size = agrees[key](shapes)
            _must_be(name, value, None if size is None else (size,), path, "states another size than the tensors have")
        elif key in ("attention.head_count", "attention.head_count_kv"):
            _must_be(name, value, heads, path, "states another number of heads than the tensors have")
        elif key == RESCALE and architecture == "rwkv7":
            _must_be(name, value, (0,), path, "divides matrices, which RWKV-7 does not do")
        elif key in NEUTRAL:
            _must_be(name, value, NEUTRAL[key], path, f"changes the numbers in a way that {architecture} does not have")
        elif key not in (*_USED, *_NO_EFFECT, RESCALE):
            unknown.append(name)
    eps = _eps(values, f"{prefix}{_LAYER_NORM_EPS}", path)
    notes = []
    if unknown:
        notes.append(
            f"{path.name}: keys that goslet does not know are not used: {', '.join(sorted(unknown)[:9])}"[:300]
        )
    folder_eps = head_size * (LAYER_NORM_EPS if eps is None else eps)
    if not math.isclose(folder_eps, _GROUP_NORM_EPS, rel_tol=1e-6):
        notes.append(
            f"GGUF does not say the eps of the norm by head: where no config.json does, it is {_GROUP_NORM_EPS:g}, "
            f"as in llama.cpp, and a folder of the same model may mean {folder_eps:g}; --norm-eps sets it"
        )
    return GgufSettings(eps, tuple(notes))


def _must_be(name: str, value: Any, allowed: tuple[float, ...] | None, path: Path, problem: str) -> None:
    """Every number of the value is one of those allowed; None allows any."""
    numbers = value.tolist() if isinstance(value, np.ndarray) else [value]
    if allowed is None:
        return
    for number in numbers:
        known = isinstance(number, int | float) and any(math.isclose(number, one, rel_tol=1e-6) for one in allowed)
        if not known:
            raise CheckpointError(
                problem,
                file=path,
                place=name[:100],
                expected=" or ".join(f"{one:g}" for one in sorted(set(allowed))) or "no such key",
                found=str(number)[:60],
                remedy=_CONVERT,
            )


def _eps(values: Mapping[str, Any], name: str, path: Path) -> float | None:
    """An eps as it was meant: 1e-5 and not the float32 beside it."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            "is not an eps", file=path, place=name, expected="a number above 0", found=str(value)[:60], remedy=_CONVERT
        )
    return float(str(np.float32(value)))
