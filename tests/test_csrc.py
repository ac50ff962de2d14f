"""The C++ tests: each file of tests/csrc is built into a program by csrc/CMakeLists.txt, and each program is a test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = sorted(path.stem for path in (Path(__file__).parent / "csrc").glob("test_*.cpp"))


def _tool(name: str) -> str:
    """The program that PyPI's package `name` installed beside this Python, or else the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    return found


def _run(*command: str | Path, limit_s: float) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command[0]} gave {done.returncode}:\n{done.stdout}"


@pytest.fixture(scope="session")
def build_folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csrc")
    _run(
        _tool("cmake"),
        *("-S", repository / "csrc", "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"),
        "-DGOSLET_BUILD_TESTS=ON",
        limit_s=120,
    )
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, build_folder: Path) -> None:
    # One at a time, so that a file that does not compile fails its own test only.
    _run(_tool("cmake"), "--build", build_folder, "--target", program, "-j", "2", limit_s=600)
    _run(build_folder / program, limit_s=120)


def test_the_library_shows_the_c_api_only(build_folder: Path) -> None:
    nm = _tool("nm")
    _run(_tool("cmake"), "--build", build_folder, "--target", "goslet", "-j", "2", limit_s=600)
    listing = subprocess.run(
        [nm, "-D", "--defined-only", str(build_folder / "libgoslet.so")], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    # The standard library's templates are weak or unique symbols of default visibility; those of ours would name us.
    ours = [name for kind, name in symbols if kind not in "WVu" or "goslet" in name]
    assert ours
    assert [name for name in ours if not name.startswith("goslet_")] == []
