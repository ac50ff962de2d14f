"""The TensorRT backend: runs the plan that lies beside an engine, on a CUDA device.

A session has one pool of device memory: its state's tensors, each aligned to 256 bytes as TensorRT wants, and behind
them its token count. A step is one CUDA graph, captured once for each session: the token's embedding row goes up, the
plan runs, new tensors that could not be written in place are copied to the pool, the new count joins them, and logits
and count come down to pinned memory. A graph is launched whole or not at all, so the pool always holds a whole state
and says how many tokens it has seen, wherever Python is interrupted.

States that one of our plugins updates have one address for input and output; the plan file names them
(`goslet.planfile`). All other outputs have memory of their own.
"""

from __future__ import annotations

import importlib
import os
import shlex
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..cuda_layout import PLUGIN_VERSION
from ..errors import (
    BackendError,
    BackendUnavailableError,
    ContainerError,
    DependencyError,
    GosletError,
    first_line,
)
from ..machine import gpu
from ..planfile import INSTALL, RUNNABLE_TARGETS, PlanFile, installed_package, plan_path
from ..spec import EMBEDDING, StateSpec
from ..state import MAX_TOKENS_SEEN, Elsewhere, State, Tensors
from ..trt_plugin import find_plugin
from ..weights import EncodedWeight, WeightFormat, decode_rows
from . import Backend, Rounding, Stepper, check_embedding
from .cuda_driver import CudaError, DeviceMemory, Driver, Graph, PinnedMemory, Stream
from .exit_gate import before_exit

if TYPE_CHECKING:
    from ..enginefile import EngineFile

_ALIGNMENT = 256
_FLOAT_BYTES = 4
_COUNT_BYTES = 8
_ROUNDING = {"f16": Rounding(11), "bf16": Rounding(8)}
_REBUILD = "build the plan again: goslet plan ENGINE --target local --force"


class TrtBackend(Backend):
    """TensorRT on the plan of an engine.

    Args:
        file: the opened engine; its plan is ``NAME.local.plan`` beside it, or else ``NAME.rtx.plan``.

    Raises:
        BackendUnavailableError: there is no plan, no CUDA device or no plugin library, or the plan fits none of them.
        DependencyError: TensorRT is not installed.
        ContainerError: the plan file is damaged.
        BackendError: TensorRT refuses the plan, or it is not a step of this engine.
    """

    name = "trt"
    device = "cuda"
    in_place = True

    def __init__(self, file: EngineFile) -> None:
        self._driver = Driver()  # first: without a device neither a plan nor TensorRT would help
        opened, trt, library = _open_plan(file)
        with opened as plan:
            key, path = plan.key, plan.path
            self._logger = _logger(trt)
            try:
                self._runtime = trt.Runtime(self._logger)
            except Exception as error:  # TensorRT's exceptions share no base but Exception
                raise BackendUnavailableError(
                    "TensorRT does not start",
                    place="backend trt",
                    found=self._logger.take() or first_line(error),
                    remedy="install the driver and the CUDA that this TensorRT names, or use backend native",
                ) from error
            if library is not None and self._runtime.get_plugin_registry().load_library(str(library)) is None:
                raise BackendUnavailableError(
                    "is no plugin library for this TensorRT",
                    file=library,
                    found=self._logger.take(),
                    remedy="build it here: tools/build_cuda --plugin",
                )
            with before_exit():
                self._engine = self._runtime.deserialize_cuda_engine(plan.plan)
            if self._engine is None:
                raise BackendError(
                    "TensorRT does not take the plan", file=path, found=self._logger.take(), remedy=_REBUILD
                )
            _check_signature(trt, self._engine, file, path)
            strangers = plan.in_place - {tensor.name for tensor in file.state_spec.tensors}
            if strangers:
                raise BackendError(
                    "the plan updates a state that the engine does not have",
                    file=path, place=min(strangers)[:100], remedy=_REBUILD,
                )  # fmt: skip
            self._in_place = plan.in_place
        self._rounding = _ROUNDING[key.precision]
        self._spec = file.spec
        self._embedding = file.weight(EMBEDDING)

    def activation_rounding(self, weight: WeightFormat) -> Rounding:
        """See `Backend`; products are of the plan's precision, whatever their weights are."""
        return self._rounding

    def stepper(self, state: State) -> Stepper:
        """A stepper with a pool, a context and a captured graph of its own.

        Raises:
            BackendError: the device's memory is short, or the step cannot be captured.
        """
        try:
            self._driver.activate()
            self._logger.take()  # of another time
            with before_exit():
                context = self._engine.create_execution_context()
            if context is None:
                raise BackendError(
                    "TensorRT cannot make a context for a session",
                    found=self._logger.take(),
                    remedy="free some of the device's memory, or use fewer sessions",
                )
            return _TrtStepper(
                self._driver, context, self._logger, self._embedding, sum(self._spec.input_sizes), state, self._in_place
            )
        except CudaError as error:
            raise BackendError(
                f"a session cannot be set up on the CUDA device: {error}",
                remedy="free some of the device's memory, or use fewer sessions",
            ) from error

    def step_batch(self, steppers: Sequence[Stepper], tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """As `Backend.step_batch`, one step after another; a failure takes back those before it."""
        own = cast("Sequence[_TrtStepper]", steppers)
        if len(own) > 1:
            for stepper in own:
                stepper.remember()
        for row, stepper in enumerate(own):
            try:
                stepper.feed(tokens[row : row + 1], logits[row : row + 1])
            except BackendError as error:
                # All of them go back before any of them is heard.
                for lost in [other.go_back() for other in own[:row]]:
                    if lost is not None:
                        raise lost from error
                raise


class _Pool:
    """Where a state's tensors lie in a block of memory; the count [1] lies behind them, as int64."""

    def __init__(self, spec: StateSpec) -> None:
        self.sizes = {tensor.name: int(np.prod(tensor.shape)) * _FLOAT_BYTES for tensor in spec.tensors}
        self.offsets = {}
        end = 0
        for name, size_bytes in self.sizes.items():
            self.offsets[name] = end
            end += _aligned(size_bytes)
        self.count_offset = end
        self.size_bytes = end + _ALIGNMENT


class _TrtStepper(Stepper, Elsewhere):
    def __init__(
        self,
        driver: Driver,
        context: Any,
        logger: Any,
        embedding: EncodedWeight,
        n_input: int,
        state: State,
        in_place: frozenset[str],
    ) -> None:
        self._driver = driver
        self._context = context
        self._logger = logger
        self._embedding = embedding
        # The state holds this, and a circle would keep the device's memory until the next garbage collection.
        self._state: State = weakref.proxy(state)
        self._layout = layout = _Pool(state.spec)
        n_vocab = embedding.shape[0]
        self._stream = Stream(driver)
        self._pool = DeviceMemory(driver, layout.size_bytes)
        apart = {name: size for name, size in layout.sizes.items() if name not in in_place}
        self._spare = DeviceMemory(driver, sum(map(_aligned, apart.values())) or _ALIGNMENT)
        self._x = DeviceMemory(driver, n_input * _FLOAT_BYTES)
        self._logits = DeviceMemory(driver, n_vocab * _FLOAT_BYTES)
        # On the host, in this order: a copy of the pool, x, logits, and the counts after the next step and the last.
        sizes = [layout.size_bytes, n_input * _FLOAT_BYTES, n_vocab * _FLOAT_BYTES, _COUNT_BYTES, _COUNT_BYTES]
        offsets = np.cumsum([0, *map(_aligned, sizes)]).tolist()
        self._pinned = PinnedMemory(driver, offsets[-1])
        parts = [self._pinned.bytes[begin : begin + size] for begin, size in zip(offsets, sizes, strict=False)]
        self._host_pool, self._host_x = parts[0], parts[1].view(np.float32)
        self._host_logits = parts[2].view(np.float32)
        self._next_count, self._seen_count = parts[3].view(np.int64), parts[4].view(np.int64)
        self._host_views = {
            tensor.name: self._host_pool[layout.offsets[tensor.name] :][: layout.sizes[tensor.name]]
            .view(np.float32)
            .reshape(tensor.shape)
            for tensor in state.spec.tensors
        }
        self._host_count = self._host_pool[layout.count_offset :][:_COUNT_BYTES].view(np.int64)
        self._remembered: DeviceMemory | None = None
        self._copies: list[tuple[int, int, int]] = []  # from the spare memory to the pool: target, source, bytes
        self._bind(apart)
        self._graph = self._capture()
        state.live_in(self)

    def _bind(self, apart: dict[str, int]) -> None:
        """Give every input and output of the plan its address, for good."""
        addresses = {"x": self._x.address, "logits": self._logits.address}
        spare = self._spare.address
        for name, offset in self._layout.offsets.items():
            place = self._pool.address + offset
            addresses[f"state_in.{name}"] = place
            if name in apart:
                self._copies.append((place, spare, apart[name]))
                addresses[f"state_out.{name}"] = spare
                spare += _aligned(apart[name])
            else:
                addresses[f"state_out.{name}"] = place
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise BackendError(
                    f"TensorRT does not take an address for {name}", found=self._logger.take(), remedy=_REBUILD
                )

    def _capture(self) -> Graph:
        """The step as a graph. TensorRT sets itself up in a first run; it and the pool it leaves are not the session's,
        whose state is on the host until the first token."""
        self._stream.to_device(self._pool.address, self._pinned.address, self._layout.size_bytes)
        self._queue_step()
        self._stream.synchronize()
        return self._stream.capture(self._queue_step)

    def _queue_step(self) -> None:
        stream, base = self._stream, self._pinned.address
        stream.to_device(self._x.address, base + self._offset(self._host_x), self._host_x.nbytes)
        with before_exit():
            taken = self._context.execute_async_v3(stream.handle)
        if not taken:
            raise BackendError("TensorRT refuses to run the plan", found=self._logger.take(), remedy=_REBUILD)
        for target, source, size_bytes in self._copies:
            stream.on_device(target, source, size_bytes)
        count = self._pool.address + self._layout.count_offset
        stream.to_device(count, base + self._offset(self._next_count), _COUNT_BYTES)
        stream.to_host(base + self._offset(self._host_logits), self._logits.address, self._host_logits.nbytes)
        stream.to_host(base + self._offset(self._seen_count), count, _COUNT_BYTES)

    def _offset(self, part: NDArray[Any]) -> int:
        address: int = part.ctypes.data
        return address - self._pinned.address

    def feed(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        every = len(logits) == len(tokens)
        for index in range(len(tokens)):
            try:
                self._driver.activate()
                if not self.ahead:
                    self._upload()
                self._step(tokens[index : index + 1])
            except CudaError as error:
                raise self._failed(error, f"token {index} of this feed") from error
            if every:
                logits[index] = self._host_logits
        if not every:
            logits[0] = self._host_logits

    def _step(self, token: NDArray[np.int64]) -> None:
        # A step that was interrupted may still read what is written here.
        self._stream.synchronize()
        self._host_x[:] = decode_rows(self._embedding, token).reshape(-1)
        self._next_count[0] = min(int(self._seen_count[0]) + 1, MAX_TOKENS_SEEN)
        # Before the launch for an interruption after it, and again after it for a thread that has fetched in between.
        self.steps += 1
        self._graph.launch()
        self.steps += 1
        self._stream.synchronize()

    def _upload(self) -> None:
        """Let the pool hold the state that the host holds, which stays the session's until the next step."""
        self._stream.synchronize()
        for name, view in self._state.front.items():
            self._host_views[name][...] = view
        self._host_count[0] = self._seen_count[0] = self._state.tokens_seen
        self._stream.to_device(self._pool.address, self._pinned.address, self._layout.size_bytes)

    def tokens_seen(self) -> int:
        try:
            self._driver.activate()
            self._stream.synchronize()
        except CudaError as error:
            raise self._failed(error, "the token count") from error
        return int(self._seen_count[0])

    def fetch(self, tensors: Tensors, count: NDArray[np.int64]) -> None:
        try:
            self._driver.activate()
            self._stream.to_host(self._pinned.address, self._pool.address, self._layout.size_bytes)
            self._stream.synchronize()
        except CudaError as error:
            raise self._failed(error, "the state") from error
        for name, view in tensors.items():
            view[...] = self._host_views[name]
        count[0] = self._host_count[0]

    def remember(self) -> None:
        """Keep a copy of the state on the device, for `go_back`.

        Raises:
            BackendError: the device's memory is short, or the device failed.
        """
        try:
            self._driver.activate()
            if not self.ahead:
                self._upload()
                self.steps += 1
            if self._remembered is None:
                self._remembered = DeviceMemory(self._driver, self._layout.size_bytes)
            self._stream.on_device(self._remembered.address, self._pool.address, self._layout.size_bytes)
        except CudaError as error:
            raise self._failed(error, "this batch") from error

    def go_back(self) -> BackendError | None:
        """Let the state be the one that `remember` kept; where the device fails at that too, what is to be raised."""
        assert self._remembered is not None
        count_offset = self._layout.count_offset
        try:
            self._stream.on_device(self._pool.address, self._remembered.address, self._layout.size_bytes)
            self._stream.to_host(
                self._pinned.address + self._offset(self._seen_count), self._pool.address + count_offset, _COUNT_BYTES
            )
            self._stream.synchronize()
        except CudaError as error:
            return self._lost(error, "this batch")
        self.steps += 1  # for a thread that has fetched what is taken back
        return None

    def _failed(self, error: CudaError, place: str) -> BackendError:
        """What to raise: the device may only have refused a call, or be gone, and with it what it alone knew."""
        try:
            self._driver.activate()
            self._stream.synchronize()
        except CudaError:
            return self._lost(error, place)
        seen = int(self._seen_count[0]) if self.ahead else self._state.tokens_seen
        return BackendError(
            f"the CUDA device refuses a call: {error}",
            place=place,
            remedy=f"the session's state is whole, after {seen} tokens; go on from there",
        )

    def _lost(self, error: CudaError, place: str) -> BackendError:
        """The host's older state is the session's again."""
        self.steps_fetched = self.steps
        return BackendError(
            f"the CUDA device failed: {error}",
            place=place,
            remedy=f"the session is back at token {self._state.tokens_seen}, where its state was last read; save it, "
            "and go on in a new process",
        )


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _open_plan(file: EngineFile) -> tuple[PlanFile, Any, Path | None]:
    """The best plan of an engine that fits what there is here, and what it needs, as `_needs`; where none fits, what is
    wrong with the first is raised."""
    engine = Path(file.path)
    paths = [plan_path(engine, target) for target in RUNNABLE_TARGETS]
    problem: GosletError | None = None
    for path in filter(Path.is_file, paths):
        try:
            plan = PlanFile(path)
            try:
                return plan, *_needs(plan, file)
            except BaseException:
                plan.close()
                raise
        except (BackendUnavailableError, DependencyError, ContainerError) as error:
            problem = problem or error
    if problem is not None:
        raise problem
    raise BackendUnavailableError(
        "there is no TensorRT plan for this engine",
        file=engine,
        expected=" or ".join(path.name for path in paths),
        remedy="build one on this device: " + shlex.join(["goslet", "plan", os.fspath(engine), "--target", "local"]),
    )


def _needs(plan: PlanFile, file: EngineFile) -> tuple[Any, Path | None]:
    """TensorRT's module and the library of plugins, or None, that a plan runs with; raises where it does not fit."""
    plan.check(model_id=file.model_id, weights_sha256=file.weights_sha256, batch=1)
    trt = _import(plan.key.runtime, plan.path)
    plan.check(tensorrt_version=trt.__version__)
    device = gpu()
    if device is not None:
        plan.check(capability=device.capability, device=device.name)
    if not plan.key.plugin_version:
        return trt, None
    library = find_plugin(Path(file.path))
    plan.check(plugin_version=PLUGIN_VERSION)
    return trt, library


def _import(runtime: str, plan: Path) -> Any:
    name = installed_package(runtime)
    if name is None:
        raise DependencyError(
            f"the plan needs the Python package {runtime[:40]}, which is not installed",
            file=plan,
            remedy=f"{INSTALL.get(runtime, 'build the plan again')}; or use backend native",
        )
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise DependencyError(f"{runtime} is installed and cannot be loaded: {first_line(error)}", file=plan) from error


def _logger(trt: Any) -> Any:
    """A logger that keeps errors instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR"):
                self.errors.append(message)

        def take(self) -> str | None:
            """What went wrong since the last time, the first of it first."""
            said = " ".join("; ".join(self.errors).split())[:300]
            self.errors.clear()
            return said or None

    return Logger()


def _check_signature(trt: Any, engine: Any, file: EngineFile, path: Path) -> None:
    """Hold the plan's inputs and outputs to the engine's header, by which memory is laid out."""
    spec = file.spec
    states = {tensor.name: tuple(tensor.shape) for tensor in file.state_spec.tensors}
    shapes = {
        ("INPUT", "x"): (1, sum(spec.input_sizes)),
        ("OUTPUT", "logits"): (1, spec.vocab_size),
        **{("INPUT", f"state_in.{name}"): (1, *shape) for name, shape in states.items()},
        **{("OUTPUT", f"state_out.{name}"): (1, *shape) for name, shape in states.items()},
    }
    expected = {name: f"{mode} {shape} of {trt.float32}" for (mode, name), shape in shapes.items()}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: f"{engine.get_tensor_mode(name).name} {tuple(engine.get_tensor_shape(name))} "
        f"of {engine.get_tensor_dtype(name)}"
        for name in names
    }
    for name in [*expected, *names]:
        if expected.get(name) != found.get(name):
            raise BackendError(
                "the plan's inputs and outputs are not those of the engine",
                file=path,
                place=name[:100],
                expected=expected.get(name, "nothing"),
                found=found.get(name, "nothing"),
                remedy=_REBUILD,
            )
    check_embedding(file)
