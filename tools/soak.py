#!/usr/bin/env python3
"""Feeds one session many tokens and reports whether memory or the state grows and whether the state drifts.

    tools/soak.py ENGINE [--tokens 100000] [--at-once 1] [--reference-tokens N] [--json]

The engine runs first, alone, while its resident memory is read now and then; the state is kept at every tenth of the
way and where the reference ends. Then the torch step runs on the engine's own dequantized weights in float64 over the
same random tokens, or the first N of them, and logits and states are compared at the same marks. Errors are parts of an
output's own range. The reference takes about half a millisecond per token and layer.
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
from goslet.export.models.blocks import EagerOps, token_pieces
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
def soak(path: Path, n_tokens: int, at_once: int, reference_tokens: int) -> dict[str, Any]:
    """Feed `n_tokens` random tokens, `at_once` of them in a call, to one session of the engine at `path` and compare.

    Returns:
        ``tokens``, ``growth_bytes`` (largest resident memory after the warm-up minus that at its end),
        ``largest_state_by_mark`` (the largest magnitude in any state tensor), ``finite`` (the logits of every call and
        the state at every mark), ``drift`` (the largest error at any mark among the first `reference_tokens`, as a part
        of range; null without one) and ``drift_by_mark``.
    """
    with goslet.open(path) as engine:
        spec, file = engine.spec, engine.file
        tokens = np.random.default_rng(1).integers(0, spec.vocab_size, n_tokens)
        ends = [min(end + at_once, n_tokens) for end in range(0, n_tokens, at_once)]
        calls = [len(ends) * mark // N_MARKS for mark in range(1, N_MARKS + 1)]
        within_reference = [end for end in ends if end <= reference_tokens]
        marks = sorted({*(ends[call - 1] for call in calls if call > 0), *within_reference[-1:]})
        session = engine.session()
        # Room for the snapshots exists before memory is watched.
        kept = [_snapshot(np.zeros(spec.vocab_size, np.float32), dict(session.state.front)) for _ in marks]
        resident = []
        finite = True
        for begin, end in zip([0, *ends], ends, strict=False):
            logits = session.feed(tokens[begin:end])
            finite = finite and bool(np.isfinite(logits).all())
            if end // WARM_UP_TOKENS > begin // WARM_UP_TOKENS:
                resident.append(resident_bytes())
            if end in marks:
                target = kept[marks.index(end)]
                target["logits"][:] = logits
                for name, view in session.state.front.items():
                    target[name][:] = view
        version = version_named(spec.version)
        weights = {name: torch.from_numpy(decode(file.weight(name))).double() for name in file.tensors}
        ops = EagerOps(weights)
        state = {t.name: torch.full((1, *t.shape), t.init, dtype=torch.float64) for t in engine.state_spec.tensors}
        drift = []
        for index, token in enumerate(tokens[:reference_tokens]):
            pieces = token_pieces(weights[EMBEDDING][token : token + 1], spec)
            row, state = version.step(spec, ops, pieces, state)
            if index + 1 in marks:
                found = kept[marks.index(index + 1)]
                expected = {"logits": row[0].numpy(), **{name: value[0].numpy() for name, value in state.items()}}
                drift.append(
                    max(float(np.abs(found[n] - e).max() / (np.abs(e).max() or 1.0)) for n, e in expected.items())
                )
        return {
            "tokens": n_tokens,
            "growth_bytes": max(resident) - resident[0] if resident else 0,
            "largest_state_by_mark": [
                max(float(np.abs(value).max()) for name, value in snapshot.items() if name != "logits")
                for snapshot in kept
            ],
            "finite": finite and all(np.isfinite(value).all() for snapshot in kept for value in snapshot.values()),
            "drift": max(drift, default=None),
            "drift_by_mark": drift,
        }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path, help="a .goslet file")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to feed (default 100000)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="tokens in one call (default 1)")
    parser.add_argument(
        "--reference-tokens", type=int, metavar="N", help="how many of them the float64 reference reads (default all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.at_once < 1:
        parser.error("--tokens and --at-once must be 1 or more")
    reference_tokens = options.tokens if options.reference_tokens is None else options.reference_tokens
    if reference_tokens < 0:
        parser.error("--reference-tokens must not be negative")
    torch.set_num_threads(1)
    report = soak(options.engine, options.tokens, options.at_once, reference_tokens)
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{report['tokens']} tokens: resident memory grew by {report['growth_bytes'] / 1024:.0f} KiB,")
        print(f"largest number in the state {max(report['largest_state_by_mark']):.3g}, all finite: {report['finite']}")
        if report["drift"] is not None:
            print(f"largest error against float64 {report['drift']:.1e} of range")
    return 0


if __name__ == "__main__":
    sys.exit(main())
