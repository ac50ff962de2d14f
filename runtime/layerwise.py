"""Reading texts a step at a time: each step of an engine's program over all of their tokens, before the next step.

Sessions go token by token and keep one token's activations. Here one step's are kept of every token, and only the
matrices of that step need be at hand. So what a matrix is given, and what it should give, can be looked at for a whole
text at once, and a change to a matrix is felt by everything behind it. Whoever reads supplies the products
(`Multiply`); everything else is plain NumPy in float32, and a second form of csrc/steps.h that tests hold to sessions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .enginefile import EngineFile
from .errors import HeaderError, InputError
from .spec import DOWN, EMBEDDING
from .weights import decode, decode_rows

Float32Array = NDArray[np.float32]
# Given a matrix's name and its inputs [N, in], its outputs [N, out].
Multiply = Callable[[str, Float32Array], Float32Array]

_KEY_NORM_FLOOR = np.float32(1e-12)
_DECAY_SCALE = np.float32(-math.exp(-0.5))


class LayerwiseReader:
    """An engine's program over texts.

    Args:
        file: an engine with a program; it must stay open.
        tokens: integers [L, T]: L texts side by side, each from the engine's fresh state.
        embedded: float32 [L · T, size], other rows for the tokens than the engine's embedding has; None for its own.

    Attributes:
        registers: float32 [L · T, size] by name, as they are after the last step.

    Raises:
        HeaderError: the engine has no program.
        InputError: there are no tokens, or some are outside the vocabulary.
    """

    def __init__(
        self, file: EngineFile, tokens: NDArray[np.integer[Any]], embedded: Float32Array | None = None
    ) -> None:
        if file.program_bytes is None:
            raise HeaderError("the engine has no program", file=file.path, remedy="export it again with this goslet")
        if tokens.ndim != 2 or tokens.size == 0:
            raise InputError("are not texts of one length", place="tokens", expected="[L, T]", found=list(tokens.shape))
        if int(tokens.min()) < 0 or int(tokens.max()) >= file.spec.vocab_size:
            raise InputError(
                "is outside the vocabulary",
                place="tokens",
                expected=f"0 to {file.spec.vocab_size - 1}",
                found=f"{tokens.min()} to {tokens.max()}",
            )
        program = json.loads(bytes(file.program_bytes))
        self._file = file
        self._lanes = tokens.shape[0]
        self._steps: list[dict[str, Any]] = program["steps"]
        self._fresh = file.initial_state or {
            tensor.name: np.full(tensor.shape, tensor.init, np.float32) for tensor in file.state_spec.tensors
        }
        rows = decode_rows(file.weight(EMBEDDING), tokens.reshape(-1)) if embedded is None else embedded
        sizes = [program["registers"][name] for name in program["input"]]
        pieces = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        self.registers: dict[str, Float32Array] = dict(zip(program["input"], pieces, strict=True))

    def steps(self, multiply: Multiply) -> Iterator[None]:
        """Run the program, a step for every item; the last one leaves ``logits`` [L · T, V] in the registers.

        Args:
            multiply: called for every product, in the program's order; a matrix's residual is its business too.
        """
        for step in self._steps:
            kind = step["op"]
            if kind == "norm_shift":
                self._norm_shift(step)
            elif kind == "linear":
                self._linear(step, multiply)
            elif kind == "token_product":
                x = self.registers[step["x"]]
                matrix = self.registers[step["matrix"]].reshape(len(x), x.shape[1], x.shape[1])
                self.registers[step["out"]] = np.einsum("ni,nij->nj", x, matrix)
            elif kind == "logits":
                normed = self._layer_norm(self.registers[step["x"]], step)
                self.registers["logits"] = multiply(step["weight"], normed)
            else:
                recurrence = {"wkv4": self._wkv4, "wkv5": self._wkv6, "wkv6": self._wkv6, "wkv7": self._wkv7}[kind]
                recurrence(step)
            yield

    def _vector(self, name: str) -> Float32Array:
        return decode(self._file.weight(name)).reshape(-1)

    def _layer_norm(self, x: Float32Array, step: Mapping[str, Any]) -> Float32Array:
        return self._scaled(_normalized(x, step["eps"]), step)

    def _scaled(self, normed: Float32Array, step: Mapping[str, Any]) -> Float32Array:
        """Rows with a norm's weight and bias applied."""
        return normed * self._vector(f"{step['norm']}.weight") + self._vector(f"{step['norm']}.bias")

    def _norm_shift(self, step: Mapping[str, Any]) -> None:
        normed = self._layer_norm(self.registers[step["x"]], step)
        lanes = normed.reshape(self._lanes, -1, normed.shape[1])
        previous = np.empty_like(lanes)
        previous[:, 0] = self._fresh[step["shift"]]
        previous[:, 1:] = lanes[:, :-1]
        moved = previous.reshape(normed.shape)
        for mix in step["mixes"]:
            self.registers[mix["out"]] = normed + (moved - normed) * self._vector(mix["mix"])
        for name, rows in ((step["normed"], normed), (step["previous"], moved)):
            if name is not None:
                self.registers[name] = rows

    def _linear(self, step: Mapping[str, Any], multiply: Multiply) -> None:
        found = {}
        for product in step["products"]:
            if product["weight"].endswith(DOWN):  # half of a residual
                continue
            y = multiply(product["weight"], self.registers[product["x"]])
            if product["bias"] is not None:
                y = y + self._vector(product["bias"])
            y = _ACTIVATIONS[product["activation"]](y)
            operands = [self.registers[name] for name in product["operands"]]
            found[product["out"]] = _combined(product["combine"], y, self.registers.get(product["out"]), operands)
        self.registers |= found

    def _heads(self, name: str, n: int) -> Float32Array:
        """A register as [L, T, heads, N]."""
        return self.registers[name].reshape(self._lanes, -1, self.registers[name].shape[1] // n, n)

    def _wkv4(self, step: Mapping[str, Any]) -> None:
        r, k, v = (self._heads(step[name], self.registers[step[name]].shape[1])[:, :, 0] for name in "rkv")
        decay, first = self._vector(step["decay"]), self._vector(step["first"])
        aa, bb, pp = (np.tile(self._fresh[step[name]], (self._lanes, 1)) for name in ("aa", "bb", "pp"))
        y = np.empty_like(v)
        for position in range(v.shape[1]):
            key, value = k[:, position], v[:, position]
            top = np.maximum(pp, first + key)
            past, present = np.exp(pp - top), np.exp(first + key - top)
            y[:, position] = r[:, position] * (past * aa + present * value) / (past * bb + present)
            top = np.maximum(pp + decay, key)
            past, present = np.exp(pp + decay - top), np.exp(key - top)
            aa, bb, pp = past * aa + present * value, past * bb + present, top
        self.registers[step["out"]] = y.reshape(-1, y.shape[-1])

    def _wkv6(self, step: Mapping[str, Any]) -> None:
        n = step["head_size"]
        r, k, v = (self._heads(step[name], n) for name in "rkv")
        bonus = self._vector(step["bonus"]).reshape(-1, n, 1)
        if step["op"] == "wkv6":
            w = self._heads(step["w"], n)
        else:
            w = np.broadcast_to(self._vector(step["decay"]).reshape(-1, n), r.shape)
        state = np.tile(self._fresh[step["state"]], (self._lanes, 1, 1, 1))
        y = np.empty_like(v)
        for position in range(v.shape[1]):
            written = k[:, position, :, :, None] * v[:, position, :, None, :]
            y[:, position] = (r[:, position, :, None, :] @ (bonus * written + state))[:, :, 0]
            state = w[:, position, :, :, None] * state + written
        normed = self._scaled(_normalized(y, step["eps"]).reshape(-1, r.shape[2] * n), step)
        self.registers[step["out"]] = normed if step["g"] is None else normed * self.registers[step["g"]]

    def _wkv7(self, step: Mapping[str, Any]) -> None:
        n = step["head_size"]
        value = self.registers[step["v"]]
        if step["value_mix"] is None:
            self.registers[step["first_value"]] = value
        else:
            first = self.registers[step["first_value"]]
            value = value + (first - value) * self.registers[step["value_mix"]]
        r, w, key, a = (self._heads(step[name], n) for name in "rwka")
        v = value.reshape(r.shape)
        kappa = key * self._vector(step["k_k"]).reshape(-1, n)
        kappa /= np.maximum(np.sqrt((kappa * kappa).sum(-1, keepdims=True)), _KEY_NORM_FLOOR)
        removing = kappa * a
        k = key * (1 + (a - 1) * self._vector(step["k_a"]).reshape(-1, n))
        state = np.tile(self._fresh[step["state"]], (self._lanes, 1, 1, 1))
        y = np.empty_like(v)
        for position in range(r.shape[1]):
            removed = state @ kappa[:, position, :, :, None]
            state = (
                state * w[:, position, :, None, :]
                - removed * removing[:, position, :, None, :]
                + v[:, position, :, :, None] * k[:, position, :, None, :]
            )
            y[:, position] = (state @ r[:, position, :, :, None])[..., 0]
        bonus = (r * k * self._vector(step["r_k"]).reshape(-1, n)).sum(-1, keepdims=True) * v
        normed = self._scaled(_normalized(y, step["eps"]).reshape(value.shape), step)
        self.registers[step["out"]] = (normed + bonus.reshape(value.shape)) * self.registers[step["g"]]


def _normalized(x: Float32Array, eps: float) -> Float32Array:
    centred = x - x.mean(-1, keepdims=True)
    centred /= np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(eps))
    normed: Float32Array = centred
    return normed


def _sigmoid(x: Float32Array) -> Float32Array:
    # Both ways of writing it, so that neither exponential overflows.
    small = np.exp(-np.abs(x))
    result: Float32Array = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
    return result


# The formulas of csrc/kernels/kernels.h.
_ACTIVATIONS: dict[str, Callable[[Float32Array], Float32Array]] = {
    "none": lambda x: x,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu_squared": lambda x: np.square(np.maximum(x, 0)),
    "decay": lambda x: np.exp(_DECAY_SCALE * _sigmoid(x)),
    "double_exp": lambda x: np.exp(-np.exp(x)),
}


def _combined(how: str, y: Float32Array, out: Float32Array | None, operands: list[Float32Array]) -> Float32Array:
    if how == "set":
        return y
    if how == "gate":
        return y * operands[0]
    if how == "lerp":
        return operands[0] + (operands[1] - operands[0]) * y
    assert out is not None
    return out + (y if how == "add" else y * operands[0])
