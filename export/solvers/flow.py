"""Integrating a flow dy/dt = f(t, y) with an error that is controlled at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ConvergenceError

Array = npt.NDArray[np.float64]

# The pair of orders 5 and 4 of Dormand and Prince (1980): stages, the solution's weights, those of its error.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class Arrival:
    """Where an integration ended.

    Attributes:
        state: float64, of the start's shape.
        time: the time reached, in the flow's own unit.
        steps: accepted steps.
    """

    state: Array
    time: float
    steps: int


def integrate(
    rate: Callable[[float, Array], Array],
    start: Array,
    duration: float,
    *,
    tolerance: float,
    floor: float = 1e-300,
    arrived: Callable[[Array], bool] = lambda state: False,
    max_steps: int = 1_000_000,
) -> Arrival:
    """Follow dy/dt = rate(t, y) from ``start`` at time 0 (Dormand and Prince's method of order 5).

    Args:
        rate: gives dy/dt, an array of the start's shape.
        start: y(0), float64 of any shape.
        duration: the time to follow it for; may be infinite when ``arrived`` ends it.
        tolerance: the error allowed to one step, relative to the size of each number.
        floor: a size below which numbers may be that wrong in absolute terms.
        arrived: ends the integration early when true of the state.
        max_steps: steps tried before giving up.

    Raises:
        ConvergenceError: the end was not reached in ``max_steps``, or steps became too short to move the time.
    """
    state, time, steps = start, 0.0, 0
    slope = rate(time, state)
    size = float(np.max(np.abs(slope) / (np.abs(state) + floor), initial=0.0))
    step = min(duration, 0.01 / size if size > 0 else 1.0)
    for _ in range(max_steps):
        if time >= duration or arrived(state):
            return Arrival(state, time, steps)
        step = min(step, duration - time)
        slopes = [slope]
        # A step that is too long may leave the rate's domain; its NaN then shortens it.
        with np.errstate(over="ignore", invalid="ignore"):
            for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
                moved = state + step * sum(w * k for w, k in zip(weights, slopes, strict=True))
                slopes.append(rate(time + node * step, moved))
            wrong = step * sum(w * k for w, k in zip(_ERROR, slopes, strict=True))
            allowed = tolerance * (np.maximum(np.abs(state), np.abs(moved)) + floor)
            ratio = float(np.max(np.abs(wrong) / allowed, initial=0.0))
        if ratio <= 1.0:  # false for NaN too
            state, slope = moved, slopes[-1]
            # The sum would round, and leave a last step too short to be made.
            time, steps = (duration if step == duration - time else time + step), steps + 1
        step *= min(5.0, max(0.2, 0.9 * ratio**-0.2)) if ratio > 0 else (0.2 if np.isnan(ratio) else 5.0)
        if not step > 1e-15 * time:
            break
    raise ConvergenceError(
        "the flow could not be followed to its end",
        place=f"time {time:.6g}",
        expected=f"{max_steps} steps to be enough",
        found=f"{steps} accepted, the next {step:.3g} long",
        remedy="allow more steps or a larger tolerance, or start the flow from larger numbers",
    )
