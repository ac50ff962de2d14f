"""Whether a model is valid ONNX. Without torch, since a device builds its plans without it."""

from __future__ import annotations

import onnx
from onnx import ModelProto, helper


def check_graph(graph: ModelProto) -> None:
    """Run onnx.checker with full shape inference; initializers are checked as inputs, by type and shape.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid ONNX.
    """
    initializers = {initializer.name: initializer for initializer in graph.graph.initializer}
    for described in graph.graph.value_info:
        if described.name in initializers:
            tensor = initializers[described.name]
            own = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            if described.type != own.type:
                raise onnx.shape_inference.InferenceError(f"value_info of {tensor.name} disagrees with the initializer")
    standalone = ModelProto()
    standalone.CopyFrom(graph)
    for initializer in standalone.graph.initializer:
        standalone.graph.input.append(
            helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
        )
    del standalone.graph.initializer[:]
    onnx.checker.check_model(standalone, full_check=True)
