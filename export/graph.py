"""The step graph: one token of an RWKV version, traced from PyTorch to ONNX.

The graph holds no weights. Every initializer is external under its own name; the engine's reader or a backend
supplies it. A quantized matrix is DequantizeLinear before MatMul from the moment of tracing, RWKV's own operators
are nodes of the domain ``goslet``, each with a model-local function of standard ONNX as its body.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto
from onnx_ir.passes import common as ir_passes
from torch import Tensor

from ..errors import GosletError
from ..initializers import SCALE_SUFFIX
from ..spec import ModelSpec, StateSpec
from ..weights import WeightFormat
from .models.blocks import Operator, TensorRule, Version

OPSET = 21
DOMAIN = "goslet"
DOMAIN_VERSION = 1

_ONNX_TYPES = {
    "f32": ir.DataType.FLOAT,
    "f16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}
# torch has no 4-bit dtype: int4 is traced as int8, and the initializer is retyped before anything is written.
_TRACED_TYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.int8,
}


class _TraceOps:
    """The `Ops` that writes nodes: weights are initializers, operators are nodes of the domain goslet."""

    def __init__(self, parameters: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]) -> None:
        self._parameters = parameters
        self._formats = formats

    def _float(self, name: str) -> Tensor:
        return self._parameters[name].to(torch.float32)

    def vector(self, name: str) -> Tensor:
        return self._float(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        group = self._formats[name].group
        if group is None:
            return x @ self._float(name)
        values = self._parameters[name]
        matrix = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (values, self._parameters[name + SCALE_SUFFIX]),
            {"axis": 0, "block_size": group},
            dtype=torch.float32,
            shape=values.shape,
            version=OPSET,
        )
        return x @ matrix

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

    def __init__(
        self,
        version: Version,
        spec: ModelSpec,
        state_spec: StateSpec,
        rules: Mapping[str, TensorRule],
        formats: Mapping[str, WeightFormat],
    ) -> None:
        super().__init__()
        self._rwkv = version
        self._spec = spec
        self._state_names = [tensor.name for tensor in state_spec.tensors]
        self._formats = formats
        self.tensor_names: dict[str, str] = {}
        for name, rule in rules.items():
            shape = rule.stored_shape[::-1] if rule.is_matrix else rule.stored_shape
            self._place(name, shape, _TRACED_TYPES[formats[name].name])
            if (group := formats[name].group) is not None:
                self._place(name + SCALE_SUFFIX, (-(-shape[0] // group), shape[1]), torch.float32)

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        attribute = f"t{len(self.tensor_names)}"
        placeholder = torch.zeros((1,) * len(shape), dtype=dtype).expand(shape)
        self.register_buffer(attribute, placeholder)
        self.tensor_names[attribute] = name

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        parameters = {name: getattr(self, attribute) for attribute, name in self.tensor_names.items()}
        ops = _TraceOps(parameters, self._formats)
        logits, new_state = self._rwkv.step(self._spec, ops, x, dict(zip(self._state_names, state, strict=True)))
        return logits, *(new_state[name] for name in self._state_names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (missing torchvision, deprecations inside torch) away from users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
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


def trace_step(
    version: Version, spec: ModelSpec, state_spec: StateSpec, formats: Mapping[str, WeightFormat]
) -> ModelProto:
    """Trace one token to ONNX.

    Args:
        version: the RWKV version.
        spec: the model's dimensions.
        state_spec: the state's tensors, which become the graph's inputs and outputs.
        formats: the storage format of every tensor that the step reads.

    Returns:
        The graph: inputs ``x`` [B, D] and ``state_in.<name>`` [B, …], outputs ``logits`` [B, V] and
        ``state_out.<name>`` [B, …], all float32. Its initializers are external: each has its tensor's name as
        ``location``, matrices are [in, out], scales of a quantized matrix are float32 [⌈in / group⌉, out] under the
        name plus ``.scale``.
    """
    rules = {rule.name: rule for rule in version.tensor_rules(spec) if rule.name in formats}
    module = _Step(version, spec, state_spec, rules, formats).eval()
    batch = torch.export.Dim("B")
    # 2, because torch.export takes a size of 1 for a constant.
    x = torch.zeros(2, spec.n_embd)
    state = tuple(torch.zeros(2, *tensor.shape) for tensor in state_spec.tensors)
    names = [tensor.name for tensor in state_spec.tensors]
    with _quiet():
        program = torch.onnx.export(
            module,
            (x, *state),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes={"x": {0: batch}, "state": tuple({0: batch} for _ in state)},
            input_names=["x", *(f"state_in.{name}" for name in names)],
            output_names=["logits", *(f"state_out.{name}" for name in names)],
        )
        assert program is not None
        model = program.model
        _externalize(model, module.tensor_names, formats)
        ir_passes.RemoveUnusedNodesPass()(model)
        ir_passes.CommonSubexpressionEliminationPass()(model)
        ir_passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name = "goslet"
    model.producer_version = None
    model.graph.name = f"rwkv{version.NAME}_step"
    proto = ir.serde.serialize_model(model)
    for operator in version.OPERATORS:
        proto.functions.append(operator.function())
    domains = {entry.domain for entry in proto.opset_import}
    if DOMAIN not in domains:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    return proto


def _externalize(model: ir.Model, names: Mapping[str, str], formats: Mapping[str, WeightFormat]) -> None:
    for attribute, name in names.items():
        value = model.graph.initializers.pop(attribute, None)
        if value is None:
            raise GosletError("the traced graph lost a weight", place=name, remedy="report this as a bug in goslet")
        assert value.shape is not None
        dtype = _ONNX_TYPES[formats[name].name] if name in formats else ir.DataType.FLOAT
        value.name = name
        value.dtype = dtype
        value.const_value = ir.ExternalTensor(
            location=name, offset=0, length=initializer_size_bytes(value.shape.numpy(), dtype), dtype=dtype,
            shape=value.shape, name=name,
        )  # fmt: skip
        model.graph.initializers[name] = value


def initializer_size_bytes(shape: tuple[int, ...], dtype: ir.DataType) -> int:
    """Bytes of an initializer's raw data; 4-bit elements are packed two to a byte over the whole tensor."""
    elements = 1
    for size in shape:
        elements *= size
    return -(-elements * dtype.bitwidth // 8)


def check_graph(graph: ModelProto) -> None:
    """Run onnx.checker with full shape inference; external weights are checked as inputs, by type and shape.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid ONNX.
    """
    standalone = ModelProto()
    standalone.CopyFrom(graph)
    for initializer in standalone.graph.initializer:
        standalone.graph.input.append(
            onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
        )
    del standalone.graph.initializer[:]
    onnx.checker.check_model(standalone, full_check=True)
