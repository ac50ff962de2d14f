"""Adapters: what fine-tuning saves beside a model, merged into its tensors as they are read.

Of a matrix W [out, in] called ``X.weight``, with the names of RWKV's trainers (RWKV-PEFT, RWKV-LM-LoRA, RWKV-LM-RLHF)
and, behind ``base_model.model.``, of Hugging Face's PEFT:

- LoRA: ``X.lora_A`` [r, in] and ``X.lora_B`` [out, r]; W + s·B·A with s = alpha / r, or alpha / sqrt(r) where an
  ``adapter_config.json`` says ``use_rslora``. Without such a file beside it the alpha of training must be told.
- PiSSA: the same names, but B·A began as B0·A0, the principal part of W, which was taken out of W: W - s·B0·A0 + s·B·A.
  RWKV-PEFT keeps the beginning in ``init_pissa.pth`` (``X.init_lora_A``, ``X.init_lora_B``) and has s = 1; PEFT, which
  has the like with OLoRA, CorDA and LoRA-GA, in the adapter as it was saved before training. `goslet.export.adapters.
  pissa` tells such adapters from LoRA by their numbers.
- DoRA: with m for ``X.lora_M`` [1, in] of RWKV-LM-RLHF or ``X.lora_magnitude_vector`` [out] of PEFT, and V = W + s·B·A:
  V times m over V's norm, of columns in the first and of rows in the second.
- bone, DiSHA and MiSS: ``X.bone``, ``X.disha`` or PEFT's ``X.miss_block``: D [r, out]; W[o, i] + D[i mod r, o].
- bat: the same names, M [blocks, r, r]; with W cut into blocks W_ab of r rows and columns, each becomes
  W_ab + W_ab·M_b + M_b in RWKV's trainers, where M has in / r blocks, and W_ab + W_ab·M_a + M_a in PEFT, where it has
  out / r.
- Any tensor under the model's own name, trained as a whole, takes the model's place; and ``blocks.N.att.time_state`` is
  a tuned initial state (`goslet.export.tuned_state`).

An adapter that was trained on a quantized base (QLoRA) is merged into the base as it was before quantization, as the
trainers' users do; what quantization took from the base in training is not in any file.
"""

from __future__ import annotations

from .merging import merged
from .reading import Adapter, read_adapter

__all__ = ["Adapter", "merged", "read_adapter"]
