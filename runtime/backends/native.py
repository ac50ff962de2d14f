"""The native backend: the C++ engine runs an engine file's program on weights that it reads where they are mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .._native import EngineError, NativeEngine, StateBuffer, available_isas
from ..errors import BackendError, InputError, first_line
from ..machine import available_cores
from ..state import State
from . import Backend, Rounding, Stepper

if TYPE_CHECKING:
    from ..enginefile import EngineFile
    from ..weights import WeightFormat

# As many rows as one product takes (kMaxRows in csrc/kernels/matrix.h): larger pieces would save nothing, and Ctrl-C is
# heard between two of them.
PIECE_TOKENS = 64
ISA_VARIABLE = "GOSLET_ISA"

_Sequence: TypeAlias = "tuple[StateBuffer, NDArray[np.int64], NDArray[np.float32] | None]"


class NativeBackend(Backend):
    """The C++ engine on the CPU.

    Its instruction set is the best that this CPU runs, or the one that the environment variable GOSLET_ISA names.

    Args:
        file: the opened engine; its weights stay where they are mapped, also after `file` is closed.
        threads: compute threads, the calling one included; None takes one for each core.
        pin: bind each of the other threads to a CPU of its own.
        skip_zeros: leave the weights of activations that are zero unread, where they are stored for it. Never changes
            a result.

    Raises:
        BackendError: the engine has no program, its parts do not fit together, or the threads cannot be started.
        InputError: GOSLET_ISA names nothing that runs here.
    """

    name = "native"
    in_place = True

    def __init__(
        self, file: EngineFile, threads: int | None = None, *, pin: bool = False, skip_zeros: bool = True
    ) -> None:
        program = file.program_bytes
        if program is None:
            raise BackendError(
                "the engine has no program for the native backend",
                file=file.path,
                place="section program",
                remedy="export it again with this goslet, or use backend ort",
            )
        _check_isa()
        file.prefer_huge_pages()
        tensors = []
        for name in file.tensors:
            weight = file.packed(name)
            tensors.append(
                (
                    name,
                    weight.format.name,
                    weight.layout,
                    weight.format.group or 0,
                    weight.shape,
                    weight.data,
                    weight.scales,
                )
            )
        state = [(tensor.name, tensor.shape, tensor.init) for tensor in file.state_spec.tensors]
        n_threads = available_cores() if threads is None else threads
        try:
            self._engine = NativeEngine(program, tensors, state, file.spec.vocab_size, n_threads, pin, skip_zeros)
        except EngineError as error:
            problem, place, expected, found = error.args
            raise BackendError(
                problem,
                file=file.path,
                place=place or None,
                expected=expected or None,
                found=found or None,
                remedy="export the engine again",
            ) from error
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                f"the native engine cannot start: {first_line(error)}",
                file=file.path,
                place=f"{n_threads} threads",
                remedy="ask for fewer threads, or free some memory",
            ) from error

    @property
    def isa(self) -> str:
        """The instruction set of the kernels, as GOSLET_ISA would name it."""
        return self._engine.isa

    @property
    def density(self) -> float | None:
        """As `Backend.density`."""
        seen, active = self._engine.density
        return active / seen if seen else None

    def activation_rounding(self, weight: WeightFormat) -> Rounding | None:
        """See `Backend`; how it is done stands at Activations of ``csrc/kernels/matrix.h``."""
        if weight.group is None:
            return None
        return Rounding(8, 32) if weight.name in ("int4", "int3") else Rounding(16, weight.group)

    def stepper(self, state: State) -> Stepper:
        """A stepper that moves `state`'s one buffer on."""
        return _NativeStepper(self._engine, state)

    def step_batch(self, steppers: Sequence[Stepper], tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """As `Backend.step_batch`; one call of the engine, so Ctrl-C is heard before it or after it."""
        buffers = [stepper.buffer for stepper in cast("Sequence[_NativeStepper]", steppers)]
        rows = range(len(buffers))
        batch: list[_Sequence] = [
            (buffer, tokens[row : row + 1], logits[row : row + 1]) for row, buffer in zip(rows, buffers, strict=True)
        ]
        _feed(self._engine, batch, "this batch", "the sessions' states are as they were before it")


class _NativeStepper(Stepper):
    def __init__(self, engine: NativeEngine, state: State) -> None:
        self._engine = engine
        self.buffer = state.front_buffer

    def feed(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        every = len(logits) == len(tokens)
        for begin in range(0, len(tokens), PIECE_TOKENS):
            end = min(begin + PIECE_TOKENS, len(tokens))
            wanted = logits[begin:end] if every else logits if end == len(tokens) else None
            _feed(
                self._engine,
                [(self.buffer, tokens[begin:end], wanted)],
                f"tokens {begin} to {end - 1} of this feed",
                "the session's state is as it was before these tokens",
            )


def _feed(engine: NativeEngine, sequences: Sequence[_Sequence], place: str, remedy: str) -> None:
    try:
        engine.feed(sequences)
    except (RuntimeError, MemoryError) as error:
        raise BackendError(f"the native engine failed: {first_line(error)}", place=place, remedy=remedy) from error


def _check_isa() -> None:
    name = os.environ.get(ISA_VARIABLE)
    if name and name not in available_isas():
        raise InputError(
            "names no instruction set that runs here",
            place=f"environment variable {ISA_VARIABLE}",
            expected=", ".join(available_isas()),
            found=repr(name),
            remedy="unset it to take the best one",
        )
