#!/usr/bin/env python3
"""Measures the ONNX files in plain ONNX Runtime, without an option: time per token, and what rounded activations cost.

    tools/onnx_speed.py [--models 0.1b PATH …] [--quants int8 int4 int3] [--threads 2] [--rounds 20] [--json OUT]

A model is a released shape, with random weights, or a checkpoint. Every file is one session with default options but
for its threads; sessions take turns within a round, so that what else the machine does meets all of them, and the
share of f32's time is the median over rounds. ONNX Runtime multiplies integers with activations rounded to 8 bits
(accuracy level 4, its default); `activations_of_range` is the largest difference of a logit from the same file with
activations in float32, over the largest logit, when both go on from one state.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_checkpoint import SHAPES, random_rwkv7, save

from goslet.export import export_engine
from goslet.machine import available_cores, cpu_model

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

QUANTS = ("int8", "int4", "int3")
REFERENCE = "f32"
TOKENS_A_TURN = 8
COMPARED_TOKENS = 16


class Run:
    """A file in ONNX Runtime, and the state that it has come to."""

    def __init__(self, path: Path, threads: int, *, exact: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._metadata = self._session.get_modelmeta().custom_metadata_map
        self.state = self._begin()
        self.vocab_size = int(self._session.get_outputs()[0].shape[1])

    def _begin(self) -> dict[str, NDArray[np.float32]]:
        state = {}
        for name, (shape, value) in json.loads(self._metadata["goslet.state"]).items():
            tuned = self._metadata.get(f"goslet.state.{name}")
            one = np.full(shape, value, "<f4") if tuned is None else np.frombuffer(base64.b64decode(tuned), "<f4")
            state[f"state_in.{name}"] = one.reshape(1, *shape)
        return state

    def step(self, token: int) -> NDArray[np.float32]:
        """The logits [V] after a token."""
        logits, *after = self._session.run(None, {"token": np.array([token]), **self.state})
        self.state = dict(zip(self.state, after, strict=True))
        found: NDArray[np.float32] = logits[0]
        return found


def measure(model: str, quants: list[str], threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One model in f32 and in other formats."""
    checkpoint = Path(model)
    if model in SHAPES:
        checkpoint = folder / "model.pth"
        save(random_rwkv7(**SHAPES[model], dtype=torch.bfloat16), checkpoint)
    files = {}
    for quant in (REFERENCE, *quants):
        files[quant] = folder / f"{quant}.onnx"
        report = export_engine(
            checkpoint, folder / "x.goslet", quant=quant, onnx=files[quant], tokenizer="bytes", overwrite=True
        )
    runs = {quant: Run(path, threads) for quant, path in files.items()}
    times_s: dict[str, list[float]] = {quant: [] for quant in runs}
    tokens = np.random.default_rng(0).integers(0, runs[REFERENCE].vocab_size, TOKENS_A_TURN * (rounds + 1))
    for turn in tokens.reshape(-1, TOKENS_A_TURN):
        for quant, run in runs.items():
            start_s = time.perf_counter()
            for token in turn:
                run.step(int(token))
            times_s[quant].append((time.perf_counter() - start_s) / TOKENS_A_TURN)
    del runs
    results = {}
    for quant, found in times_s.items():
        shares = [
            own / plain for own, plain in zip(found[1:], times_s[REFERENCE][1:], strict=True)
        ]  # the first warms up
        results[quant] = {
            "file_bytes": sum(path.stat().st_size for path in folder.glob(f"{quant}.onnx*")),
            "ms_per_token": round(1e3 * statistics.median(found[1:]), 3),
            "of_f32": round(statistics.median(shares), 3),
        }
        if quant != REFERENCE:
            results[quant]["activations_of_range"] = round(rounding(files[quant], threads), 5)
    spec = report.spec
    return {
        "model": model if model in SHAPES else checkpoint.name,
        "weights": "random" if model in SHAPES else "trained",
        "shape": f"RWKV-{spec.version}, {spec.n_layer} layers, width {spec.n_embd}, vocabulary {spec.vocab_size}",
        "results": results,
    }


def rounding(path: Path, threads: int) -> float:
    """What rounding activations changes, of the range of the logits."""
    runs = [Run(path, threads), Run(path, threads, exact=True)]
    tokens = np.random.default_rng(1).integers(0, runs[0].vocab_size, COMPARED_TOKENS)
    error = largest = 0.0
    for token in tokens:
        runs[0].state = runs[1].state
        rounded, exact = (run.step(int(token)) for run in runs)
        error, largest = max(error, float(np.abs(rounded - exact).max())), max(largest, float(np.abs(exact).max()))
    return error / largest


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["0.1b", "0.4b"], metavar="M", help="shapes or checkpoints")
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=list(QUANTS))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(arguments)
    models = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            models.append(measure(model, options.quants, options.threads, options.rounds, Path(folder)))
        print(json.dumps(models[-1], indent=1), flush=True)
    if options.json is not None:
        report = {
            "machine": f"{cpu_model()}, {available_cores()} cores",
            "onnxruntime": onnxruntime.__version__,
            "threads": options.threads,
            "rounds": options.rounds,
            "models": models,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
