"""The framing of engine and state files: its bytes, its errors, and what happens when writing goes wrong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goslet.container import (
    ALIGNMENT_BYTES,
    Container,
    Section,
    align_up,
    read_container,
    write_container,
)
from goslet.enginefile import EngineFile
from goslet.errors import (
    ChecksumError,
    ContainerError,
    HeaderError,
    InputError,
    NewerVersionError,
    OutputError,
    OversizedError,
    TruncatedError,
    UnknownFeatureError,
    WrongMagicError,
)

from .attacks import (
    CONTAINER_ATTACKS,
    PREFIX,
    boundaries,
    data_start,
    flipped,
    header_length,
    section_range,
    set_at,
    with_header,
)
from .permissions import as_somebody_else, public_folder

MAGIC = b"\x89TEST\r\n\x1a"
SECTIONS = {"graph": b"G" * 5000, "weights": bytes(range(256)) * 20, "tail": b"tail"}


def read(path: Path, **changes: Any) -> Container:
    return read_container(path, **{"magic": MAGIC, "version": 1, "kind": "test file", **changes})


def write(path: Path, sections: list[Section] | None = None, **changes: Any) -> None:
    if sections is None:
        sections = [
            Section.of("graph", SECTIONS["graph"]),
            Section(
                "weights", len(SECTIONS["weights"]), iter([SECTIONS["weights"][:7], SECTIONS["weights"][7:]]), "check"
            ),
            Section.of("tail", SECTIONS["tail"]),
        ]
    arguments = {"magic": MAGIC, "version": 1, "header": {"user": {"é": [1, 0.5]}}, "overwrite": False, **changes}
    write_container(path, sections=sections, **arguments)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.bin"
    write(path)
    return path.read_bytes()


@contextlib.contextmanager
def opened_bytes(data: bytes) -> Iterator[Container]:
    """A file of these bytes, opened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.bin"
        path.write_bytes(data)
        with read(path) as container:
            yield container


def error_of(data: bytes) -> type[ContainerError] | None:
    try:
        with opened_bytes(data) as container:
            container.check()
    except ContainerError as error:
        return type(error)
    return None


# --------------------------------------------------------------------------------------------------------- the format


def test_bytes_are_as_documented(good: bytes) -> None:
    magic, version, reserved, length = struct.unpack_from("<8sIIQ", good)
    assert (magic, version, reserved) == (MAGIC, 1, 0)
    header = json.loads(good[24 : 24 + length].decode())
    assert header["user"] == {"é": [1, 0.5]}
    assert header["required_features"] == []
    assert good[24 + length : 24 + length + 32] == hashlib.sha256(good[: 24 + length]).digest()
    end = 24 + length + 32
    for entry, (name, content) in zip(header["sections"], SECTIONS.items(), strict=True):
        assert entry["name"] == name
        assert entry["offset"] == -(-end // 4096) * 4096
        assert good[end : entry["offset"]].count(0) == entry["offset"] - end
        end = entry["offset"] + entry["size_bytes"]
        assert good[entry["offset"] : end] == content
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [entry["verify"] for entry in header["sections"]] == ["open", "check", "open"]
    assert len(good) == end


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path)
    with read(path) as container:
        assert container.path == str(path)
        assert container.version == 1
        assert container.size_bytes == path.stat().st_size
        assert container.header["user"] == {"é": [1, 0.5]}
        assert {name: bytes(container.section(name)) for name in container.sections} == SECTIONS
        assert all(container.section(name).readonly for name in SECTIONS)
        container.check()


@pytest.mark.parametrize(
    "contents",
    [[], [b""], [b"", b"", b"x"], [b"x", b""], [b"a" * 4096], [b"a" * 4096, b""], [b"a" * 4097, b"b" * 4095]],
    ids=lambda contents: "-".join(str(len(content)) for content in contents) or "none",
)
def test_any_sizes_go_there_and_back(tmp_path: Path, contents: list[bytes]) -> None:
    path = tmp_path / "a.bin"
    write(path, [Section.of(f"s{index}", content) for index, content in enumerate(contents)])
    with read(path) as container:
        container.check()
        assert [bytes(container.section(name)) for name in container.sections] == contents


@pytest.mark.parametrize("filler", [*range(3500, 3560, 4), *range(7600, 7660, 4)])
def test_headers_of_every_length_near_a_page(tmp_path: Path, filler: int) -> None:
    path = tmp_path / "a.bin"
    write(path, [Section.of(f"s{index}", bytes(index)) for index in range(3)], header={"filler": "x" * filler})
    with read(path) as container:
        assert [entry.size_bytes for entry in container.sections.values()] == [0, 1, 2]


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, required_features=[])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pieces_are_not_kept(tmp_path: Path) -> None:
    alive: list[int] = []

    class Piece(bytearray):
        def __del__(self) -> None:
            alive.remove(id(self))

    def pieces() -> Iterator[Piece]:
        for _ in range(5):
            assert not alive, "a piece outlived its turn"
            piece = Piece(1000)
            alive.append(id(piece))
            yield piece
            del piece

    write(tmp_path / "a", [Section("weights", 5000, pieces(), "check")])


def test_views_survive_closing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path)
    container = read(path)
    view = container.section("graph")
    container.close()
    container.close()
    assert bytes(view) == SECTIONS["graph"]
    with pytest.raises(InputError, match="closed"):
        container.section("graph")


def test_an_open_file_survives_being_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path)
    with read(path) as container:
        write(path, [], overwrite=True)
        container.check()
        assert bytes(container.section("graph")) == SECTIONS["graph"]


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path)
    with read(path) as container, pytest.raises(HeaderError, match=r"a\.bin: plan: a section is missing"):
        container.section("plan")


def test_known_features_are_accepted_and_unknown_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, required_features=["tiles", "low-rank"])
    read(path, known_features={"tiles", "low-rank", "other"}).close()
    with pytest.raises(UnknownFeatureError, match="'low-rank'") as caught:
        read(path, known_features={"tiles"})
    assert "tiles'" not in str(caught.value)


def test_older_versions_are_left_to_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, version=3)
    with read(path, version=4) as container:
        assert container.version == 3
    with pytest.raises(NewerVersionError, match="expected at most 2, found 3"):
        read(path, version=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"header": {"sections": []}},
        {"header": {"required_features": []}},
        {"header": {"x": float("nan")}},
        {"header": {"x": object()}},
        {"header": {"x": b"bytes"}},
        {"header": {"x": "\ud800"}},
        {"header": {"x": 10**50}},
        {"header": {"x": {1: "a", "1": "b"}}},
        {"magic": b"short"},
        {"version": 0},
        {"sections": [Section.of("a", b""), Section.of("a", b"")]},
        {"sections": [Section.of("a b", b"")]},
        {"sections": [Section("a", 3, b"four")]},
        {"sections": [Section("a", 5, b"four")]},
        {"sections": [Section("a", 5, iter([b"four", b"five"]))]},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        write(tmp_path / "a.bin", **changes)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", CONTAINER_ATTACKS)
def test_attack(good: bytes, name: str) -> None:
    attack = CONTAINER_ATTACKS[name]
    assert error_of(good) is None
    assert error_of(attack.damage(good)) is attack.error


def test_truth_is_no_length(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [Section.of("a", b"1")])
    data = (tmp_path / "a.bin").read_bytes()
    assert error_of(with_header(data, set_at("sections", 0, "size_bytes", value=1))) is None
    assert error_of(with_header(data, set_at("sections", 0, "size_bytes", value=True))) is HeaderError


@pytest.mark.parametrize("attack", ["an unknown feature", "a section unaligned", "a wrong checksum", "a byte too many"])
def test_errors_name_the_file_and_fit_on_a_line(tmp_path: Path, good: bytes, attack: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(CONTAINER_ATTACKS[attack].damage(good))
    with pytest.raises(ContainerError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_truncated_at_every_boundary(good: bytes) -> None:
    lengths = list(boundaries(good))
    assert len(lengths) > 20
    for length in lengths:
        assert error_of(good[:length]) is TruncatedError, length


def test_flips_before_the_sections_are_caught_at_open(good: bytes) -> None:
    head_bytes = PREFIX.size + header_length(good)
    for offset in [*range(64), *range(64, head_bytes, 5), *range(head_bytes, head_bytes + 32)]:
        data = flipped(good, offset, bit=offset % 8)
        with pytest.raises(ContainerError) as caught, opened_bytes(data):
            pass
        error = type(caught.value)
        if offset < 8:
            assert error is WrongMagicError
        elif offset < 12:
            assert error in (NewerVersionError, HeaderError)
        elif offset < 16:
            assert error is HeaderError
        elif offset < 24:
            assert error in (ChecksumError, TruncatedError, OversizedError)
        else:
            assert error is ChecksumError


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"GOSLETST", "a goslet state file"),
        (b"GOSLPLAN", "a goslet TensorRT plan"),
        (b"GOSLETMO", "goslet's moments of a model's activations"),
        (b"GOSLETSK", "goslet's sketches of a model"),
        (b"GGUF\x03\0\0\0", "a GGUF checkpoint"),
        (b"PK\x03\x04\0\0\0\0", "a checkpoint (.pth) or another zip file"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(start: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.goslet"
    path.write_bytes(start + bytes(100))
    with pytest.raises(WrongMagicError, match=re.escape(f"is not a goslet test file (found {what})")) as caught:
        read(path)
    assert caught.value.remedy is None
    with pytest.raises(WrongMagicError, match=re.escape(f"is not a goslet engine file (found {what})")) as caught:
        EngineFile.open(path)
    assert caught.value.remedy == ("compile it first: goslet export" if "checkpoint" in what else None)


@pytest.mark.parametrize("name", ["graph", "tail"])
def test_flips_in_sections_verified_at_open(good: bytes, name: str) -> None:
    place = section_range(good, name)
    for offset in (place[0], place[len(place) // 2], place[-1]):
        with pytest.raises(ChecksumError, match=f"section {name}"), opened_bytes(flipped(good, offset)):
            pass


def test_flips_in_other_sections_are_found_by_check(good: bytes) -> None:
    place = section_range(good, "weights")
    for offset in (place[0], place[len(place) // 2], place[-1]):
        with opened_bytes(flipped(good, offset)) as container:
            assert container.size_bytes == len(good), "opening does not look at these"
            with pytest.raises(ChecksumError, match="section weights"):
                container.check()


def test_padding_must_be_zero(good: bytes) -> None:
    ends = [section_range(good, name).stop for name in ("graph", "weights")]
    for offset in (PREFIX.size + header_length(good) + 32, data_start(good) - 1, *ends):
        with pytest.raises(ChecksumError, match="padding is not zero"), opened_bytes(flipped(good, offset)):
            pass


def test_a_header_above_the_limit_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with path.open("wb") as file:
        file.write(PREFIX.pack(MAGIC, 1, 0, (64 << 20) + 1))
        file.truncate(200 << 20)
    with pytest.raises(ContainerError, match="the header is too long"):
        read(path)


def test_places_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(ContainerError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ContainerError, match="is not an ordinary file"):
        read(Path(os.devnull))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ContainerError, match="Not a directory"):
        read(tmp_path / "file" / "below")
    with pytest.raises(ContainerError, match="is not a path"):
        read(Path("a\0b"))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ContainerError, match="is not an ordinary file"):
        read(tmp_path / "pipe")


def test_an_unreadable_file() -> None:
    with public_folder() as folder:
        write(folder / "secret")
        (folder / "secret").chmod(0)
        with as_somebody_else(), pytest.raises(ContainerError, match="Permission denied"):
            read(folder / "secret")


@settings(
    deadline=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "drop", "insert"]), st.floats(0, 1), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    ),
    early=st.booleans(),
)
def test_random_damage_gives_a_typed_error_or_an_equal_file(
    good: bytes, changes: list[tuple[str, float, int]], early: bool
) -> None:
    data = good
    for what, where, value in changes:
        # Half of the examples strike the header, where there is most to get wrong.
        offset = int(where * min(len(data), 1000 if early else len(data)))
        if what == "flip":
            data = data[:offset] + bytes([data[offset] ^ value]) + data[offset + 1 :] if offset < len(data) else data
        elif what == "cut":
            data = data[:offset]
        elif what == "drop":
            data = data[:offset] + data[offset + 1 :]
        else:
            data = data[:offset] + bytes([value]) + data[offset:]
    assert (error_of(data) is None) == (data == good)


# ------------------------------------------------------------------------------------------------------------ writing


def test_an_existing_file_needs_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        write(path)
    assert path.read_bytes() == b"precious"
    write(path, overwrite=True)
    read(path).close()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the source broke"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_a_source_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def failing() -> Iterator[bytes]:
        yield b"some"
        raise error

    with pytest.raises(type(error)):
        write(tmp_path / "a.bin", [Section("a", 10, failing())])
    assert os.listdir(tmp_path) == []


@given(st.integers(0, 1 << 70), st.sampled_from([1, 2, 64, ALIGNMENT_BYTES]))
def test_align_up(size_bytes: int, alignment_bytes: int) -> None:
    aligned = align_up(size_bytes, alignment_bytes)
    assert aligned % alignment_bytes == 0
    assert 0 <= aligned - size_bytes < alignment_bytes
