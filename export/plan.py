"""TensorRT plans from engines: lowered, built in a process of its own, and written beside the engine.

For the GPU at hand (``local``) and for TensorRT for RTX (``rtx``, which builds on machines without a GPU for any GPU
that it supports) the result is a plan. For a Jetson that is elsewhere (``orin``, ``thor``) it is the lowered ONNX model
and a ``trtexec`` line that tries and times it there: TensorRT builds plans on their own device only, and goslet runs
those that this module built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cuda_layout import PLUGIN_VERSION
from ..enginefile import EngineFile
from ..errors import BackendError, BackendUnavailableError, DependencyError, InputError, OutputError
from ..machine import Gpu, gpu
from ..output import atomic_write, check_output, hidden_folder, output_error
from ..planfile import INSTALL, RUNNABLE_TARGETS, PlanKey, beside, installed_package, write_plan
from ..trt_plugin import LIBRARY, find_plugin
from .streamed import check_name, data_path, save_beside, write_beside
from .trt_graph import PRECISIONS, WEIGHT_FORMS, in_place_states, lower, plugin_nodes

ELSEWHERE = ("orin", "thor")
TARGETS = (*RUNNABLE_TARGETS, *ELSEWHERE)
MAX_BATCH = 256
_RUNTIMES = {"local": "tensorrt", "rtx": "tensorrt_rtx"}
_TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # where JetPack has it, on no path

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PlanReport:
    """What was made.

    Attributes:
        path: the plan, or for a Jetson elsewhere the ONNX model.
        size_bytes: of the plan; of the model with its weights.
        plugin_layers: layers that our plugins run.
        tensorrt_version: what built it; empty for a model alone.
        build_s: seconds that the builder took; 0 for a model alone.
        warnings: what TensorRT warned of.
        command: the line that tries a model on its device; empty for a plan.
    """

    path: Path
    size_bytes: int
    plugin_layers: int
    tensorrt_version: str
    build_s: float
    warnings: tuple[str, ...]
    command: str


def build_plan(
    engine: str | os.PathLike[str],
    *,
    target: str,
    output: str | os.PathLike[str] | None = None,
    precision: str = "f16",
    weights: str | None = None,
    plugin: str | os.PathLike[str] | None = None,
    plain: bool = False,
    batch: int = 1,
    optimization_level: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PlanReport:
    """Build a plan, or for a device elsewhere write the graph.

    Args:
        engine: the engine file.
        target: ``local``, ``rtx``, ``orin`` or ``thor``.
        output: the file to write; None is the engine's name with ``.TARGET.plan`` or ``.TARGET.onnx``.
        precision: of the matrix products, f16 or bf16; the rest is float32.
        weights: ``qdq`` or ``plugin``, how 4-bit and 8-bit weights are used; None is plugin, and qdq with `plain`.
        plugin: the library libgoslet_trt.so; None looks for it as `goslet.trt_plugin.find_plugin` does. For a Jetson
            elsewhere, where it will lie there.
        plain: use TensorRT's own layers alone, and no `plugin`.
        batch: sessions that a step moves on together.
        optimization_level: TensorRT's own, 0 to 5; None is its default.
        overwrite: replace a file that exists.
        progress: called with a phase's name, the work done and all of it.

    Raises:
        ContainerError: the engine is damaged.
        InputError: an argument cannot be used.
        BackendUnavailableError: there is no plugin library, or for ``local`` no GPU.
        DependencyError: TensorRT's Python package is not installed.
        BackendError: TensorRT refuses the graph or cannot build it.
        OutputError: the output exists and `overwrite` is false, or cannot be written.
    """
    _check_arguments(target, precision, weights, batch, optimization_level, plain, plugin)
    form = weights or ("qdq" if plain else "plugin")
    elsewhere = target in ELSEWHERE
    source = Path(engine)
    path = beside(source, f"{target}.{'onnx' if elsewhere else 'plan'}") if output is None else Path(output)
    if elsewhere:
        check_name(data_path(path))
    # The output as it was written: a Path forgets a slash at the end.
    named = path if output is None else output
    for made in (named, data_path(path)) if elsewhere else (named,):
        check_output(made, overwrite)
        if os.path.realpath(made) == os.path.realpath(source):
            raise OutputError("is also the engine", file=made, remedy="choose another name")
    device = None
    if not elsewhere:
        if target == "local":
            device = _device()
        module = _module(target)
        if not plain:
            plugin = find_plugin(source, plugin)
    with EngineFile.open(source) as file:
        lowered = lower(file, precision=precision, batch=batch, weights=form, plugins=not plain)
        n_plugin_nodes, in_place = len(plugin_nodes(lowered.model)), in_place_states(lowered.model)
        if elsewhere:
            size_bytes = write_beside(lowered, path, overwrite, check=False)
            command = _trtexec(path, plugin, plain, optimization_level)
            return PlanReport(path, size_bytes, n_plugin_nodes, "", 0.0, (), command)
        # The builder works in a folder of its own, so that TensorRT meets no name of the user's: its own are UTF-8.
        with hidden_folder(path) as folder:
            work = Path(folder)
            try:
                with (work / "model.onnx.data").open("wb") as data:
                    (work / "model.onnx").write_bytes(save_beside(lowered, data, "model.onnx.data"))
            except OSError as error:
                raise output_error(error, path) from error
            request = {
                "module": module,
                "folder": folder,
                "timing_cache": os.path.abspath(_timing_path(path)) if target == "local" else None,
                "optimization_level": optimization_level,
            }
            result, warnings = _run_builder(request, plugin, progress or (lambda phase, done, total: None))
            key = PlanKey(
                model_id=file.model_id,
                weights_sha256=file.weights_sha256,
                target=target,
                runtime=_RUNTIMES[target],
                tensorrt_version=result["version"],
                device="" if device is None else device.name,
                capability="" if device is None else device.capability,
                plugin_version=0 if plain else PLUGIN_VERSION,
                precision=precision,
                weights=form,
                batch=batch,
            )
            with (
                (work / "plan").open("rb") as built,
                mmap.mmap(built.fileno(), 0, access=mmap.ACCESS_READ) as content,
                memoryview(content) as plan,
            ):
                write_plan(path, key, in_place, plan, overwrite=overwrite)
            if (work / "timing").exists():
                warnings += _keep_times(work / "timing", _timing_path(path))
    return PlanReport(
        path, result["size_bytes"], result["plugin_layers"], result["version"], result["build_s"], warnings, ""
    )


def _check_arguments(
    target: str,
    precision: str,
    weights: str | None,
    batch: int,
    level: int | None,
    plain: bool,
    plugin: str | os.PathLike[str] | None,
) -> None:
    for place, value, known in (("target", target, TARGETS), ("precision", precision, tuple(PRECISIONS))):
        if value not in known:
            raise InputError("is not known", place=place, expected=", ".join(known), found=repr(value))
    if weights is not None and weights not in WEIGHT_FORMS:
        raise InputError("is not known", place="weights", expected=", ".join(WEIGHT_FORMS), found=repr(weights))
    if plain and weights == "plugin":
        raise InputError("needs the plugin library", place="weights plugin", remedy="leave out --plain or --weights")
    if plain and plugin is not None:
        raise InputError("is not used in a plain plan", place="plugin", remedy="leave out --plain or --plugin")
    if not 1 <= batch <= MAX_BATCH:
        raise InputError("is out of range", place="batch", expected=f"1 to {MAX_BATCH}", found=batch)
    if level is not None and not 0 <= level <= 5:
        raise InputError("is out of range", place="optimization level", expected="0 to 5", found=level)


def _device() -> Gpu:
    device = gpu()
    if device is None:
        raise BackendUnavailableError(
            "there is no CUDA device here, for which a local plan is built",
            place="target local",
            remedy="build it on its device, or with --target rtx; for a Jetson that is elsewhere --target orin or thor "
            "writes the graph",
        )
    return device


def _module(target: str) -> str:
    runtime = _RUNTIMES[target]
    name = installed_package(runtime)
    if name is None:
        raise DependencyError(f"{runtime} is not installed, which builds plans for {target}", remedy=INSTALL[runtime])
    return name


def _timing_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.timing")


def _keep_times(times: Path, path: Path) -> tuple[str, ...]:
    """Publish what was timed, for the next build; what hinders that is a warning."""
    try:
        with atomic_write(path, overwrite=True) as file:
            file.write(times.read_bytes())
    except OutputError as error:
        return (f"the timing cache is not kept: {error}",)
    return ()


def _trtexec(path: Path, plugin: str | os.PathLike[str] | None, plain: bool, level: int | None) -> str:
    engine = f"{path.name.removesuffix('.onnx')}.engine"
    words = [_TRTEXEC, f"--onnx={path.name}", f"--saveEngine={engine}", "--stronglyTyped"]
    if level is not None:
        words.append(f"--builderOptimizationLevel={level}")
    if not plain:
        library = LIBRARY if plugin is None else os.fspath(plugin)
        # With a folder, or the loader would look for it in its own folders alone.
        words.append(f"--staticPlugins={library if '/' in library else f'./{library}'}")
    return shlex.join(words)


def _run_builder(
    request: dict[str, Any], plugin: str | os.PathLike[str] | None, progress: Progress
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The builder's result and warnings; it takes the library `plugin` by another name."""
    warnings: list[str] = []
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        # It changes its folder. Without an empty part, which would be the current one.
        known = [os.path.abspath(part) for part in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
        # Links, in a folder that surely can hold some.
        links = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="goslet-plan-")))
        if plugin is not None:
            (links / LIBRARY).symlink_to(os.path.realpath(plugin))
        libraries = importlib.util.find_spec("tensorrt_rtx_libs")
        if request["module"].startswith("tensorrt_rtx") and libraries is not None:
            known = [os.path.abspath(links), *_link_libraries(links, libraries), *known]
        if known:
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(known)
        # A file, since a pipe that nobody reads before the end may fill up.
        errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, os.path.abspath(Path(__file__).with_name("trt_builder.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        )
        stack.callback(process.kill)
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(
                json.dumps({**request, "plugin": None if plugin is None else os.path.abspath(links / LIBRARY)})
            )
            process.stdin.close()
        result = None
        for line in process.stdout:
            message = _message(line)
            if "phase" in message:
                progress(message["phase"], message["done"], message["total"])
            elif "warning" in message:
                warnings.append(message["warning"])
            elif "error" in message:
                of_plugin = message.get("of_plugin")
                raise BackendError(
                    f"TensorRT: {message['error']}"[:1200],
                    file=plugin if of_plugin else None,
                    remedy=f"build it with the headers of this TensorRT: tools/build_cuda --plugin {LIBRARY}"
                    if of_plugin
                    else "see the lowered graph: --target orin",
                )
            elif "result" in message:
                result = message["result"]
        if result is None:
            status = process.wait()
            errors.seek(0)
            said = errors.read()[-500:].strip().replace("\n", "; ")
            raise BackendError(
                f"TensorRT's builder ended without a plan (exit status {status}): {said}",
                remedy="it may have run out of memory; try fewer bits per weight",
            )
    return result, tuple(warnings)


def _message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _link_libraries(links: Path, package: Any) -> Iterator[str]:
    """Give TensorRT for RTX's libraries the names that they open each other by, without the version behind them."""
    for folder in package.submodule_search_locations or ():
        for library in Path(folder).glob("*.so.*"):
            (links / f"{library.name.partition('.so')[0]}.so").symlink_to(library)
        yield folder
