#!/usr/bin/env python3
"""Feeds one session many tokens and reports whether memory grows and whether the state drifts from a float64 reference.

    tools/soak.py ENGINE [--tokens 100000] [--json]

The engine runs first, alone, while the resident memory is read at every mark; then the torch step runs on the engine's
own dequantized weights in float64 over the same random tokens, and logits and states are compared at the same marks.
Errors are parts of an output's own range. The reference takes about half a millisecond per token and layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import goslet
from goslet.export.models import version_named
from goslet.export.models.blocks import EagerOps
from goslet.spec import EMBEDDING
from goslet.weights import decode

N_MARKS = 10
WARM_UP_TOKENS = 1000


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _snapshot(logits: np.ndarray, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": logits.copy(), **{name: view.copy() for name, view in states.items()}}


@torch.no_grad()
def soak(path: Path, n_tokens: int) -> dict[str, Any]:
    """Feed `n_tokens` random tokens to one session of the engine at `path` and compare.

    Returns:
        ``tokens``, ``growth_bytes`` (largest resident memory after the warm-up minus that at its end), ``drift`` (the
        largest error at any mark, as a part of range), ``drift_by_mark`` and ``finite``.
    """
    with goslet.open(path, threads=1) as engine:
        spec, file = engine.spec, engine.file
        tokens = np.random.default_rng(1).integers(0, spec.vocab_size, n_tokens)
        marks = sorted({n_tokens * (mark + 1) // N_MARKS for mark in range(N_MARKS)})
        session = engine.session()
        # Room for the snapshots exists before memory is watched.
        kept = [_snapshot(np.zeros(spec.vocab_size, np.float32), dict(session.state.front)) for _ in marks]
        resident = []
        for index, token in enumerate(tokens):
            logits = session.feed([token])
            if index + 1 >= WARM_UP_TOKENS and (index + 1) % WARM_UP_TOKENS == 0:
                resident.append(resident_bytes())
            if index + 1 in marks:
                target = kept[marks.index(index + 1)]
                target["logits"][:] = logits
                for name, view in session.state.front.items():
                    target[name][:] = view
        version = version_named(spec.version)
        weights = {name: torch.from_numpy(decode(file.weight(name))).double() for name in file.tensors}
        ops = EagerOps(weights)
        state = {t.name: torch.full((1, *t.shape), t.init, dtype=torch.float64) for t in engine.state_spec.tensors}
        drift = []
        for index, token in enumerate(tokens):
            row, state = version.step(spec, ops, weights[EMBEDDING][token : token + 1], state)
            if index + 1 in marks:
                found = kept[marks.index(index + 1)]
                expected = {"logits": row[0].numpy(), **{name: value[0].numpy() for name, value in state.items()}}
                drift.append(
                    max(float(np.abs(found[n] - e).max() / (np.abs(e).max() or 1.0)) for n, e in expected.items())
                )
        return {
            "tokens": n_tokens,
            "growth_bytes": max(resident) - resident[0] if resident else 0,
            "drift": max(drift),
            "drift_by_mark": drift,
            "finite": all(bool(np.isfinite(value).all()) for snapshot in kept for value in snapshot.values()),
        }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path, help="a .goslet file")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to feed (default 100000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error("--tokens must be 1 or more")
    torch.set_num_threads(1)
    report = soak(options.engine, options.tokens)
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{report['tokens']} tokens: resident memory grew by {report['growth_bytes'] / 1024:.0f} KiB,")
        print(f"largest error against float64 {report['drift']:.1e} of range, all finite: {report['finite']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
