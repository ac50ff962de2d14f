"""The C interface, through ctypes and through the example: the same numbers, errors and text as in Python."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from ctypes import byref, c_double, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from programs import execute, tool

import goslet
from goslet.tokenizer import vocabulary_from_text

from .capi import (
    BAD_FILE,
    BUFFER_TOO_SMALL,
    BUSY,
    INVALID_ARGUMENT,
    OK,
    SIGNATURES,
    TOKENS,
    UNSUPPORTED,
    WRONG_PROCESS,
    CEngine,
    Options,
    assert_close,
    refusal,
)
from .rewriting import rewritten


@pytest.fixture(scope="session")
def example(repository: Path, c_library: Path) -> Path:
    program = c_library.with_name("generate")
    execute(
        tool("cc"),
        *("-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I", repository / "csrc/include"),
        *(repository / "csrc/example/generate.c", "-o", program),
        *("-L", c_library.parent, "-lgoslet", "-lm", f"-Wl,-rpath,{c_library.parent}"),
        limit_s=60,
    )
    return program


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


def test_the_version_is_the_packages(c_api: ctypes.CDLL, repository: Path) -> None:
    assert c_api.goslet_version().decode() == goslet.__version__
    assert f'#define GOSLET_VERSION "{goslet.__version__}"' in (repository / "csrc/include/goslet.h").read_text()


def test_every_function_of_the_header_is_tested_here(repository: Path) -> None:
    header = (repository / "csrc/include/goslet.h").read_text()
    declared = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if "GOSLET_API " in line}
    assert declared - {"GOSLET_API", "__attribute__"} == set(SIGNATURES)


def test_an_engine_says_what_it_is(c_api: ctypes.CDLL, c_engine: CEngine, ort_engine: goslet.Engine) -> None:
    assert c_engine.vocab_size == ort_engine.spec.vocab_size == 256
    assert c_api.goslet_state_size_bytes(c_engine.handle) == ort_engine.state_spec.size_bytes
    assert c_api.goslet_model_id(c_engine.handle).decode() == ort_engine.model_id
    assert c_api.goslet_isa(c_engine.handle)
    assert c_api.goslet_end_token(c_engine.handle) == -1


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_logits_are_those_of_python(
    c_api: ctypes.CDLL, tiny_engine: Path, ort_engine: goslet.Engine, threads: int
) -> None:
    engine = CEngine(c_api, tiny_engine, threads)
    expected = ort_engine.session().feed(TOKENS, all_logits=True)
    whole, pieces = engine.session(), engine.session()
    assert_close(whole.feed(TOKENS, all_logits=True), expected)
    assert_close(pieces.feed(TOKENS[:70]), expected[69])
    ids = np.array(TOKENS[70:71], np.int64)
    assert c_api.goslet_feed(pieces.handle, ids.ctypes.data, 1, None) == OK
    assert_close(pieces.feed(TOKENS[71:72]), expected[71])
    assert (whole.tokens_seen, pieces.tokens_seen) == (150, 72)
    for session in (whole, pieces):
        session.free()
    engine.close()


def test_a_batch_steps_every_session(c_api: ctypes.CDLL, c_engine: CEngine, ort_engine: goslet.Engine) -> None:
    sessions = [c_engine.session() for _ in range(5)]
    for index, session in enumerate(sessions):
        session.feed(TOKENS[: index + 1])
    handles = (c_void_p * 5)(*[session.handle for session in sessions])
    tokens = np.arange(5, dtype=np.int64)
    logits = np.full((5, c_engine.vocab_size), np.nan, np.float32)
    assert c_api.goslet_step_batch(handles, tokens.ctypes.data, 5, logits.ctypes.data) == OK, c_engine.error
    for index, row in enumerate(logits):
        assert_close(row, ort_engine.session().feed([*TOKENS[: index + 1], index]))
    assert c_api.goslet_step_batch(handles, tokens.ctypes.data, 5, None) == OK
    assert [session.tokens_seen for session in sessions] == [3, 4, 5, 6, 7]


def test_forks_and_resets_are_independent(c_api: ctypes.CDLL, c_engine: CEngine) -> None:
    session = c_engine.session()
    fresh = session.feed(TOKENS[:9])
    twin = session.fork()
    forked = twin.feed([1, 2])
    assert (session.tokens_seen, twin.tokens_seen) == (9, 11)
    assert np.array_equal(session.feed([1, 2]), forked)
    assert c_api.goslet_session_reset(session.handle) == OK
    assert session.tokens_seen == 0
    assert np.array_equal(session.feed(TOKENS[:9]), fresh)


def test_an_engine_lives_as_long_as_its_sessions(c_api: ctypes.CDLL, tiny_engine: Path) -> None:
    engine = CEngine(c_api, tiny_engine, threads=2)
    session = engine.session()
    expected = session.fork().feed(TOKENS)
    engine.close()
    assert np.array_equal(session.feed(TOKENS), expected)
    twin = session.fork()
    session.free()
    assert twin.tokens_seen == 150
    twin.free()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list what a process holds")
def test_nothing_is_left_when_all_is_freed(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.goslet"
    damaged.write_bytes(tiny_engine.read_bytes()[:-1])

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count(".goslet")

    before = held()
    for _ in range(5):
        engine = CEngine(c_api, tiny_engine, threads=3)
        sessions = [engine.session() for _ in range(3)]
        sessions[0].feed(TOKENS)
        assert refusal(c_api, damaged) == BAD_FILE
        engine.close()
        for session in sessions:
            session.free()
    assert held() == before


# ---------------------------------------------------------------------------------------------------------- bad calls


def test_null_is_an_error_everywhere(c_api: ctypes.CDLL, c_engine: CEngine) -> None:
    session = c_engine.session()
    tokens, logits, count = np.zeros(1, np.int64), np.zeros(256, np.float32), c_size_t()
    one = (c_void_p * 1)(session.handle)
    none = (c_void_p * 1)(None)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (c_api.goslet_open, (None, None)),
        (c_api.goslet_vocab_size, (None,)),
        (c_api.goslet_state_size_bytes, (None,)),
        (c_api.goslet_isa, (None,)),
        (c_api.goslet_model_id, (None,)),
        (c_api.goslet_end_token, (None,)),
        (c_api.goslet_session_new, (None,)),
        (c_api.goslet_session_fork, (None,)),
        (c_api.goslet_session_reset, (None,)),
        (c_api.goslet_session_tokens_seen, (None,)),
        (c_api.goslet_feed, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (c_api.goslet_feed, (session.handle, None, 1, logits.ctypes.data)),
        (c_api.goslet_feed_all, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (c_api.goslet_feed_all, (session.handle, None, 1, logits.ctypes.data)),
        (c_api.goslet_feed_all, (session.handle, tokens.ctypes.data, 1, None)),
        (c_api.goslet_step_batch, (None, tokens.ctypes.data, 1, logits.ctypes.data)),
        (c_api.goslet_step_batch, (none, tokens.ctypes.data, 1, logits.ctypes.data)),
        (c_api.goslet_step_batch, (one, None, 1, logits.ctypes.data)),
        (c_api.goslet_step_batch, (one, tokens.ctypes.data, 0, logits.ctypes.data)),
        (c_api.goslet_session_save, (None, b"x")),
        (c_api.goslet_session_save, (session.handle, None)),
        (c_api.goslet_session_load, (None, b"x")),
        (c_api.goslet_session_load, (session.handle, None)),
        (c_api.goslet_encode, (None, b"x", 1, tokens.ctypes.data, 1, byref(count))),
        (c_api.goslet_encode, (c_engine.handle, None, 1, tokens.ctypes.data, 1, byref(count))),
        (c_api.goslet_encode, (c_engine.handle, b"x", 1, None, 1, byref(count))),
        (c_api.goslet_encode, (c_engine.handle, b"x", 1, tokens.ctypes.data, 1, None)),
        (c_api.goslet_decode, (None, tokens.ctypes.data, 1, logits.ctypes.data, 1, byref(count))),
        (c_api.goslet_decode, (c_engine.handle, None, 1, logits.ctypes.data, 1, byref(count))),
        (c_api.goslet_decode, (c_engine.handle, tokens.ctypes.data, 1, None, 1, byref(count))),
        (c_api.goslet_decode, (c_engine.handle, tokens.ctypes.data, 1, logits.ctypes.data, 1, None)),
    ]
    for call, arguments in calls:
        # Another failure between, so that each call is seen to report its own.
        assert c_api.goslet_open(b"/missing", None) is None
        result = call(*arguments)
        assert result in (None, 0, -1, INVALID_ARGUMENT), call.__name__
        assert c_api.goslet_last_status() == INVALID_ARGUMENT, call.__name__
        assert call.__name__ in c_engine.error
    assert {call.__name__ for call, _ in calls} == set(SIGNATURES) - {
        "goslet_version", "goslet_last_status", "goslet_last_error", "goslet_close", "goslet_session_free",
    }  # fmt: skip
    c_api.goslet_close(None)
    c_api.goslet_session_free(None)
    assert session.tokens_seen == 0


@pytest.mark.parametrize("tokens", [[256], [-1], [1, 2, 1 << 40], [1 << 62, 0], [-(1 << 63)], []])
def test_bad_tokens_change_nothing(c_api: ctypes.CDLL, c_engine: CEngine, tokens: list[int]) -> None:
    session, other = c_engine.session(), c_engine.session()
    session.feed(TOKENS[:4])
    expected = session.fork().feed([1])
    ids = np.array([*tokens, 0], np.int64)
    logits = np.zeros((4, 256), np.float32)
    assert c_api.goslet_feed(session.handle, ids.ctypes.data, len(tokens), logits.ctypes.data) == INVALID_ARGUMENT
    assert c_api.goslet_feed_all(session.handle, ids.ctypes.data, len(tokens), logits.ctypes.data) == INVALID_ARGUMENT
    if tokens:
        handles = (c_void_p * 2)(other.handle, session.handle)
        pair = np.array([0, tokens[-1] or tokens[0]], np.int64)
        assert c_api.goslet_step_batch(handles, pair.ctypes.data, 2, logits.ctypes.data) == INVALID_ARGUMENT
    assert (session.tokens_seen, other.tokens_seen) == (4, 0)
    assert np.array_equal(session.feed([1]), expected)


def test_a_batch_is_of_different_sessions_of_one_engine(
    c_api: ctypes.CDLL, c_engine: CEngine, tiny_engine: Path
) -> None:
    second = CEngine(c_api, tiny_engine)
    own, foreign = c_engine.session(), second.session()
    tokens = np.zeros(2, np.int64)
    for pair in ((own, own), (own, foreign)):
        handles = (c_void_p * 2)(*[session.handle for session in pair])
        assert c_api.goslet_step_batch(handles, tokens.ctypes.data, 2, None) == INVALID_ARGUMENT
    assert (own.tokens_seen, foreign.tokens_seen) == (0, 0)
    foreign.free()
    second.close()


def test_options_may_grow(c_api: ctypes.CDLL, tiny_engine: Path) -> None:
    class Newer(ctypes.Structure):
        _fields_ = (*Options._fields_, ("later", c_double))

    def status(options: Any) -> int:
        handle = c_api.goslet_open(os.fsencode(tiny_engine), byref(options))
        c_api.goslet_close(handle)
        return OK if handle else int(c_api.goslet_last_status())

    size = ctypes.sizeof(Options)
    assert status(Options(size, 2, 1)) == OK
    assert status(Newer(ctypes.sizeof(Newer), 1, 0, 0.0)) == OK
    assert status(Newer(ctypes.sizeof(Newer), 1, 0, 1.0)) == UNSUPPORTED
    assert status(Options(size - 1, 1, 0)) == INVALID_ARGUMENT
    assert status(Options(0, 1, 0)) == INVALID_ARGUMENT
    assert status(Options(size, 1025, 0)) == INVALID_ARGUMENT


def test_an_unknown_instruction_set_is_refused(
    c_api: ctypes.CDLL, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSLET_ISA", "abacus")
    assert refusal(c_api, tiny_engine) == INVALID_ARGUMENT


def test_errors_are_each_threads_own(c_api: ctypes.CDLL) -> None:
    seen: list[tuple[int, bytes]] = []

    def look() -> None:
        seen.append((c_api.goslet_last_status(), c_api.goslet_last_error()))
        c_api.goslet_vocab_size(None)
        seen.append((c_api.goslet_last_status(), c_api.goslet_last_error()))

    c_api.goslet_open(b"/missing", None)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen[0] == (OK, b"")
    assert seen[1] == (INVALID_ARGUMENT, b"goslet_vocab_size: engine is NULL")
    assert c_api.goslet_last_error() == b"/missing: does not exist"
    # A message of any length is cut, not overrun.
    c_api.goslet_open(b"/" + b"x" * 100_000, None)
    assert len(c_api.goslet_last_error()) == 2047


# ------------------------------------------------------------------------------------------------- threads, processes


@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_run_in_parallel(c_api: ctypes.CDLL, tiny_engine: Path, threads: int) -> None:
    engine = CEngine(c_api, tiny_engine, threads)
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
                assert c_api.goslet_session_reset(session.handle) == OK
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


def test_a_session_in_a_call_is_busy(c_api: ctypes.CDLL, c_engine: CEngine, tmp_path: Path) -> None:
    busy, idle = c_engine.session(), c_engine.session()
    long = np.zeros(50_000, np.int64)
    statuses: set[int] = set()
    # What is called while the other thread feeds; it may be over before all of them were, so they go round.
    token = np.zeros(1, np.int64)
    handles = (c_void_p * 2)(idle.handle, busy.handle)
    calls: list[Callable[[], int]] = [
        lambda: int(c_api.goslet_feed(busy.handle, token.ctypes.data, 1, None)),
        lambda: int(c_api.goslet_step_batch(handles, token.ctypes.data, 2, None)),
        lambda: int(c_api.goslet_session_reset(busy.handle)),
        lambda: busy.load(tmp_path / "missing"),
        lambda: busy.save(tmp_path / "x.state"),
        lambda: c_api.goslet_last_status() if c_api.goslet_session_fork(busy.handle) is None else OK,
        lambda: c_api.goslet_last_status() if busy.tokens_seen == -1 else OK,
    ]
    token = np.zeros(2, np.int64)

    def feed() -> None:
        statuses.add(int(c_api.goslet_feed(busy.handle, long.ctypes.data, len(long), None)))

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
def test_a_forked_child_is_told(c_library: Path, tiny_engine: Path, threads: int) -> None:
    # In a process of its own, since pytest's has threads.
    code = f"""
import ctypes, os, struct, sys
api = ctypes.CDLL({str(c_library)!r})
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


def test_bytes_are_their_own_tokens(c_api: ctypes.CDLL, c_engine: CEngine) -> None:
    text = bytes(range(256)) + "Gänse 🦢".encode()
    assert c_engine.encode(text) == list(text)
    assert c_engine.decode(list(text)) == text
    assert c_engine.encode(b"") == []
    assert c_engine.decode([]) == b""
    for token in (256, -1, 1 << 40):
        ids, count = np.array([token], np.int64), c_size_t()
        assert c_api.goslet_decode(c_engine.handle, ids.ctypes.data, 1, None, 0, byref(count)) == INVALID_ARGUMENT


def test_too_little_room_is_told(c_api: ctypes.CDLL, c_engine: CEngine) -> None:
    ids, count = np.full(3, -7, np.int64), c_size_t()
    assert c_api.goslet_encode(c_engine.handle, b"four", 4, ids.ctypes.data, 3, byref(count)) == BUFFER_TOO_SMALL
    assert (count.value, list(ids)) == (4, [-7, -7, -7])
    assert c_api.goslet_encode(c_engine.handle, b"four", 4, None, 0, byref(count)) == BUFFER_TOO_SMALL
    assert count.value == 4
    room = ctypes.create_string_buffer(b"~~~", 3)
    ids = np.array(list(b"four"), np.int64)
    assert c_api.goslet_decode(c_engine.handle, ids.ctypes.data, 4, room, 3, byref(count)) == BUFFER_TOO_SMALL
    assert (count.value, room.raw) == (4, b"~~~")


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


def test_world_tokens_are_those_of_python(c_api: ctypes.CDLL, world_engine: Path) -> None:
    engine = CEngine(c_api, world_engine)
    with goslet.open(world_engine, backend="ort") as python:
        tokenizer = python.tokenizer
        assert tokenizer is not None
        for text in ("Call me Ishmael.", "Gänse 🦢 \r\n\t  ", "雁の群れ", "\x00\x1b", "a" * 300):
            ids = tokenizer.encode(text)
            assert engine.encode(text.encode()) == ids
            assert engine.decode(ids) == text.encode()
        assert c_api.goslet_end_token(engine.handle) == tokenizer.end_token == 0
    assert engine.decode([0, 65530, 65535]) == b""
    assert engine.decode(engine.encode(b"\xff\xfe\x80")) == b"\xff\xfe\x80"
    session = engine.session()
    assert np.isfinite(session.feed([65535, 0, 1])).all()
    session.free()
    engine.close()


def test_a_vocabulary_of_another_size_is_that_of_python(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    content = {3: b"a", 4: b"ab", 7: "é".encode(), 200: b"\n\n"}
    lines = "".join(f"{token} {word!r} {len(word)}\n" for token, word in content.items())
    tokenizer = vocabulary_from_text(lines.encode())
    path = rewritten(tiny_engine, tmp_path / "m.goslet", tokenizer=(tokenizer.kind, tokenizer.to_bytes()))
    engine = CEngine(c_api, path)
    ids = tokenizer.encode("aabé\n\n")
    assert engine.encode("aabé\n\n".encode()) == ids == [3, 4, 7, 200]
    assert engine.decode([*ids, 0, 5]) == "aabé\n\n".encode()
    room, count = np.zeros(9, np.int64), c_size_t(5)
    assert c_api.goslet_encode(engine.handle, b"aabc", 4, room.ctypes.data, 9, byref(count)) == INVALID_ARGUMENT
    assert count.value == 0 and "byte 3, is 99" in engine.error
    assert c_api.goslet_end_token(engine.handle) == tokenizer.end_token == 0
    engine.close()
    with goslet.open(path) as python:
        assert python.tokenizer is not None and python.tokenizer.encode("aab") == [3, 4]


def test_tokenizers_that_do_not_fit_are_refused(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    larger = vocabulary_from_text(b"256 'a' 1").to_bytes()
    for tokenizer in (
        ("bytes", b"x"),
        ("world", b""),
        ("world", b"GVOC" + bytes(100)),
        ("trie", b"GVOC"),
        ("trie", larger),
    ):
        rewritten(tiny_engine, path, tokenizer=tokenizer, overwrite=True)
        assert refusal(c_api, path) == BAD_FILE


@pytest.mark.parametrize(("tokenizer", "message"), [(("hf", b"{}"), "of kind hf"), (None, "has no tokenizer")])
def test_other_tokenizers_are_not_offered(
    c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path, tokenizer: tuple[str, bytes] | None, message: str
) -> None:
    engine = CEngine(c_api, rewritten(tiny_engine, tmp_path / "m.goslet", tokenizer=tokenizer))
    ids, count = np.zeros(1, np.int64), c_size_t()
    assert c_api.goslet_encode(engine.handle, b"x", 1, ids.ctypes.data, 1, byref(count)) == UNSUPPORTED
    assert message in engine.error
    assert c_api.goslet_decode(engine.handle, ids.ctypes.data, 1, None, 0, byref(count)) == UNSUPPORTED
    assert c_api.goslet_end_token(engine.handle) == -1
    engine.close()


def test_ids_beyond_the_tokenizer_have_no_bytes(c_api: ctypes.CDLL, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A model may have more rows than its tokenizer has ids."""
    torch = pytest.importorskip("torch")
    from goslet.export import export_engine

    tensors = torch.load(tiny_checkpoint)
    for name in ("emb.weight", "head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:44]])
    torch.save(tensors, tmp_path / "larger.pth")
    export_engine(tmp_path / "larger.pth", tmp_path / "m.goslet", quant="f32", tokenizer="bytes")
    engine = CEngine(c_api, tmp_path / "m.goslet")
    assert engine.vocab_size == 300
    assert engine.decode([97, 256, 299, 98]) == b"ab"
    ids, count = np.array([300], np.int64), c_size_t()
    assert c_api.goslet_decode(engine.handle, ids.ctypes.data, 1, None, 0, byref(count)) == INVALID_ARGUMENT
    assert "outside the model's vocabulary of 300" in engine.error
    engine.close()


def test_tokenizers_of_an_unknown_kind_are_refused(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "m.goslet", tokenizer=("sentence", b"x"))
    assert refusal(c_api, path) == UNSUPPORTED
    assert "unknown kind" in c_api.goslet_last_error().decode()


def test_an_engine_that_is_cut_while_it_is_open(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(tiny_engine.read_bytes())
    engine = CEngine(c_api, path)
    session = engine.session()
    session.feed([1, 2])
    os.truncate(path, 4096)
    ids, logits = np.array([3], np.int64), np.zeros(256, np.float32)
    handles = (c_void_p * 1)(session.handle)
    assert c_api.goslet_feed(session.handle, ids.ctypes.data, 1, logits.ctypes.data) == BAD_FILE
    assert "was cut short while it was open" in engine.error
    assert c_api.goslet_step_batch(handles, ids.ctypes.data, 1, logits.ctypes.data) == BAD_FILE
    assert session.tokens_seen == 2
    session.free()
    engine.close()


# --------------------------------------------------------------------------------------------------------- the example


def generate(example: Path, *words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(example), *[str(word) for word in words]], capture_output=True, timeout=60)


def test_the_example_writes_what_the_engine_says(example: Path, c_engine: CEngine, tiny_engine: Path) -> None:
    session = c_engine.session()
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
