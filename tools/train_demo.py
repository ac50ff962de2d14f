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


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan 2024) on [M, rows, columns], rows <= columns: U S V^T -> about U V^T.

    Each step is X <- (a I + b A + c A^2) X with A = X X^T. The polynomials commute, so they are gathered in the small
    Gram matrices and X is multiplied once, at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    gathered: Tensor | None = None
    for step in range(steps):
        factor = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        gathered = factor if gathered is None else factor @ gathered
        if step + 1 < steps:
            gram = factor @ gram @ factor
            gram = (gram + gram.mT) / 2
    return x if gathered is None else gathered @ x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; for hidden matrices. Equal shapes (or transposed) are done in one batch."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                update = update if update.shape[0] <= update.shape[1] else update.mT
                by_shape.setdefault(tuple(update.shape), []).append((p, update))
            for members in by_shape.values():
                updates = orthogonalize(torch.stack([update for _, update in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    rows, columns = p.shape
                    scale = math.sqrt(max(1.0, rows / columns))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update if rows <= columns else update.mT, alpha=-group["lr"] * scale)


def make_optimizers(model: DemoModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the square and feed-forward matrices; AdamW for embedding, head, low-rank paths and vectors."""
    hidden, embedding, head, low_rank, vectors = [], [], [], [], []
    for name, p in model.named_parameters():
        if name == "emb.weight":
            embedding.append(p)
        elif name == "head.weight":
            head.append(p)
        elif name.startswith("blocks.") and name.endswith(".weight") and p.ndim == 2:
            hidden.append(p)
        elif p.ndim == 2 and not name.endswith("r_k"):
            low_rank.append(p)
        else:
            vectors.append(p)
    scale = args.lr_adam
    groups = [
        {"params": embedding, "lr": 2.0 * scale, "weight_decay": 0.0},
        {"params": head, "lr": 1.0 * scale, "weight_decay": 0.01},
        {"params": low_rank, "lr": 0.7 * scale, "weight_decay": 0.0},
        {"params": vectors, "lr": 0.7 * scale, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-12)
    optimizers: list[torch.optim.Optimizer] = [Muon(hidden, lr=args.lr_muon), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


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


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, float32"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = named[0] if named else name
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU {name}, {torch.get_num_threads()} threads on {os.cpu_count()} cores, {instructions}"


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a checkpoint carries beside the tensors."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.corpus = read_corpus(args.text, args.unseen)
        self.work: Path = args.work
        path = self.work / "tokenizer.json"
        if not path.exists():
            log(f"training a tokenizer of {args.vocab} tokens")
            parts = (part for text in self.corpus for part in paragraphs(text.train, SHARES.get(text.name, 1.0)))
            made = train_tokenizer(parts, args.vocab)
            write_atomically(path, lambda p: made.save(str(p)))
        self.tokenizer = Tokenizer.from_file(str(path))
        tokens = [np.append(encode(self.tokenizer, text.train), np.uint16(END_OF_TEXT_ID)) for text in self.corpus]
        self.token_counts = [len(t) for t in tokens]
        shares = [SHARES.get(text.name, 1.0) for text in self.corpus]
        self.held_out = [text for text in self.corpus if text.held_out]
        torch.manual_seed(args.seed)
        config = DemoConfig(
            vocab=self.tokenizer.get_vocab_size(), width=args.width, layers=args.layers, rank_g=args.rank_gate
        )
        self.model = DemoModel(config).to(self.device)
        self.optimizers = make_optimizers(self.model, args)
        self.state: State = self.model.zero_state(args.lanes)
        self.progress = Progress()
        seed = args.seed
        if args.resume or args.export_only:
            seed += self.load()
        self.reader = Reader(tokens, shares, args.lanes, args.length, args.mean_steps, seed)
        self.loss_of = torch.compile(self._loss, dynamic=False) if args.compile else self._loss
        self.stop = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, *_: object) -> None:
        self.stop = True

    def _loss(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            logits, state = self.model(tokens[:, :-1], state, self.args.chunk)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()), state

    def load(self) -> int:
        """Restore weights, optimisers and counters; returns the steps done (the pages are drawn anew from there)."""
        saved = torch.load(self.work / CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])
        log(f"resumed at step {self.progress.steps}, {self.progress.seconds / 60:.1f} minutes")
        return self.progress.steps

    def save(self) -> None:
        saved = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        write_atomically(self.work / CHECKPOINT, lambda p: torch.save(saved, p))

    def validate(self) -> float:
        """Bits per byte on the held-out pages, each book's end read from a zero state; NaN where none are held out."""
        nats, size = 0.0, 0
        for text in self.held_out:
            ids = torch.from_numpy(encode(self.tokenizer, text.held_out).astype(np.int64))
            nats += score_text(self.model, ids, chunk=self.args.chunk)
            size += len(text.held_out.encode("utf-8"))
        return nats / math.log(2) / size if size else math.nan

    def done(self) -> float:
        """Share of the budget that is used up, by minutes or by steps."""
        if self.args.steps:
            return self.progress.steps / self.args.steps
        return self.progress.seconds / (60 * self.args.minutes)

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
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            "settings": {name: getattr(self.args, name) for name in settings},
            "final_train_loss_nats_per_token": round(self.progress.train_loss, 4),
            "validation_bits_per_byte": None if math.isnan(validation) else round(validation, 4),
        }

    def step(self) -> float:
        """One batch: forward, backward, both optimisers. Returns the loss in nats per token."""
        factor = schedule(self.done(), self.args.warmup, self.args.hold)
        tokens, fresh = (x.to(self.device) for x in self.reader.next())
        loss, state = self.loss_of(tokens, self.state.reset_lanes(fresh))
        self.state = state.detach()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        value = float(loss.detach())
        if math.isfinite(value) and bool(norm.isfinite()):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
        else:
            log(f"step {self.progress.steps}: loss {value}, gradient norm {float(norm)}; skipped")
            self.state = self.model.zero_state(self.args.lanes)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        self.progress.tokens += tokens[:, 1:].numel()
        return value

    def run(self) -> float:
        """Train until the budget is spent or someone asks to stop; returns the last validation figure."""
        args, progress = self.args, self.progress
        log(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters; "
            f"{sum(self.token_counts):,} tokens in the corpus; {hardware(self.device)}"
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
    print(time.strftime("%H:%M:%S"), message, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
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
    add("--lr-muon", type=float, default=0.02)
    add("--lr-adam", type=float, default=3e-3)
    add("--warmup", type=float, default=0.01, help="share of the budget")
    add("--hold", type=float, default=0.35, help="share of the budget after which the learning rate falls")
    add("--clip", type=float, default=1.0)
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--precision",
        choices=("f32", "bf16"),
        default="f32",
        help="of the weights' products; bf16 is quicker where the processor knows it (AVX512-BF16, AMX, CUDA)",
    )
    add("--compile", action="store_true", help="torch.compile the forward and backward pass (needs a C++ compiler)")
    add("--log-every", type=int, default=20)
    add("--save-minutes", type=float, default=5.0)
    add("--check-minutes", type=float, default=10.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(args)
    except FileNotFoundError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    validation = trainer.validate() if args.export_only else trainer.run()
    export(args.work / "export", trainer.model, trainer.tokenizer, trainer.record(validation))
    log(f"exported to {args.work / 'export'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
