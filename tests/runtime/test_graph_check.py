"""Graphs that would read other people's files, run for ever or bring weights of their own are refused unrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import goslet
from goslet.enginefile import EngineFile, TensorSource
from goslet.errors import BackendError, HeaderError
from goslet.graph_check import (
    MAX_GRAPH_BYTES,
    MAX_NODES,
    OPERATORS,
    check_step_graph,
)
from goslet.initializers import Initializer, expected_initializers, graph_initializers
from goslet.spec import EMBEDDING
from goslet.weights import WeightFormat, encode

from .rewriting import rewritten

pytest.importorskip("torch", reason="exporting the test's engines needs torch")
onnx = pytest.importorskip("onnx", reason="hostile graphs are made with onnx")

from onnx import ModelProto, NodeProto, TensorProto  # noqa: E402

from .hostile_graphs import HOSTILE, LEAKS, OPSET, VICTIM, embedded_weights, endless_loop, external  # noqa: E402

SECRET = b"SECRET-" * 60


class Step(NamedTuple):
    """A sound graph, and what its engine's header says about it."""

    graph: bytes
    initializers: dict[str, Initializer]


@pytest.fixture(scope="module")
def step(tiny_engines: dict[str, Path]) -> Step:
    with EngineFile.open(tiny_engines["int4"]) as file:
        return Step(bytes(file.graph_bytes), expected_initializers(file))


def check(step: Step, graph: bytes, opset: int = OPSET) -> None:
    check_step_graph(graph, step.initializers, opset, "x.goslet")


# --------------------------------------------------------------------------------------------------------- sound graphs


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "int8", "int4", "int3"])
def test_what_the_exporter_writes_passes(quant: str, tiny_engines: dict[str, Path]) -> None:
    with EngineFile.open(tiny_engines[quant]) as file:
        content = bytes(file.graph_bytes)
        graph = file.graph_bytes
        assert content == check_step_graph(graph, expected_initializers(file), file.graph_info["opset"], file.path)


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4", "int3"])
def test_the_header_tells_how_long_initializers_are(quant: str, tiny_engines: dict[str, Path]) -> None:
    with EngineFile.open(tiny_engines[quant]) as file:
        told = {name: initializer.size_bytes for name, initializer in expected_initializers(file).items()}
        assert told == {name: buffer.nbytes for name, buffer in graph_initializers(file).items()}


def test_packed_and_unpacked_shapes_are_the_same(step: Step) -> None:
    model = ModelProto.FromString(step.graph)
    head = next(value for value in model.graph.initializer if value.name == "head.weight")
    packed = with_initializer(step, "head.weight", field(1, b"".join(varint(size) for size in head.dims)))
    check(step, packed)
    wrong = with_initializer(step, "head.weight", field(1, b"".join(varint(size + 1) for size in head.dims)))
    with pytest.raises(BackendError, match=r"initializer head\.weight.*is not what the header's tensor becomes"):
        check(step, wrong)


def test_comments_are_passed_over(step: Step) -> None:
    model = ModelProto.FromString(step.graph)
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "a remark"
    model.graph.node[0].metadata_props.add(key="a", value="b")
    del model.graph.value_info[:]
    check(step, model.SerializeToString())


# ------------------------------------------------------------------------------------------------------- hostile graphs


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to ONNX Runtime; nothing of it is run."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="engines are opened with ONNX Runtime")
    given: list[object] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, *_, **__: given.append(model))
    return given


@pytest.mark.parametrize("location", ["secret.txt", "absolute", "../here/secret.txt"])
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_no_engine_reads_a_file_of_the_machine(
    leak: Callable[[ModelProto, str], None],
    location: str,
    tiny_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handed_over: list[object],
) -> None:
    """Unchecked, ONNX Runtime 1.32 reads files for constants in functions and branches, 1.23 for initializers too."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "secret.txt").write_bytes(SECRET)
    monkeypatch.chdir(folder)
    model = model_of(tiny_engine)
    leak(model, str(folder / "secret.txt") if location == "absolute" else location)
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    with pytest.raises(BackendError, match=r"x\.goslet: section graph.*(from a file|not a step's operator)"):
        goslet.open(path, backend="ort")
    assert handed_over == []


@pytest.mark.parametrize(
    ("edit", "words"),
    [(endless_loop, r"node \d+: is not a step's operator.*Loop"), (embedded_weights, f"initializer {VICTIM}")],
)
def test_engines_that_hang_or_bring_weights_of_their_own(
    edit: Callable[[ModelProto], None], words: str, tiny_engine: Path, tmp_path: Path, handed_over: list[object]
) -> None:
    model = model_of(tiny_engine)
    edit(model)
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    with pytest.raises(BackendError, match=words):
        goslet.open(path, backend="ort")
    assert handed_over == []


def model_of(path: Path) -> ModelProto:
    with EngineFile.open(path) as file:
        return ModelProto.FromString(bytes(file.graph_bytes))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph(name: str, step: Step) -> None:
    edit, words = HOSTILE[name]
    model = ModelProto.FromString(step.graph)
    edit(model)
    if name == "an initializer twice":
        model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(BackendError, match=rf"^x\.goslet: section graph.*({words})"):
        check(step, model.SerializeToString())


@pytest.mark.parametrize("opset", [-1, 7, 20, 10**9])
def test_opset_that_no_engine_has(opset: int, step: Step) -> None:
    with pytest.raises(BackendError, match=f"unknown opset.*found {opset}"):
        check(step, step.graph, opset)


def test_graph_larger_than_any(step: Step) -> None:
    with pytest.raises(BackendError, match="is too large"):
        check(step, bytes(MAX_GRAPH_BYTES + 1))


def test_control_flow_and_growth_are_no_operators() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert known >= OPERATORS
    with_graphs = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if any("GRAPH" in str(attribute.type) for attribute in schema.attributes.values())
    }
    assert with_graphs >= {"If", "Loop", "Scan"}
    assert not OPERATORS & {*with_graphs, "ConstantOfShape", "Range", "Tile", "Pad", "Resize", "StringConcat"}


# ------------------------------------------------------------------------------------------------------ the wire format


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """A field as protobuf writes it: a number, or bytes after their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def with_initializer(step: Step, name: str, more: bytes) -> bytes:
    """The graph with `more` at the end of an initializer, and without its shape where `more` has one."""
    model = ModelProto.FromString(step.graph)
    tensor = next(value for value in model.graph.initializer if value.name == name)
    if more[0] >> 3 == 1:
        tensor.ClearField("dims")
    content = tensor.SerializeToString() + more
    model.graph.initializer.remove(tensor)
    graph = model.graph.SerializeToString() + field(5, content)
    model.ClearField("graph")
    return model.SerializeToString() + field(7, graph)


def test_a_second_graph_is_not_merged_into_the_first(step: Step) -> None:
    more = ModelProto()
    more.graph.initializer.append(external("/etc/passwd"))
    both = step.graph + more.SerializeToString()
    assert ModelProto.FromString(both).graph.initializer[-1].name == "leak", "protobuf would merge the two"
    with pytest.raises(BackendError, match=r"says something twice.*ModelProto\.graph"):
        check(step, both)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        # A reader that keeps the low 32 bits takes these for 1, float or external.
        (field(14, (1 << 32) + 1), "data_location"),
        (field(2, (1 << 32) + 1), "data_type"),
        (field(8, b"another"), "name"),
    ],
)
def test_single_fields_come_once(more: bytes, words: str, step: Step) -> None:
    with pytest.raises(BackendError, match=rf"says something twice.*TensorProto\.{words}"):
        check(step, with_initializer(step, VICTIM, more))


@pytest.mark.parametrize("number", [(1 << 32) + 1, 1 << 32, 2, (1 << 64) - 1])
def test_numbers_are_not_cut_to_32_bits(number: int, step: Step) -> None:
    """1 is external; protobuf's enumerations hold the low 32 bits."""
    model = ModelProto.FromString(step.graph)
    tensor = TensorProto(name="leak", data_type=1).SerializeToString() + field(14, number)
    graph = model.graph.SerializeToString() + field(5, tensor)
    model.ClearField("graph")
    with pytest.raises(BackendError, match="from a file"):
        check(step, model.SerializeToString() + field(7, graph))


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (b"", "holds no graph"),
        (b"this is no graph", "no use for"),
        (b"\x3a", "is damaged"),
        (b"\x3a\x05", "is damaged"),
        (field(8, field(2, OPSET)) + field(7, b"\x2a\x7f"), "is damaged"),
        (b"\x3a" + varint((1 << 63) - 1), "is damaged"),
        (b"\x3a" + varint((1 << 64) - 1), "is damaged"),
        (b"\x3a" + b"\x80" * 9 + b"\x02", "number of up to 64 bits"),
        (b"\xff" * 20, "number of up to 64 bits"),
        (b"\x08\x80", "number of up to 64 bits"),
        (b"\x3b\x3c", "graph in wire type 3"),
        (b"\x38\x01", "graph in wire type 0"),
        (b"\x39" + bytes(8), "graph in wire type 1"),
        (b"\x0d\0\0", "is damaged"),
        (b"\x00\x00", "field 0"),
        (field(99, b""), "field 99"),
        (field((1 << 29) + 7, b""), "no use for"),
        (field(7, b"") + field(8, field(1, b"\xff")), "not UTF-8"),
    ],
)
def test_damaged_bytes(graph: bytes, words: str, step: Step) -> None:
    with pytest.raises(BackendError, match=words):
        check(step, graph)


MARK = "MARKMARK"
TEXTS: dict[str, Callable[[ModelProto], object]] = {
    "model.producer_name": lambda model: setattr(model, "producer_name", MARK),
    "model.domain": lambda model: setattr(model, "domain", MARK),
    "model.doc_string": lambda model: setattr(model, "doc_string", MARK),
    "graph.name": lambda model: setattr(model.graph, "name", MARK),
    "graph.doc_string": lambda model: setattr(model.graph, "doc_string", MARK),
    "graph.metadata_props": lambda model: model.graph.metadata_props.add(key=MARK, value="x"),
    "graph.input.name": lambda model: setattr(model.graph.input[0], "name", MARK),
    "graph.input.type": lambda model: setattr(model.graph.input[0].type, "denotation", MARK),
    "graph.input.type.shape": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", MARK
    ),
    "graph.output.doc_string": lambda model: setattr(model.graph.output[0], "doc_string", MARK),
    "graph.value_info.name": lambda model: model.graph.value_info.add(name=MARK),
    "node.name": lambda model: setattr(model.graph.node[0], "name", MARK),
    "node.input": lambda model: model.graph.node[0].input.append(MARK),
    "node.output": lambda model: model.graph.node[0].output.append(MARK),
    "node.doc_string": lambda model: setattr(model.graph.node[0], "doc_string", MARK),
    "node.metadata_props": lambda model: model.graph.node[0].metadata_props.add(key="x", value=MARK),
    "attribute.name": lambda model: model.graph.node[0].attribute.add(name=MARK, type=2, i=1),
    "attribute.doc_string": lambda model: model.graph.node[0].attribute.add(name="x", type=2, i=1, doc_string=MARK),
    "initializer.doc_string": lambda model: setattr(model.graph.initializer[0], "doc_string", MARK),
    "function.input": lambda model: model.functions[0].input.append(MARK),
    "function.output": lambda model: model.functions[0].output.append(MARK),
    "function.doc_string": lambda model: setattr(model.functions[0], "doc_string", MARK),
    "function.node.name": lambda model: setattr(model.functions[0].node[0], "name", MARK),
    "function.value_info.name": lambda model: model.functions[0].value_info.add(name=MARK),
}


@pytest.mark.parametrize("place", TEXTS)
def test_every_text_is_utf8(place: str, step: Step) -> None:
    """ONNX Runtime would print its complaint and go on without what the text stands for."""
    model = ModelProto.FromString(step.graph)
    TEXTS[place](model)
    good = model.SerializeToString()
    assert good.count(MARK.encode()) == 1
    check(step, good)
    check(step, good.replace(MARK.encode(), "MARKéRK".encode()))
    with pytest.raises(BackendError, match="holds a text that is not UTF-8"):
        check(step, good.replace(MARK.encode(), b"MARK\xffARK"))


def test_more_parts_than_a_graph_has(step: Step) -> None:
    with pytest.raises(BackendError, match="has too many parts"):
        check(step, field(8, b"") * (MAX_NODES + 1))


def submessages(message: object) -> Iterator[object]:
    """A message and all messages in it, by protobuf's own reader."""
    yield message
    for description, value in message.ListFields():  # type: ignore[attr-defined]
        if description.message_type is not None:
            for one in value if description.is_repeated else [value]:
                yield from submessages(one)


def assert_harmless(content: bytes, step: Step) -> None:
    """What passed is harmless by another reader too."""
    try:
        model = ModelProto.FromString(content)
    except Exception:
        return  # nobody can read it
    kept = list(model.graph.initializer)
    assert {tensor.name for tensor in kept} >= step.initializers.keys()
    assert sum(isinstance(message, onnx.GraphProto) for message in submessages(model)) == 1
    for message in submessages(model):
        if isinstance(message, NodeProto):
            assert message.op_type in OPERATORS or (message.domain, message.op_type) == ("goslet", "Wkv7")
        elif isinstance(message, TensorProto) and (message.data_location or message.external_data):
            assert message in kept
            where = {entry.key: entry.value for entry in message.external_data}
            expected = step.initializers[message.name]
            assert where == {"location": message.name, "offset": "0", "length": str(expected.size_bytes)}
            assert (message.data_type, tuple(message.dims)) == (expected.onnx_type, expected.shape)


def assert_refused_or_harmless(content: bytes, step: Step) -> None:
    try:
        check(step, content)
    except BackendError:
        return
    assert_harmless(content, step)


def test_the_other_reader_sees_harm(step: Step) -> None:
    assert_harmless(step.graph, step)
    for leak in LEAKS:
        model = ModelProto.FromString(step.graph)
        leak(model, "secret.txt")
        with pytest.raises((AssertionError, KeyError)):
            assert_harmless(model.SerializeToString(), step)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    with pytest.raises(BackendError):
        check_step_graph(content, {}, OPSET, "x.goslet")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_graphs(data: st.DataObject, step: Step) -> None:
    """Bits flipped, bytes cut out, put in, or copied from elsewhere in a sound graph."""
    content = bytearray(step.graph)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "copy"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            size = data.draw(st.integers(1, 40))
            source = data.draw(st.integers(0, len(content) - 1))
            content[at : at + size] = content[source : source + size]
    assert_refused_or_harmless(bytes(content), step)


# -------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"blocks.0.ln1.weight": (2, 3, 4)}, "tensor blocks.0.ln1.weight: is neither a vector nor a matrix"),
        ({"a": (64, 64), "a.scale": (2, 64)}, "tensor a.scale: is the name of a tensor and of another one's scales"),
        ({"a.scale": (2, 64), "a": (64, 64)}, "tensor a.scale: is the name of a tensor and of another one's scales"),
    ],
)
def test_tensors_that_no_graph_could_have(
    shapes: dict[str, tuple[int, ...]], words: str, tiny_engine: Path, tmp_path: Path
) -> None:
    sources = []
    for name, shape in {EMBEDDING: (256, 64), **shapes}.items():
        fmt = WeightFormat("int8", 32) if name == "a" else WeightFormat("f32")
        weight = encode(np.ones(shape, np.float32), fmt, name)
        sources.append(TensorSource(name, weight.format, weight.shape, lambda weight=weight: weight))
    path = rewritten(tiny_engine, tmp_path / "x.goslet", tensors=sources)
    with pytest.raises(HeaderError, match=rf"x\.goslet: {words}"):
        goslet.open(path, backend="ort")
