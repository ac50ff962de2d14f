"""llama.cpp's side of tools/quality.py: quantizes a model as its users do, and reads token ids with it.

The importance matrix, which llama.cpp's own tool finds by running a text, is here the diagonal of the second moments
that goslet's calibration collected: for every column of a matrix the mean square of what it is given. That is the same
statistic, of the same text and tokens that goslet's GPTQ learns from, so that the comparison is one of methods.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bench_contenders import Unavailable, import_llama
from gguf_rwkv7 import gguf_name, tensor_types
from numpy.typing import NDArray

from goslet.export.calibration import MomentsFile, multiplied
from goslet.export.checkpoint import Checkpoint

BATCH_TOKENS = 512
CONTEXT_TOKENS = 1 << 16  # takes no memory: the model is recurrent
# llama_ftype, from llama.h.
TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "IQ4_XS": 30, "Q3_K_M": 12}
# So small a file is no model: what llama.cpp leaves of one that it could not write.
_SMALLEST_BYTES = 1024


def load_library() -> Any:
    """llama.cpp's functions, silent.

    Raises:
        Unavailable: they are not here.
    """
    return _library()[0]


@cache
def _library() -> tuple[Any, Any]:
    llama = import_llama()
    # llama.cpp keeps the pointer, so that what it points to must live as long as the process.
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    return llama, silent


def importance(source: Checkpoint, moments: MomentsFile) -> dict[str, NDArray[np.float32]]:
    """The importance matrix by llama.cpp's names: float32 [in] for every matrix that is multiplied with."""
    return {
        gguf_name(rule.name): np.ascontiguousarray(moments.inputs(rule).moments.diagonal().numpy(), np.float32)
        for rule in multiplied(source.rules)
    }


def quantize(plain: Path, path: Path, kind: str, weights: Mapping[str, NDArray[np.float32]] | None) -> None:
    """Have llama.cpp quantize a GGUF file.

    Args:
        plain: the file, F16 or F32.
        path: the file to write.
        kind: a name in `TYPES`.
        weights: the importance matrix, or None.

    Raises:
        Unavailable: llama.cpp is not here, or refuses.
    """
    llama = load_library()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = TYPES[kind]
    settings.nthread = os.cpu_count() or 1
    if weights is not None:
        # One entry without a name ends the list.
        entries = (llama.llama_model_imatrix_data * (len(weights) + 1))()
        for entry, (name, values) in zip(entries, weights.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        settings.imatrix = entries
    status = llama.llama_model_quantize(os.fsencode(plain), os.fsencode(path), ctypes.byref(settings))
    if status != 0 or path.stat().st_size < _SMALLEST_BYTES:
        raise Unavailable(f"llama.cpp refuses to make {kind} of {plain.name}")


def tensors_size_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def matrix_types(path: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are stored in which type, where llama.cpp chose others than it was asked for."""
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(path).tensors}
    kinds = tensor_types(path)
    return dict(Counter(kinds[name] for name, shape in shapes.items() if sum(size > 1 for size in shape) == 2))


class LlamaModel:
    """A GGUF file in llama.cpp, on the CPU.

    Raises:
        Unavailable: llama.cpp is not here or cannot load it.
    """

    def __init__(self, path: Path, threads: int) -> None:
        llama = self._llama = load_library()
        settings = llama.llama_model_default_params()
        # Else products go to AMX wherever the processor names it, and some virtual machines end the process there.
        settings.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise Unavailable(f"llama.cpp cannot load {path.name}")
        options = llama.llama_context_default_params()
        options.n_ctx = CONTEXT_TOKENS
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise Unavailable(f"llama.cpp makes no context for {path.name}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)

    def read(self, tokens: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """Logits [last, V] after each of the last tokens; the first is fed to a fresh state."""
        llama, batch = self._llama, self._batch
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        found = []
        for start in range(0, len(tokens), BATCH_TOKENS):
            piece = tokens[start : start + BATCH_TOKENS]
            batch.n_tokens = len(piece)
            wanted = 0
            for index, token in enumerate(piece.tolist()):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = start + index >= len(tokens) - last
                wanted += batch.logits[index]
            status = llama.llama_decode(self._context, batch)
            if status != 0:
                raise Unavailable(f"llama_decode returned {status}")
            if wanted:
                rows = np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=(wanted, self._vocab_size))
                found.append(rows.copy())
        return np.concatenate(found)

    def close(self) -> None:
        """Free the model."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
