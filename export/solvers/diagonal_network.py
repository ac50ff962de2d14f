"""Diagonal linear networks: which sparse solution of Ax = y the gradient flow finds from a small initialization.

The network of depth p is x = u^p - v^p, entry by entry, both started at alpha, and follows the gradient flow of
|Ax - y|^2 / 2. Source: Wind, Antun, Hansen, "Implicit regularization in AI meets generalized hardness of approximation
in optimization: sharp results for diagonal linear networks" (arXiv 2307.07410, 2023). As alpha falls, the flow's limit
approaches a minimizer of |x|_1 among the solutions. For p > 2 its distance is proportional to alpha^p, and where there
are several minimizers it is the one that maximizes sum |x|^(2/p). For p = 2 the distance falls only like
alpha^(2 (1 - rho)), rho the largest |A^T z| off the support for the dual solution z, and of several minimizers it is
the one that minimizes sum |x| log |x|.

Three ways to it stand here: `flow` follows the flow itself and is the reference; `limit` computes its end for one
alpha; `selected` computes what that end tends to.

The flow can be integrated: with s the integral of A^T (y - Ax) over time, u and v are functions of s alone. For p > 2,
x = alpha^p h(w) with h(w) = (1 - w)^-q - (1 + w)^-q, q = p / (p - 2) and w = p (p - 2) alpha^(p - 2) s; for p = 2,
x = alpha^2 h(w) with h(w) = 2 sinh(w) and w = 4 s. As w is in the range of A^T, the end is the minimum over z of the
convex function alpha^p sum H(A^T z) - y^T z, H the integral of h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ConvergenceError, InputError
from .flow import Array, integrate

# h of the logarithmic barrier, to which the networks tend as p grows.
_BARRIER = 1.0
# The end is approached through initializations that make x this much smaller each time.
_SHRINK = 0.5
# Newton's last correction, relative to the slack that it may use up; it is made to x too, so that its square is left.
_SETTLED = 1e-6
_FACE_SCALE = 1e-9


@dataclass(frozen=True)
class Fit:
    """The end of a flow that was followed.

    Attributes:
        x: float64 [n], u^p - v^p.
        u: float64 [n].
        v: float64 [n].
        time: the flow's time at which it was reached.
        residual: |A^T (Ax - y)| / |A^T y|, in Euclidean norms.
    """

    x: Array
    u: Array
    v: Array
    time: float
    residual: float


@dataclass(frozen=True)
class Selection:
    """The minimizer of |x|_1 that a depth selects.

    Attributes:
        x: float64 [n].
        correlations: float64 [n], A^T z for a dual solution z, to about 1e-9: the sign of x wherever some minimizer is
            not zero, and strictly between -1 and 1 elsewhere. Where there are several z, the one farthest inside of
            these bounds, in the sense of the product of the distances.
        face: bool [n], where some minimizer is not zero.
    """

    x: Array
    correlations: Array
    face: npt.NDArray[np.bool_]

    @property
    def rho(self) -> float:
        """The largest |A^T z| where every minimizer is zero; 0 if there is no such entry."""
        return float(np.max(np.abs(self.correlations[~self.face]), initial=0.0))


def flow(a: npt.ArrayLike, y: npt.ArrayLike, p: float, alpha: float, residual: float = 1e-8) -> Fit:
    """Follow the gradient flow of the network until it fits.

    It takes time like alpha^(2 - p), or log(1/alpha) for p = 2, to leave the start, and longer where the solution has
    fewer entries than there are equations; `limit` gives the same end at once.

    Args:
        a: A, numbers [m, n].
        y: numbers [m].
        p: the depth, 2 or more.
        alpha: u and v at the start, positive.
        residual: where to stop: |A^T (Ax - y)| / |A^T y|. Each step may be wrong by a tenth of it, relative to u and v.

    Raises:
        InputError: a wrong shape, a number that is not finite, p < 2, or an alpha that is not positive.
        ConvergenceError: the flow did not get there in a million steps.
    """
    matrix, values = _system(a, y)
    _check_network(p, alpha)
    n = matrix.shape[1]
    goal = residual * float(np.linalg.norm(matrix.T @ values))

    def gradient(state: Array) -> Array:
        return matrix.T @ (matrix @ (state[:n] ** p - state[n:] ** p) - values)

    def rate(time: float, state: Array) -> Array:
        pull = p * gradient(state)
        return np.concatenate([-pull, pull]) * state ** (p - 1)

    end = integrate(
        rate,
        np.full(2 * n, float(alpha)),
        math.inf,
        # Steps as long as stability lets them be leave errors of this size in the residual.
        tolerance=residual / 10,
        arrived=lambda state: bool(np.linalg.norm(gradient(state)) <= goal),
    )
    u, v = end.state[:n], end.state[n:]
    scale = float(np.linalg.norm(matrix.T @ values))
    left = float(np.linalg.norm(gradient(end.state))) / scale if scale else 0.0
    return Fit(u**p - v**p, u, v, end.time, left)


def limit(a: npt.ArrayLike, y: npt.ArrayLike, p: float, alpha: float) -> Array:
    """Where the network's gradient flow ends: x, float64 [n]; Newton's method on the convex dual.

    Where no x fits, the flow ends at a least-squares fit, and so does this. Where |x|_1 has several minimizers, x along
    them is known only to about 1e-16 / alpha^(p - 2), relative to x.

    Args:
        a: A, numbers [m, n].
        y: numbers [m].
        p: the depth, 2 or more.
        alpha: u and v at the start, positive.

    Raises:
        InputError: a wrong shape, a number that is not finite, p < 2, or an alpha that is not positive.
        ConvergenceError: alpha is too small for float64: for p > 2 from alpha^(p - 2) of about 1e-11 on, and from
            alpha^p of about 1e-11 on where x tends to fewer entries than there are equations, both relative to x.
            `selected` gives what it tends to.
    """
    matrix, values = _system(a, y)
    _check_network(p, alpha)
    rows, goal = _solution_set(matrix, values)
    scale = float(np.max(np.abs(rows.T @ goal), initial=0.0))
    if scale == 0:
        return np.zeros(matrix.shape[1])
    power = math.inf if p == 2 else p / (p - 2)
    x, _ = _central_path(rows, goal / scale, p * math.log(alpha) - math.log(scale), power)
    return x * scale


def selected(a: npt.ArrayLike, y: npt.ArrayLike, p: float) -> Selection:
    """The minimizer of |x|_1 among the solutions of Ax = y that the network's flow tends to as alpha falls.

    The face of all minimizers comes from the logarithmic barrier's central path, which is `limit` for p without end;
    on it, a smooth convex function is minimized: sum x log x for p = 2, -sum x^(2/p) for p > 2. Where no x fits, the
    solutions are those of least squares.

    Args:
        a: A, numbers [m, n].
        y: numbers [m].
        p: the depth, 2 or more.

    Raises:
        InputError: a wrong shape, a number that is not finite, or p < 2.
        ConvergenceError: the face is too near to another one for float64.
    """
    matrix, values = _system(a, y)
    _check_network(p, 1.0)
    rows, goal = _solution_set(matrix, values)
    n = matrix.shape[1]
    scale = float(np.max(np.abs(rows.T @ goal), initial=0.0))
    if scale == 0:
        return Selection(np.zeros(n), np.zeros(n), np.zeros(n, np.bool_))
    x, correlations = _central_path(rows, goal / scale, math.log(_FACE_SCALE), _BARRIER)
    # On the path, |x| (1 - |w|) is about the barrier's scale: one factor vanishes with it, and the other does not.
    face = np.abs(x) > 1 - np.abs(correlations)
    signs = np.sign(x[face])
    inside = _minimum_on_face(rows[:, face] * signs, goal / scale, np.abs(x[face]), p)
    chosen = np.zeros(n)
    chosen[face] = inside * signs * scale
    return Selection(chosen, np.where(face, np.sign(x), correlations), face)


def _system(a: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    matrix, values = np.asarray(a, np.float64), np.asarray(y, np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError("A is no matrix", place="a", expected="numbers [m, n]", found=f"shape {matrix.shape}")
    if values.shape != matrix.shape[:1]:
        raise InputError(
            "y does not go with A", place="y", expected=f"shape {matrix.shape[:1]}", found=f"shape {values.shape}"
        )
    for name, numbers in (("a", matrix), ("y", values)):
        if not np.isfinite(numbers).all():
            raise InputError("there are NaN or infinite numbers", place=name, expected="finite numbers")
    return matrix, values


def _check_network(p: float, alpha: float) -> None:
    if not 2 <= p < math.inf:
        raise InputError("no such depth", place="p", expected="a finite number of 2 or more", found=p)
    if not 0 < alpha < math.inf:
        raise InputError("no such initialization", place="alpha", expected="a positive finite number", found=alpha)


def _solution_set(matrix: Array, values: Array) -> tuple[Array, Array]:
    """Orthonormal rows B [rank, n] and b with Bx = b for the least-squares fits of Ax = y and no others."""
    left, sizes, rows = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.sum(sizes > sizes[0] * max(matrix.shape) * np.finfo(np.float64).eps))
    return rows[:rank], (left[:, :rank].T @ values) / sizes[:rank]


def _network(w: Array, power: float, log_scale: float) -> tuple[Array, Array, Array]:
    """scale h(w), the root of scale h'(w), and the room for w to move in before either changes by much.

    The scale is given by its logarithm, as that of a tiny initialization need not be a float64 when x is.
    """
    size = np.abs(w)
    if power == math.inf:
        large, small = size, -size
        log_slope, room = np.logaddexp(large, small), np.ones_like(w)
    else:
        toward, away = np.log1p(-size), np.log1p(size)
        large, small = -power * toward, -power * away
        log_slope = math.log(power) + np.logaddexp(large - toward, small - away)
        room = (1 - size) / power
    x = -np.sign(w) * np.exp(log_scale + large) * np.expm1(small - large)
    return x, np.exp((log_scale + log_slope) / 2), room


def _central_path(rows: Array, goal: Array, log_scale: float, power: float) -> tuple[Array, Array]:
    """x = e^log_scale h(w) with Bx = b and w in the range of B^T; x and w, float64 [n].

    Newton's method from w = 0 at a scale where w is of order one, and on from there to smaller scales.

    Raises:
        ConvergenceError: w cannot be resolved in float64.
    """
    dual = np.zeros(len(rows))
    at = max(log_scale, 0.0)
    while True:
        dual, x = _newton(rows, goal, at, power, dual)
        if at == log_scale:
            return x, rows.T @ dual
        at = max(log_scale, at + math.log(_SHRINK))


def _newton(rows: Array, goal: Array, log_scale: float, power: float, dual: Array) -> tuple[Array, Array]:
    for _ in range(200):
        x, root, room = _network(rows.T @ dual, power, log_scale)
        missing = goal - rows @ x
        # B diag(root^2) B^T step = missing. Its square root is factorized, largest rows first, since entries of x that
        # vanish with the scale decide the dual where the others are fewer than the equations.
        order = np.argsort(-root)
        triangle = np.linalg.qr((rows * root).T[order])[1]
        try:
            step = np.linalg.solve(triangle, np.linalg.solve(triangle.T, missing))
        except np.linalg.LinAlgError:
            break
        move = rows.T @ step
        length, gain = 1.0, float(missing @ step)
        if float(np.max(np.abs(move) / room)) <= _SETTLED:
            return dual + step, x + root**2 * move
        # The function is convex along the step: shorten it until its slope has not turned by much.
        while length > 1e-12:
            with np.errstate(all="ignore"):
                ahead = _network(rows.T @ (dual + length * step), power, log_scale)[0]
            if np.isfinite(ahead).all() and float((rows @ ahead - goal) @ step) <= 0.5 * gain:
                break
            length /= 2
        else:
            break
        dual = dual + length * step
    raise ConvergenceError(
        "the dual could not be solved in float64",
        place=f"scale {math.exp(log_scale):.3g} relative to x",
        remedy="use a larger initialization, or `selected` for what the limit tends to",
    )


def _minimum_on_face(rows: Array, goal: Array, start: Array, p: float) -> Array:
    """The x > 0 with Bx = b that minimizes sum x log x (p = 2) or -sum x^(2/p); from the inner point ``start``."""
    _, sizes, basis = np.linalg.svd(rows)
    rank = int(np.sum(sizes > 1e-9))
    free = basis[rank:].T
    x = start + np.linalg.lstsq(rows, goal - rows @ start, rcond=1e-9)[0]
    if not free.shape[1]:
        return x

    def derivatives(at: Array) -> tuple[Array, Array]:
        if p == 2:
            return np.log(at) + 1, 1 / at
        return -(at ** (2 / p - 1)), (1 - 2 / p) * at ** (2 / p - 2)

    for _ in range(200):
        slope, bend = derivatives(x)
        step: Array = free @ np.linalg.solve((free.T * bend) @ free, -(free.T @ slope))
        if float(np.max(np.abs(step) / x)) <= _SETTLED:
            return x + step
        length, gain = 1.0, -float(slope @ step)
        while length > 1e-12 and not (
            np.all(x + length * step > 0) and float(derivatives(x + length * step)[0] @ step) <= 0.5 * gain
        ):
            length /= 2
        x = x + length * step
    raise ConvergenceError(
        "the selected minimizer could not be found in float64",
        place="the face of the minimizers",
        remedy="scale the columns of A to similar sizes",
    )
