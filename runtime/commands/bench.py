"""Measure how fast an engine runs on this machine.

On a good backend decoding is limited by reading the weights, so the speed is also given as a share of the memory's
bandwidth, which is measured in the same run: by reading on as many threads, or on a GPU by copying within its memory.
"""

from __future__ import annotations

import argparse

from ..benchmark import Benchmark, run_benchmark
from ..machine import available_cores
from .console import Console, readable_size
from .flags import add_backend_flags, open_engine

NAME = "bench"
SUMMARY = "measure how fast an engine runs here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    add_backend_flags(parser)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    args.threads = args.threads or available_cores()
    with open_engine(args) as engine, console.progress() as progress:
        result = run_benchmark(engine, threads=args.threads, progress=progress)
    if args.json:
        console.json(result.to_json())
    else:
        _show(result, console)
    return 0


def _show(result: Benchmark, console: Console) -> None:
    machine = result.machine
    backend = result.backend if result.isa is None else f"{result.backend} ({result.isa})"
    processors = machine.cpu if machine.gpu is None else f"{machine.gpu} with {machine.cpu}"
    console.line(f"{processors}, {machine.cores} cores, {machine.threads} threads, backend {backend}")
    for name, rate in (("decode", result.tokens_per_s), ("prefill", result.prefill_tokens_per_s)):
        console.line(f"{name:<9} {rate.median:.1f} tokens/s (5% {rate.p5:.1f}, 95% {rate.p95:.1f})")
    console.line(f"a token   {readable_size(result.bytes_per_token)} of weights and state")
    if result.density is not None:
        console.line(
            f"density   {result.density:.1%} of ffn.value's inputs are not zero; weights of the others go unread"
        )
    console.line(f"memory    {result.bandwidth_gb_s:.1f} GB/s, of which decoding uses {result.share_of_bandwidth:.0%}")
    if result.share_of_bandwidth > 1:
        console.line("          (more than all: the weights stay in the cache)")
