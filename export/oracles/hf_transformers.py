"""Runs transformers, and fla's models where fla is installed, on Hugging Face folders and writes their logits.

    python -m goslet.export.oracles.hf_transformers OUT.npz TOKENS.npy FOLDER …

No code of the folder's is run.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


@torch.no_grad()
def main(out: str, tokens_file: str, *folders: str) -> None:
    """Write the logits of each folder's model."""
    if importlib.util.find_spec("fla") is not None:
        import fla  # noqa: F401 - registers its models
    tokens = torch.from_numpy(np.load(tokens_file))
    results = {}
    for index, folder in enumerate(folders):
        local = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **local)
        if getattr(config, "rescale_every", 0):
            config.rescale_every = 0  # against overflow in f16; LayerNorm's eps means another thing behind it
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **local)
        model.train(False)
        results[f"logits_{index}"] = model(tokens[index : index + 1]).logits[0].numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
