"""Compile a checkpoint into an engine file.

Running the engine needs neither the checkpoint nor torch.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import DependencyError
from ..output import check_output
from ..weights import FORMAT_NAMES, GROUPS
from .console import Console, readable_size, run_command
from .flags import UsageError, add_adapter_flags, positive_number, whole_number

NAME = "export"
SUMMARY = "compile a checkpoint into an engine file"
SUGGESTED_TOKENIZERS = {
    65536: "RWKV World models: for text, export again with --tokenizer world --force",
    50277: "RWKV-4 Pile models: for text, export again with --tokenizer 20B_tokenizer.json --force",
}
# As goslet.export.calibration and goslet.export.compensate have them, which are not imported for --help.
CALIBRATION_TOKENS = 8192
LOW_RANK_METHODS = ("svd", "weighted", "drift", "sensing", "zero")
SPARSE_METHODS = ("magnitude", "weighted", "l1", "flow")
ONNX_FORMS = ("onnxruntime", "portable")
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="an RWKV .pth, .safetensors, .st (web-rwkv), .gguf or .bin (rwkv.cpp) file, or a Hugging Face folder",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the engine file to write: NAME.goslet")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument(
        "--quant", choices=FORMAT_NAMES, default="int8", help="how weights are stored (default: %(default)s)"
    )
    formats.add_argument(
        "--bits",
        type=positive_number,
        metavar="B",
        help="choose a format for every tensor, within B bits per weight in all; needs a calibration",
    )
    parser.add_argument("--group", type=int, choices=GROUPS, help="weights that share a scale (default: 32)")
    parser.add_argument(
        "--calibrate", metavar="TEXT", help="quantize so that the model errs little on text like this UTF-8 file"
    )
    parser.add_argument(
        "--calibration-tokens",
        type=whole_number(1),
        metavar="N",
        help=f"read so many of its tokens (default: {CALIBRATION_TOKENS})",
    )
    parser.add_argument(
        "--moments",
        metavar="FILE",
        help="keep what calibration finds in this file, and use it if it exists",
    )
    parser.add_argument(
        "--method",
        choices=("rtn", "gptq"),
        help="round to the nearest, or feed errors back (default: gptq with a calibration, else rtn)",
    )
    parser.add_argument(
        "--low-rank",
        type=_low_rank,
        metavar="R[:METHOD]",
        help="put a residual of rank R beside each matrix: svd, weighted (default), drift, sensing, or zero, room for "
        "goslet recalibrate",
    )
    parser.add_argument(
        "--sparse",
        type=_sparse,
        metavar="P[:METHOD]",
        help="and one of a share P of its numbers, such as 0.01: magnitude (default), weighted, l1 or flow",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        help="world, bytes, none (token ids only), or the path of a vocabulary: a World .txt or a tokenizer.json "
        "(default: the checkpoint's own)",
    )
    parser.add_argument(
        "--norm-eps",
        type=positive_number,
        metavar="E",
        help="eps of the per-head group norm (default: the checkpoint's, else the version's own)",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="begin with this tuned state, a .pth, .safetensors or .st with time_state (versions 5 to 7)",
    )
    add_adapter_flags(parser)
    parser.add_argument(
        "--chat-template",
        metavar="T",
        help="how conversations are written: world, g1, g1-2025, none, or a JSON file (default: by the file's name)",
    )
    parser.add_argument(
        "--onnx",
        metavar="OUT",
        help="also write a self-contained ONNX model that takes a token; its metadata says how a text begins; "
        "beyond 2 GiB its weights are in OUT.data",
    )
    parser.add_argument(
        "--onnx-form",
        choices=ONNX_FORMS,
        help="onnxruntime (default), or portable: few old operators, for OpenVINO, tract, tinygrad, MNN, IREE, TVM and "
        "others; integer weights take a byte each there",
    )
    parser.add_argument(
        "--onnx-batch",
        type=whole_number(1),
        metavar="N",
        help="a fixed batch, for runtimes that need to know it (default: any)",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def _low_rank(text: str) -> dict[str, Any]:
    number, colon, method = text.partition(":")
    rank = {"rank": whole_number(1)(number)}
    return {**rank, "low_rank": _one_of(method, LOW_RANK_METHODS)} if colon else rank


def _sparse(text: str) -> dict[str, Any]:
    number, colon, method = text.partition(":")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share < 0.5:
        raise argparse.ArgumentTypeError(
            f"expected a share of a matrix's numbers between 0 and 0.5, such as 0.01, found {number!r}"
        )
    return {"share": share, "sparse": _one_of(method, SPARSE_METHODS)} if colon else {"share": share}


def _one_of(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, found {name!r}")
    return name


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if args.bits is not None and args.group is not None:
        raise UsageError("--group: is chosen by --bits, tensor by tensor; give one of them", "goslet export --help")
    if args.calibration_tokens is not None and args.calibrate is None:
        raise UsageError("--calibration-tokens: is of no use without --calibrate", "goslet export --help")
    if args.onnx is None and (args.onnx_form or args.onnx_batch):
        raise UsageError("--onnx-form, --onnx-batch: are of no use without --onnx", "goslet export --help")
    for output in (args.output, args.onnx):
        if output is not None:
            check_output(output, overwrite=args.force)  # before the seconds that importing torch takes
    need_export_packages()
    from ..export import export_engine
    from ..export.compensate import Compensation

    residuals = {**(args.low_rank or {}), **(args.sparse or {})}
    with console.progress() as progress:
        report = export_engine(
            args.checkpoint,
            args.output,
            quant=args.quant,
            group=args.group or 32,
            bits=args.bits,
            method=args.method,
            calibrate=args.calibrate,
            calibration_tokens=args.calibration_tokens or CALIBRATION_TOKENS,
            moments=args.moments,
            compensation=Compensation(**residuals) if residuals else None,
            tokenizer=args.tokenizer,
            norm_eps=args.norm_eps,
            state=args.state,
            adapter=args.adapter,
            alpha=args.alpha,
            adapter_init=args.adapter_init,
            chat=args.chat_template,
            onnx=args.onnx,
            onnx_form=args.onnx_form or ONNX_FORMS[0],
            onnx_batch=args.onnx_batch,
            overwrite=args.force,
            progress=progress,
        )
    for note in report.notes:
        console.note(note)
    if report.calibration_tokens is not None:
        console.note(f"calibrated on {report.calibration_tokens:,} tokens")
    console.note(
        f"{report.path}: {readable_size(report.size_bytes)}, {report.bits_per_weight:.2f} bits per weight, "
        f"made in {report.duration_s:.1f} s"
    )
    if report.onnx:
        console.note(f"{' and '.join(map(str, report.onnx))}: the step as ONNX, with its weights")
    if report.tokenizer_kind is None:
        suggestion = None if args.tokenizer == "none" else SUGGESTED_TOKENIZERS.get(report.spec.vocab_size)
        if suggestion is not None:
            console.note(f"a vocabulary of {report.spec.vocab_size} is that of {suggestion}")
        console.note(f'it takes and gives token ids; try: {run_command(args.output)} --tokens "1,2,3"')
    else:
        console.note(f"try: {run_command(args.output)} -p 'Once upon a time'")
    return 0


def need_export_packages() -> None:
    """Fail with one line where the export extra is not installed.

    Raises:
        DependencyError: one of its packages cannot be imported.
    """
    try:
        from ..export import exporter  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXPORT_PACKAGES:
            raise
        raise DependencyError(
            f"{error.name} is not installed, which reading checkpoints needs",
            remedy="pip install 'goslet[export,ort]'",
        ) from error
