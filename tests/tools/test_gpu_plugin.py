"""The TensorRT plugins through their harness, on kernels as the host's model of CUDA runs them: TensorRT is not needed.

Its headers are, and nvcc for CUDA's; without them these tests are skipped and say so.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from programs import build_csrc, execute, tool

torch = pytest.importorskip("torch", reason="the checks compare with torch")

import gpu_check  # noqa: E402
import gpu_plugin  # noqa: E402
from gpu_kernels import F16, Checks, Kernels, Report, cuda_layout  # noqa: E402


@pytest.fixture(scope="module")
def harness(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What drives the plugins, built as for a machine with a GPU."""
    path = tmp_path_factory.mktemp("harness") / "libgoslet_trt_harness.so"
    made = subprocess.run(
        [repository / "tools/build_cuda", "--harness", path], capture_output=True, text=True, timeout=120
    )
    if made.returncode and "is not there" in made.stderr:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture(scope="module")
def shim(harness: Path, csrc_build: Path) -> Path:
    """The CUDA kernels, built for the host; beside them the plugins, libgoslet_trt_host.so."""
    build_csrc(csrc_build, "goslet_trt_host")
    return csrc_build / "libgoslet_cuda_host.so"


@pytest.fixture(scope="module")
def headers(shim: Path) -> Path:
    """The folder of TensorRT's headers that the plugins are built with."""
    found = re.search(r"^GOSLET_TENSORRT_INCLUDE:PATH=(.+)$", (shim.parent / "CMakeCache.txt").read_text(), re.M)
    assert found is not None
    return Path(found[1])


def skip_without_plugin(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    part = getattr(Checks, name)

    @functools.wraps(part)
    def checked(checks: Checks) -> None:
        if isinstance(checks.kernels, gpu_plugin.PluginKernels):
            part(checks)

    monkeypatch.setattr(Checks, name, checked)


def test_every_plugin_computes_what_float64_does(
    shim: Path, harness: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernels alone are what test_gpu_check.py is for.
    for name in ("wkv4", "wkv6", "wkv7", "product", "refusals"):
        skip_without_plugin(monkeypatch, name)
    words = ["--shim", shim, "--plugin", shim.with_name("libgoslet_trt_host.so"), "--harness", harness]
    assert gpu_check.main([*map(str, words), "--out", str(tmp_path / "r.json")]) == 0
    checks = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert {check["status"] for check in checks} == {"passed"}
    names = [check["name"].removeprefix("plugin ") for check in checks if check["name"].startswith("plugin ")]
    count = Counter(" ".join(name.split()[:2]) for name in names)
    for kernel in ("wkv4", "wkv5", "wkv6", "wkv7"):
        assert all(count[f"{kernel} {kind}"] >= 9 for kind in ("f32", "f16", "bf16")), kernel
    assert count["product int4"] >= 100 and count["product int8"] >= 100 and count["refusal of"] >= 10
    assert any("17x160x21" in name for name in names) and any("in place" in name for name in names)


# What is wrong in a plugin, by its source, and what is said of it: the numbers are found by the references, the rest by
# the harness.
WRONG = {
    "two inputs change places": (
        "c.inputs[2], c.inputs[3], c.inputs[4], c.inputs[5]", "c.inputs[3], c.inputs[2], c.inputs[4], c.inputs[5]", "",
    ),
    "rows after the eighth are the first": ("c.inputs[0]) + row * n_in * number_bytes", "c.inputs[0])", ""),
    "bf16 is read as f16": ("kBF16 ? GOSLET_CUDA_BF16", "kBF16 ? GOSLET_CUDA_F16", ""),
    "a copy forgets a field": ("Plugin(op_, bits_, group_); }", "Plugin(op_, bits_, 32); }", "clone serializes"),
    "a copy is the plugin itself": ("return new (std::nothrow) Plugin(op_, bits_, group_)", "return this", "copy"),
    "a context gets the plugin itself": ("{ return clone(); }", "{ return this; }", "expected a copy"),
    "a field is not written": ("collection_ = {2, fields_};", "collection_ = {1, fields_};", "serializes {bits 4}"),
    "the state has the activations' type": ("== 'f' ? DataType::kFLOAT", "== 'f' ? input_types[0]", "has type"),
    "the state has another shape": (
        '{"bhn", "bhnn"}, false, run_wkv7', '{"bhn", "bhn"}, false, run_wkv7', "output 1 has shape",
    ),
    "a product has another shape": ('"og"}, {"bo"}', '"og"}, {"bi"}', "shape"),
    "a field of any type is taken": (" && field.type == nvinfer1::PluginFieldType::kINT32", "", "is no int32"),
    "anything is configured": ("return counts_fit(n_inputs, n_outputs) ? 0 : kFailed;", "return 0;", "configurePlugin"),
    "sizes are not compared": ("dims.d[axis] != size", "false", "it was taken"),
    "axes are not counted": ("dims.nbDims != static_cast<std::int32_t>(letters.size())", "false", "it was taken"),
    "weights are not counted": ("sizes['w'] * 32 == padded_in * bits_ &&", "", "it was taken"),
    "scales are not counted": (" && sizes['g'] * group_ == padded_in", "", "it was taken"),
    "any format is taken": ("tensor.format == nvinfer1::TensorFormat::kLINEAR", "true", "takes format"),
    "types are mixed": ("tensor.type == tensors[0].desc.type", "true", "takes type"),
    "another namespace": ('kNamespace = ""', 'kNamespace = "goslet"', "namespace"),
    "another version": ('kVersion = "1"', 'kVersion = "2"', "version"),
    "one of them twice": ("Creator(kOperators[0])", "Creator(kOperators[1])", "Wkv5 Wkv5 Wkv6 Wkv7 GosletProduct"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plugin_is_found(
    wrong: str,
    shim: Path,
    harness: Path,
    headers: Path,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new, said = WRONG[wrong]
    source = (repository / "csrc/trt/trt_plugin.cpp").read_text()
    assert old in source
    (tmp_path / "wrong.cpp").write_text(source.replace(old, new, 1))
    execute(
        tool("nvcc"), "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-I", repository / "csrc/include",
        "-isystem", headers, "-o", tmp_path / "wrong.so", tmp_path / "wrong.cpp", shim,
        "-Xlinker", f"-rpath={shim.parent}", limit_s=120,
    )  # fmt: skip

    def product(checks: Checks) -> None:
        weights, scales, matrix = checks.made_weights(4, 64, 160, 5)
        x, y = checks.normal(17, 160, kind=F16), checks.poisoned(checks.normal(17, 5, kind=F16))
        checks.kernels.product(F16, 4, 64, 5, x, weights, scales, y)
        checks.compare("product", y, x.double() @ matrix.T, 1e-3)

    def nothing(checks: Checks) -> None:
        pass

    # One product and RWKV-7 find every one of these; all checks would take long.
    monkeypatch.setattr(Checks, "product", product)
    monkeypatch.setattr(Checks, "wkv4", nothing)
    monkeypatch.setattr(Checks, "wkv6", nothing)
    report = Report(tmp_path / "r.json")
    gpu_plugin.drive_plugin(
        Checks(Kernels(torch, shim, "cpu"), report, cuda_layout(), small=True), tmp_path / "wrong.so", harness
    )
    failed = [check for check in report.checks if check["status"] == "failed"]
    assert failed and not report.passed
    # Nothing else is said of a wrong number than by how much.
    assert any(said in check.get("problem", check.get("found", "")) if said else "error" in check for check in failed)


@pytest.mark.parametrize("which", ["plugin", "harness"])
def test_what_is_not_there_and_what_is_no_plugin(which: str, shim: Path, harness: Path, tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json")
    checks = Checks(Kernels(torch, shim, "cpu"), report, cuda_layout(), small=True)
    paths = {"plugin": shim.with_name("libgoslet_trt_host.so"), "harness": harness}
    gpu_plugin.drive_plugin(checks, **{**paths, which: tmp_path / "none.so"})
    (check,) = report.checks
    assert check["status"] == "not run" and "none.so not there" in check["reason"] and not report.passed
    (tmp_path / "none.so").write_text("nothing")
    gpu_plugin.drive_plugin(checks, **{**paths, which: tmp_path / "none.so"})
    gpu_plugin.drive_plugin(checks, **{**paths, which: shim})
    for check, words in zip(
        report.checks[1:], ("none.so", "setLoggerFinder" if which == "plugin" else "goslet_harness"), strict=True
    ):
        assert check["status"] == "failed" and words in check["problem"] and "\n" not in check["problem"]


def test_headers_are_compiled_with(headers: Path, repository: Path, tmp_path: Path) -> None:
    """And a version that lacks something is named."""
    report = tmp_path / "r.json"
    execute(repository / "tools/check_trt_headers", "--json", report, headers, limit_s=120)
    (entry,) = json.loads(report.read_text())["headers"]
    assert re.fullmatch(r"\d+(\.\d+){3}", entry["version"])
    assert entry["plugin"] == entry["harness"] == "compiled"
    (tmp_path / "NvInferVersion.h").write_bytes((headers / "NvInferVersion.h").read_bytes())
    ran = subprocess.run(
        [repository / "tools/check_trt_headers", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 1
    assert ran.stdout == f"TensorRT {entry['version']}: plugin failed, harness failed\n"
    assert "NvInferRuntime.h" in ran.stderr
