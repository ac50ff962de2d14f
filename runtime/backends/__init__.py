"""Backends: what runs a step. One file each; `open_backend` finds one by name.

A backend is made once per engine and gives every session a `Stepper` bound to that session's fixed state buffers.
Steppers of different sessions may run in different threads at the same time; one stepper may not.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, BackendUnavailableError, InputError
from ..spec import EMBEDDING
from ..state import State

if TYPE_CHECKING:
    from ..enginefile import EngineFile
    from ..weights import WeightFormat

DEFAULT = "native"
# The devices that each runs on, the one that it takes by itself first.
BACKENDS = {"native": ("cpu",), "ort": ("cpu", "cuda"), "trt": ("cuda",)}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Rounding:
    """How a backend rounds the activations that a product takes.

    Attributes:
        bits: of integers, the sign among them; without a group, significant bits of floating numbers, and the product
            is rounded like them.
        group: how many integers share a scale.
    """

    bits: int
    group: int | None = None


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
        device: where steps run and weights lie, one of `DEVICES`.
        in_place: whether steps update a state in its one buffer; otherwise they need a second one to write to.
        isa: the instruction set of the kernels, or None where the backend does not say.
        density: of the activations that meet `ffn.value` in steps of one token, the share that was not zero, since the
            backend was made; None where it does not skip the others or has made no step.
    """

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    in_place: ClassVar[bool]

    @abc.abstractmethod
    def activation_rounding(self, weight: WeightFormat) -> Rounding | None:
        """How activations are rounded where they meet a weight of this format; None where they stay float32."""

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
        """A stepper bound to the addresses of `state`'s buffers, or to memory of its own; good while `state` lives."""

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


def open_backend(name: str | None, file: EngineFile, device: str | None = None, threads: int | None = None) -> Backend:
    """Make the backend for an engine file.

    Args:
        name: ``native``, ``ort`` or ``trt``; None takes native.
        file: the opened engine.
        device: ``cpu`` or ``cuda``; None takes the backend's own, which is cuda for trt and cpu for the others.
        threads: compute threads on the CPU; None leaves it to the backend.

    Raises:
        InputError: no backend or device has such a name, or `threads` is not a positive number.
        BackendUnavailableError: the backend does not run on the device, or one of them does not exist here.
        DependencyError: the backend needs a package that is not installed.
        BackendError: the backend refuses the engine.
    """
    if name is not None and name not in BACKENDS:
        raise InputError("no such backend", place="backend", expected=", ".join(BACKENDS), found=repr(name))
    if device is not None and device not in DEVICES:
        raise InputError("no such device", place="device", expected=", ".join(DEVICES), found=repr(device))
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError("is not a number of threads", place="threads", expected="1 to 1024", found=repr(threads))
    chosen = DEFAULT if name is None else name
    place = BACKENDS[chosen][0] if device is None else device
    if place not in BACKENDS[chosen]:
        others = [other for other, places in BACKENDS.items() if place in places]
        raise BackendUnavailableError(
            f"the {chosen} backend does not run on it",
            place=f"device {place}",
            remedy=f"use backend {' or '.join(others)}",
        )
    # Imported when chosen: what some of them need are optional packages, and the others do without.
    if chosen == "trt":
        from .trt import TrtBackend

        return TrtBackend(file)
    if chosen == "ort" and place == "cuda":
        from .ort_cuda import OrtCudaBackend

        return OrtCudaBackend(file, threads)
    if chosen == "ort":
        from .ort import OrtBackend

        return OrtBackend(file, threads)
    from .native import NativeBackend

    return NativeBackend(file, threads)


def check_embedding(file: EngineFile) -> None:
    """Hold the embedding, which backends read row by row, to the header.

    Raises:
        BackendError: it is not there, or of another shape.
    """
    expected = (file.spec.vocab_size, sum(file.spec.input_sizes))
    found = file.tensors[EMBEDDING].shape if EMBEDDING in file.tensors else "nothing"
    if found != expected:
        raise BackendError(
            "the embedding is not the one that the header states",
            file=file.path,
            place=EMBEDDING,
            expected=list(expected),
            found=found,
            remedy="export the engine again",
        )
