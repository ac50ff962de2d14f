"""The step graph as TensorRT gets it: a fixed batch, matrix products in f16 or bf16, the rest in float32.

Products take their input in the precision asked for and give float32 back, so that norms, recurrences, states and the
residual stream keep float32: a state is summed up over a whole conversation, and a decay close to 1 would lose most of
its distance from 1. Weights of 4 and 8 bits stay what they are, those of 3 bits become the same numbers in 4 bits, all
in one of two forms:

- ``qdq``: DequantizeLinear before MatMul, which TensorRT knows.
- ``plugin``: a GosletProduct node, our own kernel, with the weights as `goslet.cuda_layout` packs them.

The recurrences are either nodes that the plugin library takes, or, without it, their functions' standard operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from ..cuda_layout import pack_scales, pack_weights, padded_inputs
from ..enginefile import EngineFile
from ..errors import InputError
from ..initializers import SCALE_SUFFIX, weight_buffers, weight_initializers
from ..spec import EMBEDDING
from ..weights import EncodedWeight, as_int4, quantized_values
from .activations import whole
from .streamed import StreamedModel

PRECISIONS = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
WEIGHT_FORMS = ("qdq", "plugin")
PRODUCT = "GosletProduct"
DOMAIN = "goslet"
OPSET = 21
# What our kernels multiply with; they have none for 3 bits, whose numbers are exact in 4.
KERNEL_BITS = {"int8": 8, "int4": 4, "int3": 4}
# Constants of at most so many numbers are computed with.
_SMALL = 64
_FOLDED_TYPES = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
# How the parser finds a node's plugin.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}


def lower(
    engine: EngineFile, *, precision: str = "f16", batch: int = 1, weights: str = "qdq", plugins: bool = True
) -> StreamedModel:
    """The graph for TensorRT, its inputs ``x`` and ``state_in.…`` and its outputs as the engine's, with a fixed batch.

    Args:
        engine: the engine file, which must stay open until the weights are written.
        precision: of the matrix products, f16 or bf16.
        batch: sessions that a step moves on together.
        weights: ``qdq`` or ``plugin``; plain weights are of the products' precision in both.
        plugins: whether the recurrences are nodes for the plugin library, or standard operators.

    Raises (also what makes the weights):
        InputError: a weight does not fit into the precision.
    """
    model = ModelProto.FromString(bytes(engine.graph_bytes))
    whole(model)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        dimension = value.type.tensor_type.shape.dim[0]
        dimension.ClearField("dim_param")
        dimension.dim_value = batch
    # A weight and its scales are asked for one after the other, and made of the same unpacked tensor.
    buffers = lru_cache(maxsize=1)(lambda name: weight_buffers(name, engine.weight(name)))
    content: dict[str, Callable[[], bytes]] = {}
    for name, entry in engine.tensors.items():
        if name != EMBEDDING:
            for made in weight_initializers(name, entry.format, entry.shape):
                content[made] = partial(_stored, buffers, name, made)
    for initializer in graph.initializer:
        if initializer.name in content:
            if initializer.data_type == TensorProto.UINT16:  # places, which TensorRT knows in 32 bits
                initializer.data_type = TensorProto.INT32
                content[initializer.name] = partial(_widened, content[initializer.name])
            initializer.ClearField("external_data")
            initializer.data_location = TensorProto.DEFAULT
            if math.prod(initializer.dims) <= _SMALL:
                initializer.raw_data = content.pop(initializer.name)()
    _lower_products(graph, content, engine, PRECISIONS[precision], weights)
    del graph.value_info[:]
    _fold_constants(graph, content)
    if plugins:
        for node in graph.node:
            if node.domain == DOMAIN:
                _mark(node)
        del model.functions[:]
    else:
        model = inline_local_functions(model)
    names = {initializer.name for initializer in model.graph.initializer}
    return StreamedModel(model, {name: make for name, make in content.items() if name in names})


def _stored(buffers: Callable[[str], dict[str, NDArray[np.uint8]]], name: str, initializer: str) -> bytes:
    return buffers(name)[initializer].tobytes()


def _fold_constants(graph: GraphProto, content: dict[str, Callable[[], bytes]]) -> None:
    """Compute what depends on small constants alone: the parser takes axes and the like only as such."""
    constants = {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in graph.initializer
        if initializer.name not in content and initializer.data_type in _FOLDED_TYPES
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


def _lower_products(
    graph: GraphProto, content: dict[str, Callable[[], bytes]], engine: EngineFile, precision: int, form: str
) -> None:
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
            graph.initializer.extend(_packed(engine, weight, content))
            product = helper.make_node(
                PRODUCT, [casts[x], f"{weight}.packed", f"{weight}.packed_scale"], [f"{out}.low"],
                name=f"product.{weight}", bits=KERNEL_BITS[engine.tensors[weight].format.name], group=group,
            )  # fmt: skip
            _mark(product)
            nodes.append(product)
        else:
            nodes.extend(
                _plain_product(initializers[weight], initializers, content, casts[x], f"{out}.low", precision, group)
            )
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
    content: dict[str, Callable[[], bytes]],
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
            _convert(scale, content, precision)
        yield helper.make_node(
            "DequantizeLinear", [weight.name, scale.name], [low], axis=0, block_size=group, name=f"dequantize.{low}"
        )
    else:
        if weight.data_type != precision:
            _convert(weight, content, precision)
        low = weight.name
    yield helper.make_node("MatMul", [x, low], [out], name=f"product.{weight.name}")


def _convert(tensor: TensorProto, content: dict[str, Callable[[], bytes]], precision: int) -> None:
    """Store a float tensor's numbers in another float type."""
    old, new = (helper.tensor_dtype_to_np_dtype(number) for number in (tensor.data_type, precision))
    tensor.data_type = precision
    if tensor.name in content:
        content[tensor.name] = partial(_converted, tensor.name, content[tensor.name], old, new)
    else:
        tensor.raw_data = _converted(tensor.name, lambda: tensor.raw_data, old, new)


def _widened(make: Callable[[], bytes]) -> bytes:
    return np.frombuffer(make(), "<u2").astype("<i4").tobytes()


def _converted(name: str, make: Callable[[], bytes], old: np.dtype[Any], new: np.dtype[Any]) -> bytes:
    numbers = np.frombuffer(make(), old).astype(np.float32)
    with np.errstate(over="ignore"):
        converted = numbers.astype(new)
    lost = np.isfinite(numbers) & ~np.isfinite(converted.astype(np.float32))
    if lost.any():
        raise InputError(
            f"has numbers that {new.name} cannot hold",
            place=name,
            found=f"{np.abs(numbers[lost]).max():g}",
            remedy="use the precision bf16",
        )
    return converted.tobytes()


def _packed(engine: EngineFile, name: str, content: dict[str, Callable[[], bytes]]) -> Iterator[TensorProto]:
    """A matrix's weights and scales as the kernels read them."""
    entry = engine.tensors[name]
    n_out, n_in = entry.shape
    assert entry.format.group is not None
    bits = KERNEL_BITS[entry.format.name]
    for suffix, data_type, shape, make in (
        ("packed", TensorProto.INT32, (n_out, padded_inputs(n_in) * bits // 32), _packed_weights),
        ("packed_scale", TensorProto.FLOAT16, (n_out, padded_inputs(n_in) // entry.format.group), _packed_scales),
    ):
        content[f"{name}.{suffix}"] = partial(make, engine, name)
        yield TensorProto(name=f"{name}.{suffix}", data_type=data_type, dims=shape)


def _for_kernels(engine: EngineFile, name: str) -> EncodedWeight:
    stored = engine.weight(name)
    return as_int4(stored) if stored.format.name == "int3" else stored


def _packed_weights(engine: EngineFile, name: str) -> bytes:
    stored = _for_kernels(engine, name)
    return pack_weights(quantized_values(stored), KERNEL_BITS[stored.format.name]).tobytes()


def _packed_scales(engine: EngineFile, name: str) -> bytes:
    stored = _for_kernels(engine, name)
    assert stored.scales is not None and stored.format.group is not None
    return pack_scales(stored.scales, stored.shape[1], stored.format.group).tobytes()
