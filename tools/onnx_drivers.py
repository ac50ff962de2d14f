#!/usr/bin/env python3
"""How runtimes take an ONNX step; tools/onnx_runtimes.py runs this file with the Python of each one's environment.

A driver loads a model and gives its step, a function from inputs to outputs by name. This file imports numpy and,
within a driver, that driver's runtime, and nothing of goslet.

    onnx_drivers.py DRIVER MODEL.onnx TASK.npz [FLAG...]

A task holds ``tokens`` [T], what a text begins with under ``state_in.NAME``, and what is right: ``logits`` [T, V], and
``state_out.NAME`` after the last token. What is printed is one JSON object: the largest errors of logits and states,
each as a part of its range, and the seconds that loading and all tokens took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Step = Callable[[Arrays], Arrays]
STATE_IN, STATE_OUT = "state_in.", "state_out."


def onnxruntime(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """ONNX Runtime; flags are session options, KEY=VALUE."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.log_severity_level = 4
    for flag in flags:
        options.add_session_config_entry(*flag.split("=", 1))
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: dict(zip(outputs, session.run(outputs, inputs), strict=True))


def reference(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda inputs: dict(zip(outputs, evaluator.run(outputs, inputs), strict=True))


def openvino(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """OpenVINO's CPU plugin; flags are properties, KEY=VALUE."""
    import openvino as runtime

    compiled = runtime.Core().compile_model(str(path), "CPU", dict(flag.split("=", 1) for flag in flags))

    def step(inputs: Arrays) -> Arrays:
        found = compiled(inputs)
        return {name: np.array(found[name]) for name in outputs}

    return step


def tract(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """tract, which knows outputs by their order."""
    import tract as runtime

    model = runtime.onnx().load(str(path)).into_model()
    inputs_in_order = [model.input_name(index) for index in range(model.input_count())]
    runnable = model.into_runnable()

    def step(inputs: Arrays) -> Arrays:
        found = runnable.run([inputs[name] for name in inputs_in_order])
        return {name: value.to_numpy() for name, value in zip(outputs, found, strict=True)}

    return step


def tinygrad(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """tinygrad on the CPU, for which it needs clang."""
    os.environ["DEV"] = "CPU"
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    runner = OnnxRunner(str(path))

    def step(inputs: Arrays) -> Arrays:
        found = runner({name: Tensor(value) for name, value in inputs.items()})
        return {name: found[name].numpy() for name in outputs}

    return step


def mnn(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """MNN, whose converter writes a file beside the model; flags are the converter's."""
    import MNN

    converted = path.with_suffix(".mnn")
    _execute("mnnconvert", "-f", "ONNX", "--modelFile", path, "--MNNModel", converted, "--bizCode", "goslet", *flags)
    modules: list[Any] = []

    def given(value: NDArray[Any]) -> Any:
        is_token = value.dtype == np.int64
        array = np.ascontiguousarray(value, np.int32 if is_token else np.float32)
        return MNN.expr.const(array, list(value.shape), MNN.expr.NCHW, MNN.expr.int if is_token else MNN.expr.float)

    def step(inputs: Arrays) -> Arrays:
        if not modules:
            modules.append(MNN.nn.load_module_from_file(str(converted), list(inputs), outputs))
        found = modules[0].forward([given(value) for value in inputs.values()])
        return {name: np.array(value.read()) for name, value in zip(outputs, found, strict=True)}

    return step


def iree(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """IREE for the CPU; its function has the graph's name and takes and gives by order; flags are the compiler's."""
    import iree.compiler
    import iree.runtime
    import onnx

    imported = path.with_suffix(".mlir")
    _execute("iree-import-onnx", path, "-o", imported)
    binary = iree.compiler.compile_file(
        str(imported), target_backends=["llvm-cpu"], input_type="onnx", extra_args=list(flags)
    )
    graph = onnx.load(path, load_external_data=False).graph
    function = getattr(iree.runtime.load_vm_flatbuffer(binary, driver="local-sync"), graph.name)
    inputs_in_order = [value.name for value in graph.input]

    def step(inputs: Arrays) -> Arrays:
        found = function(*(inputs[name] for name in inputs_in_order))
        return {name: value.to_host() for name, value in zip(outputs, found, strict=True)}

    return step


def tvm(path: Path, outputs: list[str], flags: Sequence[str]) -> Step:
    """TVM's relax for the CPU."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    module = relax.transform.LegalizeOps()(from_onnx(model, keep_params_in_input=False))
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    inputs_in_order = [value.name for value in model.graph.input]

    def step(inputs: Arrays) -> Arrays:
        found = machine["main"](*(tvm.runtime.tensor(inputs[name]) for name in inputs_in_order))
        return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}

    return step


DRIVERS: dict[str, Callable[[Path, list[str], Sequence[str]], Step]] = {
    driver.__name__: driver for driver in (onnxruntime, reference, openvino, tract, tinygrad, mnn, iree, tvm)
}


def _execute(program: str, *words: object) -> None:
    """Run a program of this Python's environment."""
    subprocess.run([Path(sys.executable).with_name(program), *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found.reshape(expected.shape) - expected).max() / (np.abs(expected).max() or 1.0))


def main(driver: str, model: str, task: str, *flags: str) -> None:
    """Feed a task's tokens one by one, every state output becoming the next token's input, and print the errors."""
    with np.load(task) as archive:
        given: Arrays = dict(archive)
    states = [name.removeprefix(STATE_OUT) for name in given if name.startswith(STATE_OUT)]
    start_s = time.monotonic()
    step = DRIVERS[driver](Path(model), ["logits", *(STATE_OUT + name for name in states)], flags)
    loaded_s = time.monotonic()
    state = {STATE_IN + name: given[STATE_IN + name] for name in states}
    logits = []
    for token in given["tokens"]:
        found = step({"token": np.array([token], np.int64), **state})
        logits.append(np.array(found["logits"]).reshape(-1))
        state = {
            name: np.array(found[STATE_OUT + name.removeprefix(STATE_IN)], np.float32).reshape(old.shape)
            for name, old in state.items()
        }
    found_error = {
        "logits": _error(np.stack(logits), given["logits"]),
        "state": max(_error(state[STATE_IN + name], given[STATE_OUT + name]) for name in states),
        "load_s": round(loaded_s - start_s, 3),
        "tokens_s": round(time.monotonic() - loaded_s, 3),
    }
    print(json.dumps(found_error))


if __name__ == "__main__":
    main(*sys.argv[1:])
