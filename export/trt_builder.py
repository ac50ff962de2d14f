"""Builds a TensorRT plan in a process of its own, which gets a request on its standard input.

A builder takes gigabytes, may end its process, and TensorRT for RTX opens its own library by a name that its package
does not have, for which the dynamic loader must know a folder before the process starts. So `goslet.export.plan`
starts this module and reads one JSON object a line: ``{"phase", "done", "total"}`` as the work goes on,
``{"warning"}``, and at the end ``{"result"}`` or ``{"error", "of_plugin"}``. It imports TensorRT's Python package and
nothing of goslet.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

# TensorRT's own names for how much is said; warnings and worse are passed on.
_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING")


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _SEVERITIES[:2]:
                self.errors.append(message)
            elif severity.name in _SEVERITIES:
                _say(warning=message)

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.totals[name] = steps
            _say(phase=name, done=0, total=steps)

        def step_complete(self, name: str, step: int) -> bool:
            _say(phase=name, done=step + 1, total=self.totals.get(name, 1))
            return True

        def phase_finish(self, name: str) -> None:
            total = self.totals.pop(name, 1)
            _say(phase=name, done=total, total=total)

    return Monitor()


def _read_times(config: Any, path: str) -> bool:
    """Let the builder begin with what was timed before; whether to keep there what is timed now.

    The times are a convenience: whatever is wrong with their file is a warning.
    """
    try:
        with open(path, "rb") as file:
            known = file.read()
    except FileNotFoundError:
        known = b""
    except OSError as error:
        _say(warning=f"the timing cache {path} cannot be read and is left alone: {error.strerror}")
        return False
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, True):
        _say(warning=f"{path} is no timing cache and is left alone")
        return False
    return True


class PluginError(RuntimeError):
    """The plugin library cannot be used."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build what a request describes, and write it where it says.

    Args:
        request: ``module`` (TensorRT's Python package), ``folder`` (with ``model.onnx``; ``plan`` is written there, and
            ``timing``), ``plugin`` (a library, or null), ``timing_cache`` (a file to begin with, or null),
            ``optimization_level`` (or null).

    Returns:
        ``version``, ``plugin_layers``, ``size_bytes`` and ``build_s``.

    Raises:
        RuntimeError: TensorRT says no; its own words are the message.
        PluginError: to the plugin library.
    """
    trt = importlib.import_module(request["module"])
    # Only now: Python may look for it by paths that begin in the folder in which goslet was started.
    os.chdir(request["folder"])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if request["plugin"] is not None and builder.get_plugin_registry().load_library(request["plugin"]) is None:
        reason = "; ".join(logger.errors)[-1000:] or "it gives no reason"
        raise PluginError(f"does not take the plugin library: {reason}")
    flags = trt.NetworkDefinitionCreationFlag
    # Version 11 knows nothing else than strongly typed networks, and may have lost the name.
    typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file("model.onnx"):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError("the parser refuses the graph: " + "; ".join(said or logger.errors)[:1000])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    keeps_times = request["timing_cache"] is not None and _read_times(config, request["timing_cache"])
    begin_s = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("; ".join(logger.errors)[-1000:] or "the builder gives no reason")
    with open("plan", "wb") as file:
        file.write(plan)
    times = config.get_timing_cache() if keeps_times else None
    if times is not None:
        with open("timing", "wb") as file:
            file.write(times.serialize())
    plugin_layers = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    return {
        "version": trt.__version__,
        "plugin_layers": plugin_layers,
        "size_bytes": plan.nbytes,
        "build_s": time.monotonic() - begin_s,
    }


def main() -> int:
    """Build what standard input asks for."""
    try:
        _say(result=build(json.load(sys.stdin)))
    except ImportError as error:
        _say(error=str(error), missing=error.name)
    except Exception as error:
        _say(error=str(error) or type(error).__name__, of_plugin=isinstance(error, PluginError))
    return 0


if __name__ == "__main__":
    sys.exit(main())
