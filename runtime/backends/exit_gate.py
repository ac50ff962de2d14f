"""Calls into other people's extensions, which the end of the interpreter waits for.

Where the interpreter ends, Python up to 3.13 ends a daemon thread that comes back from a call by unwinding its stack,
and C++ that was called as these extensions are aborts the process over that. So no such call is under way by then.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading

# By thread, held during its calls. Identifiers are given again, so there are as many as threads were at once.
# Within a call a signal handler may make another one, of another engine.
_locks: dict[int, contextlib.AbstractContextManager[bool]] = {}
_ending = False


def before_exit() -> contextlib.AbstractContextManager[bool]:
    """A lock of this thread's own, to be held by ``with`` during a call; once the interpreter ends it is never given.

    Like all locks here it is taken by ``with`` itself: Ctrl-C then cannot leak it.
    """
    lock = _locks.setdefault(threading.get_ident(), threading.RLock())
    # After it was entered: either the end sees the lock, or this sees the end.
    if _ending and threading.current_thread() is not threading.main_thread():
        threading.Event().wait()
    return lock


@atexit.register
def _wait() -> None:
    """Take all of the locks for good, but that of the thread which ends the interpreter and may have calls to make."""
    global _ending
    _ending = True
    own = threading.get_ident()
    for ident, lock in list(_locks.items()):
        if ident != own:
            lock.__enter__()


if hasattr(os, "register_at_fork"):
    # The other threads are not in the child, and their locks may stay held.
    os.register_at_fork(after_in_child=_locks.clear)
