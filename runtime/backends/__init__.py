"""Backends: what runs a step. One file each; `open_backend` finds one by name.

A backend is made once per engine and gives every session a `Stepper` bound to that session's fixed state buffers.
Steppers of different sessions may run in different threads at the same time; one stepper may not.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, InputError
from ..state import State

if TYPE_CHECKING:
    from ..enginefile import EngineFile

PLANNED = {"native": "the native CPU and CUDA engine", "trt": "the TensorRT backend"}
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
    """

    name: ClassVar[str]
    in_place: ClassVar[bool]

    @abc.abstractmethod
    def stepper(self, state: State) -> Stepper:
        """A stepper bound to the addresses of `state`'s buffers, which it keeps alive."""


def open_backend(name: str | None, file: EngineFile, device: str = "cpu", threads: int | None = None) -> Backend:
    """Make the backend for an engine file.

    Args:
        name: ``native``, ``ort`` or ``trt``; None takes the best one that is there.
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
    if name is not None and name in PLANNED:
        raise BackendUnavailableError(
            f"{PLANNED[name]} does not exist yet", place=f"backend {name}", remedy="use backend ort on device cpu"
        )
    if device == "cuda":
        raise BackendUnavailableError(
            "the ort backend does not run on CUDA yet", place="device cuda", remedy="use device cpu"
        )
    from .ort import OrtBackend

    return OrtBackend(file, threads)
