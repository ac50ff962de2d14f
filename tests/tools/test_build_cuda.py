"""tools/build_cuda: what it asks nvcc for, and what it says of mistakes. The nvcc here only notes its arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf 'sm_80\\nsm_86\\nsm_87\\nsm_89\\nsm_90\\nsm_120\\n'; exit; fi
while [ "$1" != -o ]; do echo "$1" >>"$ARGUMENTS"; shift; done
shift
echo library >"$1"; shift
printf '%s\\n' "$@" >>"$ARGUMENTS"
echo part >"$TMPDIR/part"
[ -z "$SLOW" ] || sleep 60
[ -z "$FAILING" ] || exit 1
"""


class Builder:
    """The script, with our compiler on its path."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.script = repository / "tools/build_cuda"
        self.folder = folder / "work"
        self.folder.mkdir()
        (folder / "bin").mkdir()
        (folder / "bin/nvcc").write_text(NVCC)
        (folder / "bin/nvcc").chmod(0o755)
        self.written = folder / "arguments"
        self.environment = {
            **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ARGUMENTS": str(self.written),
        }  # fmt: skip

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.written.write_text("")
        return subprocess.run(
            [self.script, *words], cwd=self.folder, env={**self.environment, **variables},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def arguments(self) -> list[str]:
        return self.written.read_text().splitlines()

    def targets(self) -> list[str]:
        return [word for word in self.arguments() if word.startswith("arch=")]


@pytest.fixture
def builder(repository: Path, tmp_path: Path) -> Builder:
    return Builder(repository, tmp_path)


def test_all_targets_and_code_for_every_gpu_from_ampere_on(builder: Builder) -> None:
    made = builder.run("x.so")
    assert made.returncode == 0, made.stderr
    assert "without sm_110, which this nvcc does not know" in made.stderr
    assert builder.targets() == [
        *(f"arch=compute_{sm},code=sm_{sm}" for sm in (86, 87, 89, 90, 120)),
        "arch=compute_80,code=compute_80",
    ]
    assert os.listdir(builder.folder) == ["x.so"]


def test_a_target_may_be_written_as_people_write_it(builder: Builder) -> None:
    made = builder.run("./x.so", "sm_90", "8.7")
    assert made.returncode == 0, made.stderr
    assert builder.targets() == [
        "arch=compute_90,code=sm_90", "arch=compute_87,code=sm_87", "arch=compute_87,code=compute_87",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["--plugin", "--harness"])
@pytest.mark.parametrize("place", ["", "include"])
def test_headers_are_found_in_a_folder_and_in_its_include(
    part: str, place: str, builder: Builder, tmp_path: Path
) -> None:
    headers = tmp_path / "TensorRT" / place
    headers.mkdir(parents=True)
    (headers / "NvInferRuntime.h").touch()
    made = builder.run(part, "x.so", TENSORRT_INCLUDE_DIR=str(tmp_path / "TensorRT"))
    assert made.returncode == 0, made.stderr
    words = builder.arguments()
    assert Path(words[words.index("-isystem") + 1]) == headers
    sources = [Path(word).name for word in words if word.endswith((".cu", ".cpp"))]
    assert sources == (["trt_harness.cpp"] if part == "--harness" else ["product.cu", "wkv.cu", "trt_plugin.cpp"])
    assert bool(builder.targets()) == (part == "--plugin")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "OUT.so is missing"),
        (["--plugin"], 2, "OUT.so is missing"),
        (["--plugn", "x.so"], 2, "no option --plugn"),
        (["--plugin", ""], 2, "OUT.so is missing"),
        (["--plugin", "87"], 2, "OUT.so comes first, found 87"),
        (["sm_87"], 2, "OUT.so comes first, found sm_87"),
        (["/dev/null"], 2, "/dev/null is no ordinary file"),
        (["x.so", "087"], 2, "no compute capability: 087"),
        (["x.so", "--plugin"], 2, "no compute capability: --plugin"),
        (["x.so", "75"], 1, "at least 80, found 75"),
        (["x.so", "121"], 1, "does not know sm_121 (it knows: 80 86 87 89 90 120)"),
        (["--harness", "x.so", "87"], 2, "takes no SM, found 87"),
        (["nowhere/x.so"], 1, "the folder of nowhere/x.so is not there"),
        (["../work"], 2, "is a folder"),
    ],
)
def test_mistakes_are_one_line_and_compile_nothing(
    words: list[str], code: int, said: str, builder: Builder, tmp_path: Path
) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    made = builder.run(*words, TENSORRT_INCLUDE_DIR=str(tmp_path))
    assert made.returncode == code and said in made.stderr and made.stderr.count("\n") == 1
    assert not builder.arguments() and not os.listdir(builder.folder)


def test_headers_that_are_not_there_are_looked_for_where_it_says(builder: Builder, tmp_path: Path) -> None:
    made = builder.run("--plugin", "x.so", TENSORRT_INCLUDE_DIR=str(tmp_path))
    assert made.returncode == 1 and f"looked in {tmp_path} {tmp_path}/include" in made.stderr


def test_a_failed_compiler_leaves_the_library_that_was_there(builder: Builder) -> None:
    (builder.folder / "x.so").write_text("old")
    assert builder.run("x.so", FAILING="1").returncode == 1
    assert (builder.folder / "x.so").read_text() == "old" and os.listdir(builder.folder) == ["x.so"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_compiler_that_is_stopped_leaves_nothing(number: signal.Signals, builder: Builder) -> None:
    builder.written.write_text("")
    process = subprocess.Popen(
        [builder.script, "x.so"], cwd=builder.folder, env={**builder.environment, "SLOW": "1"},
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline_s = time.monotonic() + 30
    while not list(builder.folder.glob(".build_cuda.*/part")) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(30) == 128 + number
    assert not os.listdir(builder.folder)
