#!/usr/bin/env python3
"""Which runtimes take goslet's ONNX files, and whether their numbers are right.

A random RWKV-7 of three layers is exported in float32 and int4, in both forms of ``--onnx-form``. Each runtime gets a
virtual environment of its own in a temporary folder, with the packages pinned here, and reads twenty tokens in a
process of its own (tools/onnx_drivers.py); what is right comes from the engine's graph, executed in float32. A model is
tried with its batch open, then with a batch of 1, and then with the runtime's flags; the first way that is right
counts.

    tools/onnx_runtimes.py [--only NAME,NAME]

writes tools/reports/onnx-runtimes.json and .md; with --only, what is there of the others stays. It takes half an hour
and some gigabytes of packages. A runtime that cannot be installed, or that needs what is not here, is said so in the
table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import random_rwkv7, save

from goslet.backends.ort import OrtBackend
from goslet.enginefile import EngineFile
from goslet.export import export_engine
from goslet.session import Engine

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = Path(__file__).with_name("onnx_drivers.py")
NODE_DRIVER = Path(__file__).with_name("onnx_driver.mjs")
REPORT = ROOT / "tools" / "reports" / "onnx-runtimes.json"
SHAPE: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "head_size": 32, "vocab_size": 300}
RANKS: dict[str, Any] = {"rank_w": 16, "rank_a": 32, "rank_v": 16, "rank_g": 48}
SEED = 7
N_TOKENS = 20
QUANTS = ("f32", "int4")
FORMS = ("portable", "onnxruntime")
BATCHES = (None, 1)
# Other orders of the same sums give 1e-6; a precision below float32 gives 1e-3 and more.
RIGHT = 1e-5
INSTALL_LIMIT_S, RUN_LIMIT_S = 900, 600


@dataclass(frozen=True)
class Runtime:
    """A runtime, and what it takes to run it.

    Attributes:
        name: as people call it.
        version: its version.
        driver: the function of tools/onnx_drivers.py; or an npm package, which tools/onnx_driver.mjs runs in Node.
        packages: what is installed for it, from PyPI or npm.
        flags: what it needs for float32's numbers, in the driver's words.
        needs: a program that must be here.
    """

    name: str
    version: str
    driver: str
    packages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    needs: str | None = None

    @property
    def in_node(self) -> bool:
        """Whether it is JavaScript's."""
        return self.needs == "node"


RUNTIMES = (
    Runtime("ONNX Runtime", "1.32.0", "onnxruntime", ("onnxruntime==1.32.0",)
            , ("session.disable_quant_qdq=1",)),
    Runtime("ONNX Runtime", "1.23.2", "onnxruntime", ("onnxruntime==1.23.2",), ("session.disable_quant_qdq=1",)),
    Runtime(
        "ONNX Runtime Web (wasm, in Node)",
        "1.30.0",
        "onnxruntime-web",
        ("onnxruntime-web@1.30.0",),
        ("disable_quant_qdq=1",),
        needs="node",
    ),
    Runtime("onnx ReferenceEvaluator", "1.23.2", "reference", ("onnx==1.23.2",)),
    Runtime(
        "OpenVINO",
        "2026.4.1",
        "openvino",
        ("openvino==2026.4.1",),
        ("INFERENCE_PRECISION_HINT=f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE=0"),
    ),
    Runtime("tract", "0.23.9", "tract", ("tract==0.23.9",)),
    Runtime("tinygrad", "0.14.0", "tinygrad", ("tinygrad==0.14.0",), needs="clang"),
    Runtime("MNN", "3.6.1", "mnn", ("MNN==3.6.1",)),
    Runtime(
        "IREE", "3.13.0", "iree", ("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0", "onnx==1.23.2")
    ),
    Runtime("TVM", "0.27.0", "tvm", ("apache-tvm==0.27.0", "onnx==1.23.2")),
)  # fmt: skip
NUMPY = "numpy==2.4.6"


def make_models(folder: Path) -> None:
    """Write the models ``QUANT-FORM[-batch1].onnx`` and the tasks ``QUANT.npz``."""
    checkpoint = folder / "random.pth"
    save(random_rwkv7(**SHAPE, **RANKS, seed=SEED), checkpoint)
    tokens = np.random.default_rng(SEED).integers(0, SHAPE["vocab_size"], N_TOKENS)
    for quant in QUANTS:
        engine = folder / f"{quant}.goslet"
        for form in FORMS:
            for batch in BATCHES:
                path = folder / model_name(quant, form, batch)
                export_engine(
                    checkpoint, engine, quant=quant, onnx=path, onnx_form=form, onnx_batch=batch, overwrite=True
                )
        write_task(engine, tokens, folder / f"{quant}.npz")


def model_name(quant: str, form: str, batch: int | None) -> str:
    """A model's file."""
    return f"{quant}-{form}{'' if batch is None else f'-batch{batch}'}.onnx"


def write_task(engine: Path, tokens: np.ndarray, path: Path) -> None:
    """Write tokens, and what an engine's graph makes of them in float32, for tools/onnx_drivers.py."""
    with EngineFile.open(engine) as file:
        session = Engine(file, OrtBackend(file, 1, exact=True), None).session()
        begin = {f"state_in.{name}": view[None].copy() for name, view in session.state.front.items()}
        logits = session.feed(tokens, all_logits=True)
        end = {f"state_out.{name}": view[None] for name, view in session.state.front.items()}
        task: dict[str, Any] = {"tokens": tokens, "logits": logits, **begin, **end}
        np.savez(path, **task)
    as_lists = {name: {"shape": array.shape, "values": array.reshape(-1).tolist()} for name, array in task.items()}
    path.with_suffix(".json").write_text(json.dumps(as_lists))


def run_driver(
    python: str | Path, driver: str, model: Path, task: Path, flags: tuple[str, ...] = (), limit_s: float = RUN_LIMIT_S
) -> dict[str, Any]:
    """What one of tools/onnx_drivers.py makes of one model.

    Returns:
        What it prints, or ``said``: the last line of why it does not.
    """
    return _answer([str(python), str(DRIVERS), driver, str(model), str(task), *flags], limit_s)


def run_in_node(folder: Path, package: str, model: Path, task: Path, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """As `run_driver`, by an npm package that is installed in a folder."""
    words = ["node", str(NODE_DRIVER), package, str(model), str(task.with_suffix(".json")), *flags]
    return _answer(words, RUN_LIMIT_S, folder)


def _answer(words: list[str], limit_s: float, folder: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit_s, env=environment, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired:
        return {"said": f"no answer within {limit_s:.0f} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode < 0:
        return {"said": "no answer"}
    return {"said": _last_words(done.stderr)}


def _last_words(stderr: str) -> str:
    """The last line that speaks of an error, without folders of this machine."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|NotImplemented): ", line)]
    errors = [line for line in raised or lines if "rror" in line and "CalledProcessError" not in line]
    return re.sub(r"(?:/[\w.+-]+)+/", "", (errors or lines or ["no answer"])[-1])[:200]


def is_right(found: dict[str, Any]) -> bool:
    """Whether numbers came, and are those of float32."""
    return "said" not in found and all(
        math.isfinite(found[what]) and found[what] <= RIGHT for what in ("logits", "state")
    )


def attempts(runtime: Runtime, place: Path, folder: Path, quant: str, form: str) -> list[dict[str, Any]]:
    """The ways in which a model was tried, until one was right."""
    tried: list[dict[str, Any]] = []
    for flags in ((), runtime.flags) if runtime.flags else ((),):
        for batch in BATCHES:
            run = run_in_node if runtime.in_node else run_driver
            found = run(place, runtime.driver, folder / model_name(quant, form, batch), folder / f"{quant}.npz", flags)
            tried.append({"batch": batch, "flags": list(flags), "right": is_right(found), **found})
            if tried[-1]["right"]:
                return tried
            if "said" not in found:
                break  # it runs, and a fixed batch makes no numbers better
    return tried


def measure(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """One runtime's entry in the report."""
    entry: dict[str, Any] = {"runtime": runtime.name, "version": runtime.version, "packages": list(runtime.packages)}
    if runtime.needs is not None and shutil.which(runtime.needs) is None:
        return {**entry, "not_run": f"needs {runtime.needs}, which is not here"}
    environment = folder / f"{runtime.driver}-{runtime.version}"
    python = environment / "bin" / "python"
    steps: list[list[str | Path]]
    if runtime.in_node:
        environment.mkdir()
        steps = [["npm", "install", "--prefix", environment, "--no-audit", "--no-fund", *runtime.packages]]
    else:
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = [[sys.executable, "-m", "venv", environment], [*pip, NUMPY, *runtime.packages]]
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=INSTALL_LIMIT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return {**entry, "not_run": f"cannot be installed: {lines[-1] if lines else 'no answer'}"}
    place = environment if runtime.in_node else python
    entry["models"] = {
        f"{form} {quant}": attempts(runtime, place, folder, quant, form) for form in FORMS for quant in QUANTS
    }
    shutil.rmtree(environment)
    return entry


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    columns = [f"{form} {quant}" for form in FORMS for quant in QUANTS]
    lines = [
        f"RWKV-7, {report['shape']['n_layer']} layers of {report['shape']['n_embd']}, {N_TOKENS} tokens; the largest "
        "error of logits or state as a part of its range, against the engine's graph in float32. Up to "
        f"{RIGHT:g} the order of sums explains in this random model; more is called wrong. Made by "
        "`tools/onnx_runtimes.py`.",
        "",
        f"| runtime | version | {' | '.join(columns)} | needs for it |",
        f"|---|---|{'---|' * len(columns)}---|",
    ]
    for entry in report["runtimes"]:
        if "not_run" in entry:
            cells = [f"not run: {entry['not_run']}", *[""] * (len(columns) - 1), ""]
        else:
            cells = [_cell(entry["models"][column]) for column in columns]
            cells.append(_needs(entry["models"]))
        lines.append(f"| {entry['runtime']} | {entry['version']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(tried: list[dict[str, Any]]) -> str:
    best = tried[-1]
    if best["right"]:
        return f"{_largest(best):.1e}"
    runs = [attempt for attempt in tried if "said" not in attempt]
    if runs:
        return f"wrong by {_largest(runs[-1]):.1e}"
    said: str = tried[0]["said"]
    return "no: " + said.replace("|", "/")[:90]


def _largest(attempt: dict[str, Any]) -> float:
    return float(max(attempt["logits"], attempt["state"]))


def _needs(models: dict[str, list[dict[str, Any]]]) -> str:
    """What the models that are right were given beyond their files, and what happens without flags."""
    needs: list[str] = []
    for name, tried in models.items():
        best = tried[-1]
        if not best["right"]:
            continue
        if best["flags"]:
            plain = [_largest(attempt) for attempt in tried if "said" not in attempt and not attempt["flags"]]
            words = ", ".join(f"`{flag}`" for flag in best["flags"])
            needs.append(f"{name}: {words}" + (f" (else {plain[-1]:.1e})" if plain else ""))
        if best["batch"] is not None:
            needs.append(f"{name}: a batch of {best['batch']}")
    return "; ".join(needs)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="NAME,NAME", help="drivers to run, and to replace in the report")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report to write, and the table beside it")
    options = parser.parse_args(arguments)
    only = None if options.only is None else set(options.only.split(","))
    old: dict[tuple[str, str], Any] = {}
    if only is not None and options.out.exists():
        old = {(e["runtime"], e["version"]): e for e in json.loads(options.out.read_text())["runtimes"]}
    entries = []
    with tempfile.TemporaryDirectory(prefix="goslet-onnx-") as name:
        folder = Path(name)
        make_models(folder)
        for runtime in RUNTIMES:
            key = (runtime.name, runtime.version)
            if only is None or runtime.driver in only:
                print(f"{runtime.name} {runtime.version}", file=sys.stderr, flush=True)
                entries.append(measure(runtime, folder))
            elif key in old:
                entries.append(old[key])
    report = {
        "shape": {**SHAPE, **RANKS},
        "tokens": N_TOKENS,
        "right_within": RIGHT,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "runtimes": entries,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
