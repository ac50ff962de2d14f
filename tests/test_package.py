"""The shape of the package: what it loads, who may import whom, and where other people's headers may appear."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import goslet

ROOT = Path(__file__).resolve().parents[1]

# The runtime from the bottom up: a module imports from its own layer, without circles, and from those before it.
LAYERS = (
    ("errors", "_native"),
    ("spec", "output", "reading", "machine", "sampling", "chat"),
    (
        "container",
        "weights",
        "layouts",
        "cuda_layout",
        "enginefile",
        "initializers",
        "graph_check",
        "state",
        "tokenizer",
        "tokenizer_json",
        "planfile",
        "residuals",
        "layerwise",
        "trt_plugin",
    ),
    ("backends",),
    ("session",),
    ("evaluation", "lambada", "benchmark"),
    ("commands", "cli", "lm_eval"),
    ("entry", "__main__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# What the runtime may import from elsewhere: when it is imported, and later, where it is needed.
BASE_PACKAGES = {"numpy"}
LAZY_PACKAGES = {"huggingface_hub", "onnxruntime", "tensorrt", "tokenizers"}
# Whoever imports this module asks for the harness that it adapts to.
ADAPTERS = {"goslet.lm_eval": {"lm_eval", "tqdm"}}

# What the exporter may import of the runtime; only two open an engine to run it: `verify`, and `recalibration`, which
# lets a backend refuse what it would not run.
EXPORT_MAY_IMPORT = {
    "", "chat", "container", "cuda_layout", "enginefile", "errors", "initializers", "layerwise", "machine", "output",
    "planfile", "reading", "residuals", "spec", "tokenizer", "trt_plugin", "weights",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    importer: str  # "goslet.backends.ort"
    name: str  # "goslet.errors", "numpy"
    line: int
    lazy: bool  # within a function
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name}"

    @property
    def part(self) -> str:
        """The runtime's module or folder that is imported, ``""`` for the package itself."""
        return [*self.name.split("."), ""][1]


def module_files() -> dict[str, Path]:
    """Every Python file of the package by its module name."""
    files = {}
    for folder, package in (("runtime", ("goslet",)), ("export", ("goslet", "export"))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = module_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(module: str) -> Iterator[Import]:
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` is an import of the module x, if there is one.
            names = [f"{origin}.{a.name}" if f"{origin}.{a.name}" in known else origin for a in node.names]
        for name in names:
            yield Import(module, name, node.lineno, lazy, typing_only)  # type: ignore[attr-defined]
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = typing_only or is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing_only)

    known = {*FILES, "goslet._native"}
    yield from visit(TREES[module], False, False)


IMPORTS = [found for module in FILES for found in imports_of(module)]
RUNTIME_IMPORTS = [found for found in IMPORTS if not found.importer.startswith("goslet.export")]
EXPORT_IMPORTS = [found for found in IMPORTS if found.importer.startswith("goslet.export")]


def listed(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def test_the_reader_of_imports_sees_them_all() -> None:
    seen = {(found.importer, found.name, found.lazy, found.typing_only) for found in IMPORTS}
    assert ("goslet", "goslet.errors", False, True) in seen
    assert ("goslet.session", "goslet.errors", False, False) in seen
    assert ("goslet.tokenizer", "tokenizers", True, False) in seen
    assert ("goslet.tokenizer", "tokenizers", False, True) in seen
    assert ("goslet.state", "goslet._native", False, False) in seen
    assert ("goslet.export.models.rwkv7", "goslet.errors", False, False) in seen
    assert ("goslet.export.models.rwkv7", "torch", False, False) in seen


class TestImports:
    def test_importing_the_package_loads_nothing_heavy(self) -> None:
        heavy = ("torch", "onnx", "onnxscript", "onnxruntime", "tokenizers", "safetensors", "tensorrt", "goslet.export")
        code = f"import sys, goslet, goslet.cli; print([name for name in {heavy} if name in sys.modules])"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert loaded.stdout.strip() == "[]"

    def test_every_module_of_the_runtime_has_its_layer(self) -> None:
        parts = {name.split(".")[1] for name in FILES if name != "goslet" and not name.startswith("goslet.export")}
        assert parts <= set(RANK), "give the new modules a place in LAYERS"

    def test_the_runtime_imports_downwards(self) -> None:
        wrong = [
            found
            for found in RUNTIME_IMPORTS
            if found.importer != "goslet"
            and found.name.startswith("goslet")
            and found.part not in ("", "export")
            and RANK[found.part] > RANK[found.importer.split(".")[1]]
        ]
        assert not wrong, listed(wrong)

    def test_the_runtime_has_no_circles(self) -> None:
        edges: dict[str, set[str]] = {name: set() for name in [*FILES, "goslet._native"]}
        for found in IMPORTS:
            # A package's own folder imports its modules and they import it; that is no circle between modules.
            if found.name in edges and not found.lazy and not found.typing_only and found.name != "goslet":
                edges[found.importer].add(found.name)
        while True:
            leaves = {name for name, targets in edges.items() if not targets}
            if not leaves:
                break
            edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
        assert not edges, edges

    def test_the_runtime_needs_only_its_base_dependencies(self) -> None:
        allowed = {*sys.stdlib_module_names, "goslet", *BASE_PACKAGES}
        others = [
            found
            for found in RUNTIME_IMPORTS
            if found.name.split(".")[0] not in allowed | ADAPTERS.get(found.importer, set())
        ]
        wrong = [found for found in others if not found.lazy and not found.typing_only]
        wrong += [found for found in others if found.name.split(".")[0] not in LAZY_PACKAGES]
        assert not wrong, listed(wrong)

    def test_the_runtime_exports_only_on_command(self) -> None:
        wrong = [
            found
            for found in RUNTIME_IMPORTS
            if found.part == "export"
            and found.name.startswith("goslet.")
            and not (found.importer.startswith("goslet.commands.") and (found.lazy or found.typing_only))
        ]
        assert not wrong, listed(wrong)

    def test_the_exporter_imports_little_of_the_runtime(self) -> None:
        wrong = [
            found
            for found in EXPORT_IMPORTS
            if found.name.split(".")[0] == "goslet"
            and found.part not in {*EXPORT_MAY_IMPORT, "export"}
            and not (found.importer == "goslet.export.verify" and found.part in ("session", "backends"))
            and not (found.importer == "goslet.export.recalibration" and found.part == "backends")
        ]
        assert not wrong, listed(wrong)

    def test_the_solvers_need_numpy_alone(self) -> None:
        allowed = {*sys.stdlib_module_names, "goslet", "numpy"}
        solvers = [found for found in IMPORTS if found.importer.startswith("goslet.export.solvers")]
        wrong = [found for found in solvers if found.name.split(".")[0] not in allowed]
        wrong += [
            found
            for found in solvers
            if found.name.startswith("goslet.")
            and found.name != "goslet.errors"
            and not found.name.startswith("goslet.export.solvers")
        ]
        assert solvers and not wrong, listed(wrong)

    def test_a_version_never_imports_another(self) -> None:
        version = re.compile(r"goslet\.export\.models\.rwkv\d+")
        wrong = [found for found in IMPORTS if version.match(found.importer) and version.match(found.name)]
        assert any(version.match(name) for name in FILES)
        assert not wrong, listed(wrong)

    def test_every_import_of_our_own_is_relative(self) -> None:
        wrong = [
            f"{module}:{node.lineno}"
            for module, tree in TREES.items()
            for node in ast.walk(tree)
            if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "goslet")
            or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "goslet" for alias in node.names))
        ]
        assert not wrong, wrong


class TestFiles:
    def test_headers_of_others_stay_where_they_belong(self) -> None:
        include = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)
        python = set()
        tensorrt = set()
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        for path in sources:
            for header in include.findall(path.read_text(encoding="utf-8")):
                if header == "Python.h" or header.startswith(("pybind11/", "numpy/")):
                    python.add(path.name)
                if header.startswith("Nv"):
                    tensorrt.add(path.name)
        assert python == {"bindings.cpp"}
        assert all(name.startswith("trt_") for name in tensorrt)

    def test_no_file_is_named_after_nothing(self) -> None:
        folders = ("runtime", "export", "csrc", "tools", "tests")
        names = [
            path for folder in folders for path in (ROOT / folder).rglob("*") if path.stem.lower() in ("util", "utils")
        ]
        assert not names

    def test_every_folder_with_modules_is_a_package(self) -> None:
        missing = {path.parent for path in FILES.values() if not (path.parent / "__init__.py").exists()}
        assert not missing, "find_packages would leave them out of the wheel"

    def test_the_version_is_that_of_the_distribution(self) -> None:
        assert goslet.__version__ == importlib.metadata.version("goslet")

    def test_the_types_are_published(self) -> None:
        folder = Path(goslet.__file__).parent
        assert (folder / "py.typed").is_file()
        assert (folder / "_native.pyi").is_file()

    @pytest.mark.parametrize("module", [name for name in FILES if not name.startswith("goslet.export")])
    def test_everything_public_in_the_runtime_says_what_it_is(self, module: str) -> None:
        assert ast.get_docstring(TREES[module]), f"{module} has no docstring"
        bare = [f"line {node.lineno}: {node.name}" for node in public(TREES[module]) if not ast.get_docstring(node)]
        assert not bare, bare


def public(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public classes and functions, and the public methods of public classes; not a property's setter."""
    nodes: list[ast.stmt] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator).endswith((".setter", "overload")) for decorator in node.decorator_list):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            nodes.extend(node.body)
