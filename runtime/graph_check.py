"""Whether a step graph is only arithmetic on the engine's own weights: read as bytes, before anything runs it.

An ONNX model may name any file as the place of a tensor's data, in any attribute of any branch of any function, and
may loop for as long as it likes. An engine may come from anyone, so its graph is scanned first, without an ONNX
library, by the rules that `goslet.export.graph` writes by:

- Every tensor of the header but the embedding is an initializer of the top graph, external under its own name, of the
  type, shape and length that its storage format implies; nothing else is external anywhere.
- What the graph holds of its own are the tracer's constants: small.
- Nodes are pure operators from a short list, or functions that the model carries; those are made of the former.
- No attribute holds a graph, so there are no branches and no loops, and nothing here recurses.

Two readers may understand one file differently, so whatever these rules do not name is refused: unknown fields, fields
of another wire type, single fields that come twice (the last would win, or messages would be merged), and numbers that
a reader would cut to 32 bits. Source of the format: onnx.proto of ONNX 1.23 and protobuf's wire format.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from .errors import BackendError
from .initializers import Initializer

# A layer takes about 20 kB and 100 nodes; a header may announce 1024 layers.
MAX_GRAPH_BYTES = 32 << 20
MAX_NODES = 1 << 18
MAX_INLINE_BYTES = 4096
MAX_INLINE_TOTAL_BYTES = 64 << 10
# The first is the first with quantization by groups, the last the newest that ONNX 1.23 has.
OPSETS = range(21, 29)
DOMAIN = "goslet"
DOMAIN_VERSION = 1

_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mul", "Neg", "Not", "Or",
    "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Where",
})  # fmt: skip
_CONTRACTIONS = frozenset({
    "DequantizeLinear", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax",
})  # fmt: skip
_SHAPES = frozenset({
    "Concat", "Constant", "Expand", "Flatten", "Gather", "Reshape", "Shape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
})  # fmt: skip
OPERATORS = _ELEMENTWISE | _CONTRACTIONS | _SHAPES

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# How a field is read: once at most, any number of times, only that it is there, not at all; as a text or a message
# that means nothing here and is only held to be one. ONNX Runtime prints its complaints about texts that are not UTF-8.
_ONCE, _MANY, _PRESENT, _SKIP, _TEXT, _WITHIN = range(6)

_TENSOR_ATTRIBUTE = 4
_ATTRIBUTE_TYPES = {1: "f", 2: "i", 3: "s", _TENSOR_ATTRIBUTE: "t", 6: "floats", 7: "ints", 8: "strings"}
_EXTERNAL = 1
# float, uint8, int8, int32, int64, bool, float16, double, bfloat16
_INLINE_TYPES = frozenset({1, 2, 3, 6, 7, 9, 10, 11, 16})

_PLAIN = re.compile(r"[A-Za-z0-9_.:/-]{1,100}", re.ASCII)
_SHOWN_CHARACTERS = 60

Span = tuple[int, int]
Found = dict[str, Any]


class _Message:
    """What a message of a step graph may hold, by its fields' numbers in onnx.proto.

    Attributes:
        name: the message.
        by_tag: the name and the way of reading of every field, by the number and wire type that it begins with.
        numbers: the fields' names by number; those that are refused too.
        within: what the messages are that mean nothing here, by their fields' names.
    """

    def __init__(
        self,
        name: str,
        *,
        number: Mapping[str, int] | None = None,
        content: Mapping[str, int] | None = None,
        contents: Mapping[str, int] | None = None,
        numbers: Mapping[str, int] | None = None,
        present: Mapping[str, int] | None = None,
        skipped: Mapping[str, int] | None = None,
        texts: Mapping[str, int] | None = None,
        within: Mapping[str, tuple[int, _Message]] | None = None,
        refused: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.by_tag: dict[int, tuple[str, int]] = {}
        self.numbers: dict[int, str] = {field: key for key, field in (refused or {}).items()}
        self.within = {key: message for key, (_, message) in (within or {}).items()}
        every = (_VARINT, _FIXED64, _BYTES, _FIXED32)
        for fields, wires, way in (
            (number, (_VARINT,), _ONCE),
            (content, (_BYTES,), _ONCE),
            (contents, (_BYTES,), _MANY),
            (numbers, (_VARINT, _BYTES), _MANY),
            (present, every, _PRESENT),
            (skipped, every, _SKIP),
            (texts, (_BYTES,), _TEXT),
            ({key: field for key, (field, _) in (within or {}).items()}, (_BYTES,), _WITHIN),
        ):
            for key, field in (fields or {}).items():
                self.numbers[field] = key
                self.by_tag |= {field << 3 | wire: (key, way) for wire in wires}


_OPSET = _Message("OperatorSetIdProto", number={"version": 2}, content={"domain": 1})
_ENTRY = _Message("StringStringEntryProto", content={"key": 1, "value": 2})
_NOTE = _Message("StringStringEntryProto", texts={"key": 1, "value": 2})
_SIZE = _Message("Dimension", skipped={"dim_value": 1}, texts={"dim_param": 2, "denotation": 3})
_SIZES = _Message("TensorShapeProto", within={"dim": (1, _SIZE)})
_ARRAY = _Message("TypeProto.Tensor", skipped={"elem_type": 1}, within={"shape": (2, _SIZES)})
_TYPE = _Message("TypeProto", texts={"denotation": 6}, within={"tensor_type": (1, _ARRAY)})
_VALUE = _Message(
    "ValueInfoProto", texts={"name": 1, "doc_string": 3}, within={"type": (2, _TYPE), "metadata_props": (4, _NOTE)}
)
_TENSOR = _Message(
    "TensorProto",
    number={"data_type": 2, "data_location": 14},
    content={"name": 8},
    contents={"external_data": 13},
    numbers={"dims": 1},
    present={
        "float_data": 4, "int32_data": 5, "int64_data": 7, "raw_data": 9, "double_data": 10, "uint64_data": 11,
    },
    texts={"doc_string": 12},
    within={"metadata_props": (16, _NOTE)},
    refused={"segment": 3, "string_data": 6},
)  # fmt: skip
_ATTRIBUTE = _Message(
    "AttributeProto",
    number={"type": 20},
    content={"t": 5},
    present={"f": 2, "i": 3, "s": 4, "floats": 7, "ints": 8, "strings": 9},
    texts={"name": 1, "doc_string": 13},
    refused={
        "g": 6, "graphs": 11, "tensors": 10, "sparse_tensor": 22, "sparse_tensors": 23, "tp": 14, "type_protos": 15,
        "ref_attr_name": 21,
    },
)  # fmt: skip
_NODE = _Message(
    "NodeProto",
    content={"op_type": 4, "domain": 7},
    contents={"attribute": 5},
    texts={"input": 1, "output": 2, "name": 3, "doc_string": 6},
    within={"metadata_props": (9, _NOTE)},
    refused={"overload": 8, "device_configurations": 10},
)
_FUNCTION = _Message(
    "FunctionProto",
    content={"name": 1, "domain": 10},
    contents={"node": 7, "opset_import": 9},
    texts={"input": 4, "output": 5, "doc_string": 8},
    within={"value_info": (12, _VALUE), "metadata_props": (14, _NOTE)},
    refused={"attribute": 6, "attribute_proto": 11, "overload": 13},
)
_GRAPH = _Message(
    "GraphProto",
    contents={"node": 1, "initializer": 5},
    texts={"name": 2, "doc_string": 10},
    within={
        "input": (11, _VALUE),
        "output": (12, _VALUE),
        "value_info": (13, _VALUE),
        "metadata_props": (16, _NOTE),
    },
    refused={"sparse_initializer": 15, "quantization_annotation": 14},
)
_MODEL = _Message(
    "ModelProto",
    content={"graph": 7},
    contents={"opset_import": 8, "functions": 25},
    skipped={"ir_version": 1, "model_version": 5},
    texts={"producer_name": 2, "producer_version": 3, "domain": 4, "doc_string": 6},
    refused={"metadata_props": 14, "training_info": 20, "configuration": 26},
)  # fmt: skip


def check_step_graph(
    graph: bytes | memoryview, initializers: Mapping[str, Initializer], opset: int, file: str | os.PathLike[str]
) -> bytes:
    """Refuse a graph that is anything but a step on the header's weights; inputs and outputs are not looked at.

    Args:
        graph: a serialized ModelProto; nothing of it is run.
        initializers: every external initializer that the graph must have, and no other, by name.
        opset: the standard operators' version that the header states.
        file: the engine, for errors.

    Returns:
        A copy of the graph: what was checked and is to be run, whatever becomes of the file that it lies in.

    Raises:
        BackendError: the graph is damaged or breaks a rule of this module; the place in it is named.
    """
    if len(graph) > MAX_GRAPH_BYTES:
        raise _refusal(file, "", "is too large", f"at most {MAX_GRAPH_BYTES} bytes", f"{len(graph)} bytes")
    copy = bytes(graph)
    _Scanner(copy, initializers, opset, file).check()
    return copy


class _Scanner:
    def __init__(
        self, data: bytes, expected: Mapping[str, Initializer], opset: int, file: str | os.PathLike[str]
    ) -> None:
        self._data = data
        self._expected = expected
        self._opset = opset
        self._file = file
        self._seen: set[str] = set()
        self._inline_bytes = 0

    def check(self) -> None:
        if self._opset not in OPSETS:
            self._refuse("", "is of an unknown opset", f"{OPSETS[0]} to {OPSETS[-1]}", self._opset)
        model = self._read((0, len(self._data)), _MODEL, "")
        if "graph" not in model:
            self._refuse("", "holds no graph")
        self._check_opsets(model, {"": self._opset, DOMAIN: DOMAIN_VERSION}, "")
        functions = self._check_functions(model.get("functions", ()))
        graph = self._read(model["graph"], _GRAPH, "")
        for span in graph.get("initializer", ()):
            self._check_initializer(span)
        for name in self._expected:
            if name not in self._seen:
                self._refuse(f"initializer {name}", "is missing", "every tensor of the header but the embedding")
        n_nodes = 0
        for index, span in enumerate(graph.get("node", ())):
            n_nodes += self._check_node(span, functions, f"node {index}")
            # A function of a thousand nodes, called a thousand times, is a million nodes.
            if n_nodes > MAX_NODES:
                self._refuse(f"node {index}", "is one too many", f"at most {MAX_NODES} nodes, functions written out")

    # --------------------------------------------------------------------------------------------------- the messages

    def _check_opsets(self, message: Found, versions: Mapping[str, int], place: str) -> None:
        seen = set()
        for span in message.get("opset_import", ()):
            entry = self._read(span, _OPSET, place)
            domain = self._text(entry.get("domain"), place)
            if domain in seen or domain not in versions or entry.get("version") != versions[domain]:
                found = f"{_shown(domain)} {entry.get('version')}"
                expected = ", ".join(f"{_shown(key)} {version}" for key, version in versions.items())
                self._refuse(place, "imports other operators than a step needs", expected, found)
            seen.add(domain)
        if "" not in seen:
            self._refuse(place, "does not import the standard operators", self._opset, "nothing")

    def _check_functions(self, spans: Iterable[Span]) -> dict[str, int]:
        """How many nodes each function has, by name."""
        functions: dict[str, int] = {}
        for index, span in enumerate(spans):
            place = f"function {index}"
            function = self._read(span, _FUNCTION, place)
            name = self._text(function.get("name"), place)
            domain = self._text(function.get("domain"), place)
            if domain != DOMAIN or not name or name in functions:
                self._refuse(
                    place,
                    "is not a function of its own in goslet's domain",
                    f"a new name in {DOMAIN}",
                    f"{_shown(name)} in {_shown(domain)}",
                )
            place = f"function {_shown(name)}"
            self._check_opsets(function, {"": self._opset}, place)
            nodes = function.get("node", ())
            for position, node in enumerate(nodes):
                self._check_node(node, {}, f"{place}, node {position}")
            functions[name] = len(nodes)
        return functions

    def _check_node(self, span: Span, functions: Mapping[str, int], place: str) -> int:
        """How many nodes this one stands for."""
        node = self._read(span, _NODE, place)
        name = self._text(node.get("op_type"), place)
        domain = self._text(node.get("domain"), place)
        size = 1
        if domain == DOMAIN and name in functions:
            size = functions[name]
        elif domain or name not in OPERATORS:
            self._refuse(
                place,
                "is not a step's operator",
                "arithmetic on tensors and their shapes, or a function that the graph carries",
                f"{_shown(name)} in {_shown(domain)}" if domain else _shown(name),
            )
        for attribute in node.get("attribute", ()):
            self._check_attribute(attribute, f"{place} ({_shown(name)})")
        return size

    def _check_attribute(self, span: Span, place: str) -> None:
        attribute = self._read(span, _ATTRIBUTE, place)
        kind = attribute.pop("type", None)
        if kind not in _ATTRIBUTE_TYPES or not attribute.keys() <= {_ATTRIBUTE_TYPES[kind]}:
            self._refuse(
                place,
                "has an attribute that is not of its type",
                "numbers, text or a tensor",
                f"type {kind} with {', '.join(attribute) or 'nothing'}",
            )
        self._count_inline(span, place)
        if kind == _TENSOR_ATTRIBUTE:
            if "t" not in attribute:
                self._refuse(place, "has an attribute without its tensor")
            self._check_inline(self._read(attribute["t"], _TENSOR, place), place)

    def _check_initializer(self, span: Span) -> None:
        tensor = self._read(span, _TENSOR, "an initializer")
        name = self._text(tensor.get("name"), "an initializer")
        place = f"initializer {_shown(name)}"
        if name in self._seen:
            self._refuse(place, "appears twice")
        self._seen.add(name)
        expected = self._expected.get(name)
        if expected is None:
            self._check_inline(tensor, place)
            self._count_inline(span, place)
        else:
            self._check_external(tensor, name, expected, place)

    def _check_inline(self, tensor: Found, place: str) -> None:
        if "external_data" in tensor or tensor.get("data_location", 0):
            self._refuse(
                place, "takes data from a file", "data from the weights that the header names", "external data"
            )
        if tensor.get("data_type") not in _INLINE_TYPES:
            self._refuse(place, "is of an unexpected type", "numbers", f"ONNX type {tensor.get('data_type')}")
        shape = self._integers(tensor.get("dims", ()), place)
        if math.prod(size or 1 for size in shape) > MAX_INLINE_BYTES:
            self._refuse(place, "is larger than a constant", f"at most {MAX_INLINE_BYTES} numbers", list(shape)[:8])

    def _count_inline(self, span: Span, place: str) -> None:
        size_bytes = span[1] - span[0]
        if size_bytes > MAX_INLINE_BYTES:
            self._refuse(
                place, "holds more than a constant", f"at most {MAX_INLINE_BYTES} bytes", f"{size_bytes} bytes"
            )
        self._inline_bytes += size_bytes
        if self._inline_bytes > MAX_INLINE_TOTAL_BYTES:
            self._refuse(
                place,
                "is one constant too many",
                f"at most {MAX_INLINE_TOTAL_BYTES} bytes of constants and attributes",
                f"{self._inline_bytes} bytes",
            )

    def _check_external(self, tensor: Found, name: str, expected: Initializer, place: str) -> None:
        fields = {"name", "data_type", "dims", "data_location", "external_data"}
        if tensor.keys() != fields or tensor["data_location"] != _EXTERNAL:
            content = tensor.keys() - fields
            self._refuse(
                place,
                "does not take its data from the header's weights, as it must",
                "external data",
                f"{', '.join(sorted(content))} in the graph" if content else "nothing",
            )
        shape = self._integers(tensor["dims"], place)
        if (tensor["data_type"], shape) != (expected.onnx_type, expected.shape):
            self._refuse(
                place,
                "is not what the header's tensor becomes",
                f"ONNX type {expected.onnx_type} {list(expected.shape)}",
                f"ONNX type {tensor['data_type']} {list(shape)[:8]}",
            )
        where: dict[str, str] = {}
        for span in tensor["external_data"]:
            entry = self._read(span, _ENTRY, place)
            key = self._text(entry.get("key"), place)
            if key in where:
                self._refuse(place, "states a part of its data's place twice", found=_shown(key))
            where[key] = self._text(entry.get("value"), place)
        right = {"location": name, "offset": "0", "length": str(expected.size_bytes)}
        if where != right:
            wrong = next(key for key in [*right, *where] if where.get(key) != right.get(key))
            self._refuse(
                place,
                "takes other data than the header's tensor",
                f"{_shown(wrong)} {right.get(wrong, 'not stated')}",
                _shown(where[wrong]) if wrong in where else "nothing",
            )

    # -------------------------------------------------------------------------------------------------- the wire format

    def _read(self, span: Span, message: _Message, place: str) -> Found:
        """The fields of a message: numbers as they are, contents as the span in which they lie."""
        data, by_tag = self._data, message.by_tag
        position, end = span
        found: Found = {}
        while position < end:
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = self._varint(position - 1, end, place)
            field = by_tag.get(tag)
            if field is None:
                self._refuse_field(tag, message, place)
            name, way = field
            wire = tag & 7
            value: Any = None
            if wire == _BYTES:
                if position < end and data[position] < 0x80:
                    size_bytes = data[position]
                    position += 1
                else:
                    size_bytes, position = self._varint(position, end, place)
                value = (position, position + size_bytes)
                position += size_bytes
            elif wire == _VARINT:
                value, position = self._varint(position, end, place)
            else:
                position += 8 if wire == _FIXED64 else 4
            if position > end:
                self._refuse(place, "is damaged", f"{message.name}.{name} within {end - span[0]} bytes", "its end")
            if way == _MANY:
                values = found.setdefault(name, [])
                values.append(value)
                if len(values) > MAX_NODES:
                    self._refuse(place, "has too many parts", f"at most {MAX_NODES} of {message.name}.{name}")
            elif way == _ONCE:
                if name in found:
                    self._refuse(place, "says something twice", f"{message.name}.{name} once", "two")
                found[name] = value
            elif way == _PRESENT:
                found[name] = True
            elif way == _TEXT:
                if not data[value[0] : value[1]].isascii():
                    self._text(value, place)
            elif way == _WITHIN:
                self._read(value, message.within[name], place)
        return found

    def _varint(self, position: int, end: int, place: str) -> tuple[int, int]:
        """An unsigned number of up to 64 bits, and the position after it."""
        value = shift = 0
        while position < end and shift < 70:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, position
            shift += 7
        self._refuse(place, "is damaged", "a number of up to 64 bits", f"no end of it at byte {position} of the graph")

    def _integers(self, values: Collection[int | Span], place: str) -> tuple[int, ...]:
        """A shape, whose sizes may be packed; a tensor has 8 axes at most."""
        integers: list[int] = []
        for value in values:
            if isinstance(value, int):
                integers.append(value)
                continue
            position, end = value
            while position < end and len(integers) <= 8:
                integer, position = self._varint(position, end, place)
                integers.append(integer)
        if len(integers) > 8 or any(integer >> 63 for integer in integers):
            self._refuse(place, "is not a shape", "at most 8 sizes that are not negative", integers[:8])
        return tuple(integers)

    def _text(self, span: Span | None, place: str) -> str:
        """A text, empty where there is none."""
        if span is None:
            return ""
        try:
            return self._data[span[0] : span[1]].decode()
        except UnicodeDecodeError:
            self._refuse(place, "holds a text that is not UTF-8")

    def _refuse_field(self, tag: int, message: _Message, place: str) -> NoReturn:
        number, wire = tag >> 3, tag & 7
        name = message.numbers.get(number)
        found = f"field {number}" if name is None else name
        if any(known >> 3 == number for known in message.by_tag):
            found += f" in wire type {wire}"
        self._refuse(place, "holds what a step graph has no use for", f"the fields of {message.name} alone", found)

    def _refuse(self, place: str, problem: str, expected: object = None, found: object = None) -> NoReturn:
        raise _refusal(self._file, place, problem, expected, found)


def _refusal(
    file: str | os.PathLike[str], place: str, problem: str, expected: object = None, found: object = None
) -> BackendError:
    return BackendError(
        problem,
        file=file,
        place=f"section graph, {place}" if place else "section graph",
        expected=expected,
        found=found,
        remedy="export the engine again, and do not use engines from a source that you do not trust",
    )


def _shown(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else repr(text[:_SHOWN_CHARACTERS])
