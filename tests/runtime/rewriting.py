"""Engines that are well formed and wrong: written and signed anew with some of their parts replaced."""

from __future__ import annotations

from pathlib import Path

from goslet.enginefile import EngineFile, TensorSource, write_engine


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """A copy of an engine file with some of `write_engine`'s arguments replaced.

    `without` leaves one tensor out; `renamed` maps tensors' names to new ones.
    """
    without = changes.pop("without", None)
    renamed = changes.pop("renamed", {})
    assert isinstance(renamed, dict)
    with EngineFile.open(source) as file:
        arguments = {
            "spec": file.spec,
            "state_spec": file.state_spec,
            "model_id": file.model_id,
            "graph": bytes(file.graph_bytes),
            "graph_info": dict(file.graph_info),
            "tensors": [
                TensorSource(
                    renamed.get(name, name),
                    entry.format,
                    entry.shape,
                    lambda name=name: file.weight(name),
                    entry.layout,
                )
                for name, entry in file.tensors.items()
                if name != without
            ],
            "tokenizer": None,
            "program": None if file.program_bytes is None else bytes(file.program_bytes),
            "provenance": {},
            "initial_state": file.initial_state,
            "chat": file.chat,
            "overwrite": False,
        }
        write_engine(target, **{**arguments, **changes})
    return target
