"""One self-contained ONNX model from an engine: weights inside, and a token instead of an embedded token as input."""

from __future__ import annotations

import os

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from ..enginefile import EngineFile
from ..errors import OutputError
from ..initializers import SCALE_SUFFIX, graph_initializers
from ..output import atomic_write, check_output
from ..spec import EMBEDDING
from ..weights import quantized_values
from .graph import check_graph

TOKEN = "token"
# Protocol buffers, and so ONNX files, end at 2 GiB.
MAX_MODEL_BYTES = (1 << 31) - (1 << 20)

_FLOAT_TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def write_onnx(engine: EngineFile, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an engine's step as one ONNX file.

    Its inputs are ``token`` int64 [B] and the step graph's ``state_in.…``; its outputs are the step graph's.

    Raises:
        OutputError: the model is too large for one ONNX file, or the file cannot be written.
    """
    check_output(path, overwrite)
    if engine.size_bytes > MAX_MODEL_BYTES:
        raise OutputError(
            "the model is too large for one ONNX file",
            file=path,
            expected=f"at most {MAX_MODEL_BYTES} bytes",
            found=f"{engine.size_bytes} bytes",
            remedy="export with fewer bits per weight, or without --onnx",
        )
    model = ModelProto.FromString(bytes(engine.graph_bytes))
    _fill(model.graph, engine)
    _gather(model.graph, engine)
    check_graph(model)
    with atomic_write(path, overwrite) as file:
        file.write(model.SerializeToString(deterministic=True))


def _fill(graph: GraphProto, engine: EngineFile) -> None:
    content = graph_initializers(engine)
    for initializer in graph.initializer:
        initializer.ClearField("external_data")
        initializer.data_location = TensorProto.DEFAULT
        initializer.raw_data = content[initializer.name].tobytes()


def _gather(graph: GraphProto, engine: EngineFile) -> None:
    """Replace the input x by the embedding's row of a token; int4 and int3 rows become int8, which Gather takes."""
    embedding = engine.weight(EMBEDDING)
    x = next(value for value in graph.input if value.name == "x")
    batch = x.type.tensor_type.shape.dim[0].dim_param
    token = helper.make_tensor_value_info(TOKEN, TensorProto.INT64, [batch])
    if embedding.scales is None:
        table_type, table = _FLOAT_TYPES[embedding.format.name], embedding.data.tobytes()
        nodes = [
            helper.make_node("Gather", [EMBEDDING, TOKEN], ["embedded"], axis=0),
            helper.make_node("Cast", ["embedded"], ["x"], to=TensorProto.FLOAT),
        ]
    else:
        table_type, table = TensorProto.INT8, quantized_values(embedding).tobytes()
        scales = embedding.scales.astype(np.float32)
        graph.initializer.append(
            helper.make_tensor(EMBEDDING + SCALE_SUFFIX, TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True)
        )
        nodes = [
            helper.make_node("Gather", [EMBEDDING, TOKEN], ["row"], axis=0),
            helper.make_node("Gather", [EMBEDDING + SCALE_SUFFIX, TOKEN], ["row_scale"], axis=0),
            helper.make_node(
                "DequantizeLinear", ["row", "row_scale"], ["x"], axis=1, block_size=embedding.format.group
            ),
        ]
    graph.initializer.append(helper.make_tensor(EMBEDDING, table_type, embedding.shape, table, raw=True))
    for offset, node in enumerate(nodes):
        graph.node.insert(offset, node)
    graph.input.remove(x)
    graph.input.insert(0, token)
