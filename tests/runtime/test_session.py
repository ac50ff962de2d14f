"""Engines and sessions: the same state however a prompt is fed, exact forks and files, and errors that lose nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import goslet
from goslet.errors import (
    BackendError,
    BackendUnavailableError,
    ContainerError,
    EmptyPromptError,
    InputError,
    StateMismatchError,
    TokenError,
    TokenizerError,
)

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
pytest.importorskip("onnxruntime", reason="the ort backend needs onnxruntime")

# One token is one call of the same kernels however the prompt is cut, so the results are in fact equal.
LIMIT = 1e-5


@pytest.fixture(scope="module", params=["f32", "int4"])
def engine(request: pytest.FixtureRequest, tiny_engines: dict[str, Path]) -> Iterator[goslet.Engine]:
    with goslet.open(tiny_engines[request.param], threads=1) as opened:
        yield opened


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
        return {view.ctypes.data for side in (session.state.front, session.state.back) for view in side.values()}

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


def test_a_state_moves_between_quantizations(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    with goslet.open(tiny_engines["f32"]) as exact, goslet.open(tiny_engines["int4"]) as small:
        assert exact.model_id == small.model_id
        session = exact.session()
        session.feed([1, 2, 3])
        session.save(tmp_path / "talk.state")
        other = small.session()
        other.load(tmp_path / "talk.state")
        assert_same_state(session, other)


def test_reset_is_exact(engine: goslet.Engine) -> None:
    session = engine.session()
    expected = session.feed([5, 6, 7])
    session.reset()
    assert session.tokens_seen == 0
    assert all((view == 0).all() for view in session.state.front.values())
    np.testing.assert_array_equal(session.feed([5, 6, 7]), expected)


def test_state_of_another_model_is_refused_and_nothing_is_lost(engine: goslet.Engine, tmp_path: Path) -> None:
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    same_shape = random_rwkv7(
        n_layer=2, n_embd=64, head_size=16, vocab_size=256, rank_w=8, rank_a=12, rank_v=16, rank_g=24, seed=12
    )
    save(same_shape, tmp_path / "other.pth")
    export_engine(tmp_path / "other.pth", tmp_path / "other.goslet", quant="f32")
    session = engine.session()
    session.feed([1, 2, 3])
    before = states(session)
    with goslet.open(tmp_path / "other.goslet") as other:
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "native"}, "does not exist yet"),
        ({"backend": "trt"}, "does not exist yet"),
        ({"device": "cuda"}, "cuda"),
        ({"backend": "ort", "device": "cuda"}, "cuda"),
    ],
)
def test_backend_or_device_that_is_not_there_yet(arguments: dict, words: str, tiny_engine: Path) -> None:
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


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """A copy of an engine file with some of `write_engine`'s arguments replaced: well formed, and wrong."""
    from goslet.enginefile import EngineFile, TensorSource, write_engine

    with EngineFile.open(source) as file:
        arguments = {
            "spec": file.spec,
            "state_spec": file.state_spec,
            "model_id": file.model_id,
            "graph": bytes(file.graph_bytes),
            "graph_info": {"format": "onnx", "opset": 21},
            "tensors": [
                TensorSource(name, entry.format, entry.shape, lambda name=name: file.weight(name))
                for name, entry in file.tensors.items()
                if name != changes.get("without")
            ],
            "tokenizer": None,
            "program": None,
            "provenance": {},
            "overwrite": False,
        }
        changes.pop("without", None)
        write_engine(target, **{**arguments, **changes})
    return target


def test_a_graph_that_is_no_graph(tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=b"this is no graph")
    with pytest.raises(BackendError, match=r"x\.goslet.*graph"):
        goslet.open(path)


def test_a_header_that_tells_another_state_than_the_graph(tiny_engine: Path, tmp_path: Path) -> None:
    with goslet.open(tiny_engine) as engine:
        first, *rest = engine.state_spec.tensors
        lying = replace(engine.state_spec, tensors=(replace(first, shape=(8,)), *rest))
    path = rewritten(tiny_engine, tmp_path / "x.goslet", state_spec=lying)
    with pytest.raises(BackendError, match=r"0\.att_shift.*\[8\].*\[64\]"):
        goslet.open(path)


@pytest.mark.parametrize("name", ["emb.weight", "blocks.1.att.w1"])
def test_an_engine_that_lacks_a_weight(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_engine, tmp_path / "x.goslet", without=name)
    with pytest.raises(BackendError, match=name):
        goslet.open(path)
