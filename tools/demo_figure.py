"""Reproduce the figure of the demonstration checkpoint's model card: bits per byte on a book it has never seen.

    python tools/demo_figure.py                                   # the shipped checkpoint on Pride and Prejudice
    python tools/demo_figure.py --text FILE --json
    python tools/demo_figure.py --sample 120 --prompt "It was" --seed 1

The whole text is read in one pass in float32, the state carried from the first token to the last; the first token is
predicted from <|endoftext|>. Bits per byte is the total in bits over the text's length in UTF-8 bytes. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from demo_model import END_OF_TEXT_ID, DemoModel, load_checkpoint, score_text
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "runtime" / "demo"
BOOK = REPOSITORY / "../shared/data/text/books/jane-austen_pride-and-prejudice.txt"


def measure(model: DemoModel, tokenizer: Tokenizer, text: str, chunk: int = 32) -> dict[str, float | int]:
    """Figures under the keys of ``goslet eval --json``: bits_per_byte, perplexity (per token), tokens, bytes."""
    ids = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)
    size = len(text.encode("utf-8"))
    if not len(ids):
        raise ValueError("the text is empty")
    nats = score_text(model, ids, chunk=chunk)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / len(ids)),
        "tokens": len(ids),
        "bytes": size,
    }


@torch.no_grad()
def sample(
    model: DemoModel, tokenizer: Tokenizer, prompt: str, count: int, seed: int, temperature: float, top_p: float
) -> str:
    """The prompt and up to ``count`` sampled tokens after it."""
    generator = torch.Generator().manual_seed(seed)
    ids = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
    start = len(ids)
    logits, state = model(torch.tensor([ids]), model.zero_state(1))
    for _ in range(count):
        probabilities, order = torch.softmax(logits[0, -1].double(), 0).sort(descending=True)
        inside = probabilities.cumsum(0) - probabilities < top_p
        weights = torch.where(inside, probabilities, 0.0) ** (1 / temperature)
        token = int(order[torch.multinomial(weights, 1, generator=generator)])
        if token == END_OF_TEXT_ID:
            break
        ids.append(token)
        logits, state = model(torch.tensor([[token]]), state, 0)
    return prompt + tokenizer.decode(ids[start:])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=DEMO / "rwkv7-demo.pth")
    add("--tokenizer", type=Path, default=DEMO / "tokenizer.json")
    add("--text", type=Path, default=BOOK, help="a UTF-8 text; default: Pride and Prejudice in the corpus folder")
    add("--json", action="store_true", help="print one JSON object")
    add("--threads", type=int, default=0, help="0: torch's own choice")
    add("--sample", type=int, default=0, metavar="N", help="print N sampled tokens instead of the figure")
    add("--prompt", default="\n\n", help="what the sample goes on from")
    add("--seed", type=int, default=1)
    add("--temperature", type=float, default=0.8)
    add("--top-p", type=float, default=0.9)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the figure or a sample; returns the exit status."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    needed = [args.checkpoint, args.tokenizer] + ([] if args.sample else [args.text])
    for path in needed:
        if not path.is_file():
            print(f"demo_figure: no such file: {path}", file=sys.stderr)
            return 1
    model, tokenizer = load_checkpoint(args.checkpoint), Tokenizer.from_file(str(args.tokenizer))
    if args.sample:
        print(sample(model, tokenizer, args.prompt, args.sample, args.seed, args.temperature, args.top_p))
        return 0
    found = measure(model, tokenizer, args.text.read_bytes().decode("utf-8"))
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.2f} per token")
        print(f"{found['tokens']} tokens, {found['bytes']} bytes: {args.text.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
