"""tools/gpu_tune.py without a GPU: what it tries, what it compiles, and what it makes of times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from programs import build_csrc

torch = pytest.importorskip("torch", reason="the measurements are made with torch")

import gpu_check  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_tune  # noqa: E402


@pytest.fixture
def source(repository: Path) -> str:
    return (repository / gpu_tune.PRODUCT).read_text()


def test_the_sources_own_constants_are_among_what_is_tried(source: str) -> None:
    own = gpu_tune.own_constants(source)
    assert all(own[name] in values for name, values in gpu_tune.CONSTANTS.items())
    every = gpu_tune.combinations(own, quick=False)
    assert every[0] == own and len(every) == 27 and len({tuple(one.values()) for one in every}) == 27
    quick = gpu_tune.combinations(own, quick=True)
    assert quick[0] == own and len(quick) == 7


def test_constants_are_replaced_where_they_are_defined(source: str) -> None:
    other = {"kUsualSplitBits": 3, "kBusyWarps": 77, "kStepsAhead": 4}
    changed = gpu_tune.with_constants(source, other)
    assert gpu_tune.own_constants(changed) == other
    assert gpu_tune.with_constants(changed, gpu_tune.own_constants(source)) == source
    with pytest.raises(ValueError, match="kBusyWarps is defined 0 times"):
        gpu_tune.own_constants(source.replace("kBusyWarps =", "kBusy ="))


def test_times_are_compared_with_those_of_the_source(
    csrc_build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_csrc(csrc_build, "goslet_cuda_host")
    kernels = gpu_kernels.Kernels(torch, csrc_build / "libgoslet_cuda_host.so", "cpu")
    times_s = iter([4e-6, 2e-6] * 100)

    def made_up(torch: object, calls: Sequence[Callable[[], object]], repeats: int) -> float:
        return next(times_s) * len(calls)

    monkeypatch.setattr(gpu_check, "replay_time_s", made_up)
    monkeypatch.setattr(gpu_check, "SHAPES", {size: (64, 2) for size in gpu_tune.SIZES})
    monkeypatch.setattr(gpu_check, "VOCABULARY", 80)
    times_us = gpu_tune.tune(torch, [kernels, kernels], "cpu", 1000)
    assert len(times_us) == len(gpu_tune.SIZES) * len(list(gpu_check.matrices("1.5B", gpu_tune.FORMATS))) == 2 * 4 * 4
    assert all(times == pytest.approx([4, 2]) for times in times_us.values())
    found = gpu_tune.summary([{"kStepsAhead": 2}, {"kStepsAhead": 3}], times_us)
    assert [entry["over_source"] for entry in found["combinations"]] == pytest.approx([1, 0.5])
    assert all(best["constants"] == {"kStepsAhead": 3} for best in found["best"].values())


def test_a_library_that_computes_something_else_is_found(csrc_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_csrc(csrc_build, "goslet_cuda_host")
    kernels = gpu_kernels.Kernels(torch, csrc_build / "libgoslet_cuda_host.so", "cpu")

    class Wrong(gpu_kernels.Kernels):
        def product(self, kind, bits, group, n_out, x, weights, scales, y) -> None:  # type: ignore[no-untyped-def]
            super().product(kind, bits, group, n_out, x, weights, scales, y)
            y[0, -1] += 1

    wrong = Wrong(torch, csrc_build / "libgoslet_cuda_host.so", "cpu")
    monkeypatch.setattr(gpu_check, "replay_time_s", lambda torch, calls, repeats: 1.0)
    monkeypatch.setattr(gpu_check, "SHAPES", {size: (64, 2) for size in gpu_tune.SIZES})
    monkeypatch.setattr(gpu_check, "VOCABULARY", 80)
    with pytest.raises(RuntimeError, match="library 1 computes something else"):
        gpu_tune.tune(torch, [kernels, wrong], "cpu", 1000)


def test_without_a_device_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_tune.main(["--out", str(tmp_path / "r.json")])
