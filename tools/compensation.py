#!/usr/bin/env python3
"""What residuals beside quantized matrices gain, and what the same bits gain without them; and recalibration.

    tools/compensation.py --text FILE --calibrate FILE [--checkpoint FILE --tokenizer FILE] [--json OUT]

Every row is an engine as `goslet export` makes it with GPTQ, with no residual or with one, and reads the text as
tools/quant_quality.py does: with the torch step on the weights that its residuals amount to, in float32. What counts is
the divergence from the float32 model at equal bits: so beside the rows with residuals stand budgets (``--bits``) of the
same size, and wider formats.

The second table is recalibration from sketches (`goslet sketch`, `goslet recalibrate`): an int4 engine with room for
residuals follows, without a checkpoint, the same model in float16, and one that was changed by an update of low rank on
every matrix, as tuning with a LoRA leaves it (the update is random). Divergence is there from the reference.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quant_quality import Reader, command_line, cut_into_lanes
from random_checkpoint import save
from torch import Tensor

from goslet.enginefile import EngineFile
from goslet.export import export_engine
from goslet.export.calibration_text import CALIBRATION_TOKENS
from goslet.export.checkpoint import open_checkpoint
from goslet.export.compensate import LOW_RANK_METHODS, SPARSE_METHODS, Compensation
from goslet.export.recalibration import SKETCHES_PER_TOKEN, recalibrate, sketch
from goslet.residuals import effective_weight
from goslet.spec import RESIDUALS
from goslet.tokenizer import tokenizer_from_file

RANK = 4
SHARE = 0.01
BASES = (("int3", 64), ("int4", 64))
# Wider formats without residuals, and budgets near the sizes of the rows with them.
WIDER = {"int3": (("int3", 32), ("int4", 128)), "int4": (("int4", 32), ("int8", 128))}
UPDATE_RANK, UPDATE_SIZE = 2, 0.2


class Bench:
    """Makes engines of one checkpoint and reads the text with them.

    Args:
        checkpoint: the model.
        tokenizer: its vocabulary.
        text: what is read.
        calibrate: what is calibrated on.
        folder: for engines and moments.
    """

    def __init__(self, checkpoint: Path, tokenizer: Path, text: Path, calibrate: Path, folder: Path) -> None:
        self.checkpoint, self.tokenizer, self.calibrate, self.folder = checkpoint, tokenizer, calibrate, folder
        try:
            self.lanes, self.n_bytes = cut_into_lanes(text, tokenizer_from_file(tokenizer))
        except ValueError as error:
            raise SystemExit(str(error)) from error
        self.reader, self.bits = self._reader(checkpoint)

    def _reader(self, checkpoint: Path) -> tuple[Reader, float]:
        with open_checkpoint(checkpoint) as source:
            weights = source.weights()
            reader = Reader(source, self.lanes, weights)
            return reader, reader.read(weights)[0]

    def export(self, name: str, checkpoint: Path | None = None, **options: Any) -> Path:
        """An engine; calibrated unless it is said to be exported otherwise."""
        path = self.folder / f"{name}.goslet"
        export_engine(checkpoint or self.checkpoint, path, tokenizer=self.tokenizer, overwrite=True, **options)
        return path

    def calibrated(self, name: str, **options: Any) -> Path:
        """An engine made with GPTQ and the calibration text."""
        return self.export(name, calibrate=self.calibrate, moments=self.folder / "moments", **options)

    def row(self, name: str, path: Path, reader: Reader | None = None) -> dict[str, Any]:
        """What an engine costs."""
        with EngineFile.open(path) as file:
            weights: dict[str, Tensor] = {
                tensor: torch.from_numpy(np.array(effective_weight(file, tensor)))
                for tensor in file.tensors
                if not tensor.endswith(RESIDUALS)
            }
            bits, divergence = (reader or self.reader).read(weights)
            row = {
                "weights": name,
                "bits_per_weight": file.bits_per_weight,
                "bits_per_byte": bits / self.n_bytes,
                "more_than_f32": bits / self.bits - 1,
                "divergence_bits_per_token": divergence,
            }
        print(row, file=sys.stderr, flush=True)
        return row

    def tuned(self) -> Path:
        """The checkpoint with a random update of low rank on every projection and channel mix."""
        with open_checkpoint(self.checkpoint) as source:
            tensors = {name: tensor.float() for name, tensor in torch.load(self.checkpoint).items()}
            generator = torch.Generator().manual_seed(0)
            for rule in source.rules:
                if rule.name in tensors and rule.name.startswith("blocks.") and rule.name.endswith(".weight"):
                    tensor = tensors[rule.name]
                    if tensor.ndim == 2:
                        n_out, n_in = tensor.shape
                        update = torch.randn(n_out, UPDATE_RANK, generator=generator) @ torch.randn(
                            UPDATE_RANK, n_in, generator=generator
                        )
                        tensors[rule.name] = tensor + UPDATE_SIZE * tensor.norm() / update.norm() * update
        path = self.folder / "tuned.pth"
        save(tensors, path)
        return path


def compensations() -> Iterator[Compensation]:
    """What is tried on every base."""
    for method in LOW_RANK_METHODS:
        if method != "zero":
            yield Compensation(rank=RANK, low_rank=method)
    for method in SPARSE_METHODS:
        yield Compensation(share=SHARE, sparse=method)
    yield Compensation(rank=RANK, low_rank="drift", share=SHARE, sparse="l1")


def described(wanted: Compensation) -> str:
    """As the command line has it."""
    low = f"--low-rank {wanted.rank}:{wanted.low_rank}" if wanted.rank else ""
    sparse = f"--sparse {wanted.share:g}:{wanted.sparse}" if wanted.share else ""
    return " ".join(filter(None, (low, sparse)))


def compensated_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The first table."""
    for quant, group in BASES:
        name = f"{quant} group {group}"
        base = bench.row(f"{name}, gptq", bench.calibrated("base", quant=quant, group=group))
        yield base
        sizes = []
        for wanted in compensations():
            path = bench.calibrated("x", quant=quant, group=group, compensation=wanted)
            row = bench.row(f"{name}, gptq, {described(wanted)}", path)
            sizes.append(row["bits_per_weight"])
            yield row
        for wider, wider_group in WIDER[quant]:
            path = bench.calibrated("x", quant=wider, group=wider_group)
            yield bench.row(f"{wider} group {wider_group}, gptq", path)
        for bits in sorted({min(sizes), max(sizes)}):
            bits = int(1000 * bits) / 1000
            yield bench.row(f"--bits {bits:g}, gptq", bench.calibrated("x", bits=bits))


def recalibrated_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The second table; every reference is also what divergence is taken from."""
    room = Compensation(rank=RANK, low_rank="zero")
    deployed = bench.export("deployed", quant="int4", group=64, compensation=room)
    for what, checkpoint in (("the same model", bench.checkpoint), ("a tuned model", bench.tuned())):
        reader, _ = bench._reader(checkpoint)
        reference = bench.export("reference", checkpoint, quant="f16")
        for per_token in (SKETCHES_PER_TOKEN, 4 * SKETCHES_PER_TOKEN):
            sketch(
                reference, bench.folder / "sketches", bench.calibrate,
                n_tokens=CALIBRATION_TOKENS, per_token=per_token, overwrite=True,
            )  # fmt: skip
            report = recalibrate(deployed, bench.folder / "sketches", bench.folder / "after.goslet", overwrite=True)
            yield {
                "reference": f"{what}, {per_token} sketches a token",
                "sketch_file_bytes": (bench.folder / "sketches").stat().st_size,
                "matrices_improved": report.improved,
                "matrices": report.matrices,
                "left_of_held_out_sketches": report.after,
                "divergence_before": bench.row("before", deployed, reader)["divergence_bits_per_token"],
                "divergence_after": bench.row("after", bench.folder / "after.goslet", reader)[
                    "divergence_bits_per_token"
                ],
            }


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Both tables as Markdown."""
    yield "| weights | bits per weight | more than f32 | divergence, bits per token |"
    yield "|---|---|---|---|"
    for row in report["compensation"]:
        yield (
            f"| {row['weights']} | {row['bits_per_weight']:.2f} | {100 * row['more_than_f32']:+.2f}% | "
            f"{row['divergence_bits_per_token']:.5f} |"
        )
    yield ""
    yield "| reference | sketch file | left of held-out sketches | divergence before | after |"
    yield "|---|---|---|---|---|"
    for row in report["recalibration"]:
        yield (
            f"| {row['reference']} | {row['sketch_file_bytes'] / 1e6:.1f} MB | "
            f"{100 * row['left_of_held_out_sketches']:.0f}% | {row['divergence_before']:.4f} | "
            f"{row['divergence_after']:.4f} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = command_line((__doc__ or "").splitlines()[0]).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.checkpoint, options.tokenizer, options.text, options.calibrate, Path(folder))
        report = {
            "checkpoint": options.checkpoint.name,
            "text": options.text.name,
            "tokens": bench.lanes[:, 1:].numel(),
            "calibration_text": options.calibrate.name,
            "calibration_tokens": CALIBRATION_TOKENS,
            "compensation": list(compensated_rows(bench)),
            "recalibration": list(recalibrated_rows(bench)),
        }
    print("\n".join(tables(report)))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
