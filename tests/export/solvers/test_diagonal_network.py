"""Diagonal linear networks: the flow, its limit and what the limit tends to, held to one another and to the theory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from goslet.errors import ConvergenceError, InputError
from goslet.export.solvers.diagonal_network import flow, limit, selected

Array = npt.NDArray[np.float64]

# Every x >= 0 with Ax = y has |x|_1 = 3: the minimizers are a line, and only the depth says which is found.
LINE = ([[1.0, 1.0, 1.0], [3.0, 0.0, 1.0]], [3.0, 3.0])


def on_the_line(p: float) -> Array:
    """The stationary point of sum x log x (p = 2) or sum x^(2/p) along (1 - t, 2 (1 - t), 3 t), by hand."""
    odds = 2 ** (2 / 3) / 3 if p == 2 else (3 ** (2 / p) / (2 ** (2 / p) + 1)) ** (p / (p - 2))
    t = odds / (1 + odds)
    return np.array([1 - t, 2 * (1 - t), 3 * t])


def sparse_problem(seed: int, equations: int = 8, unknowns: int = 16) -> tuple[Array, Array, Array]:
    """A, y and the only minimizer of |x|_1, of two entries."""
    rng = np.random.default_rng(seed)
    a, x = rng.standard_normal((equations, unknowns)), np.zeros(unknowns)
    x[:2] = 1.0, -2.0
    return a, a @ x, x


def several_minimizers(seed: int) -> tuple[Array, Array, Array]:
    """A, y and a solution without zeros; all solutions of its signs have its |x|_1, as the signs are a row of A."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(7)
    a = np.vstack([np.sign(x), rng.standard_normal((2, 7))])
    return a, a @ x, x


def slope(alphas: Array, distances: Array) -> float:
    return float(np.polyfit(np.log(alphas), np.log(distances), 1)[0])


def selection_value(x: Array, p: float) -> float:
    """What the depth minimizes among the minimizers of |x|_1."""
    size = np.abs(x[x != 0])
    return float(np.sum(size * np.log(size)) if p == 2 else -np.sum(size ** (2 / p)))


class TestLimit:
    @pytest.mark.parametrize("p", (2, 2.5, 3, 4))
    @pytest.mark.parametrize("alpha", (0.3, 0.05))
    def test_it_is_where_the_flow_ends(self, p: float, alpha: float) -> None:
        a, y = np.array(LINE[0]), np.array(LINE[1])
        end = flow(a, y, p, alpha)
        # What is missing in the range of A^T is the residual over sigma^2; in the kernel, only errors of the steps.
        sigma = float(np.linalg.svd(a)[1][-1])
        missing = end.residual * float(np.linalg.norm(a.T @ y)) / sigma**2
        assert end.residual <= 1e-8
        assert np.linalg.norm(end.x - limit(a, y, p, alpha)) <= 10 * missing + 1e-8
        assert np.array_equal(end.x, end.u**p - end.v**p)

    @pytest.mark.parametrize("p", (2, 3))
    def test_it_is_where_the_flow_ends_with_both_signs_and_fewer_entries_than_equations(self, p: float) -> None:
        a, y, _ = sparse_problem(0, 3, 5)
        assert np.abs(flow(a, y, p, 0.3).x - limit(a, y, p, 0.3)).max() < 1e-6

    @pytest.mark.parametrize("p", (2, 2.01, 3, 6, 50))
    def test_it_fits_and_is_stationary(self, p: float) -> None:
        a, y, _ = several_minimizers(3)
        alpha = 0.8
        x = limit(a, y, p, alpha)
        assert np.abs(a @ x - y).max() < 1e-11
        # u v = alpha^2 g(w): recover w from x by bisection, and see that it lies in the range of A^T.
        low, high = (-700.0, 700.0) if p == 2 else (-1 + 1e-15, 1 - 1e-15)
        lower, upper = np.full(7, low), np.full(7, high)
        for _ in range(200):
            w = (lower + upper) / 2
            q = 0.0 if p == 2 else p / (p - 2)
            h = 2 * np.sinh(w) if p == 2 else (1 - w) ** -q - (1 + w) ** -q
            below = alpha**p * h < x
            lower, upper = np.where(below, w, lower), np.where(below, upper, w)
        outside = w - a.T @ np.linalg.lstsq(a.T, w, rcond=None)[0]
        assert np.abs(outside).max() < 1e-9 * np.abs(w).max()

    def test_scales_go_through(self) -> None:
        a, y, _ = sparse_problem(1)
        for factor in (1e-6, 1e6):
            scaled = limit(a, factor * y, 3, factor ** (1 / 3) * 0.1)
            assert np.allclose(scaled, factor * limit(a, y, 3, 0.1), rtol=1e-9, atol=0)
        assert np.allclose(limit(100 * a, 100 * y, 3, 0.1), limit(a, y, 3, 0.1), rtol=1e-9, atol=0)

    def test_a_large_start_gives_the_least_squares_solution_of_least_norm(self) -> None:
        # h is linear near 0, so x is alpha^p h'(0) A^T z up to (x / alpha^p)^2, relatively.
        a, y, _ = sparse_problem(2)
        assert np.allclose(limit(a, y, 3, 100.0), np.linalg.pinv(a) @ y, rtol=1e-9, atol=1e-9)

    def test_where_nothing_fits_it_is_a_least_squares_fit(self) -> None:
        a = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
        x = limit(a, [1.0, 2.0, 3.0], 3, 0.01)
        assert x == pytest.approx([1.0, 1.0], rel=1e-9)
        assert flow(a, [1.0, 2.0, 3.0], 3, 0.1).x == pytest.approx([1.0, 1.0], rel=1e-6)

    def test_zero_gives_zero(self) -> None:
        assert not limit([[1.0, 2.0]], [0.0], 3, 0.1).any()
        assert not selected([[1.0, 2.0]], [0.0], 3).x.any()
        assert not flow([[1.0, 2.0]], [0.0], 3, 0.1).x.any()

    def test_what_float64_cannot_resolve_is_an_error(self) -> None:
        with pytest.raises(ConvergenceError, match="larger initialization"):
            limit(*LINE, 10, 1e-3)


class TestRates:
    @pytest.mark.parametrize("p, alphas", ((3, (1e-4, 1e-3)), (4, (1e-3, 1e-2)), (6, (1e-2, 1e-1))))
    def test_beyond_depth_2_the_distance_is_proportional_to_alpha_to_the_p(
        self, p: int, alphas: tuple[float, float]
    ) -> None:
        # Off the support h is taken at rho (1 - O(alpha^(p - 2))): its logarithm moves by at most
        # q alpha^(p - 2) rho / (1 - rho), and by that over the logarithm of the range the slope.
        rho, q = 0.9, p / (p - 2)
        grid = np.geomspace(*alphas, 5)
        distances = np.array([np.linalg.norm(limit([[1, rho]], [1], p, alpha) - [1, 0]) for alpha in grid])
        allowed = 2 * q * alphas[1] ** (p - 2) * rho / (1 - rho) / math.log(alphas[1] / alphas[0])
        assert slope(grid, distances) == pytest.approx(p, abs=allowed + 1e-3)

    @pytest.mark.parametrize("seed", range(3))
    def test_so_it_is_for_a_sparse_solution_of_more_equations(self, seed: int) -> None:
        a, y, x = sparse_problem(seed, equations=10)
        grid = np.geomspace(5e-4, 5e-3, 4)
        distances = np.array([np.linalg.norm(limit(a, y, 3, alpha) - x) for alpha in grid])
        # As above with |x|^(-1/3) <= 1.
        rho = selected(a, y, 3).rho
        assert rho < 0.9
        assert slope(grid, distances) == pytest.approx(3, abs=2 * 3 * 5e-3 * rho / (1 - rho) / math.log(10))

    @pytest.mark.parametrize("rho", (0.9, 0.95, 0.975))
    def test_at_depth_2_it_is_slow(self, rho: float) -> None:
        # x2 = alpha^(2 (1 - rho)) x1^rho exactly, but for e^-2w; x1 = 1 - rho x2 bends the slope by about x2.
        found = selected([[1, rho]], [1], 2)
        assert found.rho == pytest.approx(rho, abs=1e-8)
        grid = np.geomspace(1e-9, 1e-6, 5) ** (0.5 / (1 - rho))
        distances = np.array([np.linalg.norm(limit([[1, rho]], [1], 2, alpha) - found.x) for alpha in grid])
        assert distances.max() < 1e-5
        assert slope(grid, distances) == pytest.approx(2 * (1 - rho), rel=1e-4)

    def test_at_a_start_that_one_would_use_depth_3_is_there_and_depth_2_is_not(self) -> None:
        shallow, deep = (np.linalg.norm(limit([[1, 0.9]], [1], p, 1e-4) - [1, 0]) for p in (2, 3))
        assert shallow > 0.1 and deep < 1e-8


class TestSelection:
    @pytest.mark.parametrize("p", (2, 2.5, 3, 4, 6, 50))
    def test_on_a_line_of_minimizers_it_is_the_one_found_by_hand(self, p: float) -> None:
        found = selected(*LINE, p)
        assert np.abs(found.x - on_the_line(p)).max() < 1e-12
        assert found.face.all() and found.rho == 0 and np.allclose(found.correlations, 1)

    @pytest.mark.parametrize("p, alpha", ((2, 1e-3), (2.5, 1e-3), (3, 1e-3), (4, 1e-2), (6, 0.05)))
    def test_the_limit_tends_to_it_and_not_to_that_of_another_depth(self, p: float, alpha: float) -> None:
        x = limit(*LINE, p, alpha)
        assert (
            np.linalg.norm(x - selected(*LINE, p).x) < alpha**p + 1e-9
        )  # the second for rounding, 1e-16 / alpha^(p-2)
        others = [selected(*LINE, other).x for other in (2, 2.5, 3, 4, 6) if other != p]
        assert min(float(np.linalg.norm(x - other)) for other in others) > 1e-3

    @pytest.mark.parametrize("p", (2, 3, 5))
    @pytest.mark.parametrize("seed", range(4))
    def test_among_several_minimizers_none_has_a_better_value(self, p: float, seed: int) -> None:
        a, y, x = several_minimizers(seed)
        found = selected(a, y, p)
        assert np.abs(found.x).sum() == pytest.approx(np.abs(x).sum(), rel=1e-12)
        assert found.face.all() and np.array_equal(np.sign(found.x), np.sign(x))
        kernel = np.linalg.svd(a)[2][3:].T
        rng = np.random.default_rng(seed)
        for size in (1e-3, 1e-2, 1e-1, 1.0):
            for _ in range(20):
                other = found.x + kernel @ (size * np.abs(found.x).min() * rng.standard_normal(kernel.shape[1]))
                if np.array_equal(np.sign(other), np.sign(x)):
                    assert selection_value(other, p) > selection_value(found.x, p)

    @pytest.mark.parametrize("seed", range(6))
    def test_it_minimizes_the_sum_of_sizes(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, y = rng.standard_normal((5, 12)), rng.standard_normal(5)
        found = selected(a, y, 3)
        assert np.abs(a @ found.x - y).max() < 1e-12
        # A^T z within -1 and 1 proves it: |x'|_1 >= z^T A x' = z^T y = |x|_1 for every other solution x'.
        w = found.correlations
        assert np.abs(w).max() <= 1
        assert np.abs(w - a.T @ np.linalg.lstsq(a.T, w, rcond=None)[0]).max() < 1e-7
        assert w @ found.x == pytest.approx(np.abs(found.x).sum(), rel=1e-12)

    def test_the_only_minimizer_is_found_whatever_the_depth(self) -> None:
        a, y, x = sparse_problem(4)
        for p in (2, 3, 7):
            found = selected(a, y, p)
            assert np.abs(found.x - x).max() < 1e-12
            assert np.flatnonzero(found.face).tolist() == [0, 1]


class TestBadInput:
    @pytest.mark.parametrize(
        "a, y, p, alpha, message",
        (
            ([1.0, 2.0], [1.0], 3, 0.1, r"a: A is no matrix.*found shape \(2,\)"),
            (np.zeros((0, 3)), [], 3, 0.1, "a: A is no matrix"),
            (
                [[1.0, 2.0]],
                [1.0, 2.0],
                3,
                0.1,
                r"y: y does not go with A \(expected shape \(1,\), found shape \(2,\)\)",
            ),
            ([[1.0, math.nan]], [1.0], 3, 0.1, "a: there are NaN"),
            ([[1.0, 2.0]], [math.inf], 3, 0.1, "y: there are NaN or infinite"),
            ([[1.0, 2.0]], [1.0], 1.9, 0.1, "p: no such depth.*2 or more, found 1.9"),
            ([[1.0, 2.0]], [1.0], math.inf, 0.1, "p: no such depth"),
            ([[1.0, 2.0]], [1.0], math.nan, 0.1, "p: no such depth"),
            ([[1.0, 2.0]], [1.0], 3, 0.0, "alpha: no such initialization"),
            ([[1.0, 2.0]], [1.0], 3, math.nan, "alpha: no such initialization"),
        ),
    )
    def test_it_is_named(self, a: list[float], y: list[float], p: float, alpha: float, message: str) -> None:
        for call in (flow, limit):
            with pytest.raises(InputError, match=message):
                call(a, y, p, alpha)
        if not message.startswith("alpha"):
            with pytest.raises(InputError, match=message):
                selected(a, y, p)
