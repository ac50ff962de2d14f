"""Generators of bad files: each takes the bytes of a good container and returns bytes that are bad for one reason.

They read and write the format by themselves, so that a mistake in goslet's own reader or writer is not made twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from goslet.errors import (
    ChecksumError,
    ContainerError,
    HeaderError,
    NewerVersionError,
    OversizedError,
    TruncatedError,
    UnknownFeatureError,
    WrongMagicError,
)

PREFIX = struct.Struct("<8sIIQ")
PAGE = 4096
Damage = Callable[[bytes], bytes]
Header = dict[str, Any]


class Attack(NamedTuple):
    """A way to make a good file bad, and the error that must come of it."""

    damage: Damage
    error: type[ContainerError]


def header_length(data: bytes) -> int:
    return PREFIX.unpack_from(data)[3]


def header_of(data: bytes) -> Header:
    return json.loads(data[PREFIX.size : PREFIX.size + header_length(data)])


def data_start(data: bytes) -> int:
    return -(-(PREFIX.size + header_length(data) + 32) // PAGE) * PAGE


def section_range(data: bytes, name: str) -> range:
    entry = next(item for item in header_of(data)["sections"] if item["name"] == name)
    return range(entry["offset"], entry["offset"] + entry["size_bytes"])


def with_raw_header(data: bytes, header: bytes) -> bytes:
    """The file with another header, rightly signed; its sections stay where they were if the header's pages suffice."""
    magic, version, reserved, _ = PREFIX.unpack_from(data)
    head = PREFIX.pack(magic, version, reserved, len(header)) + header
    head += hashlib.sha256(head).digest()
    return head + bytes(-len(head) % PAGE) + data[data_start(data) :]


def with_header(data: bytes, edit: Callable[[Header], None]) -> bytes:
    """The file with an edited header, rightly signed, and its sections where they were."""
    header = header_of(data)
    edit(header)
    changed = with_raw_header(data, json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    assert data_start(changed) == data_start(data), "the edit must leave the header's number of pages"
    return changed


def set_at(*path: str | int, value: Any) -> Callable[[Header], None]:
    """An edit that sets one place of the header."""

    def edit(header: Header) -> None:
        place: Any = header
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return edit


def remove(*path: str | int) -> Callable[[Header], None]:
    """An edit that removes one key of the header."""

    def edit(header: Header) -> None:
        place: Any = header
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return edit


def flipped(data: bytes, offset: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def boundaries(data: bytes) -> Iterator[int]:
    """Every length to which a file can be cut at, just before or just after a boundary of its structure."""
    head = PREFIX.size + header_length(data)
    edges = [8, 12, 16, 24, head, head + 32, data_start(data)]
    for entry in header_of(data)["sections"]:
        edges += [entry["offset"], entry["offset"] + entry["size_bytes"]]
    lengths = {edge + shift for edge in edges for shift in (-1, 0, 1)}
    return iter(sorted(length for length in lengths if 0 < length < len(data)))


def _shifted(name_index: int, shift: int) -> Damage:
    def edit(header: Header) -> None:
        header["sections"][name_index]["offset"] += shift

    return lambda data: with_header(data, edit)


def _section(key: str, value: Any) -> Damage:
    return lambda data: with_header(data, set_at("sections", 1, key, value=value))


def _moved_apart(data: bytes) -> bytes:
    """A page of zeros before the last section, and the header says so."""
    start = header_of(data)["sections"][-1]["offset"]
    return _shifted(-1, PAGE)(data)[:start] + bytes(PAGE) + data[start:]


def _twice(data: bytes) -> bytes:
    """The last section once more under the same name, in the right place."""
    entry = copy.deepcopy(header_of(data)["sections"][-1])
    content = data[entry["offset"] : entry["offset"] + entry["size_bytes"]]
    entry["offset"] = -(-len(data) // PAGE) * PAGE
    changed = with_header(data, lambda header: header["sections"].append(entry))
    return changed + bytes(entry["offset"] - len(data)) + content


def _raw(header: bytes) -> Damage:
    return lambda data: with_raw_header(data, header)


def _inside_header(old: bytes, new: bytes) -> Damage:
    def damage(data: bytes) -> bytes:
        header = data[PREFIX.size : PREFIX.size + header_length(data)]
        assert header.count(old) >= 1
        return with_raw_header(data, header.replace(old, new, 1))

    return damage


CONTAINER_ATTACKS: dict[str, Attack] = {
    "empty": Attack(lambda data: b"", WrongMagicError),
    "a text file": Attack(lambda data: b"Call me Ishmael.\n" * 20, WrongMagicError),
    "a short text file": Attack(lambda data: b"x", WrongMagicError),
    "a zip file": Attack(lambda data: b"PK\x03\x04" + data[4:], WrongMagicError),
    "copied as text to unix": Attack(lambda data: data.replace(b"\r\n", b"\n"), WrongMagicError),
    "copied as text to dos": Attack(lambda data: data.replace(b"\n", b"\r\n"), WrongMagicError),
    "copied over seven bits": Attack(lambda data: bytes(byte & 0x7F for byte in data), WrongMagicError),
    "a newer version": Attack(
        lambda data: patched(data, 8, struct.pack("<I", struct.unpack_from("<I", data, 8)[0] + 1)), NewerVersionError
    ),
    "the newest version": Attack(lambda data: patched(data, 8, b"\xff" * 4), NewerVersionError),
    "version zero": Attack(lambda data: patched(data, 8, bytes(4)), HeaderError),
    "reserved bytes in use": Attack(lambda data: patched(data, 12, b"\x01"), HeaderError),
    "header length 2^63": Attack(lambda data: patched(data, 16, struct.pack("<Q", 1 << 63)), OversizedError),
    "header length 2^64 - 1": Attack(lambda data: patched(data, 16, b"\xff" * 8), OversizedError),
    "header length past 64 MiB": Attack(
        lambda data: patched(data, 16, struct.pack("<Q", (64 << 20) + 1)), OversizedError
    ),
    "header length past the end": Attack(lambda data: patched(data, 16, struct.pack("<Q", len(data))), TruncatedError),
    "header length zero": Attack(lambda data: patched(data, 16, bytes(8)), ChecksumError),
    "signed but empty header": Attack(_raw(b""), HeaderError),
    "a byte too many": Attack(lambda data: data + b"\0", OversizedError),
    "a page too many": Attack(lambda data: data + bytes(PAGE), OversizedError),
    "a byte too few": Attack(lambda data: data[:-1], TruncatedError),
    "header not UTF-8": Attack(_raw(b'{"a":"\xff"}'), HeaderError),
    "header in UTF-16": Attack(_raw('{"a":1}'.encode("utf-16")), HeaderError),
    "header with a byte order mark": Attack(_raw(b"\xef\xbb\xbf{}"), HeaderError),
    "header not JSON": Attack(_raw(b"import os"), HeaderError),
    "header with trailing text": Attack(_raw(b"{} {}"), HeaderError),
    "header an array": Attack(_raw(b"[]"), HeaderError),
    "header a number": Attack(_raw(b"1"), HeaderError),
    "header an empty object": Attack(_raw(b"{}"), HeaderError),
    "NaN": Attack(_inside_header(b"{", b'{"x":NaN,'), HeaderError),
    "Infinity": Attack(_inside_header(b"{", b'{"x":-Infinity,'), HeaderError),
    "a float that overflows": Attack(_inside_header(b"{", b'{"x":1e999,'), HeaderError),
    "an integer of 5000 digits": Attack(_inside_header(b"{", b'{"x":' + b"9" * 5000 + b","), HeaderError),
    "a float of 5000 digits": Attack(_inside_header(b"{", b'{"x":0.' + b"9" * 5000 + b","), HeaderError),
    "a key twice": Attack(_inside_header(b"{", b'{"sections":[],'), HeaderError),
    "a key twice deep inside": Attack(_inside_header(b'"offset":', b'"offset":0,"offset":'), HeaderError),
    "half a surrogate pair": Attack(_inside_header(b"{", b'{"x":"\\ud800",'), HeaderError),
    "arrays nested 100000 deep": Attack(_raw(b"[" * 100_000), HeaderError),
    "objects nested 100000 deep": Attack(_raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), HeaderError),
    "three million empty arrays": Attack(_raw(b'{"a":[' + b"[]," * 3_000_000 + b"0]}"), OversizedError),
    "no sections": Attack(lambda data: with_header(data, remove("sections")), HeaderError),
    "sections an object": Attack(lambda data: with_header(data, set_at("sections", value={})), HeaderError),
    "an empty list of sections": Attack(lambda data: with_header(data, set_at("sections", value=[])), OversizedError),
    "a section that is a string": Attack(lambda data: with_header(data, set_at("sections", 0, value="x")), HeaderError),
    "no features": Attack(lambda data: with_header(data, remove("required_features")), HeaderError),
    "features not a list": Attack(
        lambda data: with_header(data, set_at("required_features", value="fast")), HeaderError
    ),
    "features not names": Attack(lambda data: with_header(data, set_at("required_features", value=[[]])), HeaderError),
    "an unknown feature": Attack(
        lambda data: with_header(data, set_at("required_features", value=["telepathy"])), UnknownFeatureError
    ),
    "a section name missing": Attack(lambda data: with_header(data, remove("sections", 1, "name")), HeaderError),
    "a section name empty": Attack(_section("name", ""), HeaderError),
    "a section name with a slash": Attack(_section("name", "../x"), HeaderError),
    "a section name with a newline": Attack(_section("name", "graph\n"), HeaderError),
    "a section name as number": Attack(_section("name", 7), HeaderError),
    "a section twice": Attack(_twice, HeaderError),
    "an offset missing": Attack(lambda data: with_header(data, remove("sections", 1, "offset")), HeaderError),
    "an offset as text": Attack(_section("offset", "4096"), HeaderError),
    "an offset as float": Attack(_section("offset", 4096.0), HeaderError),
    "an offset as truth": Attack(_section("offset", True), HeaderError),
    "an offset below zero": Attack(_section("offset", -PAGE), HeaderError),
    "an offset of 2^63": Attack(_section("offset", 1 << 63), OversizedError),
    "an offset of 2^64 - 4096": Attack(_section("offset", (1 << 64) - PAGE), OversizedError),
    "a size missing": Attack(lambda data: with_header(data, remove("sections", 1, "size_bytes")), HeaderError),
    "a size below zero": Attack(_section("size_bytes", -1), HeaderError),
    "a size of 2^63": Attack(_section("size_bytes", 1 << 63), OversizedError),
    "a size of 2^100": Attack(_section("size_bytes", 1 << 100), OversizedError),
    "a size past the end": Attack(_section("size_bytes", 1 << 40), TruncatedError),
    "a size as null": Attack(_section("size_bytes", None), HeaderError),
    "a section unaligned": Attack(_shifted(1, 64), HeaderError),
    "a section that overlaps": Attack(_shifted(-1, -PAGE), HeaderError),
    "a section inside the header": Attack(_section("offset", 0), HeaderError),
    "a hole of the right length": Attack(_moved_apart, HeaderError),
    "sections in the wrong order": Attack(
        lambda data: with_header(data, lambda header: header["sections"].reverse()), HeaderError
    ),
    "a checksum missing": Attack(lambda data: with_header(data, remove("sections", 1, "sha256")), HeaderError),
    "a checksum too short": Attack(_section("sha256", "00"), HeaderError),
    "a checksum in capitals": Attack(_section("sha256", "A" * 64), HeaderError),
    "a wrong checksum": Attack(
        lambda data: with_header(data, set_at("sections", 0, "sha256", value="0" * 64)), ChecksumError
    ),
    "verified never": Attack(_section("verify", "never"), HeaderError),
    "verified by a list": Attack(_section("verify", ["open"]), HeaderError),
}


def _tensor(key: str, value: Any, index: int = 0) -> Damage:
    return lambda data: with_header(data, set_at("tensors", index, key, value=value))


def _grown(key: str, by: int, index: int = 0) -> Damage:
    def edit(header: Header) -> None:
        header["tensors"][index][key] += by

    return lambda data: with_header(data, edit)


def _top(key: str, value: Any) -> Damage:
    return lambda data: with_header(data, set_at(key, value=value))


def _without(*path: str | int) -> Damage:
    return lambda data: with_header(data, remove(*path))


def _renamed_section(old: str, new: str) -> Damage:
    def edit(header: Header) -> None:
        next(item for item in header["sections"] if item["name"] == old)["name"] = new

    return lambda data: with_header(data, edit)


def _verified(section: str, when: str) -> Damage:
    def edit(header: Header) -> None:
        next(item for item in header["sections"] if item["name"] == section)["verify"] = when

    return lambda data: with_header(data, edit)


def _swapped_tensors(header: Header) -> None:
    header["tensors"][0], header["tensors"][1] = header["tensors"][1], header["tensors"][0]


def _tensor_past_the_end(header: Header) -> None:
    last = header["tensors"][-1]
    offset = -(-(last["offset"] + last["size_bytes"]) // 64) * 64
    header["tensors"].append({**last, "name": "one more", "offset": offset})


# For an engine whose first tensor is int4, the second and the last ones f32, with a tokenizer and a program.
ENGINE_ATTACKS: dict[str, Attack] = {
    **{f"{key} missing": Attack(_without(key), HeaderError) for key in ("model", "state", "model_id", "provenance")},
    **{f"{key} missing": Attack(_without(key), HeaderError) for key in ("tokenizer", "graph", "tensors")},
    **{f"{key} null": Attack(_top(key, None), HeaderError) for key in ("model", "state", "model_id", "provenance")},
    **{f"{key} a list": Attack(_top(key, []), HeaderError) for key in ("model", "state", "provenance", "graph")},
    "model without a width": Attack(_without("model", "n_embd"), HeaderError),
    "model of negative width": Attack(
        lambda data: with_header(data, set_at("model", "n_embd", value=-64)), HeaderError
    ),
    "model of absurd width": Attack(
        lambda data: with_header(data, set_at("model", "n_embd", value=1 << 62)), HeaderError
    ),
    "state of absurd shape": Attack(
        lambda data: with_header(data, set_at("state", "tensors", 0, "shape", value=[1 << 62] * 4)), HeaderError
    ),
    "model id too short": Attack(_top("model_id", "ab"), HeaderError),
    "model id in capitals": Attack(_top("model_id", "A" * 64), HeaderError),
    "tokenizer without kind": Attack(_top("tokenizer", {}), HeaderError),
    "tokenizer kind a number": Attack(_top("tokenizer", {"kind": 1}), HeaderError),
    "tokenizer kind empty": Attack(_top("tokenizer", {"kind": ""}), HeaderError),
    "tokenizer section without kind": Attack(_top("tokenizer", None), HeaderError),
    "tokenizer kind without section": Attack(_renamed_section("tokenizer", "plan.x"), HeaderError),
    "graph section missing": Attack(_renamed_section("graph", "plan.x"), HeaderError),
    "weights section missing": Attack(_renamed_section("weights", "plan.x"), HeaderError),
    "graph not verified at open": Attack(_verified("graph", "check"), HeaderError),
    "program not verified at open": Attack(_verified("program", "check"), HeaderError),
    "tokenizer not verified at open": Attack(_verified("tokenizer", "check"), HeaderError),
    "weights verified at open": Attack(_verified("weights", "open"), HeaderError),
    "graph of unknown format": Attack(_top("graph", {"format": "pickle", "opset": 21}), HeaderError),
    "graph of opset 0": Attack(_top("graph", {"format": "onnx", "opset": 0}), HeaderError),
    "graph of opset true": Attack(_top("graph", {"format": "onnx", "opset": True}), HeaderError),
    "a tensor that is null": Attack(lambda data: with_header(data, set_at("tensors", 0, value=None)), HeaderError),
    "a tensor's name missing": Attack(_without("tensors", 0, "name"), HeaderError),
    "a tensor's name empty": Attack(_tensor("name", ""), HeaderError),
    "a tensor's name that leads out of a folder": Attack(_tensor("name", "../up"), HeaderError),
    "a tensor's name with a bell": Attack(_tensor("name", "a\a"), HeaderError),
    "a tensor's name of 300 characters": Attack(_tensor("name", "a" * 300), HeaderError),
    "a tensor's format unknown": Attack(_tensor("format", "int3"), HeaderError),
    "a tensor's format null": Attack(_tensor("format", None), HeaderError),
    "a tensor's group missing": Attack(_without("tensors", 0, "group"), HeaderError),
    "a tensor's group unknown": Attack(_tensor("group", 33), HeaderError),
    "a tensor's group as float": Attack(_tensor("group", 32.0), HeaderError),
    "a float tensor with a group": Attack(_tensor("group", 32, index=1), HeaderError),
    "a tensor's shape empty": Attack(_tensor("shape", []), HeaderError),
    "a tensor's shape with a zero": Attack(_tensor("shape", [0, 64]), HeaderError),
    "a tensor's shape below zero": Attack(_tensor("shape", [-4, -64]), HeaderError),
    "a tensor's shape of floats": Attack(_tensor("shape", [4.0, 64.0]), HeaderError),
    "a tensor's shape of truths": Attack(_tensor("shape", [True, True]), HeaderError),
    "a tensor's shape of 2^62": Attack(_tensor("shape", [1 << 62, 1 << 62]), HeaderError),
    "a tensor's shape of nine axes": Attack(_tensor("shape", [1] * 9, index=1), HeaderError),
    "an int4 vector": Attack(_tensor("shape", [256]), HeaderError),
    "a tensor's size too large": Attack(_grown("size_bytes", 64), HeaderError),
    "a tensor's size too small": Attack(_grown("size_bytes", -1), HeaderError),
    "a tensor's size negative": Attack(_tensor("size_bytes", -1), HeaderError),
    "a tensor's size as float": Attack(_tensor("offset", 0.0), HeaderError),
    "a tensor's size missing": Attack(_without("tensors", 0, "size_bytes"), HeaderError),
    "a tensor unaligned": Attack(_grown("offset", 1, index=1), HeaderError),
    "a tensor after a hole": Attack(_grown("offset", 64, index=1), HeaderError),
    "a tensor that overlaps": Attack(_grown("offset", -64, index=1), HeaderError),
    "a tensor at 2^63": Attack(_tensor("offset", 1 << 63, index=1), HeaderError),
    "scales elsewhere": Attack(_grown("scales_offset", 64), HeaderError),
    "scales too short": Attack(_grown("scales_size_bytes", -2), HeaderError),
    "scales missing": Attack(_tensor("scales_offset", None), HeaderError),
    "scales of a float tensor": Attack(_tensor("scales_offset", 0, index=1), HeaderError),
    "two tensors of one name": Attack(
        lambda data: with_header(data, set_at("tensors", 1, "name", value=header_of(data)["tensors"][0]["name"])),
        HeaderError,
    ),
    "tensors in the wrong order": Attack(lambda data: with_header(data, _swapped_tensors), HeaderError),
    "a tensor past the end": Attack(lambda data: with_header(data, _tensor_past_the_end), HeaderError),
    "a tensor too few": Attack(_without("tensors", -1), HeaderError),
    "no tensors": Attack(_top("tensors", []), HeaderError),
}
