"""Turns from whoever is at the keyboard: lines that can be edited, with a history; pasted lines come as one turn."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from types import ModuleType

from ..errors import InputError

MAX_LINE_CHARACTERS = 1 << 20
_HISTORY_LINES = 1000
_HISTORY_CHARACTERS = 10_000  # of one entry
# A terminal hands over no more of a line where the program does not edit lines itself; what follows is lost.
_TERMINAL_LINE_BYTES = 4095


class Keyboard:
    """Where turns come from: a terminal, edited by GNU readline where Python has it, or a pipe, a line a turn.

    Attributes:
        asks: somebody sits at a terminal.
        shows: what is written to stdout is seen there too, so that labels belong between the turns.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        self.asks = sys.stdin is not None and sys.stdin.isatty()
        self.shows = self.asks and sys.stdout is not None and sys.stdout.isatty()
        self._readline = _line_editor() if self.shows else None
        self._history = _history_file() if self._readline is not None else None
        self._added = 0
        if self._readline is not None and self._history is not None:
            with contextlib.suppress(OSError):
                self._readline.read_history_file(self._history)

    def turn(self, prompt: str) -> str | None:
        """The next turn, which may have several lines where it was pasted; None at the end of the input.

        Raises:
            InputError: the line is too long, or the terminal has cut it; it was read and is lost.
            KeyboardInterrupt: Ctrl-C.
        """
        if self._readline is not None:
            return self._edited(prompt)
        if sys.stdin is None:
            return None
        if self.asks:
            print(prompt, end="", file=sys.stdout if self.shows else sys.stderr, flush=True)
        line = sys.stdin.readline(MAX_LINE_CHARACTERS + 1)
        if len(line) > MAX_LINE_CHARACTERS:
            while line and not line.endswith("\n"):
                line = sys.stdin.readline(MAX_LINE_CHARACTERS)
            raise InputError("is too long", place="this line", expected=f"at most {MAX_LINE_CHARACTERS} characters")
        if self.asks and len(line.rstrip("\n").encode("utf-8", "replace")) >= _TERMINAL_LINE_BYTES:
            raise InputError(
                "was cut by the terminal and is not used",
                place="this line",
                expected=f"fewer than {_TERMINAL_LINE_BYTES} bytes where lines cannot be edited",
                remedy="give it in shorter lines, or let stdout be a terminal too",
            )
        return line or None

    def close(self) -> None:
        """Add what was typed to the history on disk."""
        if self._readline is None or self._history is None or not self._added:
            return
        with contextlib.suppress(OSError):
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.set_history_length(_HISTORY_LINES)
            self._readline.append_history_file(self._added, str(self._history))

    def _edited(self, prompt: str) -> str | None:
        assert self._readline is not None
        before = self._readline.get_current_history_length()
        try:
            line = input(prompt)
        except EOFError:
            print(flush=True)
            return None
        # An empty line and one that repeats the last are not entered.
        if self._readline.get_current_history_length() > before:
            if len(line) > _HISTORY_CHARACTERS:
                self._readline.remove_history_item(before)
            else:
                self._added += 1
        return line


def _line_editor() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    # Several lines that are pasted arrive as one, to be sent with Enter. (libedit does not know the setting.)
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    # Tab writes a tab: there are no names to complete.
    readline.parse_and_bind("tab: self-insert")
    return readline


def _history_file() -> Path | None:
    """Where the XDG base directories put it; None where no folder can be made."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
        folder = base / "goslet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder / "chat_history"
