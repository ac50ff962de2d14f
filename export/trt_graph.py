"""The step graph as TensorRT gets it: a fixed batch, matrix products in f16 or bf16, the rest in float32.

Products take their input in the precision asked for and give float32 back, so that norms, recurrences, states and the
residual stream keep float32: a state is summed up over a whole conversation, and a decay close to 1 would lose most of
its distance from 1. Weights of 4 and 8 bits stay what they are, in one of two forms:

- ``qdq``: DequantizeLinear before MatMul, which TensorRT knows.
- ``plugin``: a GosletProduct node, our own kernel, with the weights as `goslet.cuda_layout` packs them.

The recurrences are either nodes that the plugin library takes, or, without it, their functions' standard operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from ..cuda_layout import pack_scales, pack_weights
from ..enginefile import EngineFile
from ..initializers import SCALE_SUFFIX, graph_initializers
from ..weights import quantized_values

PRECISIONS = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
WEIGHT_FORMS = ("qdq", "plugin")
PRODUCT = "GosletProduct"
DOMAIN = "goslet"
OPSET = 21
# Constants of at most so many numbers are computed with.
_SMALL = 64
_FOLDED_TYPES = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
# How the parser finds a node's plugin.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}


def lower(
    engine: EngineFile, *, precision: str = "f16", batch: int = 1, weights: str = "qdq", plugins: bool = True
) -> ModelProto:
    """The graph for TensorRT, weights inside.

    Args:
        engine: the engine file.
        precision: of the matrix products, f16 or bf16.
        batch: sessions that a step moves on together.
        weights: ``qdq`` or ``plugin``; plain weights are of the products' precision in both.
        plugins: whether the recurrences are nodes for the plugin library, or standard operators.

    Returns:
        The model: inputs ``x`` and ``state_in.…`` and outputs as the engine's graph has, all float32, with `batch` as
        their first axis.
    """
    model = ModelProto.FromString(bytes(engine.graph_bytes))
    graph = model.graph
    for value in (*graph.input, *graph.output):
        dimension = value.type.tensor_type.shape.dim[0]
        dimension.ClearField("dim_param")
        dimension.dim_value = batch
    content = graph_initializers(engine)
    for initializer in graph.initializer:
        if initializer.name in content:
            initializer.ClearField("external_data")
            initializer.data_location = TensorProto.DEFAULT
            initializer.raw_data = content[initializer.name].tobytes()
    del content
    _lower_products(graph, engine, PRECISIONS[precision], weights)
    del graph.value_info[:]
    _fold_constants(graph)
    if plugins:
        for node in graph.node:
            if node.domain == DOMAIN:
                _mark(node)
        del model.functions[:]
        lowered: ModelProto = model
    else:
        lowered = inline_local_functions(model)
    return lowered


def _fold_constants(graph: GraphProto) -> None:
    """Compute what depends on small constants alone: the parser takes axes and the like only as such."""
    constants = {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in graph.initializer
        if math.prod(initializer.dims) <= _SMALL and initializer.data_type in _FOLDED_TYPES
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if node.domain or len(node.output) != 1 or not all(name in constants for name in inputs):
            nodes.append(node)
            continue
        evaluator = ReferenceEvaluator(_alone(node, {name: constants[name] for name in inputs}))
        (value,) = evaluator.run(None, {})
        constants[node.output[0]] = np.asarray(value)
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), node.output[0]))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_initializers(graph)


def _drop_unused_initializers(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _alone(node: NodeProto, inputs: dict[str, NDArray[Any]]) -> ModelProto:
    """A model of one node whose inputs are constants."""
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items()]
    output = helper.make_empty_tensor_value_info(node.output[0])
    return helper.make_model(
        helper.make_graph([node], "constant", [], [output], tensors), opset_imports=[helper.make_opsetid("", OPSET)]
    )


def plugin_nodes(model: ModelProto) -> list[str]:
    """The names of the nodes that need the plugin library, in the graph's order."""
    return [node.name for node in model.graph.node if node.domain == DOMAIN or node.op_type == PRODUCT]


def in_place_states(model: ModelProto) -> list[str]:
    """The state tensors that a plugin reads and writes, which it can do where they lie, in the graph's order."""
    found = []
    for node in model.graph.node:
        if node.domain == DOMAIN:
            read = {name.removeprefix("state_in.") for name in node.input if name.startswith("state_in.")}
            written = {name.removeprefix("state_out.") for name in node.output if name.startswith("state_out.")}
            found += sorted(read & written)
    return found


def _mark(node: NodeProto) -> None:
    """Make a node one that the parser looks for among plugins."""
    node.attribute.extend(helper.make_attribute(name, value) for name, value in PLUGIN_ATTRIBUTES.items())


def _lower_products(graph: GraphProto, engine: EngineFile, precision: int, form: str) -> None:
    """Give every product with a weight inputs and weights of the precision, and its output float32."""
    makers = {output: node for node in graph.node for output in node.output}
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    casts: dict[str, str] = {}  # what is there in the precision already
    nodes: list[NodeProto] = []
    dropped: set[str] = set()
    for node in graph.node:
        weight = _weight_of(node, makers, initializers)
        if weight is None:
            nodes.append(node)
            continue
        x, out = node.input[0], node.output[0]
        if x not in casts:
            casts[x] = f"{x}.low"
            nodes.append(helper.make_node("Cast", [x], [casts[x]], to=precision, name=f"cast.{casts[x]}"))
        made = makers.get(node.input[1])
        group = engine.tensors[weight].format.group
        if made is not None:
            dropped.add(made.output[0])
        if group is not None and form == "plugin":
            graph.initializer.extend(_packed(engine, weight))
            product = helper.make_node(
                PRODUCT, [casts[x], f"{weight}.packed", f"{weight}.packed_scale"], [f"{out}.low"],
                name=f"product.{weight}", bits=int(engine.tensors[weight].format.name.removeprefix("int")), group=group,
            )  # fmt: skip
            _mark(product)
            nodes.append(product)
        else:
            nodes.extend(_plain_product(initializers[weight], initializers, casts[x], f"{out}.low", precision, group))
        casts[out] = f"{out}.low"
        nodes.append(helper.make_node("Cast", [f"{out}.low"], [out], to=TensorProto.FLOAT, name=f"cast.{out}"))
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in dropped)
    _drop_unused_initializers(graph)


def _weight_of(node: NodeProto, makers: dict[str, NodeProto], initializers: dict[str, TensorProto]) -> str | None:
    """The stored matrix that a node multiplies with, if that is what it does."""
    if node.op_type != "MatMul" or node.domain:
        return None
    made = makers.get(node.input[1])
    name = node.input[1] if made is None else made.input[0]
    return name if name in initializers and len(initializers[name].dims) == 2 else None


def _plain_product(
    weight: TensorProto,
    initializers: dict[str, TensorProto],
    x: str,
    out: str,
    precision: int,
    group: int | None,
) -> Iterator[NodeProto]:
    """MatMul of one precision, its weights dequantized or cast to it before."""
    low = f"{weight.name}.low"
    if group is not None:
        scale = initializers[weight.name + SCALE_SUFFIX]
        if scale.data_type == TensorProto.FLOAT:
            _convert(scale, precision)
        yield helper.make_node(
            "DequantizeLinear", [weight.name, scale.name], [low], axis=0, block_size=group, name=f"dequantize.{low}"
        )
    else:
        if weight.data_type != precision:
            _convert(weight, precision)
        low = weight.name
    yield helper.make_node("MatMul", [x, low], [out], name=f"product.{weight.name}")


def _convert(tensor: TensorProto, precision: int) -> None:
    """Store a float tensor's numbers in another float type."""
    numbers = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    dtype = helper.tensor_dtype_to_np_dtype(precision)
    tensor.raw_data = numbers.astype(dtype).tobytes()
    tensor.data_type = precision


def _packed(engine: EngineFile, name: str) -> Iterator[TensorProto]:
    """A matrix's weights and scales as the kernels read them."""
    stored = engine.weight(name)
    assert stored.scales is not None and stored.format.group is not None
    bits = int(stored.format.name.removeprefix("int"))
    words: NDArray[np.int32] = pack_weights(quantized_values(stored), bits).view("<i4")
    scales = pack_scales(stored.scales, stored.shape[1], stored.format.group)
    yield helper.make_tensor(f"{name}.packed", TensorProto.INT32, words.shape, words.tobytes(), raw=True)
    yield helper.make_tensor(f"{name}.packed_scale", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True)
