#!/usr/bin/env python3
"""What quantization costs a model, goslet beside llama.cpp: bytes, bits per byte, last words, agreement with float32.

    tools/quality.py --text FILE --calibrate FILE [--lambada FILE --limit N] [--checkpoint FILE --tokenizer T]

Prints Markdown; `--json OUT` writes the same figures. Every row is what a user gets: goslet's are engine files on the
native backend, llama.cpp's are GGUF files that it quantized itself from F16, with and without an importance matrix
(tools/requirements-bench.txt; where it is not installed its rows are left out, with the reason).

The text is cut into lanes, each read from a fresh state. It should be one that the model was not trained on. GPTQ and
the importance matrix are calibrated on the same tokens of the other text. For every token predicted, the row's whole
distribution is compared with that of goslet's float32 engine: the share of tokens whose likeliest successor is the
same, and the mean divergence KL(float32 | row). The standard error of "more than f32" is of the lanes' differences,
since both read the same text.

Bits per weight are those of all tensors in the file, scales, padding and what is not quantized included, over the
numbers that the model has: the same count for both sides, so that equal bits are equal bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import goslet
from goslet.errors import QuantizationError
from goslet.evaluation import encode_pair, score
from goslet.export import export_engine
from goslet.export.calibration import MomentsFile, collect_moments
from goslet.export.calibration_text import CALIBRATION_TOKENS, calibration_tokens
from goslet.export.checkpoint import open_checkpoint
from goslet.lambada import Lambada, read_lambada
from goslet.machine import cpu_model
from goslet.tokenizer import BytesTokenizer, Tokenizer, tokenizer_from_file, world_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "runtime/demo"
LANES = 64
MAX_LANE_TOKENS = 512
REFERENCE = "f32"
# Between two programs that compute the same model, one from float16 weights: some 1e-6 at most.
SAME_MODEL_BITS = 1e-3


@dataclass(frozen=True)
class Method:
    """One way to store a model with goslet.

    Attributes:
        name: as in the table.
        options: what `export_engine` is given.
        calibrated: whether it is given the moments of a calibration too.
    """

    name: str
    options: dict[str, Any]
    calibrated: bool = False


# A new format is a line here.
METHODS = (
    Method(REFERENCE, {"quant": "f32"}),
    Method("f16", {"quant": "f16"}),
    *(Method(f"int8 group {group}", {"quant": "int8", "group": group}) for group in (32, 128)),
    *(Method(f"int4 group {group}", {"quant": "int4", "group": group}) for group in (32, 64, 128)),
    *(Method(f"int4 group {group}, gptq", {"quant": "int4", "group": group}, True) for group in (32, 64, 128)),
    *(Method(f"--bits {bits:g}", {"bits": bits}, True) for bits in (4.25, 4.3, 4.5, 5.0)),
)
# llama.cpp's types, without and with an importance matrix.
LLAMA_METHODS = (
    *((kind, False) for kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M")),
    *((kind, True) for kind in ("Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M")),
)
# Which of them goslet is given the bytes of, to be compared at equal size.
MATCHED = ("Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M")


class Model(Protocol):
    """A stored model that reads token ids."""

    def read(self, tokens: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """Logits [last, V] after each of the last tokens; the first is fed to a fresh state."""


class EngineModel:
    """A goslet engine on the native backend."""

    def __init__(self, engine: goslet.Engine) -> None:
        self._session = engine.session()

    def read(self, tokens: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """As `Model.read`."""
        self._session.reset()
        if last < len(tokens):
            self._session.feed(tokens[:-last])
        return self._session.feed(tokens[-last:], all_logits=True)


@dataclass
class Row:
    """What was measured of one stored model.

    Attributes:
        name: the method.
        program: goslet or llama.cpp.
        size_bytes: of all tensors in the file.
        bits_per_weight: of the same, over the model's numbers.
        bits_per_byte: of the text.
        more_than_f32: bits per byte over those of goslet's float32 engine, less one.
        more_stderr: standard error of `more_than_f32`, over lanes.
        top1: share of tokens whose likeliest successor is float32's.
        divergence: mean KL(float32 | row), bits per token.
        lambada: last words, where there are passages.
        types: llama.cpp's types of the matrices, and how many are in each.
    """

    name: str
    program: str
    size_bytes: int
    bits_per_weight: float
    bits_per_byte: float = 0.0
    more_than_f32: float = 0.0
    more_stderr: float = 0.0
    top1: float = 1.0
    divergence: float = 0.0
    lambada: Lambada | None = None
    types: dict[str, int] = field(default_factory=dict)


class Comparison:
    """Reads lanes and passages with every model, the first of which is what the others are compared with.

    Args:
        lanes: int64 [L, T]; tokens after the first of each are predicted.
        n_bytes: bytes of those.
        passages: contexts and targets in token ids.
        folder: where the first model's logits are kept, float32 [L, T - 1, V].
    """

    def __init__(
        self,
        lanes: NDArray[np.int64],
        n_bytes: int,
        passages: Sequence[tuple[list[int], list[int]]],
        folder: Path,
    ) -> None:
        self._lanes = lanes
        self._n_bytes = n_bytes
        self._passages = passages
        self._file = folder / "logits"
        self._own: np.memmap[Any, np.dtype[np.float32]] | None = None
        self._own_nats: NDArray[np.float64] | None = None

    def measure(self, row: Row, model: Model) -> Row:
        """Fill in a row."""
        nats = np.empty(len(self._lanes))
        same = divergence = 0.0
        for index, lane in enumerate(self._lanes):
            logits = model.read(lane[:-1], len(lane) - 1)
            if self._own is None:
                shape = (len(self._lanes), *logits.shape)
                self._own = np.memmap(self._file, np.float32, "w+", shape=shape)
            if self._own_nats is None:
                self._own[index] = logits
            nats[index] = score(logits, lane[1:]).nats
            same += float((logits.argmax(axis=1) == self._own[index].argmax(axis=1)).sum())
            divergence += divergence_bits(self._own[index], logits)
        if self._own_nats is None:
            self._own_nats = nats
        count = self._lanes[:, 1:].size
        row.bits_per_byte = float(nats.sum()) / math.log(2) / self._n_bytes
        row.more_than_f32, row.more_stderr = relative(nats, self._own_nats)
        row.top1, row.divergence = same / count, divergence / count
        if self._passages:
            row.lambada = Lambada.of(
                score(model.read(np.array([*before, *after[:-1]], np.int64), len(after)), np.array(after, np.int64))
                for before, after in self._passages
            )
        return row


def divergence_bits(own: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The sum over rows of KL(own | other) in bits, from logits [T, V]."""
    ours, theirs = log_softmax(own), log_softmax(other)
    return float((np.exp(ours) * (ours - theirs)).sum() / math.log(2))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of probabilities, row by row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def relative(nats: NDArray[np.float64], own: NDArray[np.float64]) -> tuple[float, float]:
    """How much more the lanes cost together, as a part of what they cost, and the standard error of that.

    The error is of the ratio of two sums over the same lanes: the lanes' residuals from the ratio are independent.
    """
    ratio = nats.sum() / own.sum()
    residuals = nats - ratio * own
    stderr = math.sqrt(len(own) / (len(own) - 1) * float((residuals**2).sum())) / own.sum()
    return float(ratio) - 1, float(stderr)


def cut_lanes(ids: Sequence[int], end_token: int | None) -> NDArray[np.int64]:
    """A text's tokens in `LANES` rows, each behind the end-of-document token, or its own first where there is none.

    Raises:
        ValueError: there are too few.
    """
    extra = 0 if end_token is None else 1
    length = min(len(ids) // LANES, MAX_LANE_TOKENS)
    if length < 2:
        raise ValueError(f"at least {2 * LANES} tokens are needed, found {len(ids)}")
    lanes = np.array(ids[: LANES * length], np.int64).reshape(LANES, length)
    return np.hstack([np.full((LANES, extra), end_token or 0), lanes])


# ---------------------------------------------------------------------------------------------------------------- rows


def goslet_row(
    comparison: Comparison,
    method: Method,
    checkpoint: Path,
    moments: Path,
    tokenizer: str,
    threads: int,
    folder: Path,
) -> Row:
    """Export an engine by a method and measure it."""
    path = folder / "model.goslet"
    inputs = moments if method.calibrated else None
    export_engine(checkpoint, path, tokenizer=tokenizer, moments=inputs, overwrite=True, **method.options)
    with goslet.open(path, backend="native", threads=threads) as engine:
        bits = engine.file.bits_per_weight
        size_bytes = round(bits * engine.file.n_weights / 8)
        return comparison.measure(Row(method.name, "goslet", size_bytes, bits), EngineModel(engine))


def llama_rows(
    comparison: Comparison, checkpoint: Path, moments: Path, n_weights: int, threads: int, folder: Path
) -> Iterator[Row]:
    """Have llama.cpp quantize the model and measure its files.

    Raises:
        Unavailable: it is not here, or does not know the model.
    """
    from bench_contenders import Unavailable

    try:
        from gguf_rwkv7 import write_gguf
        from quality_llama import LlamaModel, importance, matrix_types, quantize, tensors_size_bytes
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed (tools/requirements-bench.txt)") from error
    plain = folder / "F16.gguf"
    with open_checkpoint(checkpoint) as source, MomentsFile(moments) as inputs:
        if source.spec.version != "7":
            raise Unavailable(f"it has no RWKV-{source.spec.version} that tools/gguf_rwkv7.py writes")
        write_gguf(checkpoint, plain)
        columns = importance(source, inputs)
    for kind, weighted in LLAMA_METHODS:
        path = plain
        if kind != "F16":
            path = folder / "model.gguf"
            quantize(plain, path, kind, columns if weighted else None)
        size_bytes = tensors_size_bytes(path)
        name = f"{kind}, importance matrix" if weighted else kind
        row = Row(name, "llama.cpp", size_bytes, 8 * size_bytes / n_weights, types=matrix_types(path))
        with closing(LlamaModel(path, threads)) as model:
            comparison.measure(row, model)
        if kind == "F16" and row.divergence > SAME_MODEL_BITS:
            # As llama-cpp-python 0.3.36 does with heads that are smaller than its vectors' step, such as of 16 numbers.
            raise Unavailable(f"it computes another model from F16 (KL {row.divergence:.3g} bits per token)")
        yield row


def matched_methods(rows: Sequence[Row]) -> list[Method]:
    """Budgets of exactly the bytes that llama.cpp's files take, rounded down to a thousandth of a bit."""
    kinds: dict[float, list[str]] = {}
    for row in rows:
        kind = row.name.partition(",")[0]
        bits = math.floor(1000 * row.bits_per_weight) / 1000
        if row.program == "llama.cpp" and kind in MATCHED and kind not in kinds.get(bits, []):
            kinds.setdefault(bits, []).append(kind)
    return [
        Method(f"--bits {bits:g}, the size of {' and '.join(same)}", {"bits": bits}, True)
        for bits, same in kinds.items()
    ]


# -------------------------------------------------------------------------------------------------------------- report


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool | None]]:
    """What the formats are held to, and whether they hold it; None where no row tells."""
    ours = [row for row in rows if row.program == "goslet"]
    low = [row for row in ours if row.bits_per_weight <= 4.5]
    best = min(low, key=lambda row: row.bits_per_byte, default=None)
    rival = next((row for row in rows if row.name == "Q4_K_M, importance matrix"), None)
    beaten = None
    if rival is not None:
        beaten = any(
            row.size_bytes <= rival.size_bytes
            and row.bits_per_byte <= rival.bits_per_byte
            and row.divergence <= rival.divergence
            for row in ours
        )
    int8 = [row for row in ours if row.name.startswith("int8")]
    three = [row for row in ours if row.bits_per_weight <= 3.5]
    return [
        ("the best of at most 4.5 bits costs at most 1.0%", None if best is None else best.more_than_f32 <= 0.01),
        ("at no more bytes than Q4_K_M with an importance matrix, a row costs and diverges no more", beaten),
        ("int8 costs at most 0.1%", all(row.more_than_f32 <= 0.001 for row in int8) if int8 else None),
        (
            "the best of at most 3.5 bits costs at most 4%",
            min(row.more_than_f32 for row in three) <= 0.04 if three else None,
        ),
    ]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown, by size."""
    words = any(row.lambada for row in rows)
    more = " LAMBADA accuracy | LAMBADA perplexity |" if words else ""
    first = "| | tensors, bytes | bits per weight | bits per byte | more than f32 | same top-1 | KL, bits per token |"
    yield first + more
    yield "|---|---|---|---|---|---|---|" + ("---|---|" if words else "")
    for row in sorted(rows, key=lambda row: -row.size_bytes):
        line = (
            f"| {row.program} {row.name} | {row.size_bytes:,} | {row.bits_per_weight:.2f} | {row.bits_per_byte:.4f} | "
            f"{100 * row.more_than_f32:+.2f}% ± {100 * row.more_stderr:.2f} | {100 * row.top1:.1f}% | "
            f"{row.divergence:.5f} |"
        )
        if row.lambada:
            found = row.lambada
            line += f" {100 * found.accuracy:.2f}% ± {100 * found.accuracy_stderr:.2f} | {found.perplexity:.4g} |"
        yield line


def markdown(report: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """The report for people."""
    yield f"# Quality of {report['checkpoint']}, {report['n_weights']:,} numbers"
    yield ""
    words = report["lambada"]
    yield (
        f"{report['tokens']} tokens ({report['bytes']} bytes) of {report['text']} in {LANES} lanes; calibration on "
        f"{report['calibration_tokens']} tokens of {report['calibration_text']}"
        + (f"; the first {words['passages']} passages of {words['file']}" if words else "")
        + f". {report['cpu']}, native backend."
    )
    yield ""
    yield from table(rows)
    yield ""
    for reason in report["not_run"]:
        yield f"Not run: {reason}"
        yield ""
    for row in rows:
        if row.types:
            types = ", ".join(f"{count} {kind}" for kind, count in sorted(row.types.items()))
            yield f"- llama.cpp {row.name}: its matrices are {types}"
    yield ""
    for claim, held in verdicts(rows):
        yield f"- {'not run' if held is None else 'held' if held else 'NOT HELD'}: {claim}"


def named_tokenizer(choice: str) -> Tokenizer:
    """A tokenizer as ``goslet export --tokenizer`` names it."""
    if choice == "bytes":
        return BytesTokenizer()
    return world_tokenizer() if choice == "world" else tokenizer_from_file(choice)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text that the model was not trained on")
    parser.add_argument("--calibrate", type=Path, required=True, help="another UTF-8 text, to calibrate on")
    parser.add_argument("--lambada", type=Path, help='passages, {"text": "..."} on each line')
    parser.add_argument("--limit", type=int, help="the first so many passages")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "rwkv7-demo.pth")
    parser.add_argument("--tokenizer", default=str(DEMO / "tokenizer.json"), help="bytes, world or a file")
    parser.add_argument("--rows", default="", help="only goslet's rows whose names hold this, and f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    options = parser.parse_args(arguments)
    from bench_contenders import Unavailable

    tokenizer = named_tokenizer(options.tokenizer)
    try:
        lanes = cut_lanes(tokenizer.encode(options.text.read_bytes().decode("utf-8")), tokenizer.end_token)
    except ValueError as error:
        parser.error(f"{options.text}: {error}")
    passages = []
    if options.lambada:
        with open(options.lambada, "rb") as file:
            passages = [
                encode_pair(tokenizer, *pair) for pair in read_lambada(file, str(options.lambada), options.limit)
            ]
    n_bytes = len(tokenizer.decode_bytes(lanes[:, 1:].flatten().tolist()))
    rows: list[Row] = []
    not_run: list[str] = []
    start_s = time.monotonic()

    def add(row: Row) -> None:
        rows.append(row)
        print(f"{time.monotonic() - start_s:.0f} s: {row}", file=sys.stderr, flush=True)

    def try_method(method: Method) -> None:
        try:
            add(goslet_row(comparison, method, *common))
        except QuantizationError as error:
            not_run.append(f"goslet {method.name}: {error}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moments = folder / "moments"
        with open_checkpoint(options.checkpoint) as source:
            tokens = calibration_tokens(options.calibrate, tokenizer, CALIBRATION_TOKENS)
            collect_moments(source, source.model_id(), tokens, moments)
            n_weights = sum(math.prod(rule.shape) for rule in source.rules)
        comparison = Comparison(lanes, n_bytes, passages, folder)
        common = (options.checkpoint, moments, options.tokenizer, options.threads, folder)
        for method in METHODS:
            if method.name == REFERENCE or options.rows in method.name:
                try_method(method)
        try:
            for row in llama_rows(comparison, options.checkpoint, moments, n_weights, options.threads, folder):
                add(row)
        except Unavailable as error:
            not_run.append(f"llama.cpp: {error}")
        for method in matched_methods(rows):
            if options.rows in method.name:
                try_method(method)
    report = {
        "checkpoint": options.checkpoint.name,
        "n_weights": n_weights,
        "text": options.text.name,
        "tokens": int(lanes[:, 1:].size),
        "bytes": n_bytes,
        "calibration_text": options.calibrate.name,
        "calibration_tokens": int(tokens.size),
        "lambada": {"file": options.lambada.name, "passages": len(passages)} if passages else None,
        "cpu": cpu_model(),
        "not_run": not_run,
    }
    print("\n".join(markdown(report, rows)))
    if options.json:
        whole = {**report, "rows": [asdict(row) for row in rows], "verdicts": verdicts(rows)}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
