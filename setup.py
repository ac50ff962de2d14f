"""Builds the distribution ``goslet``: the folder ``runtime`` is the package, ``export`` its child ``goslet.export``."""

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

if sys.platform == "win32":
    compile_flags = ["/O2"]
    link_flags = []
else:
    # No -march=native: the same wheel must run on every machine of its architecture.
    compile_flags = ["-O3", "-Wall", "-Wextra", "-fvisibility-inlines-hidden", "-pthread"]
    link_flags = ["-pthread"]


def files(pattern: str) -> list[str]:
    """Files of the repository that match, as setuptools wants them named."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


# The C interface reads and writes files itself; Python has its own readers.
C_API = {"capi", "chat_template", "container", "engine_file", "output_file", "sha256", "state_file", "state_spec"}

native = Pybind11Extension(
    "goslet._native",
    sources=[*(path for path in files("csrc/*.cpp") if Path(path).stem not in C_API), *files("csrc/kernels/*.cpp")],
    depends=[*files("csrc/*.h"), *files("csrc/kernels/*.h")],
    include_dirs=["csrc"],
    extra_compile_args=compile_flags,
    extra_link_args=link_flags,
    cxx_std=17,
)

# One compiler for each core; setuptools runs one at a time.
ParallelCompile(default=0).install()

readme = ROOT / "README.md"

setup(
    name="goslet",
    version="0.1.0",
    description="Compiles RWKV checkpoints into one engine file and runs them on small machines",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"goslet": "runtime", "goslet.export": "export"},
    packages=[
        "goslet",
        *(f"goslet.{name}" for name in find_packages(str(ROOT / "runtime"))),
        "goslet.export",
        *(f"goslet.export.{name}" for name in find_packages(str(ROOT / "export"))),
    ],
    package_data={"goslet": ["py.typed", "_native.pyi", "demo/*"]},
    include_package_data=False,
    ext_modules=[native],
    install_requires=["numpy>=1.23", "tokenizers>=0.19"],
    extras_require={
        "export": [
            "torch>=2.8",
            "onnx>=1.18",
            "onnxscript>=0.5",
            "safetensors>=0.4",
            "gguf>=0.17",
            "pyrwkv-tokenizer>=0.9",
            "tqdm>=4.60",
        ],
        "ort": ["onnxruntime>=1.23"],
        "gpu": ["onnxruntime-gpu>=1.23"],
        "trt": ["tensorrt>=10.3"],
        "eval": ["lm_eval>=0.4.13"],
        "test": ["pytest>=8", "hypothesis>=6.100", "rwkv==0.8.32"],
    },
    entry_points={"console_scripts": ["goslet = goslet.entry:main"]},
    zip_safe=False,
)
