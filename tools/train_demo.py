"""Train the demonstration checkpoint: a small RWKV-7 on public-domain books, on a laptop's CPU in under two hours.

    python tools/train_demo.py --work ../demo-train --minutes 110
    python tools/train_demo.py --work ../demo-train --minutes 110 --resume       # goes on where it was stopped
    python tools/train_demo.py --work ../demo-train --minutes 110 --export-only  # writes the last checkpoint's files

It trains a byte-level BPE tokenizer (vocabulary 4096, token 0 = <|endoftext|>), then the model, and leaves in
``--work``/export: ``rwkv7-demo.pth`` (bfloat16, official layout), ``tokenizer.json`` and ``training.json``.

One book is never read (``--unseen``, default Pride and Prejudice): it measures the finished model, by
tools/demo_figure.py. Settings are chosen on the last pages of ``VALIDATION_BOOKS``, held out of training as well.

The learning-rate schedule runs over the budget, which is wall-clock minutes (so that a shared machine ends in time) or
steps. Ctrl-C, or a SIGTERM, saves and stops. A resumed run, or an export, takes the same settings as the first one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_model import END_OF_TEXT, END_OF_TEXT_ID, DemoConfig, DemoModel, State, score_text
from demo_workers import AdamW, Crew, Muon, Piece, share
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
UNSEEN = "jane-austen_pride-and-prejudice.txt"
VALIDATION_BOOKS = ("george-eliot_middlemarch.txt", "charles-dickens_great-expectations.txt")
VALIDATION_BYTES = 100_000
# Share of a text's pages read in one pass over the corpus; 1 where not named. The aim is a model of novels.
SHARES = {
    "state-of-the-union.txt": 0.15,
    "samuel-pepys_the-diary.txt": 0.3,
    "adam-smith_the-wealth-of-nations.txt": 0.5,
}
CHECKPOINT = "checkpoint.pt"


# --- texts and tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One file of the corpus: what is trained on, and the held-out end (empty for most)."""

    name: str
    train: str
    held_out: str


def cut_near(text: str, size: int) -> int:
    """Index that leaves about ``size`` characters after it and falls on a paragraph's start."""
    if len(text) <= size:
        raise ValueError(f"a validation text of {len(text)} characters is too short to hold out {size}")
    start = text.rfind("\n\n", 0, len(text) - size)
    return len(text) - size if start < 0 else start + 2


def read_corpus(folder: Path, unseen: str) -> list[Text]:
    """Every book but the unseen one, and the state-of-the-union addresses, in a fixed order."""
    books = folder / "books"
    paths = [p for p in sorted(books.glob("*.txt")) if p.name != unseen]
    if not paths:
        raise FileNotFoundError(f"no books in {books}")
    addresses = folder / "state-of-the-union.txt"
    texts = []
    for path in paths + ([addresses] if addresses.exists() else []):
        text = path.read_bytes().decode("utf-8")
        cut = cut_near(text, VALIDATION_BYTES) if path.name in VALIDATION_BOOKS else len(text)
        texts.append(Text(path.name, text[:cut], text[cut:]))
    return texts


def paragraphs(text: str, share: float = 1.0) -> Iterator[str]:
    """The text's paragraphs, or an evenly spread ``share`` of them."""
    for i, part in enumerate(text.split("\n\n")):
        if (i * share) % 1 < share:
            yield part


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: lossless on any text, no unknown token, token 0 is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise RuntimeError("the tokenizer did not give token 0 to the end of text")
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids uint16 [T] of the whole text at once: cutting it first could change tokens at the cuts."""
    return np.asarray(tokenizer.encode(text).ids, dtype=np.uint16)


def encode_all(tokenizer: Tokenizer, texts: list[str], cache: Path) -> list[np.ndarray]:
    """Token ids of every text, kept in ``cache`` (.npz) for the next run with the same tokenizer and texts."""
    digest = hashlib.sha256(tokenizer.to_str().encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    key = digest.hexdigest()
    if cache.exists():
        with np.load(cache) as saved:
            if str(saved["key"]) == key:
                return [saved[f"text{i}"] for i in range(len(texts))]
    found = [encode(tokenizer, text) for text in texts]
    arrays: dict[str, Any] = {"key": np.array(key), **{f"text{i}": ids for i, ids in enumerate(found)}}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)

    write_atomically(cache, write)
    return found


class Reader:
    """Lanes that read on through the corpus.

    A pass cuts every text at random places into stretches (geometric, on average ``mean_steps`` steps of ``length``
    tokens), drops the share that ``SHARES`` says and shuffles the rest; so every page comes once a pass. A lane reads
    one stretch from end to end, its state carried, and then goes to another one with a zero state.
    """

    def __init__(
        self, texts: list[np.ndarray], shares: list[float], lanes: int, length: int, mean_steps: int, seed: int
    ) -> None:
        self.texts, self.shares, self.length, self.mean_steps = texts, shares, length, mean_steps
        self.random = np.random.default_rng(seed)
        self.stretches = self._endless()
        self.place = [(0, 0, 0)] * lanes  # text, next token, end of the stretch

    def _endless(self) -> Iterator[tuple[int, int, int]]:
        while True:
            found = []
            for i, text in enumerate(self.texts):
                start = int(self.random.integers(self.length))
                while start + self.length < len(text):
                    size = self.length * int(self.random.geometric(1 / self.mean_steps))
                    end = min(start + size, (len(text) - 1 - start) // self.length * self.length + start)
                    if self.random.random() < self.shares[i]:
                        found.append((i, start, end))
                    start = end
            if not found:
                raise ValueError(f"no text is longer than {self.length} tokens")
            self.random.shuffle(found)
            yield from found

    def next(self) -> tuple[Tensor, Tensor]:
        """tokens [B, length + 1] int64 (inputs and, one further, targets) and fresh [B] bool: lanes to zero.

        Half of the fresh lanes see <|endoftext|> as their first input, so that a prompt works with or without it.
        """
        batch = np.empty((len(self.place), self.length + 1), dtype=np.int64)
        fresh = np.zeros(len(self.place), dtype=bool)
        for lane, (text, start, end) in enumerate(self.place):
            if start + self.length > end:
                text, start, end = next(self.stretches)
                fresh[lane] = True
            batch[lane] = self.texts[text][start : start + self.length + 1]
            if fresh[lane] and self.random.random() < 0.5:
                batch[lane, 0] = END_OF_TEXT_ID
            self.place[lane] = (text, start + self.length, end)
        return torch.from_numpy(batch), torch.from_numpy(fresh)


# --- optimiser --------------------------------------------------------------------------------------------------------


def make_pieces(model: DemoModel, lr_muon: float, lr_adam: float) -> list[Piece]:
    """Muon for the square and feed-forward matrices, a piece a layer; AdamW for the rest."""
    hidden: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    low_rank: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if name in ("emb.weight", "head.weight"):
            continue
        if p.ndim == 2 and name.endswith(".weight"):
            hidden[int(name.split(".")[1])][name] = p
        elif p.ndim == 2 and not name.endswith("r_k"):
            low_rank[name] = p
        else:
            vectors[name] = p
    pieces: list[Piece] = [Muon(layer, lr_muon, 0.05) for layer in hidden]
    return [
        *pieces,
        AdamW({"emb.weight": model.emb.weight}, 2.0 * lr_adam, 0.0),
        AdamW({"head.weight": model.head.weight}, lr_adam, 0.01),
        AdamW({**low_rank, **vectors}, 0.7 * lr_adam, 0.0),
    ]


def schedule(progress: float, warmup: float, hold: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: a rise, a plateau until ``hold``, then down to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    if progress < hold:
        return 1.0
    return max(0.0, (1 - progress) / (1 - hold))


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def exported_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The state dict in the official layout as contiguous bfloat16 tensors of their own memory."""
    return {name: t.detach().to("cpu", torch.bfloat16).clone().contiguous() for name, t in model.state_dict().items()}


def export(folder: Path, model: DemoModel, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write rwkv7-demo.pth, tokenizer.json and training.json, each by rename."""
    write_atomically(folder / "rwkv7-demo.pth", lambda p: torch.save(exported_tensors(model), p))
    write_atomically(folder / "tokenizer.json", lambda p: tokenizer.save(str(p)))
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "training.json", lambda p: p.write_text(text, encoding="utf-8"))


def hardware(device: torch.device, workers: int) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = named[0] if named else name
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU {name}, {workers} single-threaded processes on {os.cpu_count()} shared cores, {instructions}"


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a checkpoint carries beside the tensors."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan


class Trainer:
    """A run: the corpus, the model and the optimiser's pieces in shared memory, and the crew that works on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.corpus = read_corpus(args.text, args.unseen)
        self.work: Path = args.work
        path = self.work / "tokenizer.json"
        if not path.exists():
            log(f"training a tokenizer of {args.vocab} tokens")
            sources = (part for text in self.corpus for part in paragraphs(text.train, SHARES.get(text.name, 1.0)))
            made = train_tokenizer(sources, args.vocab)
            write_atomically(path, lambda p: made.save(str(p)))
        self.tokenizer = Tokenizer.from_file(str(path))
        self.held_out = [text for text in self.corpus if text.held_out]
        parts = [text.train for text in self.corpus] + [text.held_out for text in self.held_out]
        encoded = encode_all(self.tokenizer, parts, self.work / "tokens.npz")
        tokens = [np.append(ids, np.uint16(END_OF_TEXT_ID)) for ids in encoded[: len(self.corpus)]]
        self.token_counts = [len(ids) for ids in tokens]
        self.held_out_tokens = [torch.from_numpy(ids.astype(np.int64)) for ids in encoded[len(self.corpus) :]]
        torch.manual_seed(args.seed)
        config = DemoConfig(
            vocab=self.tokenizer.get_vocab_size(), width=args.width, layers=args.layers, rank_g=args.rank_gate
        )
        self.model = DemoModel(config).to(self.device)
        self.pieces = make_pieces(self.model, args.lr_muon, args.lr_adam)
        self.progress = Progress()
        seed = args.seed
        if args.resume or args.export_only:
            seed += self.load()
        shares = [SHARES.get(text.name, 1.0) for text in self.corpus]
        self.reader = Reader(tokens, shares, args.lanes, args.length, args.mean_steps, seed)
        self._share()
        self.crew = Crew(args.workers, {"read": self._read, "update": self._update, "check": self._check})
        self.crew.start()
        self.stop = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _share(self) -> None:
        """Lay out what the processes share: weights, optimiser, one gradient a process, batch, states and results."""
        params = dict(self.model.named_parameters())
        size = sum(p.numel() for p in params.values())
        self.flat = [torch.zeros(size, device=self.device) for _ in range(self.args.workers)]
        self.grads: list[dict[str, Tensor]] = []
        for flat in self.flat:
            parts = torch.split(flat, [p.numel() for p in params.values()])
            self.grads.append({name: part.view_as(params[name]) for name, part in zip(params, parts, strict=True)})
        self.batch = torch.zeros(self.args.lanes, self.args.length + 1, dtype=torch.int64, device=self.device)
        self.fresh = torch.ones(self.args.lanes, dtype=torch.bool, device=self.device)
        self.state: State = self.model.zero_state(self.args.lanes)
        self.losses = torch.zeros(self.args.lanes, dtype=torch.float64)
        self.checks = torch.zeros(max(1, len(self.held_out)), dtype=torch.float64)
        self.factor = torch.zeros(2, dtype=torch.float64)  # share of the peak rate; number of this update
        memory = [tensor for piece in self.pieces for tensor in piece.memory.values()]
        share([p.data for p in params.values()] + memory + self.flat + list(self.state))
        share([self.batch, self.fresh, self.losses, self.checks, self.factor])

    def _ask_to_stop(self, *_: object) -> None:
        self.stop = True

    # jobs: run by any process of the crew

    def _read(self, rank: int, number: int) -> None:
        """Forward and backward of one group of lanes; adds to this process's gradient."""
        lanes = slice(number * self.args.group, (number + 1) * self.args.group)
        for name, p in self.model.named_parameters():
            p.grad = self.grads[rank][name]
        tokens = self.batch[lanes]
        state = State(*(part[:, lanes] for part in self.state)).reset_lanes(self.fresh[lanes])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            logits, last = self.model(tokens[:, :-1], state, self.args.chunk)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss = loss / (self.args.lanes * self.args.length)
        loss.backward()
        for shared, part in zip(self.state, last.detach(), strict=True):
            shared[:, lanes] = part
        self.losses[number] = float(loss.detach())

    def _update(self, rank: int, number: int) -> None:
        """Update of one piece, from the summed gradient."""
        self.pieces[number].step(self.grads[0], float(self.factor[0]), int(self.factor[1]))

    def _check(self, rank: int, number: int) -> None:
        """Nats on one book's held-out pages."""
        self.checks[number] = score_text(self.model, self.held_out_tokens[number], chunk=self.args.chunk)

    # the main process

    def load(self) -> int:
        """Restore weights, optimiser and counters; returns the steps done (the pages are drawn anew from there)."""
        saved = torch.load(self.work / CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for piece in self.pieces:
            for name, tensor in piece.memory.items():
                tensor.copy_(saved["memory"][name])
        self.progress = Progress(**saved["progress"])
        log(f"resumed at step {self.progress.steps}, {self.progress.seconds / 60:.1f} minutes")
        return self.progress.steps

    def save(self) -> None:
        """Write the checkpoint, by rename."""
        saved = {
            "model": self.model.state_dict(),
            "memory": {name: tensor for piece in self.pieces for name, tensor in piece.memory.items()},
            "progress": vars(self.progress),
        }
        write_atomically(self.work / CHECKPOINT, lambda p: torch.save(saved, p))

    def validate(self) -> float:
        """Bits per byte on the held-out pages, each book's end read from a zero state; NaN where none are held out."""
        if not self.held_out:
            return math.nan
        self.crew.run("check", len(self.held_out))
        return (
            float(self.checks.sum()) / math.log(2) / sum(len(text.held_out.encode("utf-8")) for text in self.held_out)
        )

    def done(self) -> float:
        """Share of the budget that is used up, by minutes or by steps."""
        if self.args.steps:
            return self.progress.steps / int(self.args.steps)
        return self.progress.seconds / (60 * float(self.args.minutes))

    def record(self, validation: float) -> dict[str, Any]:
        """The training record, for training.json."""
        settings = (
            "lanes",
            "length",
            "mean_steps",
            "precision",
            "lr_muon",
            "lr_adam",
            "warmup",
            "hold",
            "clip",
            "seed",
        )
        return {
            "architecture": {"version": "RWKV-7", **self.model.config.as_dict()},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": [
                {
                    "file": text.name,
                    "train_bytes": len(text.train.encode("utf-8")),
                    "held_out_bytes": len(text.held_out.encode("utf-8")),
                    "train_tokens": count,
                    "share_per_pass": SHARES.get(text.name, 1.0),
                }
                for text, count in zip(self.corpus, self.token_counts, strict=True)
            ],
            "unseen": self.args.unseen,
            "steps": self.progress.steps,
            "tokens": self.progress.tokens,
            "minutes": round(self.progress.seconds / 60, 1),
            "budget_done": round(min(1.0, self.done()), 4),
            "hardware": hardware(self.device, self.args.workers),
            "torch": torch.__version__,
            "settings": {name: getattr(self.args, name) for name in settings},
            "final_train_loss_nats_per_token": round(self.progress.train_loss, 4),
            "validation_bits_per_byte": None if math.isnan(validation) else round(validation, 4),
        }

    def step(self) -> float:
        """One batch: forward and backward, then the update. Returns the loss in nats per token."""
        tokens, fresh = self.reader.next()
        self.batch.copy_(tokens)
        self.fresh.copy_(fresh)
        for flat in self.flat:
            flat.zero_()
        groups = self.args.lanes // self.args.group
        self.crew.run("read", groups)
        total = self.flat[0]
        for flat in self.flat[1:]:
            total += flat
        value, norm = float(self.losses[:groups].sum()), float(total.norm())
        if math.isfinite(value) and math.isfinite(norm):
            total *= min(1.0, self.args.clip / (norm + 1e-6))
            self.factor[0] = schedule(self.done(), self.args.warmup, self.args.hold)
            self.factor[1] = self.progress.steps + 1
            self.crew.run("update", len(self.pieces))
        else:
            log(f"step {self.progress.steps}: loss {value}, gradient norm {norm}; skipped")
            for part in self.state:
                part.zero_()
        self.progress.steps += 1
        self.progress.tokens += fresh.numel() * self.args.length
        return value

    def run(self) -> float:
        """Train until the budget is spent or someone asks to stop; returns the last validation figure."""
        args, progress = self.args, self.progress
        log(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters; "
            f"{sum(self.token_counts):,} tokens in the corpus; {hardware(self.device, self.args.workers)}"
        )
        last = saved_at = checked_at = time.monotonic()
        while self.done() < 1 and not self.stop:
            value = self.step()
            now = time.monotonic()
            progress.seconds += now - last
            last = now
            if math.isfinite(value):
                progress.train_loss = (
                    value if progress.steps == 1 else progress.train_loss + 0.02 * (value - progress.train_loss)
                )
            if progress.steps % args.log_every == 0:
                log(
                    f"step {progress.steps} loss {value:.4f} smooth {progress.train_loss:.4f} "
                    f"tokens {progress.tokens / 1e6:.2f}M minutes {progress.seconds / 60:.1f} done {self.done():.3f}"
                )
            if now - saved_at > 60 * args.save_minutes:
                self.save()
                saved_at = now
            if now - checked_at > 60 * args.check_minutes:
                log(f"step {progress.steps} validation {self.validate():.4f} bits per byte")
                checked_at = time.monotonic()
        self.save()
        validation = self.validate()
        log(f"stopped at step {progress.steps}; validation {validation:.4f} bits per byte")
        return validation


def log(message: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--text", type=Path, default=REPOSITORY / "../shared/data/text", help="corpus folder, with books/*.txt")
    add("--work", type=Path, required=True, help="folder for checkpoints, the tokenizer and the exported files")
    add("--unseen", default=UNSEEN, help="the book that is never read")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=100.0, help="wall-clock budget of the training loop")
    budget.add_argument("--steps", type=int, default=0, help="budget in steps instead")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--export-only", action="store_true", help="export the checkpoint in --work and stop")
    add("--vocab", type=int, default=4096)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=5)
    add("--rank-gate", type=int, default=64)
    add("--lanes", type=int, default=16, help="stretches of text read side by side")
    add("--length", type=int, default=256, help="tokens per lane and step")
    add("--mean-steps", type=int, default=8, help="steps that a lane reads on for, on average")
    add("--chunk", type=int, default=32, help="tokens per chunk of the recurrence; at most 32 in float32")
    add("--lr-muon", type=float, default=0.025)
    add("--lr-adam", type=float, default=5e-3)
    add("--warmup", type=float, default=0.01, help="share of the budget")
    add("--hold", type=float, default=0.3, help="share of the budget after which the learning rate falls")
    add("--clip", type=float, default=1.0)
    add("--seed", type=int, default=7)
    add("--workers", type=int, default=2, help="processes, of one thread each; 1 on CUDA")
    add("--group", type=int, default=2, help="lanes in one job; divides --lanes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--precision",
        choices=("f32", "bf16"),
        default="f32",
        help="of the weights' products; bf16 is quicker where the processor knows it (AVX512-BF16, AMX, CUDA)",
    )
    add("--log-every", type=int, default=20)
    add("--save-minutes", type=float, default=5.0)
    add("--check-minutes", type=float, default=10.0)
    args = parser.parse_args(argv)
    if args.lanes % args.group:
        parser.error(f"--group {args.group} does not divide --lanes {args.lanes}")
    if args.device != "cpu":
        args.workers, args.group = 1, args.lanes
    return args


def main(argv: list[str] | None = None) -> int:
    """Train, or export what has been trained; returns the exit status."""
    args = parse(argv)
    torch.set_num_threads(1)  # forked processes inherit no threads
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(args)
    except FileNotFoundError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    try:
        validation = trainer.validate() if args.export_only else trainer.run()
    finally:
        trainer.crew.stop()
    export(args.work / "export", trainer.model, trainer.tokenizer, trainer.record(validation))
    log(f"exported to {args.work / 'export'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
