"""Spending a budget of bits: what each tensor costs in each format, and what is bought."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.enginefile import TensorEntry  # noqa: E402
from goslet.errors import QuantizationError  # noqa: E402
from goslet.export.calibration import MomentsFile, collect_moments, multiplied  # noqa: E402
from goslet.export.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from goslet.export.models.blocks import EagerOps, token_pieces  # noqa: E402
from goslet.export.models.tensors import Kind, TensorRule  # noqa: E402
from goslet.export.quantize import MENU, Recipe, budget_recipe, check_budget  # noqa: E402
from goslet.export.sensitivity import losses, output_sensitivities  # noqa: E402
from goslet.spec import EMBEDDING  # noqa: E402
from goslet.weights import WeightFormat, decode, encode  # noqa: E402


def matrix(name: str, n_out: int, n_in: int) -> TensorRule:
    return TensorRule(name, (n_out, n_in), Kind.PROJECTION, (), lambda: None)  # type: ignore[arg-type, return-value]


RULES = (
    matrix("a", 64, 128),
    matrix("b", 256, 256),
    matrix("c", 8, 512),
    TensorRule("v", (256,), Kind.VECTOR, (), lambda: None),  # type: ignore[arg-type, return-value]
)
COUNT = sum(math.prod(rule.shape) for rule in RULES)


def size_bytes(rule: TensorRule, fmt: WeightFormat) -> int:
    entry = TensorEntry.placed(rule.name, fmt, rule.layout, rule.shape, 0)
    return entry.size_bytes + entry.scales_size_bytes


def bits_of(chosen: Recipe) -> float:
    return 8 * sum(size_bytes(rule, chosen.format_of(rule)) for rule in RULES) / COUNT


def loss_of(chosen: Recipe, costs: dict[str, dict[WeightFormat, float]]) -> float:
    return sum(costs[name][fmt] for name, fmt in chosen.by_name.items())


LOSSES = st.fixed_dictionaries(
    {name: st.lists(st.floats(0, 1), min_size=len(MENU), max_size=len(MENU)) for name in "abc"}
)


@settings(max_examples=60, deadline=None)
@given(numbers=LOSSES, bits=st.floats(3.6, 17))
def test_the_budget_is_kept_and_what_is_bought_is_nearly_the_best(numbers: dict, bits: float) -> None:
    """Against all choices there are.

    Until a step does not fit, greedy steps along convex hulls are the best for what they have spent, also among
    mixtures of formats; so what can be lost is less than what that one step would have saved.
    """
    costs = {name: dict(zip(MENU, values, strict=True)) for name, values in numbers.items()}
    try:
        chosen = budget_recipe(bits, RULES, costs)
    except QuantizationError:
        cheapest = {rule.name: min(MENU, key=lambda fmt, rule=rule: size_bytes(rule, fmt)) for rule in RULES[:3]}
        assert bits_of(Recipe("", {Kind.VECTOR: WeightFormat("f32")}, cheapest)) > bits  # type: ignore[arg-type]
        return
    assert bits_of(chosen) <= bits
    feasible = [
        loss_of(other, costs)
        for formats in itertools.product(MENU, repeat=3)
        if bits_of(other := Recipe("", chosen.by_kind, dict(zip("abc", formats, strict=True)))) <= bits
    ]
    one_step = max(max(values.values()) - min(values.values()) for values in costs.values())
    assert loss_of(chosen, costs) <= min(feasible) + one_step + 1e-9
    if bits >= 16.4:
        assert loss_of(chosen, costs) == pytest.approx(min(feasible))


def test_steps_that_save_most_for_their_bytes_come_first() -> None:
    costs = {name: dict.fromkeys(MENU, 0.0) for name in "abc"}
    lowest = bits_of(budget_recipe(16, RULES, costs))
    int8 = WeightFormat("int8", 128)
    for name, gain in (("a", 1.0), ("b", 2.0), ("c", 0.5)):
        for fmt in MENU[: MENU.index(int8)]:
            costs[name][fmt] = gain
    # a gains 1 for 5 KB, b 2 for 41 KB, c 0.5 for 2.5 KB: what can be bought for 7.7 KB are a and c.
    chosen = budget_recipe(lowest + 8 * 7900 / COUNT, RULES, costs)
    assert chosen.by_name == {"a": int8, "b": MENU[0], "c": int8}
    assert budget_recipe(16.5, RULES, costs).by_name == dict.fromkeys("abc", int8), "16 bits save nothing more"


def test_a_budget_below_the_least_says_what_the_least_is() -> None:
    costs = {name: dict.fromkeys(MENU, 0.0) for name in "abc"}
    least = bits_of(budget_recipe(16, RULES, costs))
    with pytest.raises(QuantizationError, match=rf"bits: cannot be met \(expected {least:.3f} or more .*found 3\)"):
        budget_recipe(3, RULES, costs)
    assert bits_of(budget_recipe(least + 1e-9, RULES, costs)) == pytest.approx(least)


def test_the_least_is_known_before_anything_is_measured() -> None:
    """The same least as that of `budget_recipe`, which knows what every format costs."""
    costs = {name: dict.fromkeys(MENU, 0.0) for name in "abc"}
    least = bits_of(budget_recipe(16, RULES, costs))
    check_budget(least + 1e-9, RULES)
    with pytest.raises(QuantizationError, match=rf"{least:.3f} or more"):
        check_budget(least - 1e-3, RULES)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (3, 256)).astype(np.int32)


class TestSensitivity:
    def test_the_heads_is_its_distributions_own(self, tiny_checkpoint: Path, tokens: np.ndarray) -> None:
        """The gradient with regard to a logit is p - [drawn], whose mean square is p·(1 - p) in expectation."""
        with open_checkpoint(tiny_checkpoint) as source:
            found = output_sensitivities(source, tokens)
            again = output_sensitivities(source, tokens)
            chances = np.exp(_log_chances(source, source.weights(), tokens))[:, -32:]
        assert all(torch.equal(found[name], again[name]) for name in found)
        expected = (chances * (1 - chances)).mean((0, 1)).sum()
        assert float(found["head.weight"].sum()) == pytest.approx(float(expected), rel=0.1)

    @pytest.mark.parametrize(
        ("make", "sizes"),
        [
            (random_rwkv4, {}),
            (partial(random_rwkv5, "5.2"), {"head_size": 16}),
            (random_rwkv6, {"head_size": 16, "rank_mix": 4, "rank_decay": 4}),
            (random_rwkv7, {"head_size": 16, "rank_w": 4, "rank_a": 4, "rank_g": 4, "rank_s": 4}),
        ],
        ids=["4", "5.2", "6", "7a"],
    )
    def test_every_version_can_be_calibrated_and_measured(
        self, make: Callable[..., dict[str, torch.Tensor]], sizes: dict, tokens: np.ndarray, tmp_path: Path
    ) -> None:
        save(make(n_layer=1, n_embd=32, vocab_size=256, **sizes), tmp_path / "x.pth")
        with open_checkpoint(tmp_path / "x.pth") as source:
            collect_moments(source, "0" * 64, tokens, tmp_path / "m")
            with MomentsFile(tmp_path / "m") as moments:
                costs = losses(source, moments, output_sensitivities(source, tokens), MENU)
        assert set(costs) == {rule.name for rule in source.rules if rule.is_matrix}
        assert all(math.isfinite(cost) and cost >= 0 for found in costs.values() for cost in found.values())
        assert all(any(found.values()) for found in costs.values())

    def test_they_tell_which_tensors_cost_most(self, tiny_checkpoint: Path, tokens: np.ndarray, tmp_path: Path) -> None:
        """Against the divergence itself, with one tensor after another in int4: the order is the same, nearly."""
        fmt = WeightFormat("int4", 128)
        with open_checkpoint(tiny_checkpoint) as source:
            collect_moments(source, source.model_id(), tokens, tmp_path / "m")
            with MomentsFile(tmp_path / "m") as moments:
                costs = losses(source, moments, output_sensitivities(source, tokens), MENU)
            weights = source.weights()
            own = _log_chances(source, weights, tokens[:, -24:])
            measured = {}
            names = [EMBEDDING, *(rule.name for rule in multiplied(source.rules)[::2])]
            for name in names:
                changed = torch.from_numpy(decode(encode(weights[name].numpy(), fmt, name)))
                found = _log_chances(source, {**weights, name: changed}, tokens[:, -24:])
                measured[name] = float((np.exp(own) * (own - found)).sum(-1).mean())
        finer = (MENU[0], fmt, *MENU[-2:])
        assert all(costs[name][low] > costs[name][high] for name in names for low, high in itertools.pairwise(finer))
        ranks = [np.argsort(np.argsort([values[name] for name in names])) for values in (
            measured, {name: costs[name][fmt] for name in names})]  # fmt: skip
        assert np.corrcoef(*ranks)[0, 1] > 0.8
        ratios = [costs[name][fmt] / measured[name] for name in names]
        assert 0.1 < np.median(ratios) < 10


@torch.no_grad()
def _log_chances(source: Checkpoint, weights: dict[str, torch.Tensor], tokens: np.ndarray) -> np.ndarray:
    """[lanes, tokens, vocabulary]"""
    state = {
        t.name: torch.full((len(tokens), *t.shape), t.init) for t in source.version.state_spec(source.spec).tensors
    }
    rows = []
    for column in torch.from_numpy(tokens).long().T:
        pieces = token_pieces(weights[EMBEDDING][column], source.spec)
        logits, state = source.version.step(source.spec, EagerOps(weights), pieces, state)
        rows.append(torch.log_softmax(logits.double(), -1))
    return torch.stack(rows, 1).numpy()
