"""Keep sketches of what an engine's matrices give on a text, to recalibrate other engines with.

A few random scalars for every token and matrix: no weight is in the file.
"""

from __future__ import annotations

import argparse

from ..output import check_output
from .console import Console, readable_size
from .flags import whole_number

NAME = "sketch"
SUMMARY = "keep sketches of a reference engine, to recalibrate others with"
# As goslet.export.calibration_text and goslet.export.recalibration have them, which are not imported for --help.
CALIBRATION_TOKENS = 8192
SKETCHES_PER_TOKEN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "reference", metavar="REFERENCE", help="an engine with a tokenizer: the same model in f16, or one tuned from it"
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text of the kind that the model reads")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the sketch file to write")
    parser.add_argument(
        "--tokens",
        type=whole_number(1),
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="read so many of its tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--per-token",
        type=whole_number(1),
        default=SKETCHES_PER_TOKEN,
        metavar="M",
        help="scalars for every token and matrix (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of the random signs (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    check_output(args.output, overwrite=args.force)
    from ..export.recalibration import sketch

    with console.progress() as progress:
        report = sketch(
            args.reference,
            args.output,
            args.text,
            n_tokens=args.tokens,
            per_token=args.per_token,
            seed=args.seed,
            overwrite=args.force,
            progress=progress,
        )
    console.note(
        f"{report.path}: {readable_size(report.size_bytes)}, sketches of {report.matrices} matrices over "
        f"{report.tokens:,} tokens"
    )
    return 0
