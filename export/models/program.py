"""What a version's file states its native program with: fused steps over registers, written as JSON.

The step graph stays the truth; the program is the same computation in the order and the fusion that suit a CPU
(csrc/program.h describes the form, csrc/steps.h the steps). `goslet verify` and the tests hold the two equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...spec import ModelSpec

PROGRAM_VERSION = 3


class Program:
    """Collects a version's registers and steps.

    A register holds one row of numbers between steps. Every name of a tensor is one of the version's tensor rules, and
    every state name one of its state's tensors; the native engine refuses a program where a name or a shape is wrong.

    Args:
        pieces: the registers that the token's row of the embedding is put into, and their sizes, in order. Products
            cannot take them as input.
    """

    def __init__(self, pieces: Mapping[str, int]) -> None:
        self._input = list(pieces)
        self._registers = dict(pieces)
        self._steps: list[dict[str, Any]] = []

    def register(self, name: str, size: int) -> str:
        """Name a register of `size` numbers; naming it again with the same size is allowed.

        Raises:
            ValueError: it has another size already.
        """
        if self._registers.setdefault(name, size) != size:
            raise ValueError(f"register {name} has {self._registers[name]} numbers, not {size}")
        return name

    def norm_shift(
        self,
        *,
        x: str,
        norm: str,
        eps: float,
        shift: str,
        mixes: Mapping[str, str],
        normed: str | None = None,
        previous: str | None = None,
    ) -> None:
        """h = LayerNorm(x); each mix's register = h + (shift - h) · mix; the shift becomes h.

        Args:
            x: the register that is normed.
            norm: the norm's name.
            eps: its eps.
            shift: the state's tensor.
            mixes: the register for every mix, by the mix's tensor.
            normed: a register that takes h, or None.
            previous: a register that takes the shift as it was, or None.
        """
        items = [{"mix": mix, "out": out} for mix, out in mixes.items()]
        self._add("norm_shift", x=x, norm=norm, eps=eps, shift=shift, mixes=items, normed=normed, previous=previous)

    def linear(self, *products: dict[str, Any]) -> None:
        """Products that need not wait for each other, each made by `product`."""
        self._add("linear", products=list(products))

    def wkv(self, version: int, **members: Any) -> None:
        """A version's time mix behind its projections; csrc/program_wkv.cpp lists each one's members."""
        self._add(f"wkv{version}", **members)

    def token_product(self, *, x: str, matrix: str, out: str) -> None:
        """out = x @ matrix, a square matrix that belongs to the token: a piece of the input of size(x)² numbers."""
        self._add("token_product", x=x, matrix=matrix, out=out)

    def logits(self, *, x: str, norm: str, eps: float, weight: str) -> None:
        """The last LayerNorm and the head; always the last step."""
        self._add("logits", x=x, norm=norm, eps=eps, weight=weight)

    def _add(self, op: str, **members: Any) -> None:
        self._steps.append({"op": op, **members})

    def to_bytes(self) -> bytes:
        """The program as the engine file's section ``program``; the same steps give the same bytes."""
        value = {
            "version": PROGRAM_VERSION,
            "registers": self._registers,
            "input": self._input,
            "steps": self._steps,
        }
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def product(
    weight: str,
    x: str,
    out: str,
    *,
    bias: str | None = None,
    activation: str = "none",
    combine: str = "set",
    operands: Sequence[str] = (),
) -> dict[str, Any]:
    """y = activation(weight @ x + bias), combined into a register.

    Args:
        weight: the matrix [out, in].
        x: the register that it is applied to.
        out: the register that takes the result.
        bias: a vector, or None.
        activation: none, tanh, sigmoid, silu, relu_squared, decay or double_exp; csrc/kernels/kernels.h gives the
            formulas.
        combine: what becomes of y, number by number: ``set`` (out = y), ``add`` (out += y), ``gate`` (out = y · a),
            ``gate_add`` (out += y · a) or ``lerp`` (out = a + (b - a) · y).
        operands: the registers a and b, as many as `combine` takes; a may be `out`.
    """
    return {
        "weight": weight,
        "x": x,
        "out": out,
        "residual": None,
        "bias": bias,
        "activation": activation,
        "combine": combine,
        "operands": list(operands),
    }


def gated_channel_mix(steps: Program, spec: ModelSpec, layer: int, mix: str) -> None:
    """The channel mix of versions 4 to 6 on register ``x``; `mix` as for `blocks.gated_channel_mix`."""
    ffn = f"blocks.{layer}.ffn"
    mixed_k, mixed_r = (steps.register(f"mixed_{letter}", spec.n_embd) for letter in "kr")
    gate, hidden = steps.register("r", spec.n_embd), steps.register("hidden", spec.n_ffn)
    steps.norm_shift(
        x="x",
        norm=f"blocks.{layer}.ln2",
        eps=spec.layer_norm_eps,
        shift=f"{layer}.ffn_shift",
        mixes={f"{ffn}.{mix}k": mixed_k, f"{ffn}.{mix}r": mixed_r},
    )
    steps.linear(
        product(f"{ffn}.key.weight", mixed_k, hidden, activation="relu_squared"),
        product(f"{ffn}.receptance.weight", mixed_r, gate, activation="sigmoid"),
    )
    steps.linear(product(f"{ffn}.value.weight", hidden, "x", combine="gate_add", operands=[gate]))
