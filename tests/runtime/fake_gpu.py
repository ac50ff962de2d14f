"""A CUDA driver and a TensorRT that run on the CPU, stricter than the real ones: what the GPU backends are tested on.

Work on a stream waits until the stream is synchronized, so that a missing wait shows. Copies must lie within one living
allocation each, of the kind that they are said to be of; every thread must have made the device its own; addresses are
aligned to 256 bytes and no more. The plan of this TensorRT is an ONNX model, which ONNX Runtime computes. Before it is
run, outputs that have memory of their own are filled with NaN: a wrong share of memory shows too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import itertools
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import goslet
from goslet import planfile
from goslet.backends import cuda_driver, ort_cuda, trt
from goslet.enginefile import EngineFile
from goslet.machine import Gpu

GPU = Gpu("a model of a GPU", "8.7")
VERSION = "10.3.0"
_ALIGNMENT = 256
_NAMES = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 3: b"CUDA_ERROR_NOT_INITIALIZED", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700

Work = Callable[[], None]


class FakeCuda:
    """What `ctypes.CDLL` gives for libcuda.so.1."""

    def __init__(self) -> None:
        self.memory: dict[int, tuple[str, ctypes.Array[ctypes.c_uint8], int]] = {}
        self.streams: dict[int, list[Work]] = {}
        self.capturing: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}  # a function: what happens before its next call
        self.fail: dict[str, tuple[int, int]] = {}  # a function: how many calls of it go well before one fails, and how
        self.broken_captures = 0
        self.dead = 0  # the code that everything returns since the device failed
        self._threads = threading.local()
        self._device = threading.RLock()
        self._handles = iter(range(1000, 1 << 40))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or f"_{name}" not in dir(type(self)):
            raise AttributeError(name)
        real = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.before:
                self.before.pop(name)()
            if self.dead and name != "cuGetErrorName":
                return self.dead
            if name in self.fail:
                left, code = self.fail[name]
                if left == 0:
                    del self.fail[name]
                    self.dead = code if code == ILLEGAL_ADDRESS else 0
                    return code
                self.fail[name] = (left - 1, code)
            if name not in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuGetErrorName"):
                assert getattr(self._threads, "active", False), f"{name} on a thread without a device"
            real(*arguments)
            return 0

        return call

    def _cuInit(self, flags: ctypes.c_uint) -> None:
        assert flags.value == 0

    def _cuDeviceGet(self, device: Any, ordinal: ctypes.c_int) -> None:
        device._obj.value = ordinal.value

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> None:
        context._obj.value = 77 + device.value

    def _cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        self._threads.active = context.value == 77

    def _cuGetErrorName(self, code: ctypes.c_int, name: Any) -> None:
        name._obj.value = _NAMES.get(code.value, b"CUDA_ERROR_UNKNOWN")

    def _allocate(self, kind: str, size_bytes: int) -> int:
        block = (ctypes.c_uint8 * (size_bytes + 2 * _ALIGNMENT))()
        ctypes.memset(block, 0xFF, len(block))  # fresh memory holds anything
        address = (ctypes.addressof(block) // _ALIGNMENT + 1) * _ALIGNMENT
        self.memory[address] = (kind, block, size_bytes)
        return address

    def _cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> None:
        address._obj.value = self._allocate("device", size.value)

    def _cuMemHostAlloc(self, address: Any, size: ctypes.c_size_t, flags: ctypes.c_uint) -> None:
        address._obj.value = self._allocate("pinned", size.value)

    def _cuMemFree_v2(self, address: ctypes.c_uint64) -> None:
        if self.capturing:
            self.broken_captures += 1
        assert self.memory.pop(address.value)[0] == "device"

    def _cuMemFreeHost(self, address: ctypes.c_void_p) -> None:
        assert address.value is not None and self.memory.pop(address.value)[0] == "pinned"

    def _cuStreamCreate(self, handle: Any, flags: ctypes.c_uint) -> None:
        assert flags.value == 1  # it waits for no other stream, nor the others for it
        handle._obj.value = next(self._handles)
        self.streams[handle._obj.value] = []

    def _cuStreamDestroy_v2(self, handle: ctypes.c_void_p) -> None:
        assert handle.value is not None
        del self.streams[handle.value]

    def _cuStreamSynchronize(self, handle: ctypes.c_void_p) -> None:
        assert handle.value is not None and handle.value not in self.capturing
        # As the device does, one thing after the other; a signal cannot fall between them and leave one out.
        queue = self.streams[handle.value]
        with self._device:
            while queue:
                queue[0]()
                queue.pop(0)

    def _cuStreamBeginCapture_v2(self, handle: ctypes.c_void_p, mode: ctypes.c_int) -> None:
        assert handle.value is not None and not self.streams[handle.value] and mode.value == 1
        self.capturing[handle.value] = []

    def _cuStreamEndCapture(self, handle: ctypes.c_void_p, graph: Any) -> None:
        assert handle.value is not None
        graph._obj.value = next(self._handles)
        self.graphs[graph._obj.value] = self.capturing.pop(handle.value)

    def _cuGraphInstantiateWithFlags(self, handle: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong) -> None:
        assert graph.value is not None
        handle._obj.value = next(self._handles)
        self.graphs[handle._obj.value] = self.graphs[graph.value]

    def _cuGraphDestroy(self, graph: ctypes.c_void_p) -> None:
        assert graph.value is not None
        del self.graphs[graph.value]

    _cuGraphExecDestroy = _cuGraphDestroy

    def _cuGraphLaunch(self, handle: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        assert handle.value is not None and stream.value is not None
        work = self.graphs[handle.value]

        def run_all() -> None:
            for step in work:
                step()

        self.streams[stream.value].append(run_all)

    def queue(self, stream: int, work: Work) -> None:
        """Put work on a stream, or into the graph that is captured from it."""
        (self.capturing[stream] if stream in self.capturing else self.streams[stream]).append(work)

    def room(self, address: int) -> tuple[str, int]:
        """The kind of memory at an address, and how many bytes of its allocation follow."""
        for begin, (kind, _, size_bytes) in self.memory.items():
            if begin <= address < begin + size_bytes:
                return kind, begin + size_bytes - address
        raise AssertionError(f"{address:#x} is in no allocation")

    def _copy(self, kinds: tuple[str, str], target: Any, source: Any, size: ctypes.c_size_t, stream: Any) -> None:
        ends = (target.value, source.value)

        def work() -> None:
            for address, kind in zip(ends, kinds, strict=True):
                found, left = self.room(address)
                assert found == kind and size.value <= left
            ctypes.memmove(*ends, size.value)

        self.queue(stream.value, work)

    def _cuMemcpyHtoDAsync_v2(self, *arguments: Any) -> None:
        self._copy(("device", "pinned"), *arguments)

    def _cuMemcpyDtoHAsync_v2(self, *arguments: Any) -> None:
        self._copy(("pinned", "device"), *arguments)

    def _cuMemcpyDtoDAsync_v2(self, *arguments: Any) -> None:
        self._copy(("device", "device"), *arguments)


class Named:
    """A value of an enumeration."""

    def __init__(self, name: str) -> None:
        self.name = name


class FakeTensorRT(types.ModuleType):
    """What ``import tensorrt`` gives."""

    float32 = "DataType.FLOAT"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("tensorrt")
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        self.__version__ = VERSION
        self.cuda = cuda
        self.in_place: frozenset[str] = frozenset()
        self.loads_plugins = True
        self.refuses_contexts = False
        self.refuses_to_run = False
        outer = self

        class ILogger:
            pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def get_plugin_registry(self) -> Any:
                return self

            def load_library(self, path: str) -> object | None:
                if not outer.loads_plugins:
                    self.logger.log(Named("ERROR"), "no plugins\nin it")
                    return None
                return self

            def deserialize_cuda_engine(self, plan: memoryview) -> _FakeEngine | None:
                if bytes(plan[:7]) == b"garbled":
                    self.logger.log(Named("WARNING"), "never shown")
                    self.logger.log(Named("ERROR"), "magicTag does\nnot match")
                    return None
                return _FakeEngine(outer, self.logger, bytes(plan))

        self.ILogger, self.Runtime = ILogger, Runtime


class _FakeEngine:
    def __init__(self, module: FakeTensorRT, logger: Any, model: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = 1
        self.module = module
        self.logger = logger
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.values = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> Named:
        return Named("INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.values[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        return {"tensor(float)": self.module.float32}[self.values[name].type]

    def create_execution_context(self) -> _FakeContext | None:
        return None if self.module.refuses_contexts else _FakeContext(self)


class _FakeContext:
    def __init__(self, engine: _FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % _ALIGNMENT == 0
        self.addresses[name] = address
        return name in self.engine.values

    def execute_async_v3(self, stream: int) -> bool:
        module = self.engine.module
        if module.refuses_to_run:
            self.engine.logger.log(Named("ERROR"), "no kernel image")
            return False
        assert stream not in module.cuda.capturing or self.runs, "captured before a first run"
        self.runs += 1
        self._check_addresses()
        module.cuda.queue(stream, self._run)
        return True

    def _check_addresses(self) -> None:
        places = []
        for name in self.engine.values:
            stem = name.removeprefix("state_in.").removeprefix("state_out.")
            if stem in self.engine.module.in_place:
                assert self.addresses[f"state_in.{stem}"] == self.addresses[f"state_out.{stem}"]
                if name.startswith("state_out."):
                    continue
            begin = self.addresses[name]
            size_bytes = 4 * int(np.prod(self.engine.get_tensor_shape(name)))
            kind, left = self.engine.module.cuda.room(begin)
            assert kind == "device" and size_bytes <= left
            places.append((begin, begin + size_bytes))
        places.sort()
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))

    def _view(self, name: str) -> np.ndarray:
        shape = self.engine.get_tensor_shape(name)
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
        return np.frombuffer(memory, np.float32).reshape(shape)

    def _run(self) -> None:
        in_place = {f"state_out.{name}" for name in self.engine.module.in_place}
        outputs = [name for name in self.engine.values if name not in self.engine.inputs]
        for name in outputs:
            if name not in in_place:
                self._view(name)[...] = np.nan
        results = self.engine.session.run(outputs, {name: self._view(name) for name in self.engine.inputs})
        for name, result in zip(outputs, results, strict=True):
            self._view(name)[...] = result


def plan_key(file: EngineFile, **changed: Any) -> planfile.PlanKey:
    """The key of a plan for an engine, this TensorRT and this GPU."""
    fields: dict[str, Any] = {
        "model_id": file.model_id, "weights_sha256": file.weights_sha256, "target": "local", "runtime": "tensorrt",
        "tensorrt_version": VERSION, "device": GPU.name, "capability": GPU.capability, "plugin_version": 0,
        "precision": "f16", "weights": "qdq", "batch": 1,
    }  # fmt: skip
    return planfile.PlanKey(**{**fields, **changed})


def write_fake_plan(engine: Path, **changed: Any) -> tuple[Path, frozenset[str]]:
    """A plan beside an engine, with the recurrences' states in place; the plan and their names."""
    from goslet.export.trt_graph import in_place_states, lower

    with EngineFile.open(engine) as file:
        in_place = in_place_states(lower(file).model)
        model = lower(file, plugins=False).whole()
        path = planfile.plan_path(engine, "local")
        planfile.write_plan(path, plan_key(file, **changed), in_place, model.SerializeToString(), overwrite=True)
    return path, frozenset(in_place)


@contextlib.contextmanager
def _module(name: str, module: types.ModuleType) -> Iterator[None]:
    # mock.patch.dict would also take back what is imported meanwhile, torch's parts for example.
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextlib.contextmanager
def fake_gpu() -> Iterator[tuple[FakeCuda, FakeTensorRT]]:
    """This machine with a GPU and TensorRT."""
    cuda = FakeCuda()
    tensorrt = FakeTensorRT(cuda)
    with (
        mock.patch.object(cuda_driver, "open_library", lambda: cuda),
        mock.patch.object(trt, "gpu", lambda: GPU),
        _module("tensorrt", tensorrt),
        mock.patch.object(ort_cuda.OrtCudaBackend, "provider", ("CPUExecutionProvider", {})),
        mock.patch.object(ort_cuda.OrtCudaBackend, "device", "cpu"),
    ):
        yield cuda, tensorrt


@contextlib.contextmanager
def opened(kind: str, path: Path, folder: Path, threads: int = 1) -> Iterator[goslet.Engine]:
    """An engine on a backend: ``native``, ``ort``, or one of a GPU's, ``trt`` and ``ort-cuda``."""
    backend, _, device = kind.partition("-")
    if kind in ("native", "ort"):
        with goslet.open(path, backend=backend, threads=threads) as engine:
            yield engine
        return
    # For the opening alone: a fixture that lasts must not give a GPU to tests that do not ask for it.
    with fake_gpu() as (_cuda, tensorrt):
        if kind == "trt":
            path = Path(shutil.copy(path, folder))
            _, tensorrt.in_place = write_fake_plan(path)
        engine = goslet.open(path, backend=backend, device=device or None)
    if isinstance(engine.backend, ort_cuda.OrtCudaBackend):
        engine.backend.device = "cpu"  # type: ignore[misc]
    with engine:
        yield engine
