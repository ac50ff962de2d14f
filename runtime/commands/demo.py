"""See it all at once: export the demonstration checkpoint to int4, verify the engine, and write text with it."""

from __future__ import annotations

import argparse
import contextlib
import os
from importlib import resources
from pathlib import Path

from ..sampling import SamplingOptions
from ..session import open_engine
from .console import Console, Interruption, readable_size, run_command
from .export import need_export_packages
from .verify import show_report

NAME = "demo"
SUMMARY = "export, verify and run the demonstration model"

CHECKPOINT, TOKENIZER, ENGINE = "rwkv7-demo.pth", "tokenizer.json", "rwkv7-demo-int4.goslet"
PROMPT = "The old house stood at the end of the lane, and"
SAMPLING = SamplingOptions(temperature=0.8, top_p=0.9, seed=7)
MAX_TOKENS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="where to keep the engine (default: goslet in the user's cache folder)"
    )


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command; 1 when the engine fails its verification."""
    need_export_packages()
    from ..export import export_engine
    from ..export.verify import verify_engine

    folder = args.dir or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    engine_path = folder / ENGINE
    data = resources.files("goslet") / "demo"
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(resources.as_file(data / CHECKPOINT))
        tokenizer = stack.enter_context(resources.as_file(data / TOKENIZER))
        console.line(f"1. exporting {checkpoint.name} ({readable_size(checkpoint.stat().st_size)}) to int4")
        with console.progress() as progress:
            report = export_engine(
                checkpoint, engine_path, quant="int4", tokenizer=tokenizer, overwrite=True, progress=progress
            )
        console.line(
            f"   {engine_path}: {readable_size(report.size_bytes)}, {report.bits_per_weight:.2f} bits per weight, "
            f"{report.duration_s:.1f} s"
        )
        console.line("2. verifying it against the checkpoint")
        with console.progress() as progress:
            verified = verify_engine(engine_path, checkpoint, progress=progress)
    show_report(verified, console)
    if not verified.passed:
        return 1
    console.line("3. writing text with it")
    console.line()
    console.write(PROMPT)
    with open_engine(engine_path) as engine, Interruption() as interruption:
        for piece in engine.generate(PROMPT, max_tokens=MAX_TOKENS, options=SAMPLING):
            console.write(piece)
            if interruption.requested:
                break
    console.line()
    if interruption.requested:
        raise KeyboardInterrupt
    console.line()
    console.line(f"Go on with: {run_command(engine_path)} -p 'It was'")
    return 0


def cache_folder() -> Path:
    """goslet's folder in the user's cache folder: XDG_CACHE_HOME where it is set and absolute, or ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "goslet"
