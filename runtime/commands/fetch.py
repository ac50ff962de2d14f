"""Download a checkpoint from the Hugging Face hub, with the package huggingface_hub, which tokenizers brings along.

Nothing else in goslet opens a connection.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DependencyError, InputError, OutputError, first_line
from .console import Console, readable_size
from .flags import UsageError

NAME = "fetch"
SUMMARY = "download a checkpoint from the Hugging Face hub"

# The authors' own repositories, newest models first.
AUTHORS = ("BlinkDL/rwkv7-g1", "BlinkDL/rwkv-7-world", "BlinkDL/rwkv-6-world", "BlinkDL/rwkv-5-world")
_CHECKPOINTS = (".pth", ".safetensors", ".gguf", ".st", ".bin")
_FOLDER = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "tokenizer.json", "*.txt")
_SHOWN_FILES = 40
# What stands before OWNER and before FILE in the address of a page of the hub.
_ADDRESS = re.compile(r"https?://[^/]+/")
_REVISION = re.compile(r"(blob|resolve)/[^/]+/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a repository, or one of its files: OWNER/NAME or OWNER/NAME/FILE; the authors' own: "
        + ", ".join(AUTHORS),
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", default=".", help="where it is put (default: here)")
    parser.add_argument("--list", action="store_true", help="show the repository's checkpoints and download nothing")


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    parts = _ADDRESS.sub("", args.model).split("/", 2)
    if len(parts) == 3:
        parts[2] = _REVISION.sub("", parts[2])
    if len(parts) < 2 or not all(parts):
        raise UsageError(
            f"MODEL: expected OWNER/NAME or OWNER/NAME/FILE, such as {AUTHORS[0]}, found {args.model!r}",
            "goslet fetch --help",
        )
    repository, wanted = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    files = _files(repository)
    checkpoints = [file for file in files if file.name.endswith(_CHECKPOINTS)]
    if args.list:
        for file in checkpoints:
            console.line(f"{readable_size(file.size_bytes):>8}  {repository}/{file.name}")
        return 0
    names = {file.name for file in files}
    if wanted is not None and wanted not in names:
        raise InputError(
            "has no such file", place=repository, expected=_shown(checkpoints), found=wanted, remedy=_list(repository)
        )
    if wanted is None and "config.json" in names:
        path = _download_folder(repository, Path(args.output, parts[1]))
    elif wanted is None and len(checkpoints) != 1:
        raise InputError(
            "holds several checkpoints" if checkpoints else "holds no checkpoint",
            place=repository,
            found=_shown(checkpoints),
            remedy=f"name one: goslet fetch {repository}/FILE" if checkpoints else "choose another repository",
        )
    else:
        path = _download_file(repository, wanted or checkpoints[0].name, Path(args.output))
    console.line(str(path))
    engine = Path(path.name).with_suffix(".goslet") if path.is_file() else Path(f"{path.name}.goslet")
    console.note(
        f"try: goslet export {shlex.quote(str(path))} -o {shlex.quote(str(engine))} --quant int8 --tokenizer world"
    )
    return 0


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise DependencyError(
            "huggingface_hub is not installed, which downloading needs", remedy="pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _files(repository: str) -> list[_File]:
    """Every file of a repository.

    Raises:
        InputError: there is no such repository, it is not for everybody, or the hub cannot be reached.
    """
    hub = _hub()
    try:
        info = hub.HfApi().model_info(repository, files_metadata=True)
    except Exception as error:  # errors of the hub and of whatever it reaches it with share no base
        raise _refused(error, repository) from error
    return [_File(file.rfilename, file.size or 0) for file in info.siblings or ()]


def _download_file(repository: str, name: str, folder: Path) -> Path:
    try:
        return Path(_hub().hf_hub_download(repository, name, local_dir=folder))
    except OSError as error:
        raise _unwritable(error, folder) from error
    except Exception as error:  # as in `_files`
        raise _refused(error, f"{repository}/{name}") from error


def _download_folder(repository: str, folder: Path) -> Path:
    try:
        return Path(_hub().snapshot_download(repository, local_dir=folder, allow_patterns=list(_FOLDER)))
    except OSError as error:
        raise _unwritable(error, folder) from error
    except Exception as error:  # as in `_files`
        raise _refused(error, repository) from error


def _unwritable(error: OSError, folder: Path) -> OutputError:
    return OutputError(
        f"cannot be written: {error.strerror or first_line(error)}", file=folder, remedy="choose another folder"
    )


def _refused(error: Exception, what: str) -> InputError:
    kind = type(error).__name__
    known = {
        "RepositoryNotFoundError": (
            "is not on the hub, or is private",
            "check the name, or log in with: hf auth login",
        ),
        "GatedRepoError": ("is only for those who were let in", "ask for access on its page, then: hf auth login"),
        "HFValidationError": ("is no name of a repository", "expected OWNER/NAME"),
    }
    problem, remedy = known.get(
        kind,
        (
            f"cannot be downloaded: {first_line(error)}",
            "check the connection; or download the file in a browser from its page on the Hugging Face hub, "
            "and give its path to goslet export",
        ),
    )
    return InputError(problem, place=what, remedy=remedy)


def _shown(files: Iterable[_File]) -> str:
    names = [f"{file.name} ({readable_size(file.size_bytes)})" for file in files]
    rest = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + rest or "no checkpoint"


def _list(repository: str) -> str:
    return f"see: goslet fetch {repository} --list"
