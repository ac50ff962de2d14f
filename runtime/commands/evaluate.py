"""Measure how well an engine predicts: a text (bits per byte, perplexity per token), or last words (LAMBADA).

LAMBADA is read as lm-evaluation-harness's lambada_openai does: a passage is cut at its last space, and the target is
that space and the word after it. It is right when greedy decoding would have written every token of it. The perplexity
is per target. Every passage begins with a fresh state and the end-of-document token.
"""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..evaluation import evaluate_text
from ..lambada import evaluate_lambada
from ..reading import MAX_TEXT_BYTES, read_file
from .console import Console
from .flags import UsageError, add_backend_flags, open_engine, whole_number
from .text import read_text

NAME = "eval"
SUMMARY = "measure how well an engine predicts a text, or last words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="a UTF-8 text; every byte counts")
    what.add_argument("--lambada", metavar="FILE", help='passages, {"text": "..."} on each line')
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N passages (default: all)")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    add_backend_flags(parser)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if args.lambada is not None:
        return _lambada(args, console)
    if args.limit is not None:
        raise UsageError("--limit: goes with --lambada", see="goslet eval --help")
    text = read_text(read_file(args.text, MAX_TEXT_BYTES), args.text)
    if not text:
        raise InputError("the text is empty", file=args.text)
    with open_engine(args) as engine, console.progress() as progress:
        result = evaluate_text(engine, text, progress=progress)
    if args.json:
        console.json(result.to_json())
        return 0
    console.line(f"{result.bits_per_byte:.4f} bits per byte")
    console.line(f"{result.perplexity:.4f} perplexity per token")
    console.line(f"{result.tokens} tokens, {result.bytes} bytes")
    if result.uncounted_bytes:
        console.line(f"not counted: the first {result.uncounted_bytes} bytes, which nothing comes before")
    return 0


def _lambada(args: argparse.Namespace, console: Console) -> int:
    with open_engine(args) as engine, console.progress() as progress:
        result = evaluate_lambada(engine, args.lambada, limit=args.limit, progress=progress)
    if args.json:
        console.json(result.to_json())
        return 0
    right = round(result.accuracy * result.examples)
    console.line(
        f"{result.accuracy:.4f} accuracy (standard error {result.accuracy_stderr:.4f}), {right:,} of "
        f"{result.examples:,} passages"
    )
    console.line(f"{result.perplexity:.4f} perplexity per last word")
    return 0
