"""Ways to store a recurrent state between two tokens, as tools/state_precision.py compares them.

A format takes a state's tensor and gives what would be read back, in float32. Rounding is to nearest, ties to even, or
stochastic: up with the probability of the part that is cut off, so that it is right on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from goslet.weights import INTEGER_RANGES

Format = Callable[[Tensor, torch.Generator], Tensor]
INT8_MAX = INTEGER_RANGES["int8"][1]


def exact(x: Tensor, generator: torch.Generator) -> Tensor:
    """Float32, as it is."""
    return x


def f16(x: Tensor, generator: torch.Generator) -> Tensor:
    """IEEE half: 11 bits of significand, numbers from 6e-8 to 65504, beyond which they become infinite."""
    return x.half().float()


def bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """The upper half of a float32: 8 bits of significand."""
    return x.bfloat16().float()


def bf16_stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """bf16, rounded stochastically: 16 random bits are added to those that are cut off."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32)
    # The magnitude grows whatever the sign, and a carry goes into the exponent, as it should.
    return ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 with fp16 scales, largest magnitude / 127.

    Attributes:
        shared: the axes, counted from the last, whose numbers share a scale.
        stochastic: whether rounding is.
    """

    shared: tuple[int, ...]
    stochastic: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What x becomes; numbers whose scale would be below fp16's smallest become 0."""
        scale = (x.abs().amax(self.shared, keepdim=True) / INT8_MAX).half().float()
        quotient = x / torch.where(scale == 0, 1.0, scale)
        if self.stochastic:
            quotient = (quotient + torch.rand(x.shape, generator=generator)).floor()
        return quotient.round().clamp(-INT8_MAX, INT8_MAX) * scale


@dataclass(frozen=True)
class Storage:
    """How a whole state is kept.

    Attributes:
        name: in tables.
        wkv: the format of the WKV matrices [.., N (value), N (key)].
        shift: the format of the shift vectors [.., D].
        bytes_per_wkv_number: with its share of the scales, at a head size of 64.
        bytes_per_shift_number: with its share of the scale, which is less than a hundredth.
    """

    name: str
    wkv: Format
    shift: Format
    bytes_per_wkv_number: float
    bytes_per_shift_number: float

    def stored(self, name: str, x: Tensor, generator: torch.Generator) -> Tensor:
        """What the state's tensor `name` is when the next token comes."""
        return (self.wkv if name.endswith(".wkv") else self.shift)(x, generator)


STORAGES = (
    Storage("f32", exact, exact, 4, 4),
    Storage("f16", f16, exact, 2, 4),
    Storage("bf16", bf16, exact, 2, 4),
    Storage("bf16, stochastic", bf16_stochastic, exact, 2, 4),
    Storage("int8, scale a row", Int8((-1,)), exact, 1 + 2 / 64, 4),
    Storage("int8, scale a row, stochastic", Int8((-1,), stochastic=True), exact, 1 + 2 / 64, 4),
    Storage("int8, scale a column", Int8((-2,)), exact, 1 + 2 / 64, 4),
    Storage("int8, scale a head", Int8((-1, -2)), exact, 1 + 2 / 4096, 4),
    Storage("f16, shifts too", f16, f16, 2, 2),
    Storage("bf16, shifts too", bf16, bf16, 2, 2),
    Storage("int8, scale a row, shifts too", Int8((-1,)), Int8((-1,)), 1 + 2 / 64, 1),
)
