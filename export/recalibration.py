"""Recalibration: an engine's low-rank residuals improved from scalar sketches of what another engine's matrices give.

`sketch` reads a text with a reference engine and keeps, of the outputs y of every matrix and for every token, a few
scalars ψᵀy with random signs ψ, which a seed gives again: a file of some megabytes without a weight in it.
`recalibrate` reads the same text with a deployed engine. At a matrix stored as Q, given x̂, the scalars ψᵀy - ψᵀQ·x̂ are
sketches of the residual that is missing there, by the matrices ψ·x̂ᵀ; factorized gradient descent recovers it from them
(Wind 2023; `goslet.export.solvers.matrix_sensing`). Neither the checkpoint nor torch is needed, and besides the text's
activations a layer takes the memory of its factors, O(rank · (in + out)), of a batch of sketches, and of Q itself.

The solution is held to sketches that descent does not see: where it does not lessen what is left of them, a matrix
keeps the residual that it has. A residual that is truly of low rank, such as what a fine-tuned reference has over the
deployed engine, comes back from few sketches. What rounding takes is nearly of full rank, and then little can be gained
(tools/compensation.py measures both).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.native import NativeBackend
from ..container import Section, read_container, write_container
from ..enginefile import EngineFile, write_engine
from ..errors import ConvergenceError, HeaderError, InputError, NonFiniteError, TensorValueError, TokenizerError
from ..layerwise import Float32Array, LayerwiseReader
from ..output import check_output
from ..residuals import Residual, effective_weight, residual_of, with_residuals
from ..tokenizer import load_tokenizer
from ..weights import decode
from .calibration_text import CHUNK_TOKENS, calibration_tokens, held_out_chunks
from .solvers.matrix_sensing import Recovery, Sketches, recover

SKETCH_MAGIC = b"GOSLETSK"
SKETCH_VERSION = 1
SKETCHES_PER_TOKEN = 4
MAX_SKETCHES_PER_TOKEN = 256
MAX_SEED = 2**32 - 1

# Descent: the first step's sketches, by which it measures the matrix, those of the others, and those held out; how
# small it begins, how far and how often it steps. Found on the demonstration model: with half of the rate it comes less
# far, with twice of it matrices with heavy-tailed inputs diverge.
_FIRST_BATCH = 4096
_BATCH = 512
HELD_OUT_SKETCHES = 2048
_INIT = 0.03
_RATE = 0.1
_STEPS = 600
# What an input must be at least, as a part of the largest, in the root of the mean square.
_QUIET = 1e-2
_HEAD = "head.weight"
# Signs are made for so many tokens at once.
_SIGN_TOKENS = 256

Progress = Callable[[str, int, int], None]
FileName = str | os.PathLike[str]


@dataclass(frozen=True)
class SketchReport:
    """What `sketch` made: the file, its size, tokens read and matrices sketched."""

    path: Path
    size_bytes: int
    tokens: int
    matrices: int


@dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate` made.

    Attributes:
        path: the engine.
        matrices: how many have a low-rank residual and sketches.
        improved: how many of these have another one than before.
        before: what is left of the held-out sketches with the residuals that the engine had, as a part of what is
            without any, in the square, all matrices taken together.
        after: the same with the new ones.
        same_model: whether the reference is the same model in another quantization.
    """

    path: Path
    matrices: int
    improved: int
    before: float
    after: float
    same_model: bool


def sketch(
    reference: FileName,
    path: FileName,
    text: FileName,
    *,
    n_tokens: int,
    per_token: int = SKETCHES_PER_TOKEN,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SketchReport:
    """Write sketches of what a reference engine's matrices give on a text.

    Args:
        reference: an engine with a tokenizer, better than the one that is to be recalibrated.
        path: the sketch file to write.
        text: a UTF-8 text of the kind that the model will read.
        n_tokens: how many of its tokens, as `calibration_tokens` says.
        per_token: scalars for every token and matrix.
        seed: of the signs, 0 to `MAX_SEED`.
        overwrite: replace a file that exists.
        progress: called with a stage's name, the matrices done and all of them.

    Raises:
        TokenizerError: the engine has no tokenizer.
        InputError: the text cannot be used, or an argument is out of range.
        NonFiniteError: the engine gives NaN or infinity on the text.
        ContainerError, OutputError: the engine is damaged, or the file cannot be written.
    """
    for name, value, low, high in (
        ("sketches per token", per_token, 1, MAX_SKETCHES_PER_TOKEN),
        ("seed", seed, 0, MAX_SEED),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError("is out of range", place=name, expected=f"{low} to {high}", found=repr(value))
    check_output(path, overwrite)
    _check_apart(path, reference, text)
    with EngineFile.open(reference, check=True) as file:
        _check_runs(file)
        if file.tokenizer_kind is None:
            raise TokenizerError("has no tokenizer, so it can read no text", file=file.path, remedy="export with one")
        tokenizer = load_tokenizer(file.tokenizer_kind, file.tokenizer_bytes)
        tokens = calibration_tokens(text, tokenizer, n_tokens)
        names = _sketched(file)
        found: dict[str, NDArray[np.float32]] = {}

        def multiply(name: str, x: Float32Array) -> Float32Array:
            y: Float32Array = x @ effective_weight(file, name).T
            if name in names:
                found[name] = _applied(_signs(seed, name, tokens.size * per_token, y.shape[1]), y, per_token)
                _check_finite(found[name], name, "reference")
                if progress is not None:
                    progress("sketching", len(found), len(names))
            return y

        for _ in LayerwiseReader(file, tokens).steps(multiply):
            if len(found) == len(names):
                break
        sections = [Section.of("tokens", np.ascontiguousarray(tokens, "<i4").tobytes())]
        sections += [Section.of(name, values.astype("<f4").tobytes()) for name, values in found.items()]
        write_container(
            path,
            magic=SKETCH_MAGIC,
            version=SKETCH_VERSION,
            header={
                "model_id": file.model_id,
                "model": file.spec.to_json(),
                "seed": seed,
                "per_token": per_token,
                "tensors": list(found),
            },
            sections=sections,
            overwrite=overwrite,
        )
    return SketchReport(Path(path), os.path.getsize(path), tokens.size, len(found))


class SketchFile:
    """A sketch file, read and checked.

    Attributes:
        model_id: the reference's.
        model: its dimensions as JSON.
        seed: of the signs.
        per_token: scalars for every token and matrix.
        tokens: int32 [chunks, `CHUNK_TOKENS`].
        values: float32 [tokens · per_token] by matrix.

    Raises:
        ContainerError: the file cannot be read, is damaged or is not a sketch file.
    """

    def __init__(self, path: FileName) -> None:
        container = read_container(path, magic=SKETCH_MAGIC, version=SKETCH_VERSION, kind="sketch file")
        try:
            container.check()
            header = container.header
            self.path = os.fspath(path)
            self.model_id, self.model = header.get("model_id"), header.get("model")
            if not isinstance(self.model_id, str) or not re.fullmatch(r"[0-9a-f]{64}", self.model_id):
                raise self._wrong("model_id", "64 hex digits", repr(self.model_id)[:60])
            self.seed = self._number(header.get("seed"), "seed", 0, MAX_SEED)
            self.per_token = self._number(header.get("per_token"), "per_token", 1, MAX_SKETCHES_PER_TOKEN)
            section = container.section("tokens")
            if section.nbytes < 8 * CHUNK_TOKENS or section.nbytes % (4 * CHUNK_TOKENS):
                expected = f"a multiple of {4 * CHUNK_TOKENS} bytes, twice that or more"
                raise self._wrong("tokens", expected, f"{section.nbytes} bytes")
            self.tokens = np.frombuffer(section, "<i4").reshape(-1, CHUNK_TOKENS).copy()
            names = header.get("tensors")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise self._wrong("tensors", "a list of names", type(names).__name__)
            expected_bytes = 4 * self.tokens.size * self.per_token
            self.values: dict[str, NDArray[np.float32]] = {}
            for name in names:
                section = container.section(name)
                if section.nbytes != expected_bytes:
                    raise self._wrong(name, f"{expected_bytes} bytes", f"{section.nbytes} bytes")
                self.values[name] = np.frombuffer(section, "<f4").copy()
                if not np.isfinite(self.values[name]).all():
                    raise self._wrong(name, "finite numbers", "NaN or infinity")
        finally:
            container.close()

    def _number(self, value: object, place: str, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(place, f"{low} to {high}", repr(value)[:60])
        return value

    def _wrong(self, place: str, expected: str, found: str) -> HeaderError:
        return HeaderError(
            "is not what a sketch file holds",
            file=self.path,
            place=place,
            expected=expected,
            found=found,
            remedy="sketch again",
        )


def recalibrate(
    engine: FileName,
    sketches: FileName,
    path: FileName,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecalibrationReport:
    """Write an engine again with better low-rank residuals.

    Args:
        engine: an engine with low-rank residuals, which may be all zero (``goslet export --low-rank R:zero``).
        sketches: a sketch file of a reference of the same dimensions.
        path: the engine to write.
        overwrite: replace a file that exists.
        progress: called with a stage's name, the matrices done and all of them.

    Raises:
        InputError: the engine has no low-rank residual, or the sketches are of a model of other dimensions.
        NonFiniteError: the engine gives NaN or infinity on the text.
        ContainerError, OutputError: a file is damaged or cannot be written.
    """
    check_output(path, overwrite)
    _check_apart(path, engine, sketches)
    seen = SketchFile(sketches)
    with EngineFile.open(engine, check=True) as file:
        _check_runs(file)
        if file.spec.to_json() != seen.model:
            raise InputError(
                "holds sketches of a model of other dimensions",
                file=seen.path,
                remedy="sketch an engine of the same model, or of one that was tuned from it",
            )
        residuals = {name: residual for name in _sketched(file) if (residual := residual_of(file, name)) is not None}
        fitted = {name for name, residual in residuals.items() if residual.rank and name in seen.values}
        if not fitted:
            raise InputError(
                "has no low-rank residual that these sketches are of",
                file=file.path,
                remedy="export it with --low-rank, such as --low-rank 4:zero",
            )
        fits: dict[str, _Fit] = {}

        def multiply(name: str, x: Float32Array) -> Float32Array:
            if name not in fitted:
                return x @ effective_weight(file, name).T
            old = residuals[name]
            y: Float32Array = x @ replace(old, down=None, up=None).added_to(decode(file.weight(name))).T
            fits[name] = _fit(seen, name, x, y, old)
            residuals[name] = fits[name].residual
            if progress is not None:
                progress("recalibrating", len(fits), len(fitted))
            return y + fits[name].residual_outputs(x)

        for _ in LayerwiseReader(file, seen.tokens).steps(multiply):
            if len(fits) == len(fitted):
                break
        assert file.program_bytes is not None
        kind = file.tokenizer_kind
        write_engine(
            path,
            spec=file.spec,
            state_spec=file.state_spec,
            model_id=file.model_id,
            graph=bytes(file.graph_bytes),
            graph_info=file.graph_info,
            tensors=with_residuals(file, residuals),
            tokenizer=None if kind is None else (kind, bytes(file.tokenizer_bytes)),
            program=bytes(file.program_bytes),
            provenance={**file.provenance, "recalibrated": {"reference": seen.model_id, "tokens": seen.tokens.size}},
            overwrite=overwrite,
            initial_state=file.initial_state,
            chat=file.chat,
        )
        plain = sum(fit.plain for fit in fits.values()) or 1.0
        return RecalibrationReport(
            Path(path),
            matrices=len(fits),
            improved=sum(fit.after < fit.before for fit in fits.values()),
            before=sum(fit.before for fit in fits.values()) / plain,
            after=sum(fit.after for fit in fits.values()) / plain,
            same_model=seen.model_id == file.model_id,
        )


def _check_apart(path: FileName, *read: FileName) -> None:
    for name in read:
        if os.path.realpath(name) == os.path.realpath(path):
            raise InputError("is also what is read", file=path, place="output", remedy="choose another name")


def _check_runs(file: EngineFile) -> None:
    """Let the native backend refuse, by name, a program or a residual that is not sound; what follows trusts them."""
    NativeBackend(file, 1)


@dataclass(frozen=True)
class _Fit:
    """A residual, and the mean squares of held-out sketches without one, with the old one, and with it."""

    residual: Residual
    plain: float
    before: float
    after: float

    def residual_outputs(self, x: Float32Array) -> Float32Array:
        assert self.residual.down is not None and self.residual.up is not None
        outputs: Float32Array = np.asarray((x @ self.residual.down.T) @ self.residual.up.T, np.float32)
        return outputs


def _fit(seen: SketchFile, name: str, x: Float32Array, y: Float32Array, old: Residual) -> _Fit:
    """The best residual for one matrix: its inputs [N, in], what it gives without a low-rank one [N, out]."""
    assert old.down is not None and old.up is not None
    per_token = seen.per_token
    signs = _signs(seen.seed, name, len(x) * per_token, y.shape[1])
    values = seen.values[name] - _applied(signs, y, per_token)
    _check_finite(values, name, "engine")
    # Inputs differ in size by orders of magnitude, and descent is slowest along the small ones.
    # Inputs that hardly occur are left out: nothing is learned of them, and what descent began with would stay there.
    size = np.sqrt(np.mean(x * x, 0))
    quiet = size <= _QUIET * size.max()
    size[quiet] = 1
    scaled = np.where(quiet, np.float32(0), x / size)
    weights = token_weights(scaled)
    apart = np.zeros(seen.tokens.shape, bool)
    apart[held_out_chunks(len(seen.tokens))] = True
    is_held_out = np.repeat(apart.reshape(-1), per_token)
    rng = np.random.default_rng(seen.seed)

    def sketches(rows: NDArray[np.intp]) -> Sketches:
        return _sketches(_plus_minus(signs[rows], y.shape[1]), scaled[rows // per_token], values[rows])

    def batch(count: int) -> Sketches:
        rows = rng.choice(free, min(len(free), count), replace=False)
        weight = weights[rows // per_token]
        left = _plus_minus(signs[rows], y.shape[1])
        return _sketches(left, weight[:, None] * scaled[rows // per_token], weight * values[rows])

    free, held = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    # Half of those held out choose the step and the start, the other half judges.
    chosen = rng.choice(held, min(len(held) // 2 * 2, 2 * HELD_OUT_SKETCHES), replace=False)
    held_out, judges = (sketches(half) for half in np.split(chosen, 2))
    plain = float(np.mean(judges.values**2))
    before = _left(judges, old.up, old.down * size)
    # From small numbers, and from what is there, which descent could not leave if it were zero.
    starts: list[tuple[NDArray[Any], NDArray[Any]] | None] = [None]
    if old.up.any() and old.down.any():
        starts.append((old.up, old.down * size))
    best, least = old, before
    for start in starts if plain else ():
        try:
            found = descend(batch, old.rank, held_out, start, seen.seed)
            if start is None:
                found.right[:, quiet] = 0
            residual = _balanced(found, size, old)
        except (ConvergenceError, InputError, TensorValueError):  # diverged, nothing to learn, or beyond fp16
            continue
        assert residual.up is not None and residual.down is not None
        left = _left(judges, residual.up, residual.down * size)
        if left < least:
            best, least = residual, left
    return _Fit(best, plain, before, least)


def _sketches(left: Float32Array, right: Float32Array, values: Float32Array) -> Sketches:
    return Sketches(left.astype(np.float64), right.astype(np.float64), values.astype(np.float64))


def token_weights(inputs: Float32Array) -> Float32Array:
    """What the sketches of each token [N] count: those of inputs [N, in] larger than the mean less, lest they rule."""
    size = np.sqrt(np.mean(inputs * inputs, 1))
    weights: Float32Array = (1 / np.maximum(size, 1)).astype(np.float32)
    return weights


def descend(
    batch: Callable[[int], Sketches],
    rank: int,
    held_out: Sketches,
    start: tuple[NDArray[Any], NDArray[Any]] | None,
    seed: int,
) -> Recovery:
    """The factors that do best on the held-out sketches, of all that descent comes by.

    Args:
        batch: draws so many sketches.
        rank: of the factors.
        held_out: other sketches.
        start: factors to begin with; None for small random ones.
        seed: of these.

    Raises:
        ConvergenceError: it diverged.
        InputError: every sketch is zero.
    """
    return recover(
        lambda step: batch(_BATCH if step else _FIRST_BATCH),
        rank,
        held_out,
        init=_INIT,
        start=start,
        rate=_RATE,
        steps=_STEPS,
        patience=_STEPS,
        seed=seed,
    )


def _balanced(found: Recovery, size: Float32Array, old: Residual) -> Residual:
    """What was found as it will be stored, both factors alike in size."""
    left, right = found.left, found.right / size
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, sizes, v = np.linalg.svd(r_left @ r_right.T)
    roots = np.sqrt(sizes)
    up, down = (q_left @ u) * roots, roots[:, None] * (v @ q_right.T)
    return replace(old, up=up.astype(np.float32), down=down.astype(np.float32)).stored()


def _left(sketches: Sketches, up: NDArray[Any], down: NDArray[Any]) -> float:
    """The mean square of what is left of sketches with a residual."""
    predicted = np.sum((sketches.left @ up) * (sketches.right @ down.T), 1)
    return float(np.mean((sketches.values - predicted) ** 2))


def _sketched(file: EngineFile) -> set[str]:
    """The matrices of projections and channel mixes, which alone are called weights, but for embedding and head."""
    return {
        name
        for name, entry in file.tensors.items()
        if entry.layout != "rows" and name.endswith(".weight") and name != _HEAD
    }


def _signs(seed: int, name: str, count: int, n_out: int) -> NDArray[np.uint8]:
    """The signs of `count` sketches of a matrix's outputs: bits, uint8 [count, ceil(n_out / 8)].

    From the bit generator Philox, whose numbers NumPy promises never to change.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    n_bytes = -(-n_out // 8)
    words = np.random.Philox(key=key).random_raw(-(-count * n_bytes // 8))
    return words.astype("<u8").view(np.uint8)[: count * n_bytes].reshape(count, n_bytes)


def _plus_minus(bits: NDArray[np.uint8], n_out: int) -> Float32Array:
    signs = np.unpackbits(bits, axis=1, count=n_out).astype(np.float32)
    signs *= 2
    signs -= 1
    return signs


def _applied(signs: NDArray[np.uint8], y: Float32Array, per_token: int) -> NDArray[np.float32]:
    """ψᵀy of all sketches of outputs [N, out], float32 [N · per_token]."""
    values = np.empty(len(signs), np.float32)
    for first in range(0, len(y), _SIGN_TOKENS):
        part = y[first : first + _SIGN_TOKENS]
        rows = slice(first * per_token, (first + len(part)) * per_token)
        left = _plus_minus(signs[rows], y.shape[1]).reshape(len(part), per_token, -1)
        values[rows] = (left @ part[:, :, None]).reshape(-1)
    return values


def _check_finite(values: NDArray[np.float32], name: str, what: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"the {what} gives NaN or infinity on the text",
            place=f"outputs of {name}",
            remedy="check it with goslet verify, and try another text",
        )
