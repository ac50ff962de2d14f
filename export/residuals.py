"""Putting residuals (`goslet.residuals`) into what an engine runs: its step graph and its native program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from ..initializers import weight_initializers
from ..residuals import RESIDUAL_FORMAT, Residual
from ..spec import DOWN, KEPT, KEPT_INPUTS, UP
from ..weights import PLACES, WeightFormat
from .graph import FLOAT_SUFFIX, external_initializer


def add_to_graph(model: ModelProto, residuals: Mapping[str, Residual]) -> None:
    """Add every residual to its matrix's product, with standard operators.

    Args:
        model: the step graph, as `goslet.export.graph.trace_step` gives it; changed in place.
        residuals: by the matrix's name.

    Raises:
        KeyError: the graph has no product with one of these matrices.
    """
    graph = model.graph
    left = dict(residuals)
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "MatMul" or node.domain:
            continue
        name = node.input[1].removesuffix(FLOAT_SUFFIX)
        residual = left.pop(name, None)
        if residual is None:
            continue
        out = node.output[0]
        node.output[0] = f"{name}.plain"
        terms = [node.output[0]]
        for added, made in _parts(name, node.input[0], residual):
            nodes += made
            terms.append(added)
        # Not Add: `goslet.export.graph` says why.
        nodes.append(helper.make_node("Sum", terms, [out], name=f"sum.{name}"))
        for key, tensor in _tensors(name, residual).items():
            graph.initializer.extend(external_initializer(*item) for item in weight_initializers(key, *tensor).items())
    if left:
        raise KeyError(next(iter(left)))
    del graph.node[:]
    if any(residual.kept is not None for residual in residuals.values()):
        graph.node.append(helper.make_node("Constant", [], [_AXIS], value_ints=[1], name=_AXIS))
    graph.node.extend(nodes)


# The axis of a sum over the numbers kept of an output.
_AXIS = "kept.axis"


def _tensors(name: str, residual: Residual) -> dict[str, tuple[WeightFormat, tuple[int, ...]]]:
    """The tensors of a residual, their formats and stored shapes."""
    found: dict[str, tuple[WeightFormat, tuple[int, ...]]] = {}
    for suffix, array in ((DOWN, residual.down), (UP, residual.up), (KEPT, residual.kept)):
        if array is not None:
            found[name + suffix] = (RESIDUAL_FORMAT, array.shape)
    if residual.kept_inputs is not None:
        found[name + KEPT_INPUTS] = (WeightFormat(PLACES), residual.kept_inputs.shape)
    return found


def _parts(name: str, x: str, residual: Residual) -> Iterator[tuple[str, list[NodeProto]]]:
    """What is added to a product's output: the value's name, and the nodes that make it of the product's input."""
    if residual.down is not None:
        yield (
            f"{name}.low_rank",
            [
                _cast(name + DOWN),
                helper.make_node(
                    "MatMul", [x, name + DOWN + FLOAT_SUFFIX], [f"{name}.down.product"], name=f"product.{name}.down"
                ),
                _cast(name + UP),
                helper.make_node(
                    "MatMul",
                    [f"{name}.down.product", name + UP + FLOAT_SUFFIX],
                    [f"{name}.low_rank"],
                    name=f"product.{name}.up",
                ),
            ],
        )
    if residual.kept is not None:
        places, seen, counted = f"{name}.places", f"{name}.seen", f"{name}.counted"
        yield (
            f"{name}.sparse",
            [
                helper.make_node("Cast", [name + KEPT_INPUTS], [places], to=TensorProto.INT32, name=f"cast.{places}"),
                helper.make_node("Gather", [x, places], [seen], axis=1, name=f"gather.{seen}"),
                _cast(name + KEPT),
                helper.make_node("Mul", [seen, name + KEPT + FLOAT_SUFFIX], [counted], name=f"multiply.{counted}"),
                helper.make_node("ReduceSum", [counted, _AXIS], [f"{name}.sparse"], keepdims=0, name=f"sum.{counted}"),
            ],
        )


def _cast(name: str) -> NodeProto:
    return helper.make_node("Cast", [name], [name + FLOAT_SUFFIX], to=TensorProto.FLOAT, name=f"cast.{name}")


def add_to_program(program: bytes, residuals: Mapping[str, Residual]) -> bytes:
    """The native program with every residual: a step before each that has some multiplies with their `down`.

    Args:
        program: as `goslet.export.models.program.Program.to_bytes` gives it.
        residuals: by the matrix's name.
    """
    value = json.loads(program)
    steps: list[dict[str, Any]] = []
    for step in value["steps"]:
        downs: list[dict[str, Any]] = []
        for product in step["products"] if step["op"] == "linear" else ():
            name = product["weight"]
            residual = residuals.get(name)
            if residual is None:
                continue
            member: dict[str, str | None] = {"low": None, "up": None, "kept": None, "kept_inputs": None}
            if residual.down is not None:
                # Products of one step have registers of their own, and steps take turns with them.
                low = f"low_rank_{len(downs)}_of_{residual.rank}"
                value["registers"][low] = residual.rank
                downs.append({**_PLAIN, "weight": name + DOWN, "x": product["x"], "out": low})
                member |= {"low": low, "up": name + UP}
            if residual.kept is not None:
                member |= {"kept": name + KEPT, "kept_inputs": name + KEPT_INPUTS}
            product["residual"] = member
        if downs:
            steps.append({"op": "linear", "products": downs})
        steps.append(step)
    value["steps"] = steps
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


_PLAIN: dict[str, Any] = {"residual": None, "bias": None, "activation": "none", "combine": "set", "operands": []}
