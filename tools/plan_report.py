#!/usr/bin/env python3
"""Measures what building a TensorRT plan costs, with TensorRT for RTX, which needs no GPU for it: time, memory, size.

    tools/plan_report.py [--models 0.1b 1.5b] [--work DIR] [--json OUT]

Random weights of RWKV-7's released shapes, in int4. Each is built with our plugins (libgoslet_trt.so, which
tools/build_cuda --plugin makes first and needs nvcc and TensorRT's headers for) and with TensorRT's own layers alone.
`lowering_peak_bytes` is the largest resident memory of the process that writes the graph, pages of the engine that it
mapped included; `builder_peak_bytes` that of TensorRT's builder. Nothing is run: that takes a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES, random_rwkv7, save

from goslet.enginefile import EngineFile
from goslet.export import export_engine
from goslet.machine import available_cores, cpu_model
from goslet.spec import EMBEDDING

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own, so that its memory is that of this one build.
BUILD = """
import json, resource, sys
from goslet.export.plan import build_plan
engine, output, plugin = sys.argv[1:]
report = build_plan(engine, target="rtx", output=output, plugin=plugin or None, plain=not plugin)
# Not getrusage's own: that of a child begins with its parent's.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "plan_bytes": report.size_bytes,
    "plugin_layers": report.plugin_layers,
    "tensorrt_rtx_version": report.tensorrt_version,
    "warnings": list(report.warnings),
    "builder_s": round(report.build_s, 1),
    "lowering_peak_bytes": int(peak.split()[1]) * 1024,
    "builder_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
}))
"""


def build_plugin(path: Path) -> None:
    """Build the plugin library for one kind of GPU, which is enough to build plans."""
    made = subprocess.run([ROOT / "tools/build_cuda", "--plugin", path, "89"], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"the plugin library cannot be built: {made.stderr.strip().splitlines()[-1]}")


def measure(model: str, folder: Path, plugin: Path) -> list[dict[str, Any]]:
    """Build one shape's plans, with plugins and without."""
    checkpoint, engine = folder / "x.pth", folder / "x.goslet"
    save(random_rwkv7(**SHAPES[model], dtype=torch.bfloat16), checkpoint)
    export_engine(checkpoint, engine, quant="int4", tokenizer=None)
    checkpoint.unlink()
    with EngineFile.open(engine) as file:
        weights_bytes = sum(
            entry.size_bytes + entry.scales_size_bytes for name, entry in file.tensors.items() if name != EMBEDDING
        )
    results = []
    for library in (plugin, None):
        output = folder / "x.plan"
        begin_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", BUILD, engine, output, library or ""], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{model}: the build failed: {done.stderr.strip().splitlines()[-1]}")
        result = {"model": model, "quant": "int4", "weights": "random", "weights_bytes": weights_bytes}
        result |= {"plugins": library is not None, "whole_s": round(time.monotonic() - begin_s, 1)}
        results.append(result | json.loads(done.stdout))
        output.unlink()
    engine.unlink()
    return results


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["0.1b", "1.5b"])
    parser.add_argument("--work", type=Path, help="a folder for the engines and plans (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        plugin = Path(folder) / "libgoslet_trt.so"
        build_plugin(plugin)
        for model in options.models:
            for result in measure(model, Path(folder), plugin):
                results.append(result)
                print(json.dumps(result), flush=True)
    if options.json is not None:
        report = {"machine": f"{cpu_model()}, {available_cores()} cores, no GPU", "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
