"""Matrix sensing: a matrix of low rank from a few scalar sketches of it, by gradient descent on two factors.

A sketch of X [n1, n2] is the number y = psi^T X phi for known vectors psi [n1] and phi [n2]. Descent runs on the mean
of (psi^T D C phi - y)^2 / 2 over the sketches, D [n1, r] and C [r, n2] started small and at random; X itself is never
formed. Source: Johan S. Wind, "Asymmetric matrix sensing by gradient descent with small random initialization"
(arXiv 2309.01796, 2023). It proves that descent finds X to an error that falls with the initialization, also with more
factors than the rank of X, with noise in the sketches and with sketches that change at every step, by reducing all of
these to one perturbed gradient flow (`perturbed_flow`), which converges as long as the perturbation is small.

The measurements here are of rank one. How many of them it takes, and how the error then follows the initialization, the
noise and a tail of full rank, is measured by tools/theorems.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ConvergenceError, InputError
from .flow import Array, integrate

# Steps between two measurements of the loss on held-out sketches.
CHECK_STEPS = 10
_POWER_STEPS = 20


@dataclass(frozen=True)
class Sketches:
    """Scalar sketches of a matrix [n1, n2]: values[i] = left[i]^T X right[i].

    Attributes:
        left: float64 [m, n1].
        right: float64 [m, n2].
        values: float64 [m].

    Raises:
        InputError: the shapes do not go together, there is no sketch, or there are NaN or infinite numbers.
    """

    left: Array
    right: Array
    values: Array

    def __post_init__(self) -> None:
        for name in ("left", "right", "values"):
            numbers = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, numbers)
            if numbers.ndim != (1 if name == "values" else 2) or 0 in numbers.shape:
                raise InputError(
                    "these are no sketches",
                    place=name,
                    expected="shape [m]" if name == "values" else "shape [m, n]",
                    found=f"shape {numbers.shape}",
                )
            if len(numbers) != len(self.left):
                raise InputError("a sketch has one of each", place=name, expected=len(self.left), found=len(numbers))
            if not np.isfinite(numbers).all():
                raise InputError("there are NaN or infinite numbers", place=name, expected="finite numbers")

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [n1, n2] of the matrix."""
        return self.left.shape[1], self.right.shape[1]


@dataclass(frozen=True)
class Recovery:
    """What descent on sketches found: X is about left @ right.

    Attributes:
        left: D, float64 [n1, r].
        right: C, float64 [r, n2].
        history: pairs of a step and the loss there: the mean square of what is left of the held-out sketches, divided
            by the mean square of their values. For sketches by standard normal vectors that estimates
            |DC - X|^2 / |X|^2 in Frobenius norms, plus the noise's share.
        step: the step that the factors are from.
    """

    left: Array
    right: Array
    history: tuple[tuple[int, float], ...]
    step: int


def gaussian_sketches(target: Array, count: int, rng: np.random.Generator, noise: float = 0.0) -> Sketches:
    """Sketches of a known matrix by standard normal vectors.

    Args:
        target: X, float64 [n1, n2].
        count: the number m of sketches.
        rng: where the vectors and the noise come from.
        noise: the standard deviation of normal noise added to each value, in the unit of the values.
    """
    left = rng.standard_normal((count, target.shape[0]))
    right = rng.standard_normal((count, target.shape[1]))
    return Sketches(left, right, np.sum((left @ target) * right, 1) + noise * rng.standard_normal(count))


def recover(
    sketches: Sketches | Callable[[int], Sketches],
    rank: int,
    held_out: Sketches,
    *,
    init: float = 1e-3,
    start: tuple[Array, Array] | None = None,
    rate: float = 0.25,
    steps: int = 2000,
    patience: int | None = None,
    seed: int = 0,
) -> Recovery:
    """Recover a matrix of low rank from sketches of it.

    Memory is that of the factors and of one batch: O(r (n1 + n2)) and O(m (n1 + n2 + r)).

    Args:
        sketches: all of them, or a function that gives the batch of a step, counted from 0; new sketches at every step
            need not be kept.
        rank: r, the columns of D: the rank of X or more.
        held_out: other sketches of the same matrix, to measure the loss with.
        init: the factors' spectral norm at the start, relative to the root of that of X. It is taken from S, the
            spectral norm of the mean of y psi phi^T over the first batch, divided by the mean squares of the vectors'
            numbers: right for independent ones in a large batch, and too large in a small one.
        start: D and C to begin with in place of small random ones.
        rate: the step length in units of 1/S.
        steps: descent steps.
        patience: end when the held-out loss has found no new minimum for so many steps, and give the factors of the
            minimum; None gives those of the last step.
        seed: of the random start.

    Raises:
        InputError: a rank below 1 or above the matrix's shorter side; shapes that differ; an argument out of its range.
        ConvergenceError: the numbers grew beyond all bounds.
    """
    n1, n2 = held_out.shape
    if not 1 <= rank <= min(n1, n2):
        raise InputError(
            "a matrix has no such rank", place="rank", expected=f"1 to {min(n1, n2)} for {n1} x {n2}", found=rank
        )
    for name, value in (("init", init), ("rate", rate), ("steps", steps), ("patience", patience)):
        if value is not None and not 0 < value < math.inf:
            raise InputError("this must be positive", place=name, expected="a finite number above 0", found=value)

    def batch_of(step: int) -> Sketches:
        batch = sketches if isinstance(sketches, Sketches) else sketches(step)
        if batch.shape != (n1, n2):
            raise InputError(
                "these sketches are of another matrix than the held-out ones",
                place=f"step {step}",
                expected=f"vectors of {n1} and {n2} numbers",
                found=f"{batch.shape[0]} and {batch.shape[1]}",
            )
        return batch

    batch = batch_of(0)
    rng = np.random.default_rng(seed)
    size = _spectral_norm(batch, rng)
    if size == 0:
        raise InputError("every sketch is zero", place="sketches", expected="values that differ from zero")
    if start is None:
        scale = init * math.sqrt(size / float(np.mean(batch.left**2) * np.mean(batch.right**2)))
        left, right = _normal_matrix(rng, n1, rank, scale), _normal_matrix(rng, rank, n2, scale)
    else:
        left, right = (np.asarray(factor, np.float64) for factor in start)
        if left.shape != (n1, rank) or right.shape != (rank, n2):
            raise InputError(
                "the factors do not go with the sketches",
                place="start",
                expected=f"{[n1, rank]} and {[rank, n2]}",
                found=f"{list(left.shape)} and {list(right.shape)}",
            )
    length = rate / size
    energy = float(np.mean(held_out.values**2)) or 1.0

    def loss() -> float:
        return float(np.mean(_residual(held_out, left, right)[0] ** 2)) / energy

    best = (loss(), 0, left, right)
    history = [(0, best[0])]
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, steps + 1):
            residual, seen, sent = _residual(batch, left, right)
            residual = (length / len(residual)) * residual[:, None]
            left, right = (
                left - batch.left.T @ (residual * sent),
                right - (residual * seen).T @ batch.right,
            )
            if step % CHECK_STEPS == 0 or step == steps:
                history.append((step, loss()))
                if not math.isfinite(history[-1][1]):
                    raise ConvergenceError(
                        "descent diverged",
                        place=f"step {step}",
                        found=f"a loss of {history[-2][1]:.3g} before",
                        remedy="use a smaller rate, or larger batches",
                    )
                if history[-1][1] < best[0]:
                    best = (history[-1][1], step, left, right)
                elif patience is not None and step - best[1] >= patience:
                    break
            if step < steps:
                batch = batch_of(step)
    if patience is not None:
        _, step, left, right = best
    return Recovery(left, right, tuple(history), step)


def min_norm(sketches: Sketches) -> Array:
    """The matrix of least Frobenius norm that fits the sketches, float64 [n1, n2]: what descent without factors finds.

    It is a combination of the m matrices psi phi^T, so it misses what of X is outside of their span: about
    (1 - m / (n1 n2)) |X|^2 of the square. Takes O(m^2) memory; for comparison only.
    """
    gram = (sketches.left @ sketches.left.T) * (sketches.right @ sketches.right.T)
    weights = np.linalg.lstsq(gram, sketches.values, rcond=None)[0]
    return np.asarray(sketches.left.T @ (weights[:, None] * sketches.right))


def perturbed_flow(
    target: npt.ArrayLike,
    perturbation: Callable[[float, Array], Array],
    left: npt.ArrayLike,
    right: npt.ArrayLike,
    duration: float,
    tolerance: float = 1e-8,
) -> tuple[Array, Array]:
    """Follow the perturbed gradient flow dD/dt = (X - DC + E) C^T, dC/dt = D^T (X - DC + E): D and C at the end.

    With E = 0 it is the gradient flow of |DC - X|^2 / 2. Few sketches, noise, finite steps and changing batches are
    each some E, and the paper's theorems ask of it only that its spectral norm be small.

    Args:
        target: X, numbers [n1, n2].
        perturbation: gives E, float64 [n1, n2], from the time and the residual X - DC.
        left: D at the start, numbers [n1, r].
        right: C at the start, numbers [r, n2].
        duration: the time to follow it for; X grows out of the start at the rate of its singular values.
        tolerance: the error allowed to one step, relative to each number, or to the start's mean size if that is more.

    Raises:
        InputError: the shapes do not go together.
        ConvergenceError: the flow could not be followed, as when E is discontinuous.
    """
    x, d, c = (np.asarray(part, np.float64) for part in (target, left, right))
    if x.ndim != 2 or d.ndim != 2 or c.ndim != 2 or x.shape != (d.shape[0], c.shape[1]) or d.shape[1] != c.shape[0]:
        raise InputError(
            "the factors do not go with the target",
            expected="[n1, n2], [n1, r] and [r, n2]",
            found=f"{x.shape}, {d.shape} and {c.shape}",
        )

    def rate(time: float, state: Array) -> Array:
        d_now, c_now = state[: d.size].reshape(d.shape), state[d.size :].reshape(c.shape)
        pull = x - d_now @ c_now
        pull = pull + perturbation(time, pull)
        return np.concatenate([(pull @ c_now.T).ravel(), (d_now.T @ pull).ravel()])

    start = np.concatenate([d.ravel(), c.ravel()])
    floor = float(np.mean(np.abs(start)))
    end = integrate(rate, start, duration, tolerance=tolerance, floor=floor).state
    return end[: d.size].reshape(d.shape), end[d.size :].reshape(c.shape)


def _residual(sketches: Sketches, left: Array, right: Array) -> tuple[Array, Array, Array]:
    """psi^T D C phi - y [m], psi^T D [m, r] and C phi [m, r]."""
    seen, sent = sketches.left @ left, sketches.right @ right.T
    return np.sum(seen * sent, 1) - sketches.values, seen, sent


def _spectral_norm(sketches: Sketches, rng: np.random.Generator) -> float:
    """That of the mean of y psi phi^T, by power steps that need no more than vectors."""
    vector: Array = rng.standard_normal((sketches.right.shape[1],))
    size = 0.0
    for _ in range(_POWER_STEPS):
        image = sketches.left.T @ (sketches.values * (sketches.right @ vector)) / len(sketches.values)
        vector = sketches.right.T @ (sketches.values * (sketches.left @ image)) / len(sketches.values)
        size = float(np.linalg.norm(vector))
        if size == 0:
            return 0.0
        vector = vector / size
    return math.sqrt(size)


def _normal_matrix(rng: np.random.Generator, rows: int, columns: int, norm: float) -> Array:
    # Of standard normal numbers, it would have a spectral norm of about the sum of the roots of its sides.
    return norm / (math.sqrt(rows) + math.sqrt(columns)) * rng.standard_normal((rows, columns))
