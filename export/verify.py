"""Does an engine compute what its checkpoint says? The engine's step against the torch step, token by token.

An engine passes when its backend equals the torch step on the engine's own dequantized weights. What quantization
itself costs, against the checkpoint's weights, is reported and not judged.

Tolerances, as parts of an output's own range (its largest magnitude in the reference over all tokens):

- `FLOAT_LIMIT` for float32 rounding: two orders of summation of up to a few thousand products differ by about the
  square root of their number times 6e-8 of range a product, and layers add up.
- Backends round activations to int8 where a weight is quantized. What that explains is measured, by running the torch
  step a second time with activations rounded the same way; twice that is allowed on top, since two ways of rounding
  need not err in the same direction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..session import Session, open_engine
from ..spec import EMBEDDING, ModelSpec
from ..tokenizer import Tokenizer
from ..weights import decode
from .checkpoint import open_checkpoint
from .models import version_named
from .models.blocks import EagerOps, Ops, Version

FLOAT_LIMIT = 3e-5
ACTIVATION_FACTOR = 2.0
N_TOKENS = 64
SAMPLE = (
    "The lighthouse keeper counted the ships as they came round the headland. Two of them carried timber, and the "
    "third, he thought, was full of letters. \u201cYou are late,\u201d he called down to the boat, though nobody there "
    "could hear him; and then, because the evening was fine, he lit the lamp an hour before it was needed and sat down "
    "to his supper."
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Check:
    """One comparison: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the comparison holds; a NaN never does."""
        return self.value <= self.limit


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_engine` found.

    Attributes:
        backend: the backend that ran.
        n_tokens: tokens that were fed.
        text: whether the tokens were text; otherwise they were random ids.
        same_model: whether the engine was made from this checkpoint, by model id.
        checks: engine against torch on the same dequantized weights, errors as parts of range.
        divergence: engine against the checkpoint's own weights, reported and not judged: mean KL divergence in bits per
            token, share of tokens whose likeliest successor is the same, and both losses in bits per token.
    """

    backend: str
    n_tokens: int
    text: bool
    same_model: bool
    checks: tuple[Check, ...]
    divergence: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the engine computes what its own weights say and is of this checkpoint."""
        return self.same_model and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "passed": self.passed,
            "same_model": self.same_model,
            "backend": self.backend,
            "tokens": self.n_tokens,
            "text": self.text,
            "checks": [{"name": c.name, "value": c.value, "limit": c.limit, "passed": c.passed} for c in self.checks],
            "divergence": self.divergence,
        }


class _RoundedActivationOps(EagerOps):
    """Rounds the input of every quantized product to int8, one scale for each of the weight's groups."""

    def __init__(self, weights: dict[str, Tensor], groups: dict[str, int | None]) -> None:
        super().__init__(weights)
        self._groups = groups

    def linear(self, name: str, x: Tensor) -> Tensor:
        group = self._groups[name]
        return super().linear(name, x if group is None else _round_activations(x, group))


def _round_activations(x: Tensor, group: int) -> Tensor:
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % group)).reshape(*x.shape[:-1], -1, group)
    scale = padded.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(padded / torch.where(scale == 0, 1.0, scale)) * scale
    return rounded.flatten(-2)[..., :width]


def verify_engine(
    engine: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    n_tokens: int = N_TOKENS,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare an engine with the checkpoint that it was made from.

    Args:
        engine: the engine file; all of its checksums are verified first.
        checkpoint: the ``.pth`` or ``.safetensors`` file.
        backend: as for `goslet.open`.
        device: as for `goslet.open`.
        threads: as for `goslet.open`.
        n_tokens: tokens to feed, at most.
        progress: called with a stage's name, the work done and all of it.

    Raises:
        ContainerError: the engine is damaged.
        CheckpointError: the checkpoint cannot be read.
        BackendUnavailableError, BackendError: the backend does not exist here or fails.
    """
    report_progress = progress or (lambda stage, done, total: None)
    with open_engine(engine, backend=backend, device=device, threads=threads, check=True) as opened:
        file, spec = opened.file, opened.spec
        version = version_named(spec.version)
        tokens, is_text = _tokens(opened.tokenizer, spec.vocab_size, n_tokens)
        with open_checkpoint(checkpoint, norm_eps=spec.norm_eps) as source:
            same_model = source.model_id() == file.model_id
            comparable = source.spec == spec
            weights = source.weights() if comparable else None
        report_progress("stepping", 0, 4)
        found = _run_session(opened.session(), tokens)
        report_progress("stepping", 1, 4)
        own = {name: torch.from_numpy(decode(file.weight(name))) for name in file.tensors}
        embedding = own[EMBEDDING]
        expected = _run_torch(version, spec, EagerOps(own), embedding, tokens)
        report_progress("stepping", 2, 4)
        groups = {name: entry.format.group for name, entry in file.tensors.items()}
        rounded = _run_torch(version, spec, _RoundedActivationOps(own, groups), embedding, tokens)
        report_progress("stepping", 3, 4)
        divergence = {}
        if weights is not None:
            folded = version.fold_embedding(weights, spec)
            original = _run_torch(version, spec, EagerOps(weights), folded, tokens)
            divergence = _divergence(found["logits"], original["logits"], tokens)
        report_progress("stepping", 4, 4)
        checks = tuple(_checks(found, expected, rounded))
        return VerifyReport(opened.backend_name, len(tokens), is_text, same_model, checks, divergence)


def _tokens(tokenizer: Tokenizer | None, vocab_size: int, n_tokens: int) -> tuple[list[int], bool]:
    if tokenizer is not None:
        return tokenizer.encode(SAMPLE)[:n_tokens], True
    return np.random.default_rng(7).integers(0, vocab_size, n_tokens).tolist(), False


def _run_session(session: Session, tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    logits = session.feed(tokens, all_logits=True)
    return {"logits": logits, **{name: view.copy() for name, view in session.state.front.items()}}


@torch.no_grad()
def _run_torch(
    version: Version, spec: ModelSpec, ops: Ops, embedding: Tensor, tokens: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    state = {tensor.name: torch.full((1, *tensor.shape), tensor.init) for tensor in version.state_spec(spec).tensors}
    rows = []
    for token in tokens:
        logits, state = version.step(spec, ops, embedding[token : token + 1], state)
        rows.append(logits)
    return {"logits": torch.cat(rows).numpy(), **{name: tensor[0].numpy() for name, tensor in state.items()}}


def _checks(
    found: dict[str, NDArray[np.float32]],
    expected: dict[str, NDArray[np.float32]],
    rounded: dict[str, NDArray[np.float32]],
) -> list[Check]:
    """One check for the logits and one for each kind of state tensor: its worst layer against that layer's limit."""
    worst: dict[str, Check] = {}
    for name, reference in expected.items():
        size = float(np.abs(reference).max()) or 1.0
        error = float(np.abs(found[name] - reference).max()) / size
        explained = float(np.abs(rounded[name] - reference).max()) / size
        kind = name.split(".")[-1]
        check = Check(kind, error, FLOAT_LIMIT + ACTIVATION_FACTOR * explained)
        if kind not in worst or not check.value / check.limit <= worst[kind].value / worst[kind].limit:
            worst[kind] = check
    return list(worst.values())


def _divergence(found: NDArray[np.float32], original: NDArray[np.float32], tokens: Sequence[int]) -> dict[str, float]:
    engine = torch.log_softmax(torch.from_numpy(found).double(), -1) / np.log(2)
    model = torch.log_softmax(torch.from_numpy(original).double(), -1) / np.log(2)
    kl = (model.exp2() * (model - engine)).sum(-1).mean()
    successors = torch.tensor(tokens[1:])[:, None]
    return {
        "kl_bits_per_token": float(kl),
        "same_top_token": float((engine.argmax(-1) == model.argmax(-1)).double().mean()),
        "engine_loss_bits_per_token": float(-engine[:-1].gather(1, successors).mean()),
        "checkpoint_loss_bits_per_token": float(-model[:-1].gather(1, successors).mean()),
    }
