"""The ONNX Runtime backend: runs the step graph as it is. Portable, and the oracle for faster backends.

A state output must not be bound onto its own input (a norm writes the new shift before the old one is read), so
every session has two state buffers and two bindings, which take turns.
"""

from __future__ import annotations

import abc
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, DependencyError, first_line
from ..graph_check import check_step_graph
from ..initializers import SPLIT, expected_initializers, graph_initializers
from ..spec import EMBEDDING
from ..state import State
from ..weights import EncodedWeight, WeightFormat, decode_rows
from . import Backend, Rounding, Stepper, check_embedding
from .exit_gate import before_exit

if TYPE_CHECKING:
    from ..enginefile import EngineFile

# int8 activations: without them MatMulNBits runs at one token a second with int8 weights, as slowly as f32 with int4.
ACCURACY_LEVEL = "4"
# It would join what is added to the product before it, and so keep two of a layer's weights from becoming MatMulNBits:
# in engines that were made before `goslet.export.graph` wrote Sum there.
DISABLED_OPTIMIZERS = ["MatMulAddFusion"]
# No tensor's name begins with a dot, so none of them can take this one's place.
MODEL_FILE = ".step.onnx"
BATCH = "B"
# ONNX Runtime would print what it raises.
FATAL = 4


class OrtBackend(Backend):
    """ONNX Runtime's CPU provider on an engine's step graph.

    Args:
        file: the opened engine; its weights are unpacked to ONNX's layout once, here.
        threads: ONNX Runtime's intra-op threads; None lets it choose.
        exact: multiply in float32 throughout, with weights dequantized in memory; otherwise quantized weights meet
            activations rounded to int8, or in two terms of int8 (`goslet.export.activations`). For `verify`, which
            holds the graph to float32's tolerance.

    Raises:
        DependencyError: onnxruntime is not installed.
        HeaderError: the header's tensors cannot be a graph's.
        BackendError: the graph is not a step on the header's weights, or ONNX Runtime refuses it.
    """

    name = "ort"
    in_place = False
    install: ClassVar[str] = "pip install 'goslet[ort]'"
    provider: ClassVar[tuple[str, dict[str, str]]] = ("CPUExecutionProvider", {})

    def __init__(self, file: EngineFile, threads: int | None = None, *, exact: bool = False) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise DependencyError("the ort backend needs ONNX Runtime", place="backend ort", remedy=self.install)
        # Since 1.32 it would note every run in the user's home folder and send it to its maker; only this stops it.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        self._check_provider(onnxruntime)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        else:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ACCURACY_LEVEL)
        graph = check_step_graph(file.graph_bytes, expected_initializers(file), file.graph_info["opset"], file.path)
        try:
            with before_exit():
                self._session = _create_session(file, graph, options, self.provider)
        except OSError as error:
            raise BackendError(
                f"weights for ONNX Runtime cannot be written: {error.strerror}",
                file=file.path,
                place=tempfile.gettempdir(),
                remedy="set TMPDIR to a folder with more room; newer versions take them from memory",
            ) from error
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise BackendError(
                f"ONNX Runtime refuses the graph: {first_line(error)}",
                file=file.path,
                place="section graph",
                remedy="export the engine again, or use the onnxruntime version that goslet's tools pin",
            ) from error
        _check_signature(self._session, file)
        self._embedding = file.weight(EMBEDDING)
        self._vocab_size = file.spec.vocab_size
        self._n_input = sum(file.spec.input_sizes)
        self._exact = exact
        self._splits = SPLIT.encode() in graph

    def _check_provider(self, onnxruntime: Any) -> None:
        """Raise BackendUnavailableError where this ONNX Runtime lacks the provider."""

    def activation_rounding(self, weight: WeightFormat) -> Rounding | None:
        """See `Backend`; two terms of 8 bits err as one of 16."""
        if weight.group is None or self._exact:
            return None
        return Rounding(16 if weight.name == "int8" and self._splits else 8, weight.group)

    def stepper(self, state: State) -> Stepper:
        """A stepper with one binding for each direction between `state`'s two buffers."""
        return _OrtStepper(self._session, self._embedding, self._n_input, self._vocab_size, state)

    def step_batch(self, steppers: Sequence[Stepper], tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """As `Backend.step_batch`, one step after another."""
        own = cast("Sequence[AlternatingStepper]", steppers)
        for row, stepper in enumerate(own):
            logits[row] = stepper.step(tokens[row : row + 1], f"session {row} of this batch")
        # Only now, so that a step that fails leaves the sessions before it where they were too.
        for stepper in own:
            stepper.advance()


def _create_session(file: EngineFile, graph: bytes, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    import onnxruntime

    settings = {"providers": [provider], "disabled_optimizers": DISABLED_OPTIMIZERS}
    initializers = graph_initializers(file)
    if hasattr(options, "add_external_initializers_from_files_in_memory"):
        # ONNX Runtime copies what it needs while the session is created; the buffers must live until then.
        options.add_external_initializers_from_files_in_memory(
            list(initializers), list(initializers.values()), [buffer.nbytes for buffer in initializers.values()]
        )
        return onnxruntime.InferenceSession(graph, options, **settings)
    # Version 1.23, the last for Python 3.10, takes external weights from files alone.
    with tempfile.TemporaryDirectory(prefix="goslet-") as folder:
        for name, buffer in initializers.items():
            Path(folder, name).write_bytes(buffer.data)
        model = Path(folder, MODEL_FILE)
        model.write_bytes(graph)
        return onnxruntime.InferenceSession(model, options, **settings)


class AlternatingStepper(Stepper):
    """A stepper whose steps write beside the state, and become the state only when told to."""

    @abc.abstractmethod
    def step(self, token: NDArray[np.int64], place: str) -> NDArray[np.float32]:
        """Write the state after one token [1] beside the present one; float32 logits [V], good until the next step.

        Raises:
            BackendError: the step failed, at `place`.
        """

    @abc.abstractmethod
    def advance(self) -> None:
        """Let the state that `step` wrote be the session's."""

    def feed(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """As `Stepper.feed`."""
        every = len(logits) == len(tokens)
        for index in range(len(tokens)):
            found = self.step(tokens[index : index + 1], f"token {index} of this feed")
            self.advance()
            if every:
                logits[index] = found
        if not every:
            logits[0] = found


class _OrtStepper(AlternatingStepper):
    def __init__(self, session: Any, embedding: EncodedWeight, n_input: int, vocab_size: int, state: State) -> None:
        self._session = session
        self._embedding = embedding
        self._state = state
        self._x = np.zeros((1, n_input), np.float32)
        self._logits: NDArray[np.float32] = np.zeros((1, vocab_size), np.float32)
        front, back = state.front, state.back
        self._bindings = {
            _address(front): self._binding(front, back),
            _address(back): self._binding(back, front),
        }

    def _binding(self, source: Mapping[str, NDArray[np.float32]], target: Mapping[str, NDArray[np.float32]]) -> Any:
        binding = self._session.io_binding()
        inputs = {"x": self._x, **{f"state_in.{name}": view[None] for name, view in source.items()}}
        outputs = {"logits": self._logits, **{f"state_out.{name}": view[None] for name, view in target.items()}}
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        return binding

    def step(self, token: NDArray[np.int64], place: str) -> NDArray[np.float32]:
        self._x[:] = decode_rows(self._embedding, token)
        try:
            with before_exit():
                self._session.run_with_iobinding(self._bindings[_address(self._state.front)])
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise BackendError(
                f"ONNX Runtime failed: {first_line(error)}",
                place=place,
                remedy="the session's state is as it was before this token",
            ) from error
        return self._logits.reshape(-1)

    def advance(self) -> None:
        self._state.advance()


def _address(tensors: Mapping[str, NDArray[np.float32]]) -> int:
    return next(iter(tensors.values())).ctypes.data


def _check_signature(session: Any, file: EngineFile) -> None:
    """Hold the graph's inputs and outputs to the header, by which buffers are made."""
    spec = file.spec
    n_input = sum(spec.input_sizes)
    states = {tensor.name: list(tensor.shape) for tensor in file.state_spec.tensors}
    expected = {
        "inputs": {"x": [n_input], **{f"state_in.{name}": shape for name, shape in states.items()}},
        "outputs": {"logits": [spec.vocab_size], **{f"state_out.{name}": shape for name, shape in states.items()}},
    }
    found = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    for side in expected:
        right = {name: f"tensor(float) {[BATCH, *shape]}" for name, shape in expected[side].items()}
        real = {value.name: f"{value.type} {value.shape}" for value in found[side]}
        for name in [*right, *real]:
            if right.get(name) != real.get(name):
                raise BackendError(
                    f"the graph's {side} are not those that the header states",
                    file=file.path,
                    place=name,
                    expected=right.get(name, "nothing"),
                    found=real.get(name, "nothing"),
                    remedy="export the engine again",
                )
    check_embedding(file)
