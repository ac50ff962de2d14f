"""How commands talk to the terminal: notes, progress, JSON, and Ctrl-C that stops between two tokens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# What tells a process to end, by its owner and by the terminal that goes away.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

_REDRAW_S = 0.1
_LINE_S = 30.0  # between lines where there is no terminal to redraw one on


class Progress:
    """A counter on one line of stderr; where that is no terminal but a file, a line every half a minute.

    Use it as a context, and call it with the stage, what is done and the total; leaving the context clears the line.
    """

    def __init__(self, enabled: bool) -> None:
        self._stage = ""
        self._enabled = enabled and sys.stderr is not None and not sys.stderr.closed
        self._redraws = self._enabled and sys.stderr.isatty()
        self._interval_s = _REDRAW_S if self._redraws else _LINE_S
        self._drawn_s = time.monotonic()
        self._width = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` of a stage, at most ten times a second on a terminal."""
        now_s = time.monotonic()
        is_new = self._redraws and stage != self._stage
        if not self._enabled or (now_s - self._drawn_s < self._interval_s and not is_new):
            return
        self._drawn_s, self._stage = now_s, stage
        text = f"{stage} {100 * done // max(1, total):3d}% ({done:,} of {total:,})"
        if self._redraws:
            self._draw(text)
            return
        try:
            print(f"goslet: {text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads any more, the disk is full, or it is closed: the work goes on
            self._enabled = False

    def _draw(self, text: str) -> None:
        text = text[: max(0, shutil.get_terminal_size().columns - 1)]
        sys.stderr.write("\r" + text.ljust(self._width) + ("\r" if not text else ""))
        sys.stderr.flush()
        self._width = len(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._width:
            self._draw("")


class Interruption:
    """Turns the first Ctrl-C within its context into `requested`; the second one raises KeyboardInterrupt.

    So a generation ends between two tokens, with a state that holds exactly what was fed.

    Args:
        endings: whether a signal that tells the process to end is noted as well, where the command line handles it, and
            handled when the context is left.
    """

    def __init__(self, endings: bool = False) -> None:
        self._notes_endings = endings
        self.requested = False
        self._endings: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._ending: int | None = None
        self._waits = False

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers, and who started this process may have it ignore Ctrl-C.
        self._before = signal.getsignal(signal.SIGINT)
        self._active = threading.current_thread() is threading.main_thread() and callable(self._before)
        if self._active:
            signal.signal(signal.SIGINT, self._note)
        if self._notes_endings and threading.current_thread() is threading.main_thread():
            for name in ENDINGS:
                if callable(handler := signal.getsignal(name)):
                    self._endings[name] = handler
                    signal.signal(name, self._note_ending)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)
        for number, handler in self._endings.items():
            signal.signal(number, handler)
        if self._ending is not None:
            self._endings[self._ending](self._ending, None)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal that tells the process to end is handled at once within: what is done may wait for ever."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _note_ending(self, number: int, frame: FrameType | None) -> None:
        if self._waits or self._ending is not None:
            self._ending = None
            self._endings[number](number, frame)
            return
        self._ending = number
        self.requested = True

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
        """Write one JSON object to stdout; ASCII only, so that any locale can show it; NaN and infinity are null."""
        print(json.dumps(_finite(value), indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Write a line about the work to stderr, unless quiet."""
        if not self.quiet:
            print(f"goslet: {text}", file=sys.stderr, flush=True)

    def progress(self) -> Progress:
        """A counter on stderr, unless quiet."""
        return Progress(enabled=not self.quiet)


def readable_size(size_bytes: float) -> str:
    """A size for people: ``"640 bytes"``, ``"1.5 MB"`` (decimal units)."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    power = next((power for power in (1, 2) if size_bytes < 999.5 * 1000**power), 3)
    return f"{size_bytes / 1000**power:.3g} {('kB', 'MB', 'GB')[power - 1]}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_command(engine: str | os.PathLike[str]) -> str:
    """``goslet run ENGINE`` as it can be typed in this shell, also where goslet is not on its path."""
    called_as = sys.argv[0]
    is_ours = os.path.basename(called_as) == "goslet"
    program = called_as if is_ours and shutil.which("goslet") is None else "goslet"
    return shlex.join([program, "run", os.fspath(engine)])
