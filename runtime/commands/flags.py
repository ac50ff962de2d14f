"""Flags that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from ..errors import InputError, OutputError
from ..output import check_output
from ..sampling import DECODING, SamplingOptions
from ..session import Engine
from ..session import open_engine as open_file
from ..state import STATE_FILE_MAGIC


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
    """The flags that `sampling_options` reads; those that are not given are None."""
    group = parser.add_argument_group(
        "sampling",
        "What is not given is as the engine says (goslet inspect shows it); --temperature 0 alone is greedy.",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens (0: all)")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to P (1: all)")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest (0: all)"
    )
    group.add_argument(
        "--presence-penalty", type=float, metavar="X", help="lower the logit of tokens already written by X"
    )
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="and by X for every time they were written")
    group.add_argument(
        "--penalty-decay",
        type=float,
        metavar="D",
        help="what the counts of these times are multiplied by at each token",
    )
    group.add_argument(
        "--repeat-penalty", type=float, metavar="X", help="weaken the last 64 tokens written by this factor (1: not)"
    )
    group.add_argument("--seed", type=int, metavar="S", help="draw the same text again")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given several times)"
    )


def sampling_options(
    args: argparse.Namespace, usual: SamplingOptions | None = None, *more_stops: str
) -> SamplingOptions:
    """What the sampling flags ask for, with further stop texts.

    Args:
        args: the command line.
        usual: decoding parameters for what is not asked for; of no account where --temperature 0 asks for the likeliest
            tokens. None checks the flags alone.
        *more_stops: texts that also end the generation.

    Raises:
        UsageError: a flag is out of range; it is named as it was typed.
    """
    if usual is None or args.temperature == 0:
        usual = SamplingOptions()
    given = {name: getattr(args, name) for name in DECODING}
    values = {name: getattr(usual, name) if value is None else value for name, value in given.items()}
    try:
        return SamplingOptions(**values, seed=args.seed, stop=(*args.stop, *more_stops))
    except InputError as error:
        flag = "--" + (error.place or "").replace("_", "-")
        raise UsageError(
            str(InputError(error.problem, place=flag, expected=error.expected, found=error.found, remedy=error.remedy))
        ) from error


def readable_sampling(options: SamplingOptions) -> str:
    """Decoding parameters for people: ``"temperature 1, top-p 0.3, presence penalty 0.5"``; what is off is left out."""
    off = SamplingOptions()
    said = [] if options.temperature == 0 else [f"temperature {options.temperature:g}"]
    for name in DECODING:
        decays = options.presence_penalty or options.frequency_penalty
        if name == "temperature" or (name == "penalty_decay" and not decays):
            continue
        if (value := getattr(options, name)) != getattr(off, name):
            said.append(f"{name.replace('top_', 'top-').replace('min_', 'min-').replace('_', ' ')} {value:g}")
    return ", ".join(said if options.temperature else ["greedy", *said])


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
