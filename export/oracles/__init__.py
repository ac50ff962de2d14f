"""Other people's implementations, asked for the logits of the checkpoint that they were made to read.

`verify` reads a checkpoint by the same road as `export`, and so cannot see what both read wrongly. An oracle goes
another: PyPI's ``rwkv`` for files in RWKV's own names, ``transformers`` (with ``fla`` where it is installed) for
Hugging Face folders, and for GGUF a step in llama.cpp's names and layouts on what ``gguf`` dequantizes. Each runs in a
process of its own, since these choose what they are by the environment when they are imported, and print.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, DependencyError, InputError
from ..readers import OnlyHere

TIMEOUT_S = 1800
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Oracle:
    """A library and the program beside this file that runs it.

    Attributes:
        name: the package that must be installed.
        program: the module of this package.
        formats: what it reads, as `StoredModel.format` calls them.
        environment: set for its process.
        environments: and by the model's version.
    """

    name: str
    program: str
    formats: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The package and its version, for reports."""
        return f"{self.name} {importlib.metadata.version(self.name)}"


_SEVEN = {"RWKV_V7_ON": "1"}
ORACLES = {
    oracle.name: oracle
    for oracle in (
        Oracle(
            "rwkv",
            "pip_rwkv",
            ("pth", "safetensors"),
            {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
            {"7": _SEVEN, "7a": {**_SEVEN, "RWKV_DE_VERSION": "1"}},
        ),
        Oracle("transformers", "hf_transformers", ("hf",), {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}),
        Oracle("gguf", "gguf_step", ("gguf",)),
    )
}
# The one that reads a checkpoint's format.
AUTO = "auto"


def choose(name: str, file_format: str, path: Path, only_here: OnlyHere | None = None) -> Oracle:
    """The oracle for a checkpoint.

    Args:
        name: of `ORACLES`, or ``auto``.
        file_format: as `StoredModel.format`.
        path: the checkpoint, for messages.
        only_here: as `StoredModel.only_here`: what goslet undid, other libraries take as it lies.

    Raises:
        InputError: there is no such oracle, or none for this format or this file.
        DependencyError: its package is not installed.
    """
    if name != AUTO and name not in ORACLES:
        raise InputError("no such oracle", place="against", expected=", ".join((AUTO, *ORACLES)), found=name)
    able = [oracle for oracle in ORACLES.values() if file_format in oracle.formats and name in (AUTO, oracle.name)]
    if only_here is not None:
        raise InputError(
            "cannot be read by another library here as goslet reads it",
            file=path,
            place="against",
            found=only_here.found,
            remedy=f"leave --against out, or {only_here.remedy}",
        )
    if not able:
        raise InputError(
            "cannot be read by another library here",
            file=path,
            place="against",
            expected="; ".join(f"{oracle.name} reads {' and '.join(oracle.formats)}" for oracle in ORACLES.values()),
            found=f"a checkpoint of the form {file_format}",
            remedy="leave --against out, or give the .pth, folder or GGUF that this file was made from",
        )
    oracle = able[0]
    if importlib.util.find_spec(oracle.name) is None:
        raise DependencyError(
            f"{oracle.name} is not installed, which is to be compared with",
            place="against",
            remedy=f"pip install {oracle.name}",
        )
    return oracle


def run_oracle(oracle: Oracle, version: str, path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits [T, V] after each of the tokens, from a fresh state, in float32.

    Raises:
        CheckpointError: the library does not read the checkpoint, or fails on it.
    """
    with tempfile.TemporaryDirectory(prefix="goslet-oracle-") as folder:
        given, made = Path(folder, "tokens.npy"), Path(folder, "logits.npz")
        np.save(given, np.array([tokens], np.int64))
        run_program(oracle, version, given, made, [path])
        with np.load(made) as found:
            logits: NDArray[np.float32] = found["logits_0"]
    return logits


def run_program(oracle: Oracle, version: str, tokens: Path, out: Path, checkpoints: Sequence[Path]) -> None:
    """Run an oracle's program on checkpoints of one version.

    Args:
        oracle: which.
        version: the version of the models.
        tokens: a ``.npy`` file of int64 [checkpoints, T].
        out: the ``.npz`` file to write: ``logits_I``, float32 [T, V], of the checkpoint with index I; PyPI's rwkv also
            writes ``state_I_J`` for each tensor of its state.
        checkpoints: files or folders.

    Raises:
        CheckpointError: it fails.
    """
    command = [sys.executable, "-m", f"{__name__}.{oracle.program}", *map(str, (out, tokens, *checkpoints))]
    environment = {**os.environ, **oracle.environment, **oracle.environments.get(version, {})}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{oracle.name} does not end", file=checkpoints[0], found=f"{TIMEOUT_S} s") from None
    if done.returncode != 0 or not out.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(
            f"{oracle.label} does not run this checkpoint: {lines[-1][:_SHOWN_CHARACTERS]}",
            file=checkpoints[0],
            remedy="leave --against out; this says nothing about the engine",
        )
