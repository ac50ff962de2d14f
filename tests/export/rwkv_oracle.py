"""Runs PyPI's rwkv on checkpoints and writes what it computes; a program, since rwkv picks its version at import.

    python rwkv_oracle.py old|7|7a OUT.npz TOKENS.npy CHECKPOINT.pth …

``old`` is versions 4 to 6. Writes, for the checkpoint with index i: logits_i float32 [T, V], and state_i_j for each of
its state tensors.
"""

# ruff: noqa: E402 - the environment is read when rwkv is imported
import os
import sys

ENVIRONMENTS = {"old": {}, "7": {"RWKV_V7_ON": "1"}, "7a": {"RWKV_V7_ON": "1", "RWKV_DE_VERSION": "1"}}
os.environ.update({"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", **ENVIRONMENTS[sys.argv[1]]})

import numpy as np
from rwkv.model import RWKV


def main(out: str, tokens_file: str, *checkpoints: str) -> None:
    tokens = np.load(tokens_file)
    results = {}
    for index, checkpoint in enumerate(checkpoints):
        model = RWKV(model=checkpoint.removesuffix(".pth"), strategy="cpu fp32")
        state = None
        rows = []
        for token in tokens[index].tolist():
            logits, state = model.forward([token], state)
            rows.append(logits.numpy().copy())
        results[f"logits_{index}"] = np.stack(rows)
        for part, tensor in enumerate(state):
            results[f"state_{index}_{part}"] = tensor.numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[2:])
