"""Talk with a model, line by line.

Every line is a turn; the model answers until it would begin the user's next turn. Ctrl-C stops a reply, Ctrl-D
leaves. Lines that begin with "/" are commands: /reset, /save FILE, /load FILE, /help, /quit.
"""

from __future__ import annotations

import argparse
import io
import sys

import numpy as np
from numpy.typing import NDArray

from ..chat import ChatTemplate, chat_template
from ..errors import GosletError, InputError, TokenizerError
from ..sampling import SamplingOptions, StopMatcher
from ..session import Engine, Session
from ..tokenizer import Tokenizer
from .console import Console, Interruption
from .flags import (
    add_backend_flags,
    add_sampling_flags,
    check_state_output,
    open_engine,
    readable_sampling,
    sampling_options,
    whole_number,
)
from .text import feed_in_pieces, text_argument

NAME = "chat"
SUMMARY = "talk with a model, line by line"

# What a person sees at the keyboard, whatever the model reads.
USER, ASSISTANT = "User:", "Assistant:"
HELP = """\
/reset      forget the conversation
/save FILE  save it as a state, replacing one that is there
/load FILE  go on from a saved state
/help       show this
/quit       leave (or Ctrl-D); Ctrl-C stops a reply"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=whole_number(1),
        default=1024,
        metavar="N",
        help="at most N tokens a reply (default: %(default)s)",
    )
    parser.add_argument(
        "--mode", metavar="M", help="how it answers: a mode of the template, such as think (goslet inspect shows them)"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions that every conversation begins with")
    parser.add_argument(
        "--chat-template", metavar="T", help="world, g1, g1-2025 or a JSON file (default: the engine's own)"
    )
    add_sampling_flags(parser)
    add_backend_flags(parser)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    sampling_options(args)
    system = None if args.system is None else text_argument("--system", args.system)
    chosen = None if args.chat_template is None else chat_template(args.chat_template)
    with open_engine(args) as engine:
        if engine.tokenizer is None:
            raise TokenizerError(
                "this engine takes and gives token ids only, so it cannot chat",
                file=engine.file.path,
                remedy="export it again with --tokenizer",
            )
        template = engine.chat_template if chosen is None else chosen
        if template is None:
            raise InputError(
                "this engine has no chat template", file=args.engine, remedy="give one: --chat-template world"
            )
        template.opening(args.mode)  # a mode that is not there, before the first line
        usual = template.decoding(args.mode)
        options = sampling_options(args, usual, *filter(None, [template.stop]))
        console.note(f"sampling: {readable_sampling(options)} (flags change it)")
        talk = _Chat(engine, engine.tokenizer, console, options, template, args.max_tokens, args.mode, system)
        talk.loop()
    return 0


class _Chat:
    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        console: Console,
        options: SamplingOptions,
        template: ChatTemplate,
        max_tokens: int,
        mode: str | None = None,
        system: str | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._console = console
        self._options = options
        self._template = template
        self._max_tokens = max_tokens
        self._mode = mode
        self._system = system
        self._session: Session = engine.session()
        self._asks = sys.stdin is not None and sys.stdin.isatty()

    def loop(self) -> None:
        """Take lines until there are no more."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self._asks:
            self._console.note("Ctrl-D leaves, /help shows more")
        while (line := self._next_line()) is not None:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if not self._command(*line.partition(" ")[::2]):
                        return
                elif line:
                    self._reply(line)
            except GosletError as error:
                # A bad file or line ends neither the conversation nor what it has come to.
                print(f"goslet: error: {error}", file=sys.stderr, flush=True)

    def _next_line(self) -> str | None:
        while True:
            try:
                if self._asks:
                    return input(f"{USER} ")
                return sys.stdin.readline() or None if sys.stdin is not None else None
            except EOFError:
                self._console.write("\n")
                return None
            except KeyboardInterrupt:
                if not self._asks:
                    raise
                self._console.write("\n")
                self._console.note("Ctrl-D or /quit leaves")

    def _command(self, name: str, argument: str) -> bool:
        """Run a line that begins with "/"; False when it ends the conversation."""
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/reset" and not argument:
            self._session.reset()
            self._console.note("the conversation is forgotten")
        elif name == "/save" and argument:
            check_state_output(argument)
            self._session.save(argument)
            self._console.note(f"saved to {argument}")
        elif name == "/load" and argument:
            self._session.load(argument)
            self._console.note(f"going on from {argument}, {self._session.tokens_seen} tokens in")
        else:
            if name != "/help":
                problem = "needs a FILE" if name in ("/save", "/load") else "is no command as it stands"
                print(f"goslet: {name} {problem}", file=sys.stderr, flush=True)
            print(HELP, file=sys.stderr, flush=True)
        return True

    def _reply(self, text: str) -> None:
        """One turn. Afterwards the state holds it exactly as shown, with the empty line after it, or none of it."""
        before = self._session.fork()
        if self._asks:
            self._console.write(f"{ASSISTANT} ")
        try:
            with Interruption() as interruption:
                prompt = self._tokenizer.encode(self._opening() + self._template.prompt(text, self._mode))
                logits = feed_in_pieces(self._session, prompt, interruption)
                if logits is None:
                    self._session = before
                else:
                    self._answer(logits, interruption)
        except GosletError:
            self._session = before
            raise
        finally:
            self._console.write("\n")

    def _opening(self) -> str:
        """What comes before a conversation's first turn."""
        if self._system is None or self._session.tokens_seen > 0:
            return ""
        return self._template.instructions(self._system)

    def _answer(self, logits: NDArray[np.float32], interruption: Interruption) -> None:
        sampler = self._engine.sampler(self._options)
        matcher, decoder = StopMatcher(self._options.stop), self._tokenizer.stream()
        reply = self._show("", self._template.opening(self._mode))
        # The state before the token that began what may become a stop text, and the text since then.
        mark, since = self._session, ""
        for _ in range(self._max_tokens):
            if interruption.requested:
                break
            token = sampler.sample(logits)
            if token == self._tokenizer.end_token:
                break
            piece = decoder.push(token)
            since = since + piece if matcher.held else piece
            was_holding = bool(matcher.held)
            reply = self._show(reply, matcher.feed(piece))
            if not was_holding:
                mark = self._session.fork() if matcher.held else self._session
            if matcher.matched is not None:
                break
            sampler.observe(token)
            logits = self._session.feed([token])
        if matcher.matched is None:
            self._show(reply, matcher.feed(decoder.finish()) + matcher.flush())
            since = ""
        else:
            self._session = mark
            since = since.partition(matcher.matched)[0]
        # A template whose turns have no end leaves nothing to read here.
        if rest := self._tokenizer.encode(since + self._template.end):
            self._session.feed(rest)

    def _show(self, reply: str, piece: str) -> str:
        """Write the next piece of a reply, without the space that it begins with, and return the longer reply."""
        if not reply:
            piece = piece.lstrip()
        self._console.write(piece)
        return reply + piece
