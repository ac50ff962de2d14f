#!/usr/bin/env python3
"""Measures whether the state may be kept in fewer bits between tokens: on long text, and on tasks that are all state.

    tools/state_precision.py --text FILE [--json OUT] [--report OUT.md]

Only what is stored between two tokens is rounded; the step itself computes in float32. The demonstration model reads
the text in four lanes from end to end, and tiny models, trained here, do the tasks of tools/state_tasks.py, on texts
longer than they were trained on. Everything is seeded and runs in a quarter of an hour of one core. What was
expected is in `predictions`, with what came out; it was written before anything was measured.

What came out otherwise: more decays than expected are next to 1, and losing them is a bias, not noise. With bf16 the
state's error grows sixfold along the text and the divergence thirtyfold, to hundreds of times that of f16, and
stochastic rounding, which loses no decay on average, is better than nearest in spite of its larger variance. A column's
scale is worse than a row's. The tasks stand more than expected, for the errors of a state's many numbers average out
where it is read.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from random_checkpoint import SHAPES
from state_formats import STORAGES, Storage, exact
from state_report import markdown
from state_tasks import TASKS, Task, answers_right, save, train
from torch import Tensor

from goslet.errors import GosletError
from goslet.export.checkpoint import Checkpoint, open_checkpoint
from goslet.export.models.blocks import EagerOps, Operator, token_pieces
from goslet.machine import available_cores, cpu_model
from goslet.spec import EMBEDDING
from goslet.tokenizer import tokenizer_from_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runtime/demo"
# A shift lives for one token, which no task depends on.
TASK_STORAGES = tuple(storage for storage in STORAGES if storage.shift is exact)
HALF_STEPS = {"bf16": 9, "f16": 12}  # 1 - w below two to minus this is lost to rounding whatever the number


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    Attributes:
        text_lanes: parts of the text that are read side by side.
        text_tokens: tokens of each, a multiple of 8.
        seeds: models trained for a task, at most.
        task_lanes: random texts of a task.
        task_lengths: where accuracy is measured, over the half before each; the last is what is read.
        train_steps: of each model; None for the task's own number.
    """

    text_lanes: int = 4
    text_tokens: int = 4096
    seeds: int = 3
    task_lanes: int = 16
    task_lengths: tuple[int, ...] = (64, 256, 1024, 2048, 4096)
    train_steps: int | None = None


class WatchingOps(EagerOps):
    """Runs a step, doubles removals where the task says so, and counts decays that are next to 1.

    Args:
        weights: as for `EagerOps`.
        lanes: the first so many are watched.
        reach: factor on the in-context learning rate that the recurrence is given.
    """

    def __init__(self, weights: dict[str, Tensor], lanes: int, reach: float) -> None:
        super().__init__(weights)
        self.decays = 0
        self.lost = dict.fromkeys(HALF_STEPS, 0)
        self._lanes, self._reach = lanes, reach

    def shares_lost(self) -> dict[str, float]:
        """The share of all decays that a format loses whole."""
        return {name: count / self.decays for name, count in self.lost.items()}

    def call(self, operator: Operator, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The recurrence."""
        r, w, k, v, kappa, a, state = inputs
        watched = 1 - w[: self._lanes]
        self.decays += watched.numel()
        for name, bits in HALF_STEPS.items():
            self.lost[name] += int((watched < 2.0**-bits).sum())
        return super().call(operator, r, w, k, v, kappa, self._reach * a, state)


@dataclass
class Reading:
    """Lanes of tokens read side by side, once for every storage.

    Attributes:
        source: the checkpoint.
        tokens: int64 [B, T].
        storages: S ways to keep the state.
        reach: see `state_tasks.Task`.
        seed: of stochastic rounding.
        largest: the largest magnitude that a WKV matrix of the first storage had.
        ops: what ran the steps.
    """

    source: Checkpoint
    tokens: Tensor
    storages: Sequence[Storage]
    reach: float = 1.0
    seed: int = 0
    largest: float = field(init=False)
    ops: WatchingOps = field(init=False)
    state: dict[str, Tensor] = field(init=False)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        """Logits [S, B, V], token by token."""
        version, spec, weights = self.source.version, self.source.spec, self.source.weights()
        lanes, copies = len(self.tokens), len(self.storages)
        generators = [torch.Generator().manual_seed(self.seed) for _ in self.storages]
        self.largest = 0.0
        self.ops = WatchingOps(weights, lanes, self.reach)
        state = {t.name: torch.full((copies * lanes, *t.shape), t.init) for t in version.state_spec(spec).tensors}
        for column in self.tokens.T:
            pieces = token_pieces(weights[EMBEDDING][column].repeat(copies, 1), spec)
            logits, state = version.step(spec, self.ops, pieces, state)
            for name, tensor in state.items():
                for i, storage in enumerate(self.storages):
                    part = tensor[i * lanes : (i + 1) * lanes]
                    part.copy_(storage.stored(name, part, generators[i]))
                if name.endswith(".wkv"):
                    self.largest = max(self.largest, float(tensor[:lanes].abs().max()))
            self.state = state
            yield logits.reshape(copies, lanes, -1)

    def state_errors(self) -> npt.NDArray[np.float64]:
        """The WKV matrices' distance from the first storage's, over their norm, all lanes and layers together [S]."""
        squares = np.zeros((2, len(self.storages)))
        for name, tensor in self.state.items():
            if name.endswith(".wkv"):
                each = tensor.double().reshape(len(self.storages), -1)
                squares[0] += (each - each[0]).square().sum(1).numpy()
                squares[1] += each[0].square().sum().item()
        return np.asarray(np.sqrt(squares[0] / squares[1]))


def measure_text(checkpoint: Path, tokenizer_path: Path, text: Path, sizes: Sizes) -> dict[str, Any]:
    """Bits per byte and divergence from float32, of the whole and of each eighth of the lanes' length."""
    torch.set_num_threads(1)  # the products are so small that threads would only wait for one another
    tokenizer = tokenizer_from_file(tokenizer_path)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    lanes, length = sizes.text_lanes, sizes.text_tokens
    stride = len(ids) // lanes  # the lanes are spread over the text
    targets = np.array([ids[i * stride : i * stride + length] for i in range(lanes)])
    tokens = np.concatenate([np.full((lanes, 1), tokenizer.end_token or 0), targets[:, :-1]], 1)
    eighths = np.array_split(np.arange(length), 8)
    n_bytes = [sum(len(tokenizer.decode_bytes(lane[part].tolist())) for lane in targets) for part in eighths]
    nats, divergence = (np.zeros((len(STORAGES), length)) for _ in range(2))
    errors = []
    with open_checkpoint(checkpoint) as source:
        reading = Reading(source, torch.from_numpy(tokens), STORAGES)
        for position, logits in enumerate(reading):
            # In float32, the divergence of f16 would drown in the rounding of probabilities.
            chances = torch.log_softmax(logits.double(), -1)
            wanted = torch.from_numpy(targets[:, position])[None, :, None].expand(len(STORAGES), -1, -1)
            nats[:, position] = -chances.gather(2, wanted).sum((1, 2)).numpy()
            own = chances[0]
            divergence[:, position] = (own.exp() * (own - chances)).sum((1, 2)).numpy()
            if position + 1 in [part[-1] + 1 for part in eighths]:
                errors.append(reading.state_errors())
                print(f"{position + 1} tokens of {length}", file=sys.stderr, flush=True)
    rows = []
    for i, storage in enumerate(STORAGES):
        bits = [float(nats[i, part].sum()) / math.log(2) for part in eighths]
        lost = [float(divergence[i, part].sum()) / math.log(2) / (len(part) * lanes) for part in eighths]
        rows.append(
            {
                "storage": storage.name,
                "bits_per_byte": sum(bits) / sum(n_bytes),
                "bits_per_byte_last_quarter": sum(bits[6:]) / sum(n_bytes[6:]),
                "divergence_bits_per_token": float(np.mean(lost)),
                "divergence_bits_per_token_last_quarter": float(np.mean(lost[6:])),
                "divergence_by_eighth": lost,
                "state_error_at_eighths": [float(error[i]) for error in errors],
            }
        )
    return {
        "lanes": lanes,
        "tokens_of_each": length,
        "bytes": sum(n_bytes),
        "largest": reading.largest,
        "share_of_decays_below_half_a_step": reading.ops.shares_lost(),
        "rows": rows,
        "cpu_s": round(time.process_time()),
    }


def measure_model(task: Task, seed: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Accuracy by storage and length of one trained model, on texts that all storages read alike."""
    began = time.process_time()
    path = folder / "task.pth"
    save(train(task, seed, sizes.train_steps), path)
    trained_s = time.process_time() - began
    longest = sizes.task_lengths[-1]
    tokens, answers = (
        torch.from_numpy(ids) for ids in task.draw(np.random.default_rng([1, seed]), sizes.task_lanes, longest)
    )
    with open_checkpoint(path) as source:
        reading = Reading(source, tokens, TASK_STORAGES, task.reach, seed)
        right = torch.stack([answers_right(logits, answers[:, t]) for t, logits in enumerate(reading)], 2)
    accuracies = [[float(lanes[:, n // 2 : n].nanmean()) for n in sizes.task_lengths] for lanes in right]
    found = {
        "seed": seed,
        "train_cpu_s": round(trained_s, 1),
        "accuracy": dict(zip((storage.name for storage in TASK_STORAGES), accuracies, strict=True)),
        "largest": reading.largest,
        "share_of_decays_below_half_a_step": reading.ops.shares_lost(),
    }
    print(f"{task.name}, seed {seed}: {accuracies[0]} in f32, {accuracies[2]} in bf16", file=sys.stderr, flush=True)
    return found


def state_sizes() -> list[dict[str, Any]]:
    """State bytes of a session at the released shapes by storage, beside the bytes of weights that a token reads."""
    measured = json.loads((ROOT / "tools/reports/bench-cpu.json").read_text(encoding="utf-8"))["shapes"]
    rows = []
    for name, shape in SHAPES.items():
        channels = shape["n_layer"] * shape["n_embd"]
        wkv, shifts = 64 * channels, 2 * channels
        row: dict[str, Any] = {
            "shape": name,
            "state_bytes": {
                storage.name: round(wkv * storage.bytes_per_wkv_number + shifts * storage.bytes_per_shift_number)
                for storage in STORAGES
            },
        }
        if name in measured:
            f32 = row["state_bytes"]["f32"]
            row["weight_bytes_per_token"] = {
                quant: measured[name]["contenders"][f"goslet {quant}"]["bytes_per_token"] - f32
                for quant in ("f16", "int8", "int4")
            }
        rows.append(row)
    return rows


def predictions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected before measuring and why, what was measured, and whether it holds."""
    found: list[dict[str, Any]] = []

    def predict(text: str, why: str, measured: float, bound: str, holds: bool) -> None:
        found.append({"prediction": text, "why": why, "measured": measured, "bound": bound, "holds": bool(holds)})

    def below(text: str, why: str, measured: float, limit: float) -> None:
        predict(text, why, measured, f"below {limit:g}", measured < limit)

    def within(text: str, why: str, measured: float, low: float, high: float) -> None:
        predict(text, why, measured, f"{low:g} to {high:g}", low <= measured <= high)

    text = {row["storage"]: row for row in report["text"]["rows"]}
    divergence: dict[str, float] = {name: row["divergence_bits_per_token"] for name, row in text.items()}
    row, column, head = (f"int8, scale a {what}" for what in ("row", "column", "head"))

    def ratio(one: str, other: str) -> float:
        return divergence[one] / max(divergence[other], 1e-12)

    for name, limit in (("bf16", 0.15), ("f16", 0.01)):
        share = report["text"]["share_of_decays_below_half_a_step"][name]
        why = f"1 - w below 2^-{HALF_STEPS[name]} rounds back to the old number; decays begin their training at 0.0025"
        below(f"share of decays that {name} loses whole", why, share, limit)
    below(
        "divergence with f16, bits per token",
        "errors of 0.02% a token add up over some hundred tokens to a fifth of int8 weights' errors, which cost 7e-5",
        divergence["f16"],
        1e-5,
    )
    why = "errors are 8 times as large, and divergence goes with their square"
    within("divergence, bf16 over f16", why, ratio("bf16", "f16"), 30, 130)
    why = "steps of the largest number / 127 are coarse for all numbers below it, 10 and more in squares"
    predict(f"divergence, {row}, over bf16", why, ratio(row, "bf16"), "above 5", ratio(row, "bf16") > 5)
    why = "the largest of 4096 numbers is further from the others than that of 64"
    predict("divergence, scale a head over scale a row", why, ratio(head, row), "above 2", ratio(head, row) > 2)
    why = "decays and removals work by columns, so that a column's scale takes them over"
    below("divergence, scale a column over scale a row", why, ratio(column, row), 1)
    why = "stochastic rounding has twice the variance, and there is little that nearest rounding loses whole"
    for name in ("bf16", row):
        within(f"divergence, {name}, stochastic over nearest", why, ratio(f"{name}, stochastic", name), 1, 3)
    why = "the model's own decays and removals forget rounding errors as they forget all else"
    for name in ("f16", "bf16", row):
        parts = text[name]["divergence_by_eighth"]
        last, second = sum(parts[6:]), max(sum(parts[2:4]), 1e-12)
        within(f"divergence with {name}, last quarter over second", why, last / second, 0.5, 2)
    for name, limit in (("f16", 1e-4), ("bf16", 1e-3)):
        more = abs(text[name]["bits_per_byte"] / text["f32"]["bits_per_byte"] - 1)
        below(f"bits per byte with {name}, relative change", "follows from the divergences", more, limit)
    why = "a shift is rounded once and then forgotten"
    below("divergence, f16 with shifts over without", why, ratio("f16, shifts too", "f16"), 3)

    tasks = {task["task"]: task for task in report["tasks"]}

    def lost(task: str, storage: str, at: int) -> float:
        means = tasks[task]["mean_accuracy"]
        return float(means["f32"][at] - means[storage][at])

    end = len(report["sizes"]["task_lengths"]) - 1
    entries, released, double, orders = (task.name for task in TASKS)
    worst = max(lost(entries, storage.name, end) for storage in TASK_STORAGES)
    why = "an entry is written anew every 16 tokens"
    below(f"{entries}: most accuracy lost by any storage, longest texts", why, worst, 0.01)
    why = "every 1 more than halves the number whose sign counts"
    below(f"{released}: accuracy in f32, next to longest", why, tasks[released]["mean_accuracy"]["f32"][end - 1], 0.6)
    worst = max(lost(orders, "f16", at) for at in range(end + 1))
    why = "errors of 0.02% a token add up to 1% after 4096 tokens, for nothing corrects a linear recurrence"
    below(f"{orders}: most accuracy lost by f16, any length", why, worst, 0.01)
    why = "a sign stands errors of the size of the number, and bf16's are a tenth after 4096 tokens"
    below(f"{double}: accuracy lost by bf16, longest texts", why, lost(double, "bf16", end), 0.01)
    why = "120 orders stand closer together than two signs, and bf16's errors are a tenth after 4096 tokens"
    loss = max(lost(orders, "bf16", at) for at in range(end + 1))
    predict(f"{orders}: most accuracy lost by bf16, any length", why, loss, "above 0.01", loss > 0.01)
    why = "int8's errors are several times those of bf16"
    more = max(lost(orders, row, at) - lost(orders, "bf16", at) for at in range(end + 1))
    predict(f"{orders}: most accuracy that {row} loses more than bf16", why, more, "above 0.05", more > 0.05)
    return found


def measure_task(number: int, sizes: Sizes) -> dict[str, Any]:
    """A task's models, and their mean accuracy by storage."""
    torch.set_num_threads(1)
    task = TASKS[number]
    with tempfile.TemporaryDirectory() as folder:
        seeds = [measure_model(task, seed, sizes, Path(folder)) for seed in range(min(task.seeds, sizes.seeds))]
    names = [storage.name for storage in TASK_STORAGES]
    return {
        "task": task.name,
        "chance": task.chance,
        "removal_factor": task.reach,
        "mean_accuracy": {name: np.mean([one["accuracy"][name] for one in seeds], 0).tolist() for name in names},
        "seeds": seeds,
        "cpu_s": round(time.process_time()),
    }


def make_report(checkpoint: Path, tokenizer_path: Path, text_path: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything that is measured, each part in a process of its own, as many at a time as there are cores."""
    context = multiprocessing.get_context("spawn")
    # One task for each process: what a part took is then what its process took.
    with ProcessPoolExecutor(available_cores(), mp_context=context, max_tasks_per_child=1) as pool:
        text = pool.submit(measure_text, checkpoint, tokenizer_path, text_path, sizes)
        tasks = [pool.submit(measure_task, number, sizes) for number in range(len(TASKS))]
        report: dict[str, Any] = {
            "machine": {"cpu": cpu_model(), "cores": available_cores()},
            "sizes": asdict(sizes),
            "checkpoint": checkpoint.name,
            "text_file": text_path.name,
            "text": text.result(),
            "tasks": [task.result() for task in tasks],
        }
    report["state_sizes"] = state_sizes()
    report = json.loads(json.dumps(report))  # as it is when it is read from the file: without tuples
    report["predictions"] = predictions(report)
    return report


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> int:
    """The command line, with other sizes where they are given; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text that the model was not trained on")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "rwkv7-demo.pth")
    parser.add_argument("--tokenizer", type=Path, default=DEMO / "tokenizer.json")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    parser.add_argument("--report", type=Path, metavar="OUT", help="write what is printed to this file too")
    options = parser.parse_args(arguments)
    sizes = sizes or Sizes()
    for output in (options.json, options.report):
        if output and not output.parent.is_dir():
            parser.error(f"{output}: there is no folder {output.parent}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.text}: cannot be read: {error}")
    try:
        count = len(tokenizer_from_file(options.tokenizer).encode(text))
        with open_checkpoint(options.checkpoint):
            pass
    except GosletError as error:
        parser.error(str(error))
    needed = sizes.text_lanes * sizes.text_tokens
    if count < needed:
        parser.error(f"{options.text}: at least {needed} tokens are needed, found {count}")
    try:
        report = make_report(options.checkpoint, options.tokenizer, options.text, sizes)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    lines = "\n".join(markdown(report)) + "\n"
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.report:
        options.report.write_text(lines, encoding="utf-8")
    print(lines, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
