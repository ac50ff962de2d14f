"""Proves and measures the CUDA kernels on a machine that has a GPU.

    python3 tools/gpu_check.py [--out REPORT.json] [--quick]

Needs nvcc, torch with CUDA and numpy, nothing else; goslet itself need not be installed. It builds the library for this
GPU, holds every kernel to float64 through the C interface, replays it in a CUDA graph, measures bandwidth against
copies of the same size, runs compute-sanitizer where it is there, drives the TensorRT plugin through its harness where
both are given, and writes a report after every part. `--shim LIBRARY` runs the same checks on the CPU, on the kernels
as the host's model of CUDA runs them.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
F32, F16, BF16 = 0, 1, 2
TYPE_NAMES = ("f32", "f16", "bf16")
# A result differs from float64's by the rounding of the output and by float sums. The output's rounding, as a part of
# the largest output, is at most half a step of a number just above a power of two: 2^-11 for f16, 2^-8 for bf16.
OUTPUT_ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}
# Sums of up to 256 products, or of thousands in partial sums, in float: seen below 3e-7; the issue's own bound is 1e-6.
FLOAT_SUMS = 1e-6
L2_MULTIPLE = 6
SHAPES = {"0.1B": (768, 12), "0.4B": (1024, 24), "1.5B": (2048, 24), "2.9B": (2560, 32)}
VOCABULARY = 65536
SANITIZER_LIMIT_S = 60


@dataclass
class Report:
    """What was found, written to a file after every part."""

    path: Path
    machine: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, status: str, **more: Any) -> None:
        """Note a check: passed, failed or not run."""
        self.checks.append({"name": name, "status": status, **more})
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items()
        )
        if status != "passed":
            print(f"  {status}: {name}: {shown}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        found = [check["status"] for check in self.checks]
        return "passed" in found and "failed" not in found

    def write(self) -> None:
        """Write the report as it stands."""
        content = {"machine": self.machine, "passed": self.passed, "checks": self.checks, "speeds": self.speeds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _layout() -> Any:
    """`goslet.cuda_layout` from its file: goslet need not be installed here."""
    spec = importlib.util.spec_from_file_location("cuda_layout", ROOT / "runtime/cuda_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernels:
    """The C interface, called with torch's tensors."""

    def __init__(self, torch: Any, library: Path, device: str) -> None:
        self.torch = torch
        self.device = device
        self.types = (torch.float32, torch.float16, torch.bfloat16)
        self._library = ctypes.CDLL(str(library))
        self._library.goslet_cuda_error.restype = ctypes.c_char_p

    def _stream(self) -> int:
        return 0 if self.device == "cpu" else int(self.torch.cuda.current_stream().cuda_stream)

    def _call(self, name: str, *arguments: Any) -> None:
        converted = [
            ctypes.c_void_p(a.data_ptr())
            if self.torch.is_tensor(a)
            else ctypes.c_int64(a)
            if name_is_long
            else ctypes.c_int(a)
            for a, name_is_long in arguments
        ]
        code = getattr(self._library, name)(*converted, ctypes.c_void_p(self._stream()))
        if code != 0:
            raise RuntimeError(f"{name}: {self._library.goslet_cuda_error(code).decode()}")

    def wkv4(
        self, kind: int, k: Any, v: Any, w: Any, u: Any, state: tuple[Any, ...], y: Any, new: tuple[Any, ...]
    ) -> None:
        """goslet_cuda_wkv4."""
        batch, width = k.shape
        self._call("goslet_cuda_wkv4", *_ints(kind), *_longs(batch, width), *_tensors(k, v, w, u, *state, y, *new))

    def wkv6(
        self, kind: int, state_kind: int, r: Any, k: Any, v: Any, w: Any, u: Any, state: Any, y: Any, new: Any
    ) -> None:
        """goslet_cuda_wkv6; w [H, N] or [B, H, N]."""
        self._call(
            "goslet_cuda_wkv6", *_ints(kind, state_kind), *_longs(*r.shape), *_tensors(r, k, v, w),
            *_ints(int(w.ndim == 3)), *_tensors(u, state, y, new),
        )  # fmt: skip

    def wkv7(
        self,
        kind: int,
        state_kind: int,
        r: Any,
        w: Any,
        k: Any,
        v: Any,
        kappa: Any,
        a: Any,
        state: Any,
        y: Any,
        new: Any,
    ) -> None:
        """goslet_cuda_wkv7."""
        self._call(
            "goslet_cuda_wkv7", *_ints(kind, state_kind), *_longs(*r.shape),
            *_tensors(r, w, k, v, kappa, a, state, y, new),
        )  # fmt: skip

    def product(self, kind: int, bits: int, group: int, n_out: int, x: Any, weights: Any, scales: Any, y: Any) -> None:
        """goslet_cuda_product."""
        n_rows, n_in = x.shape
        self._call(
            "goslet_cuda_product", *_ints(kind, bits), *_longs(group, n_rows, n_in, n_out),
            *_tensors(x, weights, scales, y),
        )  # fmt: skip


def _ints(*values: int) -> list[tuple[int, bool]]:
    return [(value, False) for value in values]


def _longs(*values: int) -> list[tuple[int, bool]]:
    return [(value, True) for value in values]


def _tensors(*values: Any) -> list[tuple[Any, bool]]:
    return [(value, False) for value in values]


# --------------------------------------------------------------------------------------------------------------- checks


class Checks:
    """Every kernel against float64."""

    def __init__(self, kernels: Kernels, report: Report, layout: Any, *, small: bool) -> None:
        self.kernels = kernels
        self.small = small
        self.report = report
        self.layout = layout
        self.torch = kernels.torch
        self.generator = self.torch.Generator().manual_seed(7)

    def normal(self, *shape: int, kind: int = F32) -> Any:
        """Random numbers on the device, of a type."""
        made = self.torch.randn(*shape, generator=self.generator)
        return made.to(self.kernels.types[kind]).to(self.kernels.device)

    def uniform(self, low: float, high: float, *shape: int) -> Any:
        """The same, float32 within a range."""
        made = self.torch.rand(*shape, generator=self.generator) * (high - low) + low
        return made.to(self.kernels.device)

    def poisoned(self, like: Any, kind: int | None = None) -> Any:
        """Where a result goes: NaN until it is written."""
        return self.torch.full(
            like.shape, float("nan"), device=like.device, dtype=like.dtype if kind is None else self.kernels.types[kind]
        )

    def compare(self, name: str, found: Any, expected: Any, limit: float, size: float | None = None) -> None:
        """Note whether `found` is within `limit` of float64's `expected`, as a part of `size` or its largest number."""
        size = size or float(expected.abs().max()) or 1.0
        error = float((found.double() - expected).abs().max()) / size
        self.report.add(name, "passed" if error <= limit else "failed", error=error, limit=limit)

    def same(self, name: str, one: Any, other: Any) -> None:
        """Note whether two results are the same to the last bit."""
        self.report.add(name, "passed" if self.torch.equal(one, other) else "failed")

    def wkv4(self) -> None:
        """RWKV-4, in all types, in place and not."""
        for kind in (F32, F16, BF16):
            for batch, width in ((1, 768), (3, 37), (8, 2048)):
                k, v = (self.normal(batch, width, kind=kind) for _ in range(2))
                w, u = -self.uniform(0.01, 5.0, width), self.normal(width)
                state = (self.normal(batch, width), self.uniform(0.5, 2.0, batch, width), self.normal(batch, width))
                y, new = self.poisoned(k), tuple(self.poisoned(part) for part in state)
                self.kernels.wkv4(kind, k, v, w, u, state, y, new)
                aa, bb, pp = (part.double() for part in state)
                first = u.double() + k.double()
                now = self.torch.maximum(pp, first)
                past, present = (pp - now).exp(), (first - now).exp()
                name = f"wkv4 {TYPE_NAMES[kind]} {batch}x{width}"
                limit = FLOAT_SUMS + OUTPUT_ROUNDING[kind]
                self.compare(f"{name} y", y, (past * aa + present * v.double()) / (past * bb + present), limit)
                top = self.torch.maximum(pp + w.double(), k.double())
                kept, added = (pp + w.double() - top).exp(), (k.double() - top).exp()
                for part, found, expected in zip(
                    ("aa", "bb", "pp"), new, (kept * aa + added * v.double(), kept * bb + added, top), strict=True
                ):
                    self.compare(f"{name} {part}", found, expected, FLOAT_SUMS)
                again, held = self.poisoned(k), tuple(part.clone() for part in state)
                self.kernels.wkv4(kind, k, v, w, u, held, again, held)
                self.same(f"{name} in place", self.torch.cat([again.float(), *held]), self.torch.cat([y.float(), *new]))

    def wkv6(self) -> None:
        """RWKV-5 and 6, in all types of activations and states, in place and not."""
        for kind, state_kind, (batch, n_head, n), by_token in self._matrix_cases(decays=(False, True)):
            r, k, v = (self.normal(batch, n_head, n, kind=kind) for _ in range(3))
            w = self.uniform(0.3, 1.0, *((batch, n_head, n) if by_token else (n_head, n)))
            u = self.normal(n_head, n)
            state = self.normal(batch, n_head, n, n, kind=state_kind)
            y, new = self.poisoned(r), self.poisoned(state)
            self.kernels.wkv6(kind, state_kind, r, k, v, w, u, state, y, new)
            written = k.double().unsqueeze(-1) * v.double().unsqueeze(-2)
            seen = u.double().unsqueeze(-1) * written + state.double()
            name = f"wkv{6 if by_token else 5} {TYPE_NAMES[kind]} state {TYPE_NAMES[state_kind]} {batch}x{n_head}x{n}"
            limit = FLOAT_SUMS + OUTPUT_ROUNDING[kind]
            self.compare(f"{name} y", y, (r.double().unsqueeze(-2) @ seen).squeeze(-2), limit)
            self.compare(
                f"{name} state", new, w.double().unsqueeze(-1) * state.double() + written,
                FLOAT_SUMS + OUTPUT_ROUNDING[state_kind],
            )  # fmt: skip
            again, held = self.poisoned(r), state.clone()
            self.kernels.wkv6(kind, state_kind, r, k, v, w, u, held, again, held)
            self.same(f"{name} in place", held, new)
            self.same(f"{name} in place y", again, y)

    def wkv7(self) -> None:
        """RWKV-7, likewise."""
        for kind, state_kind, (batch, n_head, n), _ in self._matrix_cases(decays=(True,)):
            r, k, v, kappa, a = (self.normal(batch, n_head, n, kind=kind) for _ in range(5))
            kappa = self.torch.nn.functional.normalize(kappa.float(), dim=-1).to(kappa.dtype)
            w = self.uniform(0.545, 1.0, batch, n_head, n)
            state = self.normal(batch, n_head, n, n, kind=state_kind)
            y, new = self.poisoned(r), self.poisoned(state)
            self.kernels.wkv7(kind, state_kind, r, w, k, v, kappa, a, state, y, new)
            old, key = state.double(), kappa.double()
            removed = old @ key.unsqueeze(-1)
            expected = old * w.double().unsqueeze(-2) - removed @ (key * a.double()).unsqueeze(-2)
            expected = expected + v.double().unsqueeze(-1) @ k.double().unsqueeze(-2)
            name = f"wkv7 {TYPE_NAMES[kind]} state {TYPE_NAMES[state_kind]} {batch}x{n_head}x{n}"
            self.compare(f"{name} state", new, expected, FLOAT_SUMS + OUTPUT_ROUNDING[state_kind])
            y_expected = (expected @ r.double().unsqueeze(-1)).squeeze(-1)
            self.compare(f"{name} y", y, y_expected, FLOAT_SUMS + OUTPUT_ROUNDING[kind])
            again, held = self.poisoned(r), state.clone()
            self.kernels.wkv7(kind, state_kind, r, w, k, v, kappa, a, held, again, held)
            self.same(f"{name} in place", held, new)
            self.same(f"{name} in place y", again, y)

    def _matrix_cases(self, decays: tuple[bool, ...]) -> Iterator[tuple[int, int, tuple[int, int, int], bool]]:
        sizes = [(1, 12, 64), (2, 3, 64), (1, 1, 1), (2, 3, 5), (1, 2, 100), (1, 1, 256)]
        if not self.small:
            sizes += [(64, 32, 64), (1, 40, 64), (3, 7, 63), (9, 32, 64)]
        for kind in (F32, F16, BF16):
            for state_kind in (F32, F16):
                for shape in sizes:
                    for by_token in decays:
                        yield kind, state_kind, shape, by_token

    def made_weights(self, bits: int, group: int, n_in: int, n_out: int) -> tuple[Any, Any, Any]:
        """Packed weights, packed scales and the dequantized matrix in float64, on the device."""
        torch = self.torch
        largest = 7 if bits == 4 else 127
        numbers = torch.randint(-largest, largest + 1, (n_out, n_in), generator=self.generator, dtype=torch.int8)
        scales = (torch.rand(n_out, -(-n_in // group), generator=self.generator) * 0.01 + 0.001).half()
        packed = torch.from_numpy(self.layout.pack_weights(numbers.numpy(), bits))
        packed_scales = torch.from_numpy(self.layout.pack_scales(scales.numpy(), n_in, group))
        matrix = numbers.double() * scales.double().repeat_interleave(group, 1)[:, :n_in]
        return (part.to(self.kernels.device) for part in (packed, packed_scales, matrix))  # type: ignore[return-value]

    def product(self) -> None:
        """Products with 4 and 8 bits, in all types, groups and numbers of rows."""
        shapes = [(32, 1), (160, 21), (768, 48), (2080, 40), (64, 140)]
        if not self.small:
            shapes += [(2048, 2048), (2560, 10240), (10240, 2560), (2048, 65536), (1024, 5000)]
        for bits in (4, 8):
            for group in (32, 64, 128):
                for n_in, n_out in shapes:
                    weights, scales, matrix = self.made_weights(bits, group, n_in, n_out)
                    for kind in (F32, F16, BF16):
                        for n_rows in (1, 3, 8) if n_in < 2000 else (1, 2, 8):
                            x = self.normal(n_rows, n_in, kind=kind)
                            y = self.poisoned(self.torch.empty(n_rows, n_out, device=x.device, dtype=x.dtype))
                            self.kernels.product(kind, bits, group, n_out, x, weights, scales, y)
                            name = f"product int{bits} group {group} {TYPE_NAMES[kind]} {n_rows}x{n_in}x{n_out}"
                            # What is summed can be far larger than the sum.
                            size = float((x.double().abs() @ matrix.abs().T).max())
                            limit = FLOAT_SUMS + OUTPUT_ROUNDING[kind]
                            self.compare(name, y, x.double() @ matrix.T, limit, size)

    def refusals(self) -> None:
        """Wrong arguments are codes, and nothing is written."""
        x = self.normal(1, 64)
        y = self.poisoned(x)
        odd = self.normal(1, 65).reshape(-1)[1:].reshape(1, 64)
        for name, arguments in {
            "9 rows": (F32, 4, 32, 64, self.normal(9, 64), x, x, y),
            "a group of 16": (F32, 4, 16, 64, x, x, x, y),
            "2 bits": (F32, 2, 32, 64, x, x, x, y),
            "type 3": (3, 4, 32, 64, x, x, x, y),
            "unaligned x": (F32, 4, 32, 64, odd, x, x, y),
            "33 inputs": (F32, 4, 32, 64, self.normal(1, 33), x, x, y),
        }.items():
            try:
                self.kernels.product(*arguments)
                self.report.add(f"refusal of {name}", "failed", problem="it was taken")
            except RuntimeError as error:
                clean = bool(self.torch.isnan(y).all())
                self.report.add(f"refusal of {name}", "passed" if clean else "failed", message=str(error))


# --------------------------------------------------------------------------------------------------------------- graphs


def check_graphs(checks: Checks) -> None:
    """A captured step of kernels gives, each time that it is replayed, what calls one by one give."""
    torch, kernels = checks.torch, checks.kernels
    batch, n_head, n = 2, 12, 64
    r, k, v, kappa, a = (checks.normal(batch, n_head, n, kind=F16) for _ in range(5))
    w = checks.uniform(0.545, 1.0, batch, n_head, n)
    weights, scales, _ = checks.made_weights(4, 32, n_head * n, 96)
    start = checks.normal(batch, n_head, n, n) / 8
    states = [start.clone(), start.clone()]
    outputs = [torch.zeros(batch, 96, device=kernels.device, dtype=torch.float16) for _ in range(2)]
    between = torch.zeros_like(r)

    def step(index: int) -> None:
        kernels.wkv7(F16, F32, r, w, k, v, kappa, a, states[index], between, states[index])
        kernels.product(F16, 4, 32, 96, between.reshape(batch, -1), weights, scales, outputs[index])

    step(0)  # loads the kernels before they are captured
    states[0].copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    states[0].copy_(start)
    for index in range(3):
        graph.replay()
        step(1)
        torch.cuda.synchronize()
        checks.same(f"graph replay {index} state", states[0], states[1])
        checks.same(f"graph replay {index} output", outputs[0], outputs[1])


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
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return float(statistics.median(times))


class Speeds:
    """Bandwidth of each kernel, over enough different inputs that no cache holds them."""

    def __init__(self, checks: Checks, quick: bool) -> None:
        self.checks = checks
        self.torch = checks.torch
        self.repeats = 7 if quick else 15
        l2_bytes = self.torch.cuda.get_device_properties(0).L2_cache_size
        self.at_least_bytes = L2_MULTIPLE * l2_bytes
        self.peak = self.copy_bandwidth(1 << 30, 1)
        self.copies: dict[int, float] = {}

    def copy_bandwidth(self, size_bytes: int, count: int) -> float:
        """Bytes read and written a second by copies that move `size_bytes` each, reads and writes together."""
        half = max(16, size_bytes // 2)
        pairs = [
            tuple(self.torch.empty(half, dtype=self.torch.uint8, device="cuda") for _ in range(2)) for _ in range(count)
        ]
        calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
        return 2 * half * count / replay_time_s(self.torch, calls, self.repeats)

    def note(self, name: str, size_bytes: int, make: Callable[[], Callable[[], None]], **more: Any) -> None:
        """Time calls on different inputs and compare with copies of as many bytes."""
        count = max(4, min(512, -(-self.at_least_bytes // size_bytes)))
        time_s = replay_time_s(self.torch, [make() for _ in range(count)], self.repeats) / count
        key = 1 << (size_bytes - 1).bit_length() if size_bytes < 1 << 24 else size_bytes
        if key not in self.copies:
            self.copies[key] = self.copy_bandwidth(size_bytes, count)
        found = size_bytes / time_s
        entry = {
            "name": name, "size_bytes": size_bytes, "inputs": count, "time_us": time_s * 1e6, "gb_s": found / 1e9,
            "share_of_copy": found / self.copies[key], "share_of_peak_copy": found / self.peak, **more,
        }  # fmt: skip
        self.checks.report.speeds.append(entry)
        print(
            f"  {name:<44} {time_s * 1e6:8.2f} us {found / 1e9:7.0f} GB/s, {entry['share_of_copy']:.0%} of a copy's, "
            f"{entry['share_of_peak_copy']:.0%} of the largest copy's",
            flush=True,
        )

    def products(self, size: str, rows: tuple[int, ...], formats: tuple[tuple[int, int], ...]) -> None:
        """The matrices of a model."""
        width, _ = SHAPES[size]
        torch, kernels, layout = self.torch, self.checks.kernels, self.checks.layout
        matrices = {"D x D": (width, width), "ffn.key": (width, 4 * width), "ffn.value": (4 * width, width)}
        matrices["head"] = (width, VOCABULARY)
        for bits, group in formats:
            for matrix, (n_in, n_out) in matrices.items():
                padded = layout.padded_inputs(n_in)
                size_bytes = n_out * (padded * bits // 8 + 2 * padded // group)
                for n_rows in rows:
                    # As in a step, where they have just been written: the weights alone come from memory.
                    x = torch.randn(n_rows, n_in, device="cuda", dtype=torch.float16)

                    def make(
                        x: Any = x,
                        n_out: int = n_out,
                        bits: int = bits,
                        group: int = group,
                        n_rows: int = n_rows,
                        padded: int = padded,
                    ) -> Callable[[], None]:
                        weights = torch.randint(0, 256, (n_out, padded * bits // 8), device="cuda", dtype=torch.uint8)
                        scales = torch.rand(n_out, padded // group, device="cuda").half()
                        y = torch.empty(n_rows, n_out, device="cuda", dtype=torch.float16)
                        return lambda: kernels.product(F16, bits, group, n_out, x, weights, scales, y)

                    self.note(
                        f"{size} {matrix} int{bits} g{group}, rows {n_rows}", size_bytes, make,
                        kernel="product", size=size, matrix=matrix, bits=bits, group=group, rows=n_rows,
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
                return [torch.randn(*shape, device="cuda").half() for _ in range(count)]

            def make7(shape: tuple[int, int, int] = shape, vectors: Any = vectors) -> Callable[[], None]:
                r, k, v, kappa, a, y = vectors(6)
                w = torch.rand(*shape, device="cuda")
                state = torch.zeros(*shape, 64, device="cuda")
                return lambda: kernels.wkv7(F16, F32, r, w, k, v, kappa, a, state, y, state)

            def make6(shape: tuple[int, int, int] = shape, vectors: Any = vectors) -> Callable[[], None]:
                r, k, v, y = vectors(4)
                w, u = torch.rand(*shape, device="cuda"), torch.rand(*shape[1:], device="cuda")
                state = torch.zeros(*shape, 64, device="cuda")
                return lambda: kernels.wkv6(F16, F32, r, k, v, w, u, state, y, state)

            def make4(batch: int = batch) -> Callable[[], None]:
                k, v, y = (torch.randn(batch, width, device="cuda").half() for _ in range(3))
                w, u = -torch.rand(width, device="cuda"), torch.rand(width, device="cuda")
                state = tuple(torch.ones(batch, width, device="cuda") for _ in range(3))
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
    made = subprocess.run(
        [str(ROOT / "tools/build_cuda"), str(library), capability], capture_output=True, text=True, timeout=400
    )
    if made.returncode:
        raise RuntimeError(made.stderr[-2000:])
    report.add("build", "passed", seconds=round(time.monotonic() - begin_s, 1), target=f"sm_{capability}")
    return library


def sanitize(report: Report, library: Path) -> None:
    """compute-sanitizer over the checks, where it is there."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        report.add("compute-sanitizer", "not run", reason="it is not on the PATH")
        return
    for tool in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, __file__]
            command += ["--library", str(library), "--only-checks", "--small", "--out", f"{folder}/report.json"]
            begin_s = time.monotonic()
            try:
                ran = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_LIMIT_S)
            except subprocess.TimeoutExpired:
                reason = f"it took longer than {SANITIZER_LIMIT_S} s"
                report.add(f"compute-sanitizer {tool}", "not run", reason=reason)
                continue
            summary = [
                line.strip("= ") for line in ran.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK" in line
            ]
            status = "failed" if ran.returncode == 99 else "passed" if ran.returncode == 0 and summary else "not run"
            report.add(
                f"compute-sanitizer {tool}", status, summary="; ".join(summary)[:300] or ran.stderr[-300:],
                seconds=round(time.monotonic() - begin_s, 1),
            )  # fmt: skip


def drive_plugin(report: Report, plugin: Path | None, harness: Path | None) -> None:
    """The TensorRT plugin through its harness, where both are given."""
    name = "TensorRT plugin through its harness"
    if plugin is None or harness is None:
        report.add(name, "not run", reason="no --plugin and --harness were given")
        return
    ran = subprocess.run([str(harness), str(plugin)], capture_output=True, text=True, timeout=120)
    report.add(name, "passed" if ran.returncode == 0 else "failed", output=(ran.stdout + ran.stderr)[-1500:])


def run_part(report: Report, name: str, part: Callable[[], object]) -> None:
    """Run one part; whatever it raises is its failure alone."""
    print(f"{name} …", flush=True)
    begin_s = time.monotonic()
    try:
        part()
    except Exception as error:
        report.add(name, "failed", problem=f"{type(error).__name__}: {error}"[:1500])
        traceback.print_exc()
    print(f"  {time.monotonic() - begin_s:.1f} s", flush=True)
    report.write()


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
    return found


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="the report (default: tools/results/gpu-check-DEVICE.json)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--small", action="store_true", help="small shapes alone, as under a sanitizer")
    parser.add_argument("--only-checks", action="store_true", help="no speeds, no sanitizer")
    parser.add_argument("--library", type=Path, help="a library that is built already")
    parser.add_argument("--shim", type=Path, help="check on the CPU, with the kernels built for the host")
    parser.add_argument("--plugin", type=Path, help="libgoslet_trt.so")
    parser.add_argument("--harness", type=Path, help="trt_harness, which drives it")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run it; 1 when something failed or nothing could be checked."""
    args = arguments().parse_args(words)
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
        kernels = Kernels(torch, library, "cpu" if args.shim is not None else "cuda")
        checks = Checks(kernels, report, _layout(), small=args.small or args.shim is not None)
        for part in (checks.wkv4, checks.wkv6, checks.wkv7, checks.product, checks.refusals):
            run_part(report, f"checks of {part.__name__}", part)
        if args.shim is None:
            run_part(report, "CUDA graphs", lambda: check_graphs(checks))
        if args.shim is None and not args.only_checks:
            run_part(report, "plugin", lambda: drive_plugin(report, args.plugin, args.harness))
            run_part(report, "speeds", lambda: measure(checks, args.quick))
            run_part(report, "compute-sanitizer", lambda: sanitize(report, library))
    counts = {
        status: sum(check["status"] == status for check in report.checks) for status in ("passed", "failed", "not run")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), flush=True)
    report.write()
    return 0 if report.passed else 1


def measure(checks: Checks, quick: bool) -> None:
    """Every speed that the report has."""
    speeds = Speeds(checks, quick)
    checks.report.machine["peak_copy_gb_s"] = speeds.peak / 1e9
    print(f"  a copy of 1 GB moves {speeds.peak / 1e9:.0f} GB/s", flush=True)
    for size in ("1.5B", "2.9B"):
        speeds.recurrences(size, (1, 8, 64))
        speeds.products(size, (1,), ((4, 32), (4, 64), (4, 128), (8, 32), (8, 128)))
        checks.report.write()
    speeds.products("1.5B", (2, 4, 8), ((4, 32), (8, 32)))
    if not quick:
        for size in ("0.1B", "0.4B"):
            speeds.recurrences(size, (1, 8))
            speeds.products(size, (1,), ((4, 32), (8, 32)))


if __name__ == "__main__":
    sys.exit(main())
