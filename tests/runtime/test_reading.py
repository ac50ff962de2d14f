"""Files and pipes without an end are refused with a message, and what ends the process early ends it quietly."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import goslet
from goslet import chat, reading
from goslet.commands import evaluate
from goslet.commands import run as run_module
from goslet.errors import InputError, TruncatedError
from goslet.export import calibration_text
from goslet.reading import read_bounded, read_file
from goslet.tokenizer import BytesTokenizer

from .command_line import Run

BOUND = 5000


class Endless(io.RawIOBase):
    """A pipe whose other end never stops."""

    given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        buffer[:] = b"y\n" * (len(buffer) // 2) + b"y" * (len(buffer) % 2)
        self.given += len(buffer)
        return len(buffer)


def test_what_is_read_is_bounded() -> None:
    assert read_bounded(io.BytesIO(b"x" * BOUND), BOUND) == b"x" * BOUND
    assert read_bounded(io.BytesIO(b""), BOUND) == b""
    with pytest.raises(
        InputError, match=r"the pipe: goes on for longer than goslet reads .expected at most 5000 bytes"
    ):
        read_bounded(io.BytesIO(b"x" * (BOUND + 1)), BOUND, place="the pipe")
    endless = Endless()
    with pytest.raises(InputError, match="look whether it has an end"):
        read_bounded(io.BufferedReader(endless), BOUND)
    assert endless.given < 10 * BOUND + io.DEFAULT_BUFFER_SIZE


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="/dev/zero: goes on for longer"):
        read_file("/dev/zero", BOUND)


@pytest.fixture
def endless_pipe(tmp_path: Path) -> Path:
    """A pipe into which somebody writes until nobody reads any more."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        try:
            with open(path, "wb") as file:
                while True:
                    file.write(b'{"a": 1}, ' * 1000)
        except BrokenPipeError:
            pass

    threading.Thread(target=write, daemon=True).start()
    return path


def test_a_prompt_without_an_end(run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_PROMPT_BYTES", BOUND)
    done = run("run", tiny_engine, stdin=b"y\n" * BOUND)
    assert (done.code, done.out) == (1, "")
    assert "the piped prompt: goes on for longer than goslet reads (expected at most 5000 bytes)" in done.err


def test_a_chat_template_without_an_end(run: Run, tiny_engine: Path, endless_pipe: Path) -> None:
    done = run("chat", tiny_engine, "--chat-template", endless_pipe)
    assert done.code == 1
    assert f"{endless_pipe}: goes on for longer than goslet reads (expected at most 1048576 bytes)" in done.err
    assert chat.MAX_SETTINGS_BYTES == reading.MAX_SETTINGS_BYTES == 1048576


def test_texts_without_an_end(run: Run, tiny_engine: Path, endless_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MAX_TEXT_BYTES", BOUND)
    done = run("eval", tiny_engine, "--text", endless_pipe)
    assert done.code == 1
    assert f"{endless_pipe}: goes on for longer" in done.err
    monkeypatch.setattr(calibration_text, "MAX_TEXT_BYTES", BOUND)
    with pytest.raises(InputError, match="/dev/zero: goes on for longer"):
        calibration_text.calibration_tokens("/dev/zero", BytesTokenizer(), 1024)


# ----------------------------------------------------------------------------------------------- signals at bad moments

# Ctrl-C as the named module is looked for: at the very beginning, within numpy, within the package, at the end.
EARLY = """
import os, signal, sys, time
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
sys.meta_path.insert(0, Interrupts())
from goslet.entry import main
when, sys.argv[1:] = sys.argv[1], ["--version"]
sys.argv.insert(1, when)
del sys.argv[1]
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["goslet.cli", "numpy", "goslet.session", "goslet._native", "goslet.commands.sketch"]
)
def test_an_early_interruption_is_no_traceback(module: str) -> None:
    program = EARLY.replace("sys.argv[1]:\n", f"{module!r}:\n", 1)
    done = subprocess.run([sys.executable, "-c", program, "x"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "goslet: interrupted\n")


def test_the_command_begins_where_little_is_loaded() -> None:
    code = (
        "import sys, goslet.entry; print(sorted(name for name in sys.modules if name.startswith(('goslet', 'numpy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['goslet', 'goslet.entry']\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_writes_its_state(tiny_engine: Path, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "x.state"
    words = ["run", tiny_engine, "--tokens", "97", "-n", "100000000", "--seed", "1", "--state-out", path]
    program = "import sys; from goslet.entry import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` does not give what a buffer has read ahead
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup ignores SIGHUP
    ) as process:
        assert process.stdout is not None
        written = b""
        while len(written) < 50:
            piece = process.stdout.read(50)
            assert piece
            written += piece
        process.send_signal(number)
        written += process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert sorted(os.listdir(tmp_path)) == ["x.state"]
    with goslet.open(tiny_engine, threads=1) as engine:
        session = engine.session()
        session.load(path)
        # Unless the signal fell into the writing of the last one, all that was fed was written.
        n_written = len(written.split(b","))
        assert session.tokens_seen - 1 in (n_written, n_written + 1)


def test_a_run_that_nobody_reads_ends_when_told_to(tiny_engine: Path, tmp_path: Path) -> None:
    """Its write waits for ever."""
    path = tmp_path / "x.state"
    words = ["run", tiny_engine, "-p", "a", "-n", "100000000", "--seed", "1", "--state-out", path]
    program = "import sys; from goslet.entry import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        # As many bytes as a pipe holds, in far less time than this.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert path.exists()


# ------------------------------------------------------------------------------------------------ an engine that is cut


@pytest.mark.parametrize("backend", ["native", "ort"])
def test_an_engine_that_is_cut_while_it_is_open(tiny_engine: Path, tmp_path: Path, backend: str) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(tiny_engine.read_bytes())
    size_bytes = path.stat().st_size
    with goslet.open(path, backend=backend, threads=1) as engine:
        session, other = engine.session(), engine.session()
        session.feed([1, 2])
        os.truncate(path, 4096)
        calls: list[Callable[[], object]] = [
            lambda: session.feed([3]),
            lambda: engine.step_batch([session, other], [1, 2]),
        ]
        for call in calls:
            with pytest.raises(
                TruncatedError, match=f"cut short while it was open .expected {size_bytes} bytes"
            ) as caught:
                call()
            assert str(path) in str(caught.value)
        assert session.tokens_seen == 2
        session.save(tmp_path / "x.state")
    assert (tmp_path / "x.state").exists()
