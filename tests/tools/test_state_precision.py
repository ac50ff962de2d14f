"""The formats round as they say, the tasks' answers are right, and the report follows from its numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the tool steps in torch")

import state_formats  # noqa: E402
import state_precision  # noqa: E402
import state_report  # noqa: E402
import state_tasks  # noqa: E402
from demo_model import Block, DemoConfig, DemoModel  # noqa: E402
from state_formats import Int8  # noqa: E402

from goslet.export.checkpoint import open_checkpoint  # noqa: E402

TOOLS = Path(state_precision.__file__).parent
REPORT = TOOLS / "reports/state-precision.json"
SMALL = state_precision.Sizes(2, 16, seeds=1, task_lanes=2, task_lengths=(8, 16), train_steps=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the tool has it; the tests after these get theirs back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def numbers(*shape: int) -> torch.Tensor:
    """Both signs, magnitudes over ten powers of two."""
    return torch.randn(shape, generator=generator()) * torch.exp2(torch.randint(-5, 5, shape, generator=generator()))


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "digits"), [("f16", 11), ("bf16", 8)])
def test_nearest_rounding_errs_by_half_a_step_and_loses_small_decays(name: str, digits: int) -> None:
    stored = getattr(state_formats, name)
    x = numbers(1000)
    found = stored(x, generator())
    assert torch.all((found - x).abs() <= x.abs() * 2.0**-digits)
    assert not torch.equal(found, x)
    # A quarter of the smallest step, relative to the number, changes nothing; two of the largest do.
    assert torch.equal(stored(found * (1 - 2.0 ** -(digits + 2)), generator()), found)
    assert torch.all(stored(found * (1 - 2.0 ** -(digits - 2)), generator()).abs() < found.abs())


def test_stochastic_rounding_gives_one_of_two_neighbours_and_is_right_on_average() -> None:
    x = numbers(50)
    below = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    found = state_formats.bf16_stochastic(x.expand(4000, 50), generator())
    assert torch.all((found == below) | (found == above))
    # A mean of 4000 has a standard deviation of at most half a step over sqrt(4000); 50 means stay within six of them.
    assert torch.all((found.double().mean(0) - x).abs() < 6 * (above - below).abs() / 2 / 4000**0.5)
    assert torch.equal(state_formats.bf16_stochastic(below, generator()), below)


@pytest.mark.parametrize("shared", [(-1,), (-2,), (-1, -2)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_int8_has_one_scale_for_the_axes_it_says(shared: tuple[int, ...], stochastic: bool) -> None:
    x = numbers(3, 2, 8, 16)
    x[0, 0, 0] = x[0, 1, :, 3] = x[1, 0] = 0
    found = Int8(shared, stochastic)(x, generator())
    step = x.abs().amax(shared, keepdim=True) / 127
    # fp16 scales err by 2^-11, which 127 steps multiply.
    limit = (1.0 if stochastic else 0.5) + 127 * 2.0**-11
    assert torch.all((found - x).abs() <= limit * step)
    assert torch.all(found[x == 0].abs() == 0)
    scale = step.half().float()
    steps = found / torch.where(scale == 0, 1.0, scale)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.abs().max() <= 127.001


def test_a_storage_rounds_shifts_only_where_it_says() -> None:
    x = numbers(2, 64)
    by_name = {storage.name: storage for storage in state_formats.STORAGES}
    assert torch.equal(by_name["bf16"].stored("0.att_shift", x, generator()), x)
    assert torch.equal(by_name["bf16, shifts too"].stored("0.ffn_shift", x, generator()), x.bfloat16().float())
    assert torch.equal(by_name["bf16"].stored("0.wkv", x, generator()), x.bfloat16().float())


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_a_slow_reading() -> None:
    tokens, answers = state_tasks.parity(np.random.default_rng(0), 3, 40)
    for lane, found in zip(tokens, answers, strict=True):
        assert lane[0] == 0 and set(lane[1:]) == {1, 2}
        assert found.tolist() == [int((lane[1 : t + 1] == 2).sum()) % 2 for t in range(40)]

    pairs = list(itertools.combinations(range(5), 2))
    orders = list(itertools.permutations(range(5)))
    tokens, answers = state_tasks.swaps(5)(np.random.default_rng(0), 3, 40)
    for lane, found in zip(tokens, answers, strict=True):
        order = list(range(5))
        for token, answer in zip(lane, found, strict=True):
            if token:
                one, two = pairs[token - 1]
                order[one], order[two] = order[two], order[one]
            assert orders[answer] == tuple(order)

    tokens, answers = state_tasks.table(8)(np.random.default_rng(0), 3, 200)
    for lane, found in zip(tokens, answers, strict=True):
        values: dict[int, int] = {}
        for token, answer in zip(lane[1:] - 1, found[1:], strict=True):
            if token < 64:
                values[token // 8] = token % 8
                assert answer == state_tasks.NOTHING_ASKED
            else:
                assert answer == values.get(token - 64, 0)


def test_only_a_double_removal_turns_signs() -> None:
    rng = np.random.default_rng(1)
    least = {1: 0.0, 2: 0.0}
    for _ in range(300):
        kappa = rng.standard_normal(4) ** 3
        kappa /= np.linalg.norm(kappa)
        w, a = np.exp(-np.exp(-0.5) * rng.random(4) ** 3), rng.random(4) ** 0.1
        for reach in least:
            values = np.linalg.eigvals(np.diag(w) - reach * np.outer(kappa, kappa * a))
            assert np.abs(values.imag).max() < 1e-6
            least[reach] = min(least[reach], float(values.real.min()))
    assert least[1] > -0.455
    assert least[2] < -0.9


def test_the_step_doubles_the_removal_as_training_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DemoModel(DemoConfig(vocab=9, width=32, layers=2, head=16, rank_w=4, rank_a=4, rank_v=4, rank_g=4))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    state_tasks.save(model, tmp_path / "x.pth")
    tokens = torch.randint(9, (3, 20))
    with open_checkpoint(tmp_path / "x.pth") as source, torch.no_grad():
        for reach in (1.0, 2.0):
            for block in model.blocks:
                cast(Block, block).att.reach = reach
            expected = model(tokens, model.zero_state(3), 0)[0]
            reading = state_precision.Reading(source, tokens, state_formats.STORAGES[:1], reach)
            found = torch.stack([logits[0] for logits in reading], 1)
            # float32's own rounding over 20 tokens; the other factor is further off than 0.01.
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8"))
    return found


def test_words_and_predictions_follow_from_the_numbers(report: dict[str, Any]) -> None:
    assert report["predictions"] == json.loads(json.dumps(state_precision.predictions(report)))
    assert report["state_sizes"] == json.loads(json.dumps(state_precision.state_sizes()))
    assert REPORT.with_suffix(".md").read_text(encoding="utf-8").splitlines() == list(state_report.markdown(report))


def test_sizes_of_states_are_those_that_engines_have(report: dict[str, Any]) -> None:
    by_shape = {row["shape"]: row["state_bytes"] for row in report["state_sizes"]}
    # 12 layers of a shift vector of 768 twice and of 12 matrices of 64 x 64, four bytes each
    assert by_shape["0.1b"]["f32"] == 4 * 12 * (2 * 768 + 12 * 64 * 64)
    assert by_shape["0.1b"]["f16, shifts too"] == by_shape["0.1b"]["f32"] // 2


def test_a_loss_counts_only_where_float32_does_the_task() -> None:
    task = {"mean_accuracy": {"f32": [1.0, 0.96, 0.7], "bf16": [1.0, 0.9, 0.1]}}
    assert state_report.worst_loss(task, "bf16") == pytest.approx(0.06)
    assert state_report.worst_loss(task, "f32") == 0.0


class _Here:
    """Runs at once what a pool of processes would run."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


def test_the_tool_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(state_precision, "ProcessPoolExecutor", _Here)
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and nobody had read this before. " * 4, encoding="utf-8")
    outputs = ["--json", str(tmp_path / "x.json"), "--report", str(tmp_path / "x.md")]
    assert state_precision.main(["--text", str(text), *outputs], SMALL) == 0
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == capsys.readouterr().out
    rows = {row["storage"]: row for row in found["text"]["rows"]}
    assert rows["f32"]["divergence_bits_per_token"] == 0 == rows["f32"]["state_error_at_eighths"][-1]
    # In the order of their steps, each several times the one before.
    errors = [rows[name]["state_error_at_eighths"][-1] for name in ("f16", "bf16", "int8, scale a row")]
    assert 0 < 2 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    assert [task["task"] for task in found["tasks"]] == [task.name for task in state_tasks.TASKS]


def test_what_cannot_be_used_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("Too short.", encoding="utf-8")
    long.write_text("Long enough. " * 40, encoding="utf-8")
    for arguments, words in (
        ([tmp_path / "none.txt"], "cannot be read"),
        ([short], "at least 32 tokens are needed, found"),
        ([long, "--json", tmp_path / "none" / "x.json"], "there is no folder"),
        ([long, "--checkpoint", short], "short.txt"),
        ([long, "--tokenizer", short], "short.txt"),
    ):
        with pytest.raises(SystemExit) as exit_:
            state_precision.main(["--text", *map(str, arguments)], SMALL)
        assert exit_.value.code == 2
        assert words in capsys.readouterr().err
