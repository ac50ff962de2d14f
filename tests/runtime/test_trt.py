"""The TensorRT backend on models of a CUDA driver and of TensorRT (`fake_gpu`). On a device it was not run.

What every backend must do is in test_session.py and test_batch.py, which run on it too.
"""

from __future__ import annotations

import gc
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet import benchmark, planfile, trt_plugin
from goslet.backends import Rounding, cuda_driver
from goslet.enginefile import EngineFile
from goslet.errors import BackendError, BackendUnavailableError, ContainerError, DependencyError, GosletError
from goslet.state import MAX_TOKENS_SEEN

from . import fake_gpu
from .fake_gpu import ILLEGAL_ADDRESS, OUT_OF_MEMORY, FakeCuda, FakeTensorRT, plan_key, write_fake_plan

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
pytest.importorskip("onnx", reason="lowering a graph needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the model of TensorRT computes with onnxruntime")

TOKENS = [3, 200, 17, 17, 0]


@pytest.fixture
def path(tiny_engines: dict[str, Path], tmp_path: Path) -> Path:
    """An int4 engine in a folder of its own."""
    return Path(shutil.copy(tiny_engines["int4"], tmp_path / "tiny.goslet"))


@pytest.fixture
def machine() -> Iterator[tuple[FakeCuda, FakeTensorRT]]:
    with fake_gpu.fake_gpu() as made:
        yield made


@pytest.fixture
def engine(path: Path, machine: tuple[FakeCuda, FakeTensorRT]) -> Iterator[goslet.Engine]:
    _, machine[1].in_place = write_fake_plan(path)
    with goslet.open(path, backend="trt") as opened:
        yield opened


def states(session: goslet.Session) -> dict[str, np.ndarray]:
    return {name: view.copy() for name, view in session.state.front.items()}


def test_a_session_computes_what_the_plan_does(engine: goslet.Engine, path: Path) -> None:
    """Token by token from the very first: the run in which TensorRT sets itself up leaves nothing behind."""
    with planfile.PlanFile(planfile.plan_path(path, "local")) as plan:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        direct = onnxruntime.InferenceSession(bytes(plan.plan), options, providers=["CPUExecutionProvider"])
    session = engine.session()
    state = {
        f"state_in.{tensor.name}": np.zeros((1, *tensor.shape), np.float32) for tensor in engine.state_spec.tensors
    }
    embedding = goslet.weights.decode(engine.file.weight("emb.weight"))
    names = [value.name for value in direct.get_outputs()]
    for token in TOKENS:
        results = dict(zip(names, direct.run(names, {"x": embedding[token][None], **state}), strict=True))
        np.testing.assert_array_equal(session.feed([token]), results["logits"][0])
        state = {name.replace("_out.", "_in."): value for name, value in results.items() if name != "logits"}
    for name, view in session.state.front.items():
        np.testing.assert_array_equal(view, state[f"state_in.{name}"][0])


def test_a_token_is_one_graph_and_nothing_else(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    cuda, _ = machine
    session = engine.session()
    session.feed(TOKENS)
    del cuda.calls[:]
    session.feed([1, 2])
    assert session.tokens_seen == len(TOKENS) + 2
    token = ["cuCtxSetCurrent", "cuStreamSynchronize", "cuGraphLaunch", "cuStreamSynchronize"]
    assert cuda.calls == [*token, *token, "cuCtxSetCurrent", "cuStreamSynchronize"]
    del cuda.calls[:]
    _ = session.state.front, session.state.front
    assert cuda.calls.count("cuMemcpyDtoHAsync_v2") == 1, "the state comes down once, whoever reads it again"


def test_what_is_written_into_the_state_is_what_the_next_step_reads(engine: goslet.Engine) -> None:
    session, other = engine.session(), engine.session()
    session.feed(TOKENS)
    other.feed([9])
    for name, view in session.state.front.items():
        other.state.front[name][...] = view
    np.testing.assert_array_equal(session.feed([5]), other.feed([5]))


def test_a_view_taken_before_a_step_stays_what_it_was(engine: goslet.Engine) -> None:
    session = engine.session()
    session.feed([1])
    view = session.state.front["0.wkv"]
    before = view.copy()
    session.feed([2])
    np.testing.assert_array_equal(view, before)
    assert not np.array_equal(session.state.front["0.wkv"], before)


def test_sessions_run_on_threads_that_never_saw_the_device(engine: goslet.Engine) -> None:
    session = engine.session()
    expected = engine.session().feed(TOKENS)
    found = []
    thread = threading.Thread(target=lambda: found.append((session.feed(TOKENS), session.tokens_seen)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0][0], expected)
    assert found[0][1] == len(TOKENS)


def test_the_state_may_be_read_while_another_thread_feeds(engine: goslet.Engine) -> None:
    session = engine.session()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            _ = session.state.front, session.tokens_seen

    reader = threading.Thread(target=read)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader.start()
    try:
        for _ in range(20):
            session.feed(TOKENS)
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval_s)
    alone = engine.session()
    alone.feed(TOKENS * 20)
    assert session.tokens_seen == alone.tokens_seen
    for name, view in alone.state.front.items():
        np.testing.assert_array_equal(session.state.front[name], view)


def test_memory_goes_with_its_session(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    cuda, _ = machine
    gc.disable()
    try:
        sessions = [engine.session() for _ in range(3)]
        for session in sessions:
            session.feed([1])
        assert len(cuda.memory) == 15
        del session
        sessions.pop()
        assert len(cuda.memory) == 10
        state = sessions.pop().state  # it may be read for as long as someone holds it
        assert np.isfinite(state.front["0.wkv"]).all() and state.tokens_seen == 1
        del state
        sessions.pop()
        assert not cuda.memory and not cuda.streams and not cuda.graphs
    finally:
        gc.enable()


@pytest.mark.parametrize("quant", ["f16", "int8", "int4"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_verify_explains_a_plans_precision(
    version: str, quant: str, tmp_path: Path, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save

    from goslet.export import export_engine
    from goslet.export.verify import verify_engine

    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "vocab_size": 256, "seed": 5}
    tensors = {
        "4": lambda: random_rwkv4(**shape),
        "5.2": lambda: random_rwkv5("5.2", **shape, head_size=16),
        "6": lambda: random_rwkv6(**shape, head_size=16, rank_mix=8, rank_decay=8),
        "7": lambda: random_rwkv7(**shape, head_size=16, rank_w=8, rank_a=8, rank_v=8, rank_g=8),
    }[version]()
    save(tensors, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant=quant)
    _, machine[1].in_place = write_fake_plan(tmp_path / "x.goslet")
    report = verify_engine(tmp_path / "x.goslet", tmp_path / "x.pth", backend="trt", n_tokens=24)
    assert report.backend == "trt" and report.passed, report.checks
    # The limits mean something: products in f16 are far from those of float32.
    assert max(check.limit for check in report.checks if check.name.startswith("trt")) < 0.1


def test_bench_compares_with_the_memory_of_the_gpu(engine: goslet.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DECODE_S": 0.0,
        "PREFILL_S": 0.0,
        "STREAM_BYTES": 1 << 20,
        "gpu": lambda: fake_gpu.GPU,
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "stream_bandwidth_gb_s", None)  # the CPU's memory has no part in it
    found = benchmark.run_benchmark(engine, threads=1)
    assert found.machine.gpu == fake_gpu.GPU.name
    assert found.share_of_bandwidth == pytest.approx(
        found.bytes_per_token * found.tokens_per_s.median / (found.bandwidth_gb_s * 1e9)
    )


def test_bandwidth_counts_reads_and_writes_of_every_copy(
    machine: tuple[FakeCuda, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only copies move on: a kilobyte a microsecond, and the first pass, which warms up, is slow."""
    cuda, _ = machine
    now_s = 0.0
    copy = cuda._copy

    def slow_copy(kinds: tuple[str, str], target: Any, source: Any, size: Any, stream: Any) -> None:
        def wait() -> None:
            nonlocal now_s
            now_s += size.value * (1e-9 if cuda.calls.count("cuStreamSynchronize") > 1 else 1e-6)

        copy(kinds, target, source, size, stream)
        cuda.queue(stream.value, wait)

    monkeypatch.setattr(cuda, "_copy", slow_copy)
    monkeypatch.setattr(cuda_driver, "time", types.SimpleNamespace(perf_counter=lambda: now_s))
    assert cuda_driver.copy_bandwidth_gb_s(cuda_driver.Driver(), 1000, 3) == pytest.approx(2.0)
    assert not cuda.memory and not cuda.streams


# --------------------------------------------------------------------------------------------------------- what is lost


def test_a_step_that_the_driver_refuses_leaves_the_state(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    cuda, _ = machine
    session, other = engine.session(), engine.session()
    other.feed(TOKENS[:2])
    cuda.fail["cuGraphLaunch"] = (2, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=r"token 2 of this feed.*OUT_OF_MEMORY.*whole, after 2 tokens"):
        session.feed(TOKENS)
    assert session.tokens_seen == 2
    for name, view in other.state.front.items():
        np.testing.assert_array_equal(session.state.front[name], view)
    np.testing.assert_array_equal(session.feed(TOKENS[2:]), other.feed(TOKENS[2:]))


def test_a_device_that_dies_leaves_the_state_that_was_last_read(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT], tmp_path: Path
) -> None:
    cuda, _ = machine
    session = engine.session()
    session.feed(TOKENS[:3])
    expected = states(session)
    cuda.fail["cuGraphLaunch"] = (1, ILLEGAL_ADDRESS)
    with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS.*back at token 3.*new process"):
        session.feed(TOKENS)
    assert session.tokens_seen == 3
    for name, view in session.state.front.items():
        np.testing.assert_array_equal(view, expected[name])
    session.save(tmp_path / "kept.state")
    with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS"):
        session.feed([1])
    assert session.tokens_seen == 3


@pytest.mark.parametrize("read", [lambda session: session.state.front, lambda session: session.fork()])
def test_a_device_that_dies_before_its_state_is_read(
    read: Callable[[goslet.Session], object], engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    session = engine.session()
    session.feed(TOKENS)
    machine[0].dead = ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match="back at token 0"):
        read(session)
    assert session.tokens_seen == 0
    assert all(np.array_equal(view, np.zeros_like(view)) for view in session.state.front.values())


def test_a_call_that_fails_once_loses_nothing(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    cuda, _ = machine
    session, other = engine.session(), engine.session()
    other.feed(TOKENS)
    session.feed(TOKENS)
    cuda.fail["cuStreamSynchronize"] = (0, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=r"token count: .*OUT_OF_MEMORY.*whole, after 5 tokens"):
        _ = session.tokens_seen
    cuda.fail["cuMemcpyDtoHAsync_v2"] = (0, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=r"the state: .*OUT_OF_MEMORY.*whole, after 5 tokens"):
        _ = session.state.front
    assert session.tokens_seen == len(TOKENS)
    np.testing.assert_array_equal(session.feed([7]), other.feed([7]))
    machine[0].dead = ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS.*back at token 0"):
        _ = session.tokens_seen
    assert session.tokens_seen == 0


def test_a_batch_that_fails_moves_nobody_whose_state_was_read_meanwhile(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    cuda, _ = machine
    sessions = [engine.session() for _ in range(2)]
    for session in sessions:
        session.feed(TOKENS[:2])
    before = states(sessions[0])

    def read_it_before_the_next() -> None:
        cuda.before["cuGraphLaunch"] = lambda: sessions[0].state.front

    cuda.before["cuGraphLaunch"] = read_it_before_the_next
    cuda.fail["cuGraphLaunch"] = (1, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        engine.step_batch(sessions, [3, 4])
    assert [session.tokens_seen for session in sessions] == [2, 2]
    for name, view in sessions[0].state.front.items():
        np.testing.assert_array_equal(view, before[name])


def test_a_batch_begins_with_the_state_that_a_session_has_on_the_host(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT], tmp_path: Path
) -> None:
    """Fresh, loaded or reset: a failing batch goes back to that, and a good one goes on from it."""
    cuda, _ = machine
    fresh, loaded, reset, last = (engine.session() for _ in range(4))
    for session in (loaded, reset, last):
        session.feed(TOKENS)
    loaded.save(tmp_path / "x.state")
    loaded.feed([9, 9])
    loaded.load(tmp_path / "x.state")
    reset.reset()
    sessions = [fresh, loaded, reset, last]
    before = [states(session) for session in sessions]
    cuda.fail["cuGraphLaunch"] = (3, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        engine.step_batch(sessions, [1, 2, 3, 4])
    assert [session.tokens_seen for session in sessions] == [0, len(TOKENS), 0, len(TOKENS)]
    for session, expected in zip(sessions, before, strict=True):
        for name, view in session.state.front.items():
            np.testing.assert_array_equal(view, expected[name])
    alone = engine.session()
    alone.load(tmp_path / "x.state")
    np.testing.assert_array_equal(engine.step_batch(sessions, [1, 2, 3, 4])[1], alone.feed([2]))


def test_a_batch_whose_taking_back_fails_says_where_a_session_is(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    cuda, _ = machine
    sessions = [engine.session() for _ in range(2)]
    for session in sessions:
        session.feed(TOKENS[:2])
    _ = sessions[0].state.front, sessions[1].state.front

    def fail_to_copy() -> None:
        cuda.fail["cuMemcpyDtoDAsync_v2"] = (0, OUT_OF_MEMORY)

    def before_the_second() -> None:
        cuda.before["cuGraphLaunch"] = fail_to_copy

    cuda.before["cuGraphLaunch"] = before_the_second
    cuda.fail["cuGraphLaunch"] = (1, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=r"back at token 2"):
        engine.step_batch(sessions, [3, 4])
    assert [session.tokens_seen for session in sessions] == [2, 2]


def test_garbage_is_not_collected_within_a_capture(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    """Memory of the device that is freed then, by a circle that nobody holds, would end the capture."""
    cuda, tensorrt = machine

    class Circle:
        def __init__(self) -> None:
            self.memory = cuda_driver.DeviceMemory(engine.backend._driver, 256)  # type: ignore[attr-defined]
            self.own = self

    Circle()
    queue = cuda._cuMemcpyHtoDAsync_v2
    threshold = gc.get_threshold()

    def collecting(*arguments: Any) -> None:
        if cuda.capturing:
            gc.set_threshold(1)
            _ = [[] for _ in range(100)]  # as many objects start a collection, if any is started
        queue(*arguments)

    tensorrt.cuda._cuMemcpyHtoDAsync_v2 = collecting  # type: ignore[method-assign]
    try:
        engine.session()
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled() and not cuda.broken_captures


def test_a_step_whose_end_is_not_seen_has_run(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    cuda, _ = machine
    session = engine.session()
    session.feed(TOKENS[:2])

    def fail_to_wait() -> None:
        cuda.fail["cuStreamSynchronize"] = (0, OUT_OF_MEMORY)

    cuda.before["cuGraphLaunch"] = fail_to_wait
    with pytest.raises(BackendError, match=r"OUT_OF_MEMORY.*whole, after 3 tokens"):
        session.feed([7])
    other = engine.session()
    other.feed([*TOKENS[:2], 7])
    assert session.tokens_seen == 3
    np.testing.assert_array_equal(session.feed([9]), other.feed([9]))


def test_captures_of_two_threads_do_not_collect_in_each_other(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    cuda, _ = machine
    queue, collects = cuda._cuMemcpyHtoDAsync_v2, []

    def watched(*arguments: Any) -> None:
        if arguments[-1].value in cuda.capturing:
            time.sleep(0.01)
            collects.append(gc.isenabled())
        queue(*arguments)

    cuda._cuMemcpyHtoDAsync_v2 = watched  # type: ignore[method-assign]
    threads = [threading.Thread(target=engine.session) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(collects) >= 8 and not any(collects) and gc.isenabled()


def test_a_batch_that_fails_moves_nobody(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    sessions = [engine.session() for _ in range(3)]
    for index, session in enumerate(sessions):
        session.feed(TOKENS[: index + 1])
    before = [states(session) for session in sessions]
    machine[0].fail["cuGraphLaunch"] = (2, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        engine.step_batch(sessions, [1, 2, 3])
    for index, (session, expected) in enumerate(zip(sessions, before, strict=True)):
        assert session.tokens_seen == index + 1
        for name, view in session.state.front.items():
            np.testing.assert_array_equal(view, expected[name])
    alone = engine.session()
    alone.feed(TOKENS[:1])
    np.testing.assert_array_equal(engine.step_batch(sessions, [1, 2, 3])[0], alone.feed([1]))


@pytest.mark.parametrize(
    "function", ["cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamBeginCapture_v2", "cuStreamEndCapture"]
)
def test_a_session_that_does_not_fit_is_one_error(
    function: str, engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    cuda, _ = machine
    before = len(cuda.memory)
    cuda.fail[function] = (0, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=r"OUT_OF_MEMORY.*fewer sessions"):
        engine.session()
    gc.collect()
    assert len(cuda.memory) == before
    assert engine.session().feed([1]).shape == (256,)


def test_a_plan_that_does_not_run(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    machine[1].refuses_to_run = True
    with pytest.raises(BackendError, match=r"refuses to run.*no kernel image.*goslet plan ENGINE"):
        engine.session()
    machine[1].refuses_to_run, machine[1].refuses_contexts = False, True
    with pytest.raises(BackendError, match=r"context.*fewer sessions"):
        engine.session()


# ------------------------------------------------------------------------------------------------------ what is refused

OTHERS: dict[str, tuple[dict[str, Any], type[GosletError], str]] = {
    "another model": ({"model_id": "0" * 64}, BackendUnavailableError, "another model"),
    "another quantization": ({"weights_sha256": "0" * 64}, BackendUnavailableError, "another engine of this model"),
    "another TensorRT": ({"tensorrt_version": "10.16.1"}, BackendUnavailableError, "expected 10.3.0, found 10.16.1"),
    "another GPU": ({"device": "Thor"}, BackendUnavailableError, "another GPU.*found Thor"),
    "another kind of GPU": ({"capability": "11.0"}, BackendUnavailableError, "another kind of GPU"),
    "a batch": ({"batch": 4}, BackendUnavailableError, "another batch.*expected 1, found 4"),
    "another runtime": ({"runtime": "tensorrt_none"}, DependencyError, "tensorrt_none, which is not installed"),
    "a precision that nobody knows": ({"precision": "f8"}, ContainerError, "precision"),
    "plugins that are not there": (
        {"plugin_version": 1},
        BackendUnavailableError,
        "libgoslet_trt.so.*tools/build_cuda",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_of_something_else(
    name: str, path: Path, machine: tuple[FakeCuda, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOSLET_TRT_PLUGIN", raising=False)
    changed, error, words = OTHERS[name]
    write_fake_plan(path, **changed)
    with pytest.raises(error, match=words) as caught:
        goslet.open(path, backend="trt")
    assert "\n" not in str(caught.value)


def test_a_plan_that_fits_is_taken_where_another_does_not(path: Path, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    local, machine[1].in_place = write_fake_plan(path, device="", capability="")
    rtx = local.rename(planfile.plan_path(path, "rtx"))
    write_fake_plan(path, device="Thor")
    with goslet.open(path, backend="trt") as engine:
        assert engine.session().feed(TOKENS).shape == (256,)
    local.write_bytes(local.read_bytes()[:-1])
    with goslet.open(path, backend="trt") as engine:
        assert engine.session().feed(TOKENS).shape == (256,)
    write_fake_plan(path, plugin_version=1)  # whose library is not there
    with goslet.open(path, backend="trt") as engine:
        assert engine.session().feed(TOKENS).shape == (256,)
    rtx.unlink()
    write_fake_plan(path, capability="11.0")[0].rename(rtx)
    write_fake_plan(path, device="Thor")
    with pytest.raises(BackendUnavailableError, match=r"local\.plan: the plan is of another GPU.*found Thor"):
        goslet.open(path, backend="trt")


def test_of_two_plans_that_fit_the_one_for_this_gpu_is_taken(
    path: Path, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    rtx, machine[1].in_place = write_fake_plan(path, device="", capability="", precision="f16")
    rtx.rename(planfile.plan_path(path, "rtx"))
    write_fake_plan(path, precision="bf16")
    with goslet.open(path, backend="trt") as engine:
        assert engine.backend.activation_rounding(engine.file.weight("head.weight").format) == Rounding(8)


@pytest.mark.parametrize("name", ["logits", "x", "state_in.0.wkv", "state_out.1.att_shift"])
def test_a_plan_with_other_types_is_refused(
    name: str, path: Path, machine: tuple[FakeCuda, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, machine[1].in_place = write_fake_plan(path)
    dtype = fake_gpu._FakeEngine.get_tensor_dtype
    monkeypatch.setattr(
        fake_gpu._FakeEngine,
        "get_tensor_dtype",
        lambda self, asked: "DataType.HALF" if asked == name else dtype(self, asked),
    )
    with pytest.raises(BackendError, match=rf"{name}: .*inputs and outputs.*FLOAT, found.*HALF"):
        goslet.open(path, backend="trt")


def test_sizes_that_are_no_multiples_of_an_alignment(tmp_path: Path, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    """A state whose vectors have 192 bytes and its matrices 3072, where addresses are multiples of 256."""
    from random_checkpoint import random_rwkv7, save

    from goslet.export import export_engine

    save(
        random_rwkv7(n_layer=2, n_embd=48, head_size=16, vocab_size=100, rank_w=8, rank_a=8, rank_v=8, rank_g=8),
        tmp_path / "x.pth",
    )
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f16")
    _, machine[1].in_place = write_fake_plan(tmp_path / "x.goslet")
    with goslet.open(tmp_path / "x.goslet", backend="trt") as engine, goslet.open(tmp_path / "x.goslet") as native:
        found, expected = engine.session().feed(TOKENS[2:]), native.session().feed(TOKENS[2:])
    assert np.abs(found - expected).max() < 1e-2 * np.ptp(expected)


def test_the_token_count_stays_at_its_largest(engine: goslet.Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.state._counts[0][0] = MAX_TOKENS_SEEN - 1
    assert session.tokens_seen == MAX_TOKENS_SEEN - 1
    session.feed([1, 2, 3])
    assert session.tokens_seen == MAX_TOKENS_SEEN
    session.save(tmp_path / "x.state")


def test_a_plan_for_any_gpu_runs_on_this_one(path: Path, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    local, machine[1].in_place = write_fake_plan(path, device="", capability="")
    local.rename(planfile.plan_path(path, "rtx"))
    with goslet.open(path, backend="trt", device="cuda") as engine:
        assert engine.backend_name == "trt"
        assert engine.session().feed(TOKENS).shape == (256,)


def test_plans_that_are_damaged(path: Path, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    plan, _ = write_fake_plan(path)
    whole, model = plan.read_bytes(), _model(path)
    for damaged in (whole[:-1], whole[:100] + b"?" + whole[101:], b"", b"GOSLPLAN", whole[:-50] + bytes(50)):
        plan.write_bytes(damaged)
        with pytest.raises(ContainerError, match=r"tiny\.local\.plan"):
            goslet.open(path, backend="trt")
    with EngineFile.open(path) as file:
        planfile.write_plan(plan, plan_key(file), [], b"garbled", overwrite=True)
        with pytest.raises(BackendError, match=r"magicTag does not match.*goslet plan ENGINE"):
            goslet.open(path, backend="trt")
        planfile.write_plan(plan, plan_key(file), ["9.wkv"], model, overwrite=True)
        with pytest.raises(BackendError, match=r"9\.wkv"):
            goslet.open(path, backend="trt")


def test_a_plan_with_other_inputs(path: Path, tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    """Whatever its key says, what it takes and gives is held to the engine."""
    from goslet.export.trt_graph import lower

    with fake_gpu.fake_gpu(), EngineFile.open(path) as file:
        model = lower(file, batch=2, plugins=False).whole().SerializeToString()
        planfile.write_plan(planfile.plan_path(path, "local"), plan_key(file), [], model, overwrite=True)
        with pytest.raises(BackendError, match=r"x: .*not those of the engine.*\(1, 64\).*\(2, 64\)"):
            goslet.open(path, backend="trt")


def _model(path: Path) -> bytes:
    with planfile.PlanFile(planfile.plan_path(path, "local")) as plan:
        return bytes(plan.plan)


def test_a_plugin_library_is_found_checked_and_loaded(
    path: Path, machine: tuple[FakeCuda, FakeTensorRT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensorrt = machine
    _, tensorrt.in_place = write_fake_plan(path, plugin_version=1)
    library = tmp_path / "libgoslet_trt.so"
    library.write_text("no library")
    with pytest.raises(BackendUnavailableError, match=r"libgoslet_trt\.so: cannot be loaded as a plugin library"):
        goslet.open(path, backend="trt")
    monkeypatch.setattr(trt_plugin, "plugin_version", lambda found: 2 if found == library else 1)
    # A library and a plan that are of different versions: which of the two is old, the one of another goslet.
    with pytest.raises(
        BackendUnavailableError, match=r"libgoslet_trt\.so: is a plugin library of another version.*1.*2"
    ):
        goslet.open(path, backend="trt")
    named = tmp_path / "elsewhere.so"
    monkeypatch.setenv("GOSLET_TRT_PLUGIN", str(named))
    with pytest.raises(BackendUnavailableError, match=r"GOSLET_TRT_PLUGIN: .*no file .*elsewhere\.so"):
        goslet.open(path, backend="trt")
    named.write_text("another")
    write_fake_plan(path, plugin_version=7)
    with pytest.raises(
        BackendUnavailableError, match=r"another version of the plugins.*expected 1, found 7.*goslet plan"
    ):
        goslet.open(path, backend="trt")
    write_fake_plan(path, plugin_version=1)
    with goslet.open(path, backend="trt") as engine:
        assert engine.session().feed(TOKENS).shape == (256,)
    tensorrt.loads_plugins = False
    with pytest.raises(BackendUnavailableError, match=r"elsewhere\.so: is no plugin library.*no plugins in it"):
        goslet.open(path, backend="trt")


def test_machines_that_lack_something(
    path: Path, machine: tuple[FakeCuda, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, _ = machine
    with pytest.raises(BackendUnavailableError, match=r"no TensorRT plan.*goslet plan /\S+/tiny.goslet --target local"):
        goslet.open(path, backend="trt")
    write_fake_plan(path)
    monkeypatch.setattr(machine[1], "Runtime", lambda logger: logger.log(fake_gpu.Named("ERROR"), "error: 35") or 1 / 0)
    with pytest.raises(BackendUnavailableError, match=r"does not start.*error: 35"):
        goslet.open(path, backend="trt")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "tensorrt")
        with pytest.raises(DependencyError, match="python3-libnvinfer"):
            goslet.open(path, backend="trt")
    cuda.fail["cuInit"] = (0, 3)
    with pytest.raises(BackendUnavailableError, match="CUDA_ERROR_NOT_INITIALIZED"):
        goslet.open(path, backend="trt")
    monkeypatch.delattr(type(cuda), "_cuDevicePrimaryCtxRetain")
    with pytest.raises(BackendUnavailableError, match="driver is too old: it has no cuDevicePrimaryCtxRetain"):
        goslet.open(path, backend="trt")

    def no_library() -> object:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_driver, "open_library", no_library)
    with pytest.raises(BackendUnavailableError, match=r"no CUDA driver.*backend native"):
        goslet.open(path, backend="trt")


def test_a_machine_without_any_of_it(path: Path) -> None:
    """As this one really is: TensorRT or the driver is missing, and that is said in one line."""
    write_fake_plan(path)
    with pytest.raises((DependencyError, BackendUnavailableError)) as caught:
        goslet.open(path, backend="trt")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- what falls between two calls of the driver


def _interrupt() -> None:
    raise KeyboardInterrupt


def _interrupted_after_launch(session: goslet.Session, cuda: FakeCuda, token: int) -> None:
    """Feed a token whose step is on the stream, and not yet run, when Ctrl-C falls."""

    def before_launch() -> None:
        cuda.before["cuStreamSynchronize"] = _interrupt

    cuda.before["cuGraphLaunch"] = before_launch
    with pytest.raises(KeyboardInterrupt):
        session.feed([token])
    assert not cuda.before


def test_a_step_that_was_not_waited_for_is_whole(engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]) -> None:
    """The next step must not write where it still reads, nor the next state where it still writes."""
    session, alone = engine.session(), engine.session()
    session.feed([5])
    _interrupted_after_launch(session, machine[0], 6)
    assert session.tokens_seen == 2
    np.testing.assert_array_equal(session.feed([7]), alone.feed([5, 6, 7]))
    _interrupted_after_launch(session, machine[0], 8)
    np.testing.assert_array_equal(session.feed([9]), alone.feed([8, 9]))
    _interrupted_after_launch(session, machine[0], 8)
    session.reset()
    alone.reset()
    np.testing.assert_array_equal(session.feed([1]), alone.feed([1]))
    assert session.tokens_seen == 1


def test_a_state_that_is_read_just_before_a_launch_is_fetched_again(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    """As another thread may read it; the step that follows must not be forgotten."""
    session, alone = engine.session(), engine.session()
    session.feed([5])
    machine[0].before["cuGraphLaunch"] = lambda: session.state.front
    session.feed([6])
    alone.feed([5, 6])
    for name, view in alone.state.front.items():
        np.testing.assert_array_equal(session.state.front[name], view)
    np.testing.assert_array_equal(session.feed([7]), alone.feed([7]))


def test_a_step_after_a_fetch_and_before_its_end_is_fetched_again(
    engine: goslet.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, alone = engine.session(), engine.session()
    session.feed([5])
    stepper = session._stepper
    fetch = stepper.fetch  # type: ignore[attr-defined]

    def fetch_then_step(*arguments: Any) -> None:
        fetch(*arguments)
        monkeypatch.setattr(stepper, "fetch", fetch)
        thread = threading.Thread(target=session.feed, args=([6],))
        thread.start()
        thread.join()

    monkeypatch.setattr(stepper, "fetch", fetch_then_step)
    _ = session.state.front
    alone.feed([5, 6])
    for name, view in alone.state.front.items():
        np.testing.assert_array_equal(session.state.front[name], view)


def test_a_fetch_that_fails_half_way_changes_nothing(engine: goslet.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    session.feed([5])
    expected = states(session)
    session.feed([6])
    stepper = session._stepper

    def half(tensors: Any, count: Any) -> None:
        tensors["0.wkv"][...] = 9.0
        raise BackendError("the device failed")

    monkeypatch.setattr(stepper, "fetch", half)
    with pytest.raises(BackendError):
        _ = session.state.front
    stepper.steps_fetched = stepper.steps  # type: ignore[attr-defined]
    for name, view in session.state.front.items():
        np.testing.assert_array_equal(view, expected[name])


@pytest.mark.parametrize("change", ["reset", "load"])
def test_a_slow_reader_does_not_undo_a_change(
    change: str, engine: goslet.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that has fetched the state and stands still while another one gives the session a new one."""
    session = engine.session()
    session.feed([9])
    session.save(tmp_path / "one.state")
    session.feed([5, 6])
    stepper = session._stepper
    fetch = stepper.fetch  # type: ignore[attr-defined]
    fetched, go_on = threading.Event(), threading.Event()

    def slow_fetch(*arguments: Any) -> None:
        fetch(*arguments)
        fetched.set()
        go_on.wait(0.5)

    monkeypatch.setattr(stepper, "fetch", slow_fetch)
    reader = threading.Thread(target=lambda: session.state.front)
    reader.start()
    assert fetched.wait(30)
    if change == "reset":
        session.reset()
    else:
        session.load(tmp_path / "one.state")
    go_on.set()
    reader.join()
    assert session.tokens_seen == (0 if change == "reset" else 1)
    fresh = engine.session()
    if change == "load":
        fresh.feed([9])
    np.testing.assert_array_equal(session.feed([3]), fresh.feed([3]))


def test_a_batch_copies_states_on_the_device_alone(
    engine: goslet.Engine, machine: tuple[FakeCuda, FakeTensorRT]
) -> None:
    sessions = [engine.session() for _ in range(3)]
    engine.step_batch(sessions, [1, 2, 3])
    del machine[0].calls[:]
    engine.step_batch(sessions, [4, 5, 6])
    calls = machine[0].calls
    assert calls.count("cuGraphLaunch") == calls.count("cuMemcpyDtoDAsync_v2") == 3
    assert not {"cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemAlloc_v2"} & set(calls)
