"""tools/gpu_check.py on the host's model of CUDA, the layout of weights, and what the compiler says of the kernels."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from programs import build_csrc

torch = pytest.importorskip("torch", reason="the checks compare with torch")

import cuda_resources  # noqa: E402
import gpu_check  # noqa: E402
import gpu_kernels  # noqa: E402

from goslet.cuda_layout import pack_scales, pack_weights, padded_inputs  # noqa: E402


@pytest.fixture(scope="module")
def shim(csrc_build: Path) -> Path:
    """The CUDA kernels, built for the host."""
    build_csrc(csrc_build, "goslet_cuda_host")
    return csrc_build / "libgoslet_cuda_host.so"


@pytest.mark.parametrize("order", [0, 3, 5])
def test_every_check_passes_on_the_host(order: int, shim: Path, tmp_path: Path) -> None:
    """Also with warps going as far as they come, the last first, and at random: who is first must not matter."""
    library = ctypes.CDLL(str(shim))
    library.goslet_cuda_host_order(order)
    try:
        assert gpu_check.main(["--shim", str(shim), "--out", str(tmp_path / "r.json")]) == 0
    finally:
        library.goslet_cuda_host_order(0)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"] is True and report["complete"] is True and report["speeds"] == []
    names = [check["name"] for check in report["checks"]]
    for kernel in ("wkv4", "wkv5", "wkv6", "wkv7", "product int4", "product int8", "refusal"):
        assert sum(name.startswith(kernel) for name in names) >= 5, kernel
    assert {check["status"] for check in report["checks"]} == {"passed"}


def test_a_wrong_kernel_fails(shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that swaps two of its inputs, and one that writes nothing."""
    wkv7 = gpu_kernels.Kernels.wkv7

    def swapped(self, kind, state_kind, r, w, k, v, *more):  # type: ignore[no-untyped-def]
        wkv7(self, kind, state_kind, r, w, v, k, *more)

    monkeypatch.setattr(gpu_kernels.Kernels, "wkv7", swapped)
    monkeypatch.setattr(gpu_kernels.Kernels, "product", lambda *arguments: None)
    assert gpu_check.main(["--shim", str(shim), "--out", str(tmp_path / "r.json")]) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    failed = {check["name"].split()[0] for check in report["checks"] if check["status"] == "failed"}
    assert failed == {"wkv7", "product", "refusal"} and not report["passed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shim", "{shim}"], "--shim needs --out"),
        (["--shim", "{shim}", "--out", "/nowhere/r.json"], "--out: the folder /nowhere does not exist"),
        (["--shim", "none.so", "--out", "r.json"], "--shim: there is no file none.so"),
        (["--plugin", "none.so"], "--plugin: there is no file none.so"),
    ],
)
def test_mistakes_are_said_before_any_work(
    words: list[str], said: str, shim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([word.format(shim=shim) for word in words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_library_without_kernels_or_of_another_version_is_refused(
    shim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(["--shim", "text.so", "--out", "r.json"]) == 1
    assert "text.so" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no kernels of goslet"):
        gpu_check.open_kernels(torch, Path("libc.so.6"), "cpu")
    monkeypatch.setattr(gpu_kernels.Kernels, "version", lambda self: 77)
    with pytest.raises(RuntimeError, match=r"another version \(expected 1, found 77\)"):
        gpu_check.open_kernels(torch, shim, "cpu")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="for the host's model of CUDA"):
        gpu_check.open_kernels(torch, shim, "cuda")


@pytest.mark.parametrize(
    ("code", "output", "status", "summary"),
    [
        (0, "x\n========= ERROR SUMMARY: 0 errors\n", "passed", "ERROR SUMMARY: 0 errors"),
        (99, "========= ERROR SUMMARY: 2 errors\n", "failed", "ERROR SUMMARY: 2 errors"),
        (1, "========= RACECHECK SUMMARY: 0 hazards displayed\n", "failed", "RACECHECK SUMMARY: 0 hazards displayed"),
        (1, "========= Error: unknown option\n", "not run", ""),
        (0, "", "not run", ""),
    ],
)
def test_what_the_sanitizer_says_is_read(code: int, output: str, status: str, summary: str) -> None:
    assert gpu_check.sanitizer_verdict(code, output) == (status, summary)


def is_gone(process: str) -> bool:
    # One that nobody has waited for yet is still listed, as a zombie.
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    command = ["sh", "-c", f"sleep 300 & echo $! >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/started; wait"]
    limit_s = 1.0
    while not (tmp_path / "started").exists():  # a busy machine may not have started it in that time
        with pytest.raises(subprocess.TimeoutExpired):
            gpu_check.run_group(command, limit_s)
        limit_s *= 2
    deadline_s = time.monotonic() + 30
    while not is_gone((tmp_path / "started").read_text().strip()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_sanitizer_that_takes_too_long_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nsleep 300\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_check, "SANITIZER_LIMIT_S", 0.2)
    report = gpu_kernels.Report(tmp_path / "r.json")
    gpu_check.sanitize(report, tmp_path / "x.so")
    assert [(c["status"], c["reason"]) for c in report.checks] == [("not run", "it took longer than 0.2 s")] * 2


def test_every_speed_is_measured_on_its_own_input(shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: some of what would be timed is called, and each takes a microsecond."""

    def one_microsecond_each(torch: object, calls: Sequence[Callable[[], object]], repeats: int) -> float:
        for call in (calls[0], calls[-1]):
            call()
        return len(calls) * 1e-6

    monkeypatch.setattr(gpu_check, "replay_time_s", one_microsecond_each)
    monkeypatch.setattr(gpu_check, "SHAPES", {name: (64, 2) for name in gpu_check.SHAPES})
    monkeypatch.setattr(gpu_check, "VOCABULARY", 80)
    monkeypatch.setattr(gpu_check, "LARGE_COPIES", (1 << 16,))
    report = gpu_kernels.Report(tmp_path / "r.json", {"l2_bytes": 10_000})
    checks = gpu_kernels.Checks(gpu_kernels.Kernels(torch, shim, "cpu"), report, gpu_kernels.cuda_layout(), small=True)
    gpu_check.measure(checks, quick=False)
    assert len(report.speeds) == 2 * (3 * 3 + 5 * 4) + 3 * 2 * 4 + 2 * (2 * 3 + 2 * 4)
    largest_copy = max(1 << 16, *(entry["size_bytes"] for entry in report.speeds))
    for entry in report.speeds:
        # As many inputs as no cache of this size holds.
        assert entry["inputs"] * entry["size_bytes"] >= 60_000
        assert entry["gb_s"] == pytest.approx(entry["size_bytes"] / 1e3)
        assert entry["share_of_copy"] == pytest.approx(1, rel=0.01)
        assert entry["share_of_peak_copy"] == pytest.approx(entry["size_bytes"] / largest_copy, rel=0.01)
    assert report.machine["peak_copy_gb_s"] == pytest.approx(largest_copy / 1e3)


def test_a_report_has_not_passed_before_its_end(shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(checks: gpu_kernels.Checks) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_kernels.Checks, "wkv6", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--shim", str(shim), "--out", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert {check["status"] for check in report["checks"]} == {"passed"}
    assert not report["complete"] and not report["passed"]


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_the_kernels_compute_the_graphs_operators(version: str, shim: Path) -> None:
    """Against the plain forms that the exporter traces, in float64; the tolerance is float's, see gpu_check."""
    from goslet.export.models import rwkv4, rwkv5, rwkv6, rwkv7

    kernels = gpu_kernels.Kernels(torch, shim, "cpu")
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def decay(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 0.4 + 0.55

    shape = (2, 3, 64)
    if version == "4":
        inputs = [normal(2, 70), normal(2, 70), -decay(70), normal(70), normal(2, 70), decay(2, 70), normal(2, 70)]
        expected = rwkv4.WKV4.reference(*(part.double() for part in inputs))
        found = tuple(torch.full((2, 70), torch.nan) for _ in range(4))
        kernels.wkv4(0, *inputs[:4], tuple(inputs[4:]), found[0], found[1:])
    elif version == "7":
        inputs = [normal(*shape), decay(*shape), *(normal(*shape) / 8 for _ in range(4)), normal(*shape, 64)]
        expected = rwkv7.WKV7.reference(*(part.double() for part in inputs))
        found = (torch.full(shape, torch.nan), torch.full((*shape, 64), torch.nan))
        kernels.wkv7(0, 0, *inputs, *found)
    else:
        w = decay(*shape[1:]) if version == "5.2" else decay(*shape)
        inputs = [*(normal(*shape) for _ in range(3)), w, normal(*shape[1:]), normal(*shape, 64)]
        operator = rwkv5.WKV5 if version == "5.2" else rwkv6.WKV6
        expected = operator.reference(*(part.double() for part in inputs))
        found = (torch.full(shape, torch.nan), torch.full((*shape, 64), torch.nan))
        kernels.wkv6(0, 0, *inputs, *found)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_lie_as_the_header_says(bits: int) -> None:
    """Every number is found at the place that goslet_cuda.h gives it, computed here one by one."""
    generator = np.random.default_rng(3)
    n_out, n_in = 3, 160
    numbers = generator.integers(-8 if bits == 4 else -128, 8 if bits == 4 else 128, (n_out, n_in)).astype(np.int8)
    words = pack_weights(numbers, bits).view("<u4")
    assert padded_inputs(n_in) == 256 and words.shape == (n_out, 256 * bits // 32)
    for output in range(n_out):
        for i in range(256):
            step, within = divmod(i, 128 if bits == 4 else 64)
            c = within % 32 // 8
            if bits == 4:
                word = 16 * step + 4 * c + within // 32
                number = int(words[output, word]) >> (4 * (within % 8 // 2) + 16 * (within % 2)) & 15
                number -= 8
            else:
                word = 16 * step + 4 * c + 2 * (within // 32) + within % 8 // 4
                number = (int(words[output, word]) >> (8 * (within % 4)) & 255 ^ 128) - 128
            assert number == (numbers[output, i] if i < n_in else 0)
    scales = pack_scales(np.ones((3, 5)), n_in, 32)
    assert scales.shape == (3, 8) and scales.sum() == 15


def test_what_ptxas_says_is_read() -> None:
    text = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_ZN6goslet4cuda1_GLOBAL_17wkv7_64I6__halffLi4EEEvPKT_' for 'sm_90'\n"
        "ptxas info    : Function properties\n    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem\n"
        "ptxas info    : Compiling entry function 'other' for 'sm_87'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 9 registers\n"
    )
    assert cuda_resources.parse(text) == [
        {"kernel": "wkv7_64<6__halffLi4E>", "target": "sm_90", "registers": 40, "spill_bytes": 12, "shared_bytes": 512},
        {"kernel": "other", "target": "sm_87", "registers": 9, "spill_bytes": 0, "shared_bytes": 0},
    ]
    with pytest.raises(ValueError, match="nothing of lost"):
        cuda_resources.parse("ptxas info : Compiling entry function 'lost' for 'sm_87'\n")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there, which the targets are compiled with")
def test_the_kernels_compile_for_every_target(repository: Path, tmp_path: Path) -> None:
    library = tmp_path / "libgoslet_cuda.so"
    subprocess.run([repository / "tools/build_cuda", library], check=True, capture_output=True, timeout=300)
    # No device is needed to ask it for its version, nor a driver: CUDA's runtime is linked in.
    assert ctypes.CDLL(str(library)).goslet_cuda_version() == 1
    refused = subprocess.run(
        [repository / "tools/build_cuda", tmp_path / "x.so", "999"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1 and "does not know sm_999" in refused.stderr and not (tmp_path / "x.so").exists()
