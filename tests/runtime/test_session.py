"""Engines and sessions: the same state however a prompt is fed, exact forks and files, and errors that lose nothing.

What every backend must do is tested on every backend.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import goslet
from goslet import state
from goslet.backends import native, ort, ort_cuda, trt
from goslet.errors import (
    BackendError,
    BackendUnavailableError,
    ContainerError,
    EmptyPromptError,
    InputError,
    StateError,
    StateMismatchError,
    TokenError,
    TokenizerError,
)

from .fake_gpu import opened
from .interruptions import interrupted_at
from .rewriting import rewritten

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
pytest.importorskip("onnxruntime", reason="the ort backend needs onnxruntime")

BACKENDS = ("ort", "native")
# These, and those of a GPU on models of a driver and of TensorRT.
KINDS = (*BACKENDS, "ort-cuda", "trt")
# However the prompt is cut, ort makes one call of the same kernels for each token, and a row of native's products is
# summed in the same order whatever rows are beside it: the results are equal.
LIMIT = 0.0


@pytest.fixture(
    scope="module", params=[(backend, quant) for backend in KINDS for quant in ("f32", "int4")], ids="-".join
)
def engine(
    request: pytest.FixtureRequest, tiny_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[goslet.Engine]:
    kind, quant = request.param
    with opened(kind, tiny_engines[quant], tmp_path_factory.mktemp("engine")) as engine:
        yield engine


def states(session: goslet.Session) -> dict[str, np.ndarray]:
    return {name: view.copy() for name, view in session.state.front.items()}


def assert_same_state(one: goslet.Session, other: goslet.Session, limit: float = 0.0) -> None:
    assert one.tokens_seen == other.tokens_seen
    for name, view in one.state.front.items():
        assert np.abs(view - other.state.front[name]).max() <= limit, name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_give_the_same_logits_and_states(data: st.DataObject, engine: goslet.Engine) -> None:
    tokens = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=40))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=6)) | {len(tokens)})
    whole, pieces, single = engine.session(), engine.session(), engine.session()
    expected = whole.feed(tokens, all_logits=True)
    start = 0
    for cut in cuts:
        if cut > start:
            last = pieces.feed(tokens[start:cut])
            np.testing.assert_allclose(last, expected[cut - 1], rtol=0, atol=LIMIT)
        start = cut
    for index, token in enumerate(tokens):
        np.testing.assert_allclose(single.feed([token]), expected[index], rtol=0, atol=LIMIT)
    assert_same_state(whole, pieces, LIMIT)
    assert_same_state(whole, single, LIMIT)


def test_logits_shapes_and_ownership(engine: goslet.Engine) -> None:
    session = engine.session()
    first = session.feed([1, 2, 3])
    kept = first.copy()
    every = session.feed(np.array([4, 5], np.uint16), all_logits=True)
    assert first.shape == (256,) and first.dtype == np.float32
    assert every.shape == (2, 256) and every.dtype == np.float32
    np.testing.assert_array_equal(first, kept)
    assert session.tokens_seen == 5


def test_state_buffers_keep_their_addresses(engine: goslet.Engine) -> None:
    session = engine.session()

    def addresses() -> set[int]:
        sides = [session.state.front, *([session.state.back] if session.state.double_buffered else [])]
        return {view.ctypes.data for side in sides for view in side.values()}

    before = addresses()
    session.feed([1, 2, 3])
    session.reset()
    session.feed([4])
    assert addresses() == before
    assert all(address % 64 == 0 for address in before)


def test_fork_is_exact_and_independent(engine: goslet.Engine) -> None:
    session = engine.session()
    for prefix in ([7], [8, 9]):  # an odd and an even number of swaps
        session.feed(prefix)
        twin = session.fork()
        assert_same_state(session, twin)
        np.testing.assert_array_equal(session.feed([10, 11]), twin.feed([10, 11]))
        assert_same_state(session, twin)
        twin.feed([12])
        untouched = states(session)
        twin.feed([13])
        for name, view in session.state.front.items():
            np.testing.assert_array_equal(view, untouched[name])


def test_save_and_load_are_exact(engine: goslet.Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.feed([1, 2, 3])
    session.save(tmp_path / "talk.state")
    expected = session.feed([4, 5])
    other = engine.session()
    other.feed([99])
    other.load(tmp_path / "talk.state")
    assert other.tokens_seen == 3
    np.testing.assert_array_equal(other.feed([4, 5]), expected)
    session.load(tmp_path / "talk.state")
    np.testing.assert_array_equal(session.feed([4, 5]), expected)


@pytest.mark.parametrize(("backend", "other_backend"), list(itertools.product(BACKENDS, BACKENDS)))
def test_a_state_moves_between_quantizations_and_backends(
    backend: str, other_backend: str, tiny_engines: dict[str, Path], tmp_path: Path
) -> None:
    with (
        goslet.open(tiny_engines["f32"], backend=backend, threads=1) as exact,
        goslet.open(tiny_engines["int4"], backend=other_backend, threads=1) as small,
    ):
        assert exact.model_id == small.model_id
        session = exact.session()
        session.feed([1, 2, 3])
        session.save(tmp_path / "talk.state")
        other = small.session()
        other.load(tmp_path / "talk.state")
        assert_same_state(session, other)
        twin = small.session()
        twin.load(tmp_path / "talk.state")
        np.testing.assert_array_equal(other.feed([4, 5]), twin.feed([4, 5]))
        assert other.tokens_seen == 5


def test_reset_is_exact(engine: goslet.Engine) -> None:
    session = engine.session()
    expected = session.feed([5, 6, 7])
    session.reset()
    assert session.tokens_seen == 0
    assert all((view == 0).all() for view in session.state.front.values())
    np.testing.assert_array_equal(session.feed([5, 6, 7]), expected)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of another model with the same shapes."""
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    folder = tmp_path_factory.mktemp("other")
    same_shape = random_rwkv7(
        n_layer=2, n_embd=64, head_size=16, vocab_size=256, rank_w=8, rank_a=12, rank_v=16, rank_g=24, seed=12
    )
    save(same_shape, folder / "other.pth")
    export_engine(folder / "other.pth", folder / "other.goslet", quant="f32")
    return folder / "other.goslet"


def test_state_of_another_model_is_refused_and_nothing_is_lost(
    engine: goslet.Engine, other_model: Path, tmp_path: Path
) -> None:
    session = engine.session()
    session.feed([1, 2, 3])
    before = states(session)
    with goslet.open(other_model) as other:
        stranger = other.session()
        stranger.feed([1])
        stranger.save(tmp_path / "other.state")
    with pytest.raises(StateMismatchError, match=r"other\.state"):
        session.load(tmp_path / "other.state")
    content = bytearray((tmp_path / "other.state").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.state").write_bytes(content)
    with pytest.raises(ContainerError, match=r"damaged\.state"):
        session.load(tmp_path / "damaged.state")
    assert session.tokens_seen == 3
    for name, view in session.state.front.items():
        np.testing.assert_array_equal(view, before[name])


@pytest.mark.parametrize("tokens", [[256], [3, -1], [1 << 40], [1 << 70], np.array([300], np.uint16)])
def test_token_out_of_range(tokens: object, engine: goslet.Engine) -> None:
    session = engine.session()
    with pytest.raises(TokenError):
        session.feed(tokens)  # type: ignore[arg-type]
    assert session.tokens_seen == 0


def test_the_first_wrong_token_is_named(engine: goslet.Engine) -> None:
    with pytest.raises(TokenError, match=r"tokens\[2\].*0 to 255.*999"):
        engine.session().feed([1, 2, 999, -5])


@pytest.mark.parametrize("tokens", [[1.5], [True], ["a"], [[1, 2]], 7, None, [1, [2]]])
def test_tokens_that_are_not_integers(tokens: object, engine: goslet.Engine) -> None:
    with pytest.raises(TokenError):
        engine.session().feed(tokens)  # type: ignore[arg-type]


def test_empty_prompts(engine: goslet.Engine) -> None:
    with pytest.raises(EmptyPromptError):
        engine.session().feed([])
    with pytest.raises(EmptyPromptError):
        engine.generate("")
    with pytest.raises(EmptyPromptError):
        engine.generate_tokens([])


def test_one_session_in_many_threads_is_fed_one_call_at_a_time(engine: goslet.Engine) -> None:
    session = engine.session()
    workers = [threading.Thread(target=lambda: [session.feed([1]) for _ in range(20)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    alone = engine.session()
    alone.feed([1] * 80)
    assert_same_state(session, alone)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("ort", ort), ("native", native), ("ort-cuda", ort_cuda), ("trt", trt)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ctrl_c_anywhere_in_a_feed_leaves_the_state_of_what_was_counted(
    kind: str, module: ModuleType, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the frames below Session's, whose lock is taken and given back by native code, where no signal is heard."""
    monkeypatch.setattr(native, "PIECE_TOKENS", 1)
    tokens = [4, 250, 17]
    with opened(kind, tiny_engine, tmp_path) as engine:
        begun = engine.session()
        begun.feed([1, 2])
        expected = [begun.fork() for _ in range(len(tokens) + 1)]
        for count, session in enumerate(expected):
            if count:
                last = session.feed(tokens[:count])
        met = set()
        place = 0
        while True:
            session = begun.fork()
            interrupted = interrupted_at(place, partial(session.feed, tokens), module, state)
            fed = session.tokens_seen - begun.tokens_seen
            met.add(fed)
            assert_same_state(session, expected[fed])
            assert_same_state(session.fork(), expected[fed])
            if not interrupted:
                break
            if fed < len(tokens):
                np.testing.assert_array_equal(session.feed(tokens[fed:]), last)
            assert_same_state(session, expected[-1])
            place += 1
        assert met == {0, 1, 2, 3}


class SlowStepper:
    """Stands still in the middle of a feed until it is told to go on."""

    def __init__(self, order: list[str]) -> None:
        self.order = order
        self.begun, self.go_on = threading.Event(), threading.Event()

    def feed(self, tokens: np.ndarray, logits: np.ndarray) -> None:
        self.begun.set()
        assert self.go_on.wait(60)
        self.order.append("feed")


@pytest.mark.parametrize(("method", "of_state"), [("fork", "clone"), ("reset",) * 2, ("save",) * 2, ("load",) * 2])
def test_other_calls_wait_for_a_feed(
    method: str, of_state: str, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with goslet.open(tiny_engine, threads=1) as engine:
        session = engine.session()
        order: list[str] = []
        stepper = SlowStepper(order)
        monkeypatch.setattr(session, "_stepper", stepper)
        twin = session.state.clone()
        monkeypatch.setattr(session.state, of_state, lambda *path: order.append(method) or twin)
        feeder = threading.Thread(target=session.feed, args=([1],))
        feeder.start()
        assert stepper.begun.wait(60)
        arguments = ("x.state",) if method in ("save", "load") else ()
        other = threading.Thread(target=getattr(session, method), args=arguments)
        other.start()
        # Without the lock it would end now; with it, however long this waits, it does not.
        other.join(0.3)
        stepper.go_on.set()
        feeder.join()
        other.join()
        assert order == ["feed", method]


def test_a_call_from_a_signal_handler_within_a_call_is_refused(engine: goslet.Engine, tmp_path: Path) -> None:
    session, other, alone = engine.session(), engine.session(), engine.session()
    calls: dict[str, Callable[[], object]] = {
        "feed of another": lambda: other.feed([1]),
        "step_batch": lambda: engine.step_batch([other], [1]),
        "feed": lambda: session.feed([1]),
        "fork": session.fork,
        "reset": session.reset,
        "save": lambda: session.save(tmp_path / "x.state"),
        "load": lambda: session.load(tmp_path / "x.state"),
    }
    refused = []

    def handle(number: int, frame: object) -> None:
        for name, call in calls.items():
            with pytest.raises(StateError, match="busy with another call on this thread"):
                call()
            refused.append(name)
        assert session.tokens_seen == 0  # the properties answer

    class SignallingStepper:
        def feed(self, tokens: np.ndarray, logits: np.ndarray) -> None:
            signal.raise_signal(signal.SIGUSR1)
            stepper.feed(tokens, logits)

    stepper, session._stepper = session._stepper, SignallingStepper()  # type: ignore[assignment]
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        np.testing.assert_array_equal(session.feed([7, 8]), alone.feed([7, 8]))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused == list(calls)
    assert_same_state(session, alone)
    session.save(tmp_path / "x.state")  # and afterwards it works again


FORKED = """
import os, signal, sys, threading
import goslet
options = {"backend": sys.argv[3], "threads": int(sys.argv[4])}
engine = goslet.open(sys.argv[1], **options)
session = engine.session()
begun, go_on = threading.Event(), threading.Event()

class SlowStepper:
    def feed(self, tokens, logits):
        begun.set()
        go_on.wait()

session._stepper = SlowStepper()
feeder = threading.Thread(target=session.feed, args=([1],))
feeder.start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang is a failure, not a wait for ever
    path = sys.argv[2]
    calls = [lambda: session.feed([1]), session.fork, session.reset, lambda: session.save(path),
             lambda: session.load(path), engine.session, lambda: engine.generate("a"),
             lambda: engine.step_batch([session], [1])]
    refused = 0
    for call in calls:
        try:
            call()
        except goslet.GosletError as error:
            refused += "open it again after os.fork()" in str(error)
    with goslet.open(sys.argv[1], **options) as again:
        again.session().feed([1, 2])
    os._exit(0 if refused == len(calls) else 1)
status = os.waitpid(child, 0)[1]
go_on.set()
feeder.join()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
@pytest.mark.parametrize(("backend", "threads"), [("ort", "1"), ("native", "1"), ("native", "3")])
def test_a_child_process_is_told_to_open_the_engine_again(
    backend: str, threads: str, tiny_engine: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, tiny_engine, tmp_path / "x.state"]
    done = subprocess.run([*words, backend, threads], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == []


def test_sessions_in_parallel_threads_do_not_mix(engine: goslet.Engine) -> None:
    prompts = [[seed * 7 % 256, seed, 255 - seed] * 8 for seed in range(4)]
    expected = [engine.session().feed(prompt) for prompt in prompts]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        session = engine.session()
        for token in prompts[index]:
            found[index] = session.feed([token])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, logits in enumerate(expected):
        np.testing.assert_array_equal(found[index], logits)


def test_generation_is_reproducible_and_continues_a_session(engine: goslet.Engine) -> None:
    options = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.9, "seed": 5}
    one = "".join(engine.generate("Once", **options))
    assert one == "".join(engine.generate("Once", **options))
    assert one != "".join(engine.generate("Once", **{**options, "seed": 6}))
    session = engine.session()
    tokens = list(engine.generate_tokens(list(b"Once"), max_tokens=5, session=session))
    assert session.tokens_seen == 4 + len(tokens)
    replayed = engine.session()
    replayed.feed(list(b"Once") + tokens)
    assert_same_state(session, replayed)


def test_greedy_generation_takes_the_likeliest_token(engine: goslet.Engine) -> None:
    tokens = list(engine.generate_tokens([65, 66], max_tokens=8, options=goslet.SamplingOptions(temperature=0)))
    session = engine.session()
    logits = session.feed([65, 66])
    for token in tokens:
        assert token == int(np.argmax(logits))
        logits = session.feed([token])


def test_generation_refuses_bad_arguments_at_once(engine: goslet.Engine) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        engine.generate("a", max_tokens=-1)
    with pytest.raises(InputError, match="colour"):
        engine.generate("a", colour=3)
    with pytest.raises(InputError, match="temperature"):
        engine.generate("a", temperature=-1)
    with pytest.raises(InputError, match="options"):
        engine.generate("a", options=goslet.SamplingOptions(), seed=1)


def test_stop_text_is_never_given(engine: goslet.Engine) -> None:
    text = "".join(engine.generate("Once", max_tokens=60, temperature=0.7, seed=2))
    stop = text[20:22]
    cut = "".join(engine.generate("Once", max_tokens=60, temperature=0.7, seed=2, stop=(stop,)))
    assert cut == text[: text.index(stop)]


def test_an_engine_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    save(
        random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=77, rank_w=4, rank_a=4, rank_g=4),
        tmp_path / "x.pth",
    )
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet")
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert engine.tokenizer is None
        with pytest.raises(TokenizerError, match="token ids only"):
            engine.generate("Once")
        assert len(list(engine.generate_tokens([1], max_tokens=3))) == 3


def test_rows_without_text_are_never_sampled(tmp_path: Path) -> None:
    """A vocabulary padded past its tokenizer's: 300 rows, 256 bytes; the padding is made the likeliest by far."""
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    tensors = random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=300, rank_w=4, rank_a=4, rank_g=4)
    tensors["head.weight"][256:] *= 50
    save(tensors, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", tokenizer="bytes", quant="f32")
    with goslet.open(tmp_path / "x.goslet") as engine:
        for temperature in (0.0, 1.0):
            options = goslet.SamplingOptions(temperature=temperature, seed=1, logit_bias={280: 9.0})
            tokens = list(engine.generate_tokens([1], max_tokens=30, options=options))
            assert len(tokens) == 30
            assert max(tokens) < 256


def byte_level_file(n_letters: int = 256, **ids: int) -> bytes:
    """A tokenizer.json of that many bytes as the first ids, and these tokens, of which those in <||> are special."""
    tokenizers = pytest.importorskip("tokenizers", reason="a tokenizer.json needs the package tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:n_letters]
    package = tokenizers.Tokenizer(tokenizers.models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    package.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    package.decoder = tokenizers.decoders.ByteLevel()
    content = json.loads(package.to_str())
    content["model"]["vocab"].update(ids)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": token, "content": name, "special": True, **flags} for name, token in ids.items() if name[:2] == "<|"
    ]
    return json.dumps(content).encode()


def test_holes_and_special_tokens_are_never_sampled_but_the_end_is(tiny_engine: Path, tmp_path: Path) -> None:
    vocabulary = byte_level_file(200, **{"ab": 203, "<|endoftext|>": 240, "<|padding|>": 250})
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=("hf", vocabulary))
    with goslet.open(path) as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        assert (tokenizer.vocab_size, tokenizer.end_token) == (251, 240)
        with_text = {*range(200), 203}
        assert tokenizer.textless_tokens() == set(range(251)) - with_text - {240}
        sampler = engine.sampler(goslet.SamplingOptions(seed=1, logit_bias={250: 99.0, 255: 99.0}))
        logits = np.full(256, 50, np.float32)
        logits[[*with_text, 240]] = 0
        # 4000 draws of 202 equally likely ids miss one of them with a chance of 5e-7, and the seed is fixed.
        assert {sampler.sample(logits) for _ in range(4000)} == {*with_text, 240}


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_at_once(tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=("hf", byte_level_file(zz=(1 << 24) - 1)))
    with pytest.raises(TokenizerError, match=r"x\.goslet.*larger than the model's.*at most 256 ids, found 16777216"):
        goslet.open(path)


@pytest.mark.parametrize("tokenizer", [("hf", b"{}"), ("world", b"x"), ("bytes", b"x"), ("other", b"")])
def test_a_bad_tokenizer_names_the_engine_file(tokenizer: tuple, tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"x\.goslet"):
        goslet.open(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "trt"}, "no CUDA driver.*backend native"),
        ({"backend": "trt", "device": "cpu"}, "trt backend does not run on it.*native or ort"),
        ({"device": "cuda"}, "native backend does not run on it.*ort or trt"),
        ({"backend": "native", "device": "cuda"}, "native backend does not run on it"),
        ({"backend": "ort", "device": "cuda"}, "no CUDA provider.*onnxruntime-gpu"),
    ],
)
@pytest.mark.usefixtures("without_cuda")
def test_backend_or_device_that_is_not_there(arguments: dict, words: str, tiny_engine: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=words):
        goslet.open(tiny_engine, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"backend": "tensorflow"}, {"device": "tpu"}, {"threads": 0}, {"threads": True}, {"threads": 1.5}]
)
def test_backend_arguments_that_make_no_sense(arguments: dict, tiny_engine: Path) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        goslet.open(tiny_engine, **arguments)


def test_a_closed_engine_says_so(tiny_engine: Path) -> None:
    engine = goslet.open(tiny_engine)
    session = engine.session()
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.session()
    with pytest.raises(InputError, match="closed"):
        session.feed([1])


def test_sessions_of_a_closed_engine_keep_their_states(tiny_engine: Path, tmp_path: Path) -> None:
    with goslet.open(tiny_engine) as engine:
        session = engine.session()
        session.feed([1, 2, 3])
    session.save(tmp_path / "x.state")
    twin = session.fork()
    session.reset()
    assert session.tokens_seen == 0
    session.load(tmp_path / "x.state")
    assert_same_state(session, twin)
    for closed in (session, twin):
        with pytest.raises(InputError, match="closed"):
            closed.feed([1])
        assert closed.tokens_seen == 3


@pytest.mark.parametrize(("backend", "part"), [("ort", "graph"), ("native", "program")])
def test_a_part_that_is_none(backend: str, part: str, tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", **{part: b"this is none"})
    with pytest.raises(BackendError, match=rf"x\.goslet.*{part}"):
        goslet.open(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_header_that_tells_another_state(backend: str, tiny_engine: Path, tmp_path: Path) -> None:
    with goslet.open(tiny_engine) as engine:
        first, *rest = engine.state_spec.tensors
        lying = replace(engine.state_spec, tensors=(replace(first, shape=(8,)), *rest))
    path = rewritten(tiny_engine, tmp_path / "x.goslet", state_spec=lying)
    with pytest.raises(BackendError, match=r"0\.att_shift.*\b8\b"):
        goslet.open(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["emb.weight", "blocks.1.att.w1"])
def test_an_engine_that_lacks_a_weight(name: str, backend: str, tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", without=name)
    with pytest.raises(BackendError, match=name):
        goslet.open(path, backend=backend)
