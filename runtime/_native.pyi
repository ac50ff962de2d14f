"""Types of the C++ module; csrc/bindings.cpp defines it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class StateBuffer(Buffer):
    """One state: float32 tensors in a single 64-byte-aligned allocation that never moves.

    As a buffer it is the whole allocation, one row of float32; the gaps between tensors are zero.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], inits: Sequence[float]) -> None:
        """Allocate and reset.

        Raises ValueError for an empty layout, shape or dimension or past 4 GiB, MemoryError where memory is short.
        """

    @property
    def size_bytes(self) -> int:
        """Bytes of the allocation, gaps included."""

    @property
    def n_tensors(self) -> int:
        """Tensors in the layout."""

    def tensor(self, index: int) -> NDArray[np.float32]:
        """A writable view of one tensor in its shape; it keeps the buffer alive. Raises IndexError."""

    def reset(self) -> None:
        """Fill every tensor with its initial value."""

    def copy_from(self, other: StateBuffer) -> None:
        """Copy every tensor. Raises ValueError, and copies nothing, when the layouts differ."""

    def clone(self) -> StateBuffer:
        """A buffer of its own with the same layout and values."""

class VocabularyTrie:
    """Greedy longest match over a vocabulary of byte strings; ids without one are never given and decode to nothing."""

    def __init__(self, vocab_size: int, entries: Sequence[tuple[int, bytes]]) -> None:
        """Raises ValueError for an id that is too large or given twice, and for empty or equal byte strings."""

    @staticmethod
    def from_blob(blob: Buffer) -> VocabularyTrie:
        """Read what `to_blob` wrote. Raises ValueError for anything else."""

    def to_blob(self) -> bytes:
        """The vocabulary in the compact form that opens quickly; csrc/vocabulary_trie.h describes it."""

    @property
    def vocab_size(self) -> int:
        """Ids, with or without a byte string."""

    @property
    def n_entries(self) -> int:
        """Ids that stand for a byte string."""

    def encode(self, text: bytes) -> tuple[list[int], int]:
        """The ids, and how many bytes they cover: fewer than given where nothing matches at that offset."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids one after the other. Raises IndexError for an id past the vocabulary."""

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id, empty where it stands for nothing. Raises IndexError past the vocabulary."""

def transpose_int4(rows: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """Transpose packed nibbles from rows along K to ONNX's order.

    Args:
        rows: uint8 [n, ceil(k / 2)], C-contiguous; low nibble first, a last odd high nibble is ignored.
        k: nibbles in a row.

    Returns:
        uint8 [ceil(k * n / 2)]: the [k, n] matrix without gaps, low nibble first, a last odd high nibble 0.

    Raises ValueError when the row length does not fit k, TypeError for another dtype or order.
    """

def available_isas() -> list[str]:
    """Instruction sets that this CPU runs, from the plainest to the best; GOSLET_ISA takes one of these names."""

class EngineError(Exception):
    """An engine's parts do not fit together; `args` are problem, place, expected and found, each a str, maybe empty."""

class NativeEngine:
    """An engine's program on its weights, and the threads that run it."""

    def __init__(
        self,
        program: Buffer,
        tensors: Sequence[
            tuple[str, str, str, int, Sequence[int], NDArray[np.uint8], NDArray[np.float16] | NDArray[np.uint8] | None]
        ],
        state: Sequence[tuple[str, Sequence[int], float]],
        vocab_size: int,
        threads: int,
        pin: bool,
        skip_zeros: bool,
    ) -> None:
        """Check that everything fits together; the buffers are kept alive and read in place.

        Args:
            program: the steps, as JSON.
            tensors: name, format, layout, group (0 for the floating formats), shape, data, and scales or None.
            state: name, shape and initial value of each of the state's tensors, without the token count.
            vocab_size: tokens are below this; the logits' length.
            threads: threads that compute, the caller's included, 1 to 1024.
            pin: bind each of the others to a CPU of its own.
            skip_zeros: leave weights of activations that are zero unread.

        Raises EngineError, MemoryError, RuntimeError when a thread cannot be started, and ValueError when GOSLET_ISA
        names nothing that runs here.
        """

    def feed(self, sequences: Sequence[tuple[StateBuffer, NDArray[np.int64], NDArray[np.float32] | None]]) -> None:
        """Move states on, each past its own tokens, and its token count with it; everything is checked before.

        Args:
            sequences: a state, its tokens int64 [n], and where its logits go: float32 [n, V] for those after every
                token, [1, V] for those after the last one, None for nowhere.

        Raises ValueError for a token outside the vocabulary, no tokens, or a state of another layout or given twice,
        RuntimeError in a child of fork(), and MemoryError; no state has moved then.
        """

    @property
    def isa(self) -> str:
        """The instruction set of the kernels."""

    @property
    def threads(self) -> int:
        """Threads that compute."""

    @property
    def density(self) -> tuple[int, int]:
        """Inputs seen by matrices in columns in steps of one token, and those whose activation was not zero."""
