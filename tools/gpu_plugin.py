"""The TensorRT plugins against float64, driven by csrc/trt/trt_harness.cpp as TensorRT does, where there is none.

The harness holds what a plugin answers to the tensors that it is given (types, shapes, formats, fields, copies); the
numbers that it computes are held to the same references as those of the kernels' C interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_kernels import F16, F32, Checks, Kernels, check_graphs, run_part

PLUGINS = ("Wkv4", "Wkv5", "Wkv6", "Wkv7", "GosletProduct")


class _Tensor(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("n_dims", ctypes.c_int32), ("dims", ctypes.c_int64 * 8))


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int32))


class PluginKernels(Kernels):
    """The plugins, called as the kernels are: each for shapes, types and fields that are new is made, checked and kept.

    Attributes:
        names: the plugins of the library.

    Raises (also every call):
        RuntimeError: what the harness found wrong.
        OSError: the harness cannot be loaded.
    """

    label = "plugin "
    state_kinds = (F32,)
    more_rows = (17,)  # the plugin starts the kernel for each 8

    def __init__(self, torch: Any, harness: Path, plugin: Path, device: str) -> None:
        super().__init__(torch, harness, device)
        self._made: dict[Any, ctypes.c_void_p] = {}
        self._type_codes = {
            torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.bfloat16: 7,
        }  # fmt: skip
        self._plugins = ctypes.c_void_p()
        names = ctypes.c_char_p()
        self._ask(str(plugin), "open", str(plugin).encode(), ctypes.byref(self._plugins), ctypes.byref(names))
        self.names = (names.value or b"").decode().split()

    def _ask(self, subject: str, what: str, *arguments: Any) -> None:
        function = getattr(self._library, f"goslet_harness_{what}")
        function.restype = ctypes.c_char_p
        problem = function(*arguments)
        if problem is not None:
            raise RuntimeError(f"{subject}: {problem.decode(errors='replace')}")

    def _described(self, tensors: Sequence[Any]) -> ctypes.Array[_Tensor]:
        return (_Tensor * len(tensors))(
            *(_Tensor(self._type_codes[part.dtype], part.ndim, (ctypes.c_int64 * 8)(*part.shape)) for part in tensors)
        )

    def make(self, name: str, fields: dict[str, int], inputs: Sequence[Any], outputs: Sequence[Any]) -> ctypes.c_void_p:
        """A plugin for tensors of these shapes and types, its whole life before checked by the harness."""
        key = (name, *fields.items(), *((part.dtype, part.shape) for part in (*inputs, *outputs)))
        if key not in self._made:
            made = ctypes.c_void_p()
            given = (_Field * len(fields))(*(_Field(field.encode(), value) for field, value in fields.items()))
            self._ask(
                name, "make", self._plugins, name.encode(), given, len(given), self._described(inputs), len(inputs),
                self._described(outputs), len(outputs), ctypes.byref(made),
            )  # fmt: skip
            self._made[key] = made
        return self._made[key]

    def drive(self, name: str, fields: dict[str, int], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Start a plugin on the current stream. An output may be an input."""
        made = self.make(name, fields, inputs, outputs)
        pointers = [(ctypes.c_void_p * len(part))(*(t.data_ptr() for t in part)) for part in (inputs, outputs)]
        self._ask(name, "enqueue", made, *pointers, ctypes.c_void_p(self._stream()))

    def close(self) -> None:
        """Free the plugins that were made."""
        while self._made:
            self._library.goslet_harness_free(self._made.popitem()[1])

    def wkv4(
        self, kind: int, k: Any, v: Any, w: Any, u: Any, state: tuple[Any, ...], y: Any, new: tuple[Any, ...]
    ) -> None:
        """Wkv4; `kind` is k's type."""
        self.drive("Wkv4", {}, (k, v, w, u, *state), (y, *new))

    def wkv6(
        self, kind: int, state_kind: int, r: Any, k: Any, v: Any, w: Any, u: Any, state: Any, y: Any, new: Any
    ) -> None:
        """Wkv6, or Wkv5 where w is [H, N]."""
        self.drive("Wkv6" if w.ndim == 3 else "Wkv5", {}, (r, k, v, w, u, state), (y, new))

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
        """Wkv7."""
        self.drive("Wkv7", {}, (r, w, k, v, kappa, a, state), (y, new))

    def product(self, kind: int, bits: int, group: int, n_out: int, x: Any, weights: Any, scales: Any, y: Any) -> None:
        """GosletProduct; the weights' bytes as words, as the graph has them."""
        words = weights.view(self.torch.int32)
        self.drive("GosletProduct", {"bits": bits, "group": group}, (x, words, scales), (y,))


def drive_plugin(kernel_checks: Checks, plugin: Path, harness: Path) -> None:
    """Check every plugin of a library on the device of `kernel_checks`, into its report."""
    report = kernel_checks.report
    missing = [path.name for path in (plugin, harness) if not path.exists()]
    if missing:
        report.add("TensorRT plugins", "not run", reason=f"{' and '.join(missing)} not there: see tools/build_cuda")
        return
    kernels = kernel_checks.kernels
    found: list[PluginKernels] = []
    run_part(
        report,
        "plugins are opened",
        lambda: found.append(PluginKernels(kernels.torch, harness, plugin, kernels.device)),
    )
    if not found:
        return
    checks = Checks(found[0], report, kernel_checks.layout, small=True)
    checks.note("names", sorted(found[0].names) == sorted(PLUGINS), found=" ".join(found[0].names))
    parts: list[Callable[[], None]] = [checks.wkv4, checks.wkv6, checks.wkv7, checks.product]
    for part in parts:
        run_part(report, f"checks of plugins: {part.__name__}", part)
    run_part(report, "checks of plugins: refusals", lambda: refusals(checks, found[0]))
    if kernels.device != "cpu":
        run_part(report, "CUDA graphs of plugins", lambda: check_graphs(checks))
    found[0].close()


def refusals(checks: Checks, kernels: PluginKernels) -> None:
    """What does not fit is one line, from the plugin or from the harness, and nothing is written."""
    torch = checks.torch
    x, y = checks.normal(2, 64, kind=F16), checks.poisoned(checks.normal(2, 48, kind=F16))
    packed, scales, _ = checks.made_weights(4, 32, 64, 48)
    words = packed.view(torch.int32)
    fields, inputs = {"bits": 4, "group": 32}, (x, words, scales)
    odd = checks.normal(1, 129, kind=F16).reshape(-1)[1:].reshape(2, 64)
    vectors = [checks.normal(1, 2, 64, kind=F32) for _ in range(6)]
    state = checks.normal(1, 2, 64, 64, kind=F32)
    name = "GosletProduct"
    cases: dict[str, tuple[str, dict[str, int], Sequence[Any], Sequence[Any], str]] = {
        "another name": ("Wkv8", {}, inputs, (y,), "no plugin of this name"),
        "3 bits": (name, {**fields, "bits": 3}, inputs, (y,), "no plugin is made"),
        "a group of 16": (name, {**fields, "group": 16}, inputs, (y,), "no plugin is made"),
        "no group": (name, {"bits": 4}, inputs, (y,), "no plugin is made"),
        "a field that is not named": (name, {**fields, "rows": 1}, inputs, (y,), "does not name"),
        "an output too many": (name, fields, inputs, (y, y), "outputs"),
        "an output of another shape": (name, fields, inputs, (y[:, :16],), "shape"),
        "an output of another type": (name, fields, inputs, (y.float(),), "type"),
        "an input too few": (name, fields, inputs[:2], (y,), "fails"),
        "scales of another type": (name, fields, (x, words, scales.float()), (y,), "place 2"),
        "int8 activations": (name, fields, (x.to(torch.int8), words, scales), (y.to(torch.int8),), "place 0"),
        "an unaligned x": (name, fields, (odd, words, scales), (y,), "enqueue gives -4"),
        "scales of fewer outputs": (name, fields, (x, words, scales[:-1]), (y,), "onShapeChange"),
        "weights of more inputs": (name, fields, (x, torch.cat([words, words], 1), scales), (y,), "onShapeChange"),
        "scales of fewer inputs": (name, fields, (x, words, scales[:, :-1].contiguous()), (y,), "onShapeChange"),
        "weights with an axis more": (name, fields, (x, words[:, :, None], scales), (y,), "onShapeChange"),
        "a vector of another head": (
            "Wkv7",
            {},
            (*vectors[:5], vectors[5][:, :1], state),
            (vectors[0], state),
            "onShapeChange",
        ),
        "a state of other heads": ("Wkv7", {}, (*vectors, state[:, :1]), (vectors[0], state), "onShapeChange"),
        "33 inputs": (name, fields, (checks.normal(2, 33, kind=F16), words, scales), (y,), "enqueue gives -2"),
    }
    for case, (plugin, given, ins, outs, words_of_it) in cases.items():
        try:
            kernels.drive(plugin, given, ins, outs)
            checks.note(f"refusal of {case}", False, problem="it was taken")
        except RuntimeError as error:
            fits = words_of_it in str(error) and bool(torch.isnan(y).all())
            checks.note(f"refusal of {case}", fits, message=str(error))
