"""What a version's file states its native program with: fused steps over registers, written as JSON.

The step graph stays the truth; the program is the same computation in the order and the fusion that suit a CPU
(csrc/program.h describes the form, csrc/steps.h the steps). `goslet verify` and the tests hold the two equal.
"""

from __future__ import annotations

import json
from typing import Any

PROGRAM_VERSION = 1


class Program:
    """Collects a version's registers and steps.

    A register holds one row of numbers between steps. Every name of a tensor is one of the version's tensor rules, and
    every state name one of its state's tensors; the native engine refuses a program where a name or a shape is wrong.

    Args:
        input_register: where the embedded token is put.
        n_embd: its size.
    """

    def __init__(self, input_register: str, n_embd: int) -> None:
        self._input = input_register
        self._registers = {input_register: n_embd}
        self._steps: list[dict[str, Any]] = []

    def register(self, name: str, size: int) -> str:
        """Name a register of `size` numbers; naming it again with the same size is allowed.

        Raises:
            ValueError: it has another size already.
        """
        if self._registers.setdefault(name, size) != size:
            raise ValueError(f"register {name} has {self._registers[name]} numbers, not {size}")
        return name

    def norm_shift(self, *, x: str, norm: str, eps: float, shift: str, mixes: dict[str, str]) -> None:
        """h = LayerNorm(x); each mix's register = h + (shift - h) · mix; the shift becomes h."""
        items = [{"mix": mix, "out": out} for mix, out in mixes.items()]
        self._add("norm_shift", x=x, norm=norm, eps=eps, shift=shift, mixes=items)

    def linear(self, *products: dict[str, Any]) -> None:
        """Products that need not wait for each other, each made by `product`."""
        self._add("linear", products=list(products))

    def wkv7(self, **members: Any) -> None:
        """RWKV-7's time mix behind its projections: from the value residual to the gate."""
        self._add("wkv7", **members)

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
    weight: str, x: str, out: str, *, bias: str | None = None, activation: str = "none", add: bool = False
) -> dict[str, Any]:
    """out = activation(weight @ x + bias), or out += that.

    Args:
        weight: the matrix [out, in].
        x: the register that it is applied to.
        out: the register that takes the result.
        bias: a vector, or None.
        activation: none, tanh, sigmoid, relu_squared or decay; csrc/kernels/kernels.h gives the formulas.
        add: whether `out` keeps what it holds and the result is added to it.
    """
    return {"weight": weight, "x": x, "out": out, "bias": bias, "activation": activation, "add": add}
