"""The command ``goslet``: reads the command line, runs one command, and turns every failure into one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn

from . import __version__
from .commands import bench, chat, demo, evaluate, export, fetch, inspect, plan, recalibrate, run, sketch, verify
from .commands.console import ENDINGS, Console
from .commands.flags import UsageError
from .errors import GosletError, one_line

COMMANDS = (fetch, export, run, chat, inspect, verify, evaluate, bench, plan, sketch, recalibrate, demo)

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, see=f"{self.prog} --help")


def _add_common(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", default=default, help="no notes and no progress on stderr")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="goslet",
        description="Compiles RWKV checkpoints into one engine file and runs them.",
        epilog="Exit codes: 0 success, 1 an error or a failed verification, 2 a usage error, 130 Ctrl-C, "
        "129 and 143 when told to end (SIGHUP, SIGTERM).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"goslet {__version__}")
    _add_common(parser, False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands = {}
    for command in COMMANDS:
        own = subparsers.add_parser(command.NAME, help=command.SUMMARY, description=command.__doc__, allow_abbrev=False)
        # A flag after the command must not reset the one before it, so here it has no default.
        _add_common(own, argparse.SUPPRESS)
        command.add_arguments(own)
        own.set_defaults(execute=command.execute)
        commands[command.NAME] = own
    subparsers.add_parser("help", help="explain a command, as in: goslet help run")
    return parser, commands


# What other programs call these.
_OTHER_NAMES = {
    "generate": "run",
    "complete": "run",
    "talk": "chat",
    "convert": "export",
    "compile": "export",
    "quantize": "export",
    "info": "inspect",
    "show": "inspect",
    "check": "verify",
    "perplexity": "eval",
    "--n-predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--repetition-penalty": "--repeat-penalty",
}


def _suggestion(word: str, known: Sequence[str]) -> str:
    word = word.lower().replace("_", "-")
    near = [name for name in known if name in (word, _OTHER_NAMES.get(word))]
    near = near or [name for name in known if name.startswith(word)]
    near = near or difflib.get_close_matches(word, known, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_command(name: str, commands: Sequence[str]) -> UsageError:
    if name.endswith(".goslet"):
        return UsageError(f"a command is needed before {name!r}, such as run or chat", see="goslet --help")
    if os.path.isfile(name):
        return UsageError(f"a command is needed before {name!r}, such as export", see="goslet --help")
    return UsageError(f"unknown command {name!r}{_suggestion(name, commands)}", see="goslet --help")


def _unknown_flag(flag: str, flags: Sequence[str], own: _Parser, commands: Mapping[str, _Parser]) -> UsageError:
    others = [name for name, parser in commands.items() if flag in parser._option_string_actions]
    hint = f"; it is one of {', '.join(others)}" if others else _suggestion(flag, flags)
    return UsageError(f"unknown flag {flag}{hint}", see=f"{own.prog} --help")


def _with_texts_bound(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words, with texts that begin with a dash bound to their flags: ``-p -hi`` is ``--prompt=-hi``."""
    words = list(argv)
    for index, word in enumerate(words[:-1]):
        text = words[index + 1]
        if word == "--":
            break
        if word in _TEXT_FLAGS and text.startswith("-") and text.partition("=")[0] not in flags:
            words[index : index + 2] = [f"{_TEXT_FLAGS[word]}={text}"]
            return _with_texts_bound(words, flags)
    return words


# Flags that any text may follow.
_TEXT_FLAGS = {"-p": "--prompt", "--prompt": "--prompt", "--system": "--system", "--stop": "--stop"}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and name the nearest command or flag where one is mistyped.

    Raises:
        UsageError: the command line cannot be understood.
    """
    parser, commands = _parsers()
    name = next((word for word in argv if not word.startswith("-")), None)
    if name == "help":
        asked = [word for word in argv if word != "help"]
        argv, name = [*asked, "--help"], next((word for word in asked if not word.startswith("-")), None)
    if name is not None and name not in commands:
        raise _unknown_command(name, list(commands))
    own = parser if name is None else commands[name]
    flags = [*parser._option_string_actions, *own._option_string_actions]
    argv = _with_texts_bound(argv, flags)
    for word in argv:
        flag = word.partition("=")[0]
        if word == "--":
            break
        if word.startswith("--") and " " not in flag and flag not in flags:
            raise _unknown_flag(flag, flags, own, commands)
        if f"-{flag}" in flags and len(flag) > 2:  # "-temperature"
            raise UsageError(f"unknown flag {flag}; did you mean -{flag}?", see=f"{own.prog} --help")
    args, left = parser.parse_known_args(argv)
    if left[:1] == ["--"]:
        left.pop(0)
    if left and getattr(args, "words", "") is None and (not left[0].startswith("-") or "--" in argv):
        args.words = left.pop(0)  # argparse takes a prompt that may be left out for left out once a flag has come
    if left:
        several = "; a prompt of several words needs quotes" if name == "run" and not left[0].startswith("-") else ""
        raise UsageError(f"unexpected {' '.join(left)[:100]!r}{several}", see=f"{own.prog} --help")
    if args.command is None:
        raise UsageError(f"a command is needed: {', '.join(commands)}", see="goslet --help")
    return args


def _report(problem: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    print(f"goslet: error: {one_line(problem)}", file=sys.stderr, flush=True)


def _abandon_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's own flush at exit stays silent."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _run(argv: Sequence[str]) -> int:
    args = _parse(argv)
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        status: int = args.execute(args, Console(quiet=args.quiet))
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


class _Ended(SystemExit):
    """SIGTERM or SIGHUP; unlike the system's own way to end, this one lets output files be cleaned up."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)


def _end(number: int, frame: FrameType | None) -> None:
    # Another one, such as the SIGHUP that often follows a SIGTERM, must not cut the cleaning up short. (With SIG_IGN
    # in its place, Python would complain about one that has arrived already.)
    for other in ENDINGS:
        if signal.getsignal(other) is _end:
            signal.signal(other, _go_on_ending)
    raise _Ended(number)


def _go_on_ending(number: int, frame: FrameType | None) -> None:
    pass


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `_Ended`, where they would end the process and this thread may decide it."""
    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; by default the process's) and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in words
    if hasattr(sys.stdout, "reconfigure"):
        # A model writes any character; a terminal in another encoding shows "?" for what it cannot.
        sys.stdout.reconfigure(errors="replace")
    try:
        with _ending_cleanly():
            return _run(words)
    except _Ended as ended:
        # The terminal may be gone, or nobody may read any more.
        _abandon_stdout()
        return ended.status
    except SystemExit as done:  # argparse, after --help or --version
        return done.code if isinstance(done.code, int) else SUCCESS
    except UsageError as error:
        _report(str(error))
        return USAGE
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exc()
        detail = f"; {error}" if str(error) else ""
        start = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # after the terminal's ^C
        print(f"{start}goslet: interrupted{detail}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted.
        _abandon_stdout()
        return SUCCESS
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, GosletError):
            _report(str(error))
        elif isinstance(error, OSError):
            _report(f"{error.filename or 'the system'}: {error.strerror or error}")
            _abandon_stdout()
        elif isinstance(error, MemoryError):
            _report("there is not enough memory; use a smaller model or fewer bits a weight (--quant int4)")
        else:
            _report(f"unexpected {type(error).__name__}: {error}; run it again with --debug for the traceback")
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())
