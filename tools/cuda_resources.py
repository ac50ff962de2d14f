#!/usr/bin/env python3
"""Registers, spills and shared memory of every CUDA kernel, for every target that the compiler knows.

    tools/cuda_resources.py [--json REPORT]

Needs nvcc, no GPU. Exits with 1 where a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc/kernels/cuda"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_NAME = re.compile(r"\d+(wkv\w*?|product_\w+?)I([A-Za-z0-9_]*?)EEv")


def parse(text: str) -> list[dict[str, Any]]:
    """What ptxas -v says of each kernel: one entry for each kernel and target.

    Raises:
        ValueError: a kernel's numbers are missing.
    """
    found: list[dict[str, Any]] = []
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        entry = _ENTRY.search(block)
        if entry is None:
            continue
        spills, used = _SPILLS.search(block), _USED.search(block)
        if spills is None or used is None:
            raise ValueError(f"ptxas says nothing of {entry[1]}")
        name = _NAME.search(entry[1])
        found.append(
            {
                "kernel": entry[1] if name is None else f"{name[1]}<{name[2]}>",
                "target": f"sm_{entry[2]}",
                "registers": int(used[1]),
                "spill_bytes": int(spills[2]) + int(spills[3]),
                "shared_bytes": int(used[2] or 0),
            }
        )
    return found


def compile_all() -> str:
    """What ptxas says while everything is compiled."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [sm for sm in (KERNELS / "targets.txt").read_text().split() if f"sm_{sm}" in known]
    said = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(KERNELS.glob("*.cu")):
            for sm in targets:
                made = subprocess.run(
                    ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc/include'}", "-Xptxas", "-v", "-cubin",
                     "-gencode", f"arch=compute_{sm},code=sm_{sm}", "-o", f"{folder}/x.cubin", str(source)],
                    capture_output=True, text=True,
                )  # fmt: skip
                if made.returncode:
                    raise RuntimeError(made.stderr[-2000:])
                said.append(made.stderr)
    return "\n".join(said)


def main(words: list[str] | None = None) -> int:
    """Compile, and show what every kernel takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write a report here too")
    args = parser.parse_args(words)
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: the folder {args.json.parent} does not exist")
    if shutil.which("nvcc") is None:
        print("cuda_resources: nvcc is not there; install the CUDA toolkit", file=sys.stderr)
        return 1
    found = parse(compile_all())
    for entry in found:
        print(
            f"{entry['target']:<7} {entry['kernel']:<60} {entry['registers']:>4} registers, "
            f"{entry['spill_bytes']} bytes spilled, {entry['shared_bytes']} bytes shared"
        )
    if args.json is not None:
        compiler = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
        args.json.write_text(json.dumps({"nvcc": compiler, "kernels": found}, indent=1) + "\n", encoding="utf-8")
    spilled = [entry for entry in found if entry["spill_bytes"]]
    print(f"{len(found)} kernels, {len(spilled)} that spill")
    return 1 if spilled or not found else 0


if __name__ == "__main__":
    sys.exit(main())
