"""The commands run and chat: what they write, what they remember, and how they stop."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet.chat import BUILT_IN, FREE_TEXT
from goslet.commands import chat
from goslet.errors import EmptyPromptError
from goslet.tokenizer import BytesTokenizer

from .command_line import GOSLET, Outcome, Run, assert_one_line_error
from .rewriting import rewritten

# ------------------------------------------------------------------------------------------------------------------ run


def test_run_writes_what_generate_gives(run: Run, tiny_engine: Path) -> None:
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3, "presence_penalty": 0.2}
    with goslet.open(tiny_engine) as engine:
        text = "".join(engine.generate("Once", max_tokens=40, frequency_penalty=0.1, **sampling))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    outcome = run("run", tiny_engine, "Once", "-n", 40, "--frequency-penalty", 0.1, *flags)
    assert outcome.code == 0
    assert (
        "sampling: temperature 0.8, top-k 50, top-p 0.9, presence penalty 0.2, frequency penalty 0.1 (" in outcome.err
    )
    assert outcome.out == (text if text.endswith("\n") else text + "\n")
    assert "40 tokens in" in outcome.err
    assert run("run", tiny_engine, "-p", "Once", "-n", 40, "--frequency-penalty", 0.1, *flags, "--quiet").err == ""


def test_run_takes_a_piped_prompt_without_its_last_line_end(run: Run, tiny_engine: Path) -> None:
    common = ["run", tiny_engine, "-n", 20, "--seed", 1]
    given = run(*common, "-p", "one\ntwo").out
    for piped in (b"one\ntwo", b"one\ntwo\n"):
        assert run(*common, stdin=piped).out == given
    assert run(*common, stdin=b"one\ntwo\n\n").out == run(*common, "-p", "one\ntwo\n").out


def test_run_without_any_prompt(run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["run", tiny_engine, "-n", 20, "--seed", 1]
    assert_one_line_error(run(*common), 2, "a prompt is needed")
    # A tokenizer that has an end-of-document token: the text begins from it.
    monkeypatch.setattr(BytesTokenizer, "end_token", property(lambda self: 0))
    assert run(*common).out == run(*common, "-p", "\0").out != ""


def test_run_refuses_a_piped_prompt_that_is_not_text(run: Run, tiny_engine: Path) -> None:
    assert_one_line_error(run("run", tiny_engine, stdin=b"abc\xff"), 1, "the piped prompt, byte 3", "0xff")


def test_run_stops_before_a_stop_text(run: Run, tiny_engine: Path) -> None:
    common = ["run", tiny_engine, "-p", "Once", "-n", 60, "--temperature", 0]
    text = run(*common).out
    stop = text[5:7]
    assert run(*common, "--stop", "never written", "--stop", stop).out == text.partition(stop)[0] + "\n"


def test_run_with_token_ids(run: Run, tiny_engine: Path) -> None:
    with goslet.open(tiny_engine) as engine:
        options = replace(engine.decoding, seed=5)
        tokens = list(engine.generate_tokens([1, 2, 3], max_tokens=10, options=options))
    outcome = run("run", tiny_engine, "--tokens", "1,2,3", "-n", 10, "--seed", 5)
    assert outcome.out == ",".join(map(str, tokens)) + "\n"
    assert_one_line_error(run("run", tiny_engine, "--tokens", "1,256"), 1, "outside the vocabulary", "256")
    assert_one_line_error(run("run", tiny_engine, "--tokens", " "), 1, "no token to feed")


def test_an_engine_without_a_tokenizer_says_what_to_do(
    run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(goslet.Engine, "tokenizer", property(lambda self: None))
    assert_one_line_error(run("run", tiny_engine, "-p", "a"), 1, str(tiny_engine), "token ids only", "--tokens")
    assert_one_line_error(run("chat", tiny_engine, stdin=b"hi\n"), 1, "token ids only", "--tokenizer")
    text = tmp_path / "text.txt"
    text.write_text("abc")
    assert_one_line_error(run("eval", tiny_engine, "--text", text), 1, "no tokenizer", "--tokenizer")
    assert run("run", tiny_engine, "--tokens", "7", "-n", 3).code == 0


def test_a_saved_state_goes_on_as_if_never_stopped(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    greedy = ["--temperature", 0, "--quiet"]
    whole = run("run", tiny_engine, "--tokens", "1,2,3", "-n", 30, *greedy).out.strip().split(",")
    first = run("run", tiny_engine, "--tokens", "1,2,3", "-n", 10, "--state-out", state, *greedy).out.strip().split(",")
    assert first == whole[:10]
    with goslet.open(tiny_engine) as engine:
        session, expected = engine.session(), engine.session()
        session.load(state)
        expected.feed([1, 2, 3, *map(int, first)])
        for name, values in expected.state.front.items():
            np.testing.assert_array_equal(session.state.front[name], values)
    # The state has taken the tenth token in, so the eleventh is given as the prompt, and the rest follows.
    rest = run("run", tiny_engine, "--tokens", whole[10], "-n", 19, "--state-in", state, "--state-out", state, *greedy)
    assert rest.out.strip().split(",") == whole[11:]


def test_a_saved_state_goes_on_without_a_prompt(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    """What `run` saves says which token comes next; what a session saves that was only fed does not."""
    state, words = tmp_path / "a.state", ["--temperature", 0, "--quiet"]
    whole = run("run", tiny_engine, "--tokens", "1,2,3", "-n", 30, *words).out
    run("run", tiny_engine, "--tokens", "1,2,3", "-n", 10, "--state-out", state, *words)
    with goslet.open(tiny_engine) as engine:
        expected = b"".join(bytes([int(token)]) for token in whole.split(",")[10:])
        session = engine.session()
        session.load(state)
        twin = session.fork()
        for going_on in (session, twin):
            text = "".join(engine.generate([], max_tokens=20, temperature=0, session=going_on))
            assert text == expected.decode(errors="replace")
        session.feed([1])
        assert session.logits is None
        with pytest.raises(EmptyPromptError):
            next(engine.generate([], session=session))
        session.save(tmp_path / "fed.state")
    outcome = run("run", tiny_engine, "--state-in", state, "-n", 20, "--state-out", state, *words)
    assert outcome.out == expected.decode(errors="replace") + "\n"
    assert run("run", tiny_engine, "--state-in", state, "-n", 5, *words).code == 0
    outcome = run("run", tiny_engine, "--state-in", tmp_path / "fed.state")
    assert_one_line_error(outcome, 2, "fed.state", "give the words that follow")


def test_texts_may_begin_with_a_dash(run: Run, tiny_engine: Path) -> None:
    common = ["run", tiny_engine, "-n", 20, "--seed", 1, "--quiet"]
    for text in ("-hi", "--hi", "-1", "- a", "--a=b"):
        outcome = run(*common, "-p", text, "--stop", "-never")
        assert outcome.out == run(*common, f"--prompt={text}").out == run(*common, "--", text).out != ""


def test_the_engine_says_how_to_sample(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    """Its template's parameters are used, shown, and overridden by flags one by one; greedy is greedy."""
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=("bytes", b""), chat=BUILT_IN["g1"])
    bare = rewritten(tiny_engine, tmp_path / "bare.goslet", tokenizer=("bytes", b""), chat=None)
    common = ["-p", "Once", "-n", 40, "--seed", 3]
    with goslet.open(path) as engine:
        options = replace(engine.decoding, seed=3)
        assert options == replace(FREE_TEXT, seed=3)
        text = "".join(engine.generate("Once", max_tokens=40, options=options))
        greedy = "".join(engine.generate("Once", max_tokens=40, temperature=0))
    outcome = run("run", path, *common)
    assert outcome.out.removesuffix("\n") == text.removesuffix("\n") != greedy
    free = "temperature 1, top-p 0.7, presence penalty 0.25, frequency penalty 0.25"
    assert f"goslet: sampling: {free} (" in outcome.err
    assert run("run", bare, *common).out == outcome.out
    outcome = run("run", path, *common, "--top-p", 1, "--min-p", 0.1)
    assert f"sampling: {free.replace('top-p 0.7', 'min-p 0.1')} (" in outcome.err
    outcome = run("run", path, *common, "--temperature", 0)
    assert outcome.out.removesuffix("\n") == greedy.removesuffix("\n")
    assert "sampling: greedy (" in outcome.err
    outcome = run("chat", path, "-n", 1, "--mode", "think", stdin=b"hi\n")
    assert "sampling: temperature 1, top-k 100, top-p 0.5 (" in outcome.err
    lines = run("inspect", path).out.splitlines()
    assert any(line.split("  ")[1:] and line.strip().startswith("text ") and free in line for line in lines)
    assert any(line.strip().startswith("think, think-a-bit,") and "top-k 100" in line for line in lines)
    decoding = json.loads(run("inspect", path, "--json").out)["decoding"]
    assert decoding["text"] == free and decoding["plain"].startswith("temperature 1, top-p 0.3, ")


def test_run_keeps_files_that_are_no_states(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    precious = tmp_path / "model.pth"
    precious.write_bytes(b"precious")
    outcome = run("run", tiny_engine, "-p", "a", "--state-out", precious)
    assert_one_line_error(outcome, 1, str(precious), "not a state file")
    assert precious.read_bytes() == b"precious"
    outcome = run("run", tiny_engine, "-p", "a", "--state-in", precious)
    assert_one_line_error(outcome, 1, str(precious))
    outcome = run("run", tiny_engine, "-p", "a", "--state-out", tmp_path / "none" / "a.state")
    assert_one_line_error(outcome, 1, "folder")
    assert outcome.out == ""


@pytest.mark.usefixtures("without_cuda")
def test_backends_and_devices_that_are_not_there(run: Run, tiny_engine: Path) -> None:
    for flags in (["--backend", "trt"], ["--device", "cuda"], ["--backend", "ort", "--device", "cuda"]):
        outcome = run("run", tiny_engine, "-p", "a", *flags)
        assert_one_line_error(outcome, 1, "no CUDA driver" if "trt" in flags else flags[-1])


def start(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process of its own, which Ctrl-C reaches even where it is ignored here."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [*GOSLET, *map(str, words)],
        bufsize=0,  # so that nothing is read ahead of what a test asks for
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        preexec_fn=listen,
        **options,
    )


def test_ctrl_c_ends_a_run_between_two_tokens_and_saves_the_state(tiny_engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    process = start("run", tiny_engine, "--tokens", "1,2,3", "-n", 10_000_000, "--state-out", state)
    assert process.stdout is not None
    head = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = err.decode().splitlines()
    assert lines[-1] == f"goslet: interrupted; the state so far is in {state}"
    assert "Traceback" not in err.decode()
    written = [int(word) for word in (head + out).decode().split(",")]
    with goslet.open(tiny_engine) as engine:
        session, expected = engine.session(), engine.session()
        session.load(state)
        expected.feed([1, 2, 3, *written])
        assert session.tokens_seen == expected.tokens_seen
        for name, values in expected.state.front.items():
            np.testing.assert_array_equal(session.state.front[name], values)


def test_a_reader_that_has_enough_is_no_error(tiny_engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    process = start("run", tiny_engine, "-p", "a", "-n", 10_000_000, "--state-out", state, "--quiet")
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert state.exists()


def test_a_reader_that_reads_nothing_is_no_error(tiny_engine: Path) -> None:
    process = start("inspect", tiny_engine)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_a_full_disk_behind_stdout_is_one_line(tiny_engine: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*GOSLET, "inspect", str(tiny_engine)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert_one_line_error(Outcome(done.returncode, "", done.stderr), 1, "No space left")


def test_any_character_can_be_written_in_any_locale(tiny_engine: Path, tmp_path: Path) -> None:
    words = ["run", str(tiny_engine), "-p", "Fëanor", "-n", "60", "--seed", "1", "--quiet"]
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([*GOSLET, *words], capture_output=True, env=environment, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr) == (0, b"")
        done.stdout.decode(encoding)


def test_progress_on_a_terminal_clears_its_line(tiny_engine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"some words to predict, " * 60)
    words = ["eval", str(tiny_engine), "--text", str(text), "--json"]
    done = subprocess.run([*GOSLET, *words], capture_output=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"")

    ours, theirs = pty.openpty()
    process = start(*words, stderr=theirs, env={**os.environ, "COLUMNS": "24"})
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    shown = b""
    with contextlib.suppress(OSError):  # a closed terminal
        while piece := os.read(ours, 1000):
            shown += piece
    os.close(ours)
    assert process.returncode == 0
    assert out == done.stdout
    lines = shown.split(b"\r")
    assert lines[0] == b""
    assert lines[1].startswith(b"evaluating")
    assert max(map(len, lines)) <= 23
    assert lines[-1] == b""
    assert lines[-2].strip() == b""


# ----------------------------------------------------------------------------------------------------------------- chat


def test_chat_works_piped(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "talk.state"
    lines = f"hello\n/save {state}\n/reset\nhello\n\n/load {state}\n/nonsense\n/load\n/quit\nnever read\n"
    outcome = run("chat", tiny_engine, "-n", 12, "--temperature", 0, stdin=lines.encode())
    assert outcome.code == 0
    notes = outcome.err.splitlines()
    assert f"goslet: saved to {state}" in notes
    assert "goslet: the conversation is forgotten; /undo takes this back" in notes
    assert any(line.startswith(f"goslet: going on from {state}, ") for line in notes)
    assert outcome.err.count(chat.HELP) == 2
    assert "goslet: /nonsense is no command as it stands" in notes
    assert "goslet: /load needs a FILE" in notes
    with goslet.open(tiny_engine) as engine:
        session = engine.session()
        prompt = "User: hello\n\nAssistant:"
        reply = "".join(engine.generate(prompt, max_tokens=12, temperature=0, session=session, stop="\n\nUser:"))
        assert outcome.out == 2 * (reply.lstrip() + "\n")  # the second after /reset: the same from the beginning
        session.feed(engine.encode("\n\n"))
        saved = engine.session()
        saved.load(state)
        for name, values in session.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)


def test_chat_survives_bad_files(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("notes")
    lines = f"/save {precious}\n/load {precious}\n/load {tmp_path}/none\n/save {tmp_path}/none/x\nhello\n"
    outcome = run("chat", tiny_engine, "-n", 3, "--seed", 1, "--quiet", stdin=lines.encode())
    assert outcome.code == 0
    assert outcome.out.strip() != ""
    assert len(outcome.err.splitlines()) == 4
    assert all(line.startswith("goslet: error: ") for line in outcome.err.splitlines())
    assert precious.read_text() == "notes"


def test_chat_speaks_in_the_engines_template(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    """With a mode and instructions; the state afterwards is that of the text written out."""
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=("bytes", b""), chat=BUILT_IN["g1"])
    state = tmp_path / "talk.state"
    words = ("chat", path, "-n", 9, "--temperature", 0, "--system", "Be\n\nkind.")
    lines = f"hello\nagain\n/save {state}\n".encode()
    outcome = run(*words, "--mode", "think-a-bit", stdin=lines)
    assert outcome.code == 0, outcome.err
    with goslet.open(path) as engine:
        session, shown = engine.session(), ""
        for index, said in enumerate(("hello", "again")):
            prompt = "System: Be\nkind.\n\n" if index == 0 else ""
            prompt += f"User: {said} (think a bit)\n\nAssistant: <think"
            reply = "".join(engine.generate(prompt, max_tokens=9, temperature=0, session=session, stop="\n\nUser:"))
            session.feed(engine.encode("\n\n"))
            shown += f"<think{reply}\n"
        assert outcome.out == shown
        saved = engine.session()
        saved.load(state)
        for name, values in session.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)
    assert run(*words, "--chat-template", "world", stdin=lines).out.count("<think") == 0
    assert_one_line_error(run(*words, "--mode", "thinking"), 1, "plain, think, think-a-bit", "thinking")
    assert_one_line_error(run(*words, "--chat-template", tmp_path / "none.json"), 1, "none.json", "world, g1")
    none = rewritten(tiny_engine, tmp_path / "none.goslet", tokenizer=("bytes", b""), chat=None)
    assert_one_line_error(run("chat", none), 1, "--chat-template world")
    assert run("chat", none, "-n", 1, "--chat-template", "g1", stdin=b"hi\n").code == 0


@pytest.mark.parametrize("user", ["[{}]", "{}"])
def test_chat_remembers_turns_that_have_no_end(run: Run, tiny_engine: Path, tmp_path: Path, user: str) -> None:
    """Such a template has nothing for the state to read after an answer, which once lost the whole turn."""
    template = {"system": "{}", "user": user, "assistant": "", "end": "", "modes": {"plain": {"ask": "", "open": ""}}}
    path, state = tmp_path / "template.json", tmp_path / "talk.state"
    path.write_text(json.dumps(template))
    lines = f"one\ntwo\n/save {state}\n".encode()
    outcome = run("chat", tiny_engine, "-n", 5, "--temperature", 0, "--chat-template", path, stdin=lines)
    assert (outcome.code, "error" in outcome.err) == (0, False)
    with goslet.open(tiny_engine) as engine:
        session, stop = engine.session(), ["["] if user != "{}" else []
        for said in ("one", "two"):
            prompt = user.replace("{}", said)
            list(engine.generate(prompt, max_tokens=5, temperature=0, session=session, stop=stop))
        saved = engine.session()
        saved.load(state)
        for name, values in session.state.front.items():
            np.testing.assert_array_equal(saved.state.front[name], values)


class ScriptedTokenizer:
    """Tokens are pieces of text; what is fed can be read back."""

    pieces = ("<end>", " Hel", "lo", ".\n", "\nUs", "er: the", "\n\n")
    end_token = 0
    vocab_size = 300

    def encode(self, text: str) -> list[int]:
        return [1000 + ord(character) for character in text]

    def text(self, tokens: list[int]) -> str:
        return "".join(chr(token - 1000) if token >= 1000 else self.pieces[token] for token in tokens)

    def stream(self) -> ScriptedTokenizer:
        return self

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


class ScriptedSession:
    state_size_bytes = 1000

    def __init__(self, fed: list[int]) -> None:
        self.fed = fed

    def feed(self, tokens: list[int]) -> np.ndarray:
        self.fed = [*self.fed, *tokens]
        return np.zeros(1, np.float32)

    def fork(self) -> ScriptedSession:
        return ScriptedSession(self.fed)


class ScriptedEngine:
    """Samples the tokens of a script; None stands for Ctrl-C."""

    tokenizer = ScriptedTokenizer()

    def __init__(self, script: list[int | None]) -> None:
        self.script = script
        self.sessions = [ScriptedSession([])]

    def session(self) -> ScriptedSession:
        return self.sessions[0]

    def sampler(self, options: object) -> ScriptedEngine:
        return self

    def sample(self, logits: np.ndarray) -> int:
        token = self.script.pop(0)
        if token is None:
            os.kill(os.getpid(), signal.SIGINT)
            return self.sample(logits)
        return token

    def observe(self, token: int) -> None: ...


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ([1, 2, 0], "Hello"),  # the model ends the document
        ([1, 2, 3, 4, 5], "Hello."),  # a stop text that begins in one token's middle and ends in another's
        ([1, 2, 6, 1, 2, 0], "Hello\n\n Hello"),  # what might become a stop text and does not
        ([1, 2, 3, 4, 1, 0], "Hello.\n\nUs Hel"),
        ([1, None, 2], "Hello"),  # Ctrl-C while this token is sampled
        ([1, 2, 1, 2, 1, 2, 1], "Hello Hello Hello Hel"),  # the limit of tokens
    ],
)
def test_chat_remembers_exactly_what_it_shows(
    script: list[int | None], shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = ScriptedEngine(list(script))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    world = BUILT_IN["world"]
    talk = chat._Chat(engine, engine.tokenizer, chat.Console(quiet=True), chat_options, world, 7, "plain")
    talk.loop()
    assert capsys.readouterr().out == shown + "\n"
    fed = engine.tokenizer.text(talk._session.fed)  # type: ignore[attr-defined]
    assert fed == f"User: hi\n\nAssistant: {shown}\n\n"
    assert engine.script == []


def chat_options(mode: str) -> goslet.SamplingOptions:
    return goslet.SamplingOptions(stop=("\n\nUser:",))
