#!/usr/bin/env python3
"""Measures what two theorems predict of our solvers: recovery from sketches, and what diagonal networks select.

    tools/theorems.py [--out-dir tools/reports]

Writes theorems.json with every number and what is claimed of them, theorems-sensing.png and theorems-networks.png.
Needs matplotlib (tools/requirements-bench.txt). Takes two minutes of processor time; everything is seeded.

One prediction does not come out as it was stated: the error falls with the initialization with a slope of 0.8 and more
from 8 r (n1 + n2) sketches on, from fresh sketches and in the flow, but more slowly from 3 or 5 r (n1 + n2). With few
sketches, those surplus directions that they happen to see as large grow along with the signal. At 3 times it is
measured with steps counted by log(1/init), with equal steps, ended by held-out sketches, and with fewer factors.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from theorems_plots import plot_networks, plot_sensing

from goslet.export.solvers.diagonal_network import flow, limit, selected
from goslet.export.solvers.matrix_sensing import (
    Recovery,
    Sketches,
    gaussian_sketches,
    min_norm,
    perturbed_flow,
    recover,
)
from goslet.machine import available_cores

Array = npt.NDArray[np.float64]

RECOVERED = 0.05  # the relative error that counts as recovery
LINE = ([[1.0, 1.0, 1.0], [3.0, 0.0, 1.0]], [3.0, 3.0])  # its minimizers of |x|_1: (1 - t, 2 (1 - t), 3 t)


@dataclass(frozen=True)
class Sizes:
    """How large the trials are.

    Attributes:
        n1: rows of the matrix.
        n2: its columns.
        rank: its rank; its singular values are 1.
        seeds: matrices and sketches in each trial of recovery; a third of them elsewhere.
        steps: of descent where sketches stay the same.
    """

    n1: int = 24
    n2: int = 36
    rank: int = 2
    seeds: int = 12
    steps: int = 3000

    @property
    def unknowns(self) -> int:
        """r (n1 + n2), in which sketches are counted."""
        return self.rank * (self.n1 + self.n2)

    @property
    def freedom(self) -> int:
        """The dimension of the matrices of this rank."""
        return self.rank * (self.n1 + self.n2 - self.rank)

    @property
    def few(self) -> int:
        """Seeds of the trials other than that of recovery."""
        return max(1, self.seeds // 3)


RATIOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
INITS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
LEVELS = (1e-3, 1e-2, 1e-1)
TAILS = (0.02, 0.05, 0.1, 0.2, 0.5)


class Trial:
    """A matrix of low rank, plus a tail of full rank where one is asked for, and sketches of it."""

    def __init__(self, sizes: Sizes, seed: int, tail: float = 0.0, noise: float = 0.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._noise = noise
        self._sizes = sizes
        left, right = (np.linalg.qr(self._rng.standard_normal((n, sizes.rank)))[0] for n in (sizes.n1, sizes.n2))
        self.target: Array = left @ right.T
        rest = self._rng.standard_normal(self.target.shape)
        rest -= left @ (left.T @ rest)
        rest -= (rest @ right) @ right.T
        self.whole: Array = self.target + tail * rest / float(np.linalg.norm(rest))
        self.held_out = self.sketch(200)

    def sketch(self, count: int) -> Sketches:
        """New sketches."""
        return gaussian_sketches(self.whole, count, self._rng, self._noise)

    def recover(self, ratio: float, factors: int, **settings: Any) -> float:
        """The relative error of the low-rank part, by descent on ratio * r (n1 + n2) sketches."""
        sketches = self.sketch(round(ratio * self._sizes.unknowns))
        settings = {"init": 1e-4, "rate": 0.5, "steps": self._sizes.steps, **settings}
        return self.error(recover(sketches, factors, self.held_out, **settings))

    def error(self, found: Recovery) -> float:
        """The relative error of the low-rank part."""
        return float(np.linalg.norm(found.left @ found.right - self.target) / np.linalg.norm(self.target))


def slope(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """The slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def measure_recovery(sizes: Sizes) -> dict[str, Any]:
    """Errors by factors, ratio and seed; those of the solution of least norm."""
    errors: dict[str, list[list[float]]] = {}
    for factors in (sizes.rank, 2 * sizes.rank, min(sizes.n1, sizes.n2)):
        errors[str(factors)] = [
            [Trial(sizes, seed).recover(ratio, factors) for seed in range(sizes.seeds)] for ratio in RATIOS
        ]
    least = []
    for ratio in RATIOS:
        found = []
        for seed in range(sizes.seeds):
            trial = Trial(sizes, seed)
            answer = min_norm(trial.sketch(round(ratio * sizes.unknowns)))
            found.append(float(np.linalg.norm(answer - trial.target) / np.linalg.norm(trial.target)))
        least.append(found)
    return {"ratios": RATIOS, "recovered_below": RECOVERED, "errors_by_factors": errors, "errors_of_least_norm": least}


def measure_initialization(sizes: Sizes) -> dict[str, Any]:
    """Errors by initialization: fixed sketches at several ratios, fresh ones, and the flow without a perturbation.

    At 3 times the unknowns the slope falls short of 0.8, so it is measured in several ways there.
    """
    full = min(sizes.n1, sizes.n2)

    def log_steps(init: float) -> int:
        # Signals leave the start after a time like log(1/init).
        return 50 + round(50 * math.log(1 / init))

    def fixed(ratio: float, factors: int, steps: Callable[[float], int], **settings: Any) -> list[float]:
        return [
            mean(
                Trial(sizes, seed).recover(ratio, factors, init=init, steps=steps(init), **settings)
                for seed in range(sizes.few)
            )
            for init in INITS
        ]

    def fresh(init: float) -> float:
        trial, batch = Trial(sizes, 0), sizes.unknowns // 2
        return trial.error(
            recover(
                lambda step: gaussian_sketches(trial.target, batch, np.random.default_rng([1, step])),
                *(full, trial.held_out),
                init=init,
                steps=200 + round(100 * math.log(1 / init)),
            )
        )

    def flowing(init: float) -> float:
        trial = Trial(sizes, 0)
        d, c = perturbed_flow(
            trial.target, lambda time, residual: 0 * residual, *start(sizes, init), 2 * math.log(1 / init) + 10
        )
        return float(np.linalg.norm(d @ c - trial.target) / np.linalg.norm(trial.target))

    curves = {
        "3 times": fixed(3, full, log_steps),
        "5 times": fixed(5, full, log_steps),
        "8 times": fixed(8, full, log_steps),
        "fresh sketches": [fresh(init) for init in INITS],
        "flow": [flowing(init) for init in INITS],
        "3 times, equal steps": fixed(3, full, lambda init: sizes.steps),
        "3 times, ended by held-out sketches": fixed(3, full, lambda init: sizes.steps, patience=100),
        "3 times, twice the rank": fixed(3, 2 * sizes.rank, log_steps),
    }
    return {"inits": INITS, "errors": curves, "slopes": {name: slope(INITS, errors) for name, errors in curves.items()}}


def start(sizes: Sizes, init: float) -> tuple[Array, Array]:
    """Random factors of a spectral norm of about init, as many as the shorter side."""
    rng = np.random.default_rng(2)
    k = min(sizes.n1, sizes.n2)
    left, right = rng.standard_normal((sizes.n1, k)), rng.standard_normal((k, sizes.n2))
    scales = [init / (math.sqrt(k) + math.sqrt(n)) for n in (sizes.n1, sizes.n2)]
    return scales[0] * left, scales[1] * right


def measure_noise(sizes: Sizes) -> dict[str, Any]:
    """Errors by noise and ratio, with the formula of least squares; and of the flow by the size of its perturbation."""
    curves = {}
    for ratio in (3, 6):
        curves[str(ratio)] = [
            float(np.mean([Trial(sizes, s, noise=level).recover(ratio, sizes.rank) for s in range(sizes.few)]))
            for level in LEVELS
        ]
    one, two = (np.linalg.qr(np.random.default_rng(s).standard_normal((sizes.n2, sizes.n2)))[0] for s in (3, 4))
    one, two = one[: sizes.n1], two[: sizes.n1]

    def flowing(level: float) -> float:
        target = Trial(sizes, 0).target
        d, c = perturbed_flow(
            target,
            lambda time, _: level * (math.cos(time) * one + math.sin(time) * two) / math.sqrt(2),
            *start(sizes, 1e-5),
            4 * math.log(1e5),
        )
        return float(np.linalg.norm(d @ c - target, 2))

    flow_errors = [flowing(level) for level in LEVELS]
    return {
        "levels": LEVELS,
        "errors": curves,
        "formula": {ratio: [level * noise_share(sizes, float(ratio)) for level in LEVELS] for ratio in curves},
        "slopes": {ratio: slope(LEVELS, errors) for ratio, errors in curves.items()},
        "flow_errors": flow_errors,
        "flow_slope": slope(LEVELS, flow_errors),
    }


def noise_share(sizes: Sizes, ratio: float) -> float:
    """The relative error that noise of size 1 leaves to least squares in the tangent space of the low-rank matrices."""
    return math.sqrt(sizes.freedom / (ratio * sizes.unknowns - sizes.freedom - 1) / sizes.rank)


def measure_tail(sizes: Sizes) -> dict[str, Any]:
    """Errors of the low-rank part by the tail's norm; with all factors, stopped early and not."""
    full = min(sizes.n1, sizes.n2)

    def curve(ratio: float, factors: int, **settings: Any) -> list[float]:
        return [
            float(np.mean([Trial(sizes, s, tail).recover(ratio, factors, **settings) for s in range(sizes.few)]))
            for tail in TAILS
        ]

    exact = {str(ratio): curve(ratio, sizes.rank) for ratio in (3, 6, 12)}
    return {
        "tails": TAILS,
        "errors": exact,
        "formula": {ratio: [tail * noise_share(sizes, float(ratio)) for tail in TAILS] for ratio in exact},
        "slopes": {ratio: slope(TAILS, errors) for ratio, errors in exact.items()},
        "all_factors_to_the_end": curve(3, full),
        "all_factors_stopped_early": curve(3, full, patience=300),
    }


def measure_fresh(sizes: Sizes) -> dict[str, Any]:
    """Held-out loss by step for batches that change at every step, and for one that stays."""
    trial, full = Trial(sizes, 0), min(sizes.n1, sizes.n2)
    curves = {}
    for part in (8, 4, 2):
        batch = sizes.unknowns // part
        found = recover(
            lambda step, batch=batch: gaussian_sketches(trial.target, batch, np.random.default_rng([5, step])),  # type: ignore[misc]
            *(full, trial.held_out),
            rate=0.1,
            steps=sizes.steps // 2,
        )
        curves[str(batch)] = {"history": found.history[::5], "error": trial.error(found)}
    batch = sizes.unknowns // 2
    stays = recover(trial.sketch(batch), full, trial.held_out, rate=0.1, steps=sizes.steps // 2)
    return {
        "unknowns": sizes.unknowns,
        "by_batch": curves,
        "same_batch": {"size": batch, "history": stays.history[::5], "error": trial.error(stays)},
    }


def measure_rates() -> dict[str, Any]:
    """Distances of the networks' limits to the selected minimizer, by depth and initialization."""
    alphas = np.geomspace(1e-4, 1e-1, 13)
    rho = 0.9
    depths = {}
    for p in (2, 3, 4):
        distances = [float(np.linalg.norm(limit([[1, rho]], [1], p, alpha) - [1, 0])) for alpha in alphas]
        depths[str(p)] = {"distances": distances, "slope_of_the_last_decade": slope(alphas[:5], distances[:5])}
    rng = np.random.default_rng(6)
    a, x = rng.standard_normal((10, 16)), np.zeros(16)
    x[:2] = 1, -2
    few = np.geomspace(5e-4, 5e-3, 5)
    sparse = [float(np.linalg.norm(limit(a, a @ x, 3, alpha) - x)) for alpha in few]
    slow = {}
    for rho_2 in (0.9, 0.925, 0.95, 0.975):
        # So small that the distance is in the range of 1e-9 to 1e-6, where it is neither rounded nor bent.
        tiny = np.geomspace(1e-9, 1e-6, 5) ** (0.5 / (1 - rho_2))
        distances = [float(np.linalg.norm(limit([[1, rho_2]], [1], 2, alpha) - [1, 0])) for alpha in tiny]
        slow[str(rho_2)] = {"slope": slope(tiny, distances), "found_rho": selected([[1, rho_2]], [1], 2).rho}
    return {
        "rho": rho,
        "alphas": alphas.tolist(),
        "depths": depths,
        "sparse": {"alphas": few.tolist(), "distances": sparse, "slope": slope(few, sparse)},
        "depth_2_by_rho": slow,
    }


def measure_selection() -> dict[str, Any]:
    """The minimizer on the line by depth: by hand, as selected, and the limit for a small initialization."""
    rows = []
    for p, alpha in ((2, 1e-3), (2.25, 1e-3), (2.5, 1e-3), (3, 1e-3), (4, 1e-2), (5, 0.03), (6, 0.05), (8, 0.1)):
        odds = 2 ** (2 / 3) / 3 if p == 2 else (3 ** (2 / p) / (2 ** (2 / p) + 1)) ** (p / (p - 2))
        t = odds / (1 + odds)
        x = limit(*LINE, p, alpha)
        chosen = selected(*LINE, p).x
        rows.append(
            {
                "p": p,
                "alpha": alpha,
                "t_by_hand": t,
                "t_selected": float(chosen[2] / 3),
                "t_limit": float(x[2] / 3),
                "distance_selected": float(np.linalg.norm(chosen - [1 - t, 2 * (1 - t), 3 * t])),
                "distance_limit": float(np.linalg.norm(x - chosen)),
            }
        )
    flows = [
        {"p": p, "alpha": alpha, "difference": float(np.linalg.norm(flow(*LINE, p, alpha).x - limit(*LINE, p, alpha)))}
        for p in (2, 2.5, 3, 4)
        for alpha in (0.3, 0.1)
    ]
    return {"line": rows, "flow_against_limit": flows}


def claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the theorems predict, what was measured, and whether it holds."""
    found: list[dict[str, Any]] = []

    def claim(text: str, measured: float, bound: str, holds: bool) -> None:
        found.append({"claim": text, "measured": measured, "bound": bound, "holds": bool(holds)})

    sizes = Sizes(**report["sizes"])
    recovery = report["recovery"]
    full = recovery["errors_by_factors"][str(min(sizes.n1, sizes.n2))]
    errors = dict(zip(recovery["ratios"], full, strict=True))
    for ratio, bound in ((1.25, "at most 1/3"), (2.0, "at least 2/3"), (3.0, "1")):
        share = float(np.mean(np.array(errors[ratio]) < RECOVERED))
        holds = share <= 1 / 3 if ratio < 1.5 else share >= 2 / 3 if ratio < 3 else share == 1
        claim(f"share recovered from {ratio} r (n1 + n2) sketches, all factors", share, bound, holds)
    least = float(np.min(recovery["errors_of_least_norm"][-1]))
    claim("least error of the solution of least norm at 3 r (n1 + n2)", least, "above 0.5", least > 0.5)
    for name, value in report["initialization"]["slopes"].items():
        claim(f"slope of error against initialization, {name}", value, "at least 0.8", value >= 0.8)
    for kind in ("noise", "tail"):
        for ratio, value in report[kind]["slopes"].items():
            claim(f"slope of error against {kind}, {ratio} times", value, "0.9 to 1.1", 0.9 <= value <= 1.1)
    value = report["noise"]["flow_slope"]
    claim("slope of error against perturbation of the flow", value, "0.9 to 1.1", 0.9 <= value <= 1.1)
    tail = report["tail"]
    by_ratio = [float(np.mean(np.divide(tail["errors"][r], tail["formula"][r]))) for r in tail["errors"]]
    for ratio, value in zip(tail["errors"], by_ratio, strict=True):
        claim(f"error over sqrt(f / (m - f - 1)) |tail|, {ratio} times", value, "0.8 to 1.3", 0.8 <= value <= 1.3)
    ends, stopped = (np.array(tail[f"all_factors_{how}"]) for how in ("to_the_end", "stopped_early"))
    value = float(np.max(stopped[:-1] / ends[:-1]))
    claim("error stopped early over error at the end, tails to 0.2, 3 times", value, "below 0.9", value < 0.9)
    for batch, curve in report["fresh"]["by_batch"].items():
        claim(f"error with fresh batches of {batch}", curve["error"], "below 0.001", curve["error"] < 1e-3)
    value = report["fresh"]["same_batch"]["error"]
    claim(f"error with one batch of {report['fresh']['same_batch']['size']}", value, "above 0.3", value > 0.3)
    rates = report["rates"]
    for p in ("3", "4"):
        value = rates["depths"][p]["slope_of_the_last_decade"]
        claim(f"slope of distance against alpha, p = {p}", value, f"{p} within 0.05", abs(value - int(p)) < 0.05)
    value = rates["sparse"]["slope"]
    claim("slope of distance against alpha, p = 3, sparse in 16", value, "3 within 0.1", abs(value - 3) < 0.1)
    for rho, one in rates["depth_2_by_rho"].items():
        expected = 2 * (1 - float(rho))
        holds = abs(one["slope"] / expected - 1) < 1e-3
        claim(f"slope, p = 2, rho = {rho}", one["slope"], f"{expected:.3f} within a thousandth", holds)
    value = max(row["distance_selected"] for row in report["selection"]["line"])
    claim("selected minimizer against the formula, all depths", value, "below 1e-10", value < 1e-10)
    value = max(row["distance_limit"] / (row["alpha"] ** row["p"] + 1e-9) for row in report["selection"]["line"])
    claim("limit against selected, in alpha^p + 1e-9", value, "below 1", value < 1)
    value = max(row["difference"] for row in report["selection"]["flow_against_limit"])
    claim("flow against limit", value, "below 1e-6", value < 1e-6)
    return found


def make_report(sizes: Sizes) -> dict[str, Any]:
    """Everything that is measured, each part in a process of its own."""
    # The matrices are so small that threads would only wait for one another; numpy reads this when it is loaded.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(available_cores(), mp_context=context) as pool:
        parts = {
            "recovery": pool.submit(measure_recovery, sizes),
            "initialization": pool.submit(measure_initialization, sizes),
            "tail": pool.submit(measure_tail, sizes),
            "noise": pool.submit(measure_noise, sizes),
            "fresh": pool.submit(measure_fresh, sizes),
            "rates": pool.submit(measure_rates),
            "selection": pool.submit(measure_selection),
        }
        report: dict[str, Any] = {"sizes": asdict(sizes), **{name: part.result() for name, part in parts.items()}}
    # As it is when it is read from the file: without tuples.
    report = json.loads(json.dumps(report))
    report["claims"] = claims(report)
    return report


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> int:
    """The command line, with trials of other sizes where they are given; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent / "reports")
    options = parser.parse_args(arguments)
    try:
        report = make_report(sizes or Sizes())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    options.out_dir.mkdir(parents=True, exist_ok=True)
    (options.out_dir / "theorems.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_sensing(report, options.out_dir / "theorems-sensing.png")
    plot_networks(report, options.out_dir / "theorems-networks.png")
    for one in report["claims"]:
        print(f"{'holds' if one['holds'] else 'FAILS'}: {one['claim']}: {one['measured']:.4g} ({one['bound']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
