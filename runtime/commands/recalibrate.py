"""Improve an engine's low-rank residuals from sketches of a reference, without a checkpoint.

The engine needs such residuals: goslet export --low-rank R, or R:zero for room alone.
"""

from __future__ import annotations

import argparse

from ..output import check_output
from .console import Console

NAME = "recalibrate"
SUMMARY = "improve an engine's low-rank residuals from sketches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine from goslet export --low-rank")
    parser.add_argument("--sketches", required=True, metavar="FILE", help="from goslet sketch")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the engine file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    check_output(args.output, overwrite=args.force)
    from ..export.recalibration import recalibrate

    with console.progress() as progress:
        report = recalibrate(args.engine, args.sketches, args.output, overwrite=args.force, progress=progress)
    if not report.same_model:
        console.note("the sketches are of another model of these dimensions, which this engine now follows")
    console.note(
        f"{report.path}: {report.improved} of {report.matrices} matrices improved; of held-out sketches, "
        f"{100 * report.after:.1f}% is left in the square, {100 * report.before:.1f}% before"
    )
    return 0
