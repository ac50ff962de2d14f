"""The library of TensorRT plugins, libgoslet_trt.so: where it is looked for, and which version it is of."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from .cuda_layout import PLUGIN_VERSION
from .errors import BackendUnavailableError

LIBRARY = "libgoslet_trt.so"
VARIABLE = "GOSLET_TRT_PLUGIN"
_BUILD = f"build it for this machine, from this goslet: tools/build_cuda --plugin {LIBRARY}"


def find_plugin(engine: Path, given: str | os.PathLike[str] | None = None) -> Path:
    """The library that is given, or that the environment variable GOSLET_TRT_PLUGIN names, or beside an engine file.

    Raises:
        BackendUnavailableError: there is none, or it cannot be loaded, or is of another version than this goslet.
    """
    named = os.environ.get(VARIABLE)
    path = Path(given or named or engine.parent / LIBRARY)
    if not path.is_file():
        raise BackendUnavailableError(
            f"{LIBRARY} is needed for the recurrences and is not there",
            place="plugin" if given else f"environment variable {VARIABLE}" if named else None,
            expected=None if given or named else f"{LIBRARY} beside the engine, or {VARIABLE} to name it",
            found=f"no file {path}",
            remedy=f"build it (tools/build_cuda --plugin {LIBRARY}), or build a plan that needs none: --plain",
        )
    path = path.resolve()
    version = plugin_version(path)
    if version != PLUGIN_VERSION:
        raise BackendUnavailableError(
            "is a plugin library of another version", file=path, expected=PLUGIN_VERSION, found=version, remedy=_BUILD
        )
    return path


def plugin_version(path: Path) -> int:
    """The version that a library states, to be held to `goslet.cuda_layout.PLUGIN_VERSION`.

    Raises:
        BackendUnavailableError: the file is no such library.
    """
    try:
        return int(ctypes.CDLL(str(path)).goslet_cuda_version())
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(
            f"cannot be loaded as a plugin library: {error}"[:300], file=path, remedy=_BUILD
        ) from error
