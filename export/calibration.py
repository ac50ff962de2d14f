"""Calibration: what a model's matrices are given while it reads a text, kept in a file.

For every matrix that a step multiplies with, the second moments of its inputs x, the mean of x·xᵀ, say which of its
errors matter (Frantar et al., "GPTQ", 2022). The text is cut into chunks that are read side by side, each from a fresh
state. A few of the chunks are held out: their inputs are kept as they are, and later choose among ways to quantize.

The model that reads is the unquantized one. GPTQ's own code lets each layer read what the quantized layers before it
give. That would tie the moments to one recipe and one order of work; so they belong to the model alone, serve every
recipe, and a run that was cut off goes on from the file.

In memory are the model in float32 without its embedding and its head, and the moments of as many matrices as take no
more than that or `MOMENTS_BYTES`; where these are not all, the text is read again for the next ones. So it takes little
over twice what the model does, and some passes more where the moments, which grow with the squares of the widths, are
larger than the weights. The moments file is a container
(`goslet.container`) that is written anew after each such pass. Its header has ``model_id``, ``tensors`` (the matrices
that are done) and ``initial_state`` (a tuned one's SHA-256, or null), and its sections are ``tokens`` (int32 [chunks,
`CHUNK_TOKENS`]) and for every matrix

- ``<name>.moments``: float32, the upper triangle of [in, in] row by row, and
- ``<name>.held_out``: float32 [tokens held out, in].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..container import Container, Section, read_container, write_container
from ..errors import HeaderError, InputError, NonFiniteError, TokenError, TokenizerError
from ..output import check_output, hidden_folder
from ..spec import EMBEDDING
from ..tokenizer import Tokenizer
from .calibration_text import CHUNK_TOKENS, calibration_tokens, held_out_chunks
from .checkpoint import Checkpoint
from .models.blocks import EagerOps, State, token_pieces
from .models.tensors import Kind, TensorRule

MOMENTS_MAGIC = b"GOSLETMO"
MOMENTS_VERSION = 1
# Moments in memory at a time, if the model is not larger: with 0.4B it then stays well below 6 GB, in two passes.
MOMENTS_BYTES = 3 << 29

# Chunks read side by side. More are not faster, and the inputs that are gathered grow with them.
_LANES = 32
# Inputs gathered before they are multiplied: a product of so many rows is far faster than as many of one. They are
# summed in float32, each sum over at most this many numbers, and then the sums of the blocks.
_BLOCK_ROWS = 256

Progress = Callable[[str, int, int], None]


class LayerInputs(NamedTuple):
    """What one matrix [out, in] is given.

    Attributes:
        moments: float32 [in, in], the mean of x·xᵀ over the tokens that were not held out.
        held_out: float32 [tokens held out, in], inputs of the others.
    """

    moments: Tensor
    held_out: Tensor


def multiplied(rules: Sequence[TensorRule]) -> list[TensorRule]:
    """The matrices that a step multiplies with: all but the embedding, in the order of use."""
    return [rule for rule in rules if rule.is_matrix and rule.kind is not Kind.EMBEDDING]


class MomentsFile:
    """An open moments file, mapped read-only and with every checksum verified; usable in a ``with`` statement.

    Attributes:
        path: the file, as it was given.
        model_id: the id of the model that read.
        tokens: int32 [chunks, `CHUNK_TOKENS`], what it read.
        initial_state: SHA-256 of the tuned state that every chunk began with, or None.
        done: the matrices that are in the file.

    Raises:
        ContainerError: the file cannot be read, is damaged or is not a moments file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.container: Container = read_container(
            path, magic=MOMENTS_MAGIC, version=MOMENTS_VERSION, kind="moments file"
        )
        try:
            self.container.check()
            header = self.container.header
            done, self.model_id = header.get("tensors"), str(header.get("model_id"))
            if not isinstance(done, list) or not all(isinstance(name, str) for name in done):
                raise HeaderError("is not a list of names", file=self.path, place="tensors", remedy="calibrate again")
            self.done: list[str] = done
            self.initial_state = header.get("initial_state")
            self.tokens = self._numbers("tokens", "<i4", CHUNK_TOKENS)
        except BaseException:
            self.container.close()
            raise

    def inputs(self, rule: TensorRule) -> LayerInputs:
        """What a matrix was given.

        Raises:
            HeaderError: the file does not hold that, in that size and finite.
        """
        n_in = rule.shape[1]
        held_out = torch.from_numpy(self._numbers(f"{rule.name}.held_out", "<f4", n_in).copy())
        triangle = self._numbers(f"{rule.name}.moments", "<f4", n_in * (n_in + 1) // 2)[0]
        if not (np.isfinite(triangle).all() and torch.isfinite(held_out).all()):
            raise HeaderError("holds NaN or infinity", file=self.path, place=rule.name, remedy="calibrate again")
        moments = torch.empty(n_in, n_in)
        begin = 0
        for row in range(n_in):
            part = torch.from_numpy(triangle[begin : begin + n_in - row].copy())
            moments[row, row:] = part
            moments[row:, row] = part
            begin += n_in - row
        return LayerInputs(moments, held_out)

    def _numbers(self, name: str, dtype: str, width: int) -> NDArray[Any]:
        section = self.container.section(name)
        row_bytes = width * np.dtype(dtype).itemsize
        if section.nbytes == 0 or section.nbytes % row_bytes:
            raise HeaderError(
                "has a wrong length",
                file=self.path,
                place=f"section {name}",
                expected=f"a multiple of {row_bytes} bytes",
                found=f"{section.nbytes} bytes",
                remedy="calibrate again",
            )
        return np.frombuffer(section, dtype).reshape(-1, width)

    def check_model(self, model_id: str) -> None:
        """Refuse the moments of another model.

        Raises:
            InputError: they are.
        """
        if self.model_id != model_id:
            raise InputError(
                "holds the moments of another model",
                file=self.path,
                place="model id",
                expected=model_id,
                found=self.model_id[:64],
                remedy="choose another name, or calibrate this model",
            )

    def close(self) -> None:
        """Unmap the file."""
        self.container.close()

    def __enter__(self) -> MomentsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RecordingOps(EagerOps):
    """Keeps what some matrices are given; the head, whose logits nobody reads, gives nothing to do."""

    def __init__(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
        super().__init__(weights)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Matrix product of x [B, in] with the matrix `name` [out, in]: [B, out]."""
        if name in self.seen:
            self.seen[name].append(x)
        return super().linear(name, x) if name in self.weights else x

    def take(self, name: str) -> Tensor:
        """What was kept of a matrix since the last time, [tokens, in].

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        rows = torch.cat(self.seen[name])
        self.seen[name].clear()
        if not torch.isfinite(rows).all():
            raise NonFiniteError(
                "the model gives NaN or infinity on the calibration text",
                place=f"input of {name}",
                remedy="check the checkpoint with another text: if it overflows too, it cannot be calibrated",
            )
        return rows


class EmbeddedTokens:
    """The rows of the embedding that some tokens need, and no others.

    Args:
        source: the checkpoint.
        tokens: the tokens, of any shape.

    Raises:
        TokenError: a token is outside the vocabulary.
    """

    def __init__(self, source: Checkpoint, tokens: NDArray[np.int32]) -> None:
        rule = next(rule for rule in source.rules if rule.name == EMBEDDING)
        self._spec = source.spec
        self._ids = np.unique(tokens)
        if self._ids[0] < 0 or self._ids[-1] >= rule.shape[0]:
            raise TokenError(
                "is outside the vocabulary",
                place="calibration tokens",
                expected=f"0 to {rule.shape[0] - 1}",
                found=f"{self._ids[0]} to {self._ids[-1]}",
            )
        self.rows = torch.empty(len(self._ids), rule.shape[1])
        first = 0
        for block in source.blocks(rule):
            begin, end = np.searchsorted(self._ids, (first, first + len(block)))
            self.rows[begin:end] = block[torch.from_numpy(self._ids[begin:end] - first).long()]
            first += len(block)

    def places(self, tokens: NDArray[np.int32]) -> Tensor:
        """Where the tokens' rows are in `rows`, int64 of the same shape."""
        return torch.from_numpy(np.searchsorted(self._ids, tokens))

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [B, size] as `Version.step` takes its token."""
        return token_pieces(rows, self._spec)

    def pieces(self, tokens: NDArray[np.int32]) -> tuple[Tensor, ...]:
        """Some tokens [B] as `Version.step` takes them."""
        return self.split(self.rows[self.places(tokens)])


def fresh_state(source: Checkpoint, lanes: int, initial: Mapping[str, NDArray[np.float32]] | None) -> State:
    """What `lanes` chunks begin with: a tuned state, or the version's own."""
    state = {}
    for tensor in source.version.state_spec(source.spec).tensors:
        one = torch.full(tensor.shape, tensor.init) if initial is None else torch.from_numpy(initial[tensor.name])
        state[tensor.name] = one.expand(lanes, *tensor.shape)
    return state


@contextmanager
def open_moments(
    source: Checkpoint,
    model_id: str,
    tokenizer: Tokenizer | None,
    *,
    text: str | os.PathLike[str] | None,
    n_tokens: int,
    path: str | os.PathLike[str] | None,
    beside: str | os.PathLike[str],
    initial_state: Mapping[str, NDArray[np.float32]] | None,
    progress: Progress | None,
) -> Iterator[MomentsFile]:
    """The moments of a model: taken from a file, found by reading a text, or both where the file is not finished.

    Args:
        source: the model.
        model_id: its id.
        tokenizer: its tokenizer.
        text: a UTF-8 text, or None where there is a file.
        n_tokens: tokens of the text to read, as `calibration_tokens` says.
        path: the moments file to use, or to write and keep; None for one that is removed in the end.
        beside: where such a one is made: in a hidden folder beside this file.
        initial_state: as for `collect_moments`.
        progress: as for `collect_moments`.

    Raises:
        TokenizerError: there is a text and no tokenizer.
        InputError, NonFiniteError, ContainerError, OutputError: as `calibration_tokens` and `collect_moments`.
    """
    with ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(hidden_folder(beside))) / "moments"
        if text is None:
            with MomentsFile(path) as unfinished:
                unfinished.check_model(model_id)
                tokens = unfinished.tokens.copy()
        elif tokenizer is None:
            raise TokenizerError(
                "the model has no tokenizer, so it can read no text to calibrate on", remedy="give one (--tokenizer)"
            )
        else:
            tokens = calibration_tokens(text, tokenizer, n_tokens)
        check_output(path, overwrite=True)
        collect_moments(source, model_id, tokens, path, initial_state=initial_state, progress=progress)
        yield stack.enter_context(MomentsFile(path))


@torch.no_grad()
def collect_moments(
    source: Checkpoint,
    model_id: str,
    tokens: NDArray[np.int32],
    path: str | os.PathLike[str],
    *,
    initial_state: Mapping[str, NDArray[np.float32]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Read chunks of text and write the moments file, or go on with one that lacks some matrices.

    Args:
        source: the model.
        model_id: its id.
        tokens: int32 [chunks, `CHUNK_TOKENS`].
        path: the moments file.
        initial_state: a tuned state that every chunk begins with, or None.
        progress: called with a stage's name, the tokens read and all that have to be.

    Raises:
        NonFiniteError: the model gives NaN or infinity; the matrix is named.
        InputError: the file holds the moments of another model or text.
        ContainerError, OutputError: the file is damaged, or cannot be written.
    """
    done: list[str] = []
    start = _state_sha256(initial_state)
    if os.path.exists(path):
        with MomentsFile(path) as file:
            file.check_model(model_id)
            if file.initial_state != start:
                raise InputError(
                    "was calibrated with another initial state",
                    file=path,
                    place="SHA-256 of the state",
                    expected=start,
                    found=file.initial_state,
                    remedy="choose another name, or give the same state",
                )
            if file.tokens.shape != tokens.shape or (file.tokens != tokens).any():
                raise InputError(
                    "holds the moments of another text",
                    file=path,
                    place="tokens",
                    expected=_shown(tokens),
                    found=_shown(file.tokens),
                    remedy="choose another name, or use this file without a text",
                )
            done = file.done
    lacking = [rule for rule in multiplied(source.rules) if rule.name not in done]
    if not lacking:
        return
    weights = {rule.name: source.tensor(rule) for rule in source.rules if rule.kind not in (Kind.EMBEDDING, Kind.HEAD)}
    passes = list(_passes(lacking, max(MOMENTS_BYTES, sum(weight.nbytes for weight in weights.values()))))
    embedded = EmbeddedTokens(source, tokens)
    header = {"model_id": model_id, "initial_state": start}
    total, read = len(passes) * tokens.size, 0

    def advance(n_tokens: int) -> None:
        nonlocal read
        read += n_tokens
        if progress is not None:
            progress("calibrating", read, total)

    advance(0)
    for rules in passes:
        # Nothing of a pass is in memory during the next one.
        _append(path, header, tokens, done, _one_pass(source, weights, rules, embedded, tokens, initial_state, advance))
        done = [*done, *(rule.name for rule in rules)]


def _one_pass(
    source: Checkpoint,
    weights: Mapping[str, Tensor],
    rules: Sequence[TensorRule],
    embedded: EmbeddedTokens,
    tokens: NDArray[np.int32],
    initial_state: Mapping[str, NDArray[np.float32]] | None,
    advance: Callable[[int], None],
) -> dict[str, LayerInputs]:
    """What some matrices are given while all of the text is read."""
    apart = held_out_chunks(len(tokens))
    kept = np.delete(tokens, apart, axis=0)
    ops = RecordingOps(weights, [rule.name for rule in rules])
    sums = {rule.name: torch.zeros(rule.shape[1], rule.shape[1]) for rule in rules}
    for first in range(0, len(kept), _LANES):
        for name, rows in _read(source, ops, embedded, kept[first : first + _LANES], initial_state, advance):
            sums[name].addmm_(rows.T, rows)
    held: dict[str, list[Tensor]] = {rule.name: [] for rule in rules}
    for name, rows in _read(source, ops, embedded, tokens[apart], initial_state, advance):
        held[name].append(rows)
    for name, moments in sums.items():
        moments /= kept.size
        if not torch.isfinite(moments).all():
            raise NonFiniteError(
                "the squares of the model's activations are beyond float32",
                place=f"input of {name}",
                remedy="this checkpoint cannot be calibrated",
            )
    return {name: LayerInputs(moments, torch.cat(held.pop(name))) for name, moments in sums.items()}


def _state_sha256(state: Mapping[str, NDArray[np.float32]] | None) -> str | None:
    if state is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + b"\n" + np.ascontiguousarray(state[name], "<f4").tobytes())
    return digest.hexdigest()


def _shown(tokens: NDArray[np.int32]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
    return f"{tokens.size} tokens with SHA-256 {digest[:16]}…"


def _passes(rules: Sequence[TensorRule], limit_bytes: int) -> Iterator[list[TensorRule]]:
    """The matrices whose moments are in memory together, as often as it takes; one always is."""
    together: list[TensorRule] = []
    size_bytes = 0
    for rule in rules:
        own_bytes = 4 * rule.shape[1] ** 2
        if together and size_bytes + own_bytes > limit_bytes:
            yield together
            together, size_bytes = [], 0
        together.append(rule)
        size_bytes += own_bytes
    if together:
        yield together


def _read(
    source: Checkpoint,
    ops: RecordingOps,
    embedded: EmbeddedTokens,
    chunks: NDArray[np.int32],
    initial_state: Mapping[str, NDArray[np.float32]] | None,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Read chunks [lanes, tokens] side by side; each recorded matrix and what it was given, some tokens at a time."""
    state = fresh_state(source, len(chunks), initial_state)
    steps = max(1, _BLOCK_ROWS // len(chunks))
    for position in range(chunks.shape[1]):
        _, state = source.version.step(source.spec, ops, embedded.pieces(chunks[:, position]), state)
        advance(len(chunks))
        if (position + 1) % steps == 0 or position + 1 == chunks.shape[1]:
            for name in ops.seen:
                yield name, ops.take(name)


def _append(
    path: str | os.PathLike[str],
    header: Mapping[str, str | None],
    tokens: NDArray[np.int32],
    done: Sequence[str],
    inputs: Mapping[str, LayerInputs],
) -> None:
    """Write the moments file anew: what it holds already, and what was found now."""
    old = MomentsFile(path) if done else None
    try:
        sections = [Section.of("tokens", np.ascontiguousarray(tokens, "<i4").tobytes())]
        for name in done:
            for part in (f"{name}.moments", f"{name}.held_out"):
                assert old is not None
                view = old.container.section(part)
                sections.append(Section(part, view.nbytes, view, verify="check"))
        for name, (moments, held_out) in inputs.items():
            n_in = len(moments)
            size_bytes = 4 * (n_in * (n_in + 1) // 2)
            sections.append(Section(f"{name}.moments", size_bytes, _triangle(moments), verify="check"))
            content = np.ascontiguousarray(held_out.numpy(), "<f4").data.cast("B")
            sections.append(Section(f"{name}.held_out", content.nbytes, content, verify="check"))
        write_container(
            path,
            magic=MOMENTS_MAGIC,
            version=MOMENTS_VERSION,
            header={**header, "tensors": [*done, *inputs]},
            sections=sections,
            overwrite=bool(done),
        )
        del sections
    finally:
        if old is not None:
            old.close()


def _triangle(moments: Tensor) -> Iterator[bytes]:
    for row, numbers in enumerate(moments.numpy()):
        yield np.ascontiguousarray(numbers[row:], "<f4").tobytes()
