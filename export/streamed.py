"""ONNX models whose weights are made one by one while they are written: inside the file, or in a second one beside it.

No more than one weight is in memory at a time. What was written is read back and checked before it gets its name.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto, TensorProto

from ..errors import OutputError
from ..output import atomic_write, output_error
from .valid_onnx import check_graph

# Protocol buffers, and so ONNX files, end at 2 GiB.
MAX_FILE_BYTES = (1 << 31) - (1 << 20)
# Tensors of at most so many bytes stay in the model.
SMALL_BYTES = 1024
_ALIGNMENT = 4096
_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.INT8: 8, TensorProto.INT4: 4,
    TensorProto.UINT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.BOOL: 8,
}  # fmt: skip
# Fields of onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


@dataclass(frozen=True)
class StreamedModel:
    """A model, and what makes its weights.

    Attributes:
        model: small tensors inside, the weights without their data.
        weights: what gives each weight's raw bytes, by the initializer's name.
    """

    model: ModelProto
    weights: dict[str, Callable[[], bytes]]

    @property
    def size_bytes(self) -> int:
        """How many bytes the weights take."""
        return sum(_data_bytes(tensor) for tensor in self.model.graph.initializer if tensor.name in self.weights)

    def whole(self) -> ModelProto:
        """The model with all weights inside, for graphs that are small enough."""
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.raw_data = self.weights[tensor.name]()
        return model


def data_path(path: Path) -> Path:
    """Where a model's weights are that do not lie in its own file."""
    return path.with_name(f"{path.name}.data")


def check_name(path: Path) -> None:
    """Fail if a model could not name its weights' file.

    Raises:
        OutputError: it is no UTF-8.
    """
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(
            "is no UTF-8, and an ONNX model cannot name such a file", file=path, remedy="choose another name: -o"
        ) from None


def write_streamed(streamed: StreamedModel, path: str | os.PathLike[str], overwrite: bool) -> tuple[Path, ...]:
    """Write a model in one file; one that is larger than an ONNX file can be, in two, as `write_beside` does.

    Returns:
        The files that were written.

    Raises:
        OutputError: a file exists and `overwrite` is false, or cannot be written.
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: what was written is not valid ONNX.
    """
    if streamed.size_bytes + streamed.model.ByteSize() > MAX_FILE_BYTES:
        check_name(data_path(Path(path)))
        write_beside(streamed, Path(path), overwrite)
        return Path(path), data_path(Path(path))
    with atomic_write(path, overwrite) as file:
        _write_inside(streamed, file)
        file.flush()
        check_written(file.name)
    return (Path(path),)


def write_beside(streamed: StreamedModel, path: Path, overwrite: bool, *, check: bool = True) -> int:
    """Write a model and its weights, both or neither; where others are replaced and that fails, those are gone too.

    Args:
        streamed: the model.
        path: its file; `data_path` is the other.
        overwrite: replace files that exist.
        check: read it back; onnx.checker does not take graphs with other people's operators.

    Returns:
        The size of both in bytes.

    Raises:
        As `write_streamed`.
    """
    data_file_path = data_path(path)
    own: list[int] = []  # the files that are written, whatever their names are by now
    replaces = False
    try:
        with atomic_write(path, overwrite) as model_file, atomic_write(data_file_path, overwrite) as data_file:
            model = save_beside(streamed, data_file, data_file_path.name)
            size_bytes = data_file.tell() + len(model)
            model_file.write(model)
            if check:
                model_file.flush()
                check_written(model_file.name, data_file_path.name, data_file.tell())
            try:
                data_file.flush()
                os.fsync(data_file.fileno())
                own = [os.fstat(file.fileno()).st_ino for file in (model_file, data_file)]
                if overwrite:
                    replaces = True
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.realpath(path))
            except OSError as error:
                raise output_error(error, path) from error
    except BaseException:
        for name in map(os.path.realpath, (path, data_file_path)):
            with contextlib.suppress(OSError):
                if replaces or os.stat(name).st_ino in own:
                    os.unlink(name)
        raise
    return size_bytes


def save_beside(streamed: StreamedModel, file: BinaryIO, name: str) -> bytes:
    """Write the weights to a file of this name; the model that reads them there."""
    model = ModelProto()
    model.CopyFrom(streamed.model)
    for tensor in model.graph.initializer:
        if tensor.name in streamed.weights:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset, length = file.tell(), _write_weight(streamed, tensor.name, file)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _write_inside(streamed: StreamedModel, file: BinaryIO) -> None:
    """Write a model with its weights as protobuf would, which has a length in front of each part."""
    model = ModelProto()
    model.CopyFrom(streamed.model)
    heads, sizes = [], []
    for tensor in model.graph.initializer:
        head = tensor.SerializeToString(deterministic=True)
        size = _data_bytes(tensor) if tensor.name in streamed.weights else None
        if size is not None:
            head += _prefix(_RAW_DATA, size)
        heads.append(_prefix(_INITIALIZER, len(head) + (size or 0)) + head)
        sizes.append(size)
    names = [tensor.name for tensor in model.graph.initializer]
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    file.write(model.SerializeToString(deterministic=True))
    file.write(_prefix(_GRAPH, len(graph) + sum(map(len, heads)) + sum(size or 0 for size in sizes)))
    file.write(graph)
    for name, head, size in zip(names, heads, sizes, strict=True):
        file.write(head)
        if size is not None:
            length = _write_weight(streamed, name, file)
            assert length == size, name


def _write_weight(streamed: StreamedModel, name: str, file: BinaryIO) -> int:
    """Write one weight's bytes, and forget them before the next is made; their number."""
    return file.write(streamed.weights[name]())


def _data_bytes(tensor: TensorProto) -> int:
    n_numbers: int = math.prod(tensor.dims)
    return -(-n_numbers * _BITS[tensor.data_type] // 8)


def _prefix(field: int, size_bytes: int) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(size_bytes)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def check_written(path: str, data_name: str = "", data_bytes: int = 0) -> None:
    """Check a file that was written, without reading its weights; they must be as long as their types and shapes say.

    Args:
        path: the model's file.
        data_name: the file that its other weights lie in.
        data_bytes: the size of that.

    Raises:
        OutputError: a weight has another length, or lies elsewhere.
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the rest is not valid ONNX.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        model, sizes = _without_weights(content)
    for tensor in model.graph.initializer:
        size = sizes.get(tensor.name)
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            is_there = (
                entries["location"] == data_name and int(entries["offset"]) + int(entries["length"]) <= data_bytes
            )
            size = int(entries["length"]) if is_there else 0
        if size is not None and size != _data_bytes(tensor):
            raise OutputError(
                "a weight was not written whole",
                file=path,
                place=tensor.name,
                expected=f"{_data_bytes(tensor)} bytes",
                found=f"{size} bytes",
                remedy="report this as a bug in goslet",
            )
    check_graph(model)


def _without_weights(content: mmap.mmap) -> tuple[ModelProto, dict[str, int]]:
    """A model without its initializers' raw data, and how many bytes of it each had."""
    sizes: dict[str, int] = {}
    kept = bytearray()
    graph = bytearray()
    for field, start, begin, end in _fields(content, 0, len(content)):
        if field != _GRAPH:
            kept += content[start:end]
            continue
        for inner, inner_start, inner_begin, inner_end in _fields(content, begin, end):
            if inner != _INITIALIZER:
                graph += content[inner_start:inner_end]
                continue
            head, size = bytearray(), None
            for part, part_start, part_begin, part_end in _fields(content, inner_begin, inner_end):
                if part == _RAW_DATA:
                    size = part_end - part_begin
                else:
                    head += content[part_start:part_end]
            if size is not None:
                sizes[TensorProto.FromString(bytes(head)).name] = size
            graph += _prefix(_INITIALIZER, len(head)) + head
    return ModelProto.FromString(bytes(kept + _prefix(_GRAPH, len(graph)) + graph)), sizes


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """A message's fields: number, start of the field, start and end of its value."""
    while start < end:
        key, begin = _read_varint(content, start)
        wire = key & 7
        if wire == _BYTES:
            size, begin = _read_varint(content, begin)
            stop = begin + size
        else:
            stop = _read_varint(content, begin)[1] if wire == _VARINT else begin + _FIXED_BYTES[wire]
        yield key >> 3, start, begin, stop
        start = stop


def _read_varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return number, at
