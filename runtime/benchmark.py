"""How fast an engine runs here, and what share of the memory's bandwidth that is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.cuda_driver import CudaError, Driver, copy_bandwidth_gb_s
from .errors import BackendError
from .machine import available_cores, cpu_model, gpu
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
    """Where a measurement was made: the CPU's model, the CUDA device if steps ran there, the CPU cores at hand, and the
    threads used."""

    cpu: str
    gpu: str | None
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
        bytes_per_token: bytes of weights and state that a step must read; of the embedding, one row; of weights that
            meet zeros, those that were not skipped (`density`).
        bandwidth_gb_s: GB/s (10^9) of reading a large buffer on as many threads, in the same run; the best of several.
            Where steps run on a GPU, of a copy within its memory, reads and writes together.
        share_of_bandwidth: bytes_per_token times the median tokens_per_s over bandwidth_gb_s.
        density: share of the inputs of `ffn.value` that were not zero, whose weights alone were read; None where the
            backend skips none.
        backend: the backend's name.
        isa: the instruction set of the backend's kernels; None where it does not say.
        machine: where it was measured.
    """

    tokens_per_s: Rate
    prefill_tokens_per_s: Rate
    decode_steps: int
    prefill_tokens: int
    bytes_per_token: int
    bandwidth_gb_s: float
    share_of_bandwidth: float
    density: float | None
    backend: str
    isa: str | None
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def run_benchmark(
    engine: Engine, *, threads: int, progress: Callable[[str, int, int], None] | None = None
) -> Benchmark:
    """Measure an engine: some seconds of decoding its own samples, then prefill, then the memory's bandwidth.

    Args:
        engine: an opened engine.
        threads: the threads that the engine was opened with.
        progress: called with the stage's name, what is done and the total.

    Raises:
        NonFiniteError, BackendError: the engine fails.
        BackendError: the GPU's bandwidth cannot be measured.
    """
    report = progress or (lambda stage, done, total: None)
    step_s, tokens = _decode(engine, report)
    n_prefill = int(min(MAX_PREFILL_TOKENS, max(16, PREFILL_S / np.median(step_s))))
    prefill_s = _prefill(engine, (tokens * (1 + n_prefill // len(tokens)))[:n_prefill], report)
    on_gpu = engine.backend.device == "cuda"
    bandwidth_gb_s = _gpu_bandwidth_gb_s() if on_gpu else stream_bandwidth_gb_s(threads, STREAM_BYTES)
    device = gpu() if on_gpu else None
    density = engine.backend.density
    size = bytes_per_token(engine, density)
    decode = _rate(1 / np.array(step_s))
    return Benchmark(
        tokens_per_s=decode,
        prefill_tokens_per_s=_rate(n_prefill / np.array(prefill_s)),
        decode_steps=len(step_s),
        prefill_tokens=n_prefill,
        bytes_per_token=size,
        bandwidth_gb_s=bandwidth_gb_s,
        share_of_bandwidth=size * decode.median / (bandwidth_gb_s * 1e9),
        density=density,
        backend=engine.backend_name,
        isa=engine.backend.isa,
        machine=Machine(cpu=cpu_model(), gpu=device and device.name, cores=available_cores(), threads=threads),
    )


def bytes_per_token(engine: Engine, density: float | None = None) -> int:
    """Bytes that one step must read: every weight once, one row of the embedding, and the state.

    Args:
        engine: an opened engine.
        density: share of the inputs of weights in columns that are not zero; the weights of the others are not read,
            but all scales are counted. None where the backend reads all of them.
    """
    size_bytes = engine.state_spec.size_bytes
    for name, tensor in engine.file.tensors.items():
        stored_bytes = tensor.size_bytes + tensor.scales_size_bytes
        if name == EMBEDDING:
            size_bytes += stored_bytes // tensor.shape[0]
        elif tensor.layout == "columns" and density is not None:
            size_bytes += round(tensor.size_bytes * density) + tensor.scales_size_bytes
        else:
            size_bytes += stored_bytes
    return size_bytes


def _decode(engine: Engine, report: Callable[[str, int, int], None]) -> tuple[list[float], list[int]]:
    """Seconds of each step, and the tokens fed: the engine's own samples, so that activations are as in use."""
    session = engine.session()
    sampler = engine.sampler(SamplingOptions(seed=0))
    logits = session.feed([0])
    step_s: list[float] = []
    tokens: list[int] = []
    deadline_s = time.perf_counter() + DECODE_S
    for step in range(-WARM_UP_STEPS, MAX_STEPS):
        tokens.append(sampler.sample(logits))
        start_s = time.perf_counter()
        logits = session.feed(tokens[-1:])
        if step >= 0:
            step_s.append(time.perf_counter() - start_s)
        report("decoding", len(step_s), MAX_STEPS)
        if len(step_s) >= MIN_STEPS and time.perf_counter() > deadline_s:
            break
    return step_s, tokens


def _prefill(engine: Engine, tokens: list[int], report: Callable[[str, int, int], None]) -> list[float]:
    seconds = []
    for run in range(PREFILL_RUNS):
        session = engine.session()
        start_s = time.perf_counter()
        session.feed(tokens)
        seconds.append(time.perf_counter() - start_s)
        report("prefilling", run + 1, PREFILL_RUNS)
    return seconds


def _rate(tokens_per_s: NDArray[np.float64]) -> Rate:
    p5, median, p95 = np.percentile(tokens_per_s, [5, 50, 95])
    return Rate(median=float(median), p5=float(p5), p95=float(p95))


def _gpu_bandwidth_gb_s() -> float:
    try:
        return copy_bandwidth_gb_s(Driver(), STREAM_BYTES // 2, STREAM_PASSES)
    except CudaError as error:
        raise BackendError(
            f"the CUDA device's bandwidth cannot be measured: {error}", remedy="free some of the device's memory"
        ) from error


def stream_bandwidth_gb_s(threads: int, size_bytes: int) -> float:
    """GB/s at which `threads` threads together read a buffer: the best of several passes.

    A maximum over float32 is the reading loop: numpy runs it several times faster than memory, and without the GIL.
    """
    parts = np.array_split(np.ones(size_bytes // 4, np.float32), threads)
    together = threading.Barrier(threads)

    def read(part: NDArray[np.float32]) -> list[tuple[float, float]]:
        spans = []
        for _ in range(STREAM_PASSES):
            together.wait()
            start_s = time.perf_counter()
            part.max()
            spans.append((start_s, time.perf_counter()))
        return spans

    with ThreadPoolExecutor(threads) as pool:
        threads_spans = list(pool.map(read, parts))
    # A pass lasts from the first thread's start to the last one's end.
    passes_s: list[float] = [
        max(end for _, end in spans) - min(start for start, _ in spans) for spans in zip(*threads_spans, strict=True)
    ]
    return size_bytes / min(passes_s) / 1e9
