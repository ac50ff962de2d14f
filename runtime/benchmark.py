"""How fast an engine runs here, and what share of the memory's bandwidth that is."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .sampling import SamplingOptions
from .session import Engine
from .spec import EMBEDDING

WARM_UP_STEPS = 8
MIN_STEPS = 32
MAX_STEPS = 4096
DECODE_S = 3.0
PREFILL_S = 1.0
PREFILL_RUNS = 3
MAX_PREFILL_TOKENS = 512
STREAM_BYTES = 256 << 20  # far past the caches of the machines that goslet is for
STREAM_PASSES = 8


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median over steps or runs, and the 5th and 95th percentile."""

    median: float
    p5: float
    p95: float


@dataclass(frozen=True)
class Machine:
    """Where a measurement was made: the CPU's model, its cores, and the threads that were used."""

    cpu: str
    cores: int
    threads: int


@dataclass(frozen=True)
class Benchmark:
    """What `run_benchmark` measured.

    Attributes:
        tokens_per_s: decoding one token after another, one session.
        prefill_tokens_per_s: feeding `prefill_tokens` tokens in one call.
        decode_steps: steps that `tokens_per_s` is over.
        prefill_tokens: tokens in a prefill run.
        bytes_per_token: bytes of weights and state that a step must read; of the embedding, one row.
        bandwidth_gb_s: GB/s (10^9) of reading a large buffer on as many threads, in the same run; the best of several.
        share_of_bandwidth: bytes_per_token times the median tokens_per_s over bandwidth_gb_s.
        backend: the backend's name.
        machine: where it was measured.
    """

    tokens_per_s: Rate
    prefill_tokens_per_s: Rate
    decode_steps: int
    prefill_tokens: int
    bytes_per_token: int
    bandwidth_gb_s: float
    share_of_bandwidth: float
    backend: str
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def run_benchmark(
    engine: Engine, *, threads: int | None = None, progress: Callable[[int, int, str], None] | None = None
) -> Benchmark:
    """Measure an engine: some seconds of decoding its own samples, then prefill, then the memory's bandwidth.

    Args:
        engine: an opened engine.
        threads: the threads that the engine was opened with; None means one for each core.
        progress: called with what is done, the total, and the name of the part.

    Raises:
        NonFiniteError, BackendError: the engine fails.
    """
    threads = threads or physical_cores()
    report = progress or (lambda done, total, part: None)
    step_s, tokens = _decode(engine, report)
    n_prefill = int(min(MAX_PREFILL_TOKENS, max(16, PREFILL_S / np.median(step_s))))
    prefill_s = _prefill(engine, (tokens * (1 + n_prefill // len(tokens)))[:n_prefill], report)
    bandwidth_gb_s = stream_bandwidth_gb_s(threads)
    size = bytes_per_token(engine)
    decode = _rate(1 / np.array(step_s))
    return Benchmark(
        tokens_per_s=decode,
        prefill_tokens_per_s=_rate(n_prefill / np.array(prefill_s)),
        decode_steps=len(step_s),
        prefill_tokens=n_prefill,
        bytes_per_token=size,
        bandwidth_gb_s=bandwidth_gb_s,
        share_of_bandwidth=size * decode.median / (bandwidth_gb_s * 1e9),
        backend=engine.backend_name,
        machine=Machine(cpu=cpu_model(), cores=available_cores(), threads=threads),
    )


def bytes_per_token(engine: Engine) -> int:
    """Bytes that one step must read: every weight once, one row of the embedding, and the state."""
    weights = 0
    for name in engine.file.tensors:
        weight = engine.file.weight(name)
        weights += weight.size_bytes // weight.shape[0] if name == EMBEDDING else weight.size_bytes
    return weights + engine.state_spec.size_bytes


def _decode(engine: Engine, report: Callable[[int, int, str], None]) -> tuple[list[float], list[int]]:
    """Seconds of each step, and the tokens fed: the engine's own samples, so that activations are as in use."""
    session = engine.session()
    sampler = engine.sampler(SamplingOptions(seed=0))
    logits = session.feed([0])
    step_s: list[float] = []
    tokens = []
    for step in range(-WARM_UP_STEPS, MAX_STEPS):
        tokens.append(sampler.sample(logits))
        start_s = time.perf_counter()
        logits = session.feed(tokens[-1:])
        if step >= 0:
            step_s.append(time.perf_counter() - start_s)
        spent_s = sum(step_s) if step % 16 == 0 else 0.0
        report(len(step_s), max(MIN_STEPS, len(step_s)), "decode")
        if len(step_s) >= MIN_STEPS and spent_s >= DECODE_S:
            break
    return step_s, tokens


def _prefill(engine: Engine, tokens: list[int], report: Callable[[int, int, str], None]) -> list[float]:
    seconds = []
    for run in range(PREFILL_RUNS):
        session = engine.session()
        start_s = time.perf_counter()
        session.feed(tokens)
        seconds.append(time.perf_counter() - start_s)
        report(run + 1, PREFILL_RUNS, "prefill")
    return seconds


def _rate(tokens_per_s: np.ndarray[Any, np.dtype[np.float64]]) -> Rate:
    p5, median, p95 = np.percentile(tokens_per_s, [5, 50, 95])
    return Rate(median=float(median), p5=float(p5), p95=float(p95))


def stream_bandwidth_gb_s(threads: int, size_bytes: int = STREAM_BYTES) -> float:
    """GB/s at which `threads` threads together read a buffer: the best of several passes.

    A maximum over float32 is the reading loop: numpy runs it several times faster than memory, and without the GIL.
    """
    parts = np.array_split(np.ones(size_bytes // 4, np.float32), threads)
    barrier = threading.Barrier(threads + 1)

    def read(part: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        for _ in range(STREAM_PASSES):
            barrier.wait()
            part.max()
            barrier.wait()

    workers = [threading.Thread(target=read, args=(part,), daemon=True) for part in parts]
    for worker in workers:
        worker.start()
    best_s = float("inf")
    for _ in range(STREAM_PASSES):
        barrier.wait()
        start_s = time.perf_counter()
        barrier.wait()
        best_s = min(best_s, time.perf_counter() - start_s)
    for worker in workers:
        worker.join()
    return size_bytes / best_s / 1e9


def available_cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The CPU's name, or what the machine is called where it has none (Jetson boards)."""
    names = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            names.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if "model name" in names:
        return names["model name"]
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 ")
    except OSError:
        return platform.processor() or platform.machine()
