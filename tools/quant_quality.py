#!/usr/bin/env python3
"""What each quantization costs a language model: bits per byte on a text against bits per weight, and part by part.

    tools/quant_quality.py --text FILE --calibrate FILE [--checkpoint FILE --tokenizer FILE] [--json OUT]

Every row quantizes the checkpoint as `goslet export` would and reads the text with the torch step on the dequantized
weights in float32, so that rows differ by their weights alone. The text is cut into equal lanes that are read side by
side, each from a fresh state after the end-of-document token, up to 8192 tokens in all: figures compare among
themselves, and differ a little from `goslet eval`'s, which carries one state through the whole text. The divergence is
the mean over these tokens of that from the float32 model's distribution to the row's. It counts every token's whole
distribution, so that it tells rows apart whose bits per byte differ by less than the text's own chance.

The second table stores one part of the model in int4 and all others as they are: what that part costs. Vectors, which
no recipe quantizes, are stored as matrices of one row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goslet.export import Recipe, recipe
from goslet.export.calibration import MomentsFile, collect_moments, multiplied
from goslet.export.calibration_text import CALIBRATION_TOKENS, calibration_tokens
from goslet.export.checkpoint import Checkpoint, open_checkpoint
from goslet.export.gptq import quantize_matrix, search_scales, spread
from goslet.export.models.blocks import EagerOps, token_pieces
from goslet.export.models.tensors import Kind, TensorRule
from goslet.export.quantize import MENU, budget_recipe
from goslet.export.sensitivity import losses, output_sensitivities
from goslet.layouts import pack
from goslet.spec import EMBEDDING
from goslet.tokenizer import Tokenizer, tokenizer_from_file
from goslet.weights import INTEGER_RANGES, EncodedWeight, WeightFormat, decode, encode, encode_values

DEMO = Path(__file__).resolve().parents[1] / "runtime/demo"
LANES = 64
# Some seconds a row on one core. The bits per byte of int4's rows still differ by 0.1% for no other reason than chance;
# the divergences do not.
MAX_LANE_TOKENS = 128
INT4 = WeightFormat("int4", 32)
BUDGETS = (3.3, 3.5, 3.75, 4.0, 4.3, 4.5, 5.0)


class Quantizer:
    """Stores a checkpoint's tensors, by any method."""

    def __init__(self, source: Checkpoint, moments: MomentsFile | None) -> None:
        self.source = source
        self.moments = moments
        self.weights = source.weights()
        self._multiplied = {rule.name for rule in multiplied(source.rules)}

    def stored(self, rule: TensorRule, fmt: WeightFormat, method: str) -> EncodedWeight:
        """A tensor in a format: ``rtn``, ``scales`` (searched, weighted with the moments) or ``gptq``."""
        weight = self.weights[rule.name]
        if method == "rtn" or not fmt.is_integer or rule.name not in self._multiplied:
            return encode(weight.numpy(), fmt, rule.name)
        assert self.moments is not None
        inputs = self.moments.inputs(rule)
        if method == "gptq":
            return quantize_matrix(weight, fmt, inputs, rule.name)
        scales = search_scales(weight, inputs.moments.diagonal(), fmt)
        steps = spread(scales.float(), fmt, weight.shape[1])
        values = torch.round(weight / steps).clamp(*INTEGER_RANGES[fmt.name])
        return encode_values(values.to(torch.int8).numpy(), scales.numpy(), fmt)

    def model(self, chosen: Recipe, method: str) -> tuple[dict[str, Tensor], float]:
        """The weights that a step reads, after a round trip through their formats, and the engine's bits per weight."""
        result, size_bytes, count = {}, 0, 0
        for rule in self.source.rules:
            stored = self.stored(rule, chosen.format_of(rule), method)
            result[rule.name] = torch.from_numpy(decode(stored))
            size_bytes += pack(stored, rule.layout).size_bytes
            count += math.prod(rule.shape)
        return result, 8 * size_bytes / count

    def with_part(self, kind: Kind, method: str) -> dict[str, Tensor]:
        """The model's own weights but for one part, which is in int4."""
        result = dict(self.weights)
        for rule in self.source.rules:
            if rule.kind is kind and rule.is_matrix:
                result[rule.name] = torch.from_numpy(decode(self.stored(rule, INT4, method)))
            elif rule.kind is kind:
                row = self.weights[rule.name].reshape(1, -1).numpy()
                result[rule.name] = torch.from_numpy(decode(encode(row, INT4, rule.name))[0])
        return result


@dataclass(frozen=True)
class Row:
    """A model: its name, its bits per weight if they matter, its bits on the text, its bits of divergence per token."""

    name: str
    bits_per_weight: float | None
    bits: float
    divergence: float


def recipes() -> Iterator[tuple[Recipe, str]]:
    """What is compared: the exporter's own recipes, and int4 with one part in another format, all to the nearest."""
    for quant in ("f32", "f16", "bf16"):
        yield recipe(quant), "rtn"
    for quant in ("int8", "int4", "int3"):
        for group in (32, 64, 128):
            base = recipe(quant, group)
            yield Recipe(f"{quant} group {group}", base.by_kind), "rtn"
    formats = recipe("int4", 32).by_kind
    int8 = WeightFormat("int8", 32)
    for kind in Kind:
        if formats[kind] == INT4:
            yield Recipe(f"int4 group 32, {kind.value} in int8", {**formats, kind: int8}), "rtn"
        elif formats[kind] == int8:
            yield Recipe(f"int4 group 32, {kind.value} in int4", {**formats, kind: INT4}), "rtn"


def calibrated_recipes(quantizer: Quantizer) -> Iterator[tuple[Recipe, str]]:
    """What a calibration adds.

    Searched scales, error feedback, and budgets of bits; all of int4 and of int3 by each method; and int3 with one part
    in another format.
    """
    yield Recipe("int4 group 64, scales", recipe("int4", 64).by_kind), "scales"
    for quant in ("int4", "int3"):
        for group in (32, 64, 128):
            yield Recipe(f"{quant} group {group}, gptq", recipe(quant, group).by_kind), "gptq"
    yield Recipe("int8 group 64, gptq", recipe("int8", 64).by_kind), "gptq"
    for quant in ("int4", "int3"):
        low = WeightFormat(quant, 64)
        whole = {kind: WeightFormat("f32") if kind is Kind.VECTOR else low for kind in Kind}
        for method in ("rtn", "gptq"):
            yield Recipe(f"all of {quant} group 64, {method}", whole), method
    formats = recipe("int3", 64).by_kind
    for kind in Kind:
        if kind is not Kind.VECTOR:
            other = "int4" if formats[kind].name == "int3" else "int3"
            by_kind = {**formats, kind: WeightFormat(other, 64)}
            yield Recipe(f"int3 group 64, {kind.value} in {other}, gptq", by_kind), "gptq"
    assert quantizer.moments is not None
    sensitivities = output_sensitivities(quantizer.source, quantizer.moments.tokens)
    found = losses(quantizer.source, quantizer.moments, sensitivities, MENU)
    for bits in BUDGETS:
        chosen = budget_recipe(bits, quantizer.source.rules, found)
        for method in ("rtn", "gptq"):
            yield Recipe(f"--bits {bits:g}, {method}", chosen.by_kind, chosen.by_name), method


class Reader:
    """Reads the text with a model's weights, and compares with the float32 model.

    Args:
        source: the checkpoint.
        lanes: int64 [L, T], texts that are read side by side; their first tokens are not counted.
        weights: the float32 model's, which reads first.
    """

    def __init__(self, source: Checkpoint, lanes: Tensor, weights: dict[str, Tensor]) -> None:
        self._source = source
        self._lanes = lanes
        self._own = list(self._chances(weights))

    @torch.no_grad()
    def _chances(self, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        """The logarithms of all next tokens' probabilities [L, V], token by token."""
        version, spec = self._source.version, self._source.spec
        state = {t.name: torch.full((len(self._lanes), *t.shape), t.init) for t in version.state_spec(spec).tensors}
        for position in range(self._lanes.shape[1] - 1):
            pieces = token_pieces(weights[EMBEDDING][self._lanes[:, position]], spec)
            logits, state = version.step(spec, EagerOps(weights), pieces, state)
            yield torch.log_softmax(logits, -1)

    def read(self, weights: dict[str, Tensor]) -> tuple[float, float]:
        """Bits that all tokens cost, each after those before it; and bits of divergence from the own model, a token."""
        nats = divergence = 0.0
        for position, (own, found) in enumerate(zip(self._own, self._chances(weights), strict=True)):
            nats -= float(found.gather(1, self._lanes[:, position + 1, None]).sum())
            divergence += float((own.exp() * (own - found)).sum())
        return nats / math.log(2), divergence / math.log(2) / self._lanes[:, 1:].numel()


def table(rows: list[Row], n_bytes: int, what: str) -> Iterator[str]:
    """Lines of Markdown; the first row is what the others are compared with."""
    yield f"| {what} | bits per weight | bits per byte | more than f32 | divergence, bits per token |"
    yield "|---|---|---|---|---|"
    for row in rows:
        more = 100 * (row.bits / rows[0].bits - 1)
        stored = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        yield f"| {row.name} | {stored} | {row.bits / n_bytes:.4f} | {more:+.2f}% | {row.divergence:.5f} |"


def rows_json(rows: list[Row], n_bytes: int) -> list[dict[str, Any]]:
    """The rows for the report."""
    return [
        {
            "weights": row.name,
            "bits_per_weight": row.bits_per_weight,
            "bits_per_byte": row.bits / n_bytes,
            "divergence_bits_per_token": row.divergence,
        }
        for row in rows
    ]


def cut_into_lanes(text: Path, tokenizer: Tokenizer) -> tuple[Tensor, int]:
    """The text as `Reader` takes it: int64 [LANES, T], the end-of-document token first; and the bytes it predicts.

    Raises:
        ValueError: it is too short.
    """
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")))
    length = min(len(ids) // LANES, MAX_LANE_TOKENS)
    if length < 2:
        raise ValueError(f"{text}: at least {2 * LANES} tokens are needed, found {len(ids)}")
    body = torch.from_numpy(ids[: LANES * length].reshape(LANES, length))
    lanes = torch.cat([torch.full((LANES, 1), tokenizer.end_token or 0), body], 1)
    return lanes, len(tokenizer.decode_bytes(ids[: LANES * length].tolist()))


def command_line(description: str) -> argparse.ArgumentParser:
    """What tells a tool which model reads what."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text that the model was not trained on")
    parser.add_argument("--calibrate", type=Path, required=True, help="another UTF-8 text, to calibrate on")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "rwkv7-demo.pth")
    parser.add_argument("--tokenizer", type=Path, default=DEMO / "tokenizer.json")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = command_line((__doc__ or "").splitlines()[0])
    options = parser.parse_args(arguments)
    tokenizer = tokenizer_from_file(options.tokenizer)
    try:
        lanes, n_bytes = cut_into_lanes(options.text, tokenizer)
    except ValueError as error:
        parser.error(str(error))
    with open_checkpoint(options.checkpoint) as source, tempfile.TemporaryDirectory() as folder:
        tokens = calibration_tokens(options.calibrate, tokenizer, CALIBRATION_TOKENS)
        collect_moments(source, source.model_id(), tokens, Path(folder) / "moments")
        with MomentsFile(Path(folder) / "moments") as moments:
            quantizer = Quantizer(source, moments)
            reader = Reader(source, lanes, quantizer.weights)
            rows, parts = [], []
            for chosen, method in [*recipes(), *calibrated_recipes(quantizer)]:
                weights, bits_per_weight = quantizer.model(chosen, method)
                rows.append(Row(chosen.name, bits_per_weight, *reader.read(weights)))
                print(rows[-1], file=sys.stderr, flush=True)
            parts.append(rows[0])
            for kind in Kind:
                for method in ("rtn", "gptq"):
                    if method == "rtn" or kind not in (Kind.EMBEDDING, Kind.VECTOR):
                        name = f"{kind.value} in int4 group 32, {method}"
                        parts.append(Row(name, None, *reader.read(quantizer.with_part(kind, method))))
                        print(parts[-1], file=sys.stderr, flush=True)
    print("\n".join([*table(rows, n_bytes, "weights"), "", *table(parts, n_bytes, "one part alone")]))
    if options.json:
        report = {
            "checkpoint": options.checkpoint.name,
            "text": options.text.name,
            "tokens": lanes[:, 1:].numel(),
            "bytes": n_bytes,
            "calibration_text": options.calibrate.name,
            "calibration_tokens": tokens.size,
            "rows": rows_json(rows, n_bytes),
            "parts": [{k: v for k, v in row.items() if k != "bits_per_weight"} for row in rows_json(parts, n_bytes)],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
