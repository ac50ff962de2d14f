"""The demonstration trainer: its recurrence, its tokenizer, its files. Needs torch; skips where it is absent."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the demonstration trainer needs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: the demonstration trainer needs it")

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    """A program of ``tools/`` as a module; they are no package, and import their neighbours by plain name."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


demo_model, demo_workers = tool("demo_model"), tool("demo_workers")
train_demo, demo_figure = tool("train_demo"), tool("demo_figure")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and forked processes must inherit none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NAMES = ["r", "log_w", "k", "v", "z", "b", "state"]


def operands(length: int, dtype: torch.dtype, *, lanes: int = 2, heads: int = 2, size: int = 32, seed: int = 0) -> list:
    """Inputs of the recurrence as RWKV-7 makes them: unit keys, rates in (0, 1), decays down to the smallest."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (lanes, length, heads, size)
    log_w = -demo_model.DECAY_RATE * torch.sigmoid(3 * normal(*shape))
    k_hat = torch.nn.functional.normalize(normal(*shape) + 1, dim=-1)
    rate = torch.sigmoid(2 * normal(*shape))
    state = normal(lanes, heads, size, size)
    given = [normal(*shape), log_w, normal(*shape), normal(*shape), -k_hat, k_hat * rate, state]
    return [x.to(dtype).requires_grad_() for x in given]


def both_ways(given: list, **options: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, recurrent, chunked) for the outputs and the gradient of every input."""
    results = []
    for function, keywords in ((demo_model.wkv7_recurrent, {}), (demo_model.wkv7_chunked, options)):
        y, last = function(*given, **keywords)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, last)]
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        results.append([y, last, *torch.autograd.grad(loss, given)])
    return list(zip(["y", "last state", *NAMES], *results, strict=True))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 77])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunked_equals_recurrent(length: int, dtype: torch.dtype, tolerance: float) -> None:
    for name, expected, got in both_ways(operands(length, dtype)):
        assert got.shape == expected.shape, name
        assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1), name


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_any_chunk_length_is_the_same(chunk: int) -> None:
    for name, expected, got in both_ways(operands(37, torch.float64), chunk=chunk):
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1), name


@pytest.mark.parametrize("log_w", [-demo_model.DECAY_RATE, -1e-4])
def test_repeated_keys_keep_their_digits(log_w: float) -> None:
    """The same key over and over with rate 1, at both ends of the decay: powers of the chunk's matrix would explode."""
    given = operands(64, torch.float32)
    with torch.no_grad():
        given[1].fill_(log_w)
        given[4].copy_(given[4][:, :1].expand_as(given[4]))
        given[5].copy_(-given[4])
    for name, expected, got in both_ways(given)[:2]:
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def small_model(**changes: int) -> torch.nn.Module:
    """A model of two layers whose every parameter is random, so that nothing hides behind a zero."""
    shape = {"vocab": 300, "width": 128, "layers": 2, "rank_w": 8, "rank_a": 8, "rank_v": 8, "rank_g": 16, **changes}
    torch.manual_seed(3)
    model = demo_model.DemoModel(demo_model.DemoConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_state_carries_across_pieces() -> None:
    model = small_model()
    tokens = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, last = model(tokens, model.zero_state(2))
        state, parts = model.zero_state(2), []
        for start, end, chunk in ((0, 1, 0), (1, 20, 16), (20, 50, 32)):
            logits, state = model(tokens[:, start:end], state, chunk)
            parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
    for got, expected in zip(state, last, strict=True):
        assert torch.allclose(got, expected, atol=2e-5)


def test_resetting_a_lane_touches_no_other() -> None:
    model = small_model()
    state = demo_model.State(*(torch.ones_like(part) for part in model.zero_state(3)))
    cleared = state.reset_lanes(torch.tensor([False, True, False]))
    for part in cleared:
        assert part[:, 1].abs().max() == 0
        assert part[:, [0, 2]].min() == 1


TEXT = "It was a truth, he said; “not” universally — acknowledged.\n\nShe read it twice, aloud, in the garden. " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_demo.train_tokenizer(train_demo.paragraphs(TEXT), 400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n  \t x",
        "no space before, none after",
        " leading and trailing ",
        "naïve Ünïcödé — “quotes” … 漢字 🦢👩‍👩‍👧",
        "\x00\x01\x7f\u200b\ufeff\u2028",
        "a\r\nb\rc",
        "é vs e\u0301",
        "1234567890 3.14159 $5",
        "before <|endoftext|> after",
    ],
)
def test_tokenizer_is_lossless(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < tokenizer.get_vocab_size() for i in ids)


def test_tokenizer_gives_zero_to_the_end_of_text(tokenizer) -> None:
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.get_vocab_size() <= 400
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT.encode()) / 2


def test_export_has_the_official_names_and_shapes(tmp_path: Path, tokenizer) -> None:
    model = small_model()
    train_demo.export(tmp_path, model, tokenizer, {"steps": 1})
    tensors = torch.load(tmp_path / "rwkv7-demo.pth", map_location="cpu", weights_only=True)
    v, d, f, h, n = 300, 128, 512, 2, 64
    expected = {"emb.weight": (v, d), "head.weight": (v, d), "ln_out.weight": (d,), "ln_out.bias": (d,)}
    expected |= {"blocks.0.ln0.weight": (d,), "blocks.0.ln0.bias": (d,)}
    for i in range(2):
        block = f"blocks.{i}."
        expected |= {f"{block}{ln}.{part}": (d,) for ln in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
        expected |= {f"{block}att.x_{x}": (1, 1, d) for x in "rwkvag"}
        expected |= {f"{block}att.{x}": (1, 1, d) for x in ("w0", "a0", "k_k", "k_a")} | {f"{block}att.r_k": (h, n)}
        ranks = {"w": 8, "a": 8, "g": 16} | ({"v": 8} if i else {})
        expected |= {f"{block}att.{x}1": (d, rank) for x, rank in ranks.items()}
        expected |= {f"{block}att.{x}2": (rank, d) for x, rank in ranks.items()}
        expected |= {f"{block}att.{x}.weight": (d, d) for x in ("receptance", "key", "value", "output")}
        expected |= {f"{block}ffn.x_k": (1, 1, d), f"{block}ffn.key.weight": (f, d), f"{block}ffn.value.weight": (d, f)}
    expected["blocks.1.att.v0"] = (1, 1, d)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rwkv7-demo.pth", "tokenizer.json", "training.json"]
    again = demo_model.load_checkpoint(tmp_path / "rwkv7-demo.pth")
    assert again.config == model.config


def run_trainer(folder: Path, *arguments: str) -> None:
    """The trainer's main on a toy corpus and a toy model, in this process; leaves signals as they were."""
    books = folder / "text" / "books"
    books.mkdir(parents=True, exist_ok=True)
    (books / "toy.txt").write_text(TEXT, encoding="utf-8")
    shape = {"width": 64, "layers": 2, "vocab": 300, "lanes": 2, "group": 1, "length": 32, "device": "cpu"}
    toy = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        assert train_demo.main(["--text", str(folder / "text"), *toy, *arguments]) == 0
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def test_tokens_are_kept_for_the_same_texts_only(tmp_path: Path, tokenizer) -> None:
    cache = tmp_path / "tokens.npz"
    first = train_demo.encode_all(tokenizer, ["one text", TEXT], cache)
    written = cache.stat().st_mtime_ns
    again = train_demo.encode_all(tokenizer, ["one text", TEXT], cache)
    assert cache.stat().st_mtime_ns == written
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    changed = train_demo.encode_all(tokenizer, ["another", TEXT], cache)
    assert changed[0].tolist() == tokenizer.encode("another").ids


def test_a_crew_does_every_job_once_and_reports_a_failure() -> None:
    counts = torch.zeros(50)
    demo_workers.share([counts])

    def work(rank: int, number: int) -> None:
        counts[number] += 1

    def fail(rank: int, number: int) -> None:
        if rank > 0:
            raise ValueError("in a helper")
        while not crew.failed.value:  # leaves the other job to the helper
            time.sleep(0.01)

    crew = demo_workers.Crew(2, {"work": work, "fail": fail})
    crew.start()
    try:
        for _ in range(3):
            crew.run("work", 50)
        assert (counts == 3).all()
        with pytest.raises(RuntimeError, match="helper"):
            crew.run("fail", 2)
    finally:
        crew.stop()


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    """The first step of a run does not depend on how many processes shared it."""
    losses = []
    for workers in (1, 2):
        run_trainer(tmp_path, "--work", str(tmp_path / f"w{workers}"), "--steps", "3", "--workers", str(workers))
        saved = torch.load(tmp_path / f"w{workers}" / "checkpoint.pt", weights_only=True)
        losses.append(saved["progress"]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_orthogonalize_flattens_singular_values() -> None:
    matrices = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(demo_workers.orthogonalize(matrices))
    assert values.min() > 0.6 and values.max() < 1.3


def test_reader_reads_on_and_starts_afresh() -> None:
    """Inputs and targets overlap by one; a lane that is not fresh goes on exactly where it stopped."""
    texts = [np.arange(1, 2000, dtype=np.uint16), np.arange(3000, 3700, dtype=np.uint16)]
    reader = train_demo.Reader(texts, [1.0, 1.0], lanes=3, length=16, mean_steps=4, seed=0)
    tokens, fresh = reader.next()
    assert fresh.all() and tokens.shape == (3, 17)
    restarts = 0
    for _ in range(100):
        before = tokens
        tokens, fresh = reader.next()
        restarts += int(fresh.sum())
        assert (tokens[:, 2:] - tokens[:, 1:-1] == 1).all()
        assert (tokens[~fresh, 0] == before[~fresh, -1]).all()
    assert 30 < restarts < 150  # 300 lane-steps, one in four


def test_held_out_pages_and_the_unseen_book_stay_out(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    held = train_demo.VALIDATION_BOOKS[0]
    long = "\n\n".join(f"Paragraph {i} of a book." for i in range(10_000))
    for name, text in ((held, long), ("other.txt", "other"), (train_demo.UNSEEN, "never")):
        (tmp_path / "books" / name).write_text(text, encoding="utf-8")
    texts = {text.name: text for text in train_demo.read_corpus(tmp_path, train_demo.UNSEEN)}
    assert set(texts) == {held, "other.txt"}
    assert texts[held].train + texts[held].held_out == long
    assert abs(len(texts[held].held_out) - train_demo.VALIDATION_BYTES) < 100
    assert texts["other.txt"].held_out == ""


def test_training_lowers_the_loss_and_resumes(tmp_path: Path) -> None:
    """A few steps end to end on a toy corpus: loss falls, files appear, --resume goes on, the figure reads them."""
    work = tmp_path / "work"
    run_trainer(tmp_path, "--work", str(work), "--steps", "12")
    run_trainer(tmp_path, "--work", str(work), "--steps", "16", "--resume")
    record = json.loads((work / "export" / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 16 and record["tokens"] == 16 * 64
    assert record["final_train_loss_nats_per_token"] < np.log(300)
    model = demo_model.load_checkpoint(work / "export" / "rwkv7-demo.pth")
    toy_tokenizer = train_demo.Tokenizer.from_file(str(work / "export" / "tokenizer.json"))
    found = demo_figure.measure(model, toy_tokenizer, TEXT)
    assert found["bytes"] == len(TEXT.encode()) and found["bits_per_byte"] < 8


def test_figure_names_a_missing_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "absent.txt"
    (tmp_path / "a").touch()
    present = str(tmp_path / "a")
    assert demo_figure.main(["--checkpoint", present, "--tokenizer", present, "--text", str(missing)]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"demo_figure: no such file: {missing}"]
