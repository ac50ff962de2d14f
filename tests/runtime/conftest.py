from __future__ import annotations

import ctypes
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import build_csrc

import goslet
from goslet import cli
from goslet.backends import cuda_driver
from goslet.commands import console

from . import capi
from .command_line import Outcome, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process, with `stdin` piped in."""
    monkeypatch.setattr(console, "_LINE_S", math.inf)  # what it says must not depend on how long it takes

    def run_command(*words: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run_command


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a CUDA driver, wherever the tests run."""
    monkeypatch.setattr(cuda_driver, "open_library", lambda: ctypes.CDLL("no_such_library.so"))


@pytest.fixture(scope="session")
def c_library(csrc_build: Path) -> Path:
    """The shared library with the C interface."""
    build_csrc(csrc_build, "goslet")
    return csrc_build / "libgoslet.so"


@pytest.fixture(scope="session")
def c_api(c_library: Path) -> ctypes.CDLL:
    """The functions of the C interface."""
    return capi.load(c_library)


@pytest.fixture
def c_engine(c_api: ctypes.CDLL, tiny_engine: Path) -> Iterator[capi.CEngine]:
    """The float32 engine of `tiny_checkpoint`, opened in C."""
    opened = capi.CEngine(c_api, tiny_engine)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def ort_engine(tiny_engine: Path) -> Iterator[goslet.Engine]:
    """The same engine on ONNX Runtime, with which the C library has no code in common."""
    with goslet.open(tiny_engine, backend="ort", threads=1) as opened:
        yield opened
