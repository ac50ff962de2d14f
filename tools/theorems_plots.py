"""The two figures of tools/theorems.py, drawn from its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Dark to light, so that curves differ in grey too, besides their markers and dashes.
COLORS = ("#12355b", "#1f77b4", "#d1702a", "#e0a030", "#8a8a8a")
MARKERS = ("o", "s", "^", "D", "v")


def _style(index: int, **more: Any) -> dict[str, Any]:
    return {"color": COLORS[index], "marker": MARKERS[index], "markersize": 4.5, "linewidth": 1.4, **more}


def _panel(axes: Any, title: str, x: str, y: str, **legend: Any) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, **legend)


def plot_sensing(report: dict[str, Any], path: Path) -> None:
    """Draw what was measured of matrix sensing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = report["sizes"]
    figure, grid = pyplot.subplots(2, 3, figsize=(14, 8.4), layout="constrained")
    (recovered, typical, initial), (noisy, tailed, fresh) = grid
    recovery = report["recovery"]
    ratios = recovery["ratios"]
    for index, (factors, rows) in enumerate(recovery["errors_by_factors"].items()):
        errors = np.array(rows)
        shares = (errors < recovery["recovered_below"]).mean(1)
        recovered.plot(ratios, shares, **_style(index), label=f"descent, {factors} factors")
        typical.plot(ratios, np.median(errors, 1), **_style(index), label=f"descent, {factors} factors")
    least = np.array(recovery["errors_of_least_norm"])
    recovered.plot(
        ratios, (least < recovery["recovered_below"]).mean(1), **_style(3, linestyle="--"), label="least norm"
    )
    typical.plot(ratios, np.median(least, 1), **_style(3, linestyle="--"), label="least norm")
    recovered.axvspan(1.25, 2, color="#000000", alpha=0.07, linewidth=0)
    recovered.set_ylim(-0.05, 1.05)
    _panel(
        recovered,
        "Recovery sets in between 1.25 and 2 times (grey)",
        "sketches / r (n₁ + n₂)",
        f"share of {sizes['seeds']} trials with relative error below {recovery['recovered_below']:g}",
        loc="center right",
    )
    typical.set_yscale("log")
    _panel(typical, "The typical error", "sketches / r (n₁ + n₂)", "relative error (median)", loc="center right")

    curves = report["initialization"]
    for index, name in enumerate(("3 times", "5 times", "8 times", "fresh sketches", "flow")):
        label = f"{name} r (n₁ + n₂)" if name.endswith("times") else f"{name} every step" if index == 3 else name
        label += f": slope {curves['slopes'][name]:.2f}"
        initial.loglog(curves["inits"], curves["errors"][name], **_style(index), label=label)
    initial.set_ylim(top=40)  # room for the legend
    _panel(
        initial,
        "The error falls with the initialization",
        "norm of the factors at the start (relative)",
        "relative error (geometric mean)",
        loc="upper left",
    )

    noise = report["noise"]
    for index, (ratio, errors) in enumerate(noise["errors"].items()):
        noisy.loglog(noise["levels"], noise["formula"][ratio], "--", color=COLORS[index], linewidth=1)
        label = f"{ratio} times r (n₁ + n₂): slope {noise['slopes'][ratio]:.2f}"
        noisy.loglog(noise["levels"], errors, **_style(index, linestyle=""), label=label)
    label = f"flow, by |E|, spectral norm: slope {noise['flow_slope']:.2f}"
    noisy.loglog(noise["levels"], noise["flow_errors"], **_style(3), label=label)
    noisy.plot([], [], "--", color="#555555", linewidth=1, label="least squares in the tangent space")
    noisy.set_ylim(top=1)
    _panel(
        noisy,
        "The error is linear in the noise",
        "noise of a sketch (standard deviation)",
        "relative error",
        loc="upper left",
    )

    tail = report["tail"]
    for index, (ratio, errors) in enumerate(tail["errors"].items()):
        tailed.loglog(tail["tails"], tail["formula"][ratio], "--", color=COLORS[index], linewidth=1)
        label = f"{ratio} times, {sizes['rank']} factors"
        tailed.loglog(tail["tails"], errors, **_style(index, linestyle=""), label=label)
    factors = min(sizes["n1"], sizes["n2"])
    label = f"3 times, {factors} factors, to the end"
    tailed.loglog(tail["tails"], tail["all_factors_to_the_end"], **_style(4, linestyle=":"), label=label)
    label = f"3 times, {factors} factors, stopped early"
    tailed.loglog(tail["tails"], tail["all_factors_stopped_early"], **_style(3), label=label)
    tailed.plot([], [], "--", color="#555555", linewidth=1, label="least squares with |tail| as noise")
    tailed.set_ylim(top=20)
    tailed.set_xticks(tail["tails"], [f"{one:g}" for one in tail["tails"]])
    tailed.minorticks_off()
    _panel(
        tailed,
        "A tail of full rank is noise of its energy",
        "|tail|, Frobenius norm (singular values of the rest: 1)",
        "relative error of the low-rank part",
        loc="upper left",
    )

    batches = report["fresh"]
    for index, (size, curve) in enumerate(batches["by_batch"].items()):
        steps, losses = np.array(curve["history"]).T
        style = _style(index, marker="", linestyle=(":", "--", "-")[index])
        fresh.semilogy(steps, losses, **style, label=f"{size} fresh sketches every step")
    steps, losses = np.array(batches["same_batch"]["history"]).T
    label = f"the same {batches['same_batch']['size']} sketches"
    fresh.semilogy(steps, losses, **_style(3, marker="", linestyle="-."), label=label)
    _panel(
        fresh,
        f"Fresh batches converge; r (n₁ + n₂) = {batches['unknowns']}",
        "step of descent",
        "loss on held-out sketches (relative)",
        loc="center right",
    )
    figure.suptitle(
        f"Matrix sensing by factorized descent from rank-one sketches: {sizes['n1']} by {sizes['n2']}, "
        f"rank r = {sizes['rank']}"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_networks(report: dict[str, Any], path: Path) -> None:
    """Draw what was measured of diagonal linear networks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (distance, slow, chosen) = pyplot.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    rates = report["rates"]
    for index, (p, curve) in enumerate(rates["depths"].items()):
        label = f"p = {p}: slope {curve['slope_of_the_last_decade']:.2f}"
        distance.loglog(rates["alphas"], curve["distances"], **_style(index), label=label)
    _panel(
        distance,
        f"A = [1, {rates['rho']:g}], y = 1: only depths beyond 2 are quick",
        r"initialization $\alpha$",
        "distance of the limit to the ℓ₁ minimizer",
        loc="lower right",
    )
    rhos = [float(rho) for rho in rates["depth_2_by_rho"]]
    line = np.linspace(min(rhos), max(rhos))
    slow.plot(line, 2 * (1 - line), "--", color="#555555", linewidth=1, label=r"$2\,(1-\rho)$")
    slopes = [one["slope"] for one in rates["depth_2_by_rho"].values()]
    slow.plot(rhos, slopes, **_style(0, linestyle="", markersize=6), label=r"measured at tiny $\alpha$")
    slow.set_ylim(bottom=0)
    _panel(
        slow,
        r"$p = 2$: the distance falls like $\alpha^{2(1-\rho)}$",
        r"$\rho$, the dual's largest $|A^T z|$ off the support",
        r"slope of log distance against log $\alpha$",
        loc="upper right",
    )
    rows = report["selection"]["line"]
    depths = [row["p"] for row in rows]
    chosen.plot(depths, [row["t_by_hand"] for row in rows], "--", color="#555555", linewidth=1, label="by hand")
    chosen.plot(
        depths,
        [row["t_selected"] for row in rows],
        **_style(1, linestyle="", markersize=8),
        label="selected on the face",
    )
    chosen.plot(
        depths,
        [row["t_limit"] for row in rows],
        **_style(2, linestyle="", markersize=3.5),
        label=r"limit, small $\alpha$",
    )
    _panel(
        chosen,
        r"Which minimizer $(1-t,\ 2(1-t),\ 3t)$ a depth selects",
        "depth p",
        "t",
        loc="upper right",
    )
    figure.suptitle("Diagonal linear networks $x = u^p - v^p$ from a small initialization")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
