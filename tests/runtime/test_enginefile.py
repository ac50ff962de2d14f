"""The engine file: what is written is read, the same input gives the same bytes, and every defect has its error."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goslet import container
from goslet.enginefile import (
    ENGINE_MAGIC,
    TENSOR_ALIGNMENT_BYTES,
    EngineFile,
    TensorSource,
    write_engine,
)
from goslet.errors import (
    ChecksumError,
    ContainerError,
    HeaderError,
    InputError,
    OutputError,
    TensorValueError,
    TruncatedError,
    WrongMagicError,
)
from goslet.layouts import PackedWeight, pack, unpack
from goslet.spec import ModelSpec, StateSpec, StateTensor
from goslet.weights import EncodedWeight, WeightFormat, decode, decode_rows, encode

from .attacks import (
    CONTAINER_ATTACKS,
    ENGINE_ATTACKS,
    boundaries,
    data_start,
    flipped,
    header_of,
    section_range,
    with_raw_header,
)

SPEC = ModelSpec("7", 1, 64, 256, 16, 40, 64e-5, 1e-5, {"w": 8, "a": 8, "g": 8})
STATE = StateSpec((StateTensor("0.att_shift", (64,), "channel"), StateTensor("0.wkv", (4, 16, 16), "head,value,key")))
MODEL_ID = "0123456789abcdef" * 4
INT4 = WeightFormat("int4", 32)
SHAPES: dict[str, tuple[WeightFormat, tuple[int, ...]]] = {
    "blocks.0.att.key": (INT4, (5, 67)),
    "blocks.0.att.x_r": (WeightFormat("f32"), (64,)),
    "blocks.0.ffn.key": (WeightFormat("int8", 64), (3, 130)),
    "emb": (WeightFormat("f16"), (40, 64)),
    "head": (WeightFormat("bf16"), (40, 64)),
    "cube": (WeightFormat("f32"), (2, 3, 5)),
}
GRAPH = b"\x08\x0agraph" * 900
PROGRAM = b"program"
TOKENIZER = b"1 'a' 1\n" * 20


def made(name: str) -> EncodedWeight:
    fmt, shape = SHAPES[name]
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return encode(values, fmt, name)


LAYOUT = {"blocks.0.att.key": "columns", "blocks.0.ffn.key": "tiles", "head": "tiles"}


def sources() -> list[TensorSource]:
    return [
        TensorSource(name, fmt, shape, lambda name=name: made(name), LAYOUT.get(name, "rows"))
        for name, (fmt, shape) in SHAPES.items()
    ]


def laid(name: str) -> PackedWeight:
    return pack(made(name), LAYOUT.get(name, "rows"))


def write(path: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "spec": SPEC,
        "state_spec": STATE,
        "model_id": MODEL_ID,
        "graph": GRAPH,
        "graph_info": {"opset": 21, "format": "onnx"},
        "tensors": sources(),
        "tokenizer": ("world", TOKENIZER),
        "program": PROGRAM,
        "provenance": {"goslet": "0.1.0", "source": "modèle.pth", "recipe": {"default": "int4/32"}},
        "overwrite": False,
    }
    write_engine(path, **{**arguments, **changes})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.goslet"
    write(path)
    return path.read_bytes()


def read_everything(data: bytes) -> dict[str, Any]:
    """All that a caller can ask an engine file for, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.goslet"
        path.write_bytes(data)
        with EngineFile.open(path, check=True) as file:
            return {
                "spec": file.spec,
                "state": file.state_spec,
                "model_id": file.model_id,
                "provenance": dict(file.provenance),
                "graph_info": dict(file.graph_info),
                "graph": bytes(file.graph_bytes),
                "program": None if file.program_bytes is None else bytes(file.program_bytes),
                "tokenizer": None
                if file.tokenizer_kind is None
                else (file.tokenizer_kind, bytes(file.tokenizer_bytes)),
                "weights": {name: decode(file.weight(name)).tobytes() for name in file.tensors},
                "bits_per_weight": file.bits_per_weight,
            }


def error_of(data: bytes) -> type[ContainerError] | None:
    try:
        read_everything(data)
    except ContainerError as error:
        return type(error)
    return None


# ----------------------------------------------------------------------------------------------------- there and back


def test_reads_what_was_written(good: bytes) -> None:
    found = read_everything(good)
    assert found["spec"] == SPEC and dict(found["spec"].ranks) == {"w": 8, "a": 8, "g": 8}
    assert found["state"] == STATE
    assert found["model_id"] == MODEL_ID
    assert found["provenance"] == {"goslet": "0.1.0", "source": "modèle.pth", "recipe": {"default": "int4/32"}}
    assert found["graph_info"] == {"opset": 21, "format": "onnx"}
    assert found["graph"] == GRAPH
    assert found["program"] == PROGRAM
    assert found["tokenizer"] == ("world", TOKENIZER)
    assert found["weights"] == {name: decode(made(name)).tobytes() for name in SHAPES}


def test_bytes_are_as_documented(good: bytes) -> None:
    assert good[:8] == ENGINE_MAGIC == b"\x89GOSL\r\n\x1a"
    header = header_of(good)
    verify = {entry["name"]: entry["verify"] for entry in header["sections"]}
    assert verify == {"graph": "open", "program": "open", "weights": "check", "tokenizer": "open"}
    weights = section_range(good, "weights")
    end = 0
    for entry, name in zip(header["tensors"], SHAPES, strict=True):
        weight = laid(name)
        assert entry["layout"] == LAYOUT.get(name, "rows")
        assert (entry["name"], entry["format"], entry["group"]) == (name, weight.format.name, weight.format.group)
        parts = [("offset", "size_bytes", weight.data), ("scales_offset", "scales_size_bytes", weight.scales)]
        for offset_key, size_key, array in parts:
            if array is None:
                assert entry[offset_key] is None and entry[size_key] == 0
                continue
            offset = -(-end // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES
            assert (entry[offset_key], entry[size_key]) == (offset, array.nbytes)
            start = weights.start + offset
            assert good[start - (offset - end) : start].count(0) == offset - end
            end = offset + array.nbytes
            assert good[start : weights.start + end] == array.tobytes()
    assert end == len(weights)


def test_same_input_same_bytes(tmp_path: Path, good: bytes) -> None:
    write(tmp_path / "again.goslet")
    assert (tmp_path / "again.goslet").read_bytes() == good


def test_views_share_the_map_and_survive_closing(tmp_path: Path) -> None:
    write(tmp_path / "m.goslet")
    file = EngineFile.open(tmp_path / "m.goslet")
    weights = {name: file.packed(name) for name in file.tensors}
    graph = file.graph_bytes
    file.close()
    for name, weight in weights.items():
        for array in (weight.data, weight.scales):
            if array is not None:
                assert not array.flags.writeable and not array.flags.owndata
                assert array.ctypes.data % TENSOR_ALIGNMENT_BYTES == 0
        assert (decode(unpack(weight)) == decode(made(name))).all()
    assert bytes(graph) == GRAPH
    with pytest.raises(InputError, match="closed"):
        file.weight("emb")


def test_rows_are_gathered_from_the_map(tmp_path: Path) -> None:
    write(tmp_path / "m.goslet")
    with EngineFile.open(tmp_path / "m.goslet") as file:
        assert (decode_rows(file.weight("emb"), [39, 0]) == decode(made("emb"))[[39, 0]]).all()


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    write(path)
    with EngineFile.open(path) as file:
        assert file.size_bytes == path.stat().st_size
        assert list(file.section_sizes) == ["graph", "program", "weights", "tokenizer"]
        assert file.section_sizes["graph"] == len(GRAPH)
        assert file.section_sizes["tokenizer"] == len(TOKENIZER)
        assert file.n_weights == 5 * 67 + 64 + 3 * 130 + 40 * 64 + 40 * 64 + 2 * 3 * 5
        stored_bytes = sum(laid(name).size_bytes for name in SHAPES)
        assert file.bits_per_weight == 8 * stored_bytes / file.n_weights


def test_what_is_optional_may_be_absent(tmp_path: Path) -> None:
    write(tmp_path / "m.goslet", tokenizer=None, program=None, tensors=[], provenance={})
    with EngineFile.open(tmp_path / "m.goslet", check=True) as file:
        assert file.tokenizer_kind is None
        assert file.program_bytes is None
        assert list(file.section_sizes) == ["graph", "weights"]
        assert (dict(file.tensors), file.n_weights, file.bits_per_weight) == ({}, 0, 0)
        with pytest.raises(HeaderError, match="tokenizer: a section is missing"):
            _ = file.tokenizer_bytes


def test_an_empty_tokenizer_is_not_an_absent_one(tmp_path: Path) -> None:
    write(tmp_path / "m.goslet", tokenizer=("bytes", b""))
    with EngineFile.open(tmp_path / "m.goslet") as file:
        assert (file.tokenizer_kind, bytes(file.tokenizer_bytes)) == ("bytes", b"")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.goslet")
    with (
        EngineFile.open(tmp_path / "m.goslet") as file,
        pytest.raises(HeaderError, match=r"blocks\.9: a tensor is mis"),
    ):
        file.weight("blocks.9")


# ------------------------------------------------------------------------------------------------------------ writing


def test_tensors_are_made_one_at_a_time_and_reported(tmp_path: Path) -> None:
    alive = 0
    calls: list[tuple[str, int]] = []

    class Counted(np.ndarray):
        pass

    def produce(name: str) -> EncodedWeight:
        nonlocal alive
        assert alive == 0, "the tensor before this one is still in memory"
        assert len(calls) == list(SHAPES).index(name)
        weight = made(name)
        data = weight.data.view(Counted)
        alive += 1

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(data, gone)
        return EncodedWeight(weight.format, weight.shape, data, weight.scales)

    tensors = [TensorSource(s.name, s.format, s.shape, lambda name=s.name: produce(name), s.layout) for s in sources()]
    write(tmp_path / "m.goslet", tensors=iter(tensors), progress=lambda name, size: calls.append((name, size)))
    assert calls == [(name, laid(name).size_bytes) for name in SHAPES]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": "abc"},
        {"model_id": MODEL_ID.upper()},
        {"graph_info": {"opset": 0, "format": "onnx"}},
        {"graph_info": {"opset": 21, "format": "pickle"}},
        {"graph_info": {}},
        {"tokenizer": ("", b"")},
        {"provenance": {"loss": float("nan")}},
        {"provenance": {"path": Path("x")}},
        {"tensors": [*sources(), sources()[0]]},
        {"tensors": [sources()[0]._replace(name="")]},
        {"tensors": [sources()[0]._replace(name="a\nb")]},
        {"tensors": [sources()[0]._replace(shape=(67, 5))]},
        {"tensors": [sources()[0]._replace(shape=(335,))]},
        {"tensors": [sources()[0]._replace(format=WeightFormat("int4", 64))]},
        {"tensors": [sources()[-1]._replace(shape=(5, 3, 2))]},
        {"tensors": [sources()[3]._replace(format=WeightFormat("bf16"))]},
        {"tensors": [sources()[0]._replace(layout="diagonal")]},
        {"tensors": [sources()[1]._replace(layout="tiles")]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        write(tmp_path / "m.goslet", **changes)
    assert os.listdir(tmp_path) == []


def test_an_existing_file_needs_overwrite(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        write(path)
    assert path.read_bytes() == b"precious"
    write(path, overwrite=True)
    assert path.read_bytes() == good


def failing() -> EncodedWeight:
    return encode(np.full((5, 67), np.nan, np.float32), INT4, "blocks.0.att.key")


def interrupted() -> EncodedWeight:
    signal.raise_signal(signal.SIGINT)
    return made("blocks.0.att.key")


@pytest.mark.parametrize(("produce", "error"), [(failing, TensorValueError), (interrupted, KeyboardInterrupt)])
def test_a_failing_export_leaves_nothing(
    tmp_path: Path, produce: Callable[[], EncodedWeight], error: type[BaseException]
) -> None:
    tensors = [*sources()[1:], sources()[0]._replace(produce=produce)]
    with pytest.raises(error):
        write(tmp_path / "m.goslet", tensors=tensors)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", ENGINE_ATTACKS)
def test_attack(good: bytes, name: str) -> None:
    attack = ENGINE_ATTACKS[name]
    assert error_of(attack.damage(good)) is attack.error


@pytest.mark.parametrize("name", CONTAINER_ATTACKS)
def test_attack_on_the_container(good: bytes, name: str) -> None:
    attack = CONTAINER_ATTACKS[name]
    assert error_of(attack.damage(good)) is attack.error


@pytest.mark.parametrize("name", ["model without a width", "a tensor's size too large", "tensors missing"])
def test_errors_name_the_file_and_fit_on_a_line(tmp_path: Path, good: bytes, name: str) -> None:
    path = tmp_path / "m.goslet"
    path.write_bytes(ENGINE_ATTACKS[name].damage(good))
    with pytest.raises(ContainerError) as caught:
        EngineFile.open(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_state_file_is_not_an_engine_file(tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    container.write_container(path, magic=b"\x89GSTA\r\n\x1a", version=1, header={}, sections=[], overwrite=False)
    with pytest.raises(WrongMagicError, match="is not a goslet engine file"):
        EngineFile.open(path)


def test_engines_of_the_first_format_are_to_be_exported_again(tmp_path: Path) -> None:
    path = tmp_path / "m.goslet"
    container.write_container(path, magic=ENGINE_MAGIC, version=1, header={}, sections=[], overwrite=False)
    with pytest.raises(HeaderError, match=r"older goslet.*export the engine again"):
        EngineFile.open(path)


@pytest.mark.parametrize(
    ("index", "layout"), [(0, "diagonal"), (0, None), (0, 1), (0, "rows"), (2, "columns"), (1, "tiles"), (5, "columns")]
)
def test_layouts_that_cannot_be_are_refused(good: bytes, index: int, layout: Any) -> None:
    header = header_of(good)
    header["tensors"][index]["layout"] = layout
    assert error_of(with_raw_header(good, json.dumps(header).encode())) is HeaderError


def test_truncated_at_every_boundary(good: bytes) -> None:
    for length in boundaries(good):
        assert error_of(good[:length]) is TruncatedError, length


@pytest.mark.parametrize("name", ["graph", "program", "tokenizer"])
def test_flips_caught_at_open(tmp_path: Path, good: bytes, name: str) -> None:
    path = tmp_path / "m.goslet"
    place = section_range(good, name)
    for offset in (place[0], place[len(place) // 2], place[-1]):
        path.write_bytes(flipped(good, offset, bit=7))
        with pytest.raises(ChecksumError, match=f"section {name}"):
            EngineFile.open(path)


def test_flips_in_weights_are_caught_by_check(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.goslet"
    place = section_range(good, "weights")
    gap = place.start + header_of(good)["tensors"][0]["size_bytes"]  # padding between tensors counts too
    for offset in (place[0], gap, place[len(place) // 2], place[-1]):
        path.write_bytes(flipped(good, offset, bit=3))
        with EngineFile.open(path) as file:
            assert file.spec == SPEC, "opening does not read the weights"
            with pytest.raises(ChecksumError, match="section weights"):
                file.check()
        with pytest.raises(ChecksumError, match="section weights"):
            EngineFile.open(path, check=True)


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = container.Container._verify
    monkeypatch.setattr(container.Container, "_verify", lambda self, name: (hashed.append(name), real(self, name))[1])
    write(tmp_path / "m.goslet")
    EngineFile.open(tmp_path / "m.goslet").close()
    assert hashed == ["graph", "program", "tokenizer"]


@settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 60))
def test_random_damage_gives_a_typed_error_or_an_equal_file(good: bytes, seed: int) -> None:
    bits = random.Random(seed)
    data = bytearray(good)
    for _ in range(bits.randint(1, 3)):
        offset = bits.randrange(len(data)) if bits.random() < 0.5 else bits.randrange(min(len(data), data_start(good)))
        if bits.random() < 0.7:
            data[offset] ^= bits.randrange(256)
        else:
            del data[offset : offset + bits.choice([1, 8, 4096, len(data)])]
        if not data:
            break
    if data == good:
        assert read_everything(bytes(data)) == read_everything(good)
    else:
        assert error_of(bytes(data)) is not None


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from places(below)


NUMBERS = [0, 1, -1, 32, 64, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e300]
TEXTS = ["", "x", "\0", "é" * 300, "open", "int4", "f32", "graph"]
LISTS: list[Any] = [[], [[]], [0], [1, 1], [1 << 40, 1 << 40]]
JSON_VALUES: list[Any] = [None, True, False, {}, {"x": 1}, *NUMBERS, *TEXTS, *LISTS]


@settings(
    deadline=None, derandomize=True, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 60))
def test_signed_headers_of_any_content_give_a_typed_error_or_a_whole_engine(good: bytes, seed: int) -> None:
    """Checksums keep accidents out; this is the header of somebody who can compute them."""
    bits = random.Random(seed)
    header = header_of(good)
    for _ in range(bits.randint(1, 3)):
        place, key = bits.choice(list(places(header)))
        what = bits.random()
        if what < 0.6:
            place[key] = copy.deepcopy(bits.choice(JSON_VALUES))
        elif what < 0.8:
            del place[key]
        elif isinstance(place, list):
            place.insert(key, copy.deepcopy(place[key]))
        else:
            place[f"{key}2"] = place.pop(key)
    data = with_raw_header(good, json.dumps(header).encode())
    try:
        found = read_everything(data)
    except ContainerError as error:
        assert error.file is not None
        return
    assert found["graph"] == GRAPH and set(found["weights"]) <= {*SHAPES, *map(str, JSON_VALUES)}


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a b", "ü", "x" * 201])
def test_a_tensors_name_is_a_file_name(name: str, tmp_path: Path) -> None:
    """Backends may write a weight to a file under its name; an engine must not choose where that file lies."""
    source = sources()[0]._replace(name=name)
    with pytest.raises(InputError):
        write(tmp_path / "m.goslet", tensors=[source])


@pytest.mark.parametrize(
    ("start", "words"),
    [(b"PK\x03\x04", "a checkpoint"), (b"GGUF\x03\0\0\0", "a GGUF"), (b"GOSLPLAN", "a goslet TensorRT plan")],
)
def test_a_file_of_another_kind_is_called_by_its_name(start: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(start + bytes(100))
    with pytest.raises(WrongMagicError, match=words):
        EngineFile.open(tmp_path / "x")
