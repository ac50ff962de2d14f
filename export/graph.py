"""The step graph: one token of an RWKV version, traced from PyTorch to ONNX.

The step is traced in float32, with at most `TRACED_LAYERS` layers, since torch takes about a second for each; then the
last layer is repeated (`goslet.export.layers`), for all but the first are alike; then every weight gets its storage: a
quantized matrix is DequantizeLinear before its MatMul, the only form in which the graph ever meets it.

The graph holds no weights. Every initializer is external under its own name; the engine's reader or a backend supplies
it. RWKV's own operators are nodes of the domain ``goslet``, each with a model-local function of standard ONNX as its
body.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx_ir.passes import common as ir_passes
from torch import Tensor

from ..errors import GosletError
from ..initializers import SCALE_SUFFIX, Initializer, weight_initializers
from ..spec import EMBEDDING, ModelSpec, StateSpec
from ..weights import WeightFormat
from .layers import named_layer, repeat_last_layer
from .models.blocks import Operator, Version
from .models.tensors import TensorRule

OPSET = 21
DOMAIN = "goslet"
DOMAIN_VERSION = 1
# The first layer is its own, the second shows how a layer takes from the one before, the third is repeated.
TRACED_LAYERS = 3
FLOAT_SUFFIX = ".float"


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Let a signal through that torch turned into an error of its own, and keep its pages of advice away from users."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if not isinstance(cause, Exception):  # Ctrl-C, or the end that SIGTERM asks for
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise GosletError(
            f"the step cannot be traced: {type(error).__name__}", remedy="report this as a bug, with --debug's output"
        ) from error


class _TraceOps:
    """The `Ops` that is traced: matrices are [in, out], operators are nodes of the domain goslet."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def vector(self, name: str) -> Tensor:
        return self._parameters[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self._parameters[name]

    def call(self, operator: Operator, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = operator.output_shapes(*inputs)
        return tuple(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{operator.name}",
                inputs,
                dtypes=[torch.float32] * len(shapes),
                shapes=shapes,
                version=DOMAIN_VERSION,
            )
        )


class _Step(torch.nn.Module):
    """The step as a module with positional state, holding placeholders that take no memory."""

    def __init__(self, version: Version, spec: ModelSpec, state_spec: StateSpec, rules: Iterable[TensorRule]) -> None:
        super().__init__()
        self._rwkv = version
        self._spec = spec
        self._state_names = [tensor.name for tensor in state_spec.tensors]
        self.tensor_names: dict[str, str] = {}
        for rule in rules:
            shape = rule.shape[::-1]
            attribute = f"t{len(self.tensor_names)}"
            self.register_buffer(attribute, torch.zeros((1,) * len(shape)).expand(shape))
            self.tensor_names[attribute] = rule.name

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ops = _TraceOps({name: getattr(self, attribute) for attribute, name in self.tensor_names.items()})
        n_pieces = len(self._spec.input_sizes)
        state = dict(zip(self._state_names, inputs[n_pieces:], strict=True))
        logits, new_state = self._rwkv.step(self._spec, ops, inputs[:n_pieces], state)
        return logits, *(new_state[name] for name in self._state_names)


_EXPORTER = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (missing torchvision, deprecations inside torch) away from users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    _EXPORTER.acquire()  # standard output and loggers belong to the whole process
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        _EXPORTER.release()


def trace_step(
    version: Version, spec: ModelSpec, rules: Sequence[TensorRule], formats: Mapping[str, WeightFormat]
) -> ModelProto:
    """The step graph of one token.

    Args:
        version: the RWKV version.
        spec: the model's dimensions.
        rules: the engine's tensors.
        formats: the storage format of each.

    Returns:
        The graph: inputs ``x`` [B, sum(spec.input_sizes)], the token's row of the embedding, and ``state_in.<name>``
        [B, …], outputs ``logits`` [B, V] and ``state_out.<name>`` [B, …], all float32. Its initializers are external:
        each has its tensor's name as ``location``, matrices are [in, out], scales of a quantized matrix are float32
        [⌈in / group⌉, out] under the name plus ``.scale``.
    """
    read = [rule for rule in rules if rule.name != EMBEDDING]
    traced_spec = replace(spec, n_layer=min(spec.n_layer, TRACED_LAYERS))
    traced = [rule for rule in read if named_layer(rule.name, otherwise=0) < traced_spec.n_layer]
    proto = _traced(version, traced_spec, traced)
    repeat_last_layer(proto.graph, TRACED_LAYERS - 1, spec.n_layer)
    _join_inputs(proto.graph, spec)
    _keep_products_apart(proto.graph)
    _store(proto.graph, {rule.name: formats[rule.name] for rule in read})
    for operator in version.OPERATORS:
        proto.functions.append(operator.function())
    if DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    return proto


_TRACES: dict[object, bytes] = {}
_TRACES_KEPT = 16


def _traced(version: Version, spec: ModelSpec, rules: Sequence[TensorRule]) -> ModelProto:
    """As `_trace_float`, which takes seconds; the last shapes' graphs are kept, some hundred kilobytes each."""
    key = (version.NAMES, spec, tuple((rule.name, rule.shape) for rule in rules))
    content = _TRACES.get(key)
    if content is None:
        content = _trace_float(version, spec, rules).SerializeToString(deterministic=True)
        while len(_TRACES) >= _TRACES_KEPT:
            _TRACES.pop(next(iter(_TRACES)), None)
        _TRACES[key] = content
    proto: ModelProto = ModelProto.FromString(content)
    return proto


def _trace_float(version: Version, spec: ModelSpec, rules: Iterable[TensorRule]) -> ModelProto:
    """The traced graph with every weight an external float32 initializer, and an input for each piece of a token."""
    state_spec = version.state_spec(spec)
    module = _Step(version, spec, state_spec, rules).eval()
    batch = torch.export.Dim("B")
    # 2, because torch.export takes a size of 1 for a constant.
    pieces = tuple(torch.zeros(2, size) for size in spec.input_sizes)
    state = tuple(torch.zeros(2, *tensor.shape) for tensor in state_spec.tensors)
    state_names = [tensor.name for tensor in state_spec.tensors]
    with _quiet(), _own_errors():
        program = torch.onnx.export(
            module,
            (*pieces, *state),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes={"inputs": tuple({0: batch} for _ in (*pieces, *state))},
            input_names=[*_piece_names(spec), *(f"state_in.{name}" for name in state_names)],
            output_names=["logits", *(f"state_out.{name}" for name in state_names)],
        )
        assert program is not None
        model = program.model
        _externalize(model, module.tensor_names)
        ir_passes.RemoveUnusedNodesPass()(model)
        ir_passes.CommonSubexpressionEliminationPass()(model)
        ir_passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name = "goslet"
    model.producer_version = None
    model.graph.name = f"rwkv{spec.version}_step"
    proto = ir.serde.serialize_model(model)
    for values in (proto.graph.input, proto.graph.output, proto.graph.value_info, proto.graph.initializer):
        for value in values:
            value.ClearField("metadata_props")
    # torch reads the batch size off whichever input it likes; read off x it belongs to no layer.
    inputs = {value.name for value in proto.graph.input}
    for node in proto.graph.node:
        if node.op_type == "Shape" and node.input[0] in inputs:
            node.input[0] = "x"
    return proto


def _piece_names(spec: ModelSpec) -> list[str]:
    """The traced graph's inputs for a token: the embedded token, and what belongs to each layer."""
    return ["x", *(f"x.{layer}.piece" for layer in range(len(spec.input_sizes) - 1))]


def _join_inputs(graph: GraphProto, spec: ModelSpec) -> None:
    """Take all pieces of a token from one input ``x``."""
    names = _piece_names(spec)
    if len(names) == 1:
        return
    inputs = {value.name: value for value in graph.input}
    embedded = "x.embedded"
    for node in graph.node:
        node.input[:] = [embedded if name == "x" else name for name in node.input]
    for name in names[1:]:
        graph.input.remove(inputs[name])
    inputs["x"].type.tensor_type.shape.dim[1].dim_value = sum(spec.input_sizes)
    sizes = helper.make_node("Constant", [], ["x.sizes"], value_ints=spec.input_sizes, name="x.sizes")
    split = helper.make_node("Split", ["x", "x.sizes"], [embedded, *names[1:]], axis=1, name="x.split")
    graph.node.insert(0, sizes)
    graph.node.insert(1, split)


def _keep_products_apart(graph: GraphProto) -> None:
    """Write what is added to a product with a weight as Sum instead of Add.

    They are one to ONNX, but ONNX Runtime joins MatMul and Add to a Gemm before it looks for products with dequantized
    weights, which then are dequantized again at every step.
    """
    weights = {initializer.name for initializer in graph.initializer}
    products = {
        node.output[0] for node in graph.node if node.op_type == "MatMul" and not weights.isdisjoint(node.input)
    }
    for node in graph.node:
        if node.op_type == "Add" and not products.isdisjoint(node.input):
            node.op_type = "Sum"


def _externalize(model: ir.Model, names: Mapping[str, str]) -> None:
    for attribute, name in names.items():
        value = model.graph.initializers.pop(attribute, None)
        if value is None:
            raise GosletError("the traced graph lost a weight", place=name, remedy="report this as a bug in goslet")
        assert value.shape is not None
        value.name = name
        value.const_value = ir.ExternalTensor(
            location=name, offset=0, length=None, dtype=ir.DataType.FLOAT, shape=value.shape, name=name
        )
        model.graph.initializers[name] = value


def _store(graph: GraphProto, formats: Mapping[str, WeightFormat]) -> None:
    """Give every weight its stored type, and put what turns it to float32 before its first use."""
    initializers: list[TensorProto] = []
    makers: dict[str, NodeProto] = {}
    for initializer in graph.initializer:
        name = initializer.name
        if name not in formats:  # a constant of the tracer's
            initializers.append(initializer)
            continue
        chosen = formats[name]
        stored_shape = tuple(reversed(initializer.dims))
        initializers += [
            external_initializer(*item) for item in weight_initializers(name, chosen, stored_shape).items()
        ]
        made = name + FLOAT_SUFFIX
        if chosen.group is not None:
            makers[name] = helper.make_node(
                "DequantizeLinear",
                [name, name + SCALE_SUFFIX],
                [made],
                axis=0,
                block_size=chosen.group,
                name=f"dequantize.{name}",
            )
        elif chosen.name != "f32":
            makers[name] = helper.make_node("Cast", [name], [made], to=TensorProto.FLOAT, name=f"cast.{name}")
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    described = [value for value in graph.value_info if value.name not in formats]  # they say their types themselves
    del graph.value_info[:]
    graph.value_info.extend(described)
    nodes: list[NodeProto] = []
    placed = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in makers:
                if name not in placed:
                    nodes.append(makers[name])
                    placed.add(name)
                node.input[index] = name + FLOAT_SUFFIX
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def external_initializer(name: str, initializer: Initializer) -> TensorProto:
    """An initializer whose data lies outside, in a place that has its name."""
    tensor = TensorProto(
        name=name, data_type=initializer.onnx_type, dims=initializer.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", name), ("offset", 0), ("length", initializer.size_bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
