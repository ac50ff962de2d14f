"""The framing of engine and state files: its bytes, its errors, and what happens when writing goes wrong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
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
    atomic_write,
    check_output,
    read_container,
    write_container,
)
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


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may do anything; everybody else is somebody else already."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_file(public_folder: Path) -> None:
    path = public_folder / "secret"
    write(path)
    path.chmod(0)
    with as_somebody_else(), pytest.raises(ContainerError, match="Permission denied"):
        read(path)


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


def test_existing_files_need_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        check_output(path, overwrite=False)
    with pytest.raises(OutputError, match="exists already"):
        write(path)
    assert path.read_bytes() == b"precious"
    write(path, overwrite=True)
    read(path).close()
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.bin"
    write(path)
    read(path).close()
    path.unlink()

    def rival() -> Iterator[bytes]:
        path.write_bytes(b"rival")
        yield b"four"

    with pytest.raises(OutputError, match="exists already"):
        write(path, [Section("a", 4, rival())])
    assert path.read_bytes() == b"rival"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_permission_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    old = os.umask(0o027)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        write(path, overwrite=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "a private file must not become public by being saved again"
    finally:
        os.umask(old)


def test_symbolic_links_stay(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to("far/real.bin")
    write(link)
    assert link.is_symlink()
    assert os.listdir(tmp_path / "far") == ["real.bin"]
    with pytest.raises(OutputError, match="exists already"):
        write(link)
    write(link, [], overwrite=True)
    assert link.is_symlink()
    with read(tmp_path / "far" / "real.bin") as container:
        assert not container.sections
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError):
        write(tmp_path / "loop", overwrite=True)


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[str, str]] = [
        (str(tmp_path), "is a folder; add a file name"),
        (str(tmp_path / "new") + "/", "names a folder"),
        (str(tmp_path / "no" / "a.bin"), "its folder does not exist .*make the folder first"),
        (str(tmp_path / "file" / "a.bin"), "its folder is a file"),
        (str(tmp_path / "pipe"), "is not an ordinary file"),
        (os.devnull, "is not an ordinary file"),
        (str(tmp_path / ("n" * 300)), "File name too long"),
    ]
    for path, message in cases:
        for attempt in (lambda path=path: check_output(path, True), lambda path=path: write(path, overwrite=True)):
            with pytest.raises(OutputError, match=message):
                attempt()
    for path in ("", "a\0b", b"bytes"):
        with pytest.raises(InputError):
            check_output(path, True)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write(path)
    read(path).close()


def test_a_read_only_folder(public_folder: Path) -> None:
    public_folder.chmod(0o555)
    try:
        with as_somebody_else():
            with pytest.raises(OutputError, match="its folder cannot be written"):
                check_output(public_folder / "a.bin", False)
            with pytest.raises(OutputError, match="its folder cannot be written"):
                write(public_folder / "a.bin")
        assert os.listdir(public_folder) == []
    finally:
        public_folder.chmod(0o755)


def test_the_callers_own_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "another disk is full")

    with pytest.raises(OSError, match="another disk"):
        write(tmp_path / "a.bin", [Section("a", 10, failing())])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_leaves_nothing_new(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "a.bin"
    if exists:
        path.write_bytes(b"precious")

    def interrupted() -> Iterator[bytes]:
        yield b"x" * (3 << 20)
        assert any(name.startswith(".a.bin.") and name.endswith(".tmp") for name in os.listdir(tmp_path))
        signal.raise_signal(signal.SIGINT)
        yield b"x"

    with pytest.raises(KeyboardInterrupt):
        write(path, [Section("a", (3 << 20) + 1, interrupted())], overwrite=exists)
    assert os.listdir(tmp_path) == (["a.bin"] if exists else [])
    assert not exists or path.read_bytes() == b"precious"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device whose writes say: disk full")
@pytest.mark.parametrize("size_bytes", [100, 5 << 20])
def test_a_full_disk(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OutputError, match="the disk is full; free some space"), atomic_write(path, False) as file:
        # From here on every write to the hidden file goes to the full device: at once, or when the buffer is flushed.
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), file.fileno())
        file.write(bytes(size_bytes))
    assert os.listdir(tmp_path) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        write(tmp_path / "old.bin", [])
        for name, overwrite in (("new.bin", False), ("old.bin", True)):
            with pytest.raises(OutputError, match="the disk is full"):
                write(
                    tmp_path / name, [Section("a", 1 << 20, (bytes(1 << 16) for _ in range(16)))], overwrite=overwrite
                )
        assert os.listdir(tmp_path) == ["old.bin"]
        read(tmp_path / "old.bin").close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


LIMITED = """
import resource, sys
from goslet.container import Section, write_container
from goslet.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_container(sys.argv[1], magic=b"12345678", version=1, header={}, overwrite=False,
                    sections=[Section("a", 1 << 20, (bytes(1 << 16) for _ in range(16)))])
except OutputError as error:
    print(error)
"""


def test_a_file_size_limit(tmp_path: Path) -> None:
    done = run_python(LIMITED, tmp_path / "a.bin")
    assert done.returncode == 0, done.stderr
    assert "larger than the file system or a limit (ulimit -f) allows" in done.stdout
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from goslet.container import Section, write_container
def pieces():
    yield bytes(1 << 20)
    os.kill(os.getpid(), signal.SIGKILL)
    yield b"x"
write_container(sys.argv[1], magic=b"12345678", version=1, header={}, overwrite=sys.argv[2] == "True",
                sections=[Section("a", (1 << 20) + 1, pieces())])
"""


@pytest.mark.parametrize("exists", [False, True])
def test_being_killed_leaves_nothing_under_the_name(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "a.bin"
    if exists:
        path.write_bytes(b"precious")
    done = run_python(KILLED, path, exists)
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == exists
    assert not exists or path.read_bytes() == b"precious"


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _name=name, _real=real: (order.append(_name), _real(*args))[1])
    write(tmp_path / "a.bin")
    write(tmp_path / "a.bin", overwrite=True)
    assert order == ["fsync", "link", "fsync", "fsync", "replace", "fsync"]


def test_atomic_write_gives_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with atomic_write(path, False) as file:
        file.write(b"hello world")
        file.seek(6)
        file.write(b"W")
        assert not path.exists()
    assert path.read_bytes() == b"hello World"


@given(st.integers(0, 1 << 70), st.sampled_from([1, 2, 64, ALIGNMENT_BYTES]))
def test_align_up(size_bytes: int, alignment_bytes: int) -> None:
    aligned = align_up(size_bytes, alignment_bytes)
    assert aligned % alignment_bytes == 0
    assert 0 <= aligned - size_bytes < alignment_bytes
