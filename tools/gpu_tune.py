#!/usr/bin/env python3
"""Measures the products with other constants than their source has, to choose these on a kind of GPU.

    python3 tools/gpu_tune.py --out REPORT.json [--quick]

Needs what tools/gpu_check.py needs: nvcc, torch with CUDA and numpy. Each combination of `CONSTANTS` is compiled into a
library of its own, held on every matrix to what the source's own computes, and timed on the matrices of 1.5B and 2.9B,
with one row of activations, all libraries on the same inputs. Printed are the best time for each matrix, and each
combination's over the source's, as a geometric mean. Nothing is changed: to keep a finding, write it into
csrc/kernels/cuda/product.cu with these numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gpu_check
from gpu_check import BUILD_LIMIT_S, describe, matrices, n_inputs, open_kernels, run_group
from gpu_kernels import F16, FLOAT_SUMS, OUTPUT_ROUNDING, ROOT, Kernels

PRODUCT = Path("csrc/kernels/cuda/product.cu")
# What is tried for each, the source's own value among them.
CONSTANTS = {"kUsualSplitBits": (1, 2, 3), "kBusyWarps": (1024, 2048, 4096), "kStepsAhead": (2, 3, 4)}
FORMATS = ((4, 32), (4, 128), (8, 32), (8, 128))
SIZES = ("1.5B", "2.9B")
REPEATS = 9


def own_constants(source: str) -> dict[str, int]:
    """The values that the source has.

    Raises:
        ValueError: a constant is not there, or not once.
    """
    return {name: int(_definition(source, name)[2]) for name in CONSTANTS}


def with_constants(source: str, constants: dict[str, int]) -> str:
    """The source with other values."""
    for name, value in constants.items():
        found = _definition(source, name)
        source = source[: found.start(2)] + str(value) + source[found.end(2) :]
    return source


def _definition(source: str, name: str) -> re.Match[str]:
    found = list(re.finditer(rf"^constexpr (int|std::int64_t) {name} = (\d+);", source, re.M))
    if len(found) != 1:
        raise ValueError(f"{PRODUCT}: {name} is defined {len(found)} times, expected once")
    return found[0]


def combinations(own: dict[str, int], *, quick: bool) -> list[dict[str, int]]:
    """The source's own constants first, then all others; quickly, those that differ in one of them."""
    grid = [dict(zip(CONSTANTS, values, strict=True)) for values in itertools.product(*CONSTANTS.values())]
    others = [one for one in grid if one != own]
    if quick:
        others = [one for one in others if sum(one[name] != own[name] for name in one) == 1]
    return [own, *others]


def build(folder: Path, constants: dict[str, int], capability: str) -> Path:
    """A library with these constants.

    Raises:
        RuntimeError: it does not compile.
    """
    place = folder / "-".join(map(str, constants.values()))
    shutil.copytree(ROOT / "csrc", place / "csrc")
    (place / "tools").mkdir()
    shutil.copy(ROOT / "tools/build_cuda", place / "tools")
    source = place / PRODUCT
    source.write_text(with_constants(source.read_text(encoding="utf-8"), constants), encoding="utf-8")
    library = place / "libgoslet_cuda.so"
    code, said = run_group([str(place / "tools/build_cuda"), str(library), capability], BUILD_LIMIT_S)
    if code:
        raise RuntimeError(f"{constants}: {said[-1500:]}")
    return library


def tune(torch: Any, libraries: list[Kernels], device: str, l2_bytes: int) -> dict[str, list[float]]:
    """Microseconds of each matrix with each library.

    Raises:
        RuntimeError: a library computes something else than the first.
    """
    times_us: dict[str, list[float]] = {}
    named = {f"{size} {matrix}": matrix for size in SIZES for matrix in matrices(size, FORMATS)}
    for name, matrix in named.items():
        x = torch.randn(1, matrix.n_in, device=device).half()
        y = torch.empty(1, matrix.n_out, device=device, dtype=torch.float16)
        copies = [matrix.random_weights(torch, device) for _ in range(n_inputs(matrix.size_bytes, l2_bytes))]
        results, times_us[name] = [], []
        for kernels in libraries:
            calls = [
                partial(kernels.product, F16, matrix.bits, matrix.group, matrix.n_out, x, weights, scales, y)
                for weights, scales in copies
            ]
            time_s = gpu_check.replay_time_s(torch, calls, REPEATS)
            times_us[name].append(time_s / len(calls) * 1e6)
            calls[0]()
            results.append(y.double())
        # The source's own kernel is held to float64 by gpu_check; another order of sums moves a result this far.
        limit = (FLOAT_SUMS * math.sqrt(matrix.n_in) + 2 * OUTPUT_ROUNDING[F16]) * float(results[0].abs().max())
        for index, result in enumerate(results):
            if not float((result - results[0]).abs().max()) <= limit:
                raise RuntimeError(f"{name}: library {index} computes something else than the source's")
        print(f"  {name:<28} {min(times_us[name]):8.2f} us at best", flush=True)
    return times_us


def summary(tried: list[dict[str, int]], times_us: dict[str, list[float]]) -> dict[str, Any]:
    """Each combination's time over the first one's, and the best for each matrix."""
    over = [
        math.exp(sum(math.log(times[index] / times[0]) for times in times_us.values()) / len(times_us))
        for index in range(len(tried))
    ]
    best = {
        name: {"constants": tried[times.index(min(times))], "over_source": min(times) / times[0]}
        for name, times in times_us.items()
    }
    return {"combinations": [{"constants": one, "over_source": value} for one, value in zip(tried, over, strict=True)],
            "best": best, "times_us": times_us}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Build, measure and say what is best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT", help="where to write what was measured")
    parser.add_argument("--quick", action="store_true", help="only combinations that differ in one constant")
    args = parser.parse_args(words)
    if not args.out.parent.is_dir():
        parser.error(f"--out: the folder {args.out.parent} does not exist")
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit("gpu_tune: torch is not installed, and the measurements need it")
    if not torch.cuda.is_available():
        sys.exit("gpu_tune: torch sees no CUDA device here")
    machine = describe(torch)
    tried = combinations(own_constants((ROOT / PRODUCT).read_text(encoding="utf-8")), quick=args.quick)
    with tempfile.TemporaryDirectory() as folder:
        print(f"compiling {len(tried)} libraries for {machine['device']} …", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            capability = machine["capability"].replace(".", "")
            paths = list(pool.map(lambda constants: build(Path(folder), constants, capability), tried))
        libraries = [open_kernels(torch, path, "cuda") for path in paths]
        found = summary(tried, tune(torch, libraries, "cuda", machine["l2_bytes"]))
    for entry in sorted(found["combinations"], key=lambda entry: entry["over_source"])[:10]:
        print(f"{entry['over_source']:.3f} of the source's time: {entry['constants']}", flush=True)
    args.out.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
