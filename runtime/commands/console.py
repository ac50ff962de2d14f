"""How commands talk to the terminal: notes, progress, JSON, and Ctrl-C that stops between two tokens."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_REDRAW_S = 0.1


class Progress:
    """A counter on one line of stderr; silent where stderr is not a terminal.

    Use it as a context, and call it with what is done and the total; leaving the context clears the line.
    """

    def __init__(self, label: str, enabled: bool) -> None:
        self._label = label
        self._enabled = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._drawn_s = 0.0
        self._width = 0

    def __call__(self, done: int, total: int, label: str | None = None) -> None:
        """Show `done` of `total`, at most ten times a second."""
        now_s = time.monotonic()
        changed = label is not None and label != self._label
        if not self._enabled or (now_s - self._drawn_s < _REDRAW_S and not changed):
            return
        self._drawn_s = now_s
        self._label = label or self._label
        share = f"{100 * done // total:3d}%" if total else ""
        self._draw(f"{share} {self._label} ({done:,} of {total:,})")

    def _draw(self, text: str) -> None:
        text = text[: max(0, shutil.get_terminal_size().columns - 1)]
        sys.stderr.write("\r" + text.ljust(self._width) + ("\r" if not text else ""))
        sys.stderr.flush()
        self._width = len(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._width:
            self._draw("")


class Interruption:
    """Turns the first Ctrl-C within its context into `requested`; the second one raises KeyboardInterrupt.

    So a generation ends between two tokens, with a state that holds exactly what was fed.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers, and only there does Ctrl-C arrive.
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Console:
    """Where a command writes: results and text to stdout, notes and progress to stderr unless quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def write(self, text: str) -> None:
        """Write a piece of text to stdout at once, as it is."""
        print(text, end="", flush=True)

    def line(self, text: str = "") -> None:
        """Write a line of results to stdout."""
        print(text)

    def json(self, value: dict[str, Any]) -> None:
        """Write one JSON object to stdout; ASCII only, so that any locale can show it."""
        print(json.dumps(value, indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Write a line about the work to stderr, unless quiet."""
        if not self.quiet:
            print(f"goslet: {text}", file=sys.stderr, flush=True)

    def progress(self, label: str) -> Progress:
        """A counter on stderr, unless quiet."""
        return Progress(label, enabled=not self.quiet)


def readable_size(size_bytes: float) -> str:
    """A size for people: ``"640 bytes"``, ``"1.5 MB"`` (decimal units)."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size_bytes /= 1000
        if size_bytes < 999.5:
            break
    return f"{size_bytes:.3g} {unit}"
