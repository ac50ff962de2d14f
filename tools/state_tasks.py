"""Tasks whose answer is a state, and tiny RWKV-7s trained on them in a minute each, for tools/state_precision.py.

A text begins with token 0; every later token changes what must be remembered, and asks for it. Such a text has an end
only where the model's memory fails, so accuracy against length shows what rounding does to it.

What one step of RWKV-7 multiplies its state with is diag(w) - k_hat (k_hat * a)^T. This is similar to a symmetric
matrix, by the square roots of a, and so has real eigenvalues above min w - max a > 0.545 - 1: a sign can be turned only
at the price of more than half of its size, and soon nothing is left of it. Parity and permutations need an eigenvalue
of -1, which a removal twice as large has (Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative
Eigenvalues"). `Task.reach` says which is trained; the recurrence's operator is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from demo_model import Block, DemoConfig, DemoModel
from torch import Tensor
from torch.nn import functional
from train_demo import make_pieces, schedule

Ids = npt.NDArray[np.int64]
Draw = Callable[[np.random.Generator, int, int], tuple[Ids, Ids]]

NOTHING_ASKED = -100
STEP_TOKENS = 2048  # of all lanes together, in one step of training
# Each for an equal share of the steps: what is learned on short texts makes longer ones learnable.
LENGTHS = (8, 16, 32, 64, 64, 128, 256, 512, 1024, 2048)
STATE_PENALTY = 1e-3  # the norm behind the state hides its size, which could else grow until it overflows
LEARNING_RATE = 0.02


def parity(rng: np.random.Generator, lanes: int, length: int) -> tuple[Ids, Ids]:
    """Random bits (1 and 2); asked at each: whether the ones so far are odd."""
    bits = rng.integers(0, 2, (lanes, length))
    bits[:, 0] = 0
    tokens = bits + 1
    tokens[:, 0] = 0
    return tokens, np.cumsum(bits, 1) % 2


def swaps(items: int) -> Draw:
    """Swaps of two of `items` items (1 and up); asked at each: which of their orders it leads to."""
    orders = list(itertools.permutations(range(items)))
    number = {order: i for i, order in enumerate(orders)}
    after = np.empty((items * (items - 1) // 2, len(orders)), np.int64)
    for swap, (one, two) in enumerate(itertools.combinations(range(items), 2)):
        for i, order in enumerate(orders):
            moved = list(order)
            moved[one], moved[two] = moved[two], moved[one]
            after[swap, i] = number[tuple(moved)]

    def draw(rng: np.random.Generator, lanes: int, length: int) -> tuple[Ids, Ids]:
        chosen = rng.integers(0, len(after), (lanes, length))
        answers = np.zeros((lanes, length), np.int64)
        for t in range(1, length):
            answers[:, t] = after[chosen[:, t], answers[:, t - 1]]
        tokens = chosen + 1
        tokens[:, 0] = 0
        return tokens, answers

    return draw


def table(entries: int) -> Draw:
    """A table of `entries` numbers below `entries`, all 0 at first. Half of the tokens write a number, half ask one."""

    def draw(rng: np.random.Generator, lanes: int, length: int) -> tuple[Ids, Ids]:
        entry, value = rng.integers(0, entries, (2, lanes, length))
        asks = rng.random((lanes, length)) < 0.5
        tokens = 1 + np.where(asks, entries * entries + entry, entries * entry + value)
        tokens[:, 0] = 0
        answers = np.full((lanes, length), NOTHING_ASKED)
        now, lane = np.zeros((lanes, entries), np.int64), np.arange(lanes)
        for t in range(1, length):
            answers[:, t] = np.where(asks[:, t], now[lane, entry[:, t]], NOTHING_ASKED)
            now[lane, entry[:, t]] = np.where(asks[:, t], now[lane, entry[:, t]], value[:, t])
        return tokens, answers

    return draw


@dataclass(frozen=True)
class Task:
    """What a tiny model is trained on.

    Attributes:
        name: in tables.
        draw: makes tokens and answers, both int64 [lanes, length], `NOTHING_ASKED` where nothing is.
        vocabulary: tokens or answers, whichever are more.
        chance: the accuracy of guessing.
        reach: 1 for RWKV-7 as released, 2 for removals twice as large.
        steps: of training.
        seeds: models that are trained.
    """

    name: str
    draw: Draw
    vocabulary: int
    chance: float
    reach: float
    steps: int
    seeds: int = 3


TASKS = (
    Task("table of 8, as released", table(8), 73, 1 / 8, 1, 250),
    Task("parity, as released", parity, 3, 1 / 2, 1, 400, seeds=1),
    Task("parity, double removal", parity, 3, 1 / 2, 2, 400),
    Task("swaps of 5, double removal", swaps(5), 120, 1 / 120, 2, 540),
)


def train(task: Task, seed: int, steps: int | None = None) -> DemoModel:
    """A model of one layer, width 64 and two heads of 32, trained on texts of up to 2048 tokens from a zero state."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = DemoModel(
        DemoConfig(task.vocabulary, width=64, layers=1, head=32, rank_w=16, rank_a=16, rank_v=16, rank_g=16)
    )
    for block in model.blocks:
        cast(Block, block).att.reach = task.reach
    pieces = make_pieces(model, LEARNING_RATE, LEARNING_RATE / 4)
    steps = steps or task.steps
    for step in range(steps):
        length = LENGTHS[step * len(LENGTHS) // steps]
        lanes = STEP_TOKENS // length
        tokens, answers = (torch.from_numpy(ids) for ids in task.draw(rng, lanes, length))
        logits, state = model(tokens, model.zero_state(lanes), min(length, 32))
        loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=NOTHING_ASKED)
        model.zero_grad()
        (loss + STATE_PENALTY * state.wkv.square().mean()).backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        if not math.isfinite(norm):  # a state that overflowed teaches nothing
            continue
        grads = {name: grad / max(1.0, norm) for name, grad in grads.items()}
        for piece in pieces:
            piece.step(grads, schedule((step + 1) / steps, 0.05, 0.4), step + 1)
    return model


def save(model: DemoModel, path: Path) -> None:
    """Write the model as a checkpoint, float32."""
    torch.save({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, path)


def answers_right(logits: Tensor, answers: Tensor) -> Tensor:
    """float32 [.., L]: 1 where the largest logit is the answer, 0 where not, NaN where nothing was asked."""
    return torch.where(answers == NOTHING_ASKED, torch.nan, (logits.argmax(-1) == answers).float())
