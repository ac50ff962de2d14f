"""Compiles RWKV checkpoints into engine files. Needs the extra ``export`` (torch, onnx); running engines does not."""

from .exporter import ExportReport, export_engine
from .quantize import Recipe, recipe

__all__ = ["ExportReport", "Recipe", "export_engine", "recipe"]
