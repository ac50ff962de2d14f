"""The framing that engine files and state files share: checked sections behind a checked JSON header.

Layout, all integers unsigned little-endian:

    offset 0    8 bytes    magic, chosen by the kind of file
           8    u32        format version
          12    u32        zero
          16    u64        header length in bytes
          24    header     UTF-8 JSON object
           …    32 bytes   SHA-256 of everything before it
           …    zeros      up to the next multiple of 4096
           …    sections   each at the next multiple of 4096, zeros between them, nothing after the last one

The header holds ``required_features`` (names that a reader must know), ``sections`` (each with ``name``, ``offset``
and ``size_bytes`` in the file, ``sha256``, and ``verify``: ``"open"`` or ``"check"``, which says when the checksum is
verified) and the keys of the file's kind. Reading maps the file and runs nothing from it; every length is compared
with the file's size before anything is allocated or parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Literal, NoReturn, TypeAlias

from .errors import (
    ChecksumError,
    ContainerError,
    HeaderError,
    InputError,
    NewerVersionError,
    OversizedError,
    TruncatedError,
    UnknownFeatureError,
    WrongMagicError,
)
from .output import Path
from .output import atomic_write as atomic_write
from .output import check_output as check_output

ALIGNMENT_BYTES = 4096
MAGIC_BYTES = 8
# What people give by mistake.
_CHECKPOINTS = {b"PK": "a checkpoint (.pth) or another zip file", b"GGUF": "a GGUF checkpoint"}
_ENGINE = b"\x89GOSL"
_OTHERS = {
    **_CHECKPOINTS,
    _ENGINE: "a goslet engine file",
    b"GOSLETST": "a goslet state file",
    b"GOSLPLAN": "a goslet TensorRT plan",
    b"GOSLETMO": "goslet's moments of a model's activations",
    b"GOSLETSK": "goslet's sketches of a model",
}
MAX_HEADER_BYTES = 64 << 20
# Values, a comma or an opening bracket each, and how deep one may lie in another; csrc/json.cpp has the same.
MAX_HEADER_VALUES = 1 << 20
MAX_HEADER_DEPTH = 64
MAX_SECTION_BYTES = 1 << 48

_PREFIX = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 32
_HASH_CHUNK_BYTES = 8 << 20
_MAX_NUMBER_CHARACTERS = 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_AGAIN = "copy or make the file again"

Buffer: TypeAlias = "bytes | bytearray | memoryview"


def align_up(size_bytes: int, alignment_bytes: int = ALIGNMENT_BYTES) -> int:
    """The smallest multiple of `alignment_bytes` that is not below `size_bytes`."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes


# ------------------------------------------------------------------------------------------------- writing containers


@dataclass(frozen=True)
class Section:
    """One section to write.

    Attributes:
        name: unique in the file; letters, digits and ``._+-``.
        size_bytes: length of the whole content.
        content: the bytes, or an iterable of pieces of any length that together are `size_bytes` long; it is walked
            once, and each piece is dropped before the next is asked for.
        verify: ``"open"`` if the checksum is to be verified at every open, ``"check"`` if only on demand.
    """

    name: str
    size_bytes: int
    content: Buffer | Iterable[Buffer]
    verify: Literal["open", "check"] = "open"

    @classmethod
    def of(cls, name: str, content: Buffer) -> Section:
        """A section of bytes at hand, verified at every open."""
        return cls(name, memoryview(content).nbytes, content)


def write_container(
    path: Path,
    *,
    magic: bytes,
    version: int,
    header: Mapping[str, Any],
    sections: Sequence[Section],
    overwrite: bool,
    required_features: Collection[str] = (),
) -> None:
    """Write a file of checked sections; the same arguments give the same bytes.

    Args:
        path: the file; it appears complete or not at all (`atomic_write`).
        magic: its first 8 bytes.
        version: its format version, from 1.
        header: the JSON keys of this kind of file; not ``sections`` or ``required_features``.
        sections: what follows the header, in the file's order.
        overwrite: whether an existing file is replaced.
        required_features: names that a reader must know to read the file rightly.

    Raises:
        OutputError: the file cannot be written (`atomic_write`).
        InputError: the header is not JSON or too long, a name is bad or used twice, or a section's content has not
            the length that was announced.
    """
    if len(magic) != MAGIC_BYTES or not 1 <= version < 1 << 32:
        raise InputError("the magic must be 8 bytes and the version from 1 to 2^32 - 1", found=(magic, version))
    for name in [section.name for section in sections]:
        if not _NAME.fullmatch(name):
            raise InputError("is not a section name", place=repr(name), expected="letters, digits and . _ + -")
    if len({section.name for section in sections}) != len(sections):
        raise InputError("a section name is used twice", found=[section.name for section in sections])
    for key in ("sections", "required_features"):
        if key in header:
            raise InputError("is not a key for the caller", place=f"header.{key}")
    frame = {"required_features": sorted(required_features), **header}

    # Offsets stand in the header and depend on its length; digests do not, as their length is fixed.
    hashes = ["0" * 64] * len(sections)
    start_bytes = ALIGNMENT_BYTES
    while True:
        encoded = _encode_header(frame, sections, hashes, start_bytes)
        needed_bytes = align_up(_PREFIX.size + len(encoded) + _DIGEST_BYTES)
        if needed_bytes <= start_bytes:
            break
        start_bytes = needed_bytes

    with atomic_write(path, overwrite) as file:
        file.write(bytes(start_bytes))
        position = start_bytes
        for index, section in enumerate(sections):
            file.write(bytes(align_up(position) - position))
            position = align_up(position)
            hashes[index] = _write_section(file, section)
            position += section.size_bytes
        head = _PREFIX.pack(magic, version, 0, len(encoded)) + _encode_header(frame, sections, hashes, start_bytes)
        file.seek(0)
        file.write(head + hashlib.sha256(head).digest())


def _encode_header(
    frame: Mapping[str, Any], sections: Sequence[Section], hashes: Sequence[str], start_bytes: int
) -> bytes:
    entries = []
    position = start_bytes
    for section, sha256 in zip(sections, hashes, strict=True):
        position = align_up(position)
        entries.append(
            {
                "name": section.name,
                "offset": position,
                "size_bytes": section.size_bytes,
                "sha256": sha256,
                "verify": section.verify,
            }
        )
        position += section.size_bytes
    try:
        text = json.dumps({**frame, "sections": entries}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        encoded = text.encode("utf-8")
        _parse_json(encoded)
    except (TypeError, ValueError, RecursionError, ContainerError) as error:
        raise InputError(f"the header cannot be written: {error}", place="header") from error
    return encoded


def _write_section(file: BinaryIO, section: Section) -> str:
    content = section.content
    pieces = [content] if isinstance(content, bytes | bytearray | memoryview) else content
    digest = hashlib.sha256()
    written_bytes = 0
    for piece in pieces:
        written_bytes += memoryview(piece).nbytes
        if written_bytes > section.size_bytes:
            break
        digest.update(piece)
        file.write(piece)
        del piece  # The next one is made while the loop would still hold this one.
    if written_bytes != section.size_bytes:
        raise InputError(
            "a section has not the length that was announced",
            place=section.name,
            expected=f"{section.size_bytes} bytes",
            found=f"{written_bytes} bytes or more" if written_bytes > section.size_bytes else f"{written_bytes} bytes",
        )
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- reading containers


@dataclass(frozen=True)
class SectionEntry:
    """A section of an open file: its place in the file, its checksum and when that is verified."""

    name: str
    offset: int
    size_bytes: int
    sha256: str
    verify: str


@contextlib.contextmanager
def errors_in(path: Path) -> Iterator[None]:
    """Let a `ContainerError` that does not know its file name `path`."""
    try:
        yield
    except ContainerError as error:
        if error.file is not None:
            raise
        raise type(error)(
            error.problem,
            file=path,
            place=error.place,
            expected=error.expected,
            found=error.found,
            remedy=error.remedy or _AGAIN,
        ) from None


class Container:
    """An open file, mapped read-only; made by `read_container`.

    Where somebody shortens the file in place while it is mapped, reading what is gone ends the process (SIGBUS); a
    handler of that signal would be the whole process's, which is not a library's to set. `check_whole` finds such a
    file before it is read, unless it is cut at that very moment. Everything goslet writes is replaced by renaming
    instead, which leaves an open map whole.

    Attributes:
        path: the file, as it was given.
        version: its format version.
        header: the whole JSON header.
        sections: the sections by name, in the file's order.
        size_bytes: length of the file.
    """

    def __init__(
        self,
        path: str,
        version: int,
        header: Mapping[str, Any],
        sections: Mapping[str, SectionEntry],
        mapped: mmap.mmap,
    ) -> None:
        self.path = path
        self.version = version
        self.header: Mapping[str, Any] = MappingProxyType(dict(header))
        self.sections: Mapping[str, SectionEntry] = MappingProxyType(dict(sections))
        self.size_bytes = len(mapped)
        self._mapped: mmap.mmap | None = mapped

    def section(self, name: str) -> memoryview:
        """A section's bytes, read-only and without a copy; the view stays good after `close`.

        Raises:
            HeaderError: the file has no such section.
            InputError: the file is closed.
        """
        if self._mapped is None:
            raise InputError("the file is closed", file=self.path, remedy="open it again")
        if name not in self.sections:
            raise HeaderError("a section is missing", file=self.path, place=name, remedy=_AGAIN)
        entry = self.sections[name]
        return memoryview(self._mapped)[entry.offset : entry.offset + entry.size_bytes]

    def prefer_huge_pages(self) -> None:
        """Ask that what is read of the file from now on be kept in huge pages, where the system can.

        Reading all of it again and again, as an engine's weights are, is then up to a third faster. Pages that are in
        memory already stay as they are.
        """
        if self._mapped is not None and hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel or a file system without them refuses, and nothing is lost.
            with contextlib.suppress(OSError):
                self._mapped.madvise(mmap.MADV_HUGEPAGE)

    def check(self) -> None:
        """Verify the checksum of every section.

        Raises:
            ChecksumError: a section is damaged; it is named.
        """
        for name in self.sections:
            self._verify(name)

    def _verify(self, name: str) -> None:
        entry = self.sections[name]
        digest = hashlib.sha256()
        with self.section(name) as view:
            # In pieces, so that Ctrl-C is heard between them.
            for start in range(0, entry.size_bytes, _HASH_CHUNK_BYTES):
                with view[start : start + _HASH_CHUNK_BYTES] as piece:
                    digest.update(piece)
        if digest.hexdigest() != entry.sha256:
            raise ChecksumError(
                "is damaged: wrong SHA-256",
                file=self.path,
                place=f"section {name}",
                expected=entry.sha256,
                found=digest.hexdigest(),
                remedy=_AGAIN,
            )

    def check_whole(self) -> None:
        """Look at the file's size, which takes about a microsecond.

        Raises:
            TruncatedError: somebody has shortened the file since it was opened.
        """
        if self._mapped is None:
            return
        size_bytes = self._mapped.size()
        if size_bytes < self.size_bytes:
            raise TruncatedError(
                "was cut short while it was open",
                file=self.path,
                expected=f"{self.size_bytes} bytes",
                found=f"{size_bytes} bytes",
                remedy="copy it again, and open it again",
            )

    def close(self) -> None:
        """Unmap the file, or let it be unmapped when the last view of a section is gone."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with contextlib.suppress(BufferError):
                mapped.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_container(
    path: Path, *, magic: bytes, version: int, kind: str, known_features: Collection[str] = frozenset()
) -> Container:
    """Open a file of checked sections, and verify its header and every section marked ``"open"``.

    Args:
        path: the file.
        magic: what its first 8 bytes must be.
        version: the newest format version that the caller can read.
        kind: what to call such a file in errors, for example ``"engine file"``.
        known_features: the required features that the caller knows.

    Raises:
        WrongMagicError: it begins otherwise, or is empty.
        NewerVersionError: its version is above `version`.
        UnknownFeatureError: it requires features outside `known_features`; they are named.
        TruncatedError: it is shorter than it says.
        OversizedError: it is longer than it says, or declares absurd lengths.
        HeaderError: its header is not what the format says.
        ChecksumError: header, padding or a section verified at open is damaged.
        ContainerError: it is missing, unreadable, a folder, a pipe or a device.
    """
    shown = os.fspath(path)
    descriptor, file_bytes = _open_regular(shown)
    try:
        prefix = os.read(descriptor, _PREFIX.size)
        file_version, header_bytes = _check_prefix(prefix, file_bytes, magic, version, kind, shown)
        try:
            mapped = mmap.mmap(descriptor, file_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise ContainerError(f"cannot be mapped into memory: {error}", file=shown) from error
    except OSError as error:
        raise ContainerError(f"cannot be read: {error.strerror or error}", file=shown) from error
    finally:
        os.close(descriptor)
    try:
        head_bytes = _PREFIX.size + header_bytes
        digest = mapped[head_bytes : head_bytes + _DIGEST_BYTES]
        head = mapped[:head_bytes]
        if hashlib.sha256(head).digest() != digest:
            raise ChecksumError("is damaged: wrong SHA-256", file=shown, place="header", remedy=_AGAIN)
        with errors_in(shown):
            header = _parse_json(head[_PREFIX.size :])
            _check_features(header, known_features)
            entries = _check_sections(header, head_bytes + _DIGEST_BYTES, file_bytes)
            _check_padding(mapped, head_bytes + _DIGEST_BYTES, list(entries.values()))
        container = Container(shown, file_version, header, entries, mapped)
        for entry in entries.values():
            if entry.verify == "open":
                container._verify(entry.name)
    except BaseException:
        with contextlib.suppress(BufferError):
            mapped.close()
        raise
    return container


def _open_regular(shown: str) -> tuple[int, int]:
    """A descriptor of an ordinary file and its size in bytes."""
    try:
        # Looked at before it is opened: opening some devices does things, and opening a pipe waits for a writer.
        mode = os.stat(shown).st_mode
        if stat.S_ISREG(mode):
            descriptor = os.open(shown, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                return descriptor, status.st_size
            os.close(descriptor)
            mode = status.st_mode
    except FileNotFoundError:
        raise ContainerError("does not exist", file=shown, remedy="check the name") from None
    except OSError as error:
        raise ContainerError(f"cannot be read: {error.strerror or error}", file=shown) from error
    except ValueError:
        raise ContainerError("is not a path", place=repr(shown), remedy="check the name") from None
    what = "is a folder" if stat.S_ISDIR(mode) else "is not an ordinary file"
    raise ContainerError(what, file=shown, remedy="give the file itself")


def _check_prefix(prefix: bytes, file_bytes: int, magic: bytes, version: int, kind: str, shown: str) -> tuple[int, int]:
    """The format version and the header's length in bytes."""
    start = prefix[:MAGIC_BYTES]
    if start != magic:
        if not start:
            raise WrongMagicError(f"is empty, not a goslet {kind}", file=shown, remedy=_AGAIN)
        if magic.startswith(start):
            raise TruncatedError("ends within its first bytes", file=shown, found=f"{file_bytes} bytes", remedy=_AGAIN)
        translated = {magic.replace(b"\r\n", b"\n"), magic.replace(b"\n", b"\r\n"), bytes(b & 0x7F for b in magic)}
        if any(start.startswith(form[:MAGIC_BYTES]) for form in translated):
            raise WrongMagicError(
                "was changed as if it were text", file=shown, place="magic", remedy="copy it again as binary"
            )
        what = next((what for form, what in _OTHERS.items() if start.startswith(form)), None)
        compiles = magic.startswith(_ENGINE) and start.startswith(tuple(_CHECKPOINTS))
        raise WrongMagicError(
            f"is not a goslet {kind}",
            file=shown,
            place=None if what else "magic",
            expected=None if what else magic.hex(" "),
            found=what or start.hex(" "),
            remedy="compile it first: goslet export" if compiles else None,
        )
    if len(prefix) < _PREFIX.size:
        raise TruncatedError(
            "ends before its header", file=shown, expected=f"{_PREFIX.size} bytes", found=f"{file_bytes} bytes"
        )
    _, file_version, reserved, header_bytes = _PREFIX.unpack(prefix)
    if file_version > version:
        raise NewerVersionError(
            "was written by a newer goslet",
            file=shown,
            place="format version",
            expected=f"at most {version}",
            found=file_version,
            remedy="install a newer goslet",
        )
    if file_version < 1:
        raise HeaderError("is not a version", file=shown, place="format version", found=file_version, remedy=_AGAIN)
    if reserved:
        raise HeaderError("is not zero", file=shown, place="offset 12", found=reserved, remedy=_AGAIN)
    if header_bytes > MAX_HEADER_BYTES:
        raise OversizedError(
            "the header is too long",
            file=shown,
            place="offset 16",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{header_bytes} bytes",
            remedy=_AGAIN,
        )
    needed_bytes = _PREFIX.size + header_bytes + _DIGEST_BYTES
    if needed_bytes > file_bytes:
        raise TruncatedError(
            "ends within its header",
            file=shown,
            expected=f"at least {needed_bytes} bytes",
            found=f"{file_bytes} bytes",
            remedy=_AGAIN,
        )
    return file_version, header_bytes


def _parse_json(encoded: bytes) -> dict[str, Any]:
    if len(encoded) > MAX_HEADER_BYTES:
        raise OversizedError("is too long", place="header", expected=f"at most {MAX_HEADER_BYTES} bytes")
    # A short text can ask for much memory: "[]," is three bytes and a list of 64.
    if encoded.count(b",") + encoded.count(b"[") + encoded.count(b"{") > MAX_HEADER_VALUES:
        raise OversizedError("holds too many values", place="header", expected=f"at most {MAX_HEADER_VALUES}")
    try:
        value = json.loads(
            encoded.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_int=lambda text: int(_short_number(text)),
            parse_float=_finite_number,
            parse_constant=_refuse_constant,
        )
        if b"\\u" in encoded:
            # Half a surrogate pair is legal in JSON and fails later, wherever it is printed.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        _refuse_depth()
    except ValueError as error:
        raise HeaderError(f"is not JSON: {error}", place="header", remedy=_AGAIN) from None
    if not isinstance(value, dict):
        raise HeaderError("is not a JSON object", place="header", found=type(value).__name__, remedy=_AGAIN)
    level: list[Any] = [value]
    for _ in range(MAX_HEADER_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
    if level:
        _refuse_depth()
    return value


def _values(outer: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _refuse_depth() -> NoReturn:
    raise HeaderError(
        "is nested too deeply", place="header", expected=f"at most {MAX_HEADER_DEPTH} levels", remedy=_AGAIN
    ) from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise HeaderError("a key appears twice", place=f"header key {twice[:100]!r}", remedy=_AGAIN)
    return value


def _short_number(text: str) -> str:
    if len(text) > _MAX_NUMBER_CHARACTERS:
        raise HeaderError("holds a number that is too long", place="header", found=f"{len(text)} digits", remedy=_AGAIN)
    return text


def _finite_number(text: str) -> float:
    value = float(_short_number(text))
    if not math.isfinite(value):
        raise HeaderError("holds a number that is not finite", place="header", found=text, remedy=_AGAIN)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise HeaderError("holds a number that is not finite", place="header", found=text, remedy=_AGAIN)


def _check_features(header: Mapping[str, Any], known_features: Collection[str]) -> None:
    features = header.get("required_features")
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise HeaderError("is not a list of names", place="required_features", remedy=_AGAIN)
    unknown = sorted(set(features) - set(known_features))
    if unknown:
        raise UnknownFeatureError(
            "requires features that this goslet does not know",
            place="required_features",
            found=", ".join(repr(name[:100]) for name in unknown[:10]),
            remedy="install a newer goslet",
        )


def _check_sections(header: Mapping[str, Any], head_bytes: int, file_bytes: int) -> dict[str, SectionEntry]:
    """The sections by name, found to tile the file from `head_bytes` to its end."""
    items = header.get("sections")
    if not isinstance(items, list):
        raise HeaderError("is not a list", place="sections", found=type(items).__name__, remedy=_AGAIN)
    entries: dict[str, SectionEntry] = {}
    end = head_bytes
    expected = align_up(head_bytes)
    for index, item in enumerate(items):
        entry = _section_entry(item, f"sections[{index}]")
        place = f"section {entry.name}"
        if entry.name in entries:
            raise HeaderError("appears twice", place=place, remedy=_AGAIN)
        expected = align_up(end)
        if entry.offset != expected:
            if entry.offset % ALIGNMENT_BYTES:
                problem = f"does not begin at a multiple of {ALIGNMENT_BYTES}"
            elif entry.offset < expected:
                problem = "overlaps what is before it"
            else:
                problem = "leaves a hole before it"
            raise HeaderError(problem, place=place, expected=f"offset {expected}", found=entry.offset, remedy=_AGAIN)
        end = expected = entry.offset + entry.size_bytes
        if end > file_bytes:
            raise TruncatedError(
                "the file ends before it does",
                place=place,
                expected=f"at least {end} bytes",
                found=f"{file_bytes} bytes",
                remedy=_AGAIN,
            )
        entries[entry.name] = entry
    if file_bytes != expected:
        kind = TruncatedError if file_bytes < expected else OversizedError
        raise kind("has a wrong length", expected=f"{expected} bytes", found=f"{file_bytes} bytes", remedy=_AGAIN)
    return entries


def _section_entry(item: Any, place: str) -> SectionEntry:
    if not isinstance(item, dict):
        raise HeaderError("is not an object", place=place, found=type(item).__name__, remedy=_AGAIN)
    name, sha256, verify = item.get("name"), item.get("sha256"), item.get("verify")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise HeaderError("is not a section name", place=f"{place}.name", found=repr(name)[:100], remedy=_AGAIN)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise HeaderError("is not a SHA-256", place=f"{place}.sha256", expected="64 hex digits", remedy=_AGAIN)
    if verify not in ("open", "check"):
        raise HeaderError("is neither open nor check", place=f"{place}.verify", remedy=_AGAIN)
    for key in ("offset", "size_bytes"):
        value = item.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise HeaderError("is not a number of bytes", place=f"{place}.{key}", found=repr(value)[:50], remedy=_AGAIN)
        if value > MAX_SECTION_BYTES:
            raise OversizedError(
                "is absurdly large",
                place=f"{place}.{key}",
                expected=f"at most {MAX_SECTION_BYTES}",
                found=value,
                remedy=_AGAIN,
            )
    return SectionEntry(name, item["offset"], item["size_bytes"], sha256, verify)


def _check_padding(mapped: mmap.mmap, head_bytes: int, entries: Sequence[SectionEntry]) -> None:
    end = head_bytes
    for entry in entries:
        if mapped[end : entry.offset].strip(b"\0"):
            raise ChecksumError("padding is not zero", place=f"before section {entry.name}", remedy=_AGAIN)
        end = entry.offset + entry.size_bytes
    if not entries and mapped[end:].strip(b"\0"):
        raise ChecksumError("padding is not zero", place="after the header", remedy=_AGAIN)
