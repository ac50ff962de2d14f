"""The CUDA driver, as much of it as a step needs: memory, one stream, copies on it, and a graph captured from it.

Through ctypes, since a driver's library is wherever a CUDA device is, while a Python package for it may not be. The
context is the device's primary one, which TensorRT and every CUDA runtime share.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError

_CAPTURE_OF_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_COPIES_IN_PASS = 8  # so that starting the first of them does not count


# One thread at a time: collection is switched off for all of them.
_capturing = threading.RLock()


class CudaError(Exception):
    """The driver says no; the message holds its own name for it, such as CUDA_ERROR_OUT_OF_MEMORY."""


def open_library() -> Any:
    """The driver's library; raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


class Driver:
    """The first CUDA device.

    Raises:
        BackendUnavailableError: there is no driver or no device, or the driver is too old.
    """

    def __init__(self) -> None:
        try:
            self._library = open_library()
        except OSError as error:
            raise BackendUnavailableError(
                "there is no CUDA driver", expected="libcuda.so.1", remedy="use backend native, or install the driver"
            ) from error
        device, context = ctypes.c_int(), ctypes.c_void_p()
        try:
            self.call("cuInit", ctypes.c_uint(0))
            self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        except CudaError as error:
            raise BackendUnavailableError(
                f"there is no CUDA device to use: {error}", remedy="use backend native"
            ) from error
        self._context = context
        self.activate()

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: it returns something else than success, or an older driver does not have it.
        """
        found = getattr(self._library, function, None)
        if found is None:
            raise CudaError(f"the driver is too old: it has no {function}")
        code = int(found(*arguments))
        if code:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
            raise CudaError(f"{(name.value or b'CUDA error').decode('ascii', 'replace')} ({code}) from {function}")

    def activate(self) -> None:
        """Make the device that of the calling thread; needed before anything else in each thread."""
        self.call("cuCtxSetCurrent", self._context)


class DeviceMemory:
    """Bytes on the device, aligned to 256, freed with this object."""

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        address = ctypes.c_uint64()
        driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self.address = int(address.value)
        self._free = weakref.finalize(self, _quietly, driver, "cuMemFree_v2", address)


class PinnedMemory:
    """Zeroed host bytes that the device copies to and from by itself, freed with this object."""

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        address = ctypes.c_void_p()
        driver.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size_bytes), ctypes.c_uint(0))
        assert address.value is not None
        self.address = address.value
        self._free = weakref.finalize(self, _quietly, driver, "cuMemFreeHost", address)
        memory = (ctypes.c_uint8 * size_bytes).from_address(self.address)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        self.bytes[:] = 0


class Stream:
    """A queue of work on the device."""

    def __init__(self, driver: Driver) -> None:
        handle = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_NON_BLOCKING))
        self._driver = driver
        self._handle = handle
        self._free = weakref.finalize(self, _quietly, driver, "cuStreamDestroy_v2", handle)

    @property
    def handle(self) -> int:
        """The CUstream, for other libraries."""
        return self._handle.value or 0

    def synchronize(self) -> None:
        """Wait until all work so far is done.

        Raises:
            CudaError: some of it failed.
        """
        self._driver.call("cuStreamSynchronize", self._handle)

    def to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy from pinned memory."""
        self._driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            self._handle,
        )

    def to_host(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy to pinned memory."""
        self._driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size_bytes),
            self._handle,
        )

    def on_device(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy within the device."""
        self._driver.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size_bytes),
            self._handle,
        )

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` queues, as one thing to launch; nothing of it runs now.

        Raises:
            CudaError: it holds something that cannot be captured.
        """
        # A garbage collection may free memory of the device, which ends a capture of the same thread.
        with _capturing:
            collects = gc.isenabled()
            gc.disable()
            try:
                return self._captured(work)
            finally:
                if collects:
                    gc.enable()

    def _captured(self, work: Callable[[], None]) -> Graph:
        self._driver.call("cuStreamBeginCapture_v2", self._handle, ctypes.c_int(_CAPTURE_OF_THIS_THREAD))
        captured = ctypes.c_void_p()
        try:
            work()
        except BaseException:
            # A stream in the midst of a capture is good for nothing else.
            with contextlib.suppress(CudaError):
                self._driver.call("cuStreamEndCapture", self._handle, ctypes.byref(captured))
            if captured:
                _quietly(self._driver, "cuGraphDestroy", captured)
            raise
        self._driver.call("cuStreamEndCapture", self._handle, ctypes.byref(captured))
        return Graph(self._driver, self._handle, captured)


class Graph:
    """Captured work, all of which a launch queues, or none."""

    def __init__(self, driver: Driver, stream: ctypes.c_void_p, captured: ctypes.c_void_p) -> None:
        self._driver = driver
        self._stream = stream
        handle = ctypes.c_void_p()
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), captured, ctypes.c_ulonglong(0))
        finally:
            _quietly(driver, "cuGraphDestroy", captured)
        self._handle = handle
        self._free = weakref.finalize(self, _quietly, driver, "cuGraphExecDestroy", handle)

    def launch(self) -> None:
        """Queue the work on the stream that it was captured from.

        Raises:
            CudaError: nothing was queued.
        """
        self._driver.call("cuGraphLaunch", self._handle, self._stream)


def copy_bandwidth_gb_s(driver: Driver, size_bytes: int, passes: int) -> float:
    """GB/s (10^9) at which the device copies a block within its memory, reads and writes together: the best of several.

    Raises:
        CudaError: the device's memory is short, or a copy failed.
    """
    driver.activate()
    source, target = DeviceMemory(driver, size_bytes), DeviceMemory(driver, size_bytes)
    stream = Stream(driver)
    passes_s = []
    for _ in range(passes + 1):  # the first warms up
        start_s = time.perf_counter()
        for _ in range(_COPIES_IN_PASS):
            stream.on_device(target.address, source.address, size_bytes)
        stream.synchronize()
        passes_s.append(time.perf_counter() - start_s)
    return 2 * _COPIES_IN_PASS * size_bytes / min(passes_s[1:]) / 1e9


def _quietly(driver: Driver, function: str, handle: Any) -> None:
    """Free something; a device that has failed cannot, and nobody is left to be told."""
    with contextlib.suppress(CudaError):
        driver.activate()
        driver.call(function, handle)
