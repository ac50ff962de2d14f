"""What the tests of the command line share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

GOSLET = [sys.executable, "-m", "goslet.cli"]


class Outcome(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def assert_one_line_error(outcome: Outcome, code: int, *parts: str) -> None:
    """The command failed with this code and one line that holds these parts."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("goslet: error: "), outcome
    assert outcome.err.count("\n") == 1, outcome
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err
