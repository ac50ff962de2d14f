"""Ctrl-C at every place where it could fall, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any


def interrupted_at(place: int, call: Callable[[], object], *modules: ModuleType) -> bool:
    """Run a call with KeyboardInterrupt raised before the instruction number `place` that it executes in `modules`.

    Returns:
        Whether there was such an instruction; otherwise the call ended normally.
    """
    files = {str(Path(module.__file__ or "")) for module in modules}
    executed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal executed
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            executed += 1
            if executed > place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
