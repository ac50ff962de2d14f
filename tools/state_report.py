"""Words and tables of the report that tools/state_precision.py writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What counts as harmless: what int8 weights in groups of 32 diverge by (tools/reports/quant-quality.json), and a
# hundredth of the answers.
HARMLESS_DIVERGENCE = 7e-5
HARMLESS_LOSS = 0.01
DONE = 0.95  # the accuracy above which a task counts as done: below, chance decides what is lost


def worst_loss(task: dict[str, Any], storage: str) -> float:
    """The most accuracy, mean over seeds, that a storage loses against f32 where f32 does the task."""
    means = task["mean_accuracy"]
    pairs = zip(means["f32"], means.get(storage, means["f32"]), strict=True)
    return max((own - found for own, found in pairs if own > DONE), default=0.0)


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each storage's divergence on the text, its worst loss on tasks, and whether both are harmless."""
    found = []
    for row in report["text"]["rows"]:
        storage = row["storage"]
        worst = max(report["tasks"], key=lambda task: worst_loss(task, storage))
        lost = worst_loss(worst, storage)
        found.append(
            {
                "storage": storage,
                "divergence_bits_per_token": row["divergence_bits_per_token"],
                "worst_loss": lost,
                "worst_task": worst["task"],
                "harmless": row["divergence_bits_per_token"] < HARMLESS_DIVERGENCE and lost < HARMLESS_LOSS,
            }
        )
    return found


def _text(report: dict[str, Any]) -> Iterator[str]:
    text = report["text"]
    lost = {name: f"{100 * share:.1f}%" for name, share in text["share_of_decays_below_half_a_step"].items()}
    yield "## Long text"
    yield ""
    yield (
        f"{report['checkpoint']} reads {report['text_file']} in {text['lanes']} lanes of {text['tokens_of_each']} "
        "tokens, the state carried from end to end. Divergence is from the float32 row's distribution, in bits a "
        "token; the state's error is that of all WKV matrices, relative to their norm. Of all decays, "
        f"{lost['bf16']} are so near to 1 that bf16 loses them whole, and f16 {lost['f16']}; the largest number of a "
        f"WKV matrix is {text['largest']:.0f}."
    )
    yield ""
    yield (
        "| state | bits per byte | last quarter | divergence | first eighth | last quarter "
        "| state's error after an eighth | at the end |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in text["rows"]:
        yield (
            f"| {row['storage']} | {row['bits_per_byte']:.5f} | {row['bits_per_byte_last_quarter']:.5f} "
            f"| {row['divergence_bits_per_token']:.2e} | {row['divergence_by_eighth'][0]:.2e} "
            f"| {row['divergence_bits_per_token_last_quarter']:.2e} | {100 * row['state_error_at_eighths'][0]:.2g}% "
            f"| {100 * row['state_error_at_eighths'][-1]:.2g}% |"
        )
    yield ""


def _tasks(report: dict[str, Any]) -> Iterator[str]:
    lengths = report["sizes"]["task_lengths"]
    yield "## Tasks that are all state"
    yield ""
    yield (
        "Tiny models (one layer, width 64), trained on texts of up to 2048 tokens. Accuracy in percent over the half "
        "before each length: mean of the models, which differ by their seed, and their range. "
        '"As released" is RWKV-7; "double removal" takes the removal twice, so that a transition can turn a sign, '
        "which no released model can without losing more than half of the number."
    )
    yield ""
    for task in report["tasks"]:
        yield f"{task['task']} (models: {len(task['seeds'])}; guessing: {100 * task['chance']:.1f}):"
        yield ""
        yield "| state | " + " | ".join(f"to {length}" for length in lengths) + " |"
        yield "|---" * (len(lengths) + 1) + "|"
        for storage, means in task["mean_accuracy"].items():
            cells = []
            for at, mean in enumerate(means):
                each = [100 * one["accuracy"][storage][at] for one in task["seeds"]]
                cells.append(f"{100 * mean:.1f} ({min(each):.1f} to {max(each):.1f})")
            yield f"| {storage} | " + " | ".join(cells) + " |"
        yield ""


def _sizes(report: dict[str, Any]) -> Iterator[str]:
    yield "## What it would save"
    yield ""
    yield (
        "The state of one session in MB, and the share of a token's traffic that f16 would save if weights are read "
        "once and states read and written, for one session and for 8 stepped at once (computed, weights of "
        "tools/reports/bench-cpu.json)."
    )
    yield ""
    yield "| shape | f32 | f16 | f16, shifts too | int8 | saved, int4 weights | 8 at once | int8 weights | 8 at once |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in report["state_sizes"]:
        sizes = row["state_bytes"]
        cells = [f"{sizes[name] / 1e6:.2f}" for name in ("f32", "f16", "f16, shifts too", "int8, scale a row")]
        for quant in ("int4", "int8"):
            for sessions in (1, 8):
                if "weight_bytes_per_token" not in row:
                    cells.append("")
                    continue
                moved = row["weight_bytes_per_token"][quant] + 2 * sessions * sizes["f32"]
                cells.append(f"{200 * sessions * (sizes['f32'] - sizes['f16']) / moved:.1f}%")
        yield f"| {row['shape']} | " + " | ".join(cells) + " |"


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    yield "## Verdict"
    yield ""
    yield (
        f"Harmless is what diverges by less than {HARMLESS_DIVERGENCE:g} bits a token on the text, as int8 weights do, "
        f"and loses less than {100 * HARMLESS_LOSS:g} point of any task, at any length at which f32 has more than "
        f"{100 * DONE:g}%. Shifts were rounded on the text alone."
    )
    yield ""
    yield "| state | divergence | most points lost | of | harmless |"
    yield "|---|---|---|---|---|"
    for one in verdicts(report):
        lost = 100 * one["worst_loss"]
        where = one["worst_task"] if lost >= 0.05 else ""
        yield (
            f"| {one['storage']} | {one['divergence_bits_per_token']:.2e} | {lost:.1f} | {where} "
            f"| {'yes' if one['harmless'] else 'no'} |"
        )
    yield ""


def markdown(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    machine = report["machine"]
    cpu_s = report["text"]["cpu_s"] + sum(task["cpu_s"] for task in report["tasks"])
    yield "# In what precision may the state be kept?"
    yield ""
    yield (
        f"Written by tools/state_precision.py, {cpu_s / 60:.0f} minutes of one core ({machine['cpu']}, "
        f"{machine['cores']} cores). Only what is stored between two tokens is rounded; arithmetic is float32. "
        '"Shifts too" rounds the previous token\'s activations as well as the WKV matrices.'
    )
    yield ""
    yield from _verdict(report)
    yield from _text(report)
    yield from _tasks(report)
    yield "## What was expected"
    yield ""
    yield "| before measuring | because | expected | measured | |"
    yield "|---|---|---|---|---|"
    for one in report["predictions"]:
        yield (
            f"| {one['prediction']} | {one['why']} | {one['bound']} | {one['measured']:.3g} "
            f"| {'as expected' if one['holds'] else '**not so**'} |"
        )
    yield ""
    yield from _sizes(report)
