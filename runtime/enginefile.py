"""The engine file, ``model.goslet``: the only reader and the only writer.

A container (`goslet.container`) whose header adds ``model`` and ``state`` (their specs), ``model_id``,
``provenance``, ``tokenizer``, ``chat``, ``graph`` and ``tensors``, and whose sections are:

- ``graph``: the step graph, ONNX without weights; its initializers are named as the tensors.
- ``program``: the native engine's steps, where there are any.
- ``weights``: every tensor once, in one of `goslet.layouts`, each at the next multiple of 64 bytes, a quantized one
  followed by its scales.
- ``tokenizer``: what its kind needs, where there is one.
- ``state``: the numbers of a tuned initial state, where there is one: every tensor of the state in its order,
  little-endian float32, without gaps.
- ``plan.<device>``: TensorRT plans, where there are any.

Graph, program, tokenizer and state are verified whenever the file is opened; weights and plans by `EngineFile.check`,
so that opening stays quick. Offsets of tensors count from the start of the section ``weights``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .chat import ChatTemplate
from .container import Buffer, Container, Section, align_up, errors_in, read_container, write_container
from .errors import HeaderError, InputError, QuantizationError
from .layouts import PackedWeight, check_layout, layout_data_bytes, layout_scales_bytes, pack, unpack
from .output import Path
from .spec import KEPT_INPUTS, RESIDUALS, ModelSpec, StateSpec
from .weights import PLACES, EncodedWeight, WeightFormat

ENGINE_MAGIC = b"\x89GOSL\r\n\x1a"
ENGINE_VERSION = 6
ENGINE_KIND = "engine file"
# What came after the first engines of this version: whoever does not know the format says that it is too old.
RESIDUALS_FEATURE = "residuals"
# Tools and decoding parameters in the chat template.
CHAT_FEATURE = "chat-2026"
KNOWN_FEATURES = frozenset({"int3", RESIDUALS_FEATURE, CHAT_FEATURE})
TENSOR_ALIGNMENT_BYTES = 64
GRAPH_FORMAT = "onnx"

_MAX_AXES = 8
_MAX_OPSET = 1 << 20
# Names that are file names everywhere: a backend may have to write a weight to a file of its own.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_AGAIN = "export the engine again"
_MODEL_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_VERIFIED_AT_OPEN = ("graph", "program", "tokenizer", "state")


class TensorSource(NamedTuple):
    """A tensor to write.

    Attributes:
        name: its name, also in the graph.
        format: how it will be stored.
        shape: its shape.
        produce: called when its turn comes; returns it stored in that format and shape. Nothing is kept of it
            afterwards, so only one tensor is in memory at a time, as rows and packed.
        layout: how it will lie in the file; ``tiles`` and ``columns`` are for matrices.
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    produce: Callable[[], EncodedWeight]
    layout: str = "rows"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in the section ``weights``.

    Attributes:
        name: its name.
        format: how it is stored.
        layout: how its numbers lie, ``rows``, ``tiles`` or ``columns``.
        shape: its shape, without padding.
        offset: where its data begin, in bytes from the section's start.
        size_bytes: length of its data.
        scales_offset: where its float16 scales begin; None without groups.
        scales_size_bytes: length of its scales, 0 without groups.
    """

    name: str
    format: WeightFormat
    layout: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    scales_offset: int | None
    scales_size_bytes: int

    @classmethod
    def placed(cls, name: str, fmt: WeightFormat, layout: str, shape: tuple[int, ...], start_bytes: int) -> TensorEntry:
        """The entry of a tensor that goes to the first free place from `start_bytes` on.

        Raises:
            QuantizationError: format or layout cannot hold the shape.
        """
        check_layout(fmt, layout, shape, name)
        offset = align_up(start_bytes, TENSOR_ALIGNMENT_BYTES)
        size_bytes = layout_data_bytes(fmt, layout, shape)
        scales_offset = align_up(offset + size_bytes, TENSOR_ALIGNMENT_BYTES) if fmt.is_integer else None
        scales_size_bytes = layout_scales_bytes(fmt, layout, shape)
        return cls(name, fmt, layout, shape, offset, size_bytes, scales_offset, scales_size_bytes)

    @property
    def end(self) -> int:
        """The first byte after the tensor."""
        return (
            (self.offset + self.size_bytes)
            if self.scales_offset is None
            else self.scales_offset + self.scales_size_bytes
        )

    def to_json(self) -> dict[str, Any]:
        """The header's entry."""
        return {
            "name": self.name,
            "format": self.format.name,
            "group": self.format.group,
            "layout": self.layout,
            "shape": list(self.shape),
            "offset": self.offset,
            "size_bytes": self.size_bytes,
            "scales_offset": self.scales_offset,
            "scales_size_bytes": self.scales_size_bytes,
        }


# ------------------------------------------------------------------------------------------------------------- writing


def write_engine(
    path: Path,
    *,
    spec: ModelSpec,
    state_spec: StateSpec,
    model_id: str,
    graph: Buffer,
    graph_info: Mapping[str, Any],
    tensors: Iterable[TensorSource],
    tokenizer: tuple[str, Buffer] | None,
    program: Buffer | None,
    provenance: Mapping[str, Any],
    overwrite: bool,
    initial_state: Mapping[str, NDArray[np.float32]] | None = None,
    chat: ChatTemplate | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write an engine file; the same arguments give the same bytes.

    Args:
        path: the file; it appears complete or not at all.
        spec: the model's dimensions.
        state_spec: the state's tensors.
        model_id: SHA-256 of the canonical float32 source tensors, 64 hex digits.
        graph: the step graph as ONNX.
        graph_info: ``{"opset": its ONNX opset, "format": "onnx"}``.
        tensors: the tensors in the file's order; their content is asked for one at a time.
        tokenizer: its kind and its bytes; None for an engine that takes token ids only.
        program: the native engine's program, if there is one.
        provenance: where the engine came from, as JSON without times.
        overwrite: whether an existing file is replaced.
        initial_state: what a fresh state holds, every tensor of `state_spec` by name; None for its ``init`` values.
        chat: how conversations with the model are written, where that is known.
        progress: called after each tensor with its name and its stored size in bytes.

    Raises:
        OutputError: the file cannot be written.
        InputError: an argument cannot be used, or a producer returned another format or shape than announced.
    """
    if not _MODEL_ID.fullmatch(model_id):
        raise InputError("is not a model id", place="model_id", expected="64 hex digits", found=repr(model_id)[:100])
    try:
        _check_graph_info(graph_info)
    except HeaderError as error:
        raise InputError(error.problem, place="graph_info", expected=error.expected, found=error.found) from None
    if tokenizer is not None and not _is_name(tokenizer[0]):
        raise InputError("is not a tokenizer's kind", place="tokenizer", found=repr(tokenizer[0])[:100])
    sources = list(tensors)
    entries: list[TensorEntry] = []
    names = set()
    for source in sources:
        if not _is_name(source.name) or source.name in names:
            raise InputError("is used twice or is not a name", place="tensors", found=repr(source.name)[:100])
        names.add(source.name)
        start_bytes = entries[-1].end if entries else 0
        shape = tuple(source.shape)
        entries.append(TensorEntry.placed(source.name, source.format, source.layout, shape, start_bytes))
    sections = [Section.of("graph", graph)]
    if program is not None:
        sections.append(Section.of("program", program))
    weights_bytes = entries[-1].end if entries else 0
    sections.append(Section("weights", weights_bytes, _weight_pieces(sources, entries, progress), verify="check"))
    if tokenizer is not None:
        sections.append(Section.of("tokenizer", tokenizer[1]))
    if initial_state is not None:
        sections.append(Section.of("state", _state_bytes(state_spec, initial_state)))
    write_container(
        path,
        magic=ENGINE_MAGIC,
        version=ENGINE_VERSION,
        required_features=_features(entries, chat),
        header={
            "model": spec.to_json(),
            "state": state_spec.to_json(),
            "model_id": model_id,
            "provenance": dict(provenance),
            "tokenizer": None if tokenizer is None else {"kind": tokenizer[0]},
            "chat": None if chat is None else chat.to_json(),
            "graph": dict(graph_info),
            "tensors": [entry.to_json() for entry in entries],
        },
        sections=sections,
        overwrite=overwrite,
    )


def _features(entries: Sequence[TensorEntry], chat: ChatTemplate | None) -> set[str]:
    features = {entry.format.name for entry in entries} & KNOWN_FEATURES
    if any(entry.name.endswith(RESIDUALS) for entry in entries):
        features.add(RESIDUALS_FEATURE)
    if chat is not None and chat.is_extended:
        features.add(CHAT_FEATURE)
    return features


def _state_bytes(spec: StateSpec, values: Mapping[str, NDArray[np.float32]]) -> bytes:
    pieces = []
    for tensor in spec.tensors:
        value = values.get(tensor.name)
        if value is None or value.shape != tensor.shape or not np.isfinite(value).all():
            raise InputError(
                "is not this state's tensor, whole and finite",
                place=f"initial_state, {tensor.name}",
                expected=list(tensor.shape),
                found="nothing" if value is None else list(value.shape),
            )
        pieces.append(value.astype("<f4").tobytes())
    return b"".join(pieces)


def _weight_pieces(
    sources: Sequence[TensorSource], entries: Sequence[TensorEntry], progress: Callable[[str, int], None] | None
) -> Iterator[Buffer]:
    position = 0
    for source, entry in zip(sources, entries, strict=True):
        weight = source.produce()
        if weight.format != entry.format or weight.shape != entry.shape:
            raise InputError(
                "a tensor was made otherwise than announced",
                place=entry.name,
                expected=f"{entry.format} {list(entry.shape)}",
                found=f"{weight.format} {list(weight.shape)}",
            )
        packed = pack(weight, entry.layout)
        del weight
        yield bytes(entry.offset - position)
        yield packed.data.data
        if entry.scales_offset is not None and packed.scales is not None:
            yield bytes(entry.scales_offset - entry.offset - entry.size_bytes)
            yield packed.scales.data
        position = entry.end
        del packed
        if progress is not None:
            progress(entry.name, entry.size_bytes + entry.scales_size_bytes)


# ------------------------------------------------------------------------------------------------------------- reading


class EngineFile:
    """An open engine file, mapped read-only; made by `EngineFile.open`, usable in a ``with`` statement.

    Attributes:
        path: the file, as it was given.
        spec: the model's dimensions.
        state_spec: the state's tensors.
        model_id: the same for every quantization of one checkpoint.
        provenance: where the engine came from.
        graph_info: the graph's ``opset`` and ``format``.
        tokenizer_kind: the tokenizer's kind; None for an engine that takes token ids only.
        tensors: the tensors by name, in the file's order.
        initial_state: what a fresh state holds, every tensor of the state by name, float32; None where that is the
            state's ``init`` values.
        chat: how conversations with the model are written; None where that is not known.
    """

    def __init__(self, container: Container) -> None:
        self._container = container
        self.path = container.path
        header = container.header
        with errors_in(self.path):
            if container.version < ENGINE_VERSION:
                raise HeaderError(
                    "is an engine of an older goslet",
                    place="format version",
                    expected=ENGINE_VERSION,
                    found=container.version,
                    remedy=_AGAIN,
                )
            self.spec = ModelSpec.from_json(_need(header, "model", dict), "model")
            self.state_spec = StateSpec.from_json(_need(header, "state", dict), "state")
            self.model_id: str = _need(header, "model_id", str)
            if not _MODEL_ID.fullmatch(self.model_id):
                raise HeaderError("is not a model id", place="model_id", expected="64 hex digits", remedy=_AGAIN)
            self.provenance: Mapping[str, Any] = MappingProxyType(_need(header, "provenance", dict))
            self.graph_info: Mapping[str, Any] = MappingProxyType(_need(header, "graph", dict))
            _check_graph_info(self.graph_info)
            self.tokenizer_kind = _read_tokenizer(header, container)
            for name in ("graph", "weights"):
                if name not in container.sections:
                    raise HeaderError("a section is missing", place=name, remedy=_AGAIN)
            for entry in container.sections.values():
                expected = "open" if entry.name in _VERIFIED_AT_OPEN else "check"
                if entry.verify != expected:
                    raise HeaderError(
                        "is verified at the wrong time",
                        place=f"section {entry.name}",
                        expected=expected,
                        found=entry.verify,
                        remedy=_AGAIN,
                    )
            self.tensors: Mapping[str, TensorEntry] = MappingProxyType(
                _read_tensors(_need(header, "tensors", list), container.sections["weights"].size_bytes)
            )
            if "chat" not in header:
                raise HeaderError("a key is missing", place="chat", remedy=_AGAIN)
            self.chat = None if header["chat"] is None else ChatTemplate.from_json(header["chat"])
            self.initial_state = _read_state(container, self.state_spec)

    @classmethod
    def open(cls, path: Path, check: bool = False) -> EngineFile:
        """Open an engine file; with `check`, verify its weights too.

        Raises:
            ContainerError: the file cannot be read, is damaged or is not an engine file; its subclasses say which
                (`goslet.container.read_container`).
        """
        container = read_container(
            path, magic=ENGINE_MAGIC, version=ENGINE_VERSION, kind=ENGINE_KIND, known_features=KNOWN_FEATURES
        )
        try:
            file = cls(container)
            if check:
                file.check()
        except BaseException:
            container.close()
            raise
        return file

    @property
    def graph_bytes(self) -> memoryview:
        """The step graph as ONNX, without a copy."""
        return self._container.section("graph")

    @property
    def program_bytes(self) -> memoryview | None:
        """The native engine's program without a copy, or None."""
        return self._container.section("program") if "program" in self._container.sections else None

    @property
    def tokenizer_bytes(self) -> memoryview:
        """What the tokenizer's kind needs, without a copy.

        Raises:
            HeaderError: the engine has no tokenizer (`tokenizer_kind` is None).
        """
        return self._container.section("tokenizer")

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return self._container.size_bytes

    @property
    def section_sizes(self) -> dict[str, int]:
        """Bytes of each section, in the file's order."""
        return {name: entry.size_bytes for name, entry in self._container.sections.items()}

    @property
    def n_weights(self) -> int:
        """Numbers of the model: those of all tensors but residuals, which are part of how numbers are stored."""
        return sum(math.prod(entry.shape) for name, entry in self.tensors.items() if not name.endswith(RESIDUALS))

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes on average over all tensors, scales, padding and residuals included."""
        stored_bytes = sum(entry.size_bytes + entry.scales_size_bytes for entry in self.tensors.values())
        return 8 * stored_bytes / max(1, self.n_weights)

    def packed(self, name: str) -> PackedWeight:
        """A tensor as it lies in the file: read-only views into the map, which stay good after `close`.

        Raises:
            HeaderError: the engine has no such tensor.
            InputError: the file is closed.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise HeaderError("a tensor is missing", file=self.path, place=name, remedy=_AGAIN)
        section = self._container.section("weights")
        data = np.frombuffer(section, np.uint8, entry.size_bytes, entry.offset)
        scales = None
        if entry.scales_offset is not None:
            scales = np.frombuffer(section, np.dtype("<f2"), entry.scales_size_bytes // 2, entry.scales_offset)
        return PackedWeight(entry.format, entry.layout, entry.shape, data, scales)

    def weight(self, name: str) -> EncodedWeight:
        """A tensor as plain rows: read-only views into the map where it lies in rows, and a copy where it does not.

        Raises:
            HeaderError: the engine has no such tensor.
            InputError: the file is closed.
        """
        return unpack(self.packed(name))

    @property
    def weights_sha256(self) -> str:
        """The checksum of the section ``weights``, as the header has it."""
        return self._container.sections["weights"].sha256

    def prefer_huge_pages(self) -> None:
        """As `Container.prefer_huge_pages`, for a backend that reads weights where they are mapped."""
        self._container.prefer_huge_pages()

    def check(self) -> None:
        """Verify the checksum of every section, weights and plans too.

        Raises:
            ChecksumError: a section is damaged; it is named.
        """
        self._container.check()

    def check_whole(self) -> None:
        """As `Container.check_whole`.

        Raises:
            TruncatedError: somebody has shortened the file since it was opened.
        """
        self._container.check_whole()

    def close(self) -> None:
        """Unmap the file, or let it be unmapped when the last view into it is gone."""
        self._container.close()

    def __enter__(self) -> EngineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _need(header: Mapping[str, Any], key: str, kind: type, place: str = "") -> Any:
    value = header.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise HeaderError(
            "is missing or has the wrong type",
            place=f"{place}{key}",
            expected=kind.__name__,
            found=type(value).__name__,
            remedy=_AGAIN,
        )
    return value


def _check_graph_info(info: Mapping[str, Any]) -> None:
    if _need(info, "format", str, "graph.") != GRAPH_FORMAT:
        raise HeaderError("is not a known format", place="graph.format", expected=GRAPH_FORMAT, remedy=_AGAIN)
    if not 1 <= _need(info, "opset", int, "graph.") <= _MAX_OPSET:
        raise HeaderError(
            "is not an opset", place="graph.opset", expected=f"1 to {_MAX_OPSET}", found=info["opset"], remedy=_AGAIN
        )


def _read_tokenizer(header: Mapping[str, Any], container: Container) -> str | None:
    if "tokenizer" not in header:
        raise HeaderError("a key is missing", place="tokenizer", remedy=_AGAIN)
    kind: str | None = None
    if header["tokenizer"] is not None:
        kind = _need(_need(header, "tokenizer", dict), "kind", str, "tokenizer.")
        if not _is_name(kind):
            raise HeaderError("is not a name", place="tokenizer.kind", remedy=_AGAIN)
    if (kind is None) == ("tokenizer" in container.sections):
        raise HeaderError("header and sections disagree about a tokenizer", place="tokenizer", remedy=_AGAIN)
    return kind


def _read_state(container: Container, spec: StateSpec) -> Mapping[str, NDArray[np.float32]] | None:
    """Views into the section ``state``, found to be as long as the state and finite."""
    if "state" not in container.sections:
        return None
    section = container.section("state")
    if section.nbytes != spec.size_bytes:
        raise HeaderError(
            "has a wrong length",
            place="section state",
            expected=f"{spec.size_bytes} bytes",
            found=f"{section.nbytes} bytes",
            remedy=_AGAIN,
        )
    numbers = np.frombuffer(section, "<f4")
    if not np.isfinite(numbers).all():
        raise HeaderError("holds NaN or infinity", place="section state", remedy=_AGAIN)
    tensors = {}
    begin = 0
    for tensor in spec.tensors:
        tensors[tensor.name] = numbers[begin : begin + tensor.n_elements].reshape(tensor.shape)
        begin += tensor.n_elements
    return MappingProxyType(tensors)


def _read_tensors(items: Sequence[Any], section_bytes: int) -> dict[str, TensorEntry]:
    """The tensors by name, found to tile the section ``weights``."""
    tensors: dict[str, TensorEntry] = {}
    end = 0
    for index, item in enumerate(items):
        place = f"tensors[{index}]"
        if not isinstance(item, dict):
            raise HeaderError("is not an object", place=place, found=type(item).__name__, remedy=_AGAIN)
        name = item.get("name")
        if not isinstance(name, str) or not _is_name(name):
            raise HeaderError("is not a name", place=f"{place}.name", found=repr(name)[:100], remedy=_AGAIN)
        if name in tensors:
            raise HeaderError("appears twice", place=f"tensor {name}", remedy=_AGAIN)
        shape = _need(item, "shape", list, f"{place}.")
        # Python's own integers, which cannot overflow; in the end they must add up to the section's size.
        if not 1 <= len(shape) <= _MAX_AXES or not all(type(size) is int and size >= 1 for size in shape):
            raise HeaderError("is not a shape", place=f"tensor {name}", found=repr(shape)[:100], remedy=_AGAIN)
        group = item.get("group")
        try:
            if group is not None:
                group = _need(item, "group", int, f"{place}.")
            fmt = WeightFormat(_need(item, "format", str, f"{place}."), group)
            layout = _need(item, "layout", str, f"{place}.")
            entry = TensorEntry.placed(name, fmt, layout, tuple(shape), end)
        except QuantizationError as error:
            raise HeaderError(
                error.problem, place=f"tensor {name}", expected=error.expected, found=error.found, remedy=_AGAIN
            ) from None
        for key, expected in entry.to_json().items():
            # Without the types True would pass for 1, and 64.0 for 64.
            if key not in item or item[key] != expected or type(item[key]) is not type(expected):
                raise HeaderError(
                    "is not what format, layout, shape and the tensor before it imply",
                    place=f"tensor {name}, {key}",
                    expected=expected,
                    found=repr(item.get(key))[:100],
                    remedy=_AGAIN,
                )
        if (fmt.name == PLACES) != name.endswith(KEPT_INPUTS):
            raise HeaderError(
                "is stored as places and is none, or the other way round",
                place=f"tensor {name}",
                expected=f"{PLACES} for names that end in {KEPT_INPUTS}",
                found=str(fmt),
                remedy=_AGAIN,
            )
        end = entry.end
        tensors[name] = entry
    if end != section_bytes:
        raise HeaderError(
            "does not end with its last tensor",
            place="section weights",
            expected=end,
            found=section_bytes,
            remedy=_AGAIN,
        )
    return tensors
