"""The C interface, through ctypes and through the example: the same numbers, states and refusals as in Python."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import goslet
from goslet.container import Section, read_container, write_container
from goslet.enginefile import EngineFile, TensorSource, write_engine
from goslet.errors import ContainerError, NewerVersionError, UnknownFeatureError
from goslet.spec import ModelSpec, StateSpec, StateTensor
from goslet.state import STATE_FILE_MAGIC, STATE_FILE_VERSION
from goslet.weights import WeightFormat, encode

from .attacks import CONTAINER_ATTACKS, ENGINE_ATTACKS, PREFIX, header_length, with_raw_header

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


# ----------------------------------------------------------------------------------------------------------- building


def tool(name: str) -> str:
    """The program that PyPI's package `name` installed beside this Python, or else the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def execute(*command: str | Path, limit_s: float) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command[0]} gave {done.returncode}:\n{done.stdout}"


@pytest.fixture(scope="session")
def library_path(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    execute(tool("cmake"), "-S", repository / "csrc", "-B", folder, *generator, limit_s=120)
    execute(tool("cmake"), "--build", folder, "--target", "goslet", "-j", "2", limit_s=600)
    return folder / "libgoslet.so"


@pytest.fixture(scope="session")
def api(library_path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@pytest.fixture(scope="session")
def example(repository: Path, library_path: Path) -> Path:
    program = library_path.with_name("generate")
    execute(
        tool("cc"),
        *("-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I", repository / "csrc/include"),
        *(repository / "csrc/example/generate.c", "-o", program),
        *("-L", library_path.parent, "-lgoslet", "-lm", f"-Wl,-rpath,{library_path.parent}"),
        limit_s=60,
    )
    return program


# --------------------------------------------------------------------------------------------------------- the handles


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


@pytest.fixture
def engine(api: ctypes.CDLL, tiny_engine: Path) -> Iterator[CEngine]:
    opened = CEngine(api, tiny_engine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(tiny_engine: Path) -> Iterator[goslet.Engine]:
    """The same engine on ONNX Runtime: none of the code here is common to both."""
    with goslet.open(tiny_engine, backend="ort", threads=1) as opened:
        yield opened


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


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize(("compiler", "standard"), [("cc", "-std=c99"), ("c++", "-std=c++11")])
def test_the_header_is_clean(repository: Path, tmp_path: Path, compiler: str, standard: str) -> None:
    source = tmp_path / ("use.c" if compiler == "cc" else "use.cpp")
    source.write_text(
        '#include "goslet.h"\n#include "goslet.h"\n'
        "int main(void) { goslet_options options = GOSLET_OPTIONS_INIT; return (int)options.threads; }\n"
    )
    flags = (standard, "-pedantic-errors", "-Wall", "-Wextra", "-Wconversion", "-Werror")
    execute(tool(compiler), *flags, "-I", repository / "csrc/include", "-c", source, "-o", source.with_suffix(".o"),
            limit_s=60)  # fmt: skip


def test_the_version_is_the_packages(api: ctypes.CDLL, repository: Path) -> None:
    assert api.goslet_version().decode() == goslet.__version__
    assert f'#define GOSLET_VERSION "{goslet.__version__}"' in (repository / "csrc/include/goslet.h").read_text()


def test_every_function_of_the_header_is_tested_here(repository: Path) -> None:
    header = (repository / "csrc/include/goslet.h").read_text()
    declared = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if "GOSLET_API " in line}
    assert declared - {"GOSLET_API", "__attribute__"} == set(SIGNATURES)


def test_an_engine_says_what_it_is(api: ctypes.CDLL, engine: CEngine, reference: goslet.Engine) -> None:
    assert engine.vocab_size == reference.spec.vocab_size == 256
    assert api.goslet_state_size_bytes(engine.handle) == reference.state_spec.size_bytes
    assert api.goslet_model_id(engine.handle).decode() == reference.model_id
    assert api.goslet_isa(engine.handle)
    assert api.goslet_end_token(engine.handle) == -1


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_logits_are_those_of_python(
    api: ctypes.CDLL, tiny_engine: Path, reference: goslet.Engine, threads: int
) -> None:
    engine = CEngine(api, tiny_engine, threads)
    expected = reference.session().feed(TOKENS, all_logits=True)
    whole, pieces = engine.session(), engine.session()
    assert_close(whole.feed(TOKENS, all_logits=True), expected)
    assert_close(pieces.feed(TOKENS[:70]), expected[69])
    ids = np.array(TOKENS[70:71], np.int64)
    assert api.goslet_feed(pieces.handle, ids.ctypes.data, 1, None) == OK
    assert_close(pieces.feed(TOKENS[71:72]), expected[71])
    assert (whole.tokens_seen, pieces.tokens_seen) == (150, 72)
    for session in (whole, pieces):
        session.free()
    engine.close()


def test_a_batch_steps_every_session(api: ctypes.CDLL, engine: CEngine, reference: goslet.Engine) -> None:
    sessions = [engine.session() for _ in range(5)]
    for index, session in enumerate(sessions):
        session.feed(TOKENS[: index + 1])
    handles = (c_void_p * 5)(*[session.handle for session in sessions])
    tokens = np.arange(5, dtype=np.int64)
    logits = np.full((5, engine.vocab_size), np.nan, np.float32)
    assert api.goslet_step_batch(handles, tokens.ctypes.data, 5, logits.ctypes.data) == OK, engine.error
    for index, row in enumerate(logits):
        assert_close(row, reference.session().feed([*TOKENS[: index + 1], index]))
    assert api.goslet_step_batch(handles, tokens.ctypes.data, 5, None) == OK
    assert [session.tokens_seen for session in sessions] == [3, 4, 5, 6, 7]


def test_forks_and_resets_are_independent(api: ctypes.CDLL, engine: CEngine) -> None:
    session = engine.session()
    fresh = session.feed(TOKENS[:9])
    twin = session.fork()
    forked = twin.feed([1, 2])
    assert (session.tokens_seen, twin.tokens_seen) == (9, 11)
    assert np.array_equal(session.feed([1, 2]), forked)
    assert api.goslet_session_reset(session.handle) == OK
    assert session.tokens_seen == 0
    assert np.array_equal(session.feed(TOKENS[:9]), fresh)


def test_an_engine_lives_as_long_as_its_sessions(api: ctypes.CDLL, tiny_engine: Path) -> None:
    engine = CEngine(api, tiny_engine, threads=2)
    session = engine.session()
    expected = session.fork().feed(TOKENS)
    engine.close()
    assert np.array_equal(session.feed(TOKENS), expected)
    twin = session.fork()
    session.free()
    assert twin.tokens_seen == 150
    twin.free()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list what a process holds")
def test_nothing_is_left_when_all_is_freed(api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.goslet"
    damaged.write_bytes(tiny_engine.read_bytes()[:-1])

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count(".goslet")

    before = held()
    for _ in range(5):
        engine = CEngine(api, tiny_engine, threads=3)
        sessions = [engine.session() for _ in range(3)]
        sessions[0].feed(TOKENS)
        assert refusal(api, damaged) == BAD_FILE
        engine.close()
        for session in sessions:
            session.free()
    assert held() == before


# -------------------------------------------------------------------------------------------------------------- states


def state_of(path: Path) -> tuple[Any, bytes]:
    with read_container(path, magic=STATE_FILE_MAGIC, version=STATE_FILE_VERSION, kind="state file") as container:
        header = {key: container.header[key] for key in ("model_id", "tokens_seen", "state", "required_features")}
        return header, bytes(container.section("state"))


def test_states_go_from_c_to_python(engine: CEngine, reference: goslet.Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.feed(TOKENS[:100])
    assert session.save(tmp_path / "c.state") == OK
    restored = reference.session()
    restored.load(tmp_path / "c.state")
    assert restored.tokens_seen == 100
    restored.save(tmp_path / "python.state")
    assert state_of(tmp_path / "python.state") == state_of(tmp_path / "c.state")
    assert_close(session.feed(TOKENS[100:]), restored.feed(TOKENS[100:]))
    assert sorted(os.listdir(tmp_path)) == ["c.state", "python.state"]


def test_states_go_from_python_to_c(engine: CEngine, reference: goslet.Engine, tmp_path: Path) -> None:
    session = reference.session()
    session.feed(TOKENS[:100])
    session.save(tmp_path / "python.state")
    restored = engine.session()
    assert restored.load(tmp_path / "python.state") == OK, engine.error
    assert restored.tokens_seen == 100
    assert restored.save(tmp_path / "c.state") == OK
    assert state_of(tmp_path / "python.state") == state_of(tmp_path / "c.state")
    assert_close(restored.feed(TOKENS[100:]), session.feed(TOKENS[100:]))


def test_states_of_others_are_refused(engine: CEngine, reference: goslet.Engine, tmp_path: Path) -> None:
    path = tmp_path / "x.state"
    python = reference.session()
    python.feed(TOKENS[:5])
    python.save(path)
    header, values = state_of(path)
    good = path.read_bytes()
    session = engine.session()
    expected = session.fork().feed(TOKENS[:3])

    def status(changed: dict[str, Any], content: bytes = values) -> int:
        members = {key: value for key, value in {**header, **changed}.items() if key != "required_features"}
        write_container(
            path,
            magic=STATE_FILE_MAGIC,
            version=STATE_FILE_VERSION,
            header=members,
            sections=[Section.of("state", content)],
            overwrite=True,
        )
        return session.load(path)

    assert status({"model_id": "f" * 64}) == MISMATCH
    assert "another model" in engine.error
    assert status({"state": {**header["state"], "layout_version": 2}}) == MISMATCH
    assert status({"state": {**header["state"], "tensors": header["state"]["tensors"][1:]}}) == MISMATCH
    assert status({"tokens_seen": -1}) == BAD_FILE
    assert status({"tokens_seen": 1.0}) == BAD_FILE
    assert status({"state": []}) == BAD_FILE
    assert status({}, values[:-4]) == BAD_FILE
    assert status({}, values[:-4] + np.float32(np.nan).tobytes()) == NOT_FINITE
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert session.load(path) == BAD_FILE
    assert session.load(tmp_path / "missing") == CANNOT_READ
    assert engine.error == f"{tmp_path / 'missing'}: does not exist"
    assert session.save(tmp_path / "missing" / "x.state") == CANNOT_WRITE
    # After all of these the session is still fresh.
    assert session.tokens_seen == 0
    assert np.array_equal(session.feed(TOKENS[:3]), expected)
    path.write_bytes(good)
    assert session.load(path) == OK
    assert session.tokens_seen == 5


@pytest.mark.parametrize("name", CONTAINER_ATTACKS)
def test_attack_on_a_state_file(engine: CEngine, reference: goslet.Engine, tmp_path: Path, name: str) -> None:
    session = reference.session()
    session.save(tmp_path / "x.state")
    # The attacks need two sections; what is behind the state is nobody's.
    header, values = state_of(tmp_path / "x.state")
    del header["required_features"]
    sections = [Section.of("state", values), Section.of("more", b"\r\n" + values)]
    write_container(tmp_path / "x.state", magic=STATE_FILE_MAGIC, version=STATE_FILE_VERSION, header=header,
                    sections=sections, overwrite=True)  # fmt: skip
    assert engine.session().load(tmp_path / "x.state") == OK, engine.error
    attack = CONTAINER_ATTACKS[name]
    (tmp_path / "x.state").write_bytes(attack.damage((tmp_path / "x.state").read_bytes()))
    refused = engine.session().load(tmp_path / "x.state")
    assert refused == (UNSUPPORTED if attack.error in (NewerVersionError, UnknownFeatureError) else BAD_FILE)


# ---------------------------------------------------------------------------------------------------------- bad calls


def test_null_is_an_error_everywhere(api: ctypes.CDLL, engine: CEngine) -> None:
    session = engine.session()
    tokens, logits, count = np.zeros(1, np.int64), np.zeros(256, np.float32), c_size_t()
    one = (c_void_p * 1)(session.handle)
    none = (c_void_p * 1)(None)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (api.goslet_open, (None, None)),
        (api.goslet_vocab_size, (None,)),
        (api.goslet_state_size_bytes, (None,)),
        (api.goslet_isa, (None,)),
        (api.goslet_model_id, (None,)),
        (api.goslet_end_token, (None,)),
        (api.goslet_session_new, (None,)),
        (api.goslet_session_fork, (None,)),
        (api.goslet_session_reset, (None,)),
        (api.goslet_session_tokens_seen, (None,)),
        (api.goslet_feed, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (api.goslet_feed, (session.handle, None, 1, logits.ctypes.data)),
        (api.goslet_feed_all, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (api.goslet_feed_all, (session.handle, None, 1, logits.ctypes.data)),
        (api.goslet_feed_all, (session.handle, tokens.ctypes.data, 1, None)),
        (api.goslet_step_batch, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (api.goslet_step_batch, (none, tokens.ctypes.data, 1, logits.ctypes.data)),
        (api.goslet_step_batch, (one, None, 1, logits.ctypes.data)),
        (api.goslet_step_batch, (one, tokens.ctypes.data, 0, logits.ctypes.data)),
        (api.goslet_session_save, (None, b"x")),
        (api.goslet_session_save, (session.handle, None)),
        (api.goslet_session_load, (None, b"x")),
        (api.goslet_session_load, (session.handle, None)),
        (api.goslet_encode, (None, b"x", 1, tokens.ctypes.data, 1, byref(count))),
        (api.goslet_encode, (engine.handle, None, 1, tokens.ctypes.data, 1, byref(count))),
        (api.goslet_encode, (engine.handle, b"x", 1, None, 1, byref(count))),
        (api.goslet_encode, (engine.handle, b"x", 1, tokens.ctypes.data, 1, None)),
        (api.goslet_decode, (None, tokens.ctypes.data, 1, logits.ctypes.data, 1, byref(count))),
        (api.goslet_decode, (engine.handle, None, 1, logits.ctypes.data, 1, byref(count))),
        (api.goslet_decode, (engine.handle, tokens.ctypes.data, 1, None, 1, byref(count))),
        (api.goslet_decode, (engine.handle, tokens.ctypes.data, 1, logits.ctypes.data, 1, None)),
    ]
    for call, arguments in calls:
        # Another failure between, so that each call is seen to report its own.
        assert api.goslet_open(b"/missing", None) is None
        result = call(*arguments)
        assert result in (None, 0, -1, INVALID_ARGUMENT), call.__name__
        assert api.goslet_last_status() == INVALID_ARGUMENT, call.__name__
        assert call.__name__ in engine.error
    assert {call.__name__ for call, _ in calls} == set(SIGNATURES) - {
        "goslet_version", "goslet_last_status", "goslet_last_error", "goslet_close", "goslet_session_free",
    }  # fmt: skip
    api.goslet_close(None)
    api.goslet_session_free(None)
    assert session.tokens_seen == 0


@pytest.mark.parametrize("tokens", [[256], [-1], [1, 2, 1 << 40], [1 << 62, 0], [-(1 << 63)], []])
def test_bad_tokens_change_nothing(api: ctypes.CDLL, engine: CEngine, tokens: list[int]) -> None:
    session, other = engine.session(), engine.session()
    session.feed(TOKENS[:4])
    expected = session.fork().feed([1])
    ids = np.array([*tokens, 0], np.int64)
    logits = np.zeros((4, 256), np.float32)
    assert api.goslet_feed(session.handle, ids.ctypes.data, len(tokens), logits.ctypes.data) == INVALID_ARGUMENT
    assert api.goslet_feed_all(session.handle, ids.ctypes.data, len(tokens), logits.ctypes.data) == INVALID_ARGUMENT
    if tokens:
        handles = (c_void_p * 2)(other.handle, session.handle)
        pair = np.array([0, tokens[-1] or tokens[0]], np.int64)
        assert api.goslet_step_batch(handles, pair.ctypes.data, 2, logits.ctypes.data) == INVALID_ARGUMENT
    assert (session.tokens_seen, other.tokens_seen) == (4, 0)
    assert np.array_equal(session.feed([1]), expected)


def test_a_batch_is_of_different_sessions_of_one_engine(api: ctypes.CDLL, engine: CEngine, tiny_engine: Path) -> None:
    second = CEngine(api, tiny_engine)
    own, foreign = engine.session(), second.session()
    tokens = np.zeros(2, np.int64)
    for pair in ((own, own), (own, foreign)):
        handles = (c_void_p * 2)(*[session.handle for session in pair])
        assert api.goslet_step_batch(handles, tokens.ctypes.data, 2, None) == INVALID_ARGUMENT
    assert (own.tokens_seen, foreign.tokens_seen) == (0, 0)
    foreign.free()
    second.close()


def test_options_may_grow(api: ctypes.CDLL, tiny_engine: Path) -> None:
    class Newer(ctypes.Structure):
        _fields_ = (*Options._fields_, ("later", c_double))

    def status(options: Any) -> int:
        handle = api.goslet_open(os.fsencode(tiny_engine), byref(options))
        api.goslet_close(handle)
        return OK if handle else int(api.goslet_last_status())

    size = ctypes.sizeof(Options)
    assert status(Options(size, 2, 1)) == OK
    assert status(Newer(ctypes.sizeof(Newer), 1, 0, 0.0)) == OK
    assert status(Newer(ctypes.sizeof(Newer), 1, 0, 1.0)) == UNSUPPORTED
    assert status(Options(size - 1, 1, 0)) == INVALID_ARGUMENT
    assert status(Options(0, 1, 0)) == INVALID_ARGUMENT
    assert status(Options(size, 1025, 0)) == INVALID_ARGUMENT


def test_an_unknown_instruction_set_is_refused(
    api: ctypes.CDLL, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSLET_ISA", "abacus")
    assert refusal(api, tiny_engine) == INVALID_ARGUMENT


def test_errors_are_each_threads_own(api: ctypes.CDLL) -> None:
    seen: list[tuple[int, bytes]] = []

    def look() -> None:
        seen.append((api.goslet_last_status(), api.goslet_last_error()))
        api.goslet_vocab_size(None)
        seen.append((api.goslet_last_status(), api.goslet_last_error()))

    api.goslet_open(b"/missing", None)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen[0] == (OK, b"")
    assert seen[1] == (INVALID_ARGUMENT, b"goslet_vocab_size: engine is NULL")
    assert api.goslet_last_error() == b"/missing: does not exist"
    # A message of any length is cut, not overrun.
    api.goslet_open(b"/" + b"x" * 100_000, None)
    assert len(api.goslet_last_error()) == 2047


# ------------------------------------------------------------------------------------------------- threads, processes


@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_run_in_parallel(api: ctypes.CDLL, tiny_engine: Path, threads: int) -> None:
    engine = CEngine(api, tiny_engine, threads)
    prompts = [np.random.default_rng(seed).integers(0, 256, 300) for seed in range(6)]
    expected = []
    for prompt in prompts:
        session = engine.session()
        expected.append(session.feed(prompt))
        session.free()
    found: dict[int, list[NDArray[np.float32]]] = {index: [] for index in range(6)}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            session = engine.session()
            for _ in range(5):
                found[index].append(session.feed(prompts[index]))
                assert api.goslet_session_reset(session.handle) == OK
            session.free()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert failures == []
    for index, logits in found.items():
        assert len(logits) == 5
        assert all(np.array_equal(row, expected[index]) for row in logits)
    engine.close()


def test_a_session_in_a_call_is_busy(api: ctypes.CDLL, engine: CEngine, tmp_path: Path) -> None:
    busy, idle = engine.session(), engine.session()
    long = np.zeros(50_000, np.int64)
    statuses: set[int] = set()
    # What is called while the other thread feeds; it may be over before all of them were, so they go round.
    token = np.zeros(1, np.int64)
    handles = (c_void_p * 2)(idle.handle, busy.handle)
    calls: list[Callable[[], int]] = [
        lambda: int(api.goslet_feed(busy.handle, token.ctypes.data, 1, None)),
        lambda: int(api.goslet_step_batch(handles, token.ctypes.data, 2, None)),
        lambda: int(api.goslet_session_reset(busy.handle)),
        lambda: busy.load(tmp_path / "missing"),
        lambda: busy.save(tmp_path / "x.state"),
        lambda: api.goslet_last_status() if api.goslet_session_fork(busy.handle) is None else OK,
        lambda: api.goslet_last_status() if busy.tokens_seen == -1 else OK,
    ]
    token = np.zeros(2, np.int64)

    def feed() -> None:
        statuses.add(int(api.goslet_feed(busy.handle, long.ctypes.data, len(long), None)))

    refused: set[int] = set()
    for _ in range(20):
        thread = threading.Thread(target=feed)
        thread.start()
        while thread.is_alive() and busy.tokens_seen != -1:
            pass
        for index, call in enumerate(calls):
            if index not in refused and thread.is_alive() and call() == BUSY:
                refused.add(index)
        thread.join(120)
        if len(refused) == len(calls):
            break
    assert refused == set(range(len(calls)))
    # The idle session of the batch was not fed, and is not held any more.
    assert idle.tokens_seen == 0
    assert statuses <= {OK, BUSY}
    assert busy.tokens_seen % 50_000 == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_is_told(library_path: Path, tiny_engine: Path, threads: int) -> None:
    # In a process of its own, since pytest's has threads.
    code = f"""
import ctypes, os, struct, sys
api = ctypes.CDLL({str(library_path)!r})
api.goslet_open.restype = api.goslet_session_new.restype = ctypes.c_void_p
options = ctypes.create_string_buffer(struct.pack("@NIi", 16, {threads}, 0), 16)
engine = ctypes.c_void_p(api.goslet_open({os.fsencode(tiny_engine)!r}, options))
session = ctypes.c_void_p(api.goslet_session_new(engine))
token = (ctypes.c_int64 * 1)(7)
sessions = (ctypes.c_void_p * 1)(session)
feed = lambda: api.goslet_feed(session, token, ctypes.c_size_t(1), None)
assert feed() == 0
child = os.fork()
if child == 0:
    statuses = [feed(), api.goslet_step_batch(sessions, token, ctypes.c_size_t(1), None)]
    api.goslet_session_free(session)
    api.goslet_close(engine)
    again = ctypes.c_void_p(api.goslet_open({os.fsencode(tiny_engine)!r}, options))
    session = ctypes.c_void_p(api.goslet_session_new(again))
    statuses.append(feed())
    os._exit(42 if statuses == [{WRONG_PROCESS}, {WRONG_PROCESS}, 0] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
assert feed() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------------------- text


def test_bytes_are_their_own_tokens(api: ctypes.CDLL, engine: CEngine) -> None:
    text = bytes(range(256)) + "Gänse 🦢".encode()
    assert engine.encode(text) == list(text)
    assert engine.decode(list(text)) == text
    assert engine.encode(b"") == []
    assert engine.decode([]) == b""
    for token in (256, -1, 1 << 40):
        ids, count = np.array([token], np.int64), c_size_t()
        assert api.goslet_decode(engine.handle, ids.ctypes.data, 1, None, 0, byref(count)) == INVALID_ARGUMENT


def test_too_little_room_is_told(api: ctypes.CDLL, engine: CEngine) -> None:
    ids, count = np.full(3, -7, np.int64), c_size_t()
    assert api.goslet_encode(engine.handle, b"four", 4, ids.ctypes.data, 3, byref(count)) == BUFFER_TOO_SMALL
    assert (count.value, list(ids)) == (4, [-7, -7, -7])
    assert api.goslet_encode(engine.handle, b"four", 4, None, 0, byref(count)) == BUFFER_TOO_SMALL
    assert count.value == 4
    room = ctypes.create_string_buffer(b"~~~", 3)
    ids = np.array(list(b"four"), np.int64)
    assert api.goslet_decode(engine.handle, ids.ctypes.data, 4, room, 3, byref(count)) == BUFFER_TOO_SMALL
    assert (count.value, room.raw) == (4, b"~~~")


def rebuilt(source: Path, target: Path, **changes: Any) -> Path:
    """An engine written anew with some of `write_engine`'s arguments replaced."""
    with EngineFile.open(source) as file:
        arguments: dict[str, Any] = {
            "spec": file.spec,
            "state_spec": file.state_spec,
            "model_id": file.model_id,
            "graph": bytes(file.graph_bytes),
            "graph_info": dict(file.graph_info),
            "tensors": [
                TensorSource(e.name, e.format, e.shape, lambda name=e.name: file.weight(name), e.layout)
                for e in file.tensors.values()
            ],
            "tokenizer": None if file.tokenizer_kind is None else (file.tokenizer_kind, bytes(file.tokenizer_bytes)),
            "program": file.program_bytes,
            "provenance": {},
            "overwrite": True,
        }
        write_engine(target, **{**arguments, **changes})
    return target


@pytest.fixture(scope="module")
def world_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RWKV-7 of one layer with the World vocabulary."""
    pytest.importorskip("torch", reason="exporting needs torch")
    pytest.importorskip("pyrwkv_tokenizer", reason="the World vocabulary comes with pyrwkv-tokenizer")
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    folder = tmp_path_factory.mktemp("world")
    checkpoint = random_rwkv7(n_layer=1, n_embd=32, head_size=16, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3)
    save(checkpoint, folder / "world.pth")
    export_engine(folder / "world.pth", folder / "world.goslet", quant="int8", tokenizer="world")
    return folder / "world.goslet"


def test_world_tokens_are_those_of_python(api: ctypes.CDLL, world_engine: Path) -> None:
    engine = CEngine(api, world_engine)
    with goslet.open(world_engine, backend="ort") as python:
        tokenizer = python.tokenizer
        assert tokenizer is not None
        for text in ("Call me Ishmael.", "Gänse 🦢 \r\n\t  ", "雁の群れ", "\x00\x1b", "a" * 300):
            ids = tokenizer.encode(text)
            assert engine.encode(text.encode()) == ids
            assert engine.decode(ids) == text.encode()
        assert api.goslet_end_token(engine.handle) == tokenizer.end_token == 0
    assert engine.decode([0, 65530, 65535]) == b""
    assert engine.decode(engine.encode(b"\xff\xfe\x80")) == b"\xff\xfe\x80"
    session = engine.session()
    assert np.isfinite(session.feed([65535, 0, 1])).all()
    session.free()
    engine.close()


def test_tokenizers_that_do_not_fit_are_refused(api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    for tokenizer in (("bytes", b"x"), ("world", b""), ("world", b"GVOC" + bytes(100))):
        rebuilt(tiny_engine, path, tokenizer=tokenizer)
        assert refusal(api, path) == BAD_FILE


@pytest.mark.parametrize(("tokenizer", "message"), [(("hf", b"{}"), "of kind hf"), (None, "has no tokenizer")])
def test_other_tokenizers_are_not_offered(
    api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path, tokenizer: tuple[str, bytes] | None, message: str
) -> None:
    engine = CEngine(api, rebuilt(tiny_engine, tmp_path / "m.goslet", tokenizer=tokenizer))
    ids, count = np.zeros(1, np.int64), c_size_t()
    assert api.goslet_encode(engine.handle, b"x", 1, ids.ctypes.data, 1, byref(count)) == UNSUPPORTED
    assert message in engine.error
    assert api.goslet_decode(engine.handle, ids.ctypes.data, 1, None, 0, byref(count)) == UNSUPPORTED
    assert api.goslet_end_token(engine.handle) == -1
    engine.close()


# ----------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest engine that runs, with its tensors in the order that the attacks want, an int4 one first."""
    vocab_size, width, f32 = 256, 64, WeightFormat("f32")
    program = {
        "version": 1,
        "registers": {"x": width, "y": width},
        "input": "x",
        "steps": [
            {"op": "norm_shift", "x": "x", "norm": "norm", "eps": 1e-5, "shift": "0.shift",
             "mixes": [{"mix": "mix", "out": "y"}]},
            {"op": "logits", "x": "y", "norm": "norm", "eps": 1e-5, "weight": "head"},
        ],
    }  # fmt: skip

    def source(name: str, *shape: int, fmt: WeightFormat = f32, layout: str = "rows") -> TensorSource:
        return TensorSource(name, fmt, shape, lambda: encode(np.ones(shape, np.float32), fmt, name), layout)

    path = tmp_path_factory.mktemp("good") / "good.goslet"
    write_engine(
        path,
        spec=ModelSpec("7", 1, width, 256, 16, vocab_size, 64e-5, 1e-5, {"w": 8, "a": 8, "g": 8}),
        state_spec=StateSpec((StateTensor("0.shift", (width,), "channel"),)),
        model_id="0123456789abcdef" * 4,
        graph=b"graph",
        graph_info={"opset": 21, "format": "onnx"},
        tensors=[
            source("head", vocab_size, width, fmt=WeightFormat("int4", 32), layout="tiles"),
            *(source(name, width) for name in ("norm.weight", "norm.bias", "mix")),
            source("emb.weight", vocab_size, width),
        ],
        tokenizer=("bytes", b""),
        program=json.dumps(program).encode(),
        provenance={},
        overwrite=False,
    )
    return path.read_bytes()


def test_the_engine_that_is_attacked_is_good(api: ctypes.CDLL, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(good)
    assert refusal(api, path) == OK, api.goslet_last_error()


@pytest.mark.parametrize("name", [*CONTAINER_ATTACKS, *ENGINE_ATTACKS])
def test_attack_on_an_engine_file(api: ctypes.CDLL, good: bytes, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes({**CONTAINER_ATTACKS, **ENGINE_ATTACKS}[name].damage(good))
    status = OK
    try:
        EngineFile.open(path).close()
    except (NewerVersionError, UnknownFeatureError):
        status = UNSUPPORTED
    except ContainerError:
        status = BAD_FILE
    assert refusal(api, path) == status


def test_what_python_refuses_c_refuses(api: ctypes.CDLL, good: bytes, tmp_path: Path) -> None:
    """Headers with a few changed bytes, rightly signed: mostly still JSON, with numbers, names and types changed."""
    path = tmp_path / "m.goslet"
    header = good[PREFIX.size : PREFIX.size + header_length(good)]
    choice = random.Random(5)
    refused, opened = 0, 0
    for _ in range(600):
        changed = bytearray(header)
        for _ in range(choice.randint(1, 2)):
            changed[choice.randrange(len(changed))] = choice.choice(b'0123456789abcdefst"\\{}[]:,.-eE \xc3\xa9\x00')
        path.write_bytes(with_raw_header(good, bytes(changed)))
        status = refusal(api, path)
        assert status in (OK, BAD_FILE, UNSUPPORTED), api.goslet_last_error()
        opened += status == OK
        try:
            EngineFile.open(path).close()
        except ContainerError:
            refused += 1
            assert status != OK, bytes(changed)
    # Both verdicts are seen often enough to mean something.
    assert refused > 200
    assert opened > 5


def test_engines_without_a_program_are_refused(api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    assert refusal(api, rebuilt(tiny_engine, tmp_path / "m.goslet", program=None)) == UNSUPPORTED
    assert "has no program" in api.goslet_last_error().decode()


def test_a_program_that_does_not_fit_is_refused(api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    assert refusal(api, rebuilt(tiny_engine, tmp_path / "m.goslet", program=b"{}")) == BAD_FILE


def test_only_ordinary_files_are_opened(api: ctypes.CDLL, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/null")):
        assert refusal(api, path) == CANNOT_READ


def test_saving_keeps_links_and_permissions(engine: CEngine, tmp_path: Path) -> None:
    session = engine.session()
    real = tmp_path / "real.state"
    real.write_bytes(b"old")
    real.chmod(0o640)
    (tmp_path / "link.state").symlink_to("real.state")
    assert session.save(tmp_path / "link.state") == OK
    assert (tmp_path / "link.state").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert session.load(real) == OK


# --------------------------------------------------------------------------------------------------------- the example


def generate(example: Path, *words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(example), *[str(word) for word in words]], capture_output=True, timeout=60)


def test_the_example_writes_what_the_engine_says(example: Path, engine: CEngine, tiny_engine: Path) -> None:
    session = engine.session()
    logits = session.feed(list(b"goslet"))
    expected = []
    for _ in range(30):
        expected.append(int(np.argmax(logits)))
        logits = session.feed(expected[-1:])
    done = generate(example, tiny_engine, "goslet", 30)
    assert (done.returncode, done.stdout, done.stderr) == (0, bytes(expected), b"")
    first, same, other = (generate(example, tiny_engine, "goslet", 30, 1.5, seed).stdout for seed in (1, 1, 2))
    assert len(first) == 30
    assert first == same != other
    assert generate(example, tiny_engine, "goslet", 0).stdout == b""


def test_the_example_says_what_is_wrong(example: Path, tiny_engine: Path, tmp_path: Path) -> None:
    wrong: list[tuple[object, ...]] = [(), (tiny_engine,), (tiny_engine, ""), (tiny_engine, "a", "x"),
                                       (tiny_engine, "a", "-1"), (tiny_engine, "a", 1, "nan"),
                                       (tiny_engine, "a", 1, 1, "1x"), (tiny_engine, "a", 1, 1, 1, 1)]  # fmt: skip
    for words in wrong:
        done = generate(example, *words)
        assert done.returncode == 2
        assert done.stderr.startswith(b"usage: generate ENGINE PROMPT")
    done = generate(example, tmp_path / "missing.goslet", "a")
    assert done.returncode == 1
    assert done.stderr.decode() == f"generate: {tmp_path / 'missing.goslet'}: does not exist\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_example_notices_that_nobody_reads(example: Path, tiny_engine: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([example, tiny_engine, "a", "5"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert b"standard output" in done.stderr
