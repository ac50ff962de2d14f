"""Runs PyPI's rwkv on checkpoints and writes what it computes; a program, since rwkv picks its version at import.

    python -m goslet.export.oracles.pip_rwkv OUT.npz TOKENS.npy CHECKPOINT.pth …

`goslet.export.oracles.run_program` sets the environment, and says what is written.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rwkv.model import RWKV

# The first bytes of what torch.save writes now, and of what it wrote before.
_ARCHIVE, _PICKLE = b"PK", b"\x80\x02"


def main(out: str, tokens_file: str, *checkpoints: str) -> None:
    """Write the logits and the last state of each checkpoint."""
    tokens = np.load(tokens_file)
    results: dict[str, Any] = {}
    for index, checkpoint in enumerate(checkpoints):
        with _as_float32(Path(checkpoint)) as folder:
            path = checkpoint if folder is None else os.path.join(folder, "float32.pth")
            model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
        state = None
        rows = []
        for token in tokens[index].tolist():
            logits, state = model.forward([token], state)
            rows.append(logits.numpy().copy())
        results[f"logits_{index}"] = np.stack(rows)
        for part, tensor in enumerate(state or ()):
            results[f"state_{index}_{part}"] = tensor.numpy()
    np.savez(out, **results)


def _as_float32(path: Path) -> tempfile.TemporaryDirectory[str] | nullcontext[None]:
    """A folder with the checkpoint as ``float32.pth``; None where it is that already.

    In versions 4 to 6, rwkv applies ln0 to the embedding in the checkpoint's own dtype, whatever its strategy. What a
    file is, its content says: people call them .pt, .bin and .st too.
    """
    with path.open("rb") as file:
        head = file.read(2)
        file.seek(0)
        # Only archives are mapped, and only by a path, of which torch takes the ending .safetensors for the form.
        mapped = head == _ARCHIVE and path.suffix != ".safetensors"
        if head in (_ARCHIVE, _PICKLE):
            tensors = torch.load(path if mapped else file, map_location="cpu", mmap=mapped, weights_only=True)
    if head in (_ARCHIVE, _PICKLE):
        if path.suffix == ".pth" and all(tensor.dtype == torch.float32 for tensor in tensors.values()):
            return nullcontext()
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
    folder = tempfile.TemporaryDirectory(prefix="goslet-oracle-")
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, Path(folder.name, "float32.pth"))
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
