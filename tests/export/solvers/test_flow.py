"""The integrator of flows, against flows whose ends are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from goslet.errors import ConvergenceError
from goslet.export.solvers.flow import integrate


@pytest.mark.parametrize("tolerance", (1e-6, 1e-9, 1e-12))
def test_the_error_follows_the_tolerance(tolerance: float) -> None:
    # dy/dt = i y, as two real numbers. Errors of steps add up, undamped, over a hundred steps and more.
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    end = integrate(lambda time, y: turn @ y, np.array([1.0, 0.0]), 10.0, tolerance=tolerance, floor=1.0)
    assert end.time == 10.0
    assert np.abs(end.state - [math.cos(10), math.sin(10)]).max() <= end.steps * tolerance + 1e-14


def test_the_time_is_passed_on() -> None:
    end = integrate(lambda time, y: np.full(1, 5 * time**4), np.zeros(1), 2.0, tolerance=1e-9, floor=1.0)
    assert end.state == pytest.approx([32.0], rel=1e-8)


def test_it_ends_where_it_is_told_to() -> None:
    end = integrate(
        lambda time, y: y, np.ones(1), math.inf, tolerance=1e-9, arrived=lambda y: bool(y[0] > 10), max_steps=1000
    )
    assert 10 < end.state[0] < 100
    assert end.state[0] == pytest.approx(math.exp(end.time), rel=1e-7)


def test_a_flow_that_stands_still_stays() -> None:
    end = integrate(lambda time, y: np.zeros(2), np.array([1.0, 0.0]), 5.0, tolerance=1e-9)
    assert end.time == 5.0 and end.state.tolist() == [1.0, 0.0]


def test_a_flow_that_leaves_all_bounds_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match=r"time 1.*could not be followed"):
        integrate(lambda time, y: y**2, np.ones(1), 2.0, tolerance=1e-9)


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(ConvergenceError, match="expected 3 steps"):
        integrate(lambda time, y: y, np.ones(1), 50.0, tolerance=1e-9, max_steps=3)
