"""Compiles RWKV checkpoints into engine files. Needs the extra ``export`` (torch, onnx); running engines does not.

What is exported here is loaded when it is asked for: building TensorRT plans on a device does without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import ExportReport, export_engine
    from .quantize import Recipe, recipe

__all__ = ["ExportReport", "Recipe", "export_engine", "recipe"]

_HOMES = {"ExportReport": "exporter", "export_engine": "exporter", "Recipe": "quantize", "recipe": "quantize"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
