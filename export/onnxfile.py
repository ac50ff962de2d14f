"""A self-contained ONNX model from an engine: weights, and a token instead of an embedded token as input.

The model is one step: ``token`` int64 [B] and ``state_in.NAME`` float32 [B, …] give ``logits`` float32 [B, V] and
``state_out.NAME``, which the next token takes as ``state_in.NAME``. What else is needed to run it is in its metadata
(`metadata`), which ONNX Runtime gives as ``session.get_modelmeta().custom_metadata_map`` and onnx as
``model.metadata_props``, and which is about the names of inputs alone, so that it holds whatever form the graph is
written in. A text begins with the states that it names, the same for every row of a batch::

    def begin(metadata, batch):
        state = {}
        for name, (shape, value) in json.loads(metadata["goslet.state"]).items():
            tuned = metadata.get(f"goslet.state.{name}")
            one = np.full(shape, value, "<f4") if tuned is None else np.frombuffer(base64.b64decode(tuned), "<f4")
            state[f"state_in.{name}"] = np.repeat(one.reshape(1, *shape), batch, 0)
        return state

Where a runtime hides the metadata: all states begin with zeros, but RWKV-4's ``LAYER.pp`` with -1e30, and those that
were tuned (``--state``). Neither default inputs nor unused initializers can do this: OpenVINO and others make constants
of the former, so that no state could be given any more, and ONNX Runtime drops the latter.

It is written in one of two forms. ``onnxruntime`` is the engine's graph, in the words that ONNX Runtime is fast with:
weights of 4 and 8 bits stay what they are. ``portable`` (`goslet.export.onnx_portable`) is what other runtimes take
too, and an integer takes a byte and an eighth there in groups of 32, however few bits it has in the engine.

A model of more than 2 GiB, where protocol buffers end, has its weights in a second file, ``NAME.data`` beside ``NAME``.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from .. import __version__
from ..enginefile import EngineFile
from ..initializers import SCALE_SUFFIX, weight_buffers, weight_initializers
from ..output import check_output
from ..spec import EMBEDDING
from ..weights import quantized_values
from .onnx_portable import portable_form
from .streamed import StreamedModel, write_streamed

ONNXRUNTIME, PORTABLE = FORMS = ("onnxruntime", "portable")

TOKEN = "token"
BEGIN = (
    "Feed every state_in.NAME of a text's first token as goslet.state says, [shape, value] by NAME: full of the value, "
    "or, where there is goslet.state.NAME, that, base64 of little-endian float32. Repeat it for every row of a batch. "
    "Each later token takes state_out.NAME of the one before it."
)

_FLOAT_TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_Weights = dict[str, Callable[[], bytes]]


def write_onnx(
    engine: EngineFile,
    path: str | os.PathLike[str],
    *,
    form: str = ONNXRUNTIME,
    batch: int | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write an engine's step as an ONNX model, in one file or, beyond 2 GiB, with a second one for the weights.

    Args:
        engine: the engine.
        path: the file.
        form: one of `FORMS`.
        batch: rows of every input, for runtimes that must know; None leaves them open.
        overwrite: replace files that exist.

    Returns:
        The files that were written.

    Raises:
        OutputError: a file exists and `overwrite` is false, or cannot be written.
    """
    check_output(path, overwrite)
    streamed = self_contained(engine)
    if form == PORTABLE:
        streamed = portable_form(streamed)
    if batch is not None:
        _fix_batch(streamed.model.graph, batch)
    return write_streamed(streamed, path, overwrite)


def _fix_batch(graph: GraphProto, batch: int) -> None:
    for value in (*graph.input, *graph.output):
        dimension = value.type.tensor_type.shape.dim[0]
        dimension.ClearField("dim_param")
        dimension.dim_value = batch
    del graph.value_info[:]  # it would still speak of an open batch


def self_contained(engine: EngineFile) -> StreamedModel:
    """The model; the engine must stay open until its weights are made."""
    model = ModelProto.FromString(bytes(engine.graph_bytes))
    weights = _stored_weights(engine)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            initializer.ClearField("external_data")
            initializer.data_location = TensorProto.DEFAULT
    _gather(model.graph, weights, engine)
    helper.set_model_props(model, metadata(engine))
    return StreamedModel(model, weights)


def metadata(engine: EngineFile) -> dict[str, str]:
    """What a model says of itself.

    Returns:
        ``goslet.version``, ``goslet.rwkv_version``, ``goslet.model_id``, ``goslet.quant``; ``goslet.tokenizer``: its
        kind, or ``none``; ``goslet.chat``: the chat template as JSON, or ``null``; ``goslet.begin``: a sentence on how
        to begin; ``goslet.state``: JSON, shape without the batch and value by the state's name; and
        ``goslet.state.NAME``, base64 of little-endian float32, for states that do not begin with one value.
    """
    begins: dict[str, tuple[list[int], float]] = {}
    tuned: dict[str, str] = {}
    for tensor in engine.state_spec.tensors:
        value = tensor.init
        if engine.initial_state is not None:
            own = engine.initial_state[tensor.name]
            value = float(own.flat[0])
            if (own != own.flat[0]).any():
                tuned[f"goslet.state.{tensor.name}"] = base64.b64encode(own.astype("<f4").tobytes()).decode("ascii")
        begins[tensor.name] = (list(tensor.shape), value)
    return {
        "goslet.version": __version__,
        "goslet.rwkv_version": engine.spec.version,
        "goslet.model_id": engine.model_id,
        "goslet.quant": str(engine.provenance.get("recipe", {}).get("name", "")),
        "goslet.tokenizer": engine.tokenizer_kind or "none",
        "goslet.chat": json.dumps(None if engine.chat is None else engine.chat.to_json()),
        "goslet.begin": BEGIN,
        "goslet.state": json.dumps(begins),
        **tuned,
    }


def _stored_weights(engine: EngineFile) -> _Weights:
    """What makes each initializer of the engine's graph."""
    # A weight and its scales are asked for one after the other, and made of the same unpacked tensor.
    buffers = lru_cache(maxsize=1)(lambda name: weight_buffers(name, engine.weight(name)))
    return {
        made: partial(lambda name, made: buffers(name)[made].tobytes(), name, made)
        for name, entry in engine.tensors.items()
        if name != EMBEDDING
        for made in weight_initializers(name, entry.format, entry.shape)
    }


def _gather(graph: GraphProto, weights: _Weights, engine: EngineFile) -> None:
    """Replace the input x by the embedding's row of a token; int4 and int3 rows become int8, which Gather takes."""
    entry = engine.tensors[EMBEDDING]
    x = next(value for value in graph.input if value.name == "x")
    batch = x.type.tensor_type.shape.dim[0].dim_param
    token = helper.make_tensor_value_info(TOKEN, TensorProto.INT64, [batch])
    if entry.format.group is None:
        table_type = _FLOAT_TYPES[entry.format.name]
        weights[EMBEDDING] = lambda: engine.weight(EMBEDDING).data.tobytes()
        nodes = [
            helper.make_node("Gather", [EMBEDDING, TOKEN], ["embedded"], axis=0),
            helper.make_node("Cast", ["embedded"], ["x"], to=TensorProto.FLOAT),
        ]
        if table_type == TensorProto.FLOAT:
            nodes = [helper.make_node("Gather", [EMBEDDING, TOKEN], ["x"], axis=0)]
    else:
        table_type = TensorProto.INT8
        scales_shape = (entry.shape[0], entry.format.groups(entry.shape[1]))
        graph.initializer.append(
            TensorProto(name=EMBEDDING + SCALE_SUFFIX, data_type=TensorProto.FLOAT, dims=scales_shape)
        )
        weights[EMBEDDING] = lambda: quantized_values(engine.weight(EMBEDDING)).tobytes()
        weights[EMBEDDING + SCALE_SUFFIX] = lambda: _scales(engine)
        nodes = [
            helper.make_node("Gather", [EMBEDDING, TOKEN], ["row"], axis=0),
            helper.make_node("Gather", [EMBEDDING + SCALE_SUFFIX, TOKEN], ["row_scale"], axis=0),
            helper.make_node("DequantizeLinear", ["row", "row_scale"], ["x"], axis=1, block_size=entry.format.group),
        ]
    graph.initializer.append(TensorProto(name=EMBEDDING, data_type=table_type, dims=entry.shape))
    for offset, node in enumerate(nodes):
        graph.node.insert(offset, node)
    graph.input.remove(x)
    graph.input.insert(0, token)


def _scales(engine: EngineFile) -> bytes:
    scales = engine.weight(EMBEDDING).scales
    assert scales is not None
    return scales.astype(np.float32).tobytes()
