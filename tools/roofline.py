#!/usr/bin/env python3
"""Computes how fast a Jetson could decode at best: its memory's bandwidth over the bytes that a token moves.

    tools/roofline.py [--out REPORT.json]

Nothing is measured here, and no weights are made: the bytes are those that an engine of the released RWKV-7 shapes
stores. A token reads every weight and its scales once, of the embedding one row, and reads and writes the state. What
a step does besides is left out, so that these are bounds which no program passes, not speeds to expect. int3 is not
among them: its weights are moved as int4 by what runs on a GPU. Needs goslet with its extra "export".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    from random_checkpoint import SHAPES

    from goslet.enginefile import TensorEntry
    from goslet.export.models import rwkv7
    from goslet.export.models.tensors import LAYER_NORM_EPS, Kind
    from goslet.export.quantize import recipe
    from goslet.spec import EMBEDDING, ModelSpec
except ModuleNotFoundError as error:
    sys.exit(f"roofline: {error.name} is not installed; pip install '.[export]' in the repository's root")

LABEL = "computed bounds, not measurements"
QUANTS = ("f16", "int8", "int4")
# As the released models have them; `SHAPES` names the rest.
HEAD_SIZE = 64
FFN_RATIO = 4
VOCAB_SIZE = 65536

_SEEED = "https://wiki.seeedstudio.com/reComputer_J4012_Flash_Jetpack/"
_ULTRALYTICS = "https://docs.ultralytics.com/guides/nvidia-jetson/"


@dataclass(frozen=True)
class Module:
    """A Jetson module in one of its memory clocks.

    Attributes:
        key: its name in the table.
        name: its name in full.
        memory_gib: memory, in GiB, which processor and GPU share.
        bandwidth_gb_s: the memory's peak bandwidth, in GB/s (10^9).
        source: where memory and bandwidth are stated.
    """

    key: str
    name: str
    memory_gib: int
    bandwidth_gb_s: float
    source: str


MODULES = (
    Module("Nano 4", "Orin Nano 4GB", 4, 34, _SEEED),
    Module("Nano 8", "Orin Nano 8GB", 8, 68, _SEEED),
    Module("Nano 8 S", "Orin Nano 8GB in power mode MAXN_SUPER", 8, 102, _ULTRALYTICS),
    Module("NX 16", "Orin NX 16GB", 16, 102.4, _SEEED),
    Module("AGX 64", "AGX Orin 64GB", 64, 204.8, _ULTRALYTICS),
    Module("Thor 128", "Thor T5000", 128, 273, _ULTRALYTICS),
)


@dataclass(frozen=True)
class Traffic:
    """What a model costs in memory.

    Attributes:
        bytes_per_token: bytes that one token moves: weights, scales, a row of the embedding, the state twice.
        memory_bytes: bytes of the whole weights section and one state.
    """

    bytes_per_token: int
    memory_bytes: int


def spec_of(shape: Mapping[str, int]) -> ModelSpec:
    """The dimensions of a released RWKV-7, given as in `SHAPES`."""
    return ModelSpec(
        version="7",
        n_layer=shape["n_layer"],
        n_embd=shape["n_embd"],
        n_ffn=FFN_RATIO * shape["n_embd"],
        head_size=HEAD_SIZE,
        vocab_size=VOCAB_SIZE,
        norm_eps=rwkv7.NORM_EPS,
        layer_norm_eps=LAYER_NORM_EPS,
        ranks={letter: shape[f"rank_{letter}"] for letter in "wavg"},
    )


def stored_tensors(spec: ModelSpec, quant: str) -> dict[str, TensorEntry]:
    """The tensors of an RWKV-7 engine by name, placed as an export places them, in the default group size.

    Raises:
        QuantizationError: there is no such quantization.
    """
    chosen = recipe(quant)
    entries: dict[str, TensorEntry] = {}
    end = 0
    for rule in rwkv7.tensor_rules(spec, ()):
        entry = TensorEntry.placed(rule.name, chosen.format_of(rule), rule.layout, rule.shape, end)
        entries[rule.name], end = entry, entry.end
    return entries


def traffic(spec: ModelSpec, quant: str) -> Traffic:
    """What an RWKV-7 of these dimensions costs in memory.

    Raises:
        QuantizationError: there is no such quantization.
    """
    entries = stored_tensors(spec, quant)
    state_bytes = rwkv7.state_spec(spec).size_bytes
    read_bytes = 0
    for name, entry in entries.items():
        stored_bytes = entry.size_bytes + entry.scales_size_bytes
        read_bytes += stored_bytes // entry.shape[0] if name == EMBEDDING else stored_bytes
    weights_bytes = max(entry.end for entry in entries.values())
    return Traffic(read_bytes + 2 * state_bytes, weights_bytes + state_bytes)


def bound(cost: Traffic, module: Module) -> float | None:
    """The most tokens per second, or None where weights and state alone are more than the memory."""
    if cost.memory_bytes > module.memory_gib << 30:
        return None
    return round(1e9 * module.bandwidth_gb_s / cost.bytes_per_token, 1)


def make_report() -> dict[str, Any]:
    """Every shape in every quantization on every module, as a JSON object."""
    rows = []
    for shape in SHAPES:
        for quant in QUANTS:
            cost = traffic(spec_of(SHAPES[shape]), quant)
            rows.append(
                {
                    "model": f"RWKV-7 {shape.upper()}",
                    "quant": quant,
                    "group": recipe(quant).by_kind[Kind.HEAD].group,
                    **asdict(cost),
                    "most_tokens_per_s": {module.key: bound(cost, module) for module in MODULES},
                }
            )
    return {"label": LABEL, "modules": [asdict(module) for module in MODULES], "rows": rows}


def tables(report: Mapping[str, Any]) -> list[str]:
    """The report in lines of Markdown that read well in a terminal of 80 characters too."""
    keys = [module["key"] for module in report["modules"]]
    cells = [["model", "", "MB/token", "GB", *keys]]
    for row in report["rows"]:
        speeds = (row["most_tokens_per_s"][key] for key in keys)
        cells.append(
            [
                row["model"].removeprefix("RWKV-7 "),
                row["quant"],
                f"{row['bytes_per_token'] / 1e6:.0f}",
                f"{row['memory_bytes'] / 1e9:.2f}",
                *("no" if speed is None else f"{speed:.0f}" for speed in speeds),
            ]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    # Names to the left, numbers to the right.
    texts = [
        "|".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    rule = "|".join("-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths))
    return [
        f"RWKV-7, the most tokens per second: {report['label']}.",
        "",
        *(f"|{text}|" for text in (texts[0], rule, *texts[1:])),
        "",
        "MB/token: moved by a token. GB: weights and one state. no: does not fit, as",
        "these alone are more than the module's memory.",
        "",
        *(
            f"- {module['key']}: {module['name']}, {module['memory_gib']} GiB, {module['bandwidth_gb_s']:g} GB/s\n"
            f"  <{module['source']}>"
            for module in report["modules"]
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="REPORT", help="write the report here too, as JSON")
    options = parser.parse_args(arguments)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: the folder {options.out.parent} does not exist")
    report = make_report()
    print("\n".join(tables(report)))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
