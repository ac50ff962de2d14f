"""The set-up scripts: they parse, their pins cover what setup.py asks for, and they install only when they must."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "tools/demo", "tools/test", "tools/check_sanitizers", "tools/check_aarch64", "tools/check_trt_headers",
    "tools/build_cuda", ".ci/run",
)  # fmt: skip


@pytest.mark.parametrize("script", [*SCRIPTS, "tools/environment.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_what_can_be_run_says_what_runs_it() -> None:
    """Without a first line a shell takes a Python file for its own, where `import` may be another program."""
    programs = [path for path in (ROOT / "tools").iterdir() if path.is_file() and os.access(path, os.X_OK)]
    assert len(programs) > 5
    for path in programs:
        assert path.read_bytes().splitlines()[0] in (b"#!/usr/bin/env bash", b"#!/usr/bin/env python3"), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_run_and_stop_at_the_first_failure(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    lines = (ROOT / script).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


# ---------------------------------------------------------------------------------------------------------------- pins


def pins(name: str) -> dict[str, str]:
    """Version by normalized name, of the file and those that it includes."""
    found = {}
    for line in (ROOT / "tools" / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= pins(line[3:])
        elif line:
            line = line.removesuffix(' ; platform_machine == "x86_64"')
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"{name}: {line!r} is not a pin"
            key = re.sub(r"[-_.]+", "-", match[1]).lower()
            assert key not in found, f"{name}: {key} is pinned twice"
            found[key] = match[2]
    return found


def setup_requirements() -> dict[str, list[str]]:
    """What setup.py asks for, by extra; "" is what goslet always needs."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup"]
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    return {"": ast.literal_eval(arguments["install_requires"]), **ast.literal_eval(arguments["extras_require"])}


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("requirements-demo.txt", ["", "export", "ort"]),
        ("requirements-test.txt", ["", "export", "ort", "test"]),
        ("requirements-eval.txt", ["", "export", "ort", "test", "eval"]),
    ],
)
def test_pins_cover_setup_py(name: str, extras: list[str]) -> None:
    requirements = pytest.importorskip("packaging.requirements", reason="reading requirements needs packaging")
    pinned = pins(name)
    required = setup_requirements()
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for text in [*build_system, *(text for extra in extras for text in required[extra])]:
        requirement = requirements.Requirement(text)
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert key in pinned, f"{name} lacks {text}"
        assert requirement.specifier.contains(pinned[key]), f"{name} pins {key}=={pinned[key]}, setup.py wants {text}"


# ------------------------------------------------------------------------------------------------------ the environment


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository whose .venv has a Python that only writes down how it is called."""
    root = tmp_path / "a repository"
    for folder in ("tools", "csrc/kernels", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    for name in ("environment.sh", "requirements-demo.txt", "requirements-test.txt"):
        shutil.copy(ROOT / "tools" / name, root / "tools")
    for name in ("setup.py", "pyproject.toml", "csrc/a.cpp", "csrc/kernels/b.h"):
        (root / name).write_text(name)
    program(root / ".venv/bin/python", 'echo "$*" >>"$0.calls"')
    program(root / "bin/g++", "")
    return root


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def source(tree: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands after tools/environment.sh, from another directory."""
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "$1"; {commands}', "bash", str(tree / "tools/environment.sh")],
        cwd="/",
        env={**os.environ, "PATH": f"{tree / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def installs(tree: Path, name: str) -> list[str]:
    """What `prepare` installs now."""
    calls = tree / ".venv/bin/python.calls"
    calls.unlink(missing_ok=True)
    done = source(tree, f"prepare {name}")
    assert done.returncode == 0, done.stderr
    return [line for line in calls.read_text().splitlines() if "pip install" in line]


def test_a_second_run_installs_nothing_until_something_changed(tree: Path) -> None:
    first = installs(tree, "demo")
    assert len(first) == 3
    assert first[0].endswith(f" pip=={pins('requirements-demo.txt')['pip']}")
    assert first[1].endswith(f"-r {tree}/tools/requirements-demo.txt")
    assert first[2].endswith(f"--no-build-isolation --no-deps --editable {tree}")
    assert installs(tree, "demo") == []
    for changed in ("csrc/kernels/b.h", "setup.py", "pyproject.toml", "tools/requirements-demo.txt"):
        with open(tree / changed, "a") as file:
            file.write("\n# changed\n")
        assert len(installs(tree, "demo")) == 3, changed
        assert installs(tree, "demo") == []


def test_what_the_tests_need_is_enough_for_the_demo_but_not_the_reverse(tree: Path) -> None:
    assert installs(tree, "demo") != []
    assert installs(tree, "test") != []
    (tree / ".venv/goslet-demo.stamp").unlink()
    assert installs(tree, "demo") == []


def test_a_missing_native_module_is_built_again(tree: Path) -> None:
    assert installs(tree, "test") != []
    program(tree / ".venv/bin/python", 'echo "$*" >>"$0.calls"; case "$*" in *goslet._native*) exit 1 ;; esac')
    assert installs(tree, "test") != []


def test_a_failing_installation_is_tried_again(tree: Path) -> None:
    program(tree / ".venv/bin/python", 'case "$*" in *--editable*) exit 1 ;; esac')
    assert source(tree, "prepare demo").returncode != 0
    assert not (tree / ".venv/goslet-demo.stamp").exists()


def test_a_broken_environment_is_not_removed(tree: Path) -> None:
    program(tree / ".venv/bin/python", "exit 1")
    done = source(tree, "prepare demo")
    assert done.returncode == 1
    assert done.stderr == f"goslet: error: {tree}/.venv is not a working environment; remove it and try again\n"
    assert (tree / ".venv/bin/python").exists()


def test_an_old_python_is_named_with_what_to_install(tree: Path) -> None:
    shutil.rmtree(tree / ".venv")
    program(tree / "bin/python3", 'test "$1" = --version && echo "Python 3.9.2"; exit 1')
    for minor in range(11, 15):
        program(tree / f"bin/python3.{minor}", "exit 1")
    done = source(tree, "prepare demo")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed (found: Python 3.9.2)" in done.stderr
    assert "apt install python3 python3-venv python3-dev" in done.stderr
    assert not (tree / ".venv").exists()


def test_missing_system_packages_are_named_together(tree: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program(
        tree / "bin/lacking", f'case "$2" in *version_info*) exec {shlex.quote(sys.executable)} "$@" ;; esac; exit 1'
    )
    done = source(tree, 'PATH=/nowhere; check_system "$ROOT/bin/lacking"')
    assert done.returncode == 1
    assert done.stderr == (
        f"goslet: error: something is missing; on Debian: apt install {version}-venv {version}-dev g++\n"
    )
