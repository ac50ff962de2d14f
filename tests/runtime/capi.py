"""The C library as the tests use it: built with CMake, called through ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK, INVALID_ARGUMENT, BUSY, CANNOT_READ, CANNOT_WRITE, BAD_FILE, UNSUPPORTED = range(7)
MISMATCH, NOT_FINITE, BUFFER_TOO_SMALL, OUT_OF_MEMORY, WRONG_PROCESS, FAILED = range(7, 13)

TOKENS = np.random.default_rng(7).integers(0, 256, 150)
# What issue 3 asks of float32 against ONNX Runtime, relative to the range of the logits.
TOLERANCE = 1e-5


class Options(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("threads", c_uint32), ("pin", c_int32))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "goslet_version": (c_char_p, []),
    "goslet_last_status": (c_int, []),
    "goslet_last_error": (c_char_p, []),
    "goslet_open": (c_void_p, [c_char_p, c_void_p]),
    "goslet_close": (None, [c_void_p]),
    "goslet_vocab_size": (c_size_t, [c_void_p]),
    "goslet_state_size_bytes": (c_size_t, [c_void_p]),
    "goslet_isa": (c_char_p, [c_void_p]),
    "goslet_model_id": (c_char_p, [c_void_p]),
    "goslet_session_new": (c_void_p, [c_void_p]),
    "goslet_session_fork": (c_void_p, [c_void_p]),
    "goslet_session_free": (None, [c_void_p]),
    "goslet_session_reset": (c_int, [c_void_p]),
    "goslet_session_tokens_seen": (c_int64, [c_void_p]),
    "goslet_feed": (c_int, [c_void_p, c_void_p, c_size_t, c_void_p]),
    "goslet_feed_all": (c_int, [c_void_p, c_void_p, c_size_t, c_void_p]),
    "goslet_step_batch": (c_int, [POINTER(c_void_p), c_void_p, c_size_t, c_void_p]),
    "goslet_session_save": (c_int, [c_void_p, c_char_p]),
    "goslet_session_load": (c_int, [c_void_p, c_char_p]),
    "goslet_encode": (c_int, [c_void_p, c_char_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t)]),
    "goslet_decode": (c_int, [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t)]),
    "goslet_end_token": (c_int64, [c_void_p]),
}


def load(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class CSession:
    """A session handle with the calls as a C program makes them; `status` is that of the last call."""

    def __init__(self, engine: CEngine, handle: int | None) -> None:
        assert handle, engine.error
        self.engine = engine
        self.api = engine.api
        self.handle: int | None = handle

    def feed(self, tokens: Any, *, all_logits: bool = False) -> NDArray[np.float32]:
        ids = np.asarray(tokens, np.int64)
        # Poisoned, so that numbers that are not written show.
        logits = np.full((len(ids) if all_logits else 1, self.engine.vocab_size), np.nan, np.float32)
        call = self.api.goslet_feed_all if all_logits else self.api.goslet_feed
        assert call(self.handle, ids.ctypes.data, len(ids), logits.ctypes.data) == OK, self.engine.error
        return logits if all_logits else logits[0]

    @property
    def tokens_seen(self) -> int:
        return int(self.api.goslet_session_tokens_seen(self.handle))

    def fork(self) -> CSession:
        return CSession(self.engine, self.api.goslet_session_fork(self.handle))

    def save(self, path: Path) -> int:
        return int(self.api.goslet_session_save(self.handle, os.fsencode(path)))

    def load(self, path: Path) -> int:
        return int(self.api.goslet_session_load(self.handle, os.fsencode(path)))

    def free(self) -> None:
        self.api.goslet_session_free(self.handle)
        self.handle = None


class CEngine:
    """An engine handle."""

    def __init__(self, api: ctypes.CDLL, path: Path, threads: int = 1) -> None:
        self.api = api
        options = Options(ctypes.sizeof(Options), threads, 0)
        self.handle: int | None = api.goslet_open(os.fsencode(path), byref(options))
        assert self.handle, self.error
        self.vocab_size = int(api.goslet_vocab_size(self.handle))

    @property
    def error(self) -> str:
        return str(self.api.goslet_last_error().decode())

    def session(self) -> CSession:
        return CSession(self, self.api.goslet_session_new(self.handle))

    def close(self) -> None:
        self.api.goslet_close(self.handle)
        self.handle = None

    def encode(self, text: bytes) -> list[int]:
        ids, n_ids = np.zeros(len(text), np.int64), c_size_t()
        status = self.api.goslet_encode(self.handle, text, len(text), ids.ctypes.data, len(ids), byref(n_ids))
        assert status == OK, self.error
        return list(ids[: n_ids.value])

    def decode(self, tokens: list[int], capacity: int = 1 << 16) -> bytes:
        ids, room, n_bytes = np.array(tokens, np.int64), ctypes.create_string_buffer(capacity), c_size_t()
        status = self.api.goslet_decode(self.handle, ids.ctypes.data, len(ids), room, capacity, byref(n_bytes))
        assert status == OK, self.error
        return room.raw[: n_bytes.value]


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)


def refusal(api: ctypes.CDLL, path: Path) -> int:
    """The status with which an engine file is refused, OK if it is not."""
    options = Options(ctypes.sizeof(Options), 1, 0)
    handle = api.goslet_open(os.fsencode(path), byref(options))
    if handle:
        api.goslet_close(handle)
        return OK
    status = int(api.goslet_last_status())
    subject = "goslet_open" if status == INVALID_ARGUMENT else path
    assert api.goslet_last_error().decode().startswith(f"{subject}: ")
    return status
