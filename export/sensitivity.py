"""What storing each tensor in each format would cost a model, in its own loss, before anything is chosen.

The loss is the mean divergence of the quantized model's next-token distribution from the model's own, in nats per
token. To second order an error δ of a matrix's outputs costs ½·δᵀFδ with the Fisher information F of these outputs. Of
that the diagonal is kept: the mean square of the gradient g of the loss with regard to each output, the next token
drawn from the model's own distribution. So a matrix with error rows e costs

    ½ · Σ_o mean(g_o²) · e_o·H·e_oᵀ

with the moments H of its inputs (`goslet.export.calibration`). The errors are those of the quantizer itself, with error
feedback, on some of the rows. Whatever hangs together between tensors, tokens and outputs is left out; the figures are
for comparing tensors, and their sum is no forecast.

A gradient goes back through `HORIZON` tokens at most: the memory for it grows with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spec import EMBEDDING
from ..weights import WeightFormat, decode, encode
from .calibration import EmbeddedTokens, MomentsFile, fresh_state, multiplied
from .checkpoint import Checkpoint
from .gptq import TRIED, Feedback, output_errors, spread
from .models.blocks import EagerOps
from .models.tensors import Kind, TensorRule

HORIZON = 32
SEED = 0

# Chunks whose last tokens are differentiated; 16 of them make 512 gradients for every output.
_CHUNKS = 16
# What autograd may hold at a time, and how many times the state's size it holds for a token.
_GRAPH_BYTES = 2 << 30
_STATES_PER_TOKEN = 6
# Rows of a matrix on which its errors are measured.
_ROWS = 256
_LARGEST_F16 = 65504.0

Progress = Callable[[str, int, int], None]
Losses = dict[str, dict[WeightFormat, float]]


class _GradientOps(EagerOps):
    """Adds up the squares of the gradients of every product's outputs."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.squares = {name: torch.zeros(len(w), dtype=torch.float64) for name, w in weights.items() if w.ndim == 2}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = super().linear(name, x)
        if y.requires_grad:
            y.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
        return y

    def _add(self, name: str, gradient: Tensor) -> None:
        self.squares[name] += gradient.double().square().sum(0)


def output_sensitivities(
    source: Checkpoint,
    tokens: NDArray[np.int32],
    *,
    initial_state: Mapping[str, NDArray[np.float32]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The mean square of the loss's gradient with regard to every output of every matrix.

    Args:
        source: the model.
        tokens: int32 [chunks, tokens], the text; the last `HORIZON` tokens of some chunks are used.
        initial_state: a tuned state that every chunk begins with, or None.
        progress: called with a stage's name, the tokens done and all of them.

    Returns:
        By name, float32 [out]; for the embedding by column of its rows. Nats squared per unit squared.
    """
    chunks = tokens[np.linspace(0, len(tokens) - 1, min(len(tokens), _CHUNKS)).round().astype(int)]
    weights = {rule.name: source.tensor(rule) for rule in source.rules if rule.kind is not Kind.EMBEDDING}
    embedded = EmbeddedTokens(source, chunks)
    ops = _GradientOps(weights)
    embedding_squares = torch.zeros(embedded.rows.shape[1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    step, spec = source.version.step, source.spec
    state = fresh_state(source, len(chunks), initial_state)
    warm = chunks.shape[1] - HORIZON
    with torch.no_grad():
        for position in range(warm):
            _, state = step(spec, ops, embedded.pieces(chunks[:, position]), state)
            if progress is not None:
                progress("measuring sensitivity", (position + 1) * len(chunks), chunks.size)
    lane_bytes = HORIZON * _STATES_PER_TOKEN * source.version.state_spec(spec).size_bytes
    lanes = max(1, _GRAPH_BYTES // lane_bytes)
    for first in range(0, len(chunks), lanes):
        part = chunks[first : first + lanes, warm:]
        current: Mapping[str, Tensor] = {name: tensor[first : first + lanes] for name, tensor in state.items()}
        rows, loss = [], torch.zeros(())
        for position in range(HORIZON):
            row = embedded.rows[embedded.places(part[:, position])].requires_grad_()
            rows.append(row)
            logits, current = step(spec, ops, embedded.split(row), current)
            drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)
            loss = loss + torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        for row in rows:
            assert row.grad is not None
            embedding_squares += row.grad.double().square().sum(0)
        if progress is not None:
            done = len(chunks) * warm + HORIZON * min(first + lanes, len(chunks))
            progress("measuring sensitivity", done, chunks.size)
    n_gradients = len(chunks) * HORIZON
    found = {name: (squares / n_gradients).float() for name, squares in ops.squares.items()}
    return {**found, EMBEDDING: (embedding_squares / n_gradients).float()}


def losses(
    source: Checkpoint,
    moments: MomentsFile,
    sensitivities: Mapping[str, Tensor],
    formats: Iterable[WeightFormat],
    *,
    progress: Progress | None = None,
) -> Losses:
    """What storing each matrix in each of some formats costs.

    Args:
        source: the model.
        moments: what calibration found.
        sensitivities: what `output_sensitivities` found.
        formats: the formats.
        progress: called with a stage's name, the matrices done and all of them.

    Returns:
        By name and format, nats per token; a format that cannot hold a matrix's numbers is absent.
    """
    formats = list(formats)
    rules = multiplied(source.rules)
    found = {EMBEDDING: _embedding_losses(source, moments.tokens, sensitivities[EMBEDDING], formats)}
    for index, rule in enumerate(rules):
        found[rule.name] = _matrix_losses(source, rule, moments, sensitivities[rule.name], formats)
        if progress is not None:
            progress("measuring errors", index + 1, len(rules))
    return found


def _matrix_losses(
    source: Checkpoint, rule: TensorRule, moments: MomentsFile, sensitivity: Tensor, formats: Iterable[WeightFormat]
) -> dict[WeightFormat, float]:
    weight = source.tensor(rule)
    inputs = moments.inputs(rule)
    tried = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).long()
    rows = weight[tried]
    feedback = Feedback(inputs.moments, *TRIED[-1])
    result = {}
    for fmt in formats:
        if fmt.is_integer:
            values, scales = feedback.integers(rows, fmt)
            error = values * spread(scales.float(), fmt, rows.shape[1]) - rows
        elif _holds(fmt, weight):
            error = torch.from_numpy(decode(encode(rows.numpy(), fmt, rule.name))) - rows
        else:
            continue
        cost = output_errors(error, inputs.moments).clamp_min(0) * sensitivity[tried]
        result[fmt] = 0.5 * float(cost.double().mean()) * len(weight)
    return result


def _embedding_losses(
    source: Checkpoint, tokens: NDArray[np.int32], sensitivity: Tensor, formats: Iterable[WeightFormat]
) -> dict[WeightFormat, float]:
    """A row of the embedding costs as often as its token occurs in the text."""
    embedded = EmbeddedTokens(source, tokens)
    counts = torch.bincount(embedded.places(tokens).reshape(-1), minlength=len(embedded.rows)).float()
    share = counts / counts.sum()
    result = {}
    for fmt in formats:
        if _holds(fmt, embedded.rows):
            error = torch.from_numpy(decode(encode(embedded.rows.numpy(), fmt, EMBEDDING))) - embedded.rows
            result[fmt] = 0.5 * float((error.square().T @ share * sensitivity).double().sum())
    return result


def _holds(fmt: WeightFormat, numbers: Tensor) -> bool:
    return fmt.name != "f16" or float(numbers.abs().max()) <= _LARGEST_F16
