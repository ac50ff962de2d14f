"""The CUDA kernels against float64, with torch: through their C interface, or through anything that has its calls.

For ``tools/gpu_check.py``, which runs where there is neither goslet nor anything but torch and numpy.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
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


@dataclass
class Report:
    """What was found, written to a file after every part; only `finish` lets it have passed."""

    path: Path
    machine: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

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
        """Whether something was checked, nothing failed, and it came to its end."""
        found = [check["status"] for check in self.checks]
        return self.complete and "passed" in found and "failed" not in found

    def write(self) -> None:
        """Write the report as it stands, whole: what ends this process leaves the last one."""
        content = {
            "machine": self.machine, "complete": self.complete, "passed": self.passed, "checks": self.checks,
            "speeds": self.speeds,
        }  # fmt: skip
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def finish(self) -> None:
        """Write it for the last time, all parts behind it."""
        self.complete = True
        self.write()


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


@cache
def cuda_layout() -> Any:
    """`goslet.cuda_layout` from its file: goslet need not be installed here."""
    spec = importlib.util.spec_from_file_location("cuda_layout", ROOT / "runtime/cuda_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernels:
    """The C interface, called with torch's tensors."""

    label = ""  # before the name of each check
    state_kinds: tuple[int, ...] = (F32, F16)
    more_rows: tuple[int, ...] = ()  # a product's, besides 1 to 8

    def __init__(self, torch: Any, library: Path, device: str) -> None:
        self.torch = torch
        self.device = device
        self.types = (torch.float32, torch.float16, torch.bfloat16)
        self._library = ctypes.CDLL(str(library))

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
            explain = self._library.goslet_cuda_error
            explain.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {explain(code).decode()}")

    def version(self) -> int:
        """goslet_cuda_version; raises AttributeError where the library has none."""
        return int(self._library.goslet_cuda_version())

    def on_host(self) -> bool:
        """Whether these are the kernels as the host's model of CUDA runs them."""
        return hasattr(self._library, "goslet_cuda_host_order")

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

    def compare(self, name: str, found: Any, expected: Any, limit: float) -> None:
        """Note whether `found` is within `limit` of float64's `expected`, as a part of its largest number."""
        size = float(expected.abs().max()) or 1.0
        error = float((found.double() - expected).abs().max()) / size
        self.note(name, error <= limit, error=error, limit=limit)

    def same(self, name: str, one: Any, other: Any) -> None:
        """Note whether two results are the same to the last bit."""
        self.note(name, self.torch.equal(one, other))

    def note(self, name: str, passed: bool, **more: Any) -> None:
        """Note a check of these kernels."""
        self.report.add(f"{self.kernels.label}{name}", "passed" if passed else "failed", **more)

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
            for state_kind in self.kernels.state_kinds:
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
                        for n_rows in (1, 3 if n_in < 2000 else 2, 8, *self.kernels.more_rows):
                            x = self.normal(n_rows, n_in, kind=kind)
                            y = self.poisoned(self.torch.empty(n_rows, n_out, device=x.device, dtype=x.dtype))
                            self.kernels.product(kind, bits, group, n_out, x, weights, scales, y)
                            name = f"product int{bits} group {group} {TYPE_NAMES[kind]} {n_rows}x{n_in}x{n_out}"
                            expected = x.double() @ matrix.T
                            # What is summed, and so what float sums lose, can be far larger than the sum.
                            summed = float((x.double().abs() @ matrix.abs().T).max() / expected.abs().max())
                            self.compare(name, y, expected, FLOAT_SUMS * summed + OUTPUT_ROUNDING[kind])

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
                self.note(f"refusal of {name}", False, problem="it was taken")
            except RuntimeError as error:
                self.note(f"refusal of {name}", bool(self.torch.isnan(y).all()), message=str(error))


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
