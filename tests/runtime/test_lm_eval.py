"""The adapter to lm-evaluation-harness, in the real harness on small tasks of our own, without a network."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet.errors import DependencyError

# Before any of Hugging Face's packages is imported, which read these then.
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
WHY = "lm_eval is not installed (tools/requirements-eval.txt)"


@pytest.fixture(scope="module")
def harness() -> Any:
    """The adapter's module; skips where the harness is not installed."""
    pytest.importorskip("lm_eval", reason=WHY)
    from goslet import lm_eval

    return lm_eval


@pytest.fixture
def model(harness: Any, tiny_engine: Path) -> Any:
    return harness.GosletLM(engine=str(tiny_engine), threads=1)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def log_probability(engine: goslet.Engine, context: bytes, continuation: bytes) -> float:
    """ln p of a continuation, one feed at a time and a softmax in float64."""
    session, total = engine.session(), 0.0
    logits = [session.feed([token]).astype(np.float64) for token in context][-1]
    for token in continuation:
        total += logits[token] - math.log(np.exp(logits).sum())
        logits = session.feed([token]).astype(np.float64)
    return total


def greedy_text(engine: goslet.Engine, context: str, count: int) -> str:
    return "".join(engine.generate(context, max_tokens=count, temperature=0))


PAIRS = [
    ("The sky is", " blue"),
    ("The grass is", " green"),
    ("The sky is", " a bowl"),
    ("The sky is ", "blue"),
    ("The sky is", "x"),
]


def test_log_likelihoods_equal_direct_computation(model: Any) -> None:
    found = model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        # White space at a context's end belongs to what follows.
        stem = context.rstrip()
        direct = log_probability(model.engine, stem.encode(), (context[len(stem) :] + continuation).encode())
        # The same float32 logits either way, so only the order of float64 sums differs.
        assert value == pytest.approx(direct, rel=1e-9)
        assert greedy is False


def test_what_the_model_would_write_is_greedy(model: Any) -> None:
    for context in ("".join(letters) for letters in itertools.product("abcdefgh", repeat=3)):
        token = int(np.argmax(model.engine.session().feed(list(context.encode()))))
        if chr(token).isascii() and chr(token).isalnum():
            break
    found = model.loglikelihood(requests("loglikelihood", (context, chr(token)), (context, "~")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_a_context_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = goslet.Session.feed

    def counted(session: goslet.Session, tokens: Any, **options: Any) -> Any:
        fed.append(len(tokens))
        return feed(session, tokens, **options)

    monkeypatch.setattr(goslet.Session, "feed", counted)
    long = "word " * 40 + "end"
    model.loglikelihood(requests("loglikelihood", (long, " a"), ("b", " c"), (long, " d")), disable_tqdm=True)
    # Contexts whole; of a continuation of two tokens, one.
    assert sorted(fed) == [1, 1, 1, 1, len(long)]


def test_rolling_log_likelihoods_equal_direct_computation(model: Any) -> None:
    texts = ["It was the best of times.", "ab", "It was the best of times."]
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True)
    for text, value in zip(texts, found, strict=True):
        # Nothing predicts the first of raw bytes.
        assert value == pytest.approx(log_probability(model.engine, text[:1].encode(), text[1:].encode()), rel=1e-9)


def test_generation_stops_where_it_is_told_to(model: Any) -> None:
    whole = greedy_text(model.engine, "The sky", 12)
    until = whole[5:7]
    found = model.generate_until(
        requests(
            "generate_until",
            ("The sky", {"max_gen_toks": 12}),
            ("The sky", {"until": until, "max_gen_toks": 12, "temperature": 0.0}),
            ("The sky", {"until": [until, ""], "max_new_tokens": 12, "do_sample": False, "temperature": 1.0}),
            ("The sky", {"until": [], "max_gen_toks": 3}),
        ),
        disable_tqdm=True,
    )
    until_then = whole.partition(until)[0]
    assert found == [whole, until_then, until_then, greedy_text(model.engine, "The sky", 3)]


def test_draws_follow_numpys_seed(model: Any) -> None:
    asked = [("The", {"max_gen_toks": 8, "do_sample": True})] * 2
    draws = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        draws.append(model.generate_until(requests("generate_until", *asked), disable_tqdm=True))
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


# --------------------------------------------------------------------------------------------------------- whole tasks

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
LAST_WORDS = """\
task: tiny_last_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity}}, {{metric: acc}}]
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """\
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
RECORDS = [
    {
        "text": "The old man looked at the sea",
        "question": "Two and two are",
        "choices": [" four", " five", " a"],
        "answer": 0,
    },
    {"text": "She gave him back his book", "question": "A dog can", "choices": [" fly", " bark", " b"], "answer": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for name, task in {"choices": CHOICES, "last": LAST_WORDS, "rolling": ROLLING, "writing": WRITING}.items():
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    yield {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}


def test_the_harness_runs_its_tasks_with_an_engine(
    harness: Any, tiny_engine: Path, tasks: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    command = [
        *(sys.executable, "-m", "goslet.lm_eval", "--model", "goslet"),
        *("--model_args", f"engine={tiny_engine},backend=native,threads=1", "--include_path", str(tasks)),
        *("--tasks", "tiny_choices,tiny_last_words,tiny_rolling,tiny_writing"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    with goslet.open(tiny_engine) as engine:
        nats = [-log_probability(engine, *(part.encode() for part in cut(record["text"]))) for record in RECORDS]
        assert results["tiny_last_words"]["perplexity,none"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)
        assert results["tiny_last_words"]["acc,none"] == 0
        right = 0
        for record in RECORDS:
            asked = record["question"].encode()
            values = [log_probability(engine, asked, choice.encode()) for choice in record["choices"]]
            right += int(np.argmax(values)) == record["answer"]
        assert results["tiny_choices"]["acc,none"] == right / len(RECORDS)
        texts = [record["text"].encode() for record in RECORDS]
        bits = -sum(log_probability(engine, text[:1], text[1:]) for text in texts) / math.log(2)
        found = results["tiny_rolling"]["bits_per_byte,none"]
        assert found == pytest.approx(bits / sum(map(len, texts)), rel=1e-6)
        (samples,) = (tmp_path / "out").rglob("samples_tiny_writing_*.jsonl")
        written = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
        assert written == [greedy_text(engine, record["text"], 4).partition("\n")[0] for record in RECORDS]


def cut(text: str) -> tuple[str, str]:
    context, _, word = text.rpartition(" ")
    return context, " " + word


def test_an_engine_that_is_none_is_one_line(harness: Any, tmp_path: Path, tasks: Path, offline: dict[str, str]) -> None:
    (tmp_path / "x.goslet").write_bytes(b"no engine")
    command = [
        *(sys.executable, "-m", "goslet.lm_eval", "--model", "goslet", "--model_args", "engine=x.goslet"),
        *("--include_path", str(tasks), "--tasks", "tiny_last_words"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("goslet: error: x.goslet")
    assert "Traceback" not in done.stderr


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "goslet.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    with pytest.raises(DependencyError, match=r"\.\[eval\]"):
        import goslet.lm_eval  # noqa: F401
