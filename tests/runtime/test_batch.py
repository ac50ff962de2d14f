"""One token of each of many sessions: what each would have got alone, and no session lost or waited for in a circle."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import goslet
from goslet import session as session_module
from goslet import state
from goslet.backends import native, ort
from goslet.errors import BackendError, EmptyPromptError, InputError, StateError, TokenError

from .fake_gpu import opened
from .interruptions import interrupted_at

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
pytest.importorskip("onnxruntime", reason="the ort backend needs onnxruntime")

BACKENDS = ("ort", "native")
# These, and those of a GPU on models of a driver and of TensorRT.
KINDS = (*BACKENDS, "ort-cuda", "trt")
# A thread that has not ended by then waits for ever.
DEADLOCK_S = 30


@pytest.fixture(
    scope="module", params=[(backend, quant) for backend in KINDS for quant in ("f32", "int4")], ids="-".join
)
def engine(
    request: pytest.FixtureRequest, tiny_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[goslet.Engine]:
    kind, quant = request.param
    threads = 2 if kind == "native" else 1
    with opened(kind, tiny_engines[quant], tmp_path_factory.mktemp("engine"), threads) as engine:
        yield engine


def assert_same_state(one: goslet.Session, other: goslet.Session) -> None:
    assert one.tokens_seen == other.tokens_seen
    for name, view in one.state.front.items():
        np.testing.assert_array_equal(view, other.state.front[name], name)


def begun_sessions(engine: goslet.Engine, count: int) -> list[goslet.Session]:
    """Sessions with histories of their own, of 0, 1, 2 … tokens."""
    sessions = [engine.session() for _ in range(count)]
    for index, session in enumerate(sessions):
        if index:
            session.feed([(7 * index + step) % 256 for step in range(index % 5 + 1)])
    return sessions


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_batch_gives_what_each_session_gets_alone(data: st.DataObject, engine: goslet.Engine) -> None:
    together = begun_sessions(engine, data.draw(st.integers(1, 9)))
    alone = [session.fork() for session in together]
    for _ in range(data.draw(st.integers(1, 3))):
        members = data.draw(st.permutations(range(len(together))))[: data.draw(st.integers(1, len(together)))]
        tokens = data.draw(st.lists(st.integers(0, 255), min_size=len(members), max_size=len(members)))
        logits = engine.step_batch([together[member] for member in members], tokens)
        assert logits.dtype == np.float32 and logits.shape == (len(members), 256)
        for row, member in enumerate(members):
            np.testing.assert_array_equal(logits[row], alone[member].feed([tokens[row]]))
    for one, other in zip(together, alone, strict=True):
        assert_same_state(one, other)


def test_a_batch_larger_than_one_product(engine: goslet.Engine) -> None:
    together = [engine.session() for _ in range(130)]
    tokens = np.arange(130, dtype=np.uint16)
    logits = engine.step_batch(together, tokens)
    again = engine.step_batch(tuple(together), tokens[::-1])
    for row in (0, 1, 63, 64, 127, 128, 129):
        alone = engine.session()
        np.testing.assert_array_equal(logits[row], alone.feed([row]))
        np.testing.assert_array_equal(again[row], alone.feed([129 - row]))
        assert_same_state(together[row], alone)


@pytest.mark.parametrize(
    ("n_sessions", "tokens", "kind", "words"),
    [
        (0, [], EmptyPromptError, "no token"),
        (0, [1], InputError, r"sessions.*1 to 256.*found 0"),
        (257, [1] * 257, InputError, r"sessions.*1 to 256.*found 257"),
        (2, [1], InputError, r"tokens.*expected 2, found 1"),
        (2, [1, 2, 3], InputError, r"tokens.*expected 2, found 3"),
        (3, [1, 256, 2], TokenError, r"tokens\[1\]"),
        (2, [1, 1.5], TokenError, "tokens"),
        (2, [[1, 2]], TokenError, "tokens"),
    ],
)
def test_arguments_that_cannot_be_used(
    n_sessions: int, tokens: list, kind: type[Exception], words: str, engine: goslet.Engine
) -> None:
    sessions = [engine.session() for _ in range(n_sessions)]
    with pytest.raises(kind, match=words):
        engine.step_batch(sessions, tokens)
    assert not any(session.tokens_seen for session in sessions)


def test_sessions_that_cannot_be_stepped_together(engine: goslet.Engine, tiny_engine: Path) -> None:
    one, other = engine.session(), engine.session()
    with goslet.open(tiny_engine, backend="ort", threads=1) as another:
        for stranger in (another.session(), another, None):
            with pytest.raises(InputError, match=r"sessions\[1\]: is no session of this engine"):
                engine.step_batch([one, stranger], [1, 2])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"sessions\[2\]: is given twice.*sessions\[0\]"):
        engine.step_batch([one, other, one], [1, 2, 3])
    assert one.tokens_seen == other.tokens_seen == 0


def test_a_closed_engine_steps_nobody(tiny_engine: Path) -> None:
    for backend in BACKENDS:
        with goslet.open(tiny_engine, backend=backend, threads=1) as engine:
            session = engine.session()
        with pytest.raises(InputError, match="closed"):
            engine.step_batch([session], [1])
        assert session.tokens_seen == 0


def test_a_step_that_fails_moves_no_session_of_its_batch(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with goslet.open(tiny_engine, backend="ort", threads=1) as engine:
        sessions = begun_sessions(engine, 3)
        before = [session.fork() for session in sessions]
        expected = engine.step_batch([session.fork() for session in sessions], [4, 5, 6])

        def fail(token: np.ndarray, place: str) -> np.ndarray:
            raise BackendError("failed", place=place)

        with monkeypatch.context() as patch:
            patch.setattr(sessions[2]._stepper, "step", fail)
            with pytest.raises(BackendError, match="session 2 of this batch"):
                engine.step_batch(sessions, [4, 5, 6])
        for session, kept in zip(sessions, before, strict=True):
            assert_same_state(session, kept)
        np.testing.assert_array_equal(engine.step_batch(sessions, [4, 5, 6]), expected)


@pytest.mark.parametrize("module", [ort, native])
def test_ctrl_c_anywhere_in_a_batch_leaves_whole_states(module: ModuleType, tiny_engine: Path) -> None:
    with goslet.open(tiny_engine, backend=module.__name__.split(".")[-1], threads=1) as engine:
        begun = begun_sessions(engine, 3)
        tokens = [4, 250, 17]
        moved = [session.fork() for session in begun]
        for session, token in zip(moved, tokens, strict=True):
            session.feed([token])
        place = 0
        while True:
            sessions = [session.fork() for session in begun]
            interrupted = interrupted_at(place, partial(engine.step_batch, sessions, tokens), module, state)
            for session, first, last in zip(sessions, begun, moved, strict=True):
                assert_same_state(session, last if session.tokens_seen > first.tokens_seen else first)
            engine.step_batch(sessions, tokens)  # no lock is left taken
            if not interrupted:
                break
            place += 1
        assert place > 3


class SlowLock:
    """A session's lock after whose taking the thread stands still, so that the others take theirs meanwhile."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> bool:
        self.lock.acquire()
        time.sleep(0.02)
        return True

    def __exit__(self, *exception: object) -> None:
        self.lock.release()


def test_overlapping_batches_in_any_order_do_not_wait_in_a_circle(engine: goslet.Engine) -> None:
    sessions = [engine.session() for _ in range(3)]
    for session in sessions:
        session._lock = SlowLock()  # type: ignore[assignment]
    orders = [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0)]

    def work(order: tuple[int, ...]) -> None:
        for _ in range(3):
            engine.step_batch([sessions[index] for index in order], [1] * len(order))
            sessions[order[0]].feed([1])

    workers = [threading.Thread(target=work, args=(order,), daemon=True) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(DEADLOCK_S)
    assert not any(worker.is_alive() for worker in workers)
    # Three rounds: a batch feeds each of its sessions one token, and its first session is fed one more.
    fed = [
        3 * (sum(order.count(index) for order in orders) + sum(order[0] == index for order in orders))
        for index in (0, 1, 2)
    ]
    for session, count in zip(sessions, fed, strict=True):
        alone = engine.session()
        alone.feed([1] * count)
        assert_same_state(session, alone)


def test_a_batch_waits_for_a_feed_of_one_of_its_sessions(engine: goslet.Engine) -> None:
    first, second = engine.session(), engine.session()
    stepper = second._stepper
    begun, go_on = threading.Event(), threading.Event()

    class SlowStepper:
        def feed(self, tokens: np.ndarray, logits: np.ndarray) -> None:
            begun.set()
            assert go_on.wait(DEADLOCK_S)
            stepper.feed(tokens, logits)

    second._stepper = SlowStepper()  # type: ignore[assignment]
    feeder = threading.Thread(target=second.feed, args=([7, 8],))
    feeder.start()
    assert begun.wait(DEADLOCK_S)
    second._stepper = stepper
    batch = threading.Thread(target=engine.step_batch, args=([first, second], [1, 2]))
    batch.start()
    # Without the lock it would end now; with it, however long this waits, it does not.
    batch.join(0.3)
    assert first.tokens_seen == 0
    go_on.set()
    feeder.join()
    batch.join()
    alone = engine.session()
    alone.feed([7, 8, 2])
    assert_same_state(second, alone)


def test_a_call_from_a_signal_handler_within_a_batch_is_refused(
    engine: goslet.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, outside = begun_sessions(engine, 2), engine.session()
    alone = [session.fork() for session in sessions]
    calls: list[Callable[[], object]] = [
        outside.reset,
        lambda: engine.step_batch([outside], [1]),
        lambda: sessions[0].feed([1]),
        sessions[1].fork,
        lambda: engine.step_batch(sessions, [1, 2]),
    ]
    refused = 0

    def handle(number: int, frame: object) -> None:
        nonlocal refused
        for call in calls:
            with pytest.raises(StateError, match="busy with another call on this thread"):
                call()
            refused += 1

    real = engine.backend.step_batch

    def signalled(*arguments: object) -> None:
        signal.raise_signal(signal.SIGUSR1)
        real(*arguments)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine.backend, "step_batch", signalled)
            engine.step_batch(sessions, [3, 4])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused == len(calls)
    engine.step_batch(sessions, [5, 6])  # and afterwards it works again
    for session, kept, tokens in zip(sessions, alone, ([3, 5], [4, 6]), strict=True):
        kept.feed(tokens)
        assert_same_state(session, kept)


def test_the_largest_batch_fits_the_stack(engine: goslet.Engine) -> None:
    """Each lock takes a frame, of which Python allows a thousand; a caller needs some too."""
    n_sessions = session_module.MAX_BATCH
    logits = engine.step_batch([engine.session() for _ in range(n_sessions)], [9] * n_sessions)
    expected = engine.session().feed([9])
    assert all(np.array_equal(row, expected) for row in logits)
