"""TensorRT plans, beside the engine that they were built from: ``NAME.TARGET.plan``.

A container (`goslet.container`) with the magic ``GOSLPLAN``. Its header says what the plan is of and what it runs on
(``key``), and which state tensors a step updates where they lie (``in_place``); its one section, ``plan``, is what
TensorRT's builder wrote. A plan holds the weights; the embedding, the tokenizer and the state's description stay in
the engine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from .container import Buffer, Section, errors_in, read_container, write_container
from .errors import BackendUnavailableError, HeaderError

PLAN_MAGIC = b"GOSLPLAN"
PLAN_VERSION = 1
PLAN_KIND = "TensorRT plan"
# Where a plan of an engine is looked for, the best first: made for this very GPU, or for any of a family.
RUNNABLE_TARGETS = ("local", "rtx")
PRECISIONS = ("f16", "bf16")
INSTALL = {
    "tensorrt": "pip install tensorrt; on a Jetson: apt install python3-libnvinfer, and an environment that sees the "
    "system's packages (tools/jetson/README.md)",
    "tensorrt_rtx": "pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
}
PACKAGES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


@dataclass(frozen=True)
class PlanKey:
    """What a plan is of, and what it runs on.

    Attributes:
        model_id: the model's id.
        weights_sha256: the checksum of the weights of the engine that it was built from.
        target: ``local``, ``rtx``.
        runtime: TensorRT's Python package, ``tensorrt`` or ``tensorrt_rtx``.
        tensorrt_version: the version that built it.
        device: the GPU's name where it was built for that one; empty for any that the runtime supports.
        capability: its compute capability, such as ``"8.7"``; empty likewise.
        plugin_version: of the plugin library; 0 where the plan has none in it.
        precision: of the matrix products, ``f16`` or ``bf16``.
        weights: ``qdq`` or ``plugin``.
        batch: sessions that a step moves on together.
    """

    model_id: str
    weights_sha256: str
    target: str
    runtime: str
    tensorrt_version: str
    device: str
    capability: str
    plugin_version: int
    precision: str
    weights: str
    batch: int

    @classmethod
    def from_json(cls, value: Any) -> PlanKey:
        """Read a key from a file's header.

        Raises:
            HeaderError: a field is missing or of the wrong type, or the precision is unknown.
        """
        read: dict[str, Any] = {}
        for field in fields(cls):
            found = value.get(field.name) if isinstance(value, dict) else None
            wanted: type = int if field.type == "int" else str
            if not isinstance(found, wanted) or isinstance(found, bool):
                raise HeaderError(
                    "is missing or has the wrong type",
                    place=f"key.{field.name}",
                    expected=wanted.__name__,
                    found=type(found).__name__,
                    remedy="build the plan again",
                )
            read[field.name] = found
        if read["precision"] not in PRECISIONS:
            raise HeaderError(
                "is not known",
                place="key.precision",
                expected=", ".join(PRECISIONS),
                found=repr(read["precision"])[:40],
                remedy="it may be of a newer goslet; build the plan again",
            )
        return cls(**read)


def installed_package(runtime: str) -> str | None:
    """The Python package of a runtime that is installed here, by the name to import; None where there is none."""
    return next((name for name in PACKAGES.get(runtime, ()) if importlib.util.find_spec(name) is not None), None)


def plan_path(engine: Path, target: str) -> Path:
    """Where a plan for `target` lies that was made of an engine."""
    return beside(engine, f"{target}.plan")


def beside(engine: Path, ending: str) -> Path:
    """The path of something made of an engine: its name without ``.goslet``, and an ending."""
    return engine.with_name(f"{engine.name.removesuffix('.goslet')}.{ending}")


def write_plan(path: Path, key: PlanKey, in_place: Sequence[str], plan: Buffer, *, overwrite: bool) -> None:
    """Write a plan file; it appears whole or not at all.

    Args:
        path: the file.
        key: what the plan is of.
        in_place: names of state tensors whose input and output must have one address; all others' must not.
        plan: what the builder wrote.
        overwrite: replace a file that exists.

    Raises:
        OutputError: it cannot be written.
    """
    write_container(
        path,
        magic=PLAN_MAGIC,
        version=PLAN_VERSION,
        header={"key": asdict(key), "in_place": list(in_place)},
        sections=[Section.of("plan", plan)],
        overwrite=overwrite,
    )


class PlanFile:
    """An opened plan file; use it in a ``with`` statement.

    Attributes:
        path: the file.
        key: what the plan is of.
        in_place: see `write_plan`.

    Raises:
        ContainerError: the file is damaged or no plan.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = read_container(path, magic=PLAN_MAGIC, version=PLAN_VERSION, kind=PLAN_KIND)
        try:
            with errors_in(path):
                self.key = PlanKey.from_json(self._container.header.get("key"))
                names = self._container.header.get("in_place")
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise HeaderError("is not a list of names", place="in_place", remedy="build the plan again")
                self.in_place: frozenset[str] = frozenset(names)
                self.plan: memoryview = self._container.section("plan")
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> PlanFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.plan.release()
        self._container.close()

    def _again(self) -> str:
        """The command that builds such a plan."""
        words = ["goslet plan ENGINE --target", self.key.target[:20], "--precision", self.key.precision]
        words += ["--weights", self.key.weights[:20]] if self.key.plugin_version else ["--plain"]
        return " ".join([*words, "--force"])

    def check(self, **expected: object) -> None:
        """Hold fields of the key to what there is here; an empty device or capability in the file fits any.

        Raises:
            BackendUnavailableError: the plan is of another model, device, TensorRT or plugin library.
        """
        for name, wanted in expected.items():
            found = getattr(self.key, name)
            if wanted != found and not (name in ("device", "capability") and found == ""):
                raise BackendUnavailableError(
                    f"the plan is of another {_WORDS[name]}",
                    file=self.path,
                    expected=str(wanted)[:80],
                    found=str(found)[:80],
                    remedy=f"build it here: {self._again()}",
                )


_WORDS = {
    "model_id": "model",
    "weights_sha256": "engine of this model",
    "tensorrt_version": "version of TensorRT",
    "capability": "kind of GPU",
    "device": "GPU",
    "plugin_version": "version of the plugins",
    "batch": "batch",
}
