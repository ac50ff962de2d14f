"""Error feedback against its definition, and what it promises whatever the matrix and the inputs are."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from goslet.errors import QuantizationError, TensorValueError  # noqa: E402
from goslet.export import gptq  # noqa: E402
from goslet.export.calibration import LayerInputs  # noqa: E402
from goslet.export.gptq import Feedback, neighbours, output_errors, quantize_matrix, search_scales  # noqa: E402
from goslet.weights import (  # noqa: E402
    DIVISORS,
    INTEGER_RANGES,
    EncodedWeight,
    WeightFormat,
    decode,
    encode,
    encode_values,
    quantized_values,
)

INT4 = WeightFormat("int4", 32)
INT3 = WeightFormat("int3", 32)
FORMATS = (INT4, WeightFormat("int4", 128), WeightFormat("int8", 64), INT3)


def problem(n_out: int, n_in: int, seed: int, *, n_seen: int = 300, rank: int | None = None, scale: float = 1.0):
    """A matrix, and inputs that hang together as activations do: [n_seen, n_in] of a random covariance."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(n_out, n_in, generator=generator)
    mixing = torch.randn(rank or n_in, n_in, generator=generator) * torch.rand(n_in, generator=generator) ** 3
    seen = torch.randn(n_seen, len(mixing), generator=generator) @ mixing
    held_out = torch.randn(64, len(mixing), generator=generator) @ mixing
    return weight, LayerInputs(seen.T @ seen / n_seen, held_out)


def reference(
    weight: np.ndarray, scales: np.ndarray, moments: np.ndarray, order: np.ndarray, limits: tuple[int, int]
) -> np.ndarray:
    """The definition, in float64 and row by row: round a number, then let those that are left make up for the error.

    No Cholesky factor and no update of an inverse: with columns 1 … j rounded, the best values of the others solve the
    least squares problem min e·H·eᵀ outright. `scales` has one for each number.
    """
    integers = np.empty(weight.shape)
    for n, row in enumerate(weight):
        exact = np.clip((row / scales[n]).astype(np.float32), *limits)
        wanted = row.astype(np.float64)
        for position, column in enumerate(order):
            nearest = np.rint(wanted[column] / scales[n, column])
            integers[n, column] = np.clip(nearest, np.floor(exact[column]), np.ceil(exact[column]))
            done, left = order[: position + 1], order[position + 1 :]
            error = integers[n, done] * scales[n, done] - row[done]
            if len(left):
                change = np.linalg.solve(moments[np.ix_(left, left)], -moments[np.ix_(left, done)] @ error)
                wanted[left] = row[left] + change
    return integers


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("by_size", [False, True])
def test_integers_are_those_of_dense_least_squares(fmt: WeightFormat, by_size: bool) -> None:
    """Equal but for numbers half-way between two integers, of which rounding of float32 may turn one in a thousand."""
    weight, inputs = problem(12, 72, 1)
    damping = 0.05
    values, scales = Feedback(inputs.moments, damping, by_size).integers(weight, fmt)
    spread = np.repeat(scales.numpy().astype(np.float32), fmt.group_size, axis=1)[:, :72]
    moments = inputs.moments.double().numpy()
    damped = moments + damping * np.diag(moments).mean() * np.eye(72)
    order = np.argsort(-np.diag(inputs.moments.numpy()), kind="stable") if by_size else np.arange(72)
    expected = reference(weight.numpy(), spread, damped, order, INTEGER_RANGES[fmt.name])
    assert (values.numpy() == expected).mean() > 0.995
    assert (values.numpy() != np.clip(np.rint(weight.numpy() / spread), *INTEGER_RANGES[fmt.name])).mean() > 0.1


@settings(max_examples=15, deadline=None)
@given(
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 150),
    seed=st.integers(0, 10**6),
    rank=st.sampled_from([None, 1, 5]),
    fmt=st.sampled_from(FORMATS),
)
def test_no_row_is_worse_than_rounding_to_the_nearest_and_all_are_neighbours(
    n_out: int, n_in: int, seed: int, rank: int | None, fmt: WeightFormat
) -> None:
    weight, inputs = problem(n_out, n_in, seed, rank=rank)
    stored = quantize_matrix(weight, fmt, inputs, "w")
    nearest = encode(weight.numpy(), fmt, "w")
    moments = inputs.moments.double()
    after = output_errors(torch.from_numpy(decode(stored)).double() - weight, moments)
    before = output_errors(torch.from_numpy(decode(nearest)).double() - weight, moments)
    # Where moments are singular an error can vanish, up to what float32 makes of a sum of products.
    assert (after <= before + 1e-6 * (weight.double() @ moments * weight).sum(1)).all()
    found = neighbours(weight, stored)
    assert found.distance <= 1
    assert found.scale <= 1


def test_feedback_helps_where_inputs_hang_together() -> None:
    weight, inputs = problem(64, 256, 3, rank=64)
    stored = quantize_matrix(weight, INT4, inputs, "w")
    nearest = encode(weight.numpy(), INT4, "w")
    errors = [
        float(((torch.from_numpy(decode(w)) - weight) @ inputs.held_out.T).square().sum()) for w in (stored, nearest)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_same_inputs_give_the_same_bytes_however_rows_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem(40, 96, 4)
    first = quantize_matrix(weight, INT4, inputs, "w")
    again = quantize_matrix(weight, INT4, inputs, "w")
    assert first.data.tobytes() == again.data.tobytes()
    monkeypatch.setattr(gptq, "_PART_NUMBERS", 96 * 16)
    parted = quantize_matrix(weight, INT4, inputs, "w")
    # Products of other shapes are summed in another order; a number half-way may fall to the other side.
    assert (quantized_values(parted) == quantized_values(first)).mean() > 0.99


class TestScales:
    @pytest.mark.parametrize("fmt", [INT4, INT3], ids=str)
    def test_the_searched_scale_is_the_best_of_the_grid(self, fmt: WeightFormat) -> None:
        weight, _ = problem(5, 64, 5)
        importance = torch.rand(64, generator=torch.Generator().manual_seed(1))
        found = search_scales(weight, importance, fmt).double().numpy()
        groups, counted = weight.double().reshape(5, 2, 32).numpy(), importance.double().reshape(2, 32).numpy()
        for row in range(5):
            for group in range(2):
                numbers = groups[row, group]

                def cost(scale: float, numbers: np.ndarray = numbers, group: int = group) -> float:
                    error = np.clip(np.rint(numbers / scale), *INTEGER_RANGES[fmt.name]) * scale - numbers
                    return float((error**2 * counted[group]).sum())

                # int3's sign puts the largest number on the side of -4.
                largest = -numbers[np.abs(numbers).argmax()] if fmt == INT3 else np.abs(numbers).max()
                tried = [float(np.float16(largest / d)) for d in DIVISORS[fmt.name]]
                assert cost(found[row, group]) <= min(map(cost, tried)) * (1 + 1e-5)

    def test_an_outlier_that_does_not_count_is_clipped(self) -> None:
        weight = torch.linspace(-1, 1, 32)[None].clone()
        weight[0, 0] = 1.6
        importance = torch.ones(32)
        importance[0] = 0
        plain, searched = weight.abs().max() / 7, float(search_scales(weight, importance, INT4))
        assert searched < 0.75 * plain


class TestBadMoments:
    def test_inputs_that_are_always_zero(self) -> None:
        weight, inputs = problem(8, 64, 6)
        inputs.moments[5] = inputs.moments[:, 5] = 0
        inputs.held_out[:, 5] = 0
        stored = quantize_matrix(weight, INT4, inputs, "w")
        assert neighbours(weight, stored).distance <= 1

    def test_no_inputs_at_all_give_the_nearest_integers(self) -> None:
        weight, inputs = problem(8, 64, 7)
        stored = quantize_matrix(weight, INT4, LayerInputs(inputs.moments * 0, inputs.held_out * 0), "w")
        assert stored.data.tobytes() == encode(weight.numpy(), INT4, "w").data.tobytes()

    def test_moments_that_overfit_give_the_nearest_integers(self) -> None:
        """Where the inputs held out have nothing to do with the moments, feedback only adds noise."""
        weight, _ = problem(32, 64, 8)
        inputs = problem(1, 64, 9, rank=2)[1]
        other = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        stored = quantize_matrix(weight, INT4, LayerInputs(inputs.moments, other), "w")
        assert stored.data.tobytes() == encode(weight.numpy(), INT4, "w").data.tobytes()

    def test_moments_that_damping_has_to_mend_twice(self) -> None:
        """Rounding can leave moments with a negative eigenvalue below what the first damping adds."""
        weight, inputs = problem(8, 64, 10, rank=1)
        moments = inputs.moments - 0.05 * inputs.moments.diagonal().mean() * torch.eye(64)
        values, _ = Feedback(moments, 0.01, False).integers(weight, INT4)
        assert values.abs().max() <= 8

    def test_moments_of_another_matrix(self) -> None:
        weight, _ = problem(8, 64, 11)
        with pytest.raises(QuantizationError, match="another size"):
            quantize_matrix(weight, INT4, problem(8, 32, 11)[1], "w")

    def test_a_weight_that_is_not_finite(self) -> None:
        weight, inputs = problem(8, 64, 12)
        weight[3, 4] = torch.nan
        with pytest.raises(TensorValueError, match=r"w\[3, 4\]"):
            quantize_matrix(weight, INT4, inputs, "w")


class TestNeighbours:
    """What cannot have come of a matrix is told from what can, without the moments."""

    @pytest.fixture
    def sound(self) -> tuple[torch.Tensor, EncodedWeight]:
        weight, inputs = problem(64, 64, 13)
        return weight, quantize_matrix(weight, INT4, inputs, "w")

    def test_sound(self, sound: tuple[torch.Tensor, EncodedWeight]) -> None:
        found = neighbours(*sound)
        assert 0.5 < found.distance <= 1
        assert 0.5 < found.scale <= 1

    def test_another_matrix(self, sound: tuple[torch.Tensor, EncodedWeight]) -> None:
        weight, stored = sound
        for other in (weight.T.contiguous(), -weight, weight.flip(0), weight * 0, problem(64, 64, 14)[0]):
            found = neighbours(other, stored)
            assert found.distance > 2 or found.scale > 1

    @pytest.mark.parametrize("factor", [0.25, 4.0])
    def test_scales_that_hide_everything(self, factor: float, sound: tuple[torch.Tensor, EncodedWeight]) -> None:
        """Large ones turn all numbers to 0, small ones to the ends of the range, and each integer seems right."""
        weight, stored = sound
        assert stored.scales is not None
        scales = (stored.scales * np.float16(factor * (8 if factor > 1 else 1))).astype(np.float16)
        spread = np.repeat(scales.astype(np.float32), 32, axis=1)
        values = np.clip(np.rint(weight.numpy() / spread), -8, 7).astype(np.int8)
        found = neighbours(weight, encode_values(values, scales, INT4))
        assert found.distance <= 1 < found.scale

    def test_one_integer_off_by_two(self, sound: tuple[torch.Tensor, EncodedWeight]) -> None:
        weight, stored = sound
        values = quantized_values(stored)
        values[10, 20] += 2 if values[10, 20] < 0 else -2
        assert neighbours(weight, encode_values(values, stored.scales, INT4)).distance > 1

    @pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-6, 1e-5, 3e4])
    def test_numbers_at_the_ends_of_fp16(self, scale: float) -> None:
        weight, inputs = problem(8, 64, 15, scale=scale)
        weight[0] = 0
        found = neighbours(weight, quantize_matrix(weight, INT4, inputs, "w"))
        assert found.distance <= 1
        assert found.scale <= 1
