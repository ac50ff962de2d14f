"""The interpreter ends while other threads are at work: quietly, and with the exit code that the program gave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A thread that is unwound where C++ called Python aborts nine of ten such processes.
PROGRAM = """
import sys, threading, time
import goslet

path, backend, threads, work, daemon, ending, wait_s = sys.argv[1:]
engine = goslet.open(path, backend=backend, threads=int(threads))
started = threading.Event()

def worker():
    sessions = [engine.session() for _ in range(3)]
    kinds = {
        "feed": lambda: sessions[0].feed([1] * 200),
        "step_batch": lambda: engine.step_batch(sessions, [1, 2, 3]),
        "generate": lambda: [started.set() for _ in engine.generate("a", max_tokens=100)],
        "state": lambda: (sessions[0].reset(), sessions[0].fork()),
        "open": lambda: goslet.open(path, backend=backend, threads=int(threads)).close(),
    }
    for _ in range(10**9 if daemon == "daemon" else 3):
        kinds[work]()
        started.set()

threading.Thread(target=worker, daemon=daemon == "daemon").start()
started.wait()
time.sleep(float(wait_s))
if ending == "exit":
    sys.exit(7)
if ending == "error":
    raise RuntimeError("the program's own")
"""


def ended(
    path: Path, backend: str, threads: int, work: str, *, daemon: str = "daemon", ending: str = "end", wait_s: float = 0
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM, path, backend, threads, work, daemon, ending, wait_s]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("work", ["feed", "step_batch", "generate", "state", "open"])
@pytest.mark.parametrize(("backend", "threads"), [("native", 1), ("native", 2), ("ort", 2)])
def test_main_ends_while_a_daemon_works(tiny_engine: Path, backend: str, threads: int, work: str) -> None:
    done = ended(tiny_engine, backend, threads, work, wait_s=0.004 * threads)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("daemon", ["daemon", "not a daemon"])
@pytest.mark.parametrize("backend", ["native", "ort"])
def test_the_exit_code_is_the_programs(tiny_engine: Path, backend: str, daemon: str) -> None:
    done = ended(tiny_engine, backend, 2, "feed", daemon=daemon, ending="exit")
    assert (done.returncode, done.stderr) == (7, "")
    done = ended(tiny_engine, backend, 2, "feed", daemon=daemon, ending="error")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: the program's own\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_ends_though_its_parents_thread_was_within_a_call() -> None:
    program = """
import os, sys, threading, time
from goslet.backends.exit_gate import before_exit

def hold():
    with before_exit():
        time.sleep(1)

threading.Thread(target=hold).start()
time.sleep(0.05)
child = os.fork()
if child:
    # Within the second that the parent's own thread takes.
    time.sleep(0.5)
    ended, status = os.waitpid(child, os.WNOHANG)
    sys.exit(0 if ended == child and status == 0 else 1)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_first_call_after_the_end_has_begun_never_begins() -> None:
    """A thread that has no lock yet when the end takes those that there are; the thread that ends may still call."""
    program = """
import atexit, threading, time

ended = threading.Event()

def late():
    ended.wait()
    with before_exit():
        print("late", flush=True)

def after_the_gate():
    ended.set()
    time.sleep(0.5)
    with before_exit():
        print("main", flush=True)

# Registered before the gate's own, it runs after that.
atexit.register(after_the_gate)
from goslet.backends.exit_gate import before_exit

threading.Thread(target=late, daemon=True).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "main\n", "")
