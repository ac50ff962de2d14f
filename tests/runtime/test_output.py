"""Writing a file whole: what may go wrong, and that nothing half-written is left when it does."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from goslet.errors import InputError, OutputError
from goslet.output import atomic_write, check_output

from .permissions import as_somebody_else, public_folder


def write(path: Path | str, content: bytes = b"new", overwrite: bool = False) -> None:
    with atomic_write(path, overwrite) as file:
        file.write(content)


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with atomic_write(path, False) as file:
        file.write(b"hello world")
        file.seek(6)
        file.write(b"W")
        assert not path.exists()
    assert path.read_bytes() == b"hello World"
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any) -> Any:
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "link", "replace"):
        watch(name)
    write(tmp_path / "a.bin")
    write(tmp_path / "a.bin", overwrite=True)
    assert order == ["fsync", "link", "fsync", "fsync", "replace", "fsync"]


def test_existing_files_need_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        check_output(path, overwrite=False)
    with pytest.raises(OutputError, match="exists already"):
        write(path)
    assert path.read_bytes() == b"precious"
    check_output(path, overwrite=True)
    write(path, overwrite=True)
    assert path.read_bytes() == b"new"
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
    assert path.read_bytes() == b"new"
    path.unlink()
    with pytest.raises(OutputError, match="exists already"), atomic_write(path, False) as file:
        path.write_bytes(b"rival")
        file.write(b"new")
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
    real = tmp_path / "far" / "real.bin"
    link = tmp_path / "link"
    link.symlink_to("far/real.bin")
    write(link, b"1")
    assert link.is_symlink() and real.read_bytes() == b"1"
    with pytest.raises(OutputError, match="exists already"):
        write(link, b"2")
    write(link, b"3", overwrite=True)
    assert link.is_symlink() and real.read_bytes() == b"3"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError):
        write(tmp_path / "loop", overwrite=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; add a file name"),
        ("new/", "names a folder"),
        ("no/a.bin", "its folder does not exist .*make the folder first"),
        ("file/a.bin", "its folder is a file"),
        ("pipe", "is not an ordinary file"),
        ("n" * 300, "File name too long"),
        (os.devnull, "is not an ordinary file"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    path = os.path.join(tmp_path, name) if name else str(tmp_path)
    with pytest.raises(OutputError, match=message):
        check_output(path, True)
    with pytest.raises(OutputError, match=message):
        write(path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises(InputError):
        check_output(path, True)


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write(path)
    assert path.read_bytes() == b"new"


def test_a_read_only_folder() -> None:
    with public_folder() as folder:
        folder.chmod(0o555)
        with as_somebody_else():
            with pytest.raises(OutputError, match="its folder cannot be written"):
                check_output(folder / "a.bin", False)
            with pytest.raises(OutputError, match="its folder cannot be written"):
                write(folder / "a.bin")
        assert os.listdir(folder) == []
        folder.chmod(0o755)


def test_a_folder_that_vanishes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OutputError, match="its folder does not exist"), atomic_write(folder / "a.bin", False):
        for name in os.listdir(folder):
            (folder / name).unlink()
        folder.rmdir()


@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_leaves_nothing_new(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "a.bin"
    if exists:
        path.write_bytes(b"precious")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, overwrite=exists) as file:
        file.write(bytes(3 << 20))
        assert any(name.startswith(".a.bin.") and name.endswith(".tmp") for name in os.listdir(tmp_path))
        signal.raise_signal(signal.SIGINT)
        file.write(b"never reached")
    assert os.listdir(tmp_path) == (["a.bin"] if exists else [])
    assert not exists or path.read_bytes() == b"precious"


def test_the_callers_own_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another disk"), atomic_write(tmp_path / "a.bin", False) as file:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "another disk is full")
    assert os.listdir(tmp_path) == []


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("exists", [False, True])
def test_a_really_full_disk(small_disk: Path, exists: bool) -> None:
    path = small_disk / "a.bin"
    if exists:
        path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="the disk is full"):
        write(path, bytes(1 << 20), overwrite=exists)
    assert os.listdir(small_disk) == (["a.bin"] if exists else [])
    assert not exists or path.read_bytes() == b"precious"


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


LIMITED = """
import resource, sys
from goslet.errors import OutputError
from goslet.output import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_write(sys.argv[1], False) as file:
        for _ in range(20):
            file.write(bytes(1 << 16))
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
from goslet.output import atomic_write
with atomic_write(sys.argv[1], overwrite=sys.argv[2] == "True") as file:
    file.write(bytes(3 << 20))
    os.kill(os.getpid(), signal.SIGKILL)
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


def test_a_link_that_leads_nowhere_names_where_it_leads(tmp_path: Path) -> None:
    link = tmp_path / "x.state"
    link.symlink_to("gone/real.state")
    message = re.escape(f"{link}: the folder that this link leads to does not exist (found {tmp_path / 'gone'})")
    with pytest.raises(OutputError, match=message):
        check_output(link, overwrite=True)
    (tmp_path / "gone").write_bytes(b"")
    with pytest.raises(OutputError, match="the folder that this link leads to is a file"):
        check_output(link, overwrite=True)
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    check_output(link, overwrite=True)
