"""The command chat at a terminal: a pseudo-terminal on which somebody types, pastes, and presses Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import stat
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet.chat import BUILT_IN
from goslet.commands import chat, keyboard

from .command_line import GOSLET, Run, assert_one_line_error

TIMEOUT_S = 60
ANSWER_TOKENS = 4
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
PROMPT = "User: "


class Terminal:
    """A process of `goslet chat` and the other end of its terminal."""

    def __init__(self, engine: Path, folder: Path, *words: object, out: Any = None) -> None:
        self.ours, theirs = pty.openpty()
        # What is typed before the process listens is not changed by the terminal, whatever its line discipline is.
        attributes = termios.tcgetattr(theirs)
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "60"}

        def sit_at_it() -> None:
            os.setsid()
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the terminal that Ctrl-C goes through
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.process = subprocess.Popen(
            [*GOSLET, "chat", str(engine), "-n", str(ANSWER_TOKENS), "--temperature", "0", *map(str, words)],
            stdin=theirs,
            stdout=theirs if out is None else out,
            stderr=theirs,
            env=environment,
            preexec_fn=sit_at_it,
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Read until this text has come; what came up to its end is returned and not looked at again."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0, deadline_s - time.monotonic()))
            piece = b""
            with contextlib.suppress(OSError):  # the process has ended
                piece = os.read(self.ours, 65536) if ready else b""
            assert piece, f"{text!r} did not come, but {self.seen[-2000:]!r}"
            self.seen += piece.decode(errors="replace")
        head, _, self.seen = self.seen.partition(text)
        return head + text

    def type(self, text: str) -> None:
        """Type at the prompt."""
        self.wait_for(PROMPT)
        self.press(text)

    def press(self, keys: str) -> None:
        """Send keys at once, whatever is shown."""
        data = keys.encode()
        while data:
            data = data[os.write(self.ours, data[:512]) :]

    def leave(self) -> int:
        """Ctrl-D at the prompt; the exit code."""
        self.type(CTRL_D)
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def sit(tiny_engine: Path, tmp_path: Path) -> Iterator[Any]:
    """Begins to chat at a terminal."""
    if not keyboard._line_editor():
        pytest.skip("this Python has no readline")
    opened: list[Terminal] = []

    def begin(*words: object, **options: Any) -> Terminal:
        opened.append(Terminal(tiny_engine, tmp_path, *words, **options))
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)


def answered(engine: goslet.Engine, session: goslet.Session, said: str, tokens: int = ANSWER_TOKENS) -> None:
    """One turn as the default template has it."""
    stop = "\n\nUser:"
    prompt = f"User: {said}\n\nAssistant:"
    list(engine.generate(prompt, max_tokens=tokens, temperature=0, session=session, stop=stop))
    session.feed(engine.encode("\n\n"))


def assert_state_of(path: Path, tiny_engine: Path, *turns: str) -> None:
    """The file holds the state after these turns."""
    with goslet.open(tiny_engine) as engine:
        expected, saved = engine.session(), engine.session()
        for said in turns:
            answered(engine, expected, said)
        saved.load(path)
        assert saved.tokens_seen == expected.tokens_seen
        for name, values in expected.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)


def test_lines_of_any_length_and_pasted_lines_are_turns(sit: Any, tiny_engine: Path, tmp_path: Path) -> None:
    """A terminal hands over 4095 bytes of a line and no more, unless the program reads it key by key."""
    state = tmp_path / "a.state"
    long, pasted = "long " * 1200, "one\n  two\nthree"
    terminal = sit()
    terminal.type(long + "\r")
    terminal.type(f"\x1b[200~{pasted}\x1b[201~\r")
    terminal.type(f"/save {state}\r")
    terminal.wait_for("saved to")
    assert terminal.leave() == 0
    assert_state_of(state, tiny_engine, long.strip(), pasted)


def test_lines_are_edited_and_remembered(sit: Any, tiny_engine: Path, tmp_path: Path) -> None:
    state, history = tmp_path / "a.state", tmp_path / "state" / "goslet" / "chat_history"
    terminal = sit()
    terminal.type("helo\x1b[Dl\r")  # one to the left, and the letter that was left out
    assert terminal.leave() == 0
    assert history.read_text() == "hello\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    terminal = sit()
    terminal.type(UP + "\r")
    terminal.type("x" * (keyboard._HISTORY_CHARACTERS + 1) + "\r")
    terminal.type(f"/save {state}\r")
    terminal.wait_for("saved to")
    assert terminal.leave() == 0
    assert_state_of(state, tiny_engine, "hello", "x" * (keyboard._HISTORY_CHARACTERS + 1))
    assert history.read_text().splitlines() == ["hello", f"/save {state}"]  # no line twice in a row


def test_the_history_is_bounded(sit: Any, tmp_path: Path) -> None:
    history = tmp_path / "state" / "goslet" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("".join(f"line {index}\n" for index in range(3000)))
    terminal = sit()
    terminal.type("/help\r")
    assert terminal.leave() == 0
    lines = history.read_text().splitlines()
    assert len(lines) == keyboard._HISTORY_LINES
    assert lines[-2:] == ["line 2999", "/help"]


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(sit: Any, tiny_engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    terminal = sit("-n", 10_000_000)
    terminal.type("hello\r")
    terminal.wait_for(chat.ASSISTANT)
    while len(terminal.seen) < 50:
        terminal.seen += os.read(terminal.ours, 1000).decode(errors="replace")
    terminal.press(CTRL_C)
    terminal.wait_for(PROMPT)
    time.sleep(0.3)  # Python overlooks a signal between the prompt and the wait for a key, until the next key
    terminal.press(CTRL_C)
    terminal.wait_for("/quit leaves")
    terminal.type(f"/save {state}\r")
    terminal.wait_for("saved to")
    assert terminal.leave() == 0
    with goslet.open(tiny_engine) as engine:
        expected, saved = engine.session(), engine.session()
        saved.load(state)
        written = saved.tokens_seen - len("User: hello\n\nAssistant:") - len("\n\n")
        assert written > 10
        answered(engine, expected, "hello", written)
        for name, values in expected.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)


def test_a_line_that_the_terminal_cuts_is_not_taken_for_whole(sit: Any, tiny_engine: Path, tmp_path: Path) -> None:
    """Where stdout is a file there is no editing: labels go to the terminal, answers to the file."""
    state, answers = tmp_path / "a.state", tmp_path / "answers.txt"
    with open(answers, "wb") as file:
        terminal = sit(out=file)
    terminal.type("x" * 5000 + "\n")
    terminal.wait_for("was cut by the terminal")
    terminal.type("hello\n")
    terminal.type(f"/save {state}\n")
    terminal.wait_for("saved to")
    assert terminal.leave() == 0
    assert_state_of(state, tiny_engine, "hello")
    text = answers.read_bytes()
    assert b"User:" not in text and b"Assistant:" not in text and text.strip() != b""


# ------------------------------------------------------------------------------------------------- the commands, piped


def test_turns_are_taken_back_and_answered_anew(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    common = ["chat", tiny_engine, "-n", ANSWER_TOKENS, "--temperature", 0]
    for lines, turns in {
        "one\ntwo\n/undo\nthree\n": ("one", "three"),
        "one\ntwo\n/retry\n": ("one", "two"),
        "one\n/undo\n": (),
        "one\n/reset\n/undo\ntwo\n": ("one", "two"),
        "one\n/system Be brief.\n/undo\ntwo\n": ("one", "two"),
        "one\n/undo\n/undo\n/retry\ntwo\n": ("two",),
    }.items():
        state = tmp_path / "a.state"
        outcome = run(*common, stdin=f"{lines}/save {state}\n".encode())
        assert (outcome.code, "error" in outcome.err) == (0, False), outcome.err
        assert_state_of(state, tiny_engine, *turns)
    assert "nothing to undo" in outcome.err and "no turn to answer anew" in outcome.err


def test_a_retry_draws_anew_even_with_a_seed(run: Run, tiny_engine: Path) -> None:
    lines = run("chat", tiny_engine, "-n", 20, "--seed", 5, stdin=b"hi\n/retry\n/retry\n").out
    again = run("chat", tiny_engine, "-n", 20, "--seed", 5, stdin=b"hi\n/retry\n/retry\n").out
    once = run("chat", tiny_engine, "-n", 20, "--seed", 5, stdin=b"hi\n").out
    assert lines == again and lines.startswith(once) and lines != 3 * once


def test_few_states_are_kept_and_few_bytes(
    run: Run, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_MAX_BACK", 2)
    lines = "one\ntwo\nthree\n/undo\n/undo\n/undo\n"
    outcome = run("chat", tiny_engine, "-n", 1, "--temperature", 0, stdin=lines.encode())
    assert outcome.err.count("taken back") == 2 and outcome.err.count("nothing to undo") == 1
    monkeypatch.setattr(chat, "_MAX_BACK_BYTES", 1)
    outcome = run("chat", tiny_engine, "-n", 1, "--temperature", 0, stdin=lines.encode())
    assert outcome.err.count("taken back") == 1


def test_instructions_modes_and_tools_change_while_talking(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    tools, state = tmp_path / "tools.json", tmp_path / "a.state"
    tools.write_text('["get_time(city: string)"]')
    lines = f"""early\n/system Be brief.\nWhat time is it?\n/mode plain\n/output {{"time": "noon"}}\n/save {state}\n"""
    words = ["chat", tiny_engine, "-n", ANSWER_TOKENS, "--temperature", 0, "--chat-template", "g1"]
    outcome = run(*words, "--tools", tools, stdin=lines.encode())
    assert (outcome.code, "error" in outcome.err) == (0, False), outcome.err
    g1, listed = BUILT_IN["g1"], ["get_time(city: string)"]
    with goslet.open(tiny_engine) as engine:
        expected, saved = engine.session(), engine.session()
        for prompt in (
            g1.instructions("Be brief.", listed) + g1.prompt("What time is it?", "call"),
            g1.prompt('Function output:\n{"time": "noon"}', "plain"),
        ):
            list(engine.generate(prompt, max_tokens=ANSWER_TOKENS, temperature=0, session=expected, stop=g1.stop))
            expected.feed(engine.encode(g1.end))
        saved.load(state)
        for name, values in expected.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)
    outcome = run(*words, stdin=b"/mode never\n/output x\n/usr/bin/env is no command\n/nonsense\n")
    assert "is not a mode" in outcome.err and "is no command as it stands" in outcome.err
    assert outcome.out.count("\n") >= 2  # what looks like a path is a turn


def test_tools_that_are_none_are_refused(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    words = ["chat", tiny_engine, "--chat-template", "g1", "--tools", tools]
    assert_one_line_error(run(*words), 1, "tools.json", "cannot be read")
    for content, said in {
        b"{": "is not JSON",
        b"\xff": "is not JSON",
        b"{}": "holds no tools",
        b"[]": "holds no tools",
        b"[1]": "tools[0]: is no tool",
        rb'["f(x)", "g\ud800"]': "tools.json: tools[1]: has half a surrogate pair",
        rb'[{"function": {"name": "f", "parameters": {"a": "\udc00"}}}]': "tools[0].function.parameters.a: has half",
        rb'[{"name": "f", "x\udc00": 1}]': r"tools.json: tools[0].x\udc00: has half",
        b"[" + b" " * chat._MAX_TOOLS_BYTES: "too long",
    }.items():
        tools.write_bytes(content)
        assert_one_line_error(run(*words), 1, said)
    tools.write_text('["f()"]')
    words[3] = "world"
    assert_one_line_error(run(*words), 1, "tools", "g1")


def test_endless_lines_are_bounded(run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyboard, "MAX_LINE_CHARACTERS", 100)
    outcome = run("chat", tiny_engine, "-n", 1, "--quiet", stdin=b"x" * 250 + b"\nhi\n")
    assert outcome.code == 0
    assert outcome.err.splitlines() == ["goslet: error: this line: is too long (expected at most 100 characters)"]
    assert outcome.out != ""
