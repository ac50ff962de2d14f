"""The C readers of engine and state files: what Python writes they read, and what Python refuses they refuse."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet.container import Section, read_container, write_container
from goslet.enginefile import EngineFile, TensorSource, write_engine
from goslet.errors import ContainerError, HeaderError, NewerVersionError, UnknownFeatureError
from goslet.spec import ModelSpec, StateSpec, StateTensor
from goslet.state import STATE_FILE_MAGIC, STATE_FILE_VERSION
from goslet.weights import WeightFormat, encode

from .attacks import CONTAINER_ATTACKS, ENGINE_ATTACKS, PREFIX, header_length, with_raw_header
from .capi import (
    BAD_FILE,
    CANNOT_READ,
    CANNOT_WRITE,
    MISMATCH,
    NOT_FINITE,
    OK,
    TOKENS,
    UNSUPPORTED,
    CEngine,
    assert_close,
    refusal,
)
from .chat_templates import BAD, GOOD
from .rewriting import rewritten

# -------------------------------------------------------------------------------------------------------------- states


def state_of(path: Path) -> tuple[Any, bytes]:
    with read_container(path, magic=STATE_FILE_MAGIC, version=STATE_FILE_VERSION, kind="state file") as container:
        header = {key: container.header[key] for key in ("model_id", "tokens_seen", "state", "required_features")}
        return header, bytes(container.section("state"))


def test_states_go_from_c_to_python(c_engine: CEngine, ort_engine: goslet.Engine, tmp_path: Path) -> None:
    session = c_engine.session()
    session.feed(TOKENS[:100])
    assert session.save(tmp_path / "c.state") == OK
    restored = ort_engine.session()
    restored.load(tmp_path / "c.state")
    assert restored.tokens_seen == 100
    restored.save(tmp_path / "python.state")
    assert state_of(tmp_path / "python.state") == state_of(tmp_path / "c.state")
    assert_close(session.feed(TOKENS[100:]), restored.feed(TOKENS[100:]))
    assert sorted(os.listdir(tmp_path)) == ["c.state", "python.state"]


def test_states_go_from_python_to_c(c_engine: CEngine, ort_engine: goslet.Engine, tmp_path: Path) -> None:
    session = ort_engine.session()
    session.feed(TOKENS[:100])
    session.save(tmp_path / "python.state")
    restored = c_engine.session()
    assert restored.load(tmp_path / "python.state") == OK, c_engine.error
    assert restored.tokens_seen == 100
    assert restored.save(tmp_path / "c.state") == OK
    assert state_of(tmp_path / "python.state") == state_of(tmp_path / "c.state")
    assert_close(restored.feed(TOKENS[100:]), session.feed(TOKENS[100:]))


def test_a_state_that_knows_what_comes_next_goes_to_c(
    c_engine: CEngine, ort_engine: goslet.Engine, tmp_path: Path
) -> None:
    """The logits beside it are for Python; C reads the state as from any other file."""
    session, path = ort_engine.session(), tmp_path / "a.state"
    list(ort_engine.generate_tokens(TOKENS, max_tokens=3, session=session))
    session.save(path)
    size_bytes = path.stat().st_size
    twin = ort_engine.session()
    twin.load(path)
    np.testing.assert_array_equal(twin.logits, session.logits)
    loaded = c_engine.session()
    assert loaded.load(path) == OK, c_engine.error
    assert_close(loaded.feed(TOKENS), session.feed(TOKENS))
    session.save(path)  # fed by the caller, who alone has the logits
    assert path.stat().st_size < size_bytes - 4 * ort_engine.spec.vocab_size + 64


def test_states_of_others_are_refused(c_engine: CEngine, ort_engine: goslet.Engine, tmp_path: Path) -> None:
    path = tmp_path / "x.state"
    python = ort_engine.session()
    python.feed(TOKENS[:5])
    python.save(path)
    header, values = state_of(path)
    good = path.read_bytes()
    session = c_engine.session()
    expected = session.fork().feed(TOKENS[:3])

    def status(changed: dict[str, Any], content: bytes = values) -> int:
        members = {key: value for key, value in {**header, **changed}.items() if key != "required_features"}
        write_container(
            path,
            magic=STATE_FILE_MAGIC,
            version=STATE_FILE_VERSION,
            header=members,
            sections=[Section.of("state", content)],
            overwrite=True,
        )
        return session.load(path)

    assert status({"model_id": "f" * 64}) == MISMATCH
    assert "another model" in c_engine.error
    assert status({"state": {**header["state"], "layout_version": 2}}) == MISMATCH
    assert status({"state": {**header["state"], "tensors": header["state"]["tensors"][1:]}}) == MISMATCH
    assert status({"tokens_seen": -1}) == BAD_FILE
    assert status({"tokens_seen": 1.0}) == BAD_FILE
    assert status({"state": []}) == BAD_FILE
    assert status({}, values[:-4]) == BAD_FILE
    assert status({}, values[:-4] + np.float32(np.nan).tobytes()) == NOT_FINITE
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert session.load(path) == BAD_FILE
    assert session.load(tmp_path / "missing") == CANNOT_READ
    assert c_engine.error == f"{tmp_path / 'missing'}: does not exist"
    assert session.save(tmp_path / "missing" / "x.state") == CANNOT_WRITE
    # After all of these the session is still fresh.
    assert session.tokens_seen == 0
    assert np.array_equal(session.feed(TOKENS[:3]), expected)
    path.write_bytes(good)
    assert session.load(path) == OK
    assert session.tokens_seen == 5


@pytest.mark.parametrize("name", CONTAINER_ATTACKS)
def test_attack_on_a_state_file(c_engine: CEngine, ort_engine: goslet.Engine, tmp_path: Path, name: str) -> None:
    session = ort_engine.session()
    session.save(tmp_path / "x.state")
    # The attacks need two sections; what is behind the state is nobody's.
    header, values = state_of(tmp_path / "x.state")
    del header["required_features"]
    sections = [Section.of("state", values), Section.of("more", b"\r\n" + values)]
    write_container(tmp_path / "x.state", magic=STATE_FILE_MAGIC, version=STATE_FILE_VERSION, header=header,
                    sections=sections, overwrite=True)  # fmt: skip
    assert c_engine.session().load(tmp_path / "x.state") == OK, c_engine.error
    attack = CONTAINER_ATTACKS[name]
    (tmp_path / "x.state").write_bytes(attack.damage((tmp_path / "x.state").read_bytes()))
    refused = c_engine.session().load(tmp_path / "x.state")
    assert refused == (UNSUPPORTED if attack.error in (NewerVersionError, UnknownFeatureError) else BAD_FILE)


def test_saving_keeps_links_and_permissions(c_engine: CEngine, tmp_path: Path) -> None:
    session = c_engine.session()
    real = tmp_path / "real.state"
    real.write_bytes(b"old")
    real.chmod(0o640)
    (tmp_path / "link.state").symlink_to("real.state")
    assert session.save(tmp_path / "link.state") == OK
    assert (tmp_path / "link.state").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert session.load(real) == OK


# ----------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest engine that runs, with its tensors in the order that the attacks want, an int4 one first."""
    vocab_size, width, f32 = 256, 64, WeightFormat("f32")
    program = {
        "version": 3,
        "registers": {"x": width, "y": width},
        "input": ["x"],
        "steps": [
            {"op": "norm_shift", "x": "x", "norm": "norm", "eps": 1e-5, "shift": "0.shift",
             "mixes": [{"mix": "mix", "out": "y"}], "normed": None, "previous": None},
            {"op": "logits", "x": "y", "norm": "norm", "eps": 1e-5, "weight": "head"},
        ],
    }  # fmt: skip

    def source(name: str, *shape: int, fmt: WeightFormat = f32, layout: str = "rows") -> TensorSource:
        return TensorSource(name, fmt, shape, lambda: encode(np.ones(shape, np.float32), fmt, name), layout)

    path = tmp_path_factory.mktemp("good") / "good.goslet"
    write_engine(
        path,
        spec=ModelSpec("7", 1, width, 256, 16, vocab_size, 64e-5, 1e-5, {"w": 8, "a": 8, "g": 8}),
        state_spec=StateSpec((StateTensor("0.shift", (width,), "channel"),)),
        model_id="0123456789abcdef" * 4,
        graph=b"graph",
        graph_info={"opset": 21, "format": "onnx"},
        tensors=[
            # The program does not know the first two and the last, so that nothing but the reader can refuse them.
            source("spare", 5, 67, fmt=WeightFormat("int4", 32), layout="columns"),
            source("more", width),
            source("head", vocab_size, width, fmt=WeightFormat("int4", 32), layout="tiles"),
            *(source(name, width) for name in ("norm.weight", "norm.bias", "mix")),
            source("emb.weight", vocab_size, width),
            source("last", 3),
        ],
        tokenizer=("bytes", b""),
        program=json.dumps(program).encode(),
        provenance={},
        overwrite=False,
    )
    return path.read_bytes()


def test_the_engine_that_is_attacked_is_good(c_api: ctypes.CDLL, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(good)
    assert refusal(c_api, path) == OK, c_api.goslet_last_error()


@pytest.mark.parametrize("name", [*CONTAINER_ATTACKS, *ENGINE_ATTACKS])
def test_attack_on_an_engine_file(c_api: ctypes.CDLL, good: bytes, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes({**CONTAINER_ATTACKS, **ENGINE_ATTACKS}[name].damage(good))
    status = OK
    try:
        EngineFile.open(path).close()
    except (NewerVersionError, UnknownFeatureError):
        status = UNSUPPORTED
    except ContainerError:
        status = BAD_FILE
    assert refusal(c_api, path) == status


def test_what_python_refuses_c_refuses(c_api: ctypes.CDLL, good: bytes, tmp_path: Path) -> None:
    """Headers with a few changed bytes, rightly signed: mostly still JSON, with numbers, names and types changed."""
    path = tmp_path / "m.goslet"
    header = good[PREFIX.size : PREFIX.size + header_length(good)]
    choice = random.Random(5)
    refused, opened = 0, 0
    for _ in range(600):
        changed = bytearray(header)
        for _ in range(choice.randint(1, 2)):
            changed[choice.randrange(len(changed))] = choice.choice(b'0123456789abcdefst"\\{}[]:,.-eE \xc3\xa9\x00')
        path.write_bytes(with_raw_header(good, bytes(changed)))
        status = refusal(c_api, path)
        assert status in (OK, BAD_FILE, UNSUPPORTED), c_api.goslet_last_error()
        opened += status == OK
        try:
            EngineFile.open(path).close()
        except ContainerError:
            refused += 1
            assert status != OK, bytes(changed)
    # Both verdicts are seen often enough to mean something.
    assert refused > 200
    assert opened > 5


class Written:
    """What stands for a template and is written as it is."""

    is_extended = False

    def __init__(self, value: Any) -> None:
        self.value = value

    def to_json(self) -> Any:
        return self.value


@pytest.mark.parametrize("name", [*BAD, *GOOD])
def test_python_and_c_take_the_same_chat_templates(
    c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path, name: str
) -> None:
    written = Written(BAD[name] if name in BAD else GOOD[name])
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tokenizer=("bytes", b""), chat=written)
    assert refusal(c_api, path) == (BAD_FILE if name in BAD else OK)
    with pytest.raises(HeaderError, match="chat") if name in BAD else contextlib.nullcontext():
        EngineFile.open(path).close()


def test_engines_without_a_program_are_refused(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    assert refusal(c_api, rewritten(tiny_engine, tmp_path / "m.goslet", program=None)) == UNSUPPORTED
    assert "has no program" in c_api.goslet_last_error().decode()


def test_a_program_that_does_not_fit_is_refused(c_api: ctypes.CDLL, tiny_engine: Path, tmp_path: Path) -> None:
    assert refusal(c_api, rewritten(tiny_engine, tmp_path / "m.goslet", program=b"{}")) == BAD_FILE


def test_only_ordinary_files_are_opened(c_api: ctypes.CDLL, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/null")):
        assert refusal(c_api, path) == CANNOT_READ
