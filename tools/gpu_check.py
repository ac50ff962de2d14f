"""Proves and measures the CUDA kernels on a machine that has a GPU.

    python3 tools/gpu_check.py [--out REPORT.json] [--quick]

Needs nvcc, torch with CUDA and numpy, nothing else; goslet itself need not be installed. It builds the library for this
GPU, holds every kernel to float64 through the C interface, replays it in a CUDA graph, measures bandwidth against
copies of the same size, runs compute-sanitizer where it is there, and writes a report after every part, which says
whether it is complete. On the CPU the same checks run on the kernels as the host's model of CUDA runs them:

    cmake -S csrc -B build/host -DGOSLET_BUILD_TESTS=ON && cmake --build build/host --target goslet_cuda_host
    python3 tools/gpu_check.py --shim build/host/libgoslet_cuda_host.so --out shim.json

TensorRT is not needed. Its plugins are checked like the kernels where they and their harness are given or lie in
tools/, built where TensorRT's headers are:

    tools/build_cuda --plugin tools/libgoslet_trt.so [SM...]
    tools/build_cuda --harness tools/libgoslet_trt_harness.so
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_kernels import F16, F32, ROOT, Checks, Kernels, Report, check_graphs, cuda_layout, run_part
from gpu_plugin import drive_plugin

L2_MULTIPLE = 6
MAX_INPUTS = 4096
LARGE_COPIES = (1 << 28, 1 << 30)  # bytes moved
BUSY_CYCLES = 2_000_000  # of a GPU, about a millisecond
SHAPES = {"0.1B": (768, 12), "0.4B": (1024, 24), "1.5B": (2048, 24), "2.9B": (2560, 32)}
VOCABULARY = 65536
BUILD_LIMIT_S = 300
SANITIZER_LIMIT_S = 75
SANITIZER_ERRORS = 99


# ---------------------------------------------------------------------------------------------------------------- speed


def replay_time_s(torch: Any, calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median seconds of all calls in one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for index in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)  # until the graph's launch, which is the CPU's work, is queued too
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return float(statistics.median(times))


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model in one format."""

    name: str
    n_in: int
    n_out: int
    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.name} int{self.bits} g{self.group}"

    @property
    def padded_in(self) -> int:
        """The inputs that are stored."""
        padded: int = cuda_layout().padded_inputs(self.n_in)
        return padded

    @property
    def size_bytes(self) -> int:
        """Of weights and scales."""
        return self.n_out * (self.padded_in * self.bits // 8 + 2 * self.padded_in // self.group)

    def random_weights(self, torch: Any, device: str) -> tuple[Any, Any]:
        """Weights and scales, packed: any bytes are some numbers."""
        shape = (self.n_out, self.padded_in * self.bits // 8)
        weights = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        return weights, (0.01 * torch.rand(self.n_out, self.padded_in // self.group, device=device)).half()


def matrices(size: str, formats: Sequence[tuple[int, int]]) -> Iterator[Matrix]:
    """The matrices of a model in each format, bits and group."""
    width, _ = SHAPES[size]
    shapes = {"D x D": (width, width), "ffn.key": (width, 4 * width), "ffn.value": (4 * width, width)}
    shapes["head"] = (width, VOCABULARY)
    for bits, group in formats:
        for name, (n_in, n_out) in shapes.items():
            yield Matrix(name, n_in, n_out, bits, group)


def n_inputs(size_bytes: int, l2_bytes: int) -> int:
    """How many different inputs of a size no cache holds."""
    return max(4, min(MAX_INPUTS, -(-L2_MULTIPLE * l2_bytes // size_bytes)))


class Speeds:
    """Bandwidth of each kernel, over enough different inputs that no cache holds them."""

    def __init__(self, checks: Checks, quick: bool) -> None:
        self.checks = checks
        self.torch = checks.torch
        self.device = checks.kernels.device
        self.repeats = 7 if quick else 15
        self.l2_bytes: int = checks.report.machine["l2_bytes"]
        self.copies = {size_bytes: self.copy_bandwidth(size_bytes, 2) for size_bytes in LARGE_COPIES}

    @property
    def peak(self) -> float:
        """The largest bandwidth of any copy so far."""
        return max(self.copies.values())

    def copy_bandwidth(self, size_bytes: int, count: int) -> float:
        """Bytes read and written a second by copies that move `size_bytes` each, reads and writes together."""
        half = max(16, size_bytes // 2)
        pairs = [
            tuple(self.torch.empty(half, dtype=self.torch.uint8, device=self.device) for _ in range(2))
            for _ in range(count)
        ]
        calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
        return 2 * half * count / replay_time_s(self.torch, calls, self.repeats)

    def note(self, name: str, size_bytes: int, make: Callable[[], Callable[[], None]], **more: Any) -> None:
        """Time calls on different inputs and compare with copies that move as many bytes."""
        count = n_inputs(size_bytes, self.l2_bytes)
        time_s = replay_time_s(self.torch, [make() for _ in range(count)], self.repeats) / count
        if size_bytes not in self.copies:
            self.copies[size_bytes] = self.copy_bandwidth(size_bytes, count)
        found = size_bytes / time_s
        entry = {
            "name": name, "size_bytes": size_bytes, "inputs": count, "time_us": time_s * 1e6, "gb_s": found / 1e9,
            "share_of_copy": found / self.copies[size_bytes], **more,
        }  # fmt: skip
        self.checks.report.speeds.append(entry)
        print(
            f"  {name:<44} {time_s * 1e6:8.2f} us {found / 1e9:7.0f} GB/s, {entry['share_of_copy']:.0%} of a copy's",
            flush=True,
        )

    def finish(self) -> None:
        """Compare all of them with the best of all copies."""
        self.checks.report.machine["peak_copy_gb_s"] = self.peak / 1e9
        for entry in self.checks.report.speeds:
            entry["share_of_peak_copy"] = entry["gb_s"] * 1e9 / self.peak

    def products(self, size: str, rows: tuple[int, ...], formats: tuple[tuple[int, int], ...]) -> None:
        """The matrices of a model."""
        torch, kernels = self.torch, self.checks.kernels
        for matrix in matrices(size, formats):
            for n_rows in rows:
                # As in a step, where they have just been written: the weights alone come from memory.
                x = torch.randn(n_rows, matrix.n_in, device=self.device, dtype=torch.float16)

                def make(matrix: Matrix = matrix, x: Any = x) -> Callable[[], None]:
                    weights, scales = matrix.random_weights(torch, self.device)
                    y = torch.empty(len(x), matrix.n_out, device=self.device, dtype=torch.float16)
                    return lambda: kernels.product(F16, matrix.bits, matrix.group, matrix.n_out, x, weights, scales, y)

                self.note(
                    f"{size} {matrix}, rows {n_rows}", matrix.size_bytes, make,
                    kernel="product", size=size, matrix=matrix.name, bits=matrix.bits, group=matrix.group, rows=n_rows,
                )  # fmt: skip
                torch.cuda.empty_cache()

    def recurrences(self, size: str, batches: tuple[int, ...]) -> None:
        """The state updates of a model's layer, in place."""
        width, _ = SHAPES[size]
        torch, kernels = self.torch, self.checks.kernels
        n_head = width // 64
        for batch in batches:
            shape = (batch, n_head, 64)

            def vectors(count: int, shape: tuple[int, int, int] = shape) -> list[Any]:
                return [torch.randn(*shape, device=self.device).half() for _ in range(count)]

            def make7(shape: tuple[int, int, int] = shape, vectors: Any = vectors) -> Callable[[], None]:
                r, k, v, kappa, a, y = vectors(6)
                w = torch.rand(*shape, device=self.device)
                state = torch.zeros(*shape, 64, device=self.device)
                return lambda: kernels.wkv7(F16, F32, r, w, k, v, kappa, a, state, y, state)

            def make6(shape: tuple[int, int, int] = shape, vectors: Any = vectors) -> Callable[[], None]:
                r, k, v, y = vectors(4)
                w, u = torch.rand(*shape, device=self.device), torch.rand(*shape[1:], device=self.device)
                state = torch.zeros(*shape, 64, device=self.device)
                return lambda: kernels.wkv6(F16, F32, r, k, v, w, u, state, y, state)

            def make4(batch: int = batch) -> Callable[[], None]:
                k, v, y = (torch.randn(batch, width, device=self.device).half() for _ in range(3))
                w, u = -torch.rand(width, device=self.device), torch.rand(width, device=self.device)
                state = tuple(torch.ones(batch, width, device=self.device) for _ in range(3))
                return lambda: kernels.wkv4(F16, k, v, w, u, state, y, state)

            elements = batch * width
            # States read and written, and the vectors: 2 bytes each, the decay 4.
            self.note(f"{size} wkv7, batch {batch}", elements * (2 * 4 * 64 + 6 * 2 + 4), make7,
                      kernel="wkv7", size=size, batch=batch)  # fmt: skip
            self.note(f"{size} wkv6, batch {batch}", elements * (2 * 4 * 64 + 4 * 2 + 4), make6,
                      kernel="wkv6", size=size, batch=batch)  # fmt: skip
            self.note(f"{size} wkv4, batch {batch}", elements * (3 * 2 * 4 + 3 * 2), make4,
                      kernel="wkv4", size=size, batch=batch)  # fmt: skip
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ the parts


def build(report: Report, folder: Path, capability: str) -> Path:
    """The library for this GPU."""
    library = folder / "libgoslet_cuda.so"
    begin_s = time.monotonic()
    code, said = run_group([str(ROOT / "tools/build_cuda"), str(library), capability], BUILD_LIMIT_S)
    if code:
        raise RuntimeError(said[-2000:])
    report.add("build", "passed", seconds=round(time.monotonic() - begin_s, 1), target=f"sm_{capability}")
    return library


def run_group(command: list[str], limit_s: float, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """A command's status and what it says; however this ends, nothing that it started goes on.

    Raises:
        subprocess.TimeoutExpired: it took longer than `limit_s`.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def sanitize(report: Report, library: Path) -> None:
    """compute-sanitizer over the checks, where it is there."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        report.add("compute-sanitizer", "not run", reason="it is not on the PATH")
        return
    # Each tensor in memory of its own, or what lies past its end would be another's; torch's kernels are left alone.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            command = [program, "--tool", tool, "--kernel-name", "kns=6goslet4cuda"]
            command += ["--error-exitcode", str(SANITIZER_ERRORS), sys.executable, __file__, "--library", str(library)]
            command += ["--only-checks", "--small", "--out", f"{folder}/report.json"]
            begin_s = time.monotonic()
            try:
                code, output = run_group(command, SANITIZER_LIMIT_S, environment)
            except subprocess.TimeoutExpired:
                reason = f"it took longer than {SANITIZER_LIMIT_S} s"
                report.add(f"compute-sanitizer {tool}", "not run", reason=reason)
                continue
            status, summary = sanitizer_verdict(code, output)
            report.add(
                f"compute-sanitizer {tool}", status, summary=summary or output[-300:],
                seconds=round(time.monotonic() - begin_s, 1),
            )  # fmt: skip


def sanitizer_verdict(code: int, output: str) -> tuple[str, str]:
    """Passed, failed or not run, and the sanitizer's own summary.

    Without a summary the sanitizer did not come to work; with one, whatever ended with another status than 0 found
    something, be it the sanitizer or the checks.
    """
    lines = [line.strip("= ") for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    status = "not run" if not lines else "passed" if code == 0 else "failed"
    return status, "; ".join(lines)[:300]


def describe(torch: Any) -> dict[str, Any]:
    """The machine, for the report."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }  # fmt: skip
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "nvcc": ["nvcc", "--version"],
    }.items():
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
            found[name] = lines[-1] if lines else "no answer"
        except OSError:
            found[name] = "not there"
        except subprocess.TimeoutExpired:
            found[name] = "no answer in time"
    return found


def open_kernels(torch: Any, library: Path, device: str) -> Kernels:
    """The kernels of a library.

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: it is of another version, has no kernels, or they are of the other kind.
    """
    kernels = Kernels(torch, library, device)
    wanted = cuda_layout().PLUGIN_VERSION
    try:
        found = kernels.version()
    except AttributeError:
        raise RuntimeError(f"{library}: there are no kernels of goslet in it (see tools/build_cuda --help)") from None
    if found != wanted:
        raise RuntimeError(f"{library}: is of another version (expected {wanted}, found {found}); build it again")
    if kernels.on_host() != (device == "cpu"):
        is_for = "the host's model of CUDA" if device != "cpu" else "a GPU"
        raise RuntimeError(f"{library}: its kernels are for {is_for}; --shim takes the others")
    return kernels


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="the report (default: tools/results/gpu-check-DEVICE.json)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--small", action="store_true", help="small shapes alone, as under a sanitizer")
    parser.add_argument("--only-checks", action="store_true", help="no speeds, no sanitizer")
    parser.add_argument("--library", type=Path, help="a library that is built already")
    parser.add_argument("--shim", type=Path, help="check on the CPU, with the kernels built for the host")
    parser.add_argument("--plugin", type=Path, help="the TensorRT plugins (default: tools/libgoslet_trt.so)")
    parser.add_argument("--harness", type=Path, help="what drives them (default: tools/libgoslet_trt_harness.so)")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run it; 1 when something failed or nothing could be checked."""
    parser = arguments()
    args = parser.parse_args(words)
    if args.shim is not None and args.out is None:
        parser.error("--shim needs --out: tools/results is for what a GPU said")
    for flag in ("library", "shim", "plugin", "harness"):
        path = getattr(args, flag)
        if path is not None:
            if not path.is_file():
                parser.error(f"--{flag}: there is no file {path}")
            setattr(args, flag, path.resolve())  # the loader looks for a bare name in the system's folders
    if args.out is not None and not args.out.parent.is_dir():
        parser.error(f"--out: the folder {args.out.parent} does not exist")
    try:
        import torch
    except ModuleNotFoundError:
        print("gpu_check: torch is not installed, and the checks need it", file=sys.stderr)
        return 1
    if args.shim is None and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here (--shim LIBRARY checks on the CPU)", file=sys.stderr)
        return 1
    machine = describe(torch)
    device_name = "shim" if args.shim is not None else machine["device"].replace(" ", "-").lower()
    report = Report(args.out or ROOT / f"tools/results/gpu-check-{device_name}.json", machine)
    print(f"on {machine.get('device', 'the CPU')}, report: {report.path}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.shim is not None or args.library is not None:
            library = args.shim or args.library
        else:
            try:
                library = build(report, Path(folder), machine["capability"].replace(".", ""))
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                report.add("build", "failed", problem=str(error))
                report.write()
                return 1
        try:
            kernels = open_kernels(torch, library, "cpu" if args.shim is not None else "cuda")
        except (OSError, RuntimeError) as error:
            print(f"gpu_check: {error}", file=sys.stderr)
            return 1
        checks = Checks(kernels, report, cuda_layout(), small=args.small or args.shim is not None)
        for part in (checks.wkv4, checks.wkv6, checks.wkv7, checks.product, checks.refusals):
            run_part(report, f"checks of {part.__name__}", part)
        if args.shim is None and not args.small:
            run_part(report, "CUDA graphs", lambda: check_graphs(checks))
        # What lies in tools/ is for a GPU; under the sanitizer, where time is short, the kernels alone are checked.
        if args.plugin is not None or (args.shim is None and not args.only_checks):
            plugin = args.plugin or ROOT / "tools/libgoslet_trt.so"
            harness = args.harness or ROOT / "tools/libgoslet_trt_harness.so"
            drive_plugin(checks, plugin, harness)
        if args.shim is None and not args.only_checks:
            run_part(report, "speeds", lambda: measure(checks, args.quick))
            run_part(report, "compute-sanitizer", lambda: sanitize(report, library))
    counts = {
        status: sum(check["status"] == status for check in report.checks) for status in ("passed", "failed", "not run")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), flush=True)
    report.finish()
    return 0 if report.passed else 1


def measure(checks: Checks, quick: bool) -> None:
    """Every speed that the report has."""
    speeds = Speeds(checks, quick)
    print(f"  a large copy moves {speeds.peak / 1e9:.0f} GB/s", flush=True)
    try:
        for size in ("1.5B", "2.9B"):
            speeds.recurrences(size, (1, 8, 64))
            speeds.products(size, (1,), ((4, 32), (4, 64), (4, 128), (8, 32), (8, 128)))
            checks.report.write()
        speeds.products("1.5B", (2, 4, 8), ((4, 32), (8, 32)))
        if not quick:
            for size in ("0.1B", "0.4B"):
                speeds.recurrences(size, (1, 8))
                speeds.products(size, (1,), ((4, 32), (8, 32)))
    finally:
        speeds.finish()


if __name__ == "__main__":
    # What has its own session outlives a signal that nobody turns into an exception.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("gpu_check: interrupted; the report is not complete", file=sys.stderr)
        sys.exit(130)
