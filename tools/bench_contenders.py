"""What tools/bench_cpu.py measures: each contender in a process of its own, which works when it is asked to.

A worker holds its model between slices of work and sleeps; the time of a slice is taken where the work is done, so
that the pipe's is not counted.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

WARM_UP_STEPS = 4  # threads wake and caches fill again after other contenders' slices
PREFILL_TOKENS = 512
STEPWISE_PREFILL_TOKENS = 64  # for a contender that feeds a prompt token by token, where more would tell nothing new
PROMPT_TOKENS = 16
BATCH_SESSIONS = 8
START_TIMEOUT_S = 600.0
SLICE_TIMEOUT_S = 600.0


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        name: as in the tables.
        kind: goslet, ort, rwkv or llama.cpp.
        quant: the weights' format in the contender's own words.
        skip_zeros: goslet leaves weights of zero activations unread.
    """

    name: str
    kind: str
    quant: str
    skip_zeros: bool = False


class Runner(Protocol):
    """One loaded model with one sequence; token ids are in int64."""

    bytes_per_token: int
    prefill_tokens: int

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed tokens; logits [V] after the last one, valid until the next call."""

    def facts(self) -> dict[str, Any]:
        """Versions and whatever else a reader of the report asks about."""


class EngineRunner:
    """A goslet engine on the native backend or on ONNX Runtime."""

    def __init__(self, path: Path, backend: str, threads: int, skip_zeros: bool) -> None:
        from goslet.backends import Backend
        from goslet.backends.ort import OrtBackend
        from goslet.benchmark import bytes_per_token
        from goslet.enginefile import EngineFile
        from goslet.session import Engine

        file = EngineFile.open(path)
        chosen: Backend
        if backend == "native":
            from goslet.backends.native import NativeBackend

            chosen = NativeBackend(file, threads, skip_zeros=skip_zeros)
        else:
            chosen = OrtBackend(file, threads)
        self.engine = Engine(file, chosen, None)
        self.bytes_per_token = bytes_per_token(self.engine)
        self.prefill_tokens = PREFILL_TOKENS if backend == "native" else STEPWISE_PREFILL_TOKENS
        self._session = self.engine.session()
        self._batch = [self.engine.session() for _ in range(BATCH_SESSIONS)]
        self._skips = skip_zeros

    def reset(self) -> None:
        """As `Runner.reset`."""
        self._session.reset()

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Runner.feed`."""
        return self._session.feed(tokens)

    def step_batch(self, tokens: NDArray[np.int64]) -> None:
        """Feed each of the sessions one token; tokens [n]."""
        self.engine.step_batch(self._batch, tokens)

    def facts(self) -> dict[str, Any]:
        """As `Runner.facts`."""
        from goslet.benchmark import bytes_per_token

        backend = self.engine.backend
        facts: dict[str, Any] = {"version": importlib.metadata.version("goslet")}
        if backend.name == "ort":
            facts["onnxruntime"] = importlib.metadata.version("onnxruntime")
        else:
            facts["isa"] = backend.isa
        if self._skips and backend.density is not None:
            facts["density"] = backend.density
            facts["bytes_per_token_read"] = bytes_per_token(self.engine, backend.density)
        return facts


class RwkvRunner:
    """PyPI's rwkv in float32."""

    prefill_tokens = PREFILL_TOKENS

    def __init__(self, path: Path, threads: int) -> None:
        # The package chooses the version when it is imported.
        os.environ.update({"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0"})
        try:
            import torch
            from rwkv.model import RWKV
        except ModuleNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from error
        torch.set_num_threads(threads)
        self._model = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
        state = self._model.generate_zero_state()
        size_bytes = sum(tensor.nbytes for tensor in state)
        for name, tensor in self._model.z.items():
            if name != "blocks.0.ln0.weight" and name != "blocks.0.ln0.bias":  # applied to the embedding already
                size_bytes += tensor.nbytes // (len(tensor) if name == "emb.weight" else 1)
        self.bytes_per_token = size_bytes
        self._state = state

    def reset(self) -> None:
        """As `Runner.reset`."""
        self._state = self._model.generate_zero_state()

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Runner.feed`."""
        logits, self._state = self._model.forward(tokens.tolist(), self._state)
        return np.asarray(logits.numpy(), np.float32)

    def facts(self) -> dict[str, Any]:
        """As `Runner.facts`."""
        return {name: importlib.metadata.version(name) for name in ("rwkv", "torch")}


class LlamaRunner:
    """llama.cpp through llama-cpp-python's bindings of its C functions, with llama.cpp's default settings."""

    prefill_tokens = PREFILL_TOKENS

    def __init__(self, path: Path, threads: int) -> None:
        llama = self._llama = import_llama()
        from gguf_rwkv7 import bytes_per_token

        settings = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise Unavailable(f"llama.cpp cannot load {path.name}")
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = PREFILL_TOKENS
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise Unavailable(f"llama.cpp makes no context for {path.name}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.bytes_per_token = bytes_per_token(path)

    def reset(self) -> None:
        """As `Runner.reset`."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Runner.feed`."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        status = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, -1), shape=(self._vocab_size,))

    def facts(self) -> dict[str, Any]:
        """As `Runner.facts`."""
        info = self._llama.llama_print_system_info().decode()
        return {"llama-cpp-python": importlib.import_module("llama_cpp").__version__, "system_info": info}


def import_llama() -> Any:
    """llama-cpp-python's bindings, silenced; with LLAMA_CPP_LIB_PATH they load the library from that folder.

    Raises:
        Unavailable: the package or its library cannot be loaded.
    """
    try:
        llama = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed (tools/requirements-bench.txt)") from error
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"llama.cpp's library cannot be loaded: {error}") from error
    llama.llama_backend_init()
    return llama


def open_runner(contender: Contender, path: Path, threads: int) -> Runner:
    """Load a contender's model.

    Raises:
        Unavailable: it cannot take part here.
    """
    try:
        if contender.kind in ("goslet", "ort"):
            backend = "native" if contender.kind == "goslet" else "ort"
            return EngineRunner(path, backend, threads, contender.skip_zeros)
        return RwkvRunner(path, threads) if contender.kind == "rwkv" else LlamaRunner(path, threads)
    except ImportError as error:
        raise Unavailable(str(error)) from error


# ------------------------------------------------------------------------------------------------------------- slices


def decode(runner: Runner, tokens: NDArray[np.int64], n_steps: int) -> float:
    """Tokens per second of `n_steps` steps of one token, from a fresh state."""
    runner.reset()
    for token in range(WARM_UP_STEPS):
        runner.feed(tokens[token : token + 1])
    start_s = time.perf_counter()
    for token in range(WARM_UP_STEPS, WARM_UP_STEPS + n_steps):
        runner.feed(tokens[token : token + 1])
    return n_steps / (time.perf_counter() - start_s)


def prefill(runner: Runner, tokens: NDArray[np.int64]) -> float:
    """Tokens per second of a prompt of `runner.prefill_tokens`, from a fresh state."""
    runner.reset()
    start_s = time.perf_counter()
    runner.feed(tokens[: runner.prefill_tokens])
    return runner.prefill_tokens / (time.perf_counter() - start_s)


def batch(runner: EngineRunner, tokens: NDArray[np.int64], n_steps: int) -> float:
    """Tokens per second, all sessions together, of `n_steps` steps of a batch."""
    rows = np.resize(tokens, (WARM_UP_STEPS + n_steps, BATCH_SESSIONS))
    for row in rows[:WARM_UP_STEPS]:
        runner.step_batch(row)
    start_s = time.perf_counter()
    for row in rows[WARM_UP_STEPS:]:
        runner.step_batch(row)
    return BATCH_SESSIONS * n_steps / (time.perf_counter() - start_s)


# ------------------------------------------------------------------------------------------------------------ processes


def _serve(
    pipe: Connection, contender: Contender, path: Path, threads: int, tokens: NDArray[np.int64], log: Path
) -> None:
    # Ctrl-C reaches the whole process group; the parent is the one to answer it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print, llama.cpp a hundred lines; and what one says last before it aborts is the reason to give.
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        runner = open_runner(contender, path, threads)
        runner.reset()
        for token in tokens[:PROMPT_TOKENS]:
            logits = runner.feed(np.array([token]))
        work: dict[str, Callable[..., Any]] = {
            "decode": lambda n_steps: decode(runner, tokens, n_steps),
            "prefill": lambda: prefill(runner, tokens),
            "batch": lambda n_steps: batch(runner, tokens, n_steps),  # type: ignore[arg-type]
            "facts": runner.facts,
        }
        pipe.send((runner.bytes_per_token, runner.prefill_tokens, np.array(logits)))
        while True:
            name, arguments = pipe.recv()
            pipe.send(work[name](*arguments))
    except EOFError:
        return  # the parent is gone
    except Exception as error:
        pipe.send(error if isinstance(error, Unavailable) else Unavailable(f"{type(error).__name__}: {error}"))


class Worker:
    """A contender's process.

    Attributes:
        contender: whose it is.
        bytes_per_token: bytes that a step must read.
        prefill_tokens: tokens of its prefill.
        prompt_logits: float32 [V], after the first `PROMPT_TOKENS` tokens.

    Raises:
        Unavailable: the contender cannot take part here.
    """

    def __init__(self, contender: Contender, path: Path, threads: int, tokens: NDArray[np.int64], logs: Path) -> None:
        self.contender = contender
        self._log = logs / f"{contender.name}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, contender, path, threads, tokens, self._log), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.bytes_per_token, self.prefill_tokens, self.prompt_logits = self._answer(START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def ask(self, work: str, *arguments: Any) -> Any:
        """Have one slice of work done.

        Raises:
            Unavailable: it failed.
        """
        self._pipe.send((work, arguments))
        return self._answer(SLICE_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise Unavailable(f"no answer within {timeout_s:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(1)
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Unavailable(": ".join([f"its process ended with status {self._process.exitcode}", *last])) from error
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    def cpu_s(self) -> float:
        """Seconds of CPU time that the process has used, all threads together (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
