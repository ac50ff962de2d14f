"""Build a TensorRT plan from an engine.

On the GPU that it is for (local), or with TensorRT for RTX on any machine (rtx). For a Jetson elsewhere (orin, thor) it
writes the graph as ONNX and shows a trtexec line that tries and times it there; the plan that goslet runs is built on
the Jetson, by `goslet plan --target local`.
"""

from __future__ import annotations

import argparse

from ..errors import DependencyError
from .console import Console, readable_size
from .flags import UsageError, whole_number

NAME = "plan"
SUMMARY = "build a TensorRT plan from an engine"
TARGETS = ("local", "rtx", "orin", "thor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("--target", choices=TARGETS, help="what the plan is for; there is no default")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="the file to write (default: ENGINE.TARGET.plan, or .onnx for a Jetson)"
    )
    parser.add_argument(
        "--precision", choices=("f16", "bf16"), default="f16", help="of the matrix products (default: %(default)s)"
    )
    parser.add_argument(
        "--plugin",
        metavar="LIB",
        help="libgoslet_trt.so, with our kernels (default: what GOSLET_TRT_PLUGIN names, or beside ENGINE); "
        "for a Jetson elsewhere, where it lies there",
    )
    parser.add_argument("--plain", action="store_true", help="do without it: TensorRT's own layers alone")
    parser.add_argument(
        "--weights",
        choices=("qdq", "plugin"),
        help="who multiplies with 4-bit and 8-bit weights: TensorRT or our kernels (default: ours, unless --plain)",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="sessions in one step (default: %(default)s, which is what goslet runs)",
    )
    parser.add_argument("--optimization-level", type=whole_number(0), metavar="L", help="TensorRT's own, 0 to 5")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if args.target is None:
        raise UsageError(f"--target is missing (expected {', '.join(TARGETS)})")
    try:
        from ..export.plan import build_plan
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise DependencyError(
            "onnx is not installed, which lowering the graph needs", remedy="pip install onnx"
        ) from None
    with console.progress() as progress:
        report = build_plan(
            args.engine,
            target=args.target,
            output=args.output,
            precision=args.precision,
            weights=args.weights,
            plugin=args.plugin,
            plain=args.plain,
            batch=args.batch,
            optimization_level=args.optimization_level,
            overwrite=args.force,
            progress=progress,
        )
    for warning in report.warnings:
        console.note(f"TensorRT: {warning}")
    if report.command:
        console.note(
            f"{report.path} and {report.path.name}.data: {readable_size(report.size_bytes)} of ONNX, "
            f"{report.plugin_layers} layers for plugins"
        )
        console.note("the plan that goslet runs is built on the Jetson: goslet plan ENGINE --target local")
        console.note("with both files there, this tries and times the graph without goslet:")
        console.line(report.command)
    else:
        console.note(
            f"{report.path}: {readable_size(report.size_bytes)}, {report.plugin_layers} layers run by our plugins, "
            f"built by TensorRT {report.tensorrt_version} in {report.build_s:.1f} s"
        )
    return 0
