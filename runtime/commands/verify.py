"""Check that an engine computes what its checkpoint says.

It passes when the engine's step equals the torch step on the engine's own dequantized weights. What quantization
costs against the checkpoint's weights is reported, not judged.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .console import Console
from .export import need_export_packages
from .flags import add_adapter_flags, add_backend_flags, positive_number

if TYPE_CHECKING:
    from ..export.verify import VerifyReport

NAME = "verify"
SUMMARY = "check an engine against its checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint that it was exported from")
    parser.add_argument(
        "--norm-eps",
        type=positive_number,
        metavar="E",
        help="eps of the per-head group norm that the engine was exported with (default: the checkpoint's)",
    )
    add_adapter_flags(parser)
    parser.add_argument(
        "--against",
        nargs="?",
        const="auto",
        choices=("auto", "rwkv", "transformers", "gguf"),
        metavar="LIBRARY",
        help="let another library run the checkpoint too: rwkv, transformers, gguf or auto, the one that reads it "
        "(default without a name: auto)",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    add_backend_flags(parser)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command; 1 when the engine fails."""
    need_export_packages()
    from ..export.verify import verify_engine

    with console.progress() as progress:
        report = verify_engine(
            args.engine,
            args.checkpoint,
            backend=args.backend,
            device=args.device,
            threads=args.threads,
            norm_eps=args.norm_eps,
            adapter=args.adapter,
            alpha=args.alpha,
            adapter_init=args.adapter_init,
            against=args.against,
            progress=progress,
        )
    if args.json:
        console.json(report.to_json())
    else:
        show_report(report, console)
    return 0 if report.passed else 1


def show_report(report: VerifyReport, console: Console) -> None:
    """Write a report as lines for people."""
    if report.checks:
        what = "tokens of text" if report.text else "random tokens"
        console.line(
            f"backend {report.backend} over {report.n_tokens} {what}, errors as parts of range (of norm for weights, "
            "of a step for integers):"
        )
    width = max((len(check.name) for check in report.checks), default=0)
    for check in report.checks:
        verdict = "right" if check.passed else "WRONG"
        console.line(f"  {check.name:<{width}}  {check.value:.2e} (limit {check.limit:.2e})  {verdict}")
    if report.differences:
        console.line(f"the engine was not made from this checkpoint; different: {', '.join(report.differences)}")
    if report.divergence:
        found = report.divergence
        console.line("against the checkpoint's own weights (reported, not judged):")
        console.line(f"  {found['kl_bits_per_token']:.4f} bits of divergence per token")
        console.line(f"  {found['same_top_token']:.1%} of tokens with the same likeliest successor")
        console.line(
            f"  loss {found['engine_loss_bits_per_token']:.4f} bits per token, "
            f"the checkpoint's {found['checkpoint_loss_bits_per_token']:.4f}"
        )
    console.line("passed" if report.passed else "FAILED")
