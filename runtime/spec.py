"""What a model is and what its state looks like: frozen descriptions that every other room reads.

Nothing here knows how a version computes; `goslet.export.models` derives these from a checkpoint, the engine file
records them as JSON, and backends allocate and check by them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import HeaderError

MAX_VOCAB_SIZE = 1 << 24
MAX_DIMENSION = 1 << 20
MAX_LAYERS = 1 << 10
# As StateBuffer::kMaxSizeBytes: far above any real model.
MAX_STATE_BYTES = 1 << 32
STATE_LAYOUT_VERSION = 1
# The one tensor that is gathered on the host, row by row, instead of being an initializer of the graph.
EMBEDDING = "emb.weight"
# How the names of a matrix's residual end (`goslet.residuals`); no version's tensors end so.
DOWN, UP, KEPT, KEPT_INPUTS = ".down", ".up", ".kept", ".kept_inputs"
RESIDUALS = (DOWN, UP, KEPT, KEPT_INPUTS)


_JSON_NAMES = {int: "a whole number", float: "a number", str: "a text", list: "a list", Mapping: "an object"}
_SHOWN_CHARACTERS = 60


def _need(mapping: Mapping[str, Any], key: str, kind: type | tuple[type, ...], place: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise HeaderError("is not a JSON object", place=place, expected="an object", found=type(mapping).__name__)
    expected = _JSON_NAMES[kind[-1] if isinstance(kind, tuple) else kind]
    if key not in mapping:
        raise HeaderError(
            "a key is missing", place=f"{place}.{key}", expected=expected, remedy="export the engine again"
        )
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise HeaderError("has the wrong type", place=f"{place}.{key}", expected=expected, found=type(value).__name__)
    return value


def _need_int(mapping: Mapping[str, Any], key: str, low: int, high: int, place: str) -> int:
    value: int = _need(mapping, key, int, place)
    if not low <= value <= high:
        raise HeaderError("is out of range", place=f"{place}.{key}", expected=f"{low} to {high}", found=value)
    return value


def _need_positive_float(mapping: Mapping[str, Any], key: str, place: str) -> float:
    value = float(_need(mapping, key, (int, float), place))
    if not (math.isfinite(value) and value > 0):
        raise HeaderError("is not a positive number", place=f"{place}.{key}", found=value)
    return value


def _is_float32(value: float) -> bool:
    """Whether it is finite as the nearest float32."""
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return False


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions and constants of one model.

    Attributes:
        version: the RWKV version: ``"4"``, ``"5.0"``, ``"5.1"``, ``"5.2"``, ``"6"``, ``"7"`` or ``"7a"``.
        n_layer: blocks.
        n_embd: width D of the residual stream.
        n_ffn: width of the channel mix's hidden layer.
        head_size: N, numbers in a head of the time mix; 1 in RWKV-4, where every channel goes its own way.
        vocab_size: V, rows of the embedding and of the head.
        norm_eps: eps of the per-head group norm after the time mix; RWKV-4 has none.
        layer_norm_eps: eps of every LayerNorm.
        ranks: rank of each LoRA: none before RWKV-6; ``mix`` and ``decay`` in 6; ``w``, ``a``, ``v`` (absent with one
            layer) and ``g`` in 7, and in 7a ``s``, whose square is the size of a token's matrix in every layer.
    """

    version: str
    n_layer: int
    n_embd: int
    n_ffn: int
    head_size: int
    vocab_size: int
    norm_eps: float
    layer_norm_eps: float
    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", MappingProxyType(dict(self.ranks)))

    def __hash__(self) -> int:
        return hash((self.version, self.n_layer, self.n_embd, self.n_ffn, self.head_size, self.vocab_size))

    @property
    def n_head(self) -> int:
        """Heads H of the time mix, D / N."""
        return self.n_embd // self.head_size

    @property
    def input_sizes(self) -> tuple[int, ...]:
        """What a token's row of the embedding is made of: the embedded token and, in 7a, a matrix for every layer."""
        return (self.n_embd, *([self.ranks["s"] ** 2] * self.n_layer if "s" in self.ranks else []))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back to an equal spec."""
        return {
            "version": self.version,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            "n_ffn": self.n_ffn,
            "head_size": self.head_size,
            "vocab_size": self.vocab_size,
            "norm_eps": self.norm_eps,
            "layer_norm_eps": self.layer_norm_eps,
            "ranks": dict(self.ranks),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], place: str = "spec") -> ModelSpec:
        """Read a spec from a file's header.

        Raises:
            HeaderError: a key is missing, has the wrong type or is out of range; `place` is named.
        """
        n_embd = _need_int(value, "n_embd", 1, MAX_DIMENSION, place)
        head_size = _need_int(value, "head_size", 1, n_embd, place)
        if n_embd % head_size:
            raise HeaderError("does not divide n_embd", place=f"{place}.head_size", expected=n_embd, found=head_size)
        ranks = _need(value, "ranks", Mapping, place)
        return cls(
            version=_need(value, "version", str, place),
            n_layer=_need_int(value, "n_layer", 1, MAX_LAYERS, place),
            n_embd=n_embd,
            n_ffn=_need_int(value, "n_ffn", 1, MAX_DIMENSION, place),
            head_size=head_size,
            vocab_size=_need_int(value, "vocab_size", 2, MAX_VOCAB_SIZE, place),
            norm_eps=_need_positive_float(value, "norm_eps", place),
            layer_norm_eps=_need_positive_float(value, "layer_norm_eps", place),
            ranks={key: _need_int(ranks, key, 1, MAX_DIMENSION, f"{place}.ranks") for key in ranks},
        )


@dataclass(frozen=True)
class StateTensor:
    """One fixed-size tensor of a state.

    Attributes:
        name: ``"{layer}.{part}"``, for example ``"3.wkv"``; the graph's inputs and outputs are ``state_in.`` and
            ``state_out.`` plus this name.
        shape: its shape without the batch axis.
        axes: what the axes mean, for example ``"head,value,key"``: the orientation of a matrix state is part of it.
        init: the value that every element has in a fresh state.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    init: float = 0.0

    @property
    def n_elements(self) -> int:
        """Numbers in this tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StateSpec:
    """Every tensor of a model's state, in the graph's order; all are float32.

    Attributes:
        tensors: the tensors, in the order of the graph's inputs.
        layout_version: changes whenever a state file written by an older goslet could be misread.
    """

    tensors: tuple[StateTensor, ...]
    layout_version: int = STATE_LAYOUT_VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes of one state in float32, without alignment."""
        return 4 * sum(tensor.n_elements for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back to an equal spec."""
        return {
            "layout_version": self.layout_version,
            "dtype": "float32",
            "tensors": [{"name": t.name, "shape": list(t.shape), "axes": t.axes, "init": t.init} for t in self.tensors],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], place: str = "state") -> StateSpec:
        """Read a state's description from a file's header.

        Raises:
            HeaderError: a key is missing, has the wrong type or is out of range; `place` is named.
        """
        layout_version = _need_int(value, "layout_version", 1, 1 << 16, place)
        if _need(value, "dtype", str, place) != "float32":
            raise HeaderError(
                "is not supported", place=f"{place}.dtype", expected="float32", found=value["dtype"][:_SHOWN_CHARACTERS]
            )
        tensors = []
        names = set()
        left_bytes = MAX_STATE_BYTES
        for index, item in enumerate(_need(value, "tensors", list, place)):
            at = f"{place}.tensors[{index}]"
            shape = _need(item, "shape", list, at)
            if not 1 <= len(shape) <= 4:
                raise HeaderError("has a wrong length", place=f"{at}.shape", expected="1 to 4", found=len(shape))
            sizes = {str(axis): size for axis, size in enumerate(shape)}
            dims = tuple(_need_int(sizes, axis, 1, MAX_DIMENSION, f"{at}.shape") for axis in sizes)
            name = _need(item, "name", str, at)
            if name in names:
                raise HeaderError("appears twice", place=f"{at}.name", found=name[:_SHOWN_CHARACTERS])
            names.add(name)
            init = float(_need(item, "init", (int, float), at))
            if not _is_float32(init):
                raise HeaderError("is not a float32", place=f"{at}.init", found=init)
            tensors.append(StateTensor(name, dims, _need(item, "axes", str, at), init))
            left_bytes -= 4 * math.prod(dims)
            if left_bytes < 0:
                raise HeaderError("is too large", place=f"{at}.shape", expected=f"at most {MAX_STATE_BYTES} bytes")
        if not tensors:
            raise HeaderError("is empty", place=f"{place}.tensors", expected="at least one tensor")
        return cls(tuple(tensors), layout_version)
