"""Compensation: what is added to quantized matrices so that the model gives what it did before.

A matrix W [out, in] that is stored as Q leaves E = W - Q. Two residuals (`goslet.residuals`) can be put beside Q: a
low-rank one, and a sparse one of a few numbers for each output. What the matrix is given matters: in the quantized
model inputs are x̂, in the model itself x. So the text is read by both models at once, a step at a time
(`goslet.layerwise`), every matrix is compensated when its turn comes, and what follows it reads what it then gives.

Low-rank residuals of rank r, by ``method``:

- ``svd``: the best approximation of E, whatever the inputs are.
- ``weighted``: that of E on the model's own inputs: of E·H^½, H the mean of x·xᵀ, in closed form (as QERA: Zhang et al.
  2024, "QERA: an analytical framework for quantization error reconstruction").
- ``drift``: that of what is missing of the outputs, W·x - Q·x̂, as a function of x̂; the closed form of reduced-rank
  regression (Izenman 1975). It makes up for what the matrices before did, too.
- ``sensing``: the same from scalar sketches ψᵀ(W·x - Q·x̂) alone, by factorized gradient descent from a small start
  (Wind 2023; `goslet.export.solvers.matrix_sensing`), every step on new ones.
- ``zero``: nothing yet, but room for `goslet recalibrate`; needs no text.

Sparse residuals of k numbers an output:

- ``magnitude``: where |E| is largest.
- ``weighted``: where |E|·√mean(x̂²) is.
- ``l1``: where the lasso of E under H is not zero, on the way to more and more numbers.
- ``flow``: where the limit of a diagonal linear network's gradient flow is largest, which regresses each row of E from
  a few of the inputs (Wind, Antun, Hansen 2023; `goslet.export.solvers.diagonal_network`).

The numbers at these places are then the best ones under H of x̂, in closed form.

On the demonstration model (tools/compensation.py) ``weighted`` and ``magnitude`` gain most, and are what is taken where
nothing is said; at equal bits wider integers gain more than either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..enginefile import EngineFile
from ..errors import ConvergenceError, InputError, NonFiniteError, TensorValueError
from ..layerwise import Float32Array, LayerwiseReader
from ..residuals import Residual
from ..weights import decode
from .calibration import EmbeddedTokens
from .calibration_text import held_out_chunks
from .checkpoint import Checkpoint
from .models.tensors import Kind, TensorRule
from .recalibration import HELD_OUT_SKETCHES, descend, token_weights
from .solvers.diagonal_network import limit
from .solvers.matrix_sensing import Sketches

LOW_RANK_METHODS = ("svd", "weighted", "drift", "sensing", "zero")
SPARSE_METHODS = ("magnitude", "weighted", "l1", "flow")
# Which matrices are compensated: nearly all of a layer. The head and the LoRA are better stored in more bits.
COMPENSATED = (Kind.PROJECTION, Kind.CHANNEL_MIX)
SEED = 0

# What is added to the diagonal of H, as parts of its mean: a short text leaves it singular. That one is taken under
# which the outputs of held-out inputs come nearest.
_DAMPINGS = (0.001, 0.01, 0.1, 1.0)
# Sketches are whitened with this one: directions that hardly occur would be slow to learn.
_SKETCH_DAMPING = 0.1
# The lasso: rounds of descent (FISTA), and in how many steps its penalty falls.
_LASSO_STEPS = 60
_LASSO_PENALTIES = 6
# The diagonal network: its depth and start, and inputs per number that is sought.
_DEPTH = 3.0
_ALPHA = 0.1
_INPUTS_PER_NUMBER = 4

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compensation:
    """What is asked for.

    Attributes:
        rank: of low-rank residuals; 0 for none.
        low_rank: how they are found, one of `LOW_RANK_METHODS`.
        share: of a matrix's numbers that sparse residuals hold; 0 for none.
        sparse: how they are found, one of `SPARSE_METHODS`.

    Raises:
        InputError: a number is out of range, or a method unknown.
    """

    rank: int = 0
    low_rank: str = "weighted"
    share: float = 0.0
    sparse: str = "magnitude"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise InputError("is not a rank", place="low-rank residual", expected="a whole number", found=self.rank)
        if not 0 <= self.share < 0.5:
            raise InputError("is not a share", place="sparse residual", expected="0 to 0.5", found=self.share)
        if not self.rank and not self.share:
            raise InputError("asks for nothing", place="compensation", expected="a rank, a share, or both")
        for method, known in ((self.low_rank, LOW_RANK_METHODS), (self.sparse, SPARSE_METHODS)):
            if method not in known:
                raise InputError("is no such method", place="residual", expected=", ".join(known), found=repr(method))

    @property
    def needs_text(self) -> bool:
        """Whether a text is read."""
        return bool(self.share) or self.low_rank != "zero"

    def to_json(self) -> dict[str, Any]:
        """What the engine's provenance records."""
        low_rank = {"rank": self.rank, "low_rank": self.low_rank} if self.rank else {}
        return low_rank | ({"share": self.share, "sparse": self.sparse} if self.share else {})

    def kept_of(self, n_in: int) -> int:
        """Numbers that each output of a matrix with so many inputs keeps."""
        return max(1, round(self.share * n_in)) if self.share else 0

    def nothing(self, rule: TensorRule) -> Residual:
        """A residual of these dimensions that adds nothing."""
        n_out, n_in = rule.shape
        kept = self.kept_of(n_in)
        low = (np.zeros((self.rank, n_in), np.float32), np.zeros((n_out, self.rank), np.float32))
        sparse = (np.zeros((n_out, kept), np.float32), np.zeros((n_out, kept), np.int64))
        return Residual(*(low if self.rank else (None, None)), *(sparse if kept else (None, None)))

    def check(self, rule: TensorRule) -> None:
        """Refuse a rank that a matrix cannot have.

        Raises:
            InputError: it is larger than the matrix.
        """
        if self.rank >= min(rule.shape):
            raise InputError(
                "is not below a matrix's own sides",
                place="rank of low-rank residuals",
                expected=f"less than {min(rule.shape)} for {rule.name}",
                found=self.rank,
            )


def compensate(
    file: EngineFile,
    source: Checkpoint,
    tokens: NDArray[np.int32] | None,
    wanted: Compensation,
    progress: Progress | None = None,
) -> dict[str, Residual]:
    """Find residuals for an engine that has none.

    Args:
        file: the engine, with its matrices quantized.
        source: the checkpoint that it was made from.
        tokens: int32 [chunks, tokens], a text to read; some chunks are held out (`held_out_chunks`). None where
            `wanted` needs none.
        wanted: what is asked for.
        progress: called with a stage's name, the matrices done and all of them.

    Returns:
        By the matrix's name, as they will be stored. Memory is that of the text's activations at one step, twice.

    Raises:
        InputError: a rank is not below a matrix's sides.
        NonFiniteError: a model gives NaN or infinity on the text.
    """
    rules = {rule.name: rule for rule in source.rules}
    chosen = [rule for rule in source.rules if rule.kind in COMPENSATED]
    for rule in chosen:
        wanted.check(rule)
    if tokens is None:
        return {rule.name: wanted.nothing(rule) for rule in chosen}
    embedded = EmbeddedTokens(source, tokens)
    rows = embedded.rows[embedded.places(tokens).reshape(-1)].numpy()
    own, engine = LayerwiseReader(file, tokens, rows), LayerwiseReader(file, tokens)
    held_out = np.zeros(tokens.shape, bool)
    held_out[held_out_chunks(len(tokens))] = True
    given: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    found: dict[str, Residual] = {}

    def own_product(name: str, x: Float32Array) -> Float32Array:
        weight = source.tensor(rules[name])
        inputs = torch.from_numpy(x)
        y = inputs @ weight.T
        if rules[name] in chosen:
            if not torch.isfinite(y).all():
                raise NonFiniteError("the model gives NaN or infinity on the text", place=name)
            given[name] = weight, inputs, y
        return y.numpy()

    def engine_product(name: str, x: Float32Array) -> Float32Array:
        stored = torch.from_numpy(decode(file.weight(name)))
        inputs = torch.from_numpy(x)
        y = inputs @ stored.T
        if name not in given:
            return y.numpy()
        weight, own_inputs, own_outputs = given.pop(name)
        task = _Task(weight - stored, own_inputs, inputs, own_outputs - y, torch.from_numpy(held_out.reshape(-1)))
        try:
            found[name] = task.solve(wanted).stored()
        except TensorValueError:  # beyond fp16: the matrix is better left as it is
            found[name] = wanted.nothing(rules[name])
        if progress is not None:
            progress("compensating", len(found), len(chosen))
        return (inputs @ torch.from_numpy(found[name].added_to(stored.numpy())).T).numpy()

    for _ in zip(own.steps(own_product), engine.steps(engine_product), strict=True):
        if len(found) == len(chosen):
            break
    return found


class _Task:
    """One matrix: its error [out, in], what it is given in both models [N, in], what its outputs lack [N, out]."""

    def __init__(self, error: Tensor, own_inputs: Tensor, inputs: Tensor, missing: Tensor, held_out: Tensor) -> None:
        self.error = error
        self.own_inputs = own_inputs[~held_out]
        self.inputs, self.missing = inputs[~held_out], missing[~held_out]
        self.held_inputs, self.held_missing = inputs[held_out], missing[held_out]

    @cached_property
    def moments(self) -> Tensor:
        """H of the inputs in the quantized model, [in, in]."""
        return _moments(self.inputs)

    def solve(self, wanted: Compensation) -> Residual:
        residual = Residual()
        if wanted.share:
            residual = self._sparse(wanted.kept_of(self.error.shape[1]), wanted.sparse)
            added = torch.from_numpy(residual.added_to(np.zeros(self.error.shape, np.float32)))
            self.error = self.error - added
            self.missing = self.missing - self.inputs @ added.T
            self.held_missing = self.held_missing - self.held_inputs @ added.T
        if wanted.rank:
            down, up = self._low_rank(wanted.rank, wanted.low_rank)
            residual = Residual(down.numpy(), up.numpy(), residual.kept, residual.kept_inputs)
        return residual

    # ------------------------------------------------------------------------------------------------------- low rank

    def _low_rank(self, rank: int, method: str) -> tuple[Tensor, Tensor]:
        """down [rank, in] and up [out, rank]."""
        if method == "zero":
            return self._no_low_rank(rank)
        if method == "svd":
            return _truncated(self.error, rank)
        if method == "weighted":
            factor = _factor(_moments(self.own_inputs), _DAMPINGS[0])
            down, up = _truncated(self.error @ factor, rank)
            return torch.linalg.solve_triangular(factor, down, upper=False, left=False), up
        if method == "sensing":
            return self._by_sketches(rank)
        choices = [self._by_regression(rank, damping) for damping in _DAMPINGS]
        return min(choices, key=lambda choice: self._held_out_error(*choice))

    def _no_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(rank, self.error.shape[1]), torch.zeros(len(self.error), rank)

    def _held_out_error(self, down: Tensor, up: Tensor) -> float:
        return float((self.held_missing - (self.held_inputs @ down.T) @ up.T).square().mean())

    def _by_regression(self, rank: int, damping: float) -> tuple[Tensor, Tensor]:
        """argmin |missing - x̂·(up·down)ᵀ|²: with H = L·Lᵀ it is that of |L⁻¹·mean(x̂·missingᵀ) - Lᵀ·(up·down)ᵀ|²."""
        factor = _factor(self.moments, damping)
        cross = (self.inputs.T @ self.missing) / len(self.inputs)
        whitened = torch.linalg.solve_triangular(factor, cross, upper=False)
        down, up = _truncated(whitened.T, rank)
        return torch.linalg.solve_triangular(factor, down, upper=False, left=False), up

    def _by_sketches(self, rank: int) -> tuple[Tensor, Tensor]:
        """As `_by_regression`, but the outputs are only seen through sketches; the best of many steps, held out."""
        factor = _factor(self.moments, _SKETCH_DAMPING)
        rng = np.random.default_rng(SEED)

        def whitened(inputs: Tensor) -> Float32Array:
            rows: Float32Array = torch.linalg.solve_triangular(factor, inputs.T, upper=False).T.numpy()
            return rows

        def sketches(inputs: Float32Array, missing: Float32Array, count: int) -> Sketches:
            tokens = rng.integers(0, len(inputs), count)
            left = rng.standard_normal((count, missing.shape[1]))
            return Sketches(left, inputs[tokens].astype(np.float64), np.sum(left * missing[tokens], 1))

        inputs = whitened(self.inputs)
        weights = token_weights(inputs)[:, None]
        inputs, missing = inputs * weights, self.missing.numpy() * weights
        apart = sketches(whitened(self.held_inputs), self.held_missing.numpy(), HELD_OUT_SKETCHES)
        if not apart.values.any():
            return self._no_low_rank(rank)
        try:
            recovery = descend(lambda count: sketches(inputs, missing, count), rank, apart, None, SEED)
        except ConvergenceError:
            return self._no_low_rank(rank)
        down = torch.linalg.solve_triangular(factor, torch.from_numpy(recovery.right).float(), upper=False, left=False)
        return down, torch.from_numpy(recovery.left).float()

    # --------------------------------------------------------------------------------------------------------- sparse

    def _sparse(self, kept: int, method: str) -> Residual:
        if method == "magnitude":
            scores = self.error.abs()
        elif method == "weighted":
            scores = self.error.abs() * self.moments.diagonal().sqrt()
        elif method == "l1":
            scores = self._lasso(kept)
        else:
            scores = self._network(kept)
        inputs = scores.topk(kept, 1).indices.sort(1).values
        moments = _damped(self.moments, _DAMPINGS[0])
        # The best numbers at these places: of each row's normal equations the part that belongs to them.
        wanted = (self.error @ moments).gather(1, inputs)
        values = torch.cat([
            torch.linalg.solve(moments[places.unsqueeze(2), places.unsqueeze(1)], right)
            for places, right in zip(torch.split(inputs, 64), torch.split(wanted, 64), strict=True)
        ])  # fmt: skip
        return Residual(None, None, values.numpy(), inputs.numpy())

    def _lasso(self, kept: int) -> Tensor:
        """Scores [out, in]: the lasso of each row of the error under H, its penalty lowered until rows hold enough."""
        moments = self.moments
        if not moments.any():
            return self.error.abs()
        length = 1 / float(torch.linalg.matrix_norm(moments, 2))
        pull = self.error @ moments
        highest = pull.abs().amax(1, keepdim=True)
        solution = ahead = torch.zeros_like(self.error)
        scores = torch.zeros_like(self.error)
        for index in range(1, _LASSO_PENALTIES + 1):
            penalty = highest * 0.5**index
            momentum = 1.0
            for _ in range(_LASSO_STEPS):
                moved = ahead - length * (ahead @ moments - pull)
                before, solution = solution, moved.sign() * (moved.abs() - length * penalty).clamp_min(0)
                following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
                ahead = solution + (momentum - 1) / following * (solution - before)
                momentum = following
            # Earlier numbers come before later ones in every row.
            first = (scores == 0) & (solution != 0)
            scores = torch.where(first, (_LASSO_PENALTIES - index + 1) * 1e6 + solution.abs(), scores)
            if int((solution != 0).sum(1).min()) >= kept:
                break
        return scores

    def _network(self, kept: int) -> Tensor:
        """Scores [out, in]: the limit of the network's flow, which fits each row's outputs on a few inputs."""
        count = min(_INPUTS_PER_NUMBER * kept, self.error.shape[1] // 2, len(self.inputs))
        places = torch.linspace(0, len(self.inputs) - 1, count).long()
        seen = self.inputs[places].double().numpy()
        scores = []
        for row in self.error.double().numpy():
            try:
                scores.append(np.abs(limit(seen, seen @ row, _DEPTH, _ALPHA)))
            except ConvergenceError:
                scores.append(np.abs(row) * np.sqrt((seen**2).mean(0)))
        return torch.from_numpy(np.array(scores)).float()


def _moments(inputs: Tensor) -> Tensor:
    """The mean of x·xᵀ over inputs [N, in]: [in, in]."""
    return (inputs.T @ inputs) / len(inputs)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """The moments with so much of their mean, or of 1 where they are zero, added to the diagonal."""
    damped = moments.clone()
    damped.diagonal().add_(damping * (float(moments.diagonal().mean()) or 1.0))
    return damped


def _factor(moments: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of the moments with so much of their mean added to the diagonal, or more if need be."""
    if not torch.isfinite(moments).all():
        raise NonFiniteError("the squares of the engine's activations are beyond float32", place="compensation")
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(_damped(moments, damping))
        if not failed:
            return factor
        damping *= 10


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix [out, in] of a rank: down [rank, in] and up [out, rank], alike in size."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = sizes[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots
