"""Writing an output file whole: it appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn, TypeAlias

from .errors import InputError, OutputError

# Linux keeps what is written in the largest pages that a write covers whole, and maps a file the faster the larger they
# are: so files are written in whole, aligned blocks of two huge pages.
_WRITE_BUFFER_BYTES = 4 << 20

Path: TypeAlias = "str | os.PathLike[str]"


def check_output(path: Path, overwrite: bool) -> None:
    """Fail now if `path` could not be written later, so that long work does not end in vain.

    Raises:
        OutputError: the file exists and `overwrite` is false; it is a folder, a device or a pipe; its folder is
            missing or cannot be written.
        InputError: `path` is not text or holds a NUL.
    """
    _resolve_output(path, overwrite)


@contextlib.contextmanager
def hidden_folder(beside: Path) -> Iterator[str]:
    """A hidden folder beside a file that is to be written, for what is made on the way; it is removed in the end."""
    folder, name = os.path.split(os.path.realpath(os.fspath(beside)))
    with tempfile.TemporaryDirectory(prefix=f".{name[:48]}.", suffix=".tmp", dir=folder) as made:
        yield made


def _resolve_output(path: Path, overwrite: bool) -> str:
    """The real path to write: symbolic links stay, and what they point to is written."""
    shown = os.fspath(path)
    if not isinstance(shown, str) or not shown or "\0" in shown:
        raise InputError("is not a path that can be written", place="path", found=repr(shown))
    if shown.endswith(("/", os.sep)):
        raise OutputError("names a folder", file=shown, remedy="add a file name")
    target = os.path.realpath(shown)
    try:
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None:
            if stat.S_ISDIR(mode):
                raise OutputError("is a folder", file=shown, remedy="add a file name")
            if not stat.S_ISREG(mode):
                raise OutputError("is not an ordinary file", file=shown, remedy="choose another name")
            if not overwrite:
                _raise_exists(shown)
        folder = os.path.dirname(target)
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise OutputError("its folder is a file", file=shown, found=folder, remedy="choose another folder")
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise output_error(error, shown) from error
    return target


def _raise_exists(shown: str) -> NoReturn:
    raise OutputError("exists already", file=shown, remedy="choose another name, or overwrite it (--force)")


def output_error(error: OSError, shown: Path) -> OutputError:
    """What an operating system's error says of an output."""
    is_link = os.path.islink(shown)
    folder = os.path.dirname(os.path.realpath(shown) if is_link else os.path.abspath(shown))
    its_folder = "the folder that this link leads to" if is_link else "its folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError("the disk is full", file=shown, remedy="free some space or choose another folder")
    if error.errno == errno.EFBIG:
        return OutputError(
            "the file is larger than the file system or a limit (ulimit -f) allows",
            file=shown,
            remedy="choose another folder or raise the limit",
        )
    if error.errno == errno.ENOENT:
        return OutputError(f"{its_folder} does not exist", file=shown, found=folder, remedy="make the folder first")
    if error.errno == errno.ENOTDIR:
        return OutputError(f"{its_folder} is a file", file=shown, found=folder, remedy="choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"{its_folder} cannot be written", file=shown, found=folder, remedy="choose another folder or allow writing"
        )
    return OutputError(f"cannot be written: {error.strerror or error}", file=shown, remedy="choose another name")


class _OutputFile(io.FileIO):
    """A new file whose failing writes are `OutputError`, so that they are not mistaken for the caller's own errors."""

    def __init__(self, path: str, shown: str) -> None:
        self._shown = shown
        super().__init__(path, "x")

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if view.nbytes > _WRITE_BUFFER_BYTES:
            # BufferedWriter keeps the rest for the next block.
            view = view[: view.nbytes - (self.tell() + view.nbytes) % _WRITE_BUFFER_BYTES]
        try:
            return super().write(view)
        except OSError as error:
            raise output_error(error, self._shown) from error


@contextlib.contextmanager
def atomic_write(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Write a file that appears under its name complete or not at all.

    The body writes to a hidden file in the same folder; leaving it normally syncs that file to the disk and renames
    it, leaving it by any exception (Ctrl-C too) removes it. A replaced file keeps its permission bits, a new one gets
    those of the umask. A symbolic link stays and what it points to is replaced.

    What ends the process without an exception (SIGKILL, a power cut; SIGTERM and SIGHUP too, except on the command
    line, which makes exceptions of them) leaves the hidden file ``.NAME.….tmp``, which may be deleted. On a file
    system without hard links (FAT, some network folders) it may instead leave an empty file under a name that was new,
    if it falls between the claiming of that name and the renaming.

    Raises:
        OutputError: as `check_output`, also when the file appeared meanwhile; the disk is full or writing failed.
    """
    shown = os.fspath(path)
    target = _resolve_output(path, overwrite)
    folder, name = os.path.split(target)
    hidden = os.path.join(folder, f".{name[:48]}.{secrets.token_hex(8)}.tmp")
    raw = None
    try:
        try:
            raw = _OutputFile(hidden, shown)
            if overwrite:
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(hidden, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
        except OSError as error:
            raise output_error(error, shown) from error
        file = io.BufferedWriter(raw, _WRITE_BUFFER_BYTES)
        yield file
        file.flush()
        try:
            os.fsync(raw.fileno())
            raw.close()
            _rename(hidden, target, overwrite, shown)
        except OSError as error:
            raise output_error(error, shown) from error
    finally:
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.close()
        with contextlib.suppress(OSError):
            os.unlink(hidden)


def _rename(hidden: str, target: str, overwrite: bool, shown: str) -> None:
    if overwrite:
        os.replace(hidden, target)
    else:
        try:
            try:
                os.link(hidden, target)
            except FileExistsError:
                raise
            except OSError:
                # No hard links here (FAT, some network folders): claim the name with an empty file, then replace that.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                try:
                    os.replace(hidden, target)
                except BaseException:
                    os.unlink(target)
                    raise
        except FileExistsError:
            _raise_exists(shown)
    # The new name is durable only once its folder is; a file system that cannot sync folders still has the file.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
