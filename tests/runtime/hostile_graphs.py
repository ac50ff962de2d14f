"""Step graphs that are made hostile, each for one reason; what makes them takes a sound graph and edits it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from goslet.graph_check import MAX_INLINE_BYTES, MAX_INLINE_TOTAL_BYTES, MAX_NODES

onnx = pytest.importorskip("onnx", reason="hostile graphs are made with onnx")

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper  # noqa: E402

VICTIM = "blocks.0.ln1.weight"
OPSET = 21


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


LEAKS = [leak_by_initializer, leak_by_constant, leak_by_function, leak_by_branch]


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


def many_constants(model: ModelProto) -> None:
    model.graph.initializer.extend(zeros(900, f"c{index}") for index in range(MAX_INLINE_TOTAL_BYTES // 3600))


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
    "many constants": (many_constants, "is one constant too many"),
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
