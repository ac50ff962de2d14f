"""Measure how well an engine predicts a text: bits per byte, and perplexity per token."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..evaluation import evaluate_text
from .console import Console
from .flags import add_backend_flags, open_engine
from .text import read_text

NAME = "eval"
SUMMARY = "measure how well an engine predicts a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text; every byte counts")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    add_backend_flags(parser)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    text = read_text(Path(args.text).read_bytes(), args.text)
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
