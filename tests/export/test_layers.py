"""Repeating a traced layer gives the graph that tracing every layer gives."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from onnx import GraphProto, ModelProto, helper  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.errors import GosletError  # noqa: E402
from goslet.export import graph, recipe  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.layers import repeat_last_layer  # noqa: E402


def wired(model: ModelProto) -> list[tuple[str, list[str], list[bytes]]]:
    """Every node by what it computes from what, in terms that do not depend on the names of inner values."""
    named: dict[str, str] = {value.name: value.name for value in model.graph.input}
    named |= {value.name: value.name for value in model.graph.initializer}
    nodes = []
    for index, node in enumerate(model.graph.node):
        inputs = [named[name] if name else "" for name in node.input]
        named |= {name: f"{index}:{place}" for place, name in enumerate(node.output)}
        nodes.append((f"{node.domain}::{node.op_type}", inputs, [a.SerializeToString() for a in node.attribute]))
    results = [("output", [named[value.name]], [value.SerializeToString()]) for value in model.graph.output]
    return nodes + results


SHAPE = {"n_layer": 5, "n_embd": 32, "vocab_size": 20}
MODELS = {
    "4": random_rwkv4(**SHAPE),
    "5.2": random_rwkv5("5.2", **SHAPE, head_size=16),
    "6": random_rwkv6(**SHAPE, head_size=16, rank_mix=4, rank_decay=4),
    "7": random_rwkv7(**SHAPE, head_size=16, rank_w=4, rank_a=4, rank_g=4),
    "7a": random_rwkv7(**SHAPE, head_size=16, rank_w=4, rank_a=4, rank_g=4, rank_s=3),
}


@pytest.mark.parametrize("version", MODELS)
def test_repeating_equals_tracing_every_layer(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(MODELS[version], tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as source:
        chosen = recipe("int4")
        formats = {rule.name: chosen.format_of(rule) for rule in source.rules}
        repeated = graph.trace_step(source.version, source.spec, source.rules, formats)
        monkeypatch.setattr(graph, "TRACED_LAYERS", 100)
        whole = graph.trace_step(source.version, source.spec, source.rules, formats)
    assert [v.SerializeToString() for v in repeated.graph.input] == [v.SerializeToString() for v in whole.graph.input]
    assert wired(repeated) == wired(whole)
    initializers = [{i.name: i.SerializeToString() for i in model.graph.initializer} for model in (repeated, whole)]
    assert initializers[0] == initializers[1]


def small_graph(last: str = "Add") -> GraphProto:
    """Three layers x → x + w with a value from layer 0 in each of the others, and a tail."""
    nodes = [helper.make_node("Add", ["x", "blocks.0.w"], ["h0"]), helper.make_node("Neg", ["h0"], ["first"])]
    for layer, kind in ((1, "Add"), (2, last)):
        nodes.append(helper.make_node(kind, [f"h{layer - 1}", f"blocks.{layer}.w"], [f"m{layer}"]))
        nodes.append(helper.make_node("Mul", [f"m{layer}", "first"], [f"h{layer}"]))
    nodes.append(helper.make_node("Sub", ["h2", "head"], ["logits"]))
    names = [*(f"blocks.{layer}.w" for layer in range(3)), "head"]
    initializers = [helper.make_tensor(name, 1, [1], [1.0]) for name in names]
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "logits")]
    return helper.make_graph(nodes, "small", values[:1], values[1:], initializers)


def test_values_from_the_first_and_the_previous_layer_are_told_apart() -> None:
    small = small_graph()
    repeat_last_layer(small, 2, 5)
    steps = [(node.op_type, *node.input, node.output[0]) for node in small.node]
    assert steps[-5:] == [
        ("Add", "h2", "blocks.3.w", "m2.3"),
        ("Mul", "m2.3", "first", "h2.3"),
        ("Add", "h2.3", "blocks.4.w", "m2.4"),
        ("Mul", "m2.4", "first", "h2.4"),
        ("Sub", "h2.4", "head", "logits"),
    ]
    assert [i.name for i in small.initializer] == [*(f"blocks.{layer}.w" for layer in range(5)), "head"]


def test_enough_layers_are_left_alone() -> None:
    small = small_graph()
    repeat_last_layer(small, 2, 3)
    assert small.SerializeToString() == small_graph().SerializeToString()


def test_layers_that_are_not_alike_are_refused() -> None:
    with pytest.raises(GosletError, match="traced differently"):
        repeat_last_layer(small_graph(last="Div"), 2, 5)


def test_a_tail_that_reads_an_inner_layer_is_refused() -> None:
    small = small_graph()
    small.node[-1].input[0] = "h1"
    with pytest.raises(GosletError, match="tail reads h1"):
        repeat_last_layer(small, 2, 5)
