"""Other people's programs that tests run: compilers and build tools."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """The program that PyPI's package `name` installed beside this Python, or else the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    return found


def execute(*command: str | Path, limit_s: float) -> None:
    """Run a program that must succeed; the test's message is what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command[0]} gave {done.returncode}:\n{done.stdout}"


def build_csrc(folder: Path, target: str) -> None:
    """Build one target in a folder that the fixture `csrc_build` made."""
    execute(tool("cmake"), "--build", folder, "--target", target, "-j", "2", limit_s=600)
