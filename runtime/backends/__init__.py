"""Backends: what runs a step. One file each; `open_backend` finds one by name.

A backend is made once per engine and gives every session a `Stepper` bound to that session's fixed state buffers.
Steppers of different sessions may run in different threads at the same time; one stepper may not.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, InputError
from ..state import State

if TYPE_CHECKING:
    from ..enginefile import EngineFile
    from ..weights import WeightFormat

PLANNED = {"trt": "the TensorRT backend"}
DEFAULT = "native"
NAMES = ("native", "ort", "trt")
DEVICES = ("cpu", "cuda")


class Stepper(abc.ABC):
    """Feeds tokens to one session's state."""

    @abc.abstractmethod
    def feed(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Feed tokens and write logits.

        The state moves on token by token, and `State.tokens_seen` with it, so that it is whole whenever this is
        interrupted.

        Args:
            tokens: int64 [T], T ≥ 1, each within the vocabulary.
            logits: float32 [T, V] for the logits after every token, or [1, V] for those after the last one.

        Raises:
            BackendError: the step failed.
        """


class Backend(abc.ABC):
    """Runs the steps of one engine.

    Attributes:
        name: how users name it.
        in_place: whether steps update a state in its one buffer; otherwise they need a second one to write to.
        isa: the instruction set of the kernels, or None where the backend does not say.
        density: of the activations that meet `ffn.value` in steps of one token, the share that was not zero, since the
            backend was made; None where it does not skip the others or has made no step.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool]

    @abc.abstractmethod
    def activation_rounding(self, weight: WeightFormat) -> tuple[int, int] | None:
        """How activations are rounded where they meet a weight of this format.

        Returns:
            The integers' bits and how many of them share a scale; None where activations stay floating numbers.
        """

    @property
    def isa(self) -> str | None:
        """See the class."""
        return None

    @property
    def density(self) -> float | None:
        """See the class."""
        return None

    @abc.abstractmethod
    def stepper(self, state: State) -> Stepper:
        """A stepper bound to the addresses of `state`'s buffers, which it keeps alive."""

    @abc.abstractmethod
    def step_batch(self, steppers: Sequence[Stepper], tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Feed each stepper one token; when this raises BackendError, none of the states has moved.

        Every state is whole whenever this is interrupted, and its `tokens_seen` tells whether it has moved.

        Args:
            steppers: steppers of this backend [n], n ≥ 1, each of another state.
            tokens: int64 [n], each within the vocabulary.
            logits: float32 [n, V], for the logits after each stepper's token.

        Raises:
            BackendError: the step failed.
        """


def open_backend(name: str | None, file: EngineFile, device: str = "cpu", threads: int | None = None) -> Backend:
    """Make the backend for an engine file.

    Args:
        name: ``native``, ``ort`` or ``trt``; None takes native.
        file: the opened engine.
        device: ``cpu`` or ``cuda``.
        threads: compute threads; None leaves it to the backend.

    Raises:
        InputError: no backend or device has such a name, or `threads` is not a positive number.
        BackendUnavailableError: the backend or device does not exist here, or not yet.
        BackendError: the backend refuses the engine.
    """
    if name is not None and name not in NAMES:
        raise InputError("no such backend", place="backend", expected=", ".join(NAMES), found=repr(name))
    if device not in DEVICES:
        raise InputError("no such device", place="device", expected=", ".join(DEVICES), found=repr(device))
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError("is not a number of threads", place="threads", expected="1 to 1024", found=repr(threads))
    chosen = DEFAULT if name is None else name
    if chosen in PLANNED:
        raise BackendUnavailableError(
            f"{PLANNED[chosen]} does not exist yet", place=f"backend {chosen}", remedy="use backend native or ort"
        )
    if device == "cuda":
        raise BackendUnavailableError(
            f"the {chosen} backend does not run on CUDA yet", place="device cuda", remedy="use device cpu"
        )
    # Imported when chosen: ONNX Runtime is an optional package, and the other backend does without it.
    if chosen == "ort":
        from .ort import OrtBackend

        return OrtBackend(file, threads)
    from .native import NativeBackend

    return NativeBackend(file, threads)
