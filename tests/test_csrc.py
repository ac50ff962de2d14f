"""The C++ tests: each file of tests/csrc is built into a program by csrc/CMakeLists.txt, and each program is a test."""

import subprocess
from pathlib import Path

import pytest
from programs import build_csrc, execute, tool

PROGRAMS = sorted(path.stem for path in (Path(__file__).parent / "csrc").glob("test_*.cpp"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, csrc_build: Path) -> None:
    # One at a time, so that a file that does not compile fails its own test only.
    build_csrc(csrc_build, program)
    execute(csrc_build / program, limit_s=120)


def test_the_library_shows_the_c_api_only(csrc_build: Path) -> None:
    nm = tool("nm")
    build_csrc(csrc_build, "goslet")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", str(csrc_build / "libgoslet.so")], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    # The standard library's templates are weak or unique symbols of default visibility; those of ours would name us.
    ours = [name for kind, name in symbols if kind not in "WVu" or "goslet" in name]
    assert ours
    assert [name for name in ours if not name.startswith("goslet_")] == []
