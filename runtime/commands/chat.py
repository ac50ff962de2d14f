"""Talk with a model, turn by turn.

Every line is a turn, and so are several lines that are pasted together; the model answers until it would begin the
user's next turn. Ctrl-C stops an answer, Ctrl-D leaves. /help shows the commands: /undo, /retry, /save FILE and others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chat import ChatTemplate, chat_template
from ..errors import GosletError, InputError, TokenizerError
from ..reading import check_unicode
from ..sampling import MAX_SEED, SamplingOptions, StopMatcher
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
from .keyboard import Keyboard
from .text import feed_in_pieces, text_argument

NAME = "chat"
SUMMARY = "talk with a model, turn by turn"

# What a person sees at the keyboard, whatever the model reads.
USER, ASSISTANT = "User:", "Assistant:"
HELP = """\
/undo           take the last turn back
/retry          let the last turn be answered anew
/reset          forget the conversation
/system [TEXT]  begin anew with these instructions, or none
/mode [NAME]    answer in this mode, or show which there are
/output TEXT    give a called tool's output
/save FILE      save the conversation as a state, replacing one
/load FILE      go on from a saved state
/help           show this
/quit           leave (or Ctrl-D); Ctrl-C stops an answer"""

# States before turns that are kept to go back to: so many, in so many bytes.
_MAX_BACK = 32
_MAX_BACK_BYTES = 256 << 20
_MAX_TOOLS_BYTES = 1 << 20
_COMMAND = re.compile(r"(/[a-z]*)(?:\s+(.*))?", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=whole_number(1),
        default=1024,
        metavar="N",
        help="at most N tokens an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--mode", metavar="M", help="how it answers: a mode of the template, such as think (goslet inspect shows them)"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions that every conversation begins with")
    parser.add_argument(
        "--tools", metavar="FILE", help="tools that it may call: a JSON list of signatures, or of objects as OpenAI's"
    )
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
    tools = () if args.tools is None else _read_tools(args.tools)
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
        # Tools or a mode that are not there, before the first line.
        template.instructions("", tools)
        mode = template.usual_mode(tools) if args.mode is None else args.mode

        def options(mode: str) -> SamplingOptions:
            return sampling_options(args, template.decoding(mode), *filter(None, [template.stop]))

        console.note(f"sampling: {readable_sampling(options(mode))} (flags change it)")
        talk = _Chat(engine, engine.tokenizer, console, options, template, args.max_tokens, mode, system, tools)
        talk.loop()
    return 0


def _read_tools(path: str) -> Sequence[Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TOOLS_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, expected="a JSON list of tools") from None
    if len(data) > _MAX_TOOLS_BYTES:
        raise InputError("is too long for a list of tools", file=path, expected=f"at most {_MAX_TOOLS_BYTES} bytes")
    try:
        tools = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", file=path) from None
    if not isinstance(tools, list) or not tools:
        raise InputError("holds no tools", file=path, expected="a JSON list of signatures or objects")
    check_unicode(tools, path, "tools")
    return tools


@dataclass(frozen=True)
class _Before:
    """What to go back to: the state before a turn, what the user then said, and the instructions of that time."""

    session: Session
    said: str | None
    system: str | None


class _Chat:
    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        console: Console,
        options: Callable[[str], SamplingOptions],
        template: ChatTemplate,
        max_tokens: int,
        mode: str,
        system: str | None = None,
        tools: Sequence[Any] = (),
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._console = console
        self._choose_options = options
        self._options = options(mode)
        self._template = template
        self._max_tokens = max_tokens
        self._mode = mode
        self._system = system
        self._tools = tools
        self._session: Session = engine.session()
        kept = max(1, min(_MAX_BACK, _MAX_BACK_BYTES // self._session.state_size_bytes))
        self._back: deque[_Before] = deque(maxlen=kept)
        self._retries = 0
        self._keyboard = Keyboard()

    def loop(self) -> None:
        """Take turns until there are no more."""
        if self._keyboard.asks:
            self._console.note("Ctrl-D leaves, /help shows more")
        try:
            while self._turn():
                pass
        finally:
            self._keyboard.close()

    def _turn(self) -> bool:
        """Take one turn, or run one command; False at the end."""
        try:
            said = self._keyboard.turn(f"{USER} ")
            if said is None:
                return False
            said = said.strip()
            if command := _COMMAND.fullmatch(said):
                return self._command(command[1], (command[2] or "").strip())
            if said:
                self._reply(said)
        except GosletError as error:
            # A bad file or line ends neither the conversation nor what it has come to.
            print(f"goslet: error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not self._keyboard.asks:
                raise
            self._console.write("\n" if self._keyboard.shows else "")
            self._console.note("Ctrl-D or /quit leaves")
        return True

    def _command(self, name: str, argument: str) -> bool:
        """Run a line that begins with "/"; False when it ends the conversation."""
        if name == "/quit":
            return False
        if name == "/undo" and not argument:
            self._undo()
        elif name == "/retry" and not argument:
            self._retry()
        elif name == "/reset" and not argument:
            self._begin_anew(self._system)
            self._console.note("the conversation is forgotten; /undo takes this back")
        elif name == "/system":
            self._begin_anew(argument or None)
            self._console.note("a new conversation, " + ("with these instructions" if argument else "no instructions"))
        elif name == "/mode":
            self._change_mode(argument)
        elif name == "/output" and argument:
            self._reply(self._template.function_output(argument))
        elif name == "/save" and argument:
            check_state_output(argument)
            self._session.save(argument)
            self._console.note(f"saved to {argument}")
        elif name == "/load" and argument:
            loaded = self._session.fork()
            loaded.load(argument)
            self._keep(None)
            self._session = loaded
            self._console.note(f"going on from {argument}, {self._session.tokens_seen} tokens in")
        else:
            if name != "/help":
                needs = {"/save": "needs a FILE", "/load": "needs a FILE", "/output": "needs a TEXT"}.get(name)
                problem = needs if needs and not argument else "is no command as it stands"
                print(f"goslet: {name} {problem}", file=sys.stderr, flush=True)
            print(HELP, file=sys.stderr, flush=True)
        return True

    def _keep(self, said: str | None) -> None:
        """Remember where the conversation is, to come back to."""
        self._back.append(_Before(self._session.fork(), said, self._system))
        self._retries = 0

    def _begin_anew(self, system: str | None) -> None:
        self._keep(None)
        self._session.reset()
        self._system = system

    def _undo(self) -> None:
        if not self._back:
            self._console.note("there is nothing to undo")
            return
        self._go_back()
        self._console.note(f"taken back, {self._session.tokens_seen} tokens in")

    def _go_back(self) -> _Before:
        last = self._back.pop()
        self._session, self._system = last.session, last.system
        return last

    def _retry(self) -> None:
        if not self._back or self._back[-1].said is None:
            self._console.note("there is no turn to answer anew")
            return
        said, retries = self._go_back().said, self._retries + 1
        assert said is not None
        self._reply(said, retries)

    def _change_mode(self, name: str) -> None:
        if name:
            self._options = self._choose_options(name)
            self._mode = name
            self._console.note(f"sampling: {readable_sampling(self._options)}")
        self._console.note(f"mode {self._mode}, of {', '.join(self._template.modes)}")

    def _reply(self, said: str, retries: int = 0) -> None:
        """One turn. Afterwards the state holds it exactly as shown, with the empty line after it, or none of it."""
        self._keep(said)
        self._retries = retries
        if self._keyboard.shows:
            self._console.write(f"{ASSISTANT} ")
        try:
            with Interruption() as interruption:
                prompt = self._tokenizer.encode(self._opening() + self._template.prompt(said, self._mode))
                logits = feed_in_pieces(self._session, prompt, interruption)
                if logits is None:
                    self._go_back()
                else:
                    self._answer(logits, interruption)
        except GosletError:
            self._go_back()
            self._console.note("this turn is not remembered")
            raise
        finally:
            self._console.write("\n")

    def _opening(self) -> str:
        """What comes before a conversation's first turn."""
        if (self._system is None and not self._tools) or self._session.tokens_seen > 0:
            return ""
        return self._template.instructions(self._system or "", self._tools)

    def _answer(self, logits: NDArray[np.float32], interruption: Interruption) -> None:
        options = self._options
        if options.seed is not None and self._retries:
            options = replace(options, seed=(options.seed + self._retries) & MAX_SEED)  # the same would be drawn again
        sampler = self._engine.sampler(options)
        matcher, decoder = StopMatcher(options.stop), self._tokenizer.stream()
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
