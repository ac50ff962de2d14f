"""Matrix sensing: the descent against its formulas, and what the paper predicts of it."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from goslet.errors import ConvergenceError, InputError
from goslet.export.solvers.matrix_sensing import (
    CHECK_STEPS,
    Recovery,
    Sketches,
    gaussian_sketches,
    min_norm,
    perturbed_flow,
    recover,
)

Array = npt.NDArray[np.float64]

SIDE, RANK = 20, 2
UNKNOWNS = RANK * (SIDE + SIDE)  # r (n1 + n2), in which the paper counts measurements
FREEDOM = RANK * (SIDE + SIDE - RANK)  # the dimension of the matrices of this rank


def low_rank(rng: np.random.Generator, n1: int = SIDE, n2: int = SIDE, rank: int = RANK) -> Array:
    """A matrix whose singular values are all 1, or 0."""
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (n1, n2))
    return np.asarray(left @ right.T)


def error(found: Recovery, target: Array) -> float:
    return float(np.linalg.norm(found.left @ found.right - target) / np.linalg.norm(target))


def slope(x: tuple[float, ...], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def run(
    seed: int,
    ratio: float,
    *,
    rank: int = SIDE,
    init: float = 1e-4,
    steps: int = 1500,
    noise: float = 0.0,
    tail: float = 0.0,
    patience: int | None = None,
) -> tuple[float, Recovery]:
    """The low-rank part's relative error, by descent on ratio * r (n1 + n2) sketches of it and of a tail."""
    rng = np.random.default_rng(seed)
    target = low_rank(rng)
    rest = rng.standard_normal(target.shape)
    rest -= target @ (target.T @ rest)
    rest -= (rest @ target.T) @ target
    whole = target + tail * rest / np.linalg.norm(rest)
    sketches = gaussian_sketches(whole, round(ratio * UNKNOWNS), rng, noise)
    held_out = gaussian_sketches(whole, 200, rng, noise)
    found = recover(sketches, rank, held_out, init=init, rate=0.5, steps=steps, patience=patience)
    return error(found, target), found


class TestDescent:
    def test_a_step_goes_down_the_gradient_of_the_loss(self) -> None:
        rng = np.random.default_rng(0)
        target = low_rank(rng, 5, 7)
        sketches, held_out = gaussian_sketches(target, 40, rng), gaussian_sketches(target, 10, rng)
        before, after = (recover(sketches, 3, held_out, init=0.3, steps=steps) for steps in (30, 31))

        def loss(left: Array, right: Array) -> float:
            left_out = np.einsum("mi,ij,mj->m", sketches.left, left @ right, sketches.right) - sketches.values
            return float(np.mean(left_out**2)) / 2

        mean = np.einsum("m,mi,mj->ij", sketches.values, sketches.left, sketches.right) / 40
        length = 0.25 / float(np.linalg.norm(mean, 2))
        for name in ("left", "right"):
            moved = getattr(after, name) - getattr(before, name)
            for place in np.ndindex(moved.shape):
                losses = []
                for shift in (1e-5, -1e-5):
                    factors = {"left": before.left.copy(), "right": before.right.copy()}
                    factors[name][place] += shift
                    losses.append(loss(**factors))
                # Central differences are wrong by 1e-10; the estimate of the norm in ``length`` by a part in a hundred.
                assert moved[place] == pytest.approx(-length * (losses[0] - losses[1]) / 2e-5, rel=0.01, abs=1e-8)

    def test_the_history_is_the_loss_on_the_held_out_sketches(self) -> None:
        rng = np.random.default_rng(1)
        target = low_rank(rng)
        sketches, held_out = gaussian_sketches(target, 240, rng), gaussian_sketches(target, 50, rng)
        found = recover(sketches, 4, held_out, steps=35)
        assert [step for step, _ in found.history] == [0, CHECK_STEPS, 2 * CHECK_STEPS, 3 * CHECK_STEPS, 35]
        left_out = np.einsum("mi,ij,mj->m", held_out.left, found.left @ found.right, held_out.right) - held_out.values
        assert found.history[-1][1] == pytest.approx(np.mean(left_out**2) / np.mean(held_out.values**2), rel=1e-9)
        assert found.history[0][1] == pytest.approx(1, abs=1e-4)

    def test_one_seed_is_one_run(self) -> None:
        assert np.array_equal(run(0, 2, steps=50)[1].left, run(0, 2, steps=50)[1].left)

    def test_scales_go_through(self) -> None:
        rng = np.random.default_rng(2)
        sketches = gaussian_sketches(low_rank(rng), 240, rng)
        scaled = Sketches(sketches.left, 1e4 * sketches.right, 1e10 * sketches.values)  # of 1e6 times the matrix
        plain, large = recover(sketches, 3, sketches, steps=100), recover(scaled, 3, scaled, steps=100)
        assert np.allclose(large.left, 1e3 * plain.left, rtol=1e-9)
        assert np.allclose(large.right, 1e3 * plain.right, rtol=1e-9)

    def test_it_never_forms_the_matrix(self) -> None:
        n, rank, batch = 2000, 2, 50
        rng = np.random.default_rng(3)
        left, right = rng.standard_normal((n, 1)), rng.standard_normal((1, n))

        def draw(step: int) -> Sketches:
            fresh = np.random.default_rng([3, step])
            psi, phi = fresh.standard_normal((batch, n)), fresh.standard_normal((batch, n))
            return Sketches(psi, phi, (psi @ left)[:, 0] * (phi @ right.T)[:, 0])

        held_out = draw(1000)
        tracemalloc.start()
        try:
            recover(draw, rank, held_out, steps=20)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Two batches, one of them being drawn, with temporaries, and a few copies of the factors; the matrix is 32 MB.
        assert peak_bytes < 8 * (5 * batch * 2 * n + 20 * rank * 2 * n)


class TestRecovery:
    def test_it_sets_in_between_five_quarters_and_twice_the_unknowns(self) -> None:
        shares = {ratio: np.mean([run(seed, ratio)[0] < 0.05 for seed in range(6)]) for ratio in (1.25, 2)}
        assert shares[1.25] <= 1 / 3
        assert shares[2] >= 2 / 3

    @pytest.mark.parametrize("rank", (2 * RANK, SIDE))
    def test_three_times_the_unknowns_suffice_where_the_least_norm_does_not(self, rank: int) -> None:
        for seed in range(3):
            # The factors' surplus keeps a part of its start, so it is no exact recovery.
            assert run(seed, 3, rank=rank)[0] < 0.01
            rng = np.random.default_rng(seed)
            target = low_rank(rng)
            least = min_norm(gaussian_sketches(target, 3 * UNKNOWNS, rng))
            # What is outside of the span of m among n1 n2 directions; for any one matrix the share varies by 0.05.
            expected = math.sqrt(1 - 3 * UNKNOWNS / SIDE**2)
            assert np.linalg.norm(least - target) / np.linalg.norm(target) == pytest.approx(expected, abs=0.15)

    def test_without_a_surplus_it_is_exact(self) -> None:
        # Nothing but the signal is left to learn: the error falls linearly until it reaches rounding.
        assert run(0, 3, rank=RANK)[0] < 1e-9

    def test_min_norm_fits_and_is_least(self) -> None:
        rng = np.random.default_rng(5)
        target = low_rank(rng, 6, 8)
        sketches = gaussian_sketches(target, 20, rng)
        rows = np.einsum("mi,mj->mij", sketches.left, sketches.right).reshape(20, -1)
        assert np.allclose(min_norm(sketches).ravel(), np.linalg.pinv(rows) @ sketches.values, atol=1e-9)


class TestInitialization:
    INITS = (1e-2, 1e-3, 1e-4)

    def errors(self, ratio: float) -> list[float]:
        # Signals leave the start after a time like log(1/init); given the same time beyond that, surpluses compare.
        return [
            float(
                np.exp(
                    np.mean(
                        [math.log(run(s, ratio, init=i, steps=50 + round(50 * math.log(1 / i)))[0]) for s in range(3)]
                    )
                )
            )
            for i in self.INITS
        ]

    def test_the_error_falls_with_it(self) -> None:
        # The surplus of D C is of the order init^2; what the sketches' deviations add to it takes exponents away.
        assert slope(self.INITS, self.errors(8)) >= 0.8

    def test_at_three_times_the_unknowns_it_falls_more_slowly(self) -> None:
        # Measured 0.6 to 0.7 however the steps are counted: at 3 times, deviations let the surplus grow along with the
        # signal. That it falls at all is what recovery there rests on.
        assert slope(self.INITS, self.errors(3)) >= 0.5

    def test_in_the_flow_without_perturbation_it_falls_like_its_square(self) -> None:
        target = low_rank(np.random.default_rng(0))
        errors = []
        for init in self.INITS:
            d, c = perturbed_flow(target, no_perturbation, *small_factors(init), 2 * math.log(1 / init) + 10)
            errors.append(float(np.linalg.norm(d @ c - target)))
        assert slope(self.INITS, errors) == pytest.approx(2, abs=0.05)


class TestNoise:
    @pytest.mark.parametrize("ratio", (3, 6))
    def test_the_error_is_linear_in_it(self, ratio: float) -> None:
        levels = (1e-3, 1e-2, 1e-1)
        errors = [float(np.mean([run(s, ratio, rank=RANK, steps=1000, noise=n)[0] for s in range(4)])) for n in levels]
        assert slope(levels, errors) == pytest.approx(1, abs=0.02)
        # Least squares in the tangent space of the matrices of this rank: noise sqrt(f / (m - f - 1)). A norm of f = 76
        # numbers varies by 1/sqrt(2 f) = 8%, the mean of four by half of it, and vectors of rank one add some.
        size = math.sqrt(FREEDOM / (ratio * UNKNOWNS - FREEDOM - 1)) / math.sqrt(RANK)
        for level, found in zip(levels, errors, strict=True):
            assert 0.85 < found / (level * size) < 1.25

    def test_the_perturbed_flow_too(self) -> None:
        target = low_rank(np.random.default_rng(0))
        turning = turning_matrices()
        levels, errors = (0.01, 0.03, 0.1), []
        for level in levels:
            start = small_factors(1e-5)
            d, c = perturbed_flow(target, lambda t, _, level=level: level * turning(t), *start, 46)  # type: ignore[misc]
            errors.append(float(np.linalg.norm(d @ c - target, 2)))
            # In the range of X, DC follows X + E, and no faster than E turns.
            assert errors[-1] < 2 * level
        assert slope(levels, errors) == pytest.approx(1, abs=0.05)


class TestFullRankTail:
    @pytest.mark.parametrize("ratio", (3, 6, 12))
    def test_the_error_is_proportional_to_its_energy_and_falls_with_more_sketches(self, ratio: float) -> None:
        # psi^T T phi has the variance |T|^2: the tail acts as noise of that size, and the same formula holds.
        size = math.sqrt(FREEDOM / (ratio * UNKNOWNS - FREEDOM - 1)) / math.sqrt(RANK)
        for tail in (0.05, 0.2):
            found = float(np.mean([run(s, ratio, rank=RANK, steps=1000, tail=tail)[0] for s in range(4)]))
            assert 0.85 < found / (tail * size) < 1.25

    def test_with_a_surplus_of_factors_stopping_early_keeps_it_out(self) -> None:
        # With more factors than the rank and fewer sketches than n1 n2, descent goes on to fit the tail's sketches.
        for tail in (0.1, 0.2):
            pairs = [(run(s, 3, tail=tail)[0], run(s, 3, tail=tail, patience=300)[0]) for s in range(3)]
            ends, stopped = np.mean(pairs, 0)
            assert stopped < 0.85 * ends

    def test_stopping_early_gives_the_factors_of_the_best_loss(self) -> None:
        _, found = run(0, 3, tail=0.2, patience=300)
        losses = dict(found.history)
        assert losses[found.step] == min(losses.values())
        assert found.history[-1][0] == found.step + 300


class TestFreshSketches:
    def test_small_batches_that_change_at_every_step_converge(self) -> None:
        rng = np.random.default_rng(6)
        target = low_rank(rng)
        held_out = gaussian_sketches(target, 100, rng)
        batch = UNKNOWNS // 8
        found = recover(
            lambda step: gaussian_sketches(target, batch, np.random.default_rng([6, step])),
            *(SIDE, held_out),
            rate=0.1,
            steps=1500,
        )
        # The noise of a batch vanishes with the error: no floor but the surplus, of the order of init = 1e-3.
        assert error(found, target) < 1e-3
        fixed = gaussian_sketches(target, batch, rng)
        assert error(recover(fixed, SIDE, held_out, rate=0.1, steps=1500), target) > 0.5

    def test_the_error_falls_with_the_initialization(self) -> None:
        inits, errors = (1e-2, 1e-3, 1e-4), []
        rng = np.random.default_rng(7)
        target = low_rank(rng)
        held_out = gaussian_sketches(target, 100, rng)
        for init in inits:
            found = recover(
                lambda step: gaussian_sketches(target, UNKNOWNS // 2, np.random.default_rng([7, step])),
                *(SIDE, held_out),
                init=init,
                steps=200 + round(60 * math.log(1 / init)),
            )
            errors.append(error(found, target))
        assert slope(inits, errors) >= 0.8


class TestPerturbedFlow:
    def test_descent_in_short_steps_is_the_flow_perturbed_by_its_sketches(self) -> None:
        rng = np.random.default_rng(8)
        target = low_rank(rng, 6, 5)
        sketches = gaussian_sketches(target, 80, rng)
        rows = np.einsum("mi,mj->mij", sketches.left, sketches.right)

        def deviation(time: float, residual: Array) -> Array:
            return np.asarray(np.einsum("mij,m->ij", rows, np.einsum("mij,ij->m", rows, residual)) / 80 - residual)

        rate, steps = 1e-3, 2000
        begin, end = (recover(sketches, 3, sketches, init=0.3, rate=rate, steps=n) for n in (1, steps + 1))
        mean = np.einsum("m,mij->ij", sketches.values, rows) / 80
        duration = steps * rate / float(np.linalg.norm(mean, 2))
        d, c = perturbed_flow(target, deviation, begin.left, begin.right, duration)
        # Euler's method: an error of the order of one step's length, over a way of order one.
        assert np.linalg.norm(end.left @ end.right - begin.left @ begin.right) > 0.3
        assert np.linalg.norm(d @ c - end.left @ end.right) < 0.01

    @pytest.mark.parametrize("share", (0.3, 0.7))
    def test_a_perturbation_that_vanishes_with_the_residual_leaves_the_end_where_it_is(self, share: float) -> None:
        target = low_rank(np.random.default_rng(0))
        turning = turning_matrices()

        def perturbation(time: float, residual: Array) -> Array:
            return share * float(np.linalg.norm(residual, 2)) * turning(time)

        d, c = perturbed_flow(target, perturbation, *small_factors(1e-3), 4 * math.log(1e3) + 40)
        assert np.linalg.norm(d @ c - target) < 1e-3

    def test_one_number_follows_its_formula(self) -> None:
        # With D = C = sqrt(s), ds/dt = 2 s (1 - s).
        d, c = perturbed_flow([[1.0]], no_perturbation, [[0.1]], [[0.1]], 3.0)
        expected = 1 / (1 + 99 * math.exp(-6))
        assert float((d @ c)[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert d == pytest.approx(c)

    def test_shapes_that_do_not_go_together_are_an_error(self) -> None:
        with pytest.raises(InputError, match=r"factors do not go.*found \(2, 3\), \(2, 1\) and \(2, 3\)"):
            perturbed_flow(np.ones((2, 3)), no_perturbation, np.ones((2, 1)), np.ones((2, 3)), 1.0)


def no_perturbation(time: float, residual: Array) -> Array:
    return np.zeros_like(residual)


def turning_matrices() -> Callable[[float], Array]:
    """A matrix of spectral norm at most 1 that turns with time."""
    one, two = (np.linalg.qr(np.random.default_rng(seed).standard_normal((SIDE, SIDE)))[0] for seed in (0, 1))
    return lambda time: (math.cos(time) * one + math.sin(time) * two) / math.sqrt(2)


def small_factors(init: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(9)
    scale = init / (2 * math.sqrt(SIDE))  # as `recover` does, a spectral norm of about init
    return scale * rng.standard_normal((SIDE, SIDE)), scale * rng.standard_normal((SIDE, SIDE))


class TestBadInput:
    GOOD = gaussian_sketches(np.ones((4, 5)), 10, np.random.default_rng(0))

    @pytest.mark.parametrize(
        "left, right, values, message",
        (
            ((3,), (3, 5), (3,), r"left: these are no sketches \(expected shape \[m, n\], found shape \(3,\)\)"),
            ((3, 4), (3, 0), (3,), "right: these are no sketches"),
            ((3, 4), (3, 5), (3, 1), "values: these are no sketches"),
            ((0, 4), (0, 5), (0,), "left: these are no sketches"),
            ((3, 4), (2, 5), (3,), r"right: a sketch has one of each \(expected 3, found 2\)"),
            ((3, 4), (3, 5), (4,), r"values: a sketch has one of each \(expected 3, found 4\)"),
        ),
    )
    def test_shapes(self, left: tuple[int, ...], right: tuple[int, ...], values: tuple[int, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Sketches(np.ones(left), np.ones(right), np.ones(values))

    @pytest.mark.parametrize("name", ("left", "right", "values"))
    def test_numbers_that_are_not_finite(self, name: str) -> None:
        parts = {"left": np.ones((3, 4)), "right": np.ones((3, 5)), "values": np.ones(3)}
        parts[name].flat[1] = np.nan
        with pytest.raises(InputError, match=f"{name}: there are NaN"):
            Sketches(**parts)

    @pytest.mark.parametrize("rank", (0, -1, 5))
    def test_ranks(self, rank: int) -> None:
        with pytest.raises(InputError, match=f"rank: a matrix has no such rank.*1 to 4 for 4 x 5, found {rank}"):
            recover(self.GOOD, rank, self.GOOD)

    @pytest.mark.parametrize("name", ("init", "rate", "steps", "patience"))
    @pytest.mark.parametrize("value", (0, -1, math.nan))
    def test_arguments_out_of_range(self, name: str, value: float) -> None:
        with pytest.raises(InputError, match=f"{name}: this must be positive"):
            recover(self.GOOD, 2, self.GOOD, **{name: value})  # type: ignore[arg-type]

    def test_sketches_of_another_matrix(self) -> None:
        other = gaussian_sketches(np.ones((4, 6)), 10, np.random.default_rng(0))
        with pytest.raises(InputError, match=r"step 0.*expected vectors of 4 and 5 numbers, found 4 and 6"):
            recover(other, 2, self.GOOD)
        with pytest.raises(InputError, match="step 3"):
            recover(lambda step: other if step == 3 else self.GOOD, 2, self.GOOD)

    def test_nothing_to_find(self) -> None:
        zeros = gaussian_sketches(np.zeros((4, 5)), 10, np.random.default_rng(0))
        with pytest.raises(InputError, match="every sketch is zero"):
            recover(zeros, 2, zeros)

    def test_steps_that_are_too_long(self) -> None:
        with pytest.raises(ConvergenceError, match=r"descent diverged.*smaller rate"):
            recover(self.GOOD, 2, self.GOOD, rate=100)
