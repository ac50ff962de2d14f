"""The ONNX Runtime backend on a CUDA device: the step graph as it is, states in the device's memory.

Needs the package onnxruntime-gpu. A session has two copies of its state there, which take turns as in
`goslet.backends.ort`. CUDA graphs are off: nobody has measured yet that they help here.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, BackendUnavailableError, first_line
from ..state import MAX_TOKENS_SEEN, Elsewhere, State, Tensors
from ..weights import EncodedWeight, WeightFormat, decode_rows
from . import Rounding, Stepper
from .exit_gate import before_exit
from .ort import AlternatingStepper, OrtBackend

if TYPE_CHECKING:
    from ..enginefile import EngineFile


class OrtCudaBackend(OrtBackend):
    """ONNX Runtime's CUDA provider on an engine's step graph.

    Args:
        file: the opened engine.
        threads: as for `OrtBackend`.

    Raises:
        BackendUnavailableError: this ONNX Runtime has no CUDA provider, or it does not start here.
        DependencyError, HeaderError, BackendError: as for `OrtBackend`.
    """

    in_place = True
    # With TF32 a product would keep three digits.
    provider: ClassVar[tuple[str, dict[str, str]]] = ("CUDAExecutionProvider", {"use_tf32": "0"})
    device = "cuda"
    # There are none for Jetsons on PyPI.
    install = "pip install onnxruntime-gpu in place of onnxruntime, or use device cpu, or on a Jetson backend trt"

    def __init__(self, file: EngineFile, threads: int | None = None) -> None:
        super().__init__(file, threads)
        # It takes another provider by itself where this one does not start.
        if self._session.get_providers()[0] != self.provider[0]:
            raise BackendUnavailableError(
                "ONNX Runtime's CUDA provider does not start here",
                place="device cuda",
                found=", ".join(self._session.get_providers()),
                remedy="install the CUDA and cuDNN that onnxruntime-gpu names, or use device cpu",
            )

    def _check_provider(self, onnxruntime: Any) -> None:
        available = onnxruntime.get_available_providers()
        if self.provider[0] not in available:
            raise BackendUnavailableError(
                "this ONNX Runtime has no CUDA provider",
                place="device cuda",
                found=", ".join(available),
                remedy=self.install,
            )

    def activation_rounding(self, weight: WeightFormat) -> Rounding | None:
        """See `Backend`; on CUDA quantized weights meet float32."""
        return None

    def stepper(self, state: State) -> Stepper:
        """A stepper with two copies of the state on the device.

        Raises:
            BackendError: the device's memory is short.
        """
        try:
            return _OrtCudaStepper(self._session, self.device, self._embedding, self._n_input, self._vocab_size, state)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise BackendError(
                f"ONNX Runtime cannot set a session up: {first_line(error)}",
                place="device cuda",
                remedy="free some of the device's memory, or use fewer sessions",
            ) from error


class _OrtCudaStepper(AlternatingStepper, Elsewhere):
    def __init__(
        self, session: Any, device: str, embedding: EncodedWeight, n_input: int, vocab_size: int, state: State
    ) -> None:
        import onnxruntime

        def memory(*shape: int) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)

        self._session = session
        self._embedding = embedding
        # The state holds this, and a circle would keep the device's memory until the next garbage collection.
        self._state: State = weakref.proxy(state)
        self._x, self._logits = memory(1, n_input), memory(1, vocab_size)
        self._copies = [{tensor.name: memory(1, *tensor.shape) for tensor in state.spec.tensors} for _ in range(2)]
        self._bindings = [self._binding(*self._copies), self._binding(*self._copies[::-1])]
        # Which copy is the state, and its token count: one assignment moves both.
        self._now = (0, 0)
        # A signal handler may read the state within a step.
        self._lock = threading.RLock()
        state.live_in(self)

    def _binding(self, source: dict[str, Any], target: dict[str, Any]) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("x", self._x)
        binding.bind_ortvalue_output("logits", self._logits)
        for name in source:
            binding.bind_ortvalue_input(f"state_in.{name}", source[name])
            binding.bind_ortvalue_output(f"state_out.{name}", target[name])
        return binding

    def step(self, token: NDArray[np.int64], place: str) -> NDArray[np.float32]:
        with self._lock:
            try:
                if not self.ahead:
                    self._upload()
                self._x.update_inplace(decode_rows(self._embedding, token))
                with before_exit():
                    self._session.run_with_iobinding(self._bindings[self._now[0]])
                logits: NDArray[np.float32] = self._logits.numpy()
            except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
                raise BackendError(
                    f"ONNX Runtime failed: {first_line(error)}",
                    place=place,
                    remedy="the session's state is as it was before this token",
                ) from error
        return logits.reshape(-1)

    def advance(self) -> None:
        with self._lock:
            index, count = self._now
            after = (1 - index, min(count + 1, MAX_TOKENS_SEEN))
            self._now = after
            self.steps += 1

    def _upload(self) -> None:
        index = self._now[0]
        for name, view in self._state.front.items():
            self._copies[index][name].update_inplace(np.ascontiguousarray(view[None]))
        self._now = (index, self._state.tokens_seen)

    def tokens_seen(self) -> int:
        return self._now[1]

    def fetch(self, tensors: Tensors, count: NDArray[np.int64]) -> None:
        with self._lock:
            index, count[0] = self._now
            try:
                for name, view in tensors.items():
                    view[...] = self._copies[index][name].numpy()[0]
            except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
                self.steps_fetched = self.steps
                raise BackendError(
                    f"the state cannot be read from the device: {first_line(error)}",
                    place="device cuda",
                    remedy=f"the session is back at token {self._state.tokens_seen}, where it was last read",
                ) from error
