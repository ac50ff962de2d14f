#!/usr/bin/env python3
"""What each quantization costs a language model: bits per byte on a text against bits per weight.

    tools/quant_quality.py --text FILE [--checkpoint FILE --tokenizer FILE] [--json OUT]

Every row quantizes the checkpoint as `goslet export` would and reads the text with the torch step on the dequantized
weights in float32, so that rows differ by their weights alone. The text is cut into equal lanes that are read side by
side, each from a fresh state after the end-of-document token, up to 32768 tokens in all: figures compare among
themselves, and differ a little from `goslet eval`'s, which carries one state through the whole text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goslet.export import Recipe, recipe
from goslet.export.checkpoint import Checkpoint, open_checkpoint
from goslet.export.models.blocks import EagerOps
from goslet.export.models.tensors import Kind
from goslet.spec import EMBEDDING
from goslet.tokenizer import tokenizer_from_file
from goslet.weights import WeightFormat, decode, encode

DEMO = Path(__file__).resolve().parents[1] / "runtime/demo"
LANES = 64
MAX_LANE_TOKENS = 512  # a quarter of a minute a row on one core, and differences of 0.01% can be told


def recipes() -> Iterator[Recipe]:
    """What is compared: the exporter's own recipes, and int4 with one part kept in int8 or put into int4."""
    for quant in ("f32", "f16", "bf16"):
        yield recipe(quant)
    for quant in ("int8", "int4"):
        for group in (32, 64, 128):
            base = recipe(quant, group)
            yield Recipe(f"{quant} group {group}", base.by_kind)
    formats = recipe("int4", 32).by_kind
    int4, int8 = WeightFormat("int4", 32), WeightFormat("int8", 32)
    for kind in Kind:
        if formats[kind] == int4:
            yield Recipe(f"int4 group 32, {kind.value} in int8", {**formats, kind: int8})
        elif formats[kind] == int8:
            yield Recipe(f"int4 group 32, {kind.value} in int4", {**formats, kind: int4})


def dequantized(source: Checkpoint, chosen: Recipe) -> tuple[dict[str, Tensor], float]:
    """The weights that a step reads, after a round trip through their formats, and bits per weight."""
    weights = source.weights()
    result, size_bytes, count = {}, 0, 0
    for rule in source.rules:
        stored = encode(weights[rule.name].numpy(), chosen.format_of(rule), rule.name)
        result[rule.name] = torch.from_numpy(decode(stored))
        size_bytes += stored.size_bytes
        count += math.prod(rule.shape)
    return result, 8 * size_bytes / count


@torch.no_grad()
def score(source: Checkpoint, weights: dict[str, Tensor], lanes: Tensor) -> float:
    """Bits that the tokens of all lanes [L, T] cost, each after those before it; the first is not counted."""
    version, spec = source.version, source.spec
    state = {t.name: torch.full((len(lanes), *t.shape), t.init) for t in version.state_spec(spec).tensors}
    ops = EagerOps(weights)
    nats = 0.0
    for position in range(lanes.shape[1] - 1):
        logits, state = version.step(spec, ops, (weights[EMBEDDING][lanes[:, position]],), state)
        nats += float(torch.nn.functional.cross_entropy(logits, lanes[:, position + 1], reduction="sum"))
    return nats / math.log(2)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text that the model was not trained on")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "rwkv7-demo.pth")
    parser.add_argument("--tokenizer", type=Path, default=DEMO / "tokenizer.json")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    options = parser.parse_args(arguments)
    tokenizer = tokenizer_from_file(options.tokenizer)
    text = options.text.read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text))
    length = min(len(ids) // LANES, MAX_LANE_TOKENS)
    if length < 2:
        parser.error(f"{options.text}: at least {2 * LANES} tokens are needed, found {len(ids)}")
    body = torch.from_numpy(ids[: LANES * length].reshape(LANES, length))
    lanes = torch.cat([torch.full((LANES, 1), tokenizer.end_token or 0), body], 1)
    n_bytes = len(tokenizer.decode_bytes(ids[: LANES * length].tolist()))
    rows: list[dict[str, Any]] = []
    print("| weights | bits per weight | bits per byte | more than f32 |\n|---|---|---|---|")
    with open_checkpoint(options.checkpoint) as source:
        for chosen in recipes():
            weights, bits_per_weight = dequantized(source, chosen)
            bits_per_byte = score(source, weights, lanes) / n_bytes
            rows.append({"weights": chosen.name, "bits_per_weight": bits_per_weight, "bits_per_byte": bits_per_byte})
            more = 100 * (bits_per_byte / rows[0]["bits_per_byte"] - 1)
            print(f"| {chosen.name} | {bits_per_weight:.2f} | {bits_per_byte:.4f} | {more:+.2f}% |", flush=True)
    if options.json:
        report = {
            "checkpoint": options.checkpoint.name,
            "text": options.text.name,
            "tokens": LANES * length,
            "bytes": n_bytes,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
