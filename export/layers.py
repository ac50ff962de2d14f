"""Repeating a layer of a traced step graph: torch takes about a second for a layer, and all but the first are alike.

A value belongs to the highest layer whose weights or state it depends on; what depends on no layer's is shared, and
what depends on the weights after the blocks is the graph's tail. The last traced layer is the pattern. Its values from
the layer before are found in the pattern's predecessor, node by node, so the two must have been traced alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from google.protobuf.message import Message
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from ..errors import GosletError

_OF_LAYER = re.compile(r"(blocks|state_in|state_out|x)\.(\d+)\.")
_SHARED = -1
_TAIL = 1 << 30


def repeat_last_layer(graph: GraphProto, pattern: int, n_layer: int) -> None:
    """Add copies of layer `pattern`, the last one in the graph, until there are `n_layer` layers.

    Weights, inputs and outputs are named by layer (``blocks.2.…``, ``state_in.2.…``, ``state_out.2.…``), and so are
    their copies. Nothing happens where there are enough layers already.

    Raises:
        GosletError: the pattern and the layer before it are not alike, or the tail takes from an earlier layer.
    """
    if n_layer <= pattern + 1:
        return
    repeater = _Repeater(graph, pattern)
    last = n_layer - 1
    added = range(pattern + 1, n_layer)
    body = [node for node in graph.node if repeater.layer_of(node) != _TAIL]
    tail = [node for node in graph.node if repeater.layer_of(node) == _TAIL]
    copies = [repeater.node(node, layer) for layer in added for node in repeater.pattern_nodes]
    for node in tail:
        node.input[:] = [repeater.tail_value(name, last) for name in node.input]
    _refill(graph.node, chain(body, copies, tail))
    for values in (graph.initializer, graph.input, graph.output, graph.value_info):
        _refill(values, repeater.with_copies(values, added))


class _Repeater:
    def __init__(self, graph: GraphProto, pattern: int) -> None:
        self._pattern = pattern
        self._layers: dict[str, int] = {value.name: named_layer(value.name, _SHARED) for value in graph.input}
        self._layers |= {value.name: named_layer(value.name, _TAIL) for value in graph.initializer}
        for node in graph.node:
            layer = max((self._layers[name] for name in node.input if name), default=_SHARED)
            self._layers |= dict.fromkeys(node.output, layer)
        self.pattern_nodes = [node for node in graph.node if self.layer_of(node) == pattern]
        before = [node for node in graph.node if self.layer_of(node) == pattern - 1]
        kinds = [
            [(node.domain, node.op_type, len(node.output)) for node in nodes] for nodes in (before, self.pattern_nodes)
        ]
        if kinds[0] != kinds[1]:
            raise _unlike(f"layers {pattern - 1} and {pattern} were traced differently")
        self._successor = {
            earlier: later
            for one, other in zip(before, self.pattern_nodes, strict=True)
            for earlier, later in zip(one.output, other.output, strict=True)
        }

    def layer_of(self, node: NodeProto) -> int:
        """The layer that a node belongs to."""
        return self._layers[node.output[0]]

    def _value(self, name: str, layer: int) -> str:
        """What a value that the pattern reads or makes is called in the copy for `layer`."""
        if name and self._layers.get(name) == self._pattern - 1:
            if name not in self._successor:
                raise _unlike(f"layer {self._pattern} reads {name}")
            return self._value(self._successor[name], layer - 1)
        if not name or self._layers.get(name, self._pattern) != self._pattern or layer == self._pattern:
            return name
        renamed, count = _OF_LAYER.subn(rf"\g<1>.{layer}.", name)
        return renamed if count else f"{name}.{layer}"

    def node(self, node: NodeProto, layer: int) -> NodeProto:
        """The copy of one of the pattern's nodes."""
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.name}.{layer}"
        copy.input[:] = [self._value(name, layer) for name in node.input]
        copy.output[:] = [self._value(name, layer) for name in node.output]
        return copy

    def tail_value(self, name: str, last: int) -> str:
        """What the tail reads instead of the pattern's value."""
        if 0 < self._layers.get(name, _SHARED) < self._pattern:
            raise _unlike(f"the graph's tail reads {name}")
        return self._value(name, last)

    def with_copies(self, values: Iterable[ValueInfoProto | TensorProto], added: range) -> list[Message]:
        """Values and, after those of the pattern, their copies; each layer's stay together."""
        kept = list(values)
        ours = [value for value in kept if self._layers.get(value.name) == self._pattern]
        if not ours:
            return kept
        position = kept.index(ours[-1]) + 1
        copies = [self._copy(value, layer) for layer in added for value in ours]
        return [*kept[:position], *copies, *kept[position:]]

    def _copy(self, value: ValueInfoProto | TensorProto, layer: int) -> Message:
        copy = type(value)()
        copy.CopyFrom(value)
        copy.name = self._value(value.name, layer)
        if isinstance(copy, TensorProto):
            for entry in copy.external_data:
                if entry.key == "location":
                    entry.value = copy.name
        return copy


def named_layer(name: str, otherwise: int) -> int:
    """The layer that a tensor, an input or an output is named after; `otherwise` for one that belongs to none."""
    match = _OF_LAYER.match(name)
    return int(match[2]) if match else otherwise


def _refill(field: object, values: Iterable[Message]) -> None:
    kept = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]


def _unlike(problem: str) -> GosletError:
    return GosletError(f"the traced graph cannot be repeated: {problem}", remedy="report this as a bug in goslet")
