"""Tuned initial states, for 5 and 6 against PyPI's rwkv, which takes them inside a checkpoint."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet import enginefile  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    CheckpointError,
    ChecksumError,
    HeaderError,
    InputError,
    MissingTensorError,
    StateError,
    StateMismatchError,
    TensorShapeError,
    TensorValueError,
)
from goslet.export import export_engine  # noqa: E402
from goslet.export.oracles import ORACLES, run_program  # noqa: E402
from goslet.export.tuned_state import read_tuned_state  # noqa: E402

from .capi import BAD_FILE, NOT_FINITE, OK, CEngine, refusal  # noqa: E402
from .command_line import Run  # noqa: E402
from .rewriting import rewritten  # noqa: E402

SHAPE = {"n_layer": 2, "n_embd": 48, "head_size": 16, "vocab_size": 256}
MODELS = {
    "5.2": random_rwkv5("5.2", **SHAPE, seed=3),
    "6": random_rwkv6(**SHAPE, rank_mix=8, rank_decay=8, seed=3),
}
SEVEN = random_rwkv7(**SHAPE, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3)


def tuned(seed: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{layer}.att.time_state": torch.randn(3, 16, 16, generator=generator) for layer in range(2)}


@pytest.mark.parametrize("version", MODELS)
def test_a_session_from_a_tuned_state_equals_pypi_rwkv(version: str, tmp_path: Path) -> None:
    pytest.importorskip("rwkv", reason="PyPI's rwkv is the oracle here")
    save(tuned(), tmp_path / "state.pth")
    save(MODELS[version], tmp_path / "x.pth")
    save({**MODELS[version], **tuned()}, tmp_path / "both.pth")
    tokens = np.random.default_rng(3).integers(0, 256, (1, 30))
    np.save(tmp_path / "tokens.npy", tokens)
    run_program(ORACLES["rwkv"], version, tmp_path / "tokens.npy", tmp_path / "out.npz", [tmp_path / "both.pth"])
    expected = np.load(tmp_path / "out.npz")["logits_0"]
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    for backend in ("ort", "native"):
        with goslet.open(tmp_path / "x.goslet", backend=backend, threads=1) as engine:
            session = engine.session()
            fresh = session.feed(tokens[0], all_logits=True)
            session.reset(read_tuned_state(tmp_path / "state.pth", engine.spec))
            assert session.tokens_seen == 0
            found = session.feed(tokens[0], all_logits=True)
        assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max()
        assert np.abs(fresh - expected).max() > 1e-2 * np.abs(expected).max(), "the state must matter"


def test_a_tuned_state_of_version_7_is_taken_as_it_lies(tmp_path: Path) -> None:
    """rwkv takes none for 7. Its trainer holds [head, value, key], as our state is, and RWKV-Runner turns nothing."""
    save(SEVEN, tmp_path / "x.pth")
    save(tuned(), tmp_path / "state.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert next(t.axes for t in engine.state_spec.tensors if t.name == "0.wkv") == "head,value,key"
        session = engine.session()
        session.reset(read_tuned_state(tmp_path / "state.pth", engine.spec))
        for layer in range(2):
            expected = tuned()[f"blocks.{layer}.att.time_state"].numpy()
            np.testing.assert_array_equal(session.state.front[f"{layer}.wkv"], expected)
            assert not session.state.front[f"{layer}.att_shift"].any()


def test_run_begins_with_a_tuned_state(run: Run, tmp_path: Path) -> None:
    save(SEVEN, tmp_path / "x.pth")
    save(tuned(), tmp_path / "state.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    words = ("run", tmp_path / "x.goslet", "--tokens", "1,2,3", "-n", "12", "--temperature", "0", "--quiet")
    fresh = run(*words)
    begun = run(*words, "--state-in", tmp_path / "state.pth", "--state-out", tmp_path / "after.state")
    assert (fresh.code, begun.code) == (0, 0)
    assert begun.out != fresh.out
    with goslet.open(tmp_path / "x.goslet") as engine:
        session = engine.session()
        session.load(tmp_path / "after.state")
        assert session.tokens_seen == 3 + 12


def test_a_tuned_state_goes_in_from_every_container_and_what_was_guessed_is_said(run: Run, tmp_path: Path) -> None:
    """In `run` and in `export`; what begins as a state file of ours does goes on as one, whatever it is called."""
    from safetensors.torch import save_file

    half = {name: tensor.half() for name, tensor in tuned().items()}
    save(SEVEN, tmp_path / "x.pth")
    torch.save({name: tensor.float() for name, tensor in half.items()}, tmp_path / "state.pth")
    torch.save(half, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file({name: tensor.float() for name, tensor in half.items()}, tmp_path / "state.safetensors")
    save_file({name: tensor.transpose(1, 2).contiguous() for name, tensor in half.items()}, tmp_path / "state.st")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    words = ("run", tmp_path / "x.goslet", "--tokens", "1,2,3", "-n", "12", "--temperature", "0")
    expected = run(*words, "--state-in", tmp_path / "state.pth", "--state-out", tmp_path / "kept.safetensors")
    assert expected.code == 0 and "turned" not in expected.err
    for name in ("old.bin", "state.safetensors", "state.st"):
        begun = run(*words, "--state-in", tmp_path / name)
        assert (begun.code, begun.out) == (0, expected.out), name
        assert ("turned back" in begun.err) == (name == "state.st")
    assert run(*words, "--state-in", tmp_path / "kept.safetensors").code == 0
    made = run(
        "export", tmp_path / "x.pth", "-o", tmp_path / "y.goslet", "--quant", "f32", "--state", tmp_path / "state.st"
    )
    assert made.code == 0 and "turned back" in made.err
    assert run(*(words[0], tmp_path / "y.goslet", *words[2:])).out == expected.out


def test_files_that_are_no_state_of_the_model(run: Run, tmp_path: Path) -> None:
    save(SEVEN, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    whole = tuned()
    nan = {name: tensor.clone() for name, tensor in whole.items()}
    nan["blocks.1.att.time_state"][0, 0, 0] = float("nan")
    bad: dict[str, tuple[dict[str, torch.Tensor], type[CheckpointError]]] = {
        "one layer": ({"blocks.0.att.time_state": whole["blocks.0.att.time_state"]}, MissingTensorError),
        "a model": (SEVEN, MissingTensorError),
        "more layers": ({**whole, "blocks.2.att.time_state": torch.zeros(3, 16, 16)}, CheckpointError),
        "other heads": ({name: torch.zeros(6, 8, 8) for name in whole}, TensorShapeError),
        "not finite": (nan, TensorValueError),
    }
    with goslet.open(tmp_path / "x.goslet") as engine:
        for tensors, error in bad.values():
            save(tensors, tmp_path / "bad.pth")
            with pytest.raises(error, match=r"bad\.pth"):
                read_tuned_state(tmp_path / "bad.pth", engine.spec)
        with pytest.raises(CheckpointError, match="no file"):
            read_tuned_state(tmp_path / "absent.pth", engine.spec)
        session = engine.session()
        session.feed([1, 2, 3])
        before = {name: view.copy() for name, view in session.state.front.items()}
        for initial, refused in (
            ({"9.wkv": np.zeros((3, 16, 16), np.float32)}, StateMismatchError),
            ({"0.wkv": np.zeros((16, 16), np.float32)}, StateMismatchError),
            ({"0.wkv": np.full((3, 16, 16), np.inf, np.float32)}, StateError),
        ):
            with pytest.raises(refused):
                session.reset(initial)
        assert session.tokens_seen == 3
        for name, view in session.state.front.items():
            np.testing.assert_array_equal(view, before[name])
    outcome = run("run", tmp_path / "x.goslet", "--tokens", "1", "--state-in", tmp_path / "bad.pth")
    assert outcome.code == 1 and "bad.pth" in outcome.err and outcome.out == ""


@pytest.mark.parametrize("version", ["6", "7"])
def test_an_engine_carries_a_tuned_state(version: str, run: Run, c_api: ctypes.CDLL, tmp_path: Path) -> None:
    save(SEVEN if version == "7" else MODELS[version], tmp_path / "x.pth")
    save(tuned(), tmp_path / "state.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "plain.goslet", quant="f32")
    path = tmp_path / "tuned.goslet"
    outcome = run("export", tmp_path / "x.pth", "-o", path, "--quant", "f32", "--state", tmp_path / "state.pth")
    assert outcome.code == 0, outcome.err
    with goslet.open(tmp_path / "plain.goslet") as plain:
        session = plain.session()
        untuned = session.fork().feed([1, 2, 3])
        session.reset(read_tuned_state(tmp_path / "state.pth", plain.spec))
        begun = session.fork()
        begun.save(tmp_path / "begun.state")
        expected = session.feed([1, 2, 3])
        assert np.abs(expected - untuned).max() > 1e-3
    for backend in ("ort", "native"):
        with goslet.open(path, backend=backend, threads=1) as engine:
            session = engine.session()
            limit = 0 if backend == "native" else 3e-5 * np.abs(expected).max()
            for again in (session, session.fork(), engine.session()):
                assert again.tokens_seen == 0
                assert np.abs(again.feed([1, 2, 3]) - expected).max() <= limit
            session.reset()
            assert np.abs(session.feed([1, 2, 3]) - expected).max() <= limit
            session.reset({"0.wkv": np.zeros((3, 16, 16), np.float32)})
            tuned_layer = read_tuned_state(tmp_path / "state.pth", engine.spec)["1.wkv"]
            np.testing.assert_array_equal(session.state.front["1.wkv"], tuned_layer)
            assert not session.state.front["0.wkv"].any()
            # States go between the two engines: it is one model.
            session.load(tmp_path / "begun.state")
            assert np.abs(session.feed([1, 2, 3]) - expected).max() <= limit
    c_engine = CEngine(c_api, path)
    c_session = c_engine.session()
    np.testing.assert_array_equal(c_session.feed([1, 2, 3]), expected)
    assert c_api.goslet_session_reset(c_session.handle) == OK
    np.testing.assert_array_equal(c_session.feed([1, 2, 3]), expected)
    np.testing.assert_array_equal(c_engine.session().feed([1, 2, 3]), expected)
    verified = run("verify", path, tmp_path / "x.pth")
    assert verified.code == 0, verified.out
    assert "state.pth" in run("inspect", path).out
    damaged = bytearray(path.read_bytes())
    with EngineFile.open(path) as file:
        assert file.section_sizes["state"] == file.state_spec.size_bytes
    damaged[-1] ^= 1
    (tmp_path / "damaged.goslet").write_bytes(damaged)
    with pytest.raises(ChecksumError, match="section state"):
        EngineFile.open(tmp_path / "damaged.goslet")


def test_initial_states_that_no_engine_can_have(
    c_api: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well formed files whose state is cut or not finite, which only the reader of that section can find."""
    save(SEVEN, tmp_path / "x.pth")
    save(tuned(), tmp_path / "state.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32", state=tmp_path / "state.pth")
    with EngineFile.open(tmp_path / "x.goslet") as file:
        whole = {name: values.copy() for name, values in (file.initial_state or {}).items()}
    state_bytes = enginefile._state_bytes
    for name, change in {"cut": lambda data: data[:-4], "nan": lambda data: data[:-4] + b"\xff\xff\xff\xff"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(enginefile, "_state_bytes", lambda *args, c=change: c(state_bytes(*args)))
            rewritten(tmp_path / "x.goslet", tmp_path / f"{name}.goslet")
        with pytest.raises(HeaderError, match="section state"):
            goslet.open(tmp_path / f"{name}.goslet")
        assert refusal(c_api, tmp_path / f"{name}.goslet") == (BAD_FILE if name == "cut" else NOT_FINITE)
    for wrong in ({}, {**whole, "0.wkv": whole["0.wkv"][:1]}, {**whole, "0.wkv": whole["0.wkv"] * np.float32(np.nan)}):
        with pytest.raises(InputError, match="initial_state"):
            rewritten(tmp_path / "x.goslet", tmp_path / "never.goslet", initial_state=wrong)
        assert not (tmp_path / "never.goslet").exists()


def test_export_refuses_a_state_of_another_model_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    save(SEVEN, tmp_path / "x.pth")
    save({name: torch.zeros(6, 8, 8) for name in tuned()}, tmp_path / "state.pth")
    outcome = run("export", tmp_path / "x.pth", "-o", tmp_path / "x.goslet", "--state", tmp_path / "state.pth")
    assert outcome.code == 1 and "state.pth" in outcome.err and "another model" in outcome.err
    assert not (tmp_path / "x.goslet").exists()
    outcome = run(
        "export", tmp_path / "x.pth", "-o", tmp_path / "state.pth", "--state", tmp_path / "state.pth", "--force"
    )
    assert outcome.code == 1 and "is also the state" in outcome.err


def test_version_4_has_no_matrix_to_tune(tmp_path: Path) -> None:
    save(random_rwkv4(n_layer=2, n_embd=48, vocab_size=256), tmp_path / "x.pth")
    save(tuned(), tmp_path / "state.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32")
    with goslet.open(tmp_path / "x.goslet") as engine, pytest.raises(CheckpointError, match="RWKV-4"):
        read_tuned_state(tmp_path / "state.pth", engine.spec)
