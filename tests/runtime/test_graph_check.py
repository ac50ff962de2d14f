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
from goslet.enginefile import EngineFile
from goslet.errors import BackendError, HeaderError
from goslet.graph_check import (
    MAX_GRAPH_BYTES,
    MAX_INLINE_BYTES,
    MAX_INLINE_TOTAL_BYTES,
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

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper  # noqa: E402

SECRET = b"SECRET-" * 60
VICTIM = "blocks.0.ln1.weight"
OPSET = 21


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


# ---------------------------------------------------------------------------------------------------------- sound graphs


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "int8", "int4"])
def test_what_the_exporter_writes_passes(quant: str, tiny_engines: dict[str, Path]) -> None:
    with EngineFile.open(tiny_engines[quant]) as file:
        check_step_graph(bytes(file.graph_bytes), expected_initializers(file), file.graph_info["opset"], file.path)


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4"])
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


# -------------------------------------------------------------------------------------------------------- hostile graphs


def external(location: str, size: int = 256, **more: str) -> TensorProto:
    """An initializer of bytes that lie in a file."""
    tensor = TensorProto(name="leak", data_type=TensorProto.UINT8, dims=[size], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(size), **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(tensor: TensorProto, output: str = "leaked") -> NodeProto:
    node = helper.make_node("Constant", [], [output])
    node.attribute.add(name="value", type=AttributeProto.TENSOR, t=tensor)
    return node


def if_node(tensor: TensorProto) -> NodeProto:
    def branch(name: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Identity", [tensor.name], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))],
            initializer=[tensor],
        )

    return helper.make_node("If", ["true"], ["leaked"], then_branch=branch("yes"), else_branch=branch("no"))


def loop_node() -> NodeProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", ["trips", "true", "raw"], ["logits"], body=body)


def show_in_logits(model: ModelProto) -> None:
    """Let the logits be the bytes of the value `leaked`."""
    for node in model.graph.node:
        node.output[:] = ["raw" if name == "logits" else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["leaked"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["raw", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "numbers"], ["logits"]),
        ]
    )


def leak_by_initializer(model: ModelProto, location: str) -> None:
    model.graph.initializer.append(external(location))
    model.graph.node.append(helper.make_node("Identity", ["leak"], ["leaked"]))
    show_in_logits(model)


def leak_by_constant(model: ModelProto, location: str) -> None:
    model.graph.node.append(constant(external(location)))
    show_in_logits(model)


def leak_by_function(model: ModelProto, location: str) -> None:
    function = model.functions[0]
    function.node.append(constant(external(location)))
    function.output.append("leaked")
    next(node for node in model.graph.node if node.domain == "goslet").output.append("leaked")
    show_in_logits(model)


def leak_by_branch(model: ModelProto, location: str) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    model.graph.node.append(if_node(external(location)))
    show_in_logits(model)


def endless_loop(model: ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["raw" if name == "logits" else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 << 62), "trips"))
    model.graph.node.append(loop_node())


def embedded_weights(model: ModelProto) -> None:
    head = next(value for value in model.graph.initializer if value.name == VICTIM)
    head.ClearField("external_data")
    head.ClearField("data_location")
    head.raw_data = np.ones(tuple(head.dims), np.float32).tobytes()


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to ONNX Runtime; nothing of it is run."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="engines are opened with ONNX Runtime")
    given: list[object] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, *_, **__: given.append(model))
    return given


LEAKS = [leak_by_initializer, leak_by_constant, leak_by_function, leak_by_branch]


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
    """ONNX Runtime 1.32 read the working directory's files for a function's constant, 1.23 any file for all of them."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "secret.txt").write_bytes(SECRET)
    monkeypatch.chdir(folder)
    model = model_of(tiny_engine)
    leak(model, str(folder / "secret.txt") if location == "absolute" else location)
    onnx.checker.check_model(model) if leak is leak_by_initializer and location == "secret.txt" else None
    path = rewritten(tiny_engine, tmp_path / "x.goslet", graph=model.SerializeToString())
    with pytest.raises(BackendError, match=r"x\.goslet: section graph.*(from a file|not a step's operator)"):
        goslet.open(path)
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
        goslet.open(path)
    assert handed_over == []


def model_of(path: Path) -> ModelProto:
    with EngineFile.open(path) as file:
        return ModelProto.FromString(bytes(file.graph_bytes))


def on_victim(edit: Callable[[TensorProto], object]) -> Callable[[ModelProto], None]:
    return lambda model: edit(next(value for value in model.graph.initializer if value.name == VICTIM)) and None


def placed(**wrong: str) -> Callable[[ModelProto], None]:
    """The victim's place with other parts, or with more of them."""

    def edit(tensor: TensorProto) -> None:
        where = {entry.key: entry.value for entry in tensor.external_data} | wrong
        del tensor.external_data[:]
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)

    return on_victim(edit)


def new_nodes(*nodes: NodeProto) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.node.extend(nodes)


def with_attribute(**fields: object) -> Callable[[ModelProto], None]:
    node = helper.make_node("Identity", ["x"], ["y"])
    node.attribute.add(name="n", **fields)
    return new_nodes(node)


def new_initializer(tensor: TensorProto) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.initializer.append(tensor)


def zeros(size: int, name: str = "c") -> TensorProto:
    return numpy_helper.from_array(np.zeros(size, np.float32), name)


def many_functions(model: ModelProto) -> None:
    """Few bytes that stand for more nodes than there may be."""
    function = model.functions[0]
    node = helper.make_node("Identity", ["r"], ["i"])
    function.node.extend([node] * 1000)
    model.graph.node.extend([helper.make_node(function.name, [], [], domain="goslet")] * (MAX_NODES // 1000 + 1))


def on_function(edit: Callable[[onnx.FunctionProto], object]) -> Callable[[ModelProto], None]:
    return lambda model: edit(model.functions[0]) and None


# Every reason to refuse a graph, but those of the wire format.
HOSTILE: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "no graph": (lambda model: model.ClearField("graph"), "holds no graph"),
    "a newer opset": (lambda model: setattr(model.opset_import[0], "version", 22), "imports other operators"),
    "two opsets": (lambda model: model.opset_import.add(domain="", version=OPSET), "imports other operators"),
    "no opset": (lambda model: model.opset_import.pop(0), "imports other operators|does not import"),
    "another alias of the standard": (
        lambda model: model.opset_import.add(domain="ai.onnx", version=OPSET), "imports other operators.*ai.onnx",
    ),
    "operators of a runtime": (
        lambda model: model.opset_import.add(domain="com.microsoft", version=1), "imports other.*com.microsoft",
    ),
    "another version of ours": (
        lambda model: setattr(model.opset_import[1], "version", 2), "imports other operators.*goslet 2",
    ),
    "metadata that runtimes obey": (
        lambda model: model.metadata_props.add(key="ort_config", value="{}"), "no use for.*metadata_props",
    ),
    "training": (lambda model: model.training_info.add(), "no use for.*training_info"),
    "a sparse initializer": (
        lambda model: model.graph.sparse_initializer.add(values=external("a")), "no use for.*sparse_initializer",
    ),
    "annotations": (
        lambda model: model.graph.quantization_annotation.add(), "no use for.*quantization_annotation",
    ),
    # Initializers.
    "a file": (new_initializer(external("/etc/passwd")), "initializer leak: takes data from a file"),
    "a file's name without external data": (
        new_initializer(TensorProto(name="c", data_type=1, external_data=external("a").external_data)), "from a file",
    ),
    "external data without a file's name": (
        new_initializer(TensorProto(name="c", data_type=1, data_location=TensorProto.EXTERNAL)), "from a file",
    ),
    "an address in memory": (
        new_initializer(external("*/_ORT_MEM_ADDR_/*", offset="4096")), "takes data from a file",
    ),
    "another tensor's data": (placed(location="head.weight"), f"{VICTIM}: takes other data.*location.*head.weight"),
    "data before the tensor": (placed(offset="-4096"), "takes other data.*offset 0.*-4096"),
    "data after the tensor": (placed(offset=str((1 << 63) - 64)), "takes other data.*offset 0"),
    "an offset written otherwise": (placed(offset="00"), "takes other data.*offset 0, found 00"),
    "more data than there is": (placed(length=str(1 << 40)), "takes other data.*length"),
    "a checksum besides": (placed(checksum="0"), "takes other data.*checksum not stated"),
    "no length": (on_victim(lambda tensor: tensor.external_data.pop()), "takes other data.*length.*nothing"),
    "a location twice": (
        on_victim(lambda tensor: tensor.external_data.add(key="location", value="/etc/passwd")), "place twice",
    ),
    "data inside and outside": (
        on_victim(lambda tensor: setattr(tensor, "raw_data", b"0000")), "does not take.*raw_data in the graph",
    ),
    "weights inside": (embedded_weights, f"{VICTIM}: does not take its data from the header's weights"),
    "another type": (on_victim(lambda tensor: setattr(tensor, "data_type", 7)), "is not what the header's tensor"),
    "another shape": (on_victim(lambda tensor: tensor.dims.append(1)), "is not what the header's tensor.*64, 1"),
    "a negative size": (on_victim(lambda tensor: tensor.dims.append(-1)), "is not a shape"),
    "a shape of nine axes": (on_victim(lambda tensor: tensor.dims.extend([1] * 8)), "is not a shape"),
    "an initializer twice": (on_victim(lambda tensor: None), "appears twice"),
    "a segment": (on_victim(lambda tensor: tensor.segment.SetInParent()), "no use for.*segment"),
    "texts": (
        new_initializer(TensorProto(name="c", data_type=8, dims=[1], string_data=[b"a"])), "no use for.*string_data",
    ),
    "no weights": (lambda model: model.graph.ClearField("initializer"), "initializer .*: is missing"),
    "a large constant": (new_initializer(zeros(MAX_INLINE_BYTES // 4)), "holds more than a constant"),
    "a constant without its numbers": (
        new_initializer(TensorProto(name="c", data_type=1, dims=[1 << 40])), "is larger than a constant",
    ),
    "a constant without any": (
        new_initializer(TensorProto(name="c", data_type=1, dims=[0, 1 << 62])), "is larger than a constant",
    ),
    "a constant of no type": (new_initializer(TensorProto(name="c")), "is of an unexpected type"),
    "many constants": (
        lambda model: model.graph.initializer.extend(zeros(900, f"c{i}") for i in range(MAX_INLINE_TOTAL_BYTES // 3600)),
        "is one constant too many",
    ),
    # Nodes.
    "a branch": (new_nodes(if_node(external("a"))), r"node \d+: is not a step's operator.*found If"),
    "a loop": (new_nodes(loop_node()), r"node \d+: is not a step's operator.*found Loop"),
    "a blow-up": (new_nodes(helper.make_node("ConstantOfShape", ["x"], ["y"])), "not a step's operator"),
    "no operator": (new_nodes(NodeProto()), "not a step's operator"),
    "an operator that would ring": (
        new_nodes(helper.make_node("If\a\x1b[31m", [], [])), r"found 'If\\x07\\x1b\[31m'",
    ),
    "a runtime's operator": (
        new_nodes(helper.make_node("EPContext", [], [], domain="com.microsoft")), "EPContext in com.microsoft",
    ),
    "an alias of the standard domain": (
        new_nodes(helper.make_node("Add", ["x", "x"], ["y"], domain="ai.onnx")), "Add in ai.onnx",
    ),
    "a function that is not there": (
        new_nodes(helper.make_node("Wkv8", [], [], domain="goslet")), "Wkv8 in goslet",
    ),
    "an overload": (lambda model: setattr(model.graph.node[0], "overload", "a"), "no use for.*overload"),
    "an attribute with a graph": (
        with_attribute(type=AttributeProto.GRAPH, g=onnx.GraphProto()), r"\(Identity\).*no use for.*found g\b",
    ),
    "a graph called a number": (with_attribute(type=AttributeProto.INT, g=onnx.GraphProto()), "no use for.*found g"),
    "an attribute with graphs": (
        with_attribute(type=AttributeProto.GRAPHS, graphs=[onnx.GraphProto()]), "no use for.*graphs",
    ),
    "an attribute with tensors": (
        with_attribute(type=AttributeProto.TENSORS, tensors=[external("a")]), "no use for.*tensors",
    ),
    "an attribute with a sparse tensor": (
        with_attribute(type=AttributeProto.SPARSE_TENSOR, sparse_tensor=onnx.SparseTensorProto()), "sparse_tensor",
    ),
    "an attribute with a type": (
        with_attribute(type=AttributeProto.TYPE_PROTO, tp=onnx.TypeProto()), "no use for.*found tp",
    ),
    "an attribute of a function": (
        with_attribute(type=AttributeProto.INT, ref_attr_name="a"), "no use for.*ref_attr_name",
    ),
    "an attribute of no type": (with_attribute(i=1), "attribute that is not of its type.*type None with i"),
    "a graph's type without a graph": (with_attribute(type=AttributeProto.GRAPH), "attribute that is not of its type"),
    "a tensor called a number": (with_attribute(type=AttributeProto.INT, t=external("a")), "not of its type"),
    "a tensor's type without a tensor": (with_attribute(type=AttributeProto.TENSOR), "without its tensor"),
    "a file in a constant": (
        new_nodes(constant(external("/etc/passwd"))), r"node \d+ \(Constant\): takes data from a file",
    ),
    "a large constant's node": (new_nodes(constant(zeros(MAX_INLINE_BYTES // 4))), "holds more than a constant"),
    "a long text": (
        with_attribute(type=AttributeProto.STRING, s=b"a" * MAX_INLINE_BYTES), "holds more than a constant",
    ),
    "many constants' nodes": (
        new_nodes(*[constant(zeros(900))] * (MAX_INLINE_TOTAL_BYTES // 3600)), "is one constant too many",
    ),
    # Functions.
    "a file in a function": (
        on_function(lambda function: function.node.append(constant(external("a")))),
        r"function Wkv7, node \d+ \(Constant\): takes data from a file",
    ),
    "a branch in a function": (
        on_function(lambda function: function.node.append(if_node(external("a")))), "function Wkv7, node .*If",
    ),
    "a function that calls itself": (
        on_function(lambda function: function.node.add(op_type="Wkv7", domain="goslet")),
        "function Wkv7, node .*Wkv7 in goslet",
    ),
    "a function in place of a standard operator": (
        on_function(lambda function: setattr(function, "domain", "")), "function 0: is not a function of its own",
    ),
    "a function without name": (
        on_function(lambda function: function.ClearField("name")), "function 0: is not a function of its own",
    ),
    "a function twice": (lambda model: model.functions.append(model.functions[0]), "function 1: is not a function of"),
    "a function of another opset": (
        on_function(lambda function: setattr(function.opset_import[0], "version", 1)), "function Wkv7: imports other",
    ),
    "a function with attributes": (on_function(lambda function: function.attribute.append("a")), "no use for"),
    "functions that multiply": (many_functions, "is one too many"),
}  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------- the wire format


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
    with pytest.raises(BackendError, match="says something twice.*ModelProto.graph"):
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
    with pytest.raises(BackendError, match=f"says something twice.*TensorProto.{words}"):
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
        (field(7, b"\x2a\x7f"), "is damaged"),
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
        (field(8, field(1, b"\xff")), "not UTF-8"),
    ],
)
def test_damaged_bytes(graph: bytes, words: str, step: Step) -> None:
    with pytest.raises(BackendError, match=words):
        check(step, graph)


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
    weights = [id(tensor) for tensor in model.graph.initializer if tensor.name in step.initializers]
    assert len(weights) == len(step.initializers)
    kept = list(model.graph.initializer)
    for message in submessages(model):
        if isinstance(message, onnx.GraphProto):
            assert message is model.graph or message == model.graph
        elif isinstance(message, NodeProto):
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
    from goslet.enginefile import TensorSource

    with EngineFile.open(tiny_engine) as file:
        embedding = file.weight(EMBEDDING)
        sources = [TensorSource(EMBEDDING, embedding.format, embedding.shape, lambda: embedding)]
        for name, shape in shapes.items():
            weight = encode(
                np.ones(shape, np.float32), WeightFormat("int8", 32) if name == "a" else embedding.format, name
            )
            sources.append(TensorSource(name, weight.format, weight.shape, lambda weight=weight: weight))
        path = rewritten(tiny_engine, tmp_path / "x.goslet", tensors=sources)
        del embedding
    with pytest.raises(HeaderError, match=rf"x\.goslet: {words}"):
        goslet.open(path)
