"""Which tensor is stored in which format.

A recipe maps each kind of tensor to a format. Vectors stay float32: they are a thousandth of a model, and low-bit
k_k, k_a or r_k ruin it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import QuantizationError
from ..weights import FORMAT_NAMES, GROUPS, WeightFormat
from .models.tensors import Kind, TensorRule


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

    ``int4`` keeps LoRA and the embedding, of which a step reads one row, in int8: they cost next to nothing there.

    Args:
        quant: one of f32, f16, bf16, int8, int4.
        group: weights along the input axis that share a scale: 32, 64 or 128; used by int8 and int4.

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
        matrix = WeightFormat(quant)
        careful = matrix
    else:
        matrix = WeightFormat(quant, group)
        careful = WeightFormat("int8", group)
    return Recipe(
        quant,
        {
            Kind.EMBEDDING: careful,
            Kind.HEAD: matrix,
            Kind.PROJECTION: matrix,
            Kind.CHANNEL_MIX: matrix,
            Kind.LORA: careful,
            Kind.VECTOR: exact,
        },
    )
