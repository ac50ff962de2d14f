#!/usr/bin/env python3
"""Plots time per token and memory against position: a goslet session beside a transformer with a key-value cache.

    tools/constant_cost.py --cache DIR --png OUT.png --json OUT.json [--tokens 100000] [--threads N]

Needs tools/requirements-bench.txt. goslet runs an RWKV-7 of random weights at the 0.1B shape in int8; prompts bring it
to each position, where single steps are timed. The transformer is our own plain one (`Transformer`), of equal width,
layers and vocabulary, in float32, its cache filled with random numbers up to the position: only its growth with the
position is to be compared, not its level, which better programs lower. Beside it stands what no program can go below:
reading a cache of float16 at the bandwidth measured in the same run. Each runs in a process of its own, one at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bench_contenders import Contender
from bench_cpu import prepare

import goslet
from goslet.benchmark import STREAM_BYTES, stream_bandwidth_gb_s
from goslet.machine import available_cores, cpu_model

WIDTH, LAYERS, HEADS, VOCAB_SIZE = 768, 12, 12, 65536  # those of the 0.1B shape
POINTS = (0, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000, 80_000, 90_000, 100_000)
WINDOW_STEPS = 32
CHUNK_TOKENS = 512
WARM_UP_STEPS = 4
CACHE_BYTES_PER_TOKEN = 2 * LAYERS * WIDTH * 2  # keys and values in float16

Report = Callable[[int, list[float]], None]


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell VmRSS")


def goslet_steps(report: Report, points: list[int], threads: int, engine_path: Path) -> None:
    """Time single steps of one session at each position."""
    rng = np.random.default_rng(0)
    with goslet.open(engine_path, backend="native", threads=threads) as engine:
        session = engine.session()
        # Few tokens, met beforehand: a row of the embedding that is read for the first time is no growth with position.
        known = rng.integers(0, VOCAB_SIZE, CHUNK_TOKENS)
        session.feed(known)
        session.reset()
        for point in points:
            while session.tokens_seen < point:
                session.feed(rng.choice(known, min(CHUNK_TOKENS, point - session.tokens_seen)))
            seconds = []
            for token in rng.choice(known, WARM_UP_STEPS + WINDOW_STEPS):
                start_s = time.perf_counter()
                session.feed([token])
                seconds.append(time.perf_counter() - start_s)
            report(point, seconds[WARM_UP_STEPS:])


class Transformer:
    """The decode step of a pre-norm transformer with a key-value cache, plainly in torch and float32.

    Weights are random; the cache grows with the position, as it does where its final length is not known.
    """

    def __init__(self) -> None:
        import torch

        self._torch = torch
        torch.manual_seed(0)
        scale = WIDTH**-0.5
        self._embedding = torch.randn(VOCAB_SIZE, WIDTH)
        self._head = torch.randn(VOCAB_SIZE, WIDTH) * scale
        self._layers = [
            [
                torch.randn(out, into) * into**-0.5
                for out, into in ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
            ]
            for _ in range(LAYERS)
        ]
        self._cache = [torch.empty(2, HEADS, 0, WIDTH // HEADS) for _ in range(LAYERS)]
        self._length = 0

    def fill(self, position: int) -> None:
        """Let the cache hold `position` tokens, and have room for a window of steps."""
        torch = self._torch
        for layer in range(LAYERS):
            old = self._cache[layer]
            grown = torch.empty(2, HEADS, position + WARM_UP_STEPS + WINDOW_STEPS, WIDTH // HEADS)
            grown[:, :, : self._length] = old[:, :, : self._length]
            grown[:, :, self._length : position].normal_()
            self._cache[layer] = grown
            del old
        self._length = position

    def step(self, token: int) -> Any:
        """Logits [V] after one more token."""
        functional = self._torch.nn.functional
        x = self._embedding[token]
        end = self._length + 1
        for layer, (qkv, output, up, down) in enumerate(self._layers):
            projected = qkv @ functional.layer_norm(x, (WIDTH,))
            query, key, value = projected.view(3, HEADS, WIDTH // HEADS)
            cache = self._cache[layer]
            cache[0, :, self._length], cache[1, :, self._length] = key, value
            keys, values = cache[None, 0, :, :end], cache[None, 1, :, :end]
            mixed = functional.scaled_dot_product_attention(query[None, :, None], keys, values)
            x = x + output @ mixed.reshape(WIDTH)
            x = x + down @ functional.gelu(up @ functional.layer_norm(x, (WIDTH,)))
        self._length = end
        return self._head @ functional.layer_norm(x, (WIDTH,))


def transformer_steps(report: Report, points: list[int], threads: int) -> None:
    """Time single steps of the transformer at each position."""
    import torch

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        model = Transformer()
        for point in points:
            model.fill(point)
            seconds = []
            for token in rng.integers(0, VOCAB_SIZE, WARM_UP_STEPS + WINDOW_STEPS).tolist():
                start_s = time.perf_counter()
                model.step(token)
                seconds.append(time.perf_counter() - start_s)
            report(point, seconds[WARM_UP_STEPS:])


def _serve(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    base_bytes = resident_bytes()

    def report(point: int, seconds: list[float]) -> None:
        p5, median, p95 = (1e3 * float(value) for value in np.percentile(seconds, [5, 50, 95]))
        pipe.send(
            {
                "position": point,
                "ms_per_token": median,
                "ms_per_token_p5": p5,
                "ms_per_token_p95": p95,
                "resident_mb": (resident_bytes() - base_bytes) / 1e6,
            }
        )

    work(report, *arguments)
    pipe.send(None)


def measure(name: str, work: Callable[..., None], *arguments: Any) -> list[dict[str, float]]:
    """Run `work(report, *arguments)` in a process of its own and collect what it reports.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    rows: list[dict[str, float]] = []
    try:
        while (row := pipe.recv()) is not None:
            rows.append(row)
            print(
                f"{name}: at {row['position']} tokens {row['ms_per_token']:.1f} ms per token, "
                f"{row['resident_mb']:.0f} MB",
                file=sys.stderr,
            )
    except EOFError:
        raise RuntimeError(f"{name}: its process failed") from None
    finally:
        process.terminate()
        process.join()
    return rows


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    ours, theirs, bound = report["goslet"], report["transformer"], report["bound"]
    for rows, color, label in (
        (ours, "#1b6ca8", "goslet, RWKV-7 0.1B, int8"),
        (theirs, "#c4541a", "transformer of equal width, plain, float32"),
    ):
        positions = [row["position"] / 1e3 for row in rows]
        left.plot(positions, [row["ms_per_token"] for row in rows], "o-", color=color, markersize=4, label=label)
        left.fill_between(
            positions,
            [row["ms_per_token_p5"] for row in rows],
            [row["ms_per_token_p95"] for row in rows],
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        right.plot(positions, [row["resident_mb"] for row in rows], "o-", color=color, markersize=4, label=label)
    positions = [row["position"] / 1e3 for row in bound]
    label = "bound: only reading a float16 cache"
    left.plot(positions, [row["ms_per_token"] for row in bound], "--", color="#666666", label=label)
    label = "bound: only a float16 cache"
    right.plot(positions, [row["cache_mb"] for row in bound], "--", color="#666666", label=label)
    left.set_ylabel("milliseconds per token (median, 5th to 95th percentile)")
    right.set_ylabel("resident memory of model and past, MB")
    for axes in (left, right):
        axes.set_xlabel("position, thousands of tokens")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False)
    machine = report["machine"]
    figure.suptitle(
        f"The cost of one more token: {machine['cpu']}, {machine['threads']} threads, "
        f"{report['bandwidth_gb_s']:.0f} GB/s"
    )
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="the folder of models of tools/bench_cpu.py")
    parser.add_argument("--png", type=Path, required=True, metavar="OUT")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--tokens", type=int, default=POINTS[-1], help="the last position (default 100000)")
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.threads < 1:
        parser.error("--tokens and --threads must be 1 or more")
    points = [point for point in POINTS if point < options.tokens] + [options.tokens]
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        engine_path = prepare(
            options.cache.resolve(), "0.1b", Contender("goslet int8", "goslet", "int8"), options.threads
        )
        before_gb_s = stream_bandwidth_gb_s(options.threads, STREAM_BYTES)
        ours = measure("goslet", goslet_steps, points, options.threads, engine_path)
        theirs = measure("transformer", transformer_steps, points, options.threads)
        bandwidth_gb_s = max(before_gb_s, stream_bandwidth_gb_s(options.threads, STREAM_BYTES))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    report = {
        "machine": {"cpu": cpu_model(), "cores": available_cores(), "threads": options.threads},
        "bandwidth_gb_s": bandwidth_gb_s,
        "window_steps": WINDOW_STEPS,
        "goslet": ours,
        "transformer": theirs,
        "bound": [
            {
                "position": point,
                "cache_mb": point * CACHE_BYTES_PER_TOKEN / 1e6,
                "ms_per_token": point * CACHE_BYTES_PER_TOKEN / bandwidth_gb_s / 1e6,
            }
            for point in points
        ],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
