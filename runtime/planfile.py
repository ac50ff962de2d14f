"""TensorRT plans, beside the engine that they were built from: ``NAME.TARGET.plan``.

A container (`goslet.container`) with the magic ``GOSLPLAN``. Its header says what the plan is of and what it runs on;
its one section, ``plan``, is what TensorRT's builder wrote. A plan holds the weights; the embedding, the tokenizer and
the state's description stay in the engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .container import Section, errors_in, read_container, write_container
from .errors import BackendUnavailableError, HeaderError

PLAN_MAGIC = b"GOSLPLAN"
PLAN_VERSION = 1
PLAN_KIND = "TensorRT plan"


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
            HeaderError: a field is missing or of the wrong type.
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
        return cls(**read)


def write_plan(path: Path, key: PlanKey, plan: bytes, *, overwrite: bool) -> None:
    """Write a plan file; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_container(
        path,
        magic=PLAN_MAGIC,
        version=PLAN_VERSION,
        header={"key": asdict(key)},
        sections=[Section.of("plan", plan)],
        overwrite=overwrite,
    )


def read_plan(path: Path, expected: PlanKey) -> bytes:
    """A plan's bytes, found undamaged and to fit.

    Args:
        path: the file.
        expected: what it must be of; an empty device in the file fits any.

    Raises:
        ContainerError: the file is damaged or no plan.
        BackendUnavailableError: it does not fit: of another model, device, TensorRT or plugin.
    """
    container = read_container(path, magic=PLAN_MAGIC, version=PLAN_VERSION, kind=PLAN_KIND)
    with container, errors_in(path):
        key = PlanKey.from_json(container.header.get("key"))
        for name, words in _WORDS.items():
            wanted, found = getattr(expected, name), getattr(key, name)
            if wanted != found and not (name in ("device", "capability") and found == ""):
                raise BackendUnavailableError(
                    f"the plan is of another {words}",
                    file=path,
                    expected=str(wanted)[:80],
                    found=str(found)[:80],
                    remedy="build it here: goslet plan ENGINE --target local --force",
                )
        return bytes(container.section("plan"))


_WORDS = {
    "model_id": "model",
    "weights_sha256": "engine of this model",
    "runtime": "runtime",
    "tensorrt_version": "version of TensorRT",
    "capability": "kind of GPU",
    "device": "GPU",
    "plugin_version": "version of the plugins",
    "precision": "precision",
    "weights": "form of weights",
    "batch": "batch",
}
