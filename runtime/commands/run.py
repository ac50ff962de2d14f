"""Write text after a prompt.

The text goes to stdout as it is sampled. Ctrl-C and SIGTERM end it between two tokens; --state-out is written even
then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import TokenizerError
from ..reading import MAX_PROMPT_BYTES, read_bounded
from ..session import Engine, Session
from .console import Console, Interruption
from .export import need_export_packages
from .flags import (
    UsageError,
    add_backend_flags,
    add_sampling_flags,
    check_state_output,
    open_engine,
    readable_sampling,
    sampling_options,
    whole_number,
)
from .text import feed_in_pieces, read_text, text_argument

NAME = "run"
SUMMARY = "write text after a prompt"
STATE_NEEDS_WORDS = "this state was saved without what comes next, so give the words that follow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("words", nargs="?", metavar="PROMPT", help="the text to go on from")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "-p",
        "--prompt",
        metavar="PROMPT",
        help="the same (default: what is piped in, less one line end; or else the start of a document)",
    )
    prompt.add_argument(
        "--tokens", metavar="IDS", help='token ids to go on from, as in "1,2,3"; then token ids are written, not text'
    )
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=whole_number(0),
        default=256,
        metavar="N",
        help="at most N tokens (default: %(default)s)",
    )
    add_sampling_flags(parser)
    add_backend_flags(parser)
    parser.add_argument(
        "--state-in",
        metavar="FILE",
        help="go on from this state, with or without a prompt; or begin with a tuned one: a .pth, .safetensors or .st "
        "with time_state",
    )
    parser.add_argument("--state-out", metavar="FILE", help="save the state at the end")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    sampling_options(args)
    if args.tokens is not None and args.stop:
        raise UsageError("--stop needs text, and --tokens gives none")
    prompt = _prompt_argument(args)
    if args.state_out is not None:
        check_state_output(args.state_out)
    with open_engine(args) as engine:
        session = engine.session()
        if args.state_in is not None:
            _take_state(session, args.state_in, console)
        tokens = _prompt_tokens(engine, session, prompt, args)
        options = sampling_options(args, engine.decoding)
        if args.max_tokens > 0:
            console.note(f"sampling: {readable_sampling(options)} (flags change it)")

        def generate(last: Sequence[int]) -> Iterator[str]:
            if args.tokens is None and engine.tokenizer is not None:
                return engine.generate(last, max_tokens=args.max_tokens, session=session, options=options)
            return _as_ids(engine.generate_tokens(last, max_tokens=args.max_tokens, session=session, options=options))

        with Interruption(endings=args.state_out is not None) as interruption:
            try:
                _write(console, session, tokens, generate, interruption)
            except (BrokenPipeError, SystemExit):  # nobody reads any more, or it is to end in the middle of a write
                _save(session, args.state_out)
                raise
            _save(session, args.state_out)
        if interruption.requested:
            raise KeyboardInterrupt("" if args.state_out is None else f"the state so far is in {args.state_out}")
    return 0


def _take_state(session: Session, path: str, console: Console) -> None:
    """Load a state file, or a tuned initial state: a pickle, a zip archive of torch's or a safetensors file."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:  # `load` says what is wrong
        head = b""
    is_tuned = head.startswith((b"PK\x03\x04", b"\x80")) or head[8:] == b"{"
    if not is_tuned:
        session.load(path)
        return
    need_export_packages()
    from ..export.tuned_state import read_tuned_state

    session.reset(read_tuned_state(path, session.engine.spec, note=console.note))


def _prompt_argument(args: argparse.Namespace) -> str | list[int] | None:
    if args.words is not None and (args.prompt is not None or args.tokens is not None):
        raise UsageError("PROMPT: not allowed with -p or --tokens")
    if args.tokens is not None:
        try:
            return [int(word) for word in args.tokens.replace(",", " ").split()]
        except ValueError as error:
            raise UsageError(f'--tokens: expected token ids as in "1,2,3", found {args.tokens!r}') from error
    flag, given = ("PROMPT", args.words) if args.prompt is None else ("-p", args.prompt)
    if given is not None:
        if not given:
            raise UsageError(
                f"{flag}: the prompt is empty; leave it out to "
                + ("go on from the state" if args.state_in is not None else "begin a new document")
            )
        return text_argument(flag, given)
    if sys.stdin is None or sys.stdin.isatty():
        return None
    text = read_text(read_bounded(sys.stdin.buffer, MAX_PROMPT_BYTES, place="the piped prompt"), "the piped prompt")
    return text.removesuffix("\n").removesuffix("\r") or None


def _prompt_tokens(
    engine: Engine, session: Session, prompt: str | list[int] | None, args: argparse.Namespace
) -> list[int]:
    """What is fed first; nothing where the state itself says what comes next."""
    if isinstance(prompt, list):
        return [int(token) for token in engine.check_tokens(prompt)]
    if prompt is None and session.logits is not None:
        return []
    if engine.tokenizer is None:
        raise TokenizerError(
            "this engine takes and gives token ids only",
            file=engine.file.path,
            remedy='use --tokens "1,2,3", or export it again with --tokenizer',
        )
    if prompt is not None:
        return engine.encode(prompt)
    if session.tokens_seen > 0:
        raise UsageError(f"a prompt is needed with {args.state_in}; {STATE_NEEDS_WORDS}")
    if engine.tokenizer.end_token is None:
        raise UsageError("a prompt is needed: this engine's tokenizer has no token to begin a document with")
    return [engine.tokenizer.end_token]


def _write(
    console: Console,
    session: Session,
    tokens: Sequence[int],
    generate: Callable[[Sequence[int]], Iterator[str]],
    interruption: Interruption,
) -> None:
    start_s = time.perf_counter()
    with console.progress() as progress:
        if len(tokens) > 1 and feed_in_pieces(session, tokens[:-1], interruption, progress) is None:
            return
    seen = session.tokens_seen + min(1, len(tokens))
    middle_s = time.perf_counter()
    last = "\n"
    for piece in generate(tokens[-1:]):
        with interruption.at_once():
            console.write(piece)
        last = piece
        if interruption.requested:
            break
    end_s = time.perf_counter()
    if not last.endswith("\n"):
        console.write("\n")
    written = session.tokens_seen - seen
    if written > 0:
        console.note(
            f"{written} tokens in {end_s - middle_s:.2f} s ({written / (end_s - middle_s):.1f} tokens/s), "
            f"after {len(tokens)} of prompt in {middle_s - start_s:.2f} s"
        )


def _as_ids(tokens: Iterator[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f",{token}" if index else str(token)


def _save(session: Session, path: str | None) -> None:
    if path is not None:
        session.save(path)
