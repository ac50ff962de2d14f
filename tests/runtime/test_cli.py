"""The command line: usage, errors, and the commands that make, check and show engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import goslet
from goslet import cli
from goslet.commands import console, demo, export, sketch
from goslet.commands.console import readable_size
from goslet.enginefile import EngineFile

from .command_line import Outcome, Run, assert_one_line_error

# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["a command is needed", "export, run, chat"]),
        (["exprot"], ["unknown command 'exprot'", "did you mean export?"]),
        (["--quiet", "vrify"], ["did you mean verify?"]),
        (["xyzzy"], ["unknown command 'xyzzy' (see: goslet --help)"]),
        (["run", "e", "--temprature", "1"], ["unknown flag --temprature", "did you mean --temperature?"]),
        (["run", "e", "--topk=3"], ["did you mean --top-k?"]),
        (["run", "e", "--temp", "1"], ["unknown flag --temp", "did you mean --temperature?"]),
        (["run"], ["required: ENGINE", "goslet run --help"]),
        (["run", "e", "-z"], ["unexpected '-z'", "see: goslet run --help"]),
        (["run", "e", "Once", "upon", "a"], ["unexpected 'upon a'", "needs quotes", "see: goslet run --help"]),
        (["run", "e", "Once", "-p", "Once"], ["not allowed with"]),
        (["run", "e", ""], ["PROMPT: the prompt is empty"]),
        (["run", "e", "-p", "--debug"], ["-p/--prompt", "expected one argument"]),
        (["run", "e", "--top_p", "0.5"], ["did you mean --top-p?"]),
        (["run", "e", "-temperature", "1"], ["did you mean --temperature?"]),
        (["run", "e", "--n-predict", "9"], ["did you mean --max-tokens?"]),
        (["run", "e", "--quant", "int4"], ["unknown flag --quant; it is one of export"]),
        (["run", "e", "-p", "a", "--min-p", "2"], ["--min-p: is out of range"]),
        (["run", "e", "-p", "a", "--repeat-penalty", "0"], ["--repeat-penalty: is out of range"]),
        (["generate", "e"], ["did you mean run?"]),
        (["model.goslet", "hi"], ["a command is needed before 'model.goslet'"]),
        (["help", "rum"], ["unknown command 'rum'", "did you mean run?"]),
        (["run", "e", "-n", "-3"], ["-n/--max-tokens", "0 or more", "'-3'"]),
        (["run", "e", "-n", "many"], ["'many'"]),
        (["run", "e", "--threads", "0"], ["--threads", "1 or more"]),
        (["run", "e", "--backend", "tpu"], ["--backend", "tpu"]),
        (["run", "e", "-p", "a", "--tokens", "1"], ["not allowed with"]),
        (["run", "e", "-p", ""], ["the prompt is empty"]),
        (["run", "e", "-p", "a", "--top-p", "1.5"], ["--top-p: is out of range (expected 0 to 1, found 1.5)"]),
        (["run", "e", "-p", "a", "--temperature", "-1"], ["--temperature: is out of range"]),
        (["run", "e", "-p", "a", "--temperature", "nan"], ["--temperature: is out of range"]),
        (["run", "e", "-p", "a", "--top-k", "-1"], ["--top-k: is out of range (expected 0 or more, found -1)"]),
        (["run", "e", "-p", "a", "--stop", ""], ["--stop: is empty"]),
        (["run", "e", "-p", "\udcff"], ["-p: is not valid text"]),
        (["run", "e", "--tokens", "1,x"], ["--tokens: expected token ids", "'1,x'"]),
        (["run", "e", "--tokens", "1", "--stop", "x"], ["--stop needs text"]),
        (["chat", "e", "-n", "0"], ["1 or more"]),
        (["export", "c"], ["-o/--output"]),
        (["export", "c", "-o", "o", "--quant", "int5"], ["--quant", "int5"]),
        (["export", "c", "-o", "o", "--group", "48"], ["--group", "48"]),
        (["export", "c", "-o", "o", "--norm-eps", "0"], ["--norm-eps", "above 0"]),
        (["export", "c", "-o", "o", "--bits", "4.5", "--quant", "int4"], ["--quant", "not allowed with", "--bits"]),
        (["export", "c", "-o", "o", "--bits", "4.5", "--group", "64"], ["--group: is chosen by --bits"]),
        (["export", "c", "-o", "o", "--calibration-tokens", "600"], ["of no use without --calibrate"]),
        (["eval", "e"], ["--text"]),
        (["verify", "e"], ["CHECKPOINT"]),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, list) else None,
)
def test_usage_errors_are_one_line_and_code_2(run: Run, words: list[str], parts: list[str]) -> None:
    assert_one_line_error(run(*words), 2, *parts)


def test_help_and_version(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    assert all(command.NAME in outcome.out and command.SUMMARY in outcome.out for command in cli.COMMANDS)
    assert run("help").out == outcome.out
    assert run("help", "run").out == run("run", "--help").out
    assert run("--version").out == f"goslet {goslet.__version__}\n"
    for command in cli.COMMANDS:
        outcome = run(command.NAME, "--help")
        assert outcome.code == 0
        assert "--debug" in outcome.out


def test_python_m_goslet_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "goslet", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"goslet {goslet.__version__}\n")


def test_help_fits_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    outcome = run("run", "--help")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 48  # argparse keeps long flags whole


@pytest.mark.parametrize(("before", "after"), [(["--debug"], []), ([], ["--debug"]), ([], [])])
def test_debug_shows_the_traceback_before_or_after_the_command(
    run: Run, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    outcome = run(*before, "inspect", tmp_path / "none.goslet", *after)
    assert outcome.code == 1
    assert ("Traceback" in outcome.err) == bool(before or after)
    assert outcome.err.splitlines()[-1].startswith("goslet: error: ")


def test_an_unexpected_exception_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.inspect, "execute", lambda args, console: [][1])
    assert_one_line_error(run("inspect", "e"), 1, "unexpected IndexError", "--debug")


def test_too_little_memory_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(args: object, console: object) -> int:
        raise MemoryError

    monkeypatch.setattr(cli.inspect, "execute", execute)
    assert_one_line_error(run("inspect", "e"), 1, "not enough memory")


def test_progress_in_a_file_is_a_line_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: now_s))
    with console.Progress(enabled=True) as progress, console.Progress(enabled=False) as silent:
        for done in range(70):
            progress("reading" if done < 50 else "writing", done, 70)
            silent("reading", done, 70)
            now_s += 1
    assert capsys.readouterr().err == "goslet: reading  42% (30 of 70)\ngoslet: writing  85% (60 of 70)\n"


@pytest.mark.parametrize("stream", ["full", "closed pipe", "closed"])
def test_progress_that_nobody_can_read_does_not_end_the_work(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LINE_S", 0.0)
    if stream == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
        file = os.fdopen(writing, "w")
    else:
        file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with contextlib.suppress(OSError), file:
        if stream == "closed":
            file.close()
        monkeypatch.setattr(sys, "stderr", file)
        with console.Progress(enabled=True) as progress:
            for done in range(3):
                progress("reading", done, 3)
        monkeypatch.undo()


def test_sizes_for_people() -> None:
    sizes = [0, 999, 1000, 1500, 999_499, 999_500, 1_500_000, 999_500_000, 2.5e12]
    readable = ["0 bytes", "999 bytes", "1 kB", "1.5 kB", "999 kB", "1 MB", "1.5 MB", "1 GB", "2.5e+03 GB"]
    assert [readable_size(size) for size in sizes] == readable


# --------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` with one number changed."""
    torch = pytest.importorskip("torch", reason="changing a checkpoint needs torch")
    tensors = torch.load(tiny_checkpoint, weights_only=True)
    tensors["head.weight"] = tensors["head.weight"].clone()
    tensors["head.weight"][0, 0] += 0.5
    path: Path = tmp_path_factory.mktemp("other") / "other.pth"
    torch.save(tensors, path)
    return path


def test_export_says_what_it_made_and_what_to_type_next(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "tiny.goslet"
    engine.write_bytes(b"precious")
    words = ["export", tiny_checkpoint, "-o", engine, "--quant", "int4"]
    assert_one_line_error(run(*words), 1, str(engine), "exists", "--force")
    assert engine.read_bytes() == b"precious"
    outcome = run(*words, "--force")
    assert outcome.code == 0, outcome
    assert outcome.out == ""
    first, second = outcome.err.splitlines()
    assert str(engine) in first
    assert "bits per weight" in first
    assert f"goslet run {engine} -p" in second
    assert json.loads(run("inspect", engine, "--json").out)["provenance"]["recipe"]["name"] == "int4"


def test_export_calibrates_and_keeps_the_moments(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")
    from goslet.export import calibration_text, compensate, recalibration

    assert export.CALIBRATION_TOKENS == sketch.CALIBRATION_TOKENS == calibration_text.CALIBRATION_TOKENS
    assert sketch.SKETCHES_PER_TOKEN == recalibration.SKETCHES_PER_TOKEN
    assert export.LOW_RANK_METHODS == compensate.LOW_RANK_METHODS
    assert export.SPARSE_METHODS == compensate.SPARSE_METHODS
    text, engine, moments = tmp_path / "text", tmp_path / "x.goslet", tmp_path / "x.moments"
    text.write_text("The goose swam. " * 40)
    words = ["export", tiny_checkpoint, "-o", engine, "--quant", "int4", "--calibrate", text]
    outcome = run(*words, "--calibration-tokens", "512", "--moments", moments)
    assert outcome.code == 0, outcome
    assert outcome.err.startswith("goslet: calibrated on 512 tokens\n")
    assert run("verify", engine, tiny_checkpoint).code == 0
    text.write_bytes(b"\xff" * 1000)
    assert_one_line_error(run(*words, "--force"), 1, str(text), "not UTF-8 text")


@pytest.mark.parametrize(("vocab_size", "said"), [(65536, "World"), (50277, "RWKV-4 Pile"), (300, None)])
def test_export_suggests_the_tokenizer_that_a_vocabulary_of_this_size_has(
    vocab_size: int, said: str | None, run: Run, tmp_path: Path
) -> None:
    from random_checkpoint import random_rwkv4, save

    save(random_rwkv4(n_layer=1, n_embd=16, vocab_size=vocab_size), tmp_path / "x.pth")
    outcome = run("export", tmp_path / "x.pth", "-o", tmp_path / "x.goslet")
    assert outcome.code == 0
    assert ("is that of" in outcome.err) == (said is not None)
    assert said is None or said in outcome.err


def test_export_of_what_is_no_checkpoint_leaves_nothing(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no checkpoint")
    for checkpoint in (bad, tmp_path / "missing.pth"):
        assert_one_line_error(run("export", checkpoint, "-o", tmp_path / "out.goslet"), 1, str(checkpoint))
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_export_refuses_an_output_folder_that_is_not_there_before_reading(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "none" / "out.goslet"
    assert_one_line_error(run("export", tmp_path / "missing.pth", "-o", output), 1, str(output), "folder")


def test_ctrl_c_during_an_export_leaves_nothing(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from goslet.export import exporter

    encode, calls = exporter.encode_blocks, []

    def encode_and_interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:  # in the middle of writing the weights
            os.kill(os.getpid(), signal.SIGINT)
        return encode(*args)

    monkeypatch.setattr(exporter, "encode_blocks", encode_and_interrupt)
    outcome = run("export", tiny_checkpoint, "-o", tmp_path / "out.goslet")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "goslet: interrupted\n")
    assert len(calls) == 5
    assert os.listdir(tmp_path) == []


ENDED = """
import os, signal, sys
from goslet import cli
from goslet.output import atomic_write

numbers = [int(number) for number in sys.argv[1].split(",")]

def execute(args, console):
    with atomic_write(args.engine, overwrite=True) as file:
        file.write(bytes(3 << 20))
        print("half a line", end="")
        # So that all of them arrive at once.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return 0

cli.inspect.execute = execute
sys.exit(cli.main(["inspect", sys.argv[2]]))
"""


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGHUP"], ["SIGTERM", "SIGHUP"]], ids="-".join)
def test_being_told_to_end_leaves_no_part_of_an_output_file(signals: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.goslet"
    output.write_bytes(b"precious")
    numbers = [int(getattr(signal, name)) for name in signals]

    def by_default() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    words = [sys.executable, "-c", ENDED, ",".join(map(str, numbers)), output]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=by_default)
    assert (done.returncode - 128 in numbers, done.stderr) == (True, ""), done
    assert os.listdir(tmp_path) == ["out.goslet"]
    assert output.read_bytes() == b"precious"


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_are_taken_only_where_they_would_end_the_process(
    disposition: signal.Handlers, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = []

    def execute(args: object, console: object) -> int:
        during.extend(signal.getsignal(number) for number in numbers)
        return 0

    monkeypatch.setattr(cli.inspect, "execute", execute)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, disposition) for number in numbers]
    try:
        assert run("inspect", "e").code == 0
        assert [handler is disposition for handler in during] == [disposition is signal.SIG_IGN] * 2
        assert [signal.getsignal(number) for number in numbers] == [disposition] * 2
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_the_export_extra_is_asked_for_where_it_is_missing(run: Run, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "from goslet import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    for words in (["export", "c.pth", "-o", "o.goslet"], ["verify", "e", "c.pth"], ["demo", "--dir", "d"]):
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        assert_one_line_error(outcome, 1, "is not installed", "pip install 'goslet[export,ort]'")
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_agrees_with_the_file(run: Run, tiny_engines: dict[str, Path]) -> None:
    for quant, path in tiny_engines.items():
        report = json.loads(run("inspect", path, "--json").out)
        assert report["size_bytes"] == path.stat().st_size
        assert report["spec"]["n_layer"] == 2
        assert report["tokenizer"] == "bytes"
        stored_bytes = sum(entry["bytes"] for entry in report["formats"].values())
        assert report["bits_per_weight"] == pytest.approx(8 * stored_bytes / report["weights"])
        assert sum(report["sections"].values()) <= report["size_bytes"]
        assert report["provenance"]["recipe"]["name"] == quant
        lines = run("inspect", path).out.splitlines()
        assert any(line.startswith("model") and "2 layers" in line for line in lines)
        assert any(line.startswith("section graph") for line in lines)


def test_a_file_cannot_drive_the_terminal(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    from goslet.enginefile import TensorSource, write_engine

    nasty = "\x1b]0;owned\x07\x9b2J\u202eback\r\n\x7fend"
    with EngineFile.open(tiny_engine) as file:
        write_engine(
            tmp_path / "x.goslet",
            spec=file.spec,
            state_spec=file.state_spec,
            model_id=file.model_id,
            graph=bytes(file.graph_bytes),
            graph_info={"format": "onnx", "opset": 21, nasty: nasty},
            tensors=[
                TensorSource(name, entry.format, entry.shape, lambda name=name: file.weight(name), entry.layout)
                for name, entry in file.tensors.items()
            ],
            tokenizer=None,
            program=None,
            provenance={nasty: nasty},
            overwrite=False,
        )
    outcome = run("inspect", tmp_path / "x.goslet")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.replace("\n", "").isprintable()
    assert r"\x1b]0;owned\x07\x9b2J\u202eback \x7fend" in outcome.out
    assert json.loads(run("inspect", tmp_path / "x.goslet", "--json").out)["provenance"] == {nasty: nasty}
    for words in (["inspect", tmp_path / nasty], ["inspect", "e", nasty], ["run", tmp_path / nasty, "--tokens", nasty]):
        outcome = run(*words)
        assert_one_line_error(outcome, outcome.code)
        assert outcome.code in (1, 2)
        assert outcome.err.removesuffix("\n").isprintable()


def test_inspect_loads_no_backend_and_no_torch(tiny_engine: Path) -> None:
    program = (
        "import sys; from goslet import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "assert not {'onnxruntime', 'torch', 'onnx', 'goslet.export'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, "inspect", str(tiny_engine)], check=True, capture_output=True)


def test_inspect_check_finds_a_changed_weight(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    with EngineFile.open(tiny_engine) as file:
        weights = bytes(file.packed("head.weight").data[:64])
    damaged = bytearray(tiny_engine.read_bytes())
    damaged[damaged.index(weights)] ^= 1
    path = tmp_path / "damaged.goslet"
    path.write_bytes(damaged)
    assert run("inspect", path).code == 0
    assert run("inspect", tiny_engine, "--check").code == 0
    assert_one_line_error(run("inspect", path, "--check"), 1, str(path), "weights")


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify_passes_an_engine_and_fails_another_ones(
    run: Run, tiny_engines: dict[str, Path], tiny_checkpoint: Path, other_checkpoint: Path
) -> None:
    outcome = run("verify", tiny_engines["int4"], tiny_checkpoint)
    assert outcome.code == 0, outcome
    assert outcome.out.splitlines()[-1] == "passed"
    outcome = run("verify", tiny_engines["int4"], other_checkpoint, "--json")
    assert (outcome.code, outcome.err) == (1, "")
    report = json.loads(outcome.out)
    assert report["passed"] is False
    assert "model id" in report["differences"]


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_exports_verifies_and_writes(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the demonstration has a tokenizer.json")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.models.BPE({letter: index for index, letter in enumerate(sorted(alphabet))}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    data = tmp_path / "package" / "demo"
    data.mkdir(parents=True)
    (data / demo.CHECKPOINT).write_bytes(tiny_checkpoint.read_bytes())
    tokenizer.save(str(data / demo.TOKENIZER))
    monkeypatch.setattr(demo.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = run("demo")
    assert outcome.code == 0, outcome
    for part in ("1. exporting", "2. verifying", "passed", "3. writing", demo.PROMPT, "goslet run"):
        assert part in outcome.out
    assert os.listdir(tmp_path / "cache" / "goslet") == [demo.ENGINE]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in {
        "": tmp_path / ".cache" / "goslet",
        "relative": tmp_path / ".cache" / "goslet",
        str(tmp_path / "x"): tmp_path / "x" / "goslet",
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert demo.cache_folder() == expected


def test_an_rwkv4_pile_takes_its_own_tokenizer(run: Run, shared_data: Path, tmp_path: Path) -> None:
    """Suggested by the vocabulary's size, and given by its path; text then goes in and out."""
    pytest.importorskip("torch", reason="exporting needs torch")
    from random_checkpoint import random_rwkv4, save

    save(random_rwkv4(n_layer=1, n_embd=32, vocab_size=50277, seed=5), tmp_path / "x.pth")
    outcome = run("export", tmp_path / "x.pth", "-o", tmp_path / "x.goslet")
    assert outcome.code == 0 and "--tokenizer 20B_tokenizer.json" in outcome.err
    vocabulary = shared_data / "tokenizers" / "20B_tokenizer.json"
    outcome = run("export", tmp_path / "x.pth", "-o", tmp_path / "x.goslet", "--tokenizer", vocabulary, "--force")
    assert outcome.code == 0, outcome.err
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert engine.tokenizer is not None and engine.tokenizer.kind == "hf"
        assert engine.encode("Hello world") == [12092, 1533]
        expected = engine.session().feed([12092, 1533])
        ids = list(engine.generate_tokens([12092, 1533], max_tokens=5, options=goslet.SamplingOptions(temperature=0)))
        assert ids[0] == int(expected.argmax())
    outcome = run("run", tmp_path / "x.goslet", "-p", "Hello world", "-n", "5", "--temperature", "0", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
