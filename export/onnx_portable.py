"""The self-contained ONNX model in a form that runtimes besides ONNX Runtime take.

It is the same step in few and old operators (`OPERATORS`), with nothing that importers are known to lack:

- the functions of the domain ``goslet`` are written out, and norms in plain arithmetic;
- whatever does not depend on the token or the state is an initializer, and shapes have one -1, for the batch;
- integers are INT8 [groups, group, out], of which Cast, Mul with float32 scales [groups, 1, out] and Reshape make a
  float32 matrix; those of 3 and 4 bits are widened to a byte each, since few runtimes have such types;
- f16 is FLOAT16 behind a Cast; bf16, which few runtimes have, is widened to float32.

Nothing is rounded on the way: the weights are the same numbers, multiplied and added in the same order but for norms.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from ..errors import GosletError
from .activations import whole
from .streamed import SMALL_BYTES, StreamedModel

# The oldest in which all of it can be said: later ones only moved the axes of reductions around.
OPSET = 13
# The oldest that knows this opset.
IR_VERSION = 7
OPERATORS = frozenset([
    "Add", "Cast", "Div", "Exp", "Gather", "MatMul", "Max", "Mul", "Neg", "ReduceMean", "ReduceSum", "Relu", "Reshape",
    "Sigmoid", "Split", "Sqrt", "Sub", "Tanh",
])  # fmt: skip
TYPES = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT64))
_REPORT = "report this as a bug in goslet; without --onnx-form portable the model can be written"
# Where a shape has the batch.
BATCH = -1

Array = NDArray[Any]
Shape = tuple[int, ...]


def portable_form(source: StreamedModel) -> StreamedModel:
    """The same model in the portable form, with its inputs, outputs and metadata.

    Args:
        source: as `goslet.export.onnxfile` makes it; its batch has a name. Its weights are asked for when those of the
            portable form are.

    Raises:
        GosletError: the graph has something that the portable form has no words for.
    """
    writer = _Writer(source)
    writer.run()
    check_portable(writer.model)
    return StreamedModel(writer.model, writer.weights)


def check_portable(model: ModelProto) -> None:
    """Hold a model to what this form promises.

    Raises:
        GosletError: it has an operator, a type or an opset that does not belong there, a function, or types of values
            in between.
    """
    tensors = {TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    strangers = {
        "opset": {f"{entry.domain}:{entry.version}" for entry in model.opset_import} - {f":{OPSET}"},
        "operator": {f"{node.domain}:{node.op_type}" for node in model.graph.node} - {f":{name}" for name in OPERATORS},
        "type": tensors - {TensorProto.DataType.Name(number) for number in TYPES},
        "function": {function.name for function in model.functions},
        "value_info": {value.name for value in model.graph.value_info},
    }
    for what, names in strangers.items():
        if names:
            raise GosletError(f"the portable form has no such {what}", found=", ".join(sorted(names)), remedy=_REPORT)


@dataclass(frozen=True)
class _Constant:
    """A value that depends on neither token nor state: what it is, where it is written, and what makes its numbers."""

    name: str
    onnx_type: int
    shape: Shape
    make: Callable[[], Array]

    @property
    def is_number(self) -> bool:
        """Whether a node can compute with it as it is; other types are stored weights."""
        return self.onnx_type in (TensorProto.FLOAT, TensorProto.INT64)


class _Writer:
    """Goes through a graph once, in its order, and writes what each node is in the portable form.

    Attributes:
        model: what is written.
        weights: what makes its larger initializers.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self._source = source = streamed.model
        self._source_weights = streamed.weights
        self._opset = {entry.domain: entry.version for entry in source.opset_import}[""]
        self._source_nodes = _inlined(source)
        self._readers: dict[str, list[str]] = defaultdict(list)
        for node in self._source_nodes:
            for name in node.input:
                self._readers[name].append(node.op_type)
        self._constants: dict[str, _Constant] = {}
        self._shapes: dict[str, Shape] = {}  # of all others, with `BATCH` for the batch
        self._rows: dict[str, tuple[str, str]] = {}  # rows of a stored table: the table and the indices
        self._same: dict[str, str] = {}  # values that are another one
        self._written: set[str] = set()
        self.weights: dict[str, Callable[[], bytes]] = {}
        self.model = ModelProto(
            ir_version=IR_VERSION,
            opset_import=[helper.make_opsetid("", OPSET)],
            producer_name=source.producer_name,
            producer_version=source.producer_version,
            doc_string=source.doc_string,
            metadata_props=source.metadata_props,
        )
        self.model.graph.name = source.graph.name
        self.model.graph.input.extend(source.graph.input)
        self.model.graph.output.extend(source.graph.output)

    def run(self) -> None:
        """Translate the whole graph."""
        for value in self._source.graph.input:
            dims = value.type.tensor_type.shape.dim
            self._shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else BATCH for dim in dims)
        for tensor in self._source.graph.initializer:
            make = partial(_numbers, tensor, self._source_weights.get(tensor.name))
            self._constants[tensor.name] = _Constant(tensor.name, tensor.data_type, tuple(tensor.dims), make)
        for node in self._source_nodes:
            inputs = [self._same.get(name, name) for name in node.input]
            if all(name in self._constants and self._constants[name].is_number for name in inputs if name):
                self._evaluate(node, inputs)
                continue
            rule = None if node.domain else _RULES.get(node.op_type)
            if rule is None:
                raise _no_words(f"the operator {node.domain}:{node.op_type}", node)
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            rule(self, node, inputs, attributes)

    def _evaluate(self, node: NodeProto, inputs: list[str]) -> None:
        """Compute a constant; one that is made of a single tensor for this node alone takes its name."""
        read = {name for name in inputs if name}
        tensors = [numpy_helper.from_array(self._value(name), name) for name in sorted(read)]
        alone = NodeProto()
        alone.CopyFrom(node)
        alone.input[:] = inputs
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([alone], "constant", [], outputs, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)])
        values = ReferenceEvaluator(model).run(None, {})
        takes_over = len(read) == len(values) == 1 and len(self._readers[inputs[0]]) == 1
        for name, value in zip(node.output, values, strict=True):
            self._know(name, np.asarray(value), inputs[0] if takes_over else name)

    def _know(self, value: str, array: Array, name: str) -> None:
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        onnx_type = TensorProto.FLOAT if array.dtype == np.float32 else TensorProto.INT64
        self._constants[value] = _Constant(name, onnx_type, array.shape, lambda: array)

    def _value(self, name: str) -> Array:
        """A constant's numbers."""
        return self._constants[name].make()

    def _shape(self, name: str) -> Shape:
        return self._shapes[name] if name in self._shapes else self._constants[name].shape

    def _write(self, constant: _Constant) -> str:
        """Write an initializer, once; its name."""
        name = constant.name
        if name not in self._written:
            self._written.add(name)
            tensor = self.model.graph.initializer.add(name=name, data_type=constant.onnx_type, dims=constant.shape)
            if 8 * math.prod(constant.shape) <= SMALL_BYTES:
                tensor.raw_data = _bytes(constant.make)
            else:
                self.weights[name] = partial(_bytes, constant.make)
        return name

    def _integers(self, values: Sequence[int], what: str) -> str:
        """Write a list of integers; its name."""
        array = np.array(values, np.int64)
        name = f"{what}.{'x'.join(map(str, values))}"
        return self._write(_Constant(name, TensorProto.INT64, array.shape, lambda: array))

    def _emit(self, operator: str, inputs: Sequence[str], output: str, shape: Shape, **attributes: Any) -> str:
        """Write a node, and the constants among its inputs; `shape` is its output's."""
        names = [self._write(self._constants[name]) if name in self._constants else name for name in inputs]
        self.model.graph.node.append(helper.make_node(operator, names, [output], name=output, **attributes))
        self._shapes[output] = shape
        return output

    def _elementwise(self, operator: str, inputs: Sequence[str], output: str) -> str:
        return self._emit(operator, inputs, output, _broadcast([self._shape(name) for name in inputs]))

    def _reshape(self, value: str, shape: Shape, output: str) -> str:
        return self._emit("Reshape", [value, self._integers(shape, "shape")], output, shape)

    def _reduce(self, operator: str, value: str, axis: int, output: str, keep: bool = True) -> str:
        shape = self._shape(value)
        axis %= len(shape)
        reduced = (*shape[:axis], *((1,) if keep else ()), *shape[axis + 1 :])
        if operator == "ReduceSum":  # the one reduction of opset 13 whose axes are an input
            axes = self._integers([axis], "axis")
            return self._emit(operator, [value, axes], output, reduced, keepdims=int(keep))
        return self._emit(operator, [value], output, reduced, axes=[axis], keepdims=int(keep))

    # One rule for each operator that the engine's graph has and that is not computed away.

    def _plain(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        self._elementwise(node.op_type, inputs, node.output[0])

    def _sum(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        total = inputs[0]
        for index, term in enumerate(inputs[1:], 2):
            output = node.output[0] if index == len(inputs) else f"{node.output[0]}.{index}"
            total = self._elementwise("Add", [total, term], output)

    def _matmul(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        left, right = (self._shape(name) for name in inputs)
        shape = (*_broadcast([left[:-2], right[:-2]]), left[-2], right[-1])
        self._emit("MatMul", inputs, node.output[0], shape)

    def _clip(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        if len(inputs) > 2 and inputs[2]:
            raise _no_words("Clip from above", node)
        self._elementwise("Max", inputs[:2], node.output[0])

    def _layer_norm(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        if attributes.get("axis", -1) != -1:
            raise _no_words("LayerNormalization over more than the last axis", node)
        x, scale, *bias = inputs
        out = node.output[0]
        eps = np.array([attributes.get("epsilon", 1e-5)], np.float32)
        eps_name = f"eps.{eps[0]:g}"
        self._know(eps_name, eps, eps_name)
        centred = self._elementwise("Sub", [x, self._reduce("ReduceMean", x, -1, f"{out}.mean")], f"{out}.centred")
        squares = self._elementwise("Mul", [centred, centred], f"{out}.squares")
        variance = self._reduce("ReduceMean", squares, -1, f"{out}.variance")
        above = self._elementwise("Add", [variance, eps_name], f"{out}.above_zero")
        deviation = self._elementwise("Sqrt", [above], f"{out}.deviation")
        steps = [("Div", deviation)]
        if scale not in self._constants or not (self._value(scale) == 1).all():
            steps.append(("Mul", scale))
        steps += [("Add", name) for name in bias]
        value = centred
        for index, (operator, operand) in enumerate(steps, 1):
            value = self._elementwise(operator, [value, operand], out if index == len(steps) else f"{out}.{operator}")

    def _reduce_l2(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        x, out = inputs[0], node.output[0]
        squares = self._elementwise("Mul", [x, x], f"{out}.squares")
        total = self._reduce("ReduceSum", squares, self._axis(inputs, node), f"{out}.sum", _keeps(attributes))
        self._elementwise("Sqrt", [total], out)

    def _reduce_sum(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        self._reduce("ReduceSum", inputs[0], self._axis(inputs, node), node.output[0], _keeps(attributes))

    def _axis(self, inputs: list[str], node: NodeProto) -> int:
        if len(inputs) < 2 or self._constants[inputs[1]].shape != (1,):
            raise _no_words("a reduction over other than one axis", node)
        return int(self._value(inputs[1])[0])

    def _view(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        shape = self._shape(inputs[0])
        numbers = [int(number) for number in self._value(inputs[1])]
        if node.op_type == "Reshape":
            target = tuple(numbers)
        elif node.op_type == "Unsqueeze":
            rank = len(shape) + len(numbers)
            left = iter(shape)
            added = {axis % rank for axis in numbers}
            target = tuple(1 if index in added else next(left) for index in range(rank))
        else:
            removed = {axis % len(shape) for axis in numbers}
            target = tuple(size for index, size in enumerate(shape) if index not in removed)
        if target.count(BATCH) != 1 or 0 in target or math.prod(target) != math.prod(shape):
            raise _no_words(f"{node.op_type} of {list(shape)} to {list(target)}", node)
        self._reshape(inputs[0], target, node.output[0])

    def _split(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        shape, axis, out = self._shape(inputs[0]), attributes.get("axis", 0), list(node.output)
        sizes = [int(size) for size in self._value(inputs[1])]
        names = [inputs[0], self._integers(sizes, "sizes")]
        self.model.graph.node.append(helper.make_node("Split", names, out, name=out[0], axis=axis))
        for name, size in zip(out, sizes, strict=True):
            self._shapes[name] = (*shape[:axis], size, *shape[axis + 1 :])

    def _shape_of(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        shape = self._shape(inputs[0])[attributes.get("start", 0) : attributes.get("end")]
        self._know(node.output[0], np.array(shape, np.int64), node.output[0])

    def _cast_like(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        self._know(node.output[0], self._value(inputs[0]).astype(np.float32), node.output[0])  # as all is

    def _gather(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        (table, indices), axis, out = inputs, attributes.get("axis", 0), node.output[0]
        if table in self._constants and self._readers[out] in (["Cast"], ["DequantizeLinear"]):
            self._rows[out] = (table, indices)  # written by what makes float32 of it
        else:
            shape = self._shape(table)
            self._emit("Gather", inputs, out, (*shape[:axis], *self._shape(indices), *shape[axis + 1 :]), axis=axis)

    def _cast(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        """Of a stored tensor, or of rows of one: f16 is cast by the model, any other already here."""
        out = node.output[0]
        name, indices = self._rows.get(inputs[0], (inputs[0], None))
        stored = self._constants.get(name)
        if stored is None or attributes["to"] not in (TensorProto.FLOAT, TensorProto.INT32):
            raise _no_words("a Cast of what is computed", node)
        shape = stored.shape if indices is None else (*self._shape(indices), *stored.shape[1:])
        if stored.onnx_type == TensorProto.FLOAT16:
            rows = name if indices is None else self._emit("Gather", [name, indices], inputs[0], shape, axis=0)
            self._emit("Cast", [rows], out, shape, to=TensorProto.FLOAT)
            return
        onnx_type, dtype = (
            (TensorProto.FLOAT, np.float32) if attributes["to"] == TensorProto.FLOAT else (TensorProto.INT64, np.int64)
        )
        widened = _Constant(stored.name, onnx_type, stored.shape, lambda: stored.make().astype(dtype))
        if indices is None:
            self._constants[out] = widened
        else:
            self._constants[name] = widened
            self._emit("Gather", [name, indices], out, shape, axis=0)

    def _dequantize(self, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> None:
        """Of a stored matrix [in, out] with its scales, or of rows of a stored table."""
        axis, group, out = attributes["axis"], attributes["block_size"], node.output[0]
        (name, indices), (scale_name, _) = (self._rows.get(each, (each, None)) for each in inputs)
        integers, scales = self._constants.get(name), self._constants.get(scale_name)
        if integers is None or scales is None or axis != (0 if indices is None else 1):
            raise _no_words("a DequantizeLinear of what is computed", node)
        grouped = _Grouped(integers, scales, axis, group)
        if grouped.size == 1:
            self._constants[name] = grouped.numbers()
            if indices is None:
                self._same[out] = name
            else:
                self._emit("Gather", [name, indices], out, (*self._shape(indices), *integers.shape[1:]), axis=0)
            return
        self._constants[name], self._constants[scale_name] = stored = grouped.integers(), grouped.scales()
        shape, scale_shape, whole = (each.shape for each in (*stored, integers))
        if indices is not None:
            shape, scale_shape, whole = (self._shape(indices) + each[1:] for each in (shape, scale_shape, whole))
            name = self._emit("Gather", [name, indices], inputs[0], shape, axis=0)
            scale_name = self._emit("Gather", [scale_name, indices], inputs[1], scale_shape, axis=0)
        cast = self._emit("Cast", [name], f"{out}.integers", shape, to=TensorProto.FLOAT)
        scaled = self._emit("Mul", [cast, scale_name], out if shape == whole else f"{out}.groups", shape)
        if shape != whole:
            self._reshape(scaled, whole, out)


@dataclass(frozen=True)
class _Grouped:
    """Integers with scales of groups along an axis, all of one size.

    Where the engine's groups leave a rest, their largest part that leaves none takes their place, with their scales
    repeated; a part of one number is none.
    """

    stored: _Constant
    stored_scales: _Constant
    axis: int
    group: int

    @property
    def size(self) -> int:
        """Numbers of a group."""
        width = self.stored.shape[self.axis]
        return width if width <= self.group else math.gcd(width, self.group)

    def _cut(self, size: int) -> Shape:
        """The integers' shape with an axis of groups of which each has `size` numbers or scales."""
        shape, axis = self.stored.shape, self.axis
        groups = shape[axis] // self.size
        return (*shape[:axis], *((groups,) if groups > 1 else ()), size, *shape[axis + 1 :])

    def integers(self) -> _Constant:
        """The integers as INT8, with an axis of groups before that of their numbers where there are several."""
        stored, shape = self.stored, self._cut(self.size)
        return _Constant(stored.name, TensorProto.INT8, shape, lambda: stored.make().astype(np.int8).reshape(shape))

    def scales(self) -> _Constant:
        """The scales in float32, one for each group."""
        stored, shape = self.stored_scales, self._cut(1)
        return _Constant(stored.name, TensorProto.FLOAT, shape, lambda: self._spread(self.size).reshape(shape))

    def _spread(self, size: int) -> Array:
        """A scale for each `size` numbers along the axis."""
        width = self.stored.shape[self.axis]
        repeated = np.repeat(self.stored_scales.make(), -(-min(self.group, width) // size), self.axis)
        return repeated.take(range(width // size), self.axis)

    def numbers(self) -> _Constant:
        """What the integers stand for, in float32."""
        stored = self.stored
        return _Constant(
            stored.name, TensorProto.FLOAT, stored.shape, lambda: stored.make().astype(np.float32) * self._spread(1)
        )


Rule = Callable[[_Writer, NodeProto, list[str], dict[str, Any]], None]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("Add", "Div", "Exp", "Max", "Mul", "Neg", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh"), _Writer._plain
    ),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze"), _Writer._view),
    "Cast": _Writer._cast,
    "CastLike": _Writer._cast_like,
    "Clip": _Writer._clip,
    "DequantizeLinear": _Writer._dequantize,
    "Gather": _Writer._gather,
    "LayerNormalization": _Writer._layer_norm,
    "MatMul": _Writer._matmul,
    "ReduceL2": _Writer._reduce_l2,
    "ReduceSum": _Writer._reduce_sum,
    "Shape": _Writer._shape_of,
    "Split": _Writer._split,
    "Sum": _Writer._sum,
}


def _inlined(model: ModelProto) -> list[NodeProto]:
    """The nodes with functions written out, and activations whole: two terms are for ONNX Runtime."""
    bare = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:  # without its numbers, of which the inliner would make copies
        bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    whole(bare)
    return list(inline_local_functions(bare).graph.node)


def _numbers(tensor: TensorProto, make: Callable[[], bytes] | None) -> Array:
    if make is None:
        return numpy_helper.to_array(tensor)
    whole = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=make())
    return numpy_helper.to_array(whole)


def _bytes(make: Callable[[], Array]) -> bytes:
    return make().tobytes()


def _keeps(attributes: dict[str, Any]) -> bool:
    return bool(attributes.get("keepdims", 1))


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of an elementwise result; the batch goes with itself and with 1."""
    rank = max(map(len, shapes))
    sizes = zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    return tuple(next((size for size in each if size != 1), 1) for each in sizes)


def _no_words(what: str, node: NodeProto) -> GosletError:
    return GosletError(
        f"the portable form has no words for {what}",
        place=f"node {node.name}",
        remedy=_REPORT,
    )
