"""Runs PyPI's rwkv on checkpoints and writes what it computes; a program, since rwkv picks its version at import.

    python rwkv_oracle.py OUT.npz TOKENS.npy CHECKPOINT.pth …

Writes, for the checkpoint with index i: logits_i float32 [T, V], and state_i_j for each of its state tensors.
"""

import os
import sys

os.environ.update({"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})

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
            rows.append(logits.numpy())
        results[f"logits_{index}"] = np.stack(rows)
        for part, tensor in enumerate(state):
            results[f"state_{index}_{part}"] = tensor.numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
