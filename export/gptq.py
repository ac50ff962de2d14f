"""Quantizing a matrix by what its inputs are: scales that are searched, and errors that are fed back.

The error of a stored matrix Q in place of W is that of its outputs, the mean of |(W - Q)·x|² over the inputs x: for
every row e of W - Q it is e·H·eᵀ with the moments H = mean(x·xᵀ). Columns are rounded one after another, and what
rounding one of them costs is made up for, as well as can be, by those that are not rounded yet (Frantar et al., "GPTQ:
Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, after Hassibi and Stork's "Optimal
Brain Surgeon", 1993). Three things are our own:

- A number becomes one of the two integers beside it, as in AdaRound (Nagel et al. 2020): its group's scale is chosen
  first, and then no feedback moves it by a whole step. So a stored matrix can be held against the checkpoint's without
  the moments (`neighbours`).
- The order of columns and the damping (what is added to H's diagonal, as a short text leaves H singular) are chosen for
  each matrix on inputs that H has not seen, rounding to the nearest among the choices.
- Rows are independent, and one in which feedback has not helped keeps the nearest integers. So no row's error under H
  is above that of rounding to the nearest.

Groups stay where they are along the input axis whatever the order, so a scale is chosen from the original numbers of
its group, by the least error in which each number counts with its input's mean square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantizationError
from ..weights import (
    DIVISORS,
    INTEGER_RANGES,
    SIGNED_SCALES,
    EncodedWeight,
    WeightFormat,
    decode,
    encode,
    encode_values,
    quantized_values,
)
from .calibration import LayerInputs

# What is tried: the part of the mean of H's diagonal that is added to it, and whether columns go by size. The last is
# nearly always within a few percent of the best.
TRIED = ((0.1, False), (0.01, True), (0.1, True))

# Columns that are done before the rest of the matrix learns of their errors.
_BLOCK_COLUMNS = 32
# Numbers that are worked on at a time: what they need fits into some tens of megabytes.
_PART_NUMBERS = 1 << 22
# Rows on which order and damping are chosen.
_TRIED_ROWS = 256
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0
# A sum of K products in float32 is right to about this part of it: a row that gains less keeps the nearest integers.
_MARGIN = 1 - 1e-5
# What a column counts in the search for a scale where its input was always zero, as a part of the mean.
_LEAST_IMPORTANCE = 0.01


class Feedback:
    """Everything about feeding errors back that depends on the inputs alone.

    Args:
        moments: float32 [K, K], symmetric and positive semidefinite; singular where the text was short or an input is
            always zero, which damping mends. Where the damping is not enough for a Cholesky factor it is made ten times
            larger until it is.
        damping: the part of the diagonal's mean that is added to the diagonal; above 0.
        by_size: whether columns are rounded in the order of their inputs' mean squares, largest first, while there are
            still many to make up for their errors; else from the first to the last.
    """

    def __init__(self, moments: Tensor, damping: float, by_size: bool) -> None:
        diagonal = moments.diagonal()
        size = len(diagonal)
        self._importance = diagonal + _LEAST_IMPORTANCE * (diagonal.mean() or 1.0)
        self._order = torch.argsort(diagonal, descending=True, stable=True) if by_size else torch.arange(size)
        turned = moments[self._order.flip(0)][:, self._order.flip(0)].double()
        mean = float(turned.diagonal().abs().mean()) or 1.0
        while True:
            turned.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(turned)
            if not failed:
                break
            damping *= 10
        del turned
        # H = R·Rᵀ with R upper triangular, so H⁻¹ = UᵀU with U = R⁻¹: the factor that the errors are divided by.
        eye = torch.eye(size, dtype=torch.float64)
        self._factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float()

    def integers(self, weight: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
        """Quantize some rows.

        Args:
            weight: float32 [N, K].
            fmt: an integer format.

        Returns:
            The integers, int8 [N, K], and the scales, float16 [N, groups].
        """
        scales = search_scales(weight, self._importance, fmt)
        steps = spread(scales.float(), fmt, weight.shape[1]).T[self._order].contiguous()
        left = weight.T[self._order].contiguous()
        exact = (left / steps).clamp(*INTEGER_RANGES[fmt.name])
        low, high = exact.floor(), exact.ceil()
        del exact
        chosen = torch.empty_like(left)
        n_columns = len(left)
        for first in range(0, n_columns, _BLOCK_COLUMNS):
            last = min(first + _BLOCK_COLUMNS, n_columns)
            errors = torch.empty(last - first, left.shape[1])
            for column in range(first, last):
                nearest = torch.round(left[column] / steps[column])
                chosen[column] = nearest.clamp(low[column], high[column])
                row = self._factor[column]
                error = (left[column] - chosen[column] * steps[column]) / row[column]
                left[column + 1 : last].addr_(row[column + 1 : last], error, alpha=-1)
                errors[column - first] = error
            left[last:].addmm_(self._factor[first:last, last:].T, errors, alpha=-1)
        values = torch.empty(weight.shape, dtype=torch.int8)
        values[:, self._order] = chosen.T.to(torch.int8)
        return values, scales


def search_scales(weight: Tensor, importance: Tensor, fmt: WeightFormat) -> Tensor:
    """The scale of every group, of `goslet.weights.DIVISORS`, under which rounding to the nearest errs least.

    Args:
        weight: float32 [N, K].
        importance: float32 [K], what the square of a column's error counts.
        fmt: an integer format.

    Returns:
        float16 [N, groups], positive or of the sign that `goslet.weights.SIGNED_SCALES` says.
    """
    group = fmt.group_size
    n_rows, n_columns = weight.shape
    padding = fmt.groups(n_columns) * group - n_columns
    grouped = torch.nn.functional.pad(weight, (0, padding)).reshape(n_rows, -1, group)
    counted = torch.nn.functional.pad(importance, (0, padding)).reshape(-1, group)
    largest = grouped.abs().amax(-1)
    signs = torch.ones_like(largest)
    if fmt.name in SIGNED_SCALES:
        signs[grouped.amax(-1) == largest] = -1
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for divisor in DIVISORS[fmt.name]:
        scales = (largest / divisor).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().float() * signs
        steps = scales.unsqueeze(-1)
        error = torch.round(grouped / steps).clamp_(*INTEGER_RANGES[fmt.name]).mul_(steps).sub_(grouped).square_()
        total = torch.einsum("ngk,gk->ng", error, counted)
        best = torch.where(total < least, scales, best)
        least = torch.minimum(total, least)
    return best.half()


def output_errors(error: Tensor, moments: Tensor) -> Tensor:
    """The mean of (e·x)² for every row e of `error` [N, K], float32 [N], under the moments [K, K] of x."""
    return ((error @ moments) * error).sum(1)


def quantize_matrix(weight: Tensor, fmt: WeightFormat, inputs: LayerInputs, name: str) -> EncodedWeight:
    """Store a matrix so that its outputs err little on inputs like those that were seen.

    Args:
        weight: float32 [N, K].
        fmt: an integer format.
        inputs: what the matrix was given in calibration.
        name: the tensor's name, for errors.

    Returns:
        The stored matrix. No row's error under the moments is above that of `goslet.weights.encode`, and that is what
        is returned where feedback errs more on the inputs held out, or the moments are all zero.

    Raises:
        TensorValueError: a number is NaN, infinite or too large for the format.
        QuantizationError: the moments are not those of this matrix.
    """
    if inputs.moments.shape[0] != weight.shape[1]:
        raise QuantizationError(
            "the moments are of another size", place=name, expected=weight.shape[1], found=inputs.moments.shape[0]
        )
    nearest = encode(weight.numpy(), fmt, name)
    feedback = _choose(weight, nearest, fmt, inputs)
    if feedback is None:
        return nearest
    values = torch.from_numpy(quantized_values(nearest))
    assert nearest.scales is not None
    scales = torch.from_numpy(nearest.scales.copy())
    for rows in _row_parts(weight):
        part = weight[rows]
        before = spread(scales[rows].float(), fmt, weight.shape[1]).mul_(values[rows]).sub_(part)
        new_values, new_scales = feedback.integers(part, fmt)
        after = spread(new_scales.float(), fmt, weight.shape[1]).mul_(new_values).sub_(part)
        gained = output_errors(after, inputs.moments) < _MARGIN * output_errors(before, inputs.moments)
        values[rows] = torch.where(gained[:, None], new_values, values[rows])
        scales[rows] = torch.where(gained[:, None], new_scales, scales[rows])
    return encode_values(values.numpy(), scales.numpy(), fmt)


def _choose(weight: Tensor, nearest: EncodedWeight, fmt: WeightFormat, inputs: LayerInputs) -> Feedback | None:
    """The order and damping whose outputs err least on the inputs held out; None for rounding to the nearest."""
    if not inputs.moments.any():
        return None
    tried = torch.linspace(0, len(weight) - 1, min(len(weight), _TRIED_ROWS)).long()
    rows = weight[tried]

    def error(stored: Tensor) -> float:
        return float(((stored - rows) @ inputs.held_out.T).square().mean())

    best = None
    least = error(torch.from_numpy(decode(nearest))[tried])
    for damping, by_size in TRIED:
        feedback = Feedback(inputs.moments, damping, by_size)
        values, scales = feedback.integers(rows, fmt)
        found = error(spread(scales.float(), fmt, weight.shape[1]).mul_(values))
        if found < least:
            best, least = feedback, found
    return best


def spread(scales: Tensor, fmt: WeightFormat, n_columns: int) -> Tensor:
    """Scales float32 [N, groups] as one for each number, [N, K]."""
    return scales.repeat_interleave(fmt.group_size, 1)[:, :n_columns]


def _row_parts(weight: Tensor) -> Iterator[slice]:
    step = max(1, _PART_NUMBERS // weight.shape[1])
    for first in range(0, len(weight), step):
        yield slice(first, min(first + step, len(weight)))


@dataclass(frozen=True)
class NeighbourCheck:
    """How far a stored matrix is from what `quantize_matrix` could have made of a checkpoint's; see `neighbours`.

    Attributes:
        distance: the largest distance in steps between an integer and the original number; below 1 in a sound matrix.
        scale: the largest part by which a scale is above or below all that are tried; at most 1 in a sound matrix.
    """

    distance: float
    scale: float


def neighbours(original: Tensor, stored: EncodedWeight) -> NeighbourCheck:
    """Whether a stored matrix is a checkpoint's, without the moments that it was quantized with.

    Every integer is one of the two beside the original number in steps of its group's scale, once that is clipped to
    the format's range; and every scale, but for its sign, is the group's largest magnitude by one of
    `goslet.weights.DIVISORS`, rounded to fp16. The first alone would let a large scale turn everything to zero, and a
    small one everything to the range's ends. A matrix that is transposed, of another layer, or of another sign is
    several steps away somewhere.

    Args:
        original: float32 [N, K].
        stored: the matrix as integers.
    """
    assert stored.scales is not None
    fmt, group = stored.format, stored.format.group_size
    n_columns = original.shape[1]
    low, high = min(DIVISORS[fmt.name]), max(DIVISORS[fmt.name])
    values = torch.from_numpy(quantized_values(stored))
    scales = torch.from_numpy(stored.scales.astype(np.float32))
    distance = scale = 0.0
    for rows in _row_parts(original):
        steps = (original[rows] / spread(scales[rows], fmt, n_columns)).clamp(*INTEGER_RANGES[fmt.name])
        distance = max(distance, float((values[rows] - steps).abs().max()))
        padding = fmt.groups(n_columns) * group - n_columns
        grouped = torch.nn.functional.pad(original[rows], (0, padding)).reshape(len(steps), -1, group)
        largest = grouped.abs().amax(-1)
        # fp16 is exact to 2^-11, and to 2^-24 where it is subnormal. Numbers below all scales become 0 under any.
        most = largest / low * (1 + 2.0**-10) + _SMALLEST_SCALE
        least = largest / high * (1 - 2.0**-10) - _SMALLEST_SCALE
        sizes = scales[rows].abs()
        strain = torch.maximum(sizes / most, least / sizes)
        scale = max(scale, float(torch.where(largest < _SMALLEST_SCALE, 0.0, strain).max()))
    return NeighbourCheck(distance, scale)
