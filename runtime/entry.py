"""Where the command ``goslet`` begins: with little to load, so that Ctrl-C never ends in a traceback."""

import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> int:
    """Run the process's command line and return its exit code."""
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    try:
        handler = signal.getsignal(signal.SIGINT)
        # An exception within an import may leave a module half made, or come out as another one. Ctrl-C stays ignored
        # where whoever started this process has it so.
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, note)
        from .cli import main as run

        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
        if not interrupted:
            return run()
    except KeyboardInterrupt:
        pass
    print("goslet: interrupted", file=sys.stderr)
    return INTERRUPTED
