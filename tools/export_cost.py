#!/usr/bin/env python3
"""Measures what an export costs: time and memory at the released shapes, with random weights.

    tools/export_cost.py [--models 7-0.1b 7-0.4b …] [--gguf] [--quant int4] [--work DIR] [--json OUT]

For each model a bf16 checkpoint with random weights is written, with --gguf made into a GGUF file in F16, exported in a
process of its own, and the engine decodes a few tokens. Memory is read every 20 ms while the export runs:
`peak_anonymous_bytes` is what the process allocated, torch and the tracing of the graph included (`imports_bytes` is
what importing alone takes), and `peak_resident_bytes` counts the pages of the checkpoint that it mapped too, which the
system takes back when it needs them.
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
from gguf_rwkv7 import write_gguf
from random_checkpoint import SHAPES, random_rwkv4, random_rwkv7, save

import goslet
from goslet.machine import available_cores, cpu_model

MODELS = ("4-169m", "7-0.1b", "7-0.4b", "7-1.5b", "7-2.9b")
INTERVAL_S = 0.02
IMPORT = "import sys; from goslet.export import export_engine; "
EXPORT = IMPORT + "export_engine(sys.argv[1], sys.argv[2], quant=sys.argv[3])"


def write_checkpoint(model: str, path: Path) -> None:
    """Write a random checkpoint in bf16."""
    if model == "4-169m":
        save(random_rwkv4(n_layer=12, n_embd=768, dtype=torch.bfloat16), path)
    else:
        save(random_rwkv7(**SHAPES[model.removeprefix("7-")], dtype=torch.bfloat16), path)


def memory_bytes(process_id: int) -> dict[str, int]:
    """Resident memory of a process by kind (Linux); nothing when it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon") if key in fields}


def peak_memory_bytes(code: str, *words: object) -> dict[str, int]:
    """The largest resident memory by kind of a Python process that runs `code` with these arguments."""
    peak: dict[str, int] = {}
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)]) as process:
        while process.poll() is None:
            for key, value in memory_bytes(process.pid).items():
                peak[key] = max(peak.get(key, 0), value)
            time.sleep(INTERVAL_S)
    if process.returncode != 0:
        raise SystemExit("the export failed")
    return peak


def measure(model: str, quant: str, folder: Path, as_gguf: bool) -> dict[str, Any]:
    """Export one model and decode a few tokens with it."""
    checkpoint, engine_path = folder / f"{model}.pth", folder / f"{model}.goslet"
    write_checkpoint(model, checkpoint)
    if as_gguf:
        original, checkpoint = checkpoint, folder / f"{model}.gguf"
        write_gguf(original, checkpoint)
        original.unlink()
    start_s = time.monotonic()
    peak = peak_memory_bytes(EXPORT, checkpoint, engine_path, quant)
    duration_s = time.monotonic() - start_s
    with goslet.open(engine_path) as engine:
        session = engine.session()
        logits = session.feed([1, 2, 3])
        spec = engine.spec
    largest = 4 * spec.vocab_size * spec.n_embd
    result = {
        "model": model,
        "quant": quant,
        "checkpoint": "GGUF F16" if as_gguf else "pth bf16",
        "checkpoint_bytes": checkpoint.stat().st_size,
        "engine_bytes": engine_path.stat().st_size,
        "largest_tensor_float32_bytes": largest,
        "duration_s": round(duration_s, 1),
        "imports_bytes": peak_memory_bytes(IMPORT)["RssAnon"],
        "peak_anonymous_bytes": peak["RssAnon"],
        "peak_resident_bytes": peak["VmRSS"],
        "logits_finite": bool(abs(logits).max() < float("inf")),
    }
    checkpoint.unlink()
    engine_path.unlink()
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--gguf", action="store_true", help="export from GGUF; RWKV-7 alone")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--work", type=Path, help="a folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for model in options.models:
            results.append(measure(model, options.quant, Path(folder), options.gguf))
            print(json.dumps(results[-1]), flush=True)
    if options.json is not None:
        report = {"machine": f"{cpu_model()}, {available_cores()} cores", "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
