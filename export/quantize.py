"""Which tensor is stored in which format.

A recipe maps each kind of tensor, or single tensors, to a format; it has a name, or is what a budget of bits buys.
Vectors stay float32: they are a thousandth of a model, and low-bit k_k, k_a or r_k ruin it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from ..enginefile import TensorEntry
from ..errors import QuantizationError
from ..weights import FORMAT_NAMES, GROUPS, WeightFormat
from .models.tensors import Kind, TensorRule

# How integers are chosen: to the nearest, or with error feedback.
RTN = "rtn"
GPTQ = "gptq"


@dataclass(frozen=True)
class Recipe:
    """A choice of storage formats.

    Attributes:
        name: what the user asked for, recorded in the engine.
        by_kind: the format of each kind of tensor.
        by_name: formats of single tensors, which win over `by_kind`.
    """

    name: str
    by_kind: Mapping[Kind, WeightFormat]
    by_name: Mapping[str, WeightFormat] = field(default_factory=dict)

    def format_of(self, rule: TensorRule) -> WeightFormat:
        """The format that this recipe stores a tensor in.

        Raises:
            QuantizationError: a vector would be stored in fewer than 16 bits.
        """
        chosen = self.by_name.get(rule.name, self.by_kind[rule.kind])
        if not rule.is_matrix and chosen.group is not None:
            raise QuantizationError(
                "a vector cannot be quantized", place=rule.name, expected="f32, f16 or bf16", found=chosen.name
            )
        return chosen

    def to_json(self) -> dict[str, Any]:
        """What the engine's provenance records."""
        return {
            "name": self.name,
            "by_kind": {kind.value: str(chosen) for kind, chosen in self.by_kind.items()},
            "by_name": {name: str(chosen) for name, chosen in self.by_name.items()},
        }


def recipe(quant: str, group: int = 32) -> Recipe:
    """The recipe behind a ``--quant`` name.

    ``f16`` and ``bf16`` keep the embedding in f32, so that a checkpoint of the same 16 bits stays exact: with ln0
    applied its numbers are not the checkpoint's own. It takes twice the room, and no time: a step reads one row of it.

    ``int4`` keeps LoRA and the embedding, of which a step reads one row, in int8: they cost next to nothing there.
    ``int3`` keeps them in int4, and the head too, which in int3 adds 43% to the divergence for 4% of the bits
    (`tools/quant_quality.py`).

    Args:
        quant: one of f32, f16, bf16, int8, int4, int3.
        group: weights along the input axis that share a scale: 32, 64 or 128; used by the integer formats.

    Raises:
        QuantizationError: no such format or group.
    """
    if quant not in FORMAT_NAMES:
        raise QuantizationError(
            "no such quantization", place="quant", expected=", ".join(FORMAT_NAMES), found=repr(quant)
        )
    if group not in GROUPS:
        raise QuantizationError("no such group size", place="group", expected="32, 64 or 128", found=group)
    exact = WeightFormat("f32")
    if quant in ("f32", "f16", "bf16"):
        matrix = careful = head = WeightFormat(quant)
        embedding = exact
    else:
        matrix = WeightFormat(quant, group)
        careful = WeightFormat("int4" if quant == "int3" else "int8", group)
        embedding = careful
        head = careful if quant == "int3" else matrix
    return Recipe(
        quant,
        {
            Kind.EMBEDDING: embedding,
            Kind.HEAD: head,
            Kind.PROJECTION: matrix,
            Kind.CHANNEL_MIX: matrix,
            Kind.LORA: careful,
            Kind.VECTOR: exact,
        },
    )


# What a budget of bits is spent on: the formats that a matrix may be stored in, of ever more bits.
MENU = (
    WeightFormat("int3", 128),
    WeightFormat("int3", 64),
    WeightFormat("int3", 32),
    WeightFormat("int4", 128),
    WeightFormat("int4", 64),
    WeightFormat("int4", 32),
    WeightFormat("int8", 128),
    WeightFormat("f16"),
)


def budget_recipe(
    bits: float, rules: Sequence[TensorRule], losses: Mapping[str, Mapping[WeightFormat, float]]
) -> Recipe:
    """The recipe that costs least of those that take at most so many bits per weight.

    Every matrix begins with the fewest bits. Then, again and again, what is bought is the step that saves most loss for
    its bytes, of those that still fit. A matrix's steps go along the lower convex hull of its (bytes, loss), so that a
    format that is worse than a mixture of its neighbours is passed over. But for the last few steps, which do not fit,
    this is the best choice where the losses of the tensors add up.

    Args:
        bits: bits per weight of the whole model, scales, padding and vectors included.
        rules: the engine's tensors.
        losses: what storing each matrix in each format costs, by its name (`goslet.export.sensitivity`).

    Raises:
        QuantizationError: the fewest bits are more than `bits`.
    """
    vectors = recipe("int4").by_kind
    n_numbers = sum(math.prod(rule.shape) for rule in rules)
    left = bits * n_numbers / 8
    chosen: dict[str, WeightFormat] = {}
    steps: list[tuple[float, int, str, _Option, int]] = []
    for index, rule in enumerate(rules):
        if not rule.is_matrix:
            left -= _stored_bytes(rule, vectors[rule.kind])
            continue
        hull = _hull(rule, losses[rule.name])
        chosen[rule.name] = hull[0].format
        left -= hull[0].size_bytes
        for option, better in pairwise(hull):
            steps.append((_slope(option, better), index, rule.name, better, better.size_bytes - option.size_bytes))
    _refuse_below(bits - 8 * left / n_numbers, bits)
    closed = set()
    for _, _, name, option, more_bytes in sorted(steps, key=lambda step: step[:2]):
        if more_bytes > left:
            closed.add(name)
        if name not in closed:
            left -= more_bytes
            chosen[name] = option.format
    return Recipe(f"{bits:g} bits", vectors, chosen)


def check_budget(bits: float, rules: Sequence[TensorRule]) -> None:
    """Refuse a budget that not even the fewest bits for every tensor meet, before anything is measured.

    Raises:
        QuantizationError: it cannot be met.
    """
    vectors = recipe("int4").by_kind
    n_numbers = sum(math.prod(rule.shape) for rule in rules)
    fewest = sum(
        min(_stored_bytes(rule, fmt) for fmt in (MENU if rule.is_matrix else [vectors[rule.kind]])) for rule in rules
    )
    _refuse_below(8 * fewest / n_numbers, bits)


def _refuse_below(least: float, bits: float) -> None:
    if bits < least:
        raise QuantizationError(
            "cannot be met", place="bits", expected=f"{least:.3f} or more for this model", found=f"{bits:g}"
        )


class _Option(NamedTuple):
    size_bytes: int
    loss: float
    format: WeightFormat


def _stored_bytes(rule: TensorRule, fmt: WeightFormat) -> int:
    entry = TensorEntry.placed(rule.name, fmt, rule.layout, rule.shape, 0)
    return entry.size_bytes + entry.scales_size_bytes


def _hull(rule: TensorRule, losses: Mapping[WeightFormat, float]) -> list[_Option]:
    """The formats worth choosing, from the smallest on: each saves less loss for a byte than the one before it."""
    hull: list[_Option] = []
    options = (_Option(_stored_bytes(rule, fmt), loss, fmt) for fmt, loss in losses.items())
    for option in sorted(options, key=lambda option: (option.size_bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(option: _Option, larger: _Option) -> float:
    return (larger.loss - option.loss) / (larger.size_bytes - option.size_bytes)
