"""Python and C read engine and state files by readers of their own: whatever the file says, both take it or neither."""

from __future__ import annotations

import copy
import ctypes
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import goslet
from goslet.chat import BUILT_IN
from goslet.enginefile import TensorSource, write_engine
from goslet.errors import GosletError
from goslet.spec import ModelSpec, StateSpec, StateTensor
from goslet.weights import PLACES, EncodedWeight, WeightFormat, encode

from .attacks import PREFIX, header_length, header_of, with_raw_header
from .capi import OK, CEngine, refusal

EXAMPLES = 300
VOCAB_SIZE, WIDTH = 256, 32
Refuses = Callable[[bytes], tuple[bool, bool]]


@pytest.fixture(scope="module")
def engine_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest engine that has everything which a header can speak of."""
    f32, int4 = WeightFormat("f32"), WeightFormat("int4", 32)
    program = {
        "version": 3,
        "registers": {"x": WIDTH, "y": WIDTH},
        "input": ["x"],
        "steps": [
            {"op": "norm_shift", "x": "x", "norm": "norm", "eps": 1e-5, "shift": "0.shift",
             "mixes": [{"mix": "mix", "out": "y"}], "normed": None, "previous": None},
            {"op": "logits", "x": "y", "norm": "norm", "eps": 1e-5, "weight": "head"},
        ],
    }  # fmt: skip

    def source(name: str, *shape: int, fmt: WeightFormat = f32, layout: str = "rows") -> TensorSource:
        return TensorSource(name, fmt, shape, lambda: encode(np.ones(shape, np.float32), fmt, name), layout)

    places = EncodedWeight(WeightFormat(PLACES), (2,), np.array([0, 1], "<u2").view(np.uint8), None)
    path = tmp_path_factory.mktemp("smallest") / "m.goslet"
    write_engine(
        path,
        spec=ModelSpec("7", 1, WIDTH, 64, 16, VOCAB_SIZE, 64e-5, 1e-5, {"w": 8, "a": 8}),
        state_spec=StateSpec((StateTensor("0.shift", (WIDTH,), "channel", 0.5),)),
        model_id="0123456789abcdef" * 4,
        graph=b"graph",
        graph_info={"opset": 21, "format": "onnx"},
        tensors=[
            source("spare", 5, 67, fmt=int4, layout="columns"),
            TensorSource("spare.kept_inputs", WeightFormat(PLACES), (2,), lambda: places),
            source("head", VOCAB_SIZE, WIDTH, fmt=int4, layout="tiles"),
            *(source(name, WIDTH) for name in ("norm.weight", "norm.bias", "mix")),
            source("emb.weight", VOCAB_SIZE, WIDTH),
        ],
        tokenizer=("bytes", b""),
        program=json.dumps(program).encode(),
        provenance={"quant": "int4", "notes": ["é", 1.5, None]},
        overwrite=False,
        initial_state={"0.shift": np.ones(WIDTH, np.float32)},
        chat=BUILT_IN["world"],
    )
    return path.read_bytes()


@pytest.fixture(scope="module")
def engine_refused(c_api: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Refuses:
    """Whether Python and C refuse an engine file."""
    path = tmp_path_factory.mktemp("engine") / "m.goslet"

    def refused(data: bytes) -> tuple[bool, bool]:
        path.write_bytes(data)
        try:
            goslet.open(path, threads=1).close()
        except GosletError:
            return True, refusal(c_api, path) != OK
        return False, refusal(c_api, path) != OK

    return refused


@pytest.fixture(scope="module")
def state_bytes(engine_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("state")
    (folder / "m.goslet").write_bytes(engine_bytes)
    with goslet.open(folder / "m.goslet", threads=1) as engine:
        session = engine.session()
        session.feed([1, 2, 3])
        session.save(folder / "x.state")
    return (folder / "x.state").read_bytes()


@pytest.fixture(scope="module")
def state_refused(
    c_api: ctypes.CDLL, engine_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Refuses]:
    """Whether Python and C refuse a state file."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "m.goslet").write_bytes(engine_bytes)
    path = folder / "x.state"
    in_c = CEngine(c_api, folder / "m.goslet")
    with goslet.open(folder / "m.goslet", threads=1) as engine:

        def refused(data: bytes) -> tuple[bool, bool]:
            path.write_bytes(data)
            session, c_session = engine.session(), in_c.session()
            c_status = c_session.load(path)
            try:
                session.load(path)
            except GosletError:
                return True, c_status != OK
            finally:
                seen = c_session.tokens_seen
                c_session.free()
            assert c_status != OK or seen == session.tokens_seen
            return False, c_status != OK

        yield refused
    in_c.close()


# ----------------------------------------------------------------------------------------------------------- mutations

NUMBERS = (
    *("0", "-0", "0.0", "-0.0", "1", "1.0", "1e0", "1E+0", "10e-1", "01", "+1", ".5", "1.", "0x10", "1_0", "-", "-1"),
    *("3.4028235e38", "3.4028235677973366e38", "3.4028236e38", "1e39", "1e300", "1e308", "1e309", "1e400", "-1e400"),
    *("1e-45", "1e-46", "1e-300", "1e-320", "1e-400", "NaN", "Infinity", "-Infinity", "1e", "1e+", "0e0", "0E-0"),
    *("9007199254740993", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("-9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 38, "9" * 39, "9" * 40),
    *("9" * 41, "-" + "9" * 39, "-" + "9" * 40, "0." + "9" * 38, "0." + "9" * 39, "1e00000000000000001", "1048576"),
    *("1048577", "16777216", "16777217", "65536", "65537", "1024", "1025", "2", "3", "4", "32", "64", "true", "null"),
)
TEXTS = (
    *('""', '"x"', '"f32"', '"f16"', '"int4"', '"int3"', '"u16"', '"rows"', '"tiles"', '"columns"', '"open"'),
    *('"check"', '"bytes"', '"hf"', '"world"', '"sentence"', '"../up"', '"a b"', '"graph"', '"onnx"', '"float32"'),
    *('"{}"', '"a{}"', '"\\u0061"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\uD83D"', '"\\u00zz"'),
    *('"\\u+123"', '"\\x41"', '"\\/"', '"\\b"', '"\x7f"', '"\x1f"', '"\\u0000"', '"a\\n"', '"é"', '"\u2028"', "'x'"),
    *('"' + "a" * 200 + '"', '"' + "a" * 201 + '"', '"' + "0" * 64 + '"', '"' + "A" * 64 + '"', '"\\"', '"residuals"'),
    '"telepathy"',
)
OTHERS = (
    *("[]", "{}", "[[]]", '{"a":1}', '{"a":1,"a":1}', '{"a":1,"\\u0061":1}', "[1,]", "{,}", '{"a":}', "[1 2]", "nul"),
    *("[" * 60 + "]" * 60, "[" * 61 + "]" * 61, "[" * 62 + "]" * 62, "[" * 63 + "]" * 63, "[" * 64 + "]" * 64),
    *('{"a":' * n + "1" + "}" * n for n in (59, 60, 61, 62, 63, 64, 65)),
    *("[1,2]", "[32]", "[64]", "[1048576]", "[1,1,1,1]", "[1,1,1,1,1]", '["residuals"]', '["int3","int3"]', "false"),
)  # fmt: skip
LITERAL = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null')
BYTES = b'019aef"\\{}[]:,.-+ \t\n\r\x00\x0b\x7f\x80\xc3\xff'
PIECES = (*NUMBERS, *TEXTS, *OTHERS)


def changed_text(header: bytes, data: st.DataObject) -> bytes:
    """A literal replaced by another, bytes replaced, a piece doubled, cut out or put in."""
    places = [found.span() for found in LITERAL.finditer(header)]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        kind = data.draw(st.sampled_from(["literal"] * 6 + ["bytes", "bytes", "cut", "double", "insert"]))
        if kind == "literal":
            begin, end = data.draw(st.sampled_from(places))
            header = header[:begin] + data.draw(st.sampled_from(PIECES)).encode() + header[end:]
            places = [found.span() for found in LITERAL.finditer(header)] or [(0, 0)]
            continue
        begin = data.draw(st.integers(0, max(0, len(header) - 1)))
        if kind == "bytes":
            put = data.draw(
                st.sampled_from([bytes([byte]) for byte in b'019aef"\\{}[]:,.-+ \t\n\r\x00\x0b\x7f\x80\xc3\xff'])
            )
            header = header[:begin] + put + header[begin + 1 :]
        elif kind == "insert":
            piece = data.draw(st.sampled_from([*PIECES, " ", "\n", "\ufeff", "\u00a0", "\x00", "//", "/**/", ","]))
            header = header[:begin] + piece.encode() + header[begin:]
        else:
            end = begin + data.draw(st.integers(1, 30))
            header = header[:begin] + header[begin:end] * (0 if kind == "cut" else 2) + header[end:]
        places = [found.span() for found in LITERAL.finditer(header)] or [(0, 0)]
    return header


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def changed_json(header: Any, data: st.DataObject) -> bytes:
    """A member removed, doubled, moved to another place, or given another one's value."""
    made = copy.deepcopy(header)
    for _ in range(data.draw(st.sampled_from([1, 1, 2]))):
        filled = [value for value in containers(made) if value]
        if not filled:
            break
        at = data.draw(st.sampled_from(filled))
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        other = data.draw(st.sampled_from(filled))
        value = copy.deepcopy(data.draw(st.sampled_from(list(other.values()) if isinstance(other, dict) else other)))
        act = data.draw(st.sampled_from(["remove", "take", "add", "reverse"]))
        if act == "remove":
            del at[key]
        elif act == "take":
            at[key] = value
        elif act == "add" and isinstance(at, dict):
            at[data.draw(st.sampled_from(["x", "s", "note", "é", "", "\x00", "modes", "sampling", "tools"]))] = value
        elif act == "add":
            at.insert(key, value)
        elif isinstance(at, list):
            at.reverse()
    separators = data.draw(st.sampled_from([(",", ":"), (", ", " : "), (",\r\n", ":\t")]))
    return json.dumps(made, ensure_ascii=data.draw(st.booleans()), separators=separators).encode()


def changed(good: bytes, data: st.DataObject) -> bytes:
    header = good[PREFIX.size : PREFIX.size + header_length(good)]
    if data.draw(st.booleans()):
        return with_raw_header(good, changed_text(header, data))
    return with_raw_header(good, changed_json(json.loads(header), data))


RELAXED = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@RELAXED
@given(data=st.data())
def test_an_engine_is_taken_by_both_or_neither(
    engine_refused: Refuses, engine_bytes: bytes, data: st.DataObject
) -> None:
    file = changed(engine_bytes, data)
    python, c = engine_refused(file)
    assert python == c, file[PREFIX.size : PREFIX.size + header_length(file)]


@RELAXED
@given(data=st.data())
def test_a_state_is_taken_by_both_or_neither(state_refused: Refuses, state_bytes: bytes, data: st.DataObject) -> None:
    file = changed(state_bytes, data)
    python, c = state_refused(file)
    assert python == c, file[PREFIX.size : PREFIX.size + header_length(file)]


# ---------------------------------------------------------------------------------------------------- what was found so


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        at = header
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth > 1 else []


# What the readers once disagreed about, and whether both refuse it now.
ENGINES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "nothing": (lambda header: None, False),
    "init of 1e300": (put("state", "tensors", 0, "init", value=1e300), True),
    "init a little too large": (put("state", "tensors", 0, "init", value=3.4028235677973366e38), True),
    "init as large as it may be": (put("state", "tensors", 0, "init", value=3.4028234663852886e38), False),
    "init of an integer of 39 digits": (put("state", "tensors", 0, "init", value=10**39), True),
    "provenance nested 100 deep": (put("provenance", value={"a": nested(100)}), True),
    "provenance nested 62 deep": (put("provenance", "a", value=nested(62)), False),
    "provenance nested 63 deep": (put("provenance", "a", value=nested(63)), True),
    "a text of many commas": (put("provenance", "a", value="," * (1 << 20)), True),
    "an opset of 2^63": (put("graph", "opset", value=1 << 63), True),
    "an opset of 2^31": (put("graph", "opset", value=1 << 31), True),
    "a state of 4 GiB and more": (put("state", "tensors", 0, "shape", value=[1 << 20, 1 << 10, 2]), True),
    "a tokenizer of an unknown kind": (put("tokenizer", "kind", value="sentence"), True),
    "places by another name": (put("tensors", 1, "name", value="spare.kept"), True),
    "weights by the name of places": (put("tensors", 3, "name", value="norm.kept_inputs"), True),
    "chat without an end": (lambda header: header["chat"].pop("end"), True),
    "chat with a text too long": (put("chat", "user", value="{}" + "a" * 1000), True),
    "chat with a mode of another name": (put("chat", "modes", value={"A": {"ask": "", "open": ""}}), True),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_the_readers_disagreed_about(engine_refused: Refuses, engine_bytes: bytes, name: str) -> None:
    edit, refused = ENGINES[name]
    header = header_of(engine_bytes)
    edit(header)
    encoded = json.dumps(header).encode()
    # The sections move with the header's pages, which is not what is tried here.
    file = with_raw_header(engine_bytes, encoded)
    assert engine_refused(file) == (refused, refused)


STATES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "nothing": (lambda header: None, False),
    "a count of 2^63 - 1": (put("tokens_seen", value=(1 << 63) - 1), False),
    "a count of 2^63": (put("tokens_seen", value=1 << 63), True),
    "another member nested 100 deep": (put("more", value=nested(100)), True),
    "init of 1e300": (put("state", "tensors", 0, "init", value=1e300), True),
    "init as an integer": (put("state", "tensors", 0, "init", value=1), True),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_the_readers_disagreed_about(state_refused: Refuses, state_bytes: bytes, name: str) -> None:
    edit, refused = STATES[name]
    header = header_of(state_bytes)
    edit(header)
    assert state_refused(with_raw_header(state_bytes, json.dumps(header).encode())) == (refused, refused)
