from __future__ import annotations

import io
import sys

import pytest

from goslet import cli

from .command_line import Outcome, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process, with `stdin` piped in."""

    def run_command(*words: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run_command
