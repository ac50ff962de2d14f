"""Flags that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from ..errors import InputError, OutputError
from ..output import check_output
from ..sampling import SamplingOptions
from ..session import Engine
from ..session import open_engine as open_file
from ..state import STATE_FILE_MAGIC

_SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
    "seed",
    "stop",
)


class UsageError(Exception):
    """The command line cannot be understood; `see` is the command that explains it."""

    def __init__(self, problem: str, see: str | None = None) -> None:
        super().__init__(f"{problem} (see: {see})" if see else problem)


def whole_number(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `low` or more."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number, {low} or more, found {text!r}")
        return value

    return read


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """--adapter, --alpha and --adapter-init."""
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        help="merge this LoRA, PiSSA, DoRA, bone, DiSHA or state adapter, or folder of PEFT's, into the model",
    )
    parser.add_argument(
        "--alpha",
        type=positive_number,
        metavar="A",
        help="the lora_alpha that a LoRA was trained with, where no adapter_config.json beside it says it",
    )
    parser.add_argument(
        "--adapter-init",
        metavar="FILE",
        help="what PiSSA took out of the model when training began: RWKV-PEFT's init_pissa.pth",
    )


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """--backend, --device and --threads."""
    parser.add_argument(
        "--backend", choices=("native", "ort", "trt"), help="what runs the steps (default: what is here)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where they run (default: cuda with trt, cpu with the others)"
    )
    parser.add_argument(
        "--threads", type=whole_number(1), metavar="N", help="CPU threads (default: the physical cores)"
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    default = SamplingOptions()
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy (default: %(default)g)"
    )
    group.add_argument(
        "--top-k", type=int, default=default.top_k, metavar="K", help="keep the K likeliest tokens (0: all)"
    )
    group.add_argument(
        "--top-p", type=float, default=default.top_p, metavar="P", help="keep the likeliest tokens up to P (1: all)"
    )
    group.add_argument("--seed", type=int, metavar="S", help="draw the same text again")
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="lower the logit of tokens already written by X",
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="and by X for every time they were written"
    )
    group.add_argument(
        "--penalty-decay",
        type=float,
        default=default.penalty_decay,
        metavar="D",
        help="what counts of written tokens are multiplied by at each token (default: %(default)g)",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given several times)"
    )


def sampling_options(args: argparse.Namespace, *more_stops: str) -> SamplingOptions:
    """What the sampling flags ask for, with further stop texts.

    Raises:
        UsageError: a flag is out of range; it is named as it was typed.
    """
    values = {name: getattr(args, name) for name in _SAMPLING_OPTIONS}
    values["stop"] = (*args.stop, *more_stops)
    try:
        return SamplingOptions(**values)
    except InputError as error:
        flag = "--" + (error.place or "").replace("_", "-")
        raise UsageError(
            str(InputError(error.problem, place=flag, expected=error.expected, found=error.found, remedy=error.remedy))
        ) from error


def open_engine(args: argparse.Namespace) -> Engine:
    """Open ENGINE as `add_backend_flags` says."""
    return open_file(args.engine, backend=args.backend, device=args.device, threads=args.threads)


def check_state_output(path: str) -> None:
    """Fail before the work if a state could not be saved there, or if that would replace a file of another kind.

    Raises:
        OutputError: the file is something other than a state, or cannot be written.
    """
    check_output(path, overwrite=True)
    try:
        with open(path, "rb") as file:
            found = file.read(len(STATE_FILE_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", file=path, remedy="choose another name") from error
    if found != STATE_FILE_MAGIC:
        raise OutputError("exists and is not a state file", file=path, remedy="choose another name")
