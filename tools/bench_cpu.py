#!/usr/bin/env python3
"""goslet beside ONNX Runtime, PyPI's rwkv and llama.cpp on the same random weights, a slice of work each in turn.

    tools/bench_cpu.py --cache DIR [--shapes 0.1b,0.4b,1.5b,demo] [--contenders NAME,…] [--rounds N] [--threads N]
                       [--isa avx2] [--json OUT] [--markdown OUT]

Needs tools/requirements-bench.txt; a contender that cannot take part is left out with the reason. With
LLAMA_CPP_LIB_PATH set, llama.cpp's library is loaded from that folder. Every contender has a process of its own, and
each round asks one after another for a slice of decoding, so that whatever else the machine does hits all alike; ratios
are of slices of one round. Where the models do not fit into memory together, they run in groups, and those that are
compared stay in one. Figures are void for a contender whose logits disagree with the reference's.

The random weights leave half of relu² at zero, which would flatter an engine that skips them: goslet skips nothing
here but in the lines that say so, on the shape `demo`, which is the trained demonstration model.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_contenders import BATCH_SESSIONS, PREFILL_TOKENS, Contender, Unavailable, Worker, import_llama
from numpy.typing import NDArray

import goslet
from goslet.benchmark import STREAM_BYTES, Rate, stream_bandwidth_gb_s
from goslet.machine import available_cores, cpu_model
from goslet.sampling import SamplingOptions

DEMO = Path(__file__).resolve().parents[1] / "runtime/demo/rwkv7-demo.pth"
# Rows of 256 and more: llama.cpp's Q6_K, which its Q4_0 uses for the head, needs them.
TINY = {"n_layer": 2, "n_embd": 256, "vocab_size": 512, "rank_w": 32, "rank_a": 32, "rank_v": 32, "rank_g": 32}

CONTENDERS = (
    Contender("goslet f16", "goslet", "f16"),
    Contender("llama.cpp F16", "llama.cpp", "F16"),
    Contender("rwkv f32", "rwkv", "f32"),
    Contender("goslet int8", "goslet", "int8"),
    Contender("llama.cpp Q8_0", "llama.cpp", "Q8_0"),
    Contender("ort int8", "ort", "int8"),
    Contender("goslet int4", "goslet", "int4"),
    Contender("llama.cpp Q4_0", "llama.cpp", "Q4_0"),
    Contender("ort int4", "ort", "int4"),
    Contender("goslet int3", "goslet", "int3"),
)
SKIPPING = (
    Contender("goslet int8, skipping", "goslet", "int8", skip_zeros=True),
    Contender("goslet int4, skipping", "goslet", "int4", skip_zeros=True),
)
PAIRS = (
    ("goslet f16", "llama.cpp F16"),
    ("goslet int8", "llama.cpp Q8_0"),
    ("goslet int4", "llama.cpp Q4_0"),
    ("goslet int8", "ort int8"),
    ("goslet int4", "ort int4"),
    ("goslet int3", "goslet int4"),
)
DEMO_PAIRS = (("goslet int8, skipping", "goslet int8"), ("goslet int4, skipping", "goslet int4"))
# One group holds what PAIRS compares.
CLASSES = {"f16": 16, "F16": 16, "f32": 16, "int8": 8, "Q8_0": 8, "int4": 4, "Q4_0": 4, "int3": 4}
# Bits that a contender's process holds per weight; llama.cpp packs a second copy of Q4_0 beside the mapped file.
HELD_BITS = {"f16": 16, "F16": 17, "f32": 48, "int8": 9, "Q8_0": 9, "int4": 5, "Q4_0": 10, "int3": 4}
LLAMA_TYPES = {"Q8_0": 7, "Q4_0": 2}  # llama_ftype

VOCAB_SIZE = 65536  # of a shape that does not say
SLICE_S = 0.5
MIN_SLICE_STEPS, MAX_SLICE_STEPS = 8, 64
PREFILL_EVERY = 4  # rounds of decoding to one of prefill, which takes several times as long
SETTLE_S = 0.05  # thread pools spin for some milliseconds after their work
MEMORY_SHARE = 0.7
SPARE_DISK_BYTES = 1 << 30
# Correlation of a prompt's logits with the reference's. The strict one is that of unrounded weights, by which the
# program that writes GGUF is judged; llama.cpp quantizes that file itself. At 0.1B rounding leaves 0.999 with 8 bits
# and 0.92 with 4, and less in deeper models.
MIN_CORRELATION = {16: 0.9999, 8: 0.99, 4: 0.7}
# The plainest implementation first: it is what the others are held to.
REFERENCES = ("rwkv f32", "llama.cpp F16", "goslet f16", "ort int8", "goslet int8")


# --------------------------------------------------------------------------------------------------------------- files


def shape_arguments(shape: str) -> dict[str, Any]:
    """Arguments of `random_rwkv7` for a shape's name."""
    from random_checkpoint import SHAPES

    return TINY if shape == "tiny" else SHAPES[shape]


def n_weights(shape: str) -> int:
    """Numbers in a model of this shape, within a few percent; of the demonstration model, more than it has."""
    if shape == "demo":
        return DEMO.stat().st_size
    arguments = shape_arguments(shape)
    width = int(arguments["n_embd"])
    ranks = sum(int(arguments[f"rank_{letter}"]) for letter in "wavg")
    return int(arguments["n_layer"]) * (12 * width**2 + 2 * width * ranks) + 2 * width * int(
        arguments.get("vocab_size", VOCAB_SIZE)
    )


def artifact(cache: Path, shape: str, contender: Contender) -> Path:
    """The file that a contender runs."""
    if contender.kind == "rwkv":
        return DEMO if shape == "demo" else cache / f"{shape}.pth"
    ending = "gguf" if contender.kind == "llama.cpp" else "goslet"
    return cache / f"{shape}-{contender.quant}.{ending}"


def _make(cache: Path, shape: str, contender: Contender, threads: int) -> None:
    """Write a contender's file and those it is made from; for a process of its own, whose memory goes with it."""
    import torch
    from random_checkpoint import random_rwkv7, save

    torch.set_num_threads(threads)
    checkpoint = DEMO if shape == "demo" else cache / f"{shape}.pth"
    if not checkpoint.exists():
        with _whole(checkpoint) as path:
            save(random_rwkv7(**shape_arguments(shape), dtype=torch.bfloat16), path)
    target = artifact(cache, shape, contender)
    if target.exists():
        return
    if contender.kind in ("goslet", "ort"):
        from goslet.export import export_engine

        export_engine(checkpoint, target, quant=contender.quant)
        return
    from gguf_rwkv7 import write_gguf

    if contender.quant == "F16":
        with _whole(target) as path:
            write_gguf(checkpoint, path)
        return
    plain = cache / f"{shape}-F16.gguf"
    if not plain.exists():
        with _whole(plain) as path:
            write_gguf(checkpoint, path)
    llama = import_llama()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = LLAMA_TYPES[contender.quant]
    settings.nthread = threads
    with _whole(target) as path:
        if llama.llama_model_quantize(os.fsencode(plain), os.fsencode(path), ctypes.byref(settings)) != 0:
            raise Unavailable(f"llama.cpp does not quantize {plain.name} to {contender.quant}")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write under, with `path`'s ending, which becomes `path` only when all is written."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)


def _make_quietly(pipe: Any, cache: Path, shape: str, contender: Contender, threads: int) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        _make(cache, shape, contender, threads)
        pipe.send(None)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def missing_package(contender: Contender) -> str | None:
    """Why a contender cannot take part, where a package tells that."""
    needed = {"ort": ["onnxruntime"], "rwkv": ["torch", "rwkv"], "llama.cpp": ["llama_cpp", "gguf"]}
    for package in ["torch", "onnx", *needed.get(contender.kind, [])]:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (tools/requirements-bench.txt)"
    return None


def prepare(cache: Path, shape: str, contender: Contender, threads: int) -> Path:
    """The contender's file, made if it is not there.

    Raises:
        Unavailable: it cannot be made here.
    """
    reason = missing_package(contender)
    if reason is not None:
        raise Unavailable(reason)
    if shape == "demo" and contender.kind != "goslet":
        raise Unavailable("the demonstration model is for goslet alone")
    path = artifact(cache, shape, contender)
    if path.exists():
        return path
    # A checkpoint in bf16, a GGUF in F16 to quantize, and the file itself.
    needed_bytes = 6 * n_weights(shape) + SPARE_DISK_BYTES
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < needed_bytes:
        raise Unavailable(
            f"{cache} has {free_bytes / 1e9:.1f} GB free; making {path.name} takes {needed_bytes / 1e9:.1f} GB"
        )
    say(f"making {path.name}")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_make_quietly, args=(theirs, cache, shape, contender, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        problem = pipe.recv()
    except EOFError:
        process.join()
        problem = f"making {path.name} ended with status {process.exitcode}"
    finally:
        process.join()
    if problem is not None:
        raise Unavailable(problem)
    return path


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Measured:
    """Slices of one contender at one shape, in tokens per second, by round."""

    bytes_per_token: int
    prefill_tokens: int
    agreement: dict[str, float | str | bool] | None = None
    slice_steps: int = 0
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    bandwidths_gb_s: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def shares_of_bandwidth(self) -> list[float]:
        """Bytes read over bytes that can be read, by round: memory is much slower while neighbours use it."""
        return [
            self.bytes_per_token * tokens_per_s / (bandwidth_gb_s * 1e9)
            for tokens_per_s, bandwidth_gb_s in zip(self.decode, self.bandwidths_gb_s, strict=True)
        ]


def say(line: str) -> None:
    """Progress, beside the report."""
    print(line, file=sys.stderr, flush=True)


def rate(values: Sequence[float]) -> Rate:
    """Median and 5th and 95th percentile."""
    p5, median, p95 = np.percentile(values, [5, 50, 95])
    return Rate(median=float(median), p5=float(p5), p95=float(p95))


def agreement(reference: str, expected: NDArray[np.float32], found: NDArray[np.float32], bits: int) -> dict[str, Any]:
    """How near a contender's logits are to the reference's, both float32 [V]."""
    correlation = float(np.corrcoef(expected, found)[0, 1])
    return {
        "reference": reference,
        "correlation": correlation,
        "relative_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        "same_argmax": bool(expected.argmax() == found.argmax()),
        "agrees": correlation >= MIN_CORRELATION[bits],  # false for NaN
    }


def groups(contenders: Iterable[Contender], shape: str) -> list[list[Contender]]:
    """The contenders in as few groups as fit into memory at once; a class of weights stays together."""
    limit_bytes = MEMORY_SHARE * available_bytes()
    result: list[list[Contender]] = []
    room_bytes = 0.0
    by_class: dict[int, list[Contender]] = {}
    for contender in contenders:
        by_class.setdefault(CLASSES[contender.quant], []).append(contender)
    for members in by_class.values():
        size_bytes = sum(HELD_BITS[c.quant] for c in members) / 8 * n_weights(shape)
        if not result or size_bytes > room_bytes:
            result.append([])
            room_bytes = limit_bytes
        result[-1].extend(members)
        room_bytes -= size_bytes
    return result


def available_bytes() -> int:
    """Memory that can be had without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not tell MemAvailable")


def written_tokens(path: Path) -> NDArray[np.int64]:
    """Tokens that a trained model writes itself, so that its activations are as in use."""
    with goslet.open(path, threads=1) as engine:
        options = SamplingOptions(seed=0)
        return np.array(list(engine.generate_tokens([0], max_tokens=PREFILL_TOKENS, options=options)))


@contextmanager
def stopping(workers: list[Worker]) -> Iterator[None]:
    """Stop the workers however this ends."""
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()


class Bench:
    """One run's settings and what it found."""

    def __init__(self, cache: Path, rounds: int, threads: int) -> None:
        self.cache, self.rounds, self.threads = cache, rounds, threads
        self.results: dict[str, dict[str, Measured]] = {}
        self.skipped: dict[str, dict[str, str]] = {}
        self.bandwidths_gb_s: list[float] = []
        self.idle_shares: list[float] = []

    def run(self, shape: str, chosen: Sequence[Contender]) -> None:
        """Measure the contenders at one shape."""
        found = self.results[shape] = {}
        self.skipped[shape] = {}
        ready = {}
        for contender in chosen:
            try:
                ready[contender] = prepare(self.cache, shape, contender, self.threads)
            except Unavailable as error:
                self._skip(shape, contender, error)
        if shape == "demo":
            tokens = written_tokens(next(iter(ready.values()))) if ready else np.empty(0, np.int64)
        else:
            vocab_size = shape_arguments(shape).get("vocab_size", VOCAB_SIZE)
            tokens = np.random.default_rng(0).integers(0, vocab_size, PREFILL_TOKENS)
        logits: dict[str, NDArray[np.float32]] = {}
        for group in groups(ready, shape):
            self._run_group(shape, {c: ready[c] for c in group}, tokens, found, logits)
        reference = next((name for name in REFERENCES if name in logits), None)
        for name, measured in found.items():
            if reference is not None and name != reference:
                bits = CLASSES[next(c.quant for c in chosen if c.name == name)]
                measured.agreement = agreement(reference, logits[reference], logits[name], bits)

    def _skip(self, shape: str, contender: Contender, error: Unavailable) -> None:
        self.skipped[shape][contender.name] = str(error)
        say(f"{shape}: {contender.name} is left out: {error}")

    def _bandwidth(self) -> float:
        self.bandwidths_gb_s.append(stream_bandwidth_gb_s(self.threads, STREAM_BYTES))
        return self.bandwidths_gb_s[-1]

    def _run_group(
        self,
        shape: str,
        paths: dict[Contender, Path],
        tokens: NDArray[np.int64],
        found: dict[str, Measured],
        logits: dict[str, NDArray[np.float32]],
    ) -> None:
        workers: list[Worker] = []
        with stopping(workers):
            for contender, path in paths.items():
                try:
                    workers.append(Worker(contender, path, self.threads, tokens, self.cache))
                except Unavailable as error:
                    self._skip(shape, contender, error)
                    continue
                worker = workers[-1]
                found[contender.name] = Measured(worker.bytes_per_token, worker.prefill_tokens)
                logits[contender.name] = worker.prompt_logits
            for worker in workers:
                once = worker.ask("decode", MIN_SLICE_STEPS)
                steps = min(max(round(SLICE_S * once), MIN_SLICE_STEPS), MAX_SLICE_STEPS)
                found[worker.contender.name].slice_steps = steps
            for number in range(self.rounds):
                # Turn about, so that no contender always follows the same one.
                for index in range(len(workers)):
                    worker = workers[(index + number) % len(workers)]
                    measured = found[worker.contender.name]
                    before_gb_s = self._bandwidth()
                    measured.decode.append(self._slice(workers, worker, "decode", measured.slice_steps))
                    # The larger one: a share must not look better because something else was reading.
                    measured.bandwidths_gb_s.append(max(before_gb_s, self._bandwidth()))
                    if number % PREFILL_EVERY == 0:
                        measured.prefill.append(self._slice(workers, worker, "prefill"))
                    if worker.contender.name == "goslet int8":
                        steps = max(measured.slice_steps // 2, MIN_SLICE_STEPS)
                        measured.batch.append(self._slice(workers, worker, "batch", steps))
                say(f"{shape}: round {number + 1} of {self.rounds}")
            for worker in workers:
                found[worker.contender.name].facts = worker.ask("facts")

    def _slice(self, workers: Sequence[Worker], worker: Worker, work: str, *arguments: int) -> float:
        others = [other for other in workers if other is not worker]
        time.sleep(SETTLE_S)
        idle_s, start_s = sum(other.cpu_s() for other in others), time.perf_counter()
        result: float = worker.ask(work, *arguments)
        idle_s = sum(other.cpu_s() for other in others) - idle_s
        self.idle_shares.append(idle_s / (time.perf_counter() - start_s))
        return result


# -------------------------------------------------------------------------------------------------------------- report


def shape_report(found: dict[str, Measured]) -> dict[str, Any]:
    """One shape's figures and ratios as a JSON object."""
    rows = {}
    for name, measured in found.items():
        rows[name] = {
            "decode_tokens_per_s": asdict(rate(measured.decode)),
            "prefill_tokens_per_s": asdict(rate(measured.prefill)),
            "prefill_tokens": measured.prefill_tokens,
            "bytes_per_token": measured.bytes_per_token,
            "bandwidth_gb_s": asdict(rate(measured.bandwidths_gb_s)),
            "share_of_bandwidth": asdict(rate(measured.shares_of_bandwidth())),
            "slices": len(measured.decode),
            "slice_steps": measured.slice_steps,
            "agreement": measured.agreement,
            "facts": measured.facts,
        }
    ratios = [decode_ratio(found, *pair) for pair in (*PAIRS, *DEMO_PAIRS) if all(agrees(found, name) for name in pair)]
    return {"contenders": rows, "decode_ratios": ratios, "prefill": prefill_ratio(found), "batch": batch_ratio(found)}


def agrees(found: dict[str, Measured], name: str) -> bool:
    """Whether a contender took part and its logits are right."""
    return name in found and (found[name].agreement is None or bool((found[name].agreement or {})["agrees"]))


def decode_ratio(found: dict[str, Measured], name: str, other: str) -> dict[str, Any]:
    """The speed of one contender over another's, round by round, and as it would be if both read as many bytes."""
    ours, theirs = found[name], found[other]
    ratios = np.array(ours.decode) / np.array(theirs.decode)
    bytes_ratio = ours.bytes_per_token / theirs.bytes_per_token
    return {
        "of": name,
        "over": other,
        "ratio": asdict(rate(ratios.tolist())),
        "bytes_ratio": bytes_ratio,
        "ratio_at_equal_bytes": float(np.median(ratios)) * bytes_ratio,
    }


def prefill_ratio(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """goslet's prefill over that of llama.cpp's fastest type."""
    theirs = [name for name in found if name.startswith("llama.cpp") and agrees(found, name)]
    if not theirs:
        return []
    best = max(theirs, key=lambda name: float(np.median(found[name].prefill)))
    return [
        {
            "of": name,
            "over": best,
            "ratio": asdict(rate([a / b for a, b in zip(measured.prefill, found[best].prefill, strict=True)])),
        }
        for name, measured in found.items()
        if name.startswith("goslet") and agrees(found, name)
    ]


def batch_ratio(found: dict[str, Measured]) -> dict[str, Any] | None:
    """Throughput of several sessions at once over that of one, goslet int8."""
    measured = found.get("goslet int8")
    if measured is None or not measured.batch:
        return None
    ratios = [together / alone for together, alone in zip(measured.batch, measured.decode, strict=True)]
    return {
        "of": "goslet int8",
        "sessions": BATCH_SESSIONS,
        "tokens_per_s": asdict(rate(measured.batch)),
        "over_one_session": asdict(rate(ratios)),
    }


def spread(figures: dict[str, float], digits: int) -> str:
    """A `Rate` as text."""
    return f"{figures['median']:.{digits}f} ({figures['p5']:.{digits}f} to {figures['p95']:.{digits}f})"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine = report["machine"]
    bandwidth = report["bandwidth_gb_s"]
    streaming = "" if bandwidth is None else f", streaming read {spread(bandwidth, 1)} GB/s"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads{streaming}. Tokens per second: "
        f"median (5th to 95th percentile of {report['rounds']} slices in turn).",
        "",
    ]

    for shape, result in report["shapes"].items():
        if not result["contenders"]:
            continue
        lines += [
            f"| {shape} | decode | MB per token | share of bandwidth | prefill, 512 tokens |",
            "|---|---|---|---|---|",
        ]
        for name, row in result["contenders"].items():
            share = 100 * row["share_of_bandwidth"]["median"]
            void = row["agreement"] is not None and not row["agreement"]["agrees"]
            prefilled = spread(row["prefill_tokens_per_s"], 0)
            if row["prefill_tokens"] != PREFILL_TOKENS:
                prefilled += f", {row['prefill_tokens']} tokens one by one"
            lines.append(
                f"| {name}{' (void: its logits disagree)' if void else ''} | {spread(row['decode_tokens_per_s'], 1)} "
                f"| {row['bytes_per_token'] / 1e6:.1f} | {share:.0f}% | {prefilled} |"
            )
        lines += ["", "| | ratio | at equal bytes |", "|---|---|---|"]
        for ratio in result["decode_ratios"]:
            lines.append(
                f"| decode, {ratio['of']} over {ratio['over']} | {spread(ratio['ratio'], 2)} "
                f"| {ratio['ratio_at_equal_bytes']:.2f} |"
            )
        for ratio in result["prefill"]:
            lines.append(f"| prefill, {ratio['of']} over {ratio['over']} | {spread(ratio['ratio'], 2)} | |")
        if result["batch"] is not None:
            batch = result["batch"]
            lines.append(
                f"| {batch['sessions']} sessions at once over one, {batch['of']} "
                f"| {spread(batch['over_one_session'], 2)} | |"
            )
        lines.append("")
    for shape, reasons in report["skipped"].items():
        lines += [f"Left out at {shape}: {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from random_checkpoint import SHAPES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--cache", type=Path, required=True, help="a folder for models; about 16 GB for all shapes")
    parser.add_argument("--shapes", default="0.1b,0.4b,1.5b,demo", help="of 0.1b 0.4b 1.5b 2.9b demo tiny")
    parser.add_argument("--contenders", default=",".join(names), help="of " + ", ".join(names))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--isa", help="goslet's instruction set, as GOSLET_ISA names it")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes.split(",")
    options.contenders = [name.strip() for name in options.contenders.split(",")]
    for chosen, known in ((options.shapes, [*SHAPES, "demo", "tiny"]), (options.contenders, names)):
        for name in chosen:
            if name not in known:
                parser.error(f"unknown: {name!r}; expected one of {', '.join(known)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; 130 when interrupted."""
    options = parse(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.isa:
        os.environ["GOSLET_ISA"] = options.isa
    chosen = [contender for contender in CONTENDERS if contender.name in options.contenders]
    bench = Bench(options.cache.resolve(), options.rounds, options.threads)
    try:
        for shape in options.shapes:
            bench.run(shape, [*chosen, *SKIPPING] if shape == "demo" else chosen)
    except KeyboardInterrupt:
        say("interrupted; the workers are stopped")
        return 130
    report = {
        "machine": {"cpu": cpu_model(), "cores": available_cores(), "threads": options.threads},
        "isa": options.isa,
        "rounds": options.rounds,
        "bandwidth_gb_s": asdict(rate(bench.bandwidths_gb_s)) if bench.bandwidths_gb_s else None,
        "idle_cpu_share": rate(bench.idle_shares).p95 if bench.idle_shares else math.nan,
        "shapes": {shape: shape_report(found) for shape, found in bench.results.items()},
        "skipped": bench.skipped,
    }
    table = markdown(report)
    print(table, end="")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
