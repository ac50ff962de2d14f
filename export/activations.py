"""What 8-bit weights are multiplied with in ONNX Runtime, whose products take activations of 8 bits and no others.

Its MatMulNBits rounds every group of an activation to 127 levels, which for int8 weights is most of the error that is
left. So an activation x goes in as two rows: the first is x rounded to just these levels, which the product then takes
exactly, the second is the rest, whose own levels are 254 times finer. The product's two rows are added. The weights are
still read once, so that a step takes 1.2 times as long, and its error is 300 times smaller (0.1B with random weights:
1.9% of range before, 0.006% after). Beside weights of 4 bits, whose products err more, the 8-bit ones of an engine
are left as they are: it would gain nothing.

In any other runtime this changes nothing but the time, and `whole` takes it out again.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from ..initializers import SPLIT

OPSET = 21
DOMAIN = "goslet"
JOIN = "AddTerms"
LEVELS = 127
# Divides where a group is all zeros.
_TINY = 1e-30


def split(model: ModelProto) -> None:
    """Write every product with 8-bit weights as that of two terms, unless there are weights of fewer bits.

    Args:
        model: a step graph, as `goslet.export.graph.trace_step` gives it; changed in place.
    """
    graph = model.graph
    shapes = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    if TensorProto.INT8 not in types.values() or TensorProto.INT4 in types.values():
        return
    groups = {
        node.output[0]: (shapes[node.input[0]][0], _attribute(node, "block_size"))
        for node in graph.node
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) == TensorProto.INT8
    }
    constants: dict[str, NodeProto] = {}
    terms: dict[tuple[str, int], str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain or node.input[1] not in groups:
            nodes.append(node)
            continue
        x, out = node.input[0], node.output[0]
        n_in, group = groups[node.input[1]]
        if (x, group) not in terms:
            terms[x, group] = f"{x}.terms{group}"
            nodes += _split_nodes(x, n_in, group, terms[x, group], constants)
        node.input[0], node.output[0] = terms[x, group], f"{out}.terms"
        nodes += [node, helper.make_node(JOIN, [f"{out}.terms"], [out], domain=DOMAIN, name=f"add.{out}")]
    del graph.node[:]
    graph.node.extend([*constants.values(), *nodes])
    model.functions.extend([_split_function(), _join_function()])


def whole(model: ModelProto) -> None:
    """Undo `split`, where it was done: every product takes its activation whole again."""
    graph = model.graph
    instead: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
        if (node.domain == DOMAIN and node.op_type == SPLIT) or node.name.startswith(("terms.slice.", "terms.join.")):
            instead[node.output[0]] = node.input[0]
        elif node.domain == DOMAIN and node.op_type == JOIN:
            product = next(made for made in reversed(nodes) if node.input[0] in made.output)
            product.output[0] = node.output[0]
        elif not node.name.startswith("terms."):
            nodes.append(node)
    kept = [function for function in model.functions if function.name not in (SPLIT, JOIN)]
    del model.functions[:]
    model.functions.extend(kept)
    del graph.node[:]
    graph.node.extend(nodes)


def _split_nodes(x: str, n_in: int, group: int, made: str, constants: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """The nodes that write x [B, n_in] as two terms [2 B, n_in]."""

    def constant(*values: int) -> str:
        name = "terms." + "_".join(map(str, values))
        constants.setdefault(name, helper.make_node("Constant", [], [name], value_ints=values, name=name))
        return name

    full = n_in - n_in % group
    if full in (0, n_in):
        yield _split_node(x, constant(0, -1, min(group, n_in)), made)
        return
    parts = []
    for start, stop, size in ((0, full, group), (full, n_in, n_in - full)):  # the last group is a part of one
        part = f"{made}.from{start}"
        bounds = (constant(start), constant(stop), constant(1))
        yield helper.make_node("Slice", [x, *bounds], [f"{part}.whole"], name=f"terms.slice.{part}")
        yield _split_node(f"{part}.whole", constant(0, -1, size), part)
        parts.append(part)
    yield helper.make_node("Concat", parts, [made], axis=1, name=f"terms.join.{made}")


def _split_node(x: str, blocks: str, made: str) -> NodeProto:
    return helper.make_node(SPLIT, [x, blocks], [made], domain=DOMAIN, name=f"split.{made}")


def _split_function() -> FunctionProto:
    """From x [B, K] and how its groups are shaped to the two terms [2 B, K]."""
    numbers, shapes = {"levels": float(LEVELS), "tiny": _TINY}, {"last": [-1], "flat": [0, -1]}
    steps = (
        ("Reshape", ["x", "blocks"], "groups"),
        ("Abs", ["groups"], "sizes"),
        ("ReduceMax", ["sizes", "last"], "largest"),
        ("Div", ["largest", "levels"], "level"),
        ("Max", ["level", "tiny"], "step"),
        ("Div", ["groups", "step"], "counts"),
        ("Round", ["counts"], "whole"),
        ("Mul", ["whole", "step"], "first"),
        ("Sub", ["groups", "first"], "rest"),
    )
    nodes = [helper.make_node("Constant", [], [name], value_float=number) for name, number in numbers.items()]
    nodes += [helper.make_node("Constant", [], [name], value_ints=shape) for name, shape in shapes.items()]
    nodes += [helper.make_node(kind, inputs, [made]) for kind, inputs, made in steps]
    nodes.append(helper.make_node("Concat", ["first", "rest"], ["both"], axis=0))
    nodes.append(helper.make_node("Reshape", ["both", "flat"], ["terms"]))
    return helper.make_function(DOMAIN, SPLIT, ["x", "blocks"], ["terms"], nodes, [helper.make_opsetid("", OPSET)])


def _join_function() -> FunctionProto:
    """From a product's rows of both terms [2 B, N] to their sum [B, N]."""
    nodes = [
        helper.make_node("Split", ["terms"], ["first", "rest"], axis=0, num_outputs=2),
        helper.make_node("Add", ["first", "rest"], ["sum"]),
    ]
    return helper.make_function(DOMAIN, JOIN, ["terms"], ["sum"], nodes, [helper.make_opsetid("", OPSET)])


def _attribute(node: NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)
