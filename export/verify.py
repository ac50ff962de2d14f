"""Does an engine compute what its checkpoint says? Its weights, its graph and its backend, each held to a limit.

- Weights: every stored tensor against the checkpoint's. Rounding to the nearest of a group with largest level q errs by
  at most half a step for each of g numbers, while the group's largest number is q steps; and, as 0 is a level, no
  number errs by more than itself, so that the error counts in the norm too. With r = g / 4q² the error is at most
  sqrt(r / (1 + r)) of the tensor's norm (`weight_limit`), which is below 1 for every format; a weight that is
  transposed, of another layer or zero errs by about 1 or more. Where error feedback chose the integers they need not be
  the nearest, and are held number by number to what it may choose: one of the two integers beside the checkpoint's
  number, under a scale that it may have (`goslet.export.gptq.neighbours`). Both are parts of what is allowed, so that
  the limit is 1.
- Graph: the engine's graph, run in float32, against the torch step on the engine's own dequantized weights. Errors are
  parts of an output's range (its largest magnitude in the reference over all tokens) and at most `FLOAT_LIMIT`: two
  orders of summation of some thousand products differ by about 1e-7 of range times the square root of their number.
- Backend: the backend as it is used, which rounds activations to 8 or 16 bits where a weight is quantized. What that
  explains is measured by running the torch step again with activations rounded alike, `ROUNDINGS` times: once to the
  nearest and then with a subtractive dither, which errs as much and independently. `ACTIVATION_FACTOR` times the
  largest of these is allowed on top of `FLOAT_LIMIT`. One draw is too few: the error of a small state's largest number
  is above twice another draw's about once in a thousand.
- A model may amplify: what float32's order of summation explains is then more than `FLOAT_LIMIT`, and three roundings
  are too few to tell what activations explain. So where one of these checks fails, the torch step is run again with
  every product's inputs and outputs rounded to `SUM_BITS` bits, about what the order of a sum of a thousand products
  changes, and with `MORE_ROUNDINGS` more roundings of the activations; the largest of each counts as before. A fault
  of a model that does not amplify stays one.
- Oracle, where asked for: the checkpoint's own weights in the torch step, against what another library makes of the
  same checkpoint (`goslet.export.oracles`). This alone sees what export and verify read wrongly alike. Both compute in
  float32, so that the limit is `FLOAT_LIMIT`.
- Residuals (`goslet.export.compensate`) make up for what storing takes, so none is larger, as a part of the matrix's
  norm, than `RESIDUAL_FACTOR` times the most that its format explains: what the matrices before took may come on top.

What quantization costs against the checkpoint's own weights is reported and not judged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backends import Rounding
from ..backends.ort import OrtBackend
from ..enginefile import EngineFile
from ..errors import InputError
from ..residuals import effective_weight, residual_of
from ..session import Engine, Session, open_engine
from ..spec import EMBEDDING, RESIDUALS, ModelSpec
from ..tokenizer import Tokenizer
from ..weights import INTEGER_RANGES, WeightFormat, decode
from .adapters import read_adapter
from .calibration import multiplied
from .checkpoint import Checkpoint, open_checkpoint
from .gptq import neighbours
from .models.blocks import EagerOps, State, Version, token_pieces
from .oracles import choose, run_oracle
from .quantize import GPTQ

FLOAT_LIMIT = 3e-5
ACTIVATION_FACTOR = 2.0
ROUNDINGS = 3
MORE_ROUNDINGS = 12
SUM_BITS = 20
RESIDUAL_FACTOR = 2.0
N_TOKENS = 64
ORACLE_TOKENS = 16
MODEL_ID = "model id"
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

    @property
    def strain(self) -> float:
        """The value as a part of its limit; infinite where it is not a number."""
        strain = self.value / self.limit
        return strain if math.isfinite(strain) else math.inf


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_engine` found.

    Attributes:
        backend: the backend that ran.
        n_tokens: tokens that were fed; 0 where the engine and the checkpoint cannot be compared.
        text: whether the tokens were text; otherwise they were random ids.
        differences: what the engine records and the checkpoint is not: dimensions and eps, each with both values, the
            state, tensors or the model id.
        checks: comparisons with their limits.
        divergence: engine against the checkpoint's own weights, reported and not judged: mean KL divergence in bits per
            token, share of tokens whose likeliest successor is the same, and both losses in bits per token.
    """

    backend: str
    n_tokens: int
    text: bool
    differences: tuple[str, ...]
    checks: tuple[Check, ...]
    divergence: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the engine is this checkpoint's and everything in it is within its limit."""
        return not self.differences and bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "passed": self.passed,
            "backend": self.backend,
            "tokens": self.n_tokens,
            "text": self.text,
            "differences": list(self.differences),
            "checks": [{"name": c.name, "value": c.value, "limit": c.limit, "passed": c.passed} for c in self.checks],
            "divergence": self.divergence,
        }


class _RoundedActivationOps(EagerOps):
    """Rounds what every product takes, and gives where it is in low precision, as a backend says for the weight's name.

    Draw 0 rounds to the nearest; any other shifts the grid by its own random part of a step at every number.
    """

    def __init__(self, weights: dict[str, Tensor], rounding: Mapping[str, Rounding | None], draw: int) -> None:
        super().__init__(weights)
        self._rounding = rounding
        self._dither = torch.Generator().manual_seed(draw) if draw else None

    def linear(self, name: str, x: Tensor) -> Tensor:
        rounding = self._rounding[name]
        if rounding is None:
            return super().linear(name, x)
        if rounding.group is None:
            y = super().linear(name, _round_floats(x, rounding.bits, self._dither))
            return _round_floats(y, rounding.bits, self._dither)
        return super().linear(name, _round_integers(x, rounding.bits, rounding.group, self._dither))


def _round_integers(x: Tensor, bits: int, group: int, dither: torch.Generator | None) -> Tensor:
    largest = (1 << (bits - 1)) - 1
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % group)).reshape(*x.shape[:-1], -1, group)
    scale = padded.abs().amax(-1, keepdim=True) / largest
    return _round_to(padded, scale, dither).flatten(-2)[..., :width]


def _round_floats(x: Tensor, bits: int, dither: torch.Generator | None) -> Tensor:
    _, exponent = torch.frexp(x)
    return _round_to(x, torch.ldexp(torch.ones_like(x), exponent - bits), dither)


def _round_to(x: Tensor, step: Tensor, dither: torch.Generator | None) -> Tensor:
    """The nearest multiples of `step`, or with a dither those of a grid that is shifted by a random part of a step."""
    steps = x / torch.where(step == 0, 1.0, step)
    shift = torch.zeros(()) if dither is None else torch.rand(steps.shape, generator=dither) - 0.5
    return (torch.round(steps + shift) - shift) * step


def verify_engine(
    engine: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    n_tokens: int = N_TOKENS,
    norm_eps: float | None = None,
    adapter: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    adapter_init: str | os.PathLike[str] | None = None,
    against: str | None = None,
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
        norm_eps: the eps of the group norm that the engine was exported with, where that was told.
        adapter: the adapter that the engine was exported with.
        alpha: and its alpha.
        adapter_init: and what PiSSA took out of the model when training began.
        against: another library that runs the checkpoint too, for the first `ORACLE_TOKENS` tokens: ``rwkv``,
            ``transformers``, ``gguf`` or ``auto``, the one that reads the checkpoint's format.
        progress: called with a stage's name, the work done and all of it.

    Raises:
        ContainerError: the engine is damaged.
        CheckpointError: the checkpoint or the adapter cannot be read, or they do not fit together.
        BackendUnavailableError, BackendError: the backend does not exist here or fails.
        InputError: `against` names no library, or none that reads this checkpoint, or there is an adapter, a tuned
            state or another eps, which no other library knows of.
        DependencyError: the library is not installed.
    """
    report_progress = progress or (lambda stage, done, total: None)
    change = read_adapter(adapter, alpha, adapter_init)
    with (
        open_engine(engine, backend=backend, device=device, threads=threads, check=True) as opened,
        open_checkpoint(checkpoint, norm_eps=norm_eps, adapter=change) as source,
    ):
        file, spec = opened.file, opened.spec
        oracle = None if against is None else choose(against, source.format, source.path, source.only_here)
        if oracle is not None and (change is not None or source.tuned_state):
            raise InputError(
                f"{oracle.name} knows nothing of an adapter or a tuned state",
                place="against",
                remedy="compare the engine of the bare model, or leave --against out",
            )
        if oracle is not None and norm_eps is not None:
            with open_checkpoint(checkpoint) as plain:
                own_eps = plain.spec.norm_eps
            if own_eps != spec.norm_eps:
                raise InputError(
                    f"{oracle.name} computes with the checkpoint's own eps",
                    place="norm_eps",
                    expected=own_eps,
                    found=norm_eps,
                    remedy="leave --against out, or export and verify without --norm-eps",
                )
        differences = _differences(file, source)
        if any(not difference.startswith(MODEL_ID) for difference in differences):
            return VerifyReport(opened.backend_name, 0, False, differences, (), {})
        version = source.version
        tokens, is_text = _tokens(opened.tokenizer, spec.vocab_size, n_tokens)
        report_progress("checking weights", 0, 1)
        checks = _weight_checks(file, source)
        report_progress("checking weights", 1, 1)
        report_progress("stepping", 0, 5)
        found = _run_session(opened.session(), tokens)
        report_progress("stepping", 1, 5)
        own = {rule.name: torch.from_numpy(effective_weight(file, rule.name)) for rule in source.rules}
        start = _initial_state(file)
        expected = _run_torch(version, spec, EagerOps(own), start, tokens)
        report_progress("stepping", 2, 5)
        rounding = {name: opened.backend.activation_rounding(file.tensors[name].format) for name in own}
        any_rounding = any(rounding.values())
        rounded = _rounded_runs(source, own, rounding, start, tokens, range(ROUNDINGS)) if any_rounding else []
        report_progress("stepping", 3, 5)
        graph = _run_session(Engine(file, OrtBackend(file, threads, exact=True), None).session(), tokens)
        steps = _step_checks("graph", graph, expected, ())
        steps += _step_checks(opened.backend_name, found, expected, rounded)
        if not all(check.passed for check in steps):
            of_sums = {name: Rounding(SUM_BITS, None) for name in own}
            sums = _rounded_runs(source, own, of_sums, start, tokens, range(ROUNDINGS))
            if any_rounding:
                more = range(ROUNDINGS, ROUNDINGS + MORE_ROUNDINGS)
                rounded += _rounded_runs(source, own, rounding, start, tokens, more)
            steps = _step_checks("graph", graph, expected, sums)
            steps += _step_checks(opened.backend_name, found, expected, [*rounded, *sums])
        checks += steps
        del own
        report_progress("stepping", 4, 5)
        weights = EagerOps(source.weights())
        original = _run_torch(version, spec, weights, start, tokens)
        if oracle is not None:
            few = tokens[:ORACLE_TOKENS]
            told = run_oracle(oracle, spec.version, source.path, few)
            fresh = _fresh_state(file)
            read = {"logits": _run_torch(version, spec, weights, fresh, few)["logits"]}
            (compared,) = _step_checks(oracle.label, {"logits": told}, read, ())
            if not compared.passed:
                of_sums = {name: Rounding(SUM_BITS, None) for name in weights.weights}
                sums = _rounded_runs(source, dict(weights.weights), of_sums, fresh, few, range(ROUNDINGS))
                (compared,) = _step_checks(oracle.label, {"logits": told}, read, sums)
            checks.append(compared)
        report_progress("stepping", 5, 5)
        divergence = _divergence(found["logits"], original["logits"], tokens)
        return VerifyReport(opened.backend_name, len(tokens), is_text, differences, tuple(checks), divergence)


def _differences(file: EngineFile, source: Checkpoint) -> tuple[str, ...]:
    shapes = {rule.name: rule.shape for rule in source.rules}
    same = {
        "state": source.version.state_spec(source.spec) == file.state_spec,
        "tensors": shapes
        == {name: entry.shape for name, entry in file.tensors.items() if not name.endswith(RESIDUALS)},
        MODEL_ID + _exported_with(file): source.model_id() == file.model_id,
    }
    told = file.provenance.get("norm_eps")
    recorded, read = file.spec.to_json(), source.spec.to_json()
    return (
        *(
            f"{name} ({recorded[name]} in the engine, {read[name]} in the checkpoint"
            + (f"; exported with --norm-eps {told}" if name == "norm_eps" and told is not None else "")
            + ")"
            for name in recorded
            if recorded[name] != read[name]
        ),
        *(name for name, equal in same.items() if not equal),
    )


def _exported_with(file: EngineFile) -> str:
    """The adapter that is in the engine's model id, for somebody who forgot it."""
    adapter, alpha = (file.provenance.get(key) for key in ("adapter", "alpha"))
    if not isinstance(adapter, str):
        return ""
    return f" (exported with --adapter {adapter}{'' if alpha is None else f' --alpha {alpha}'})"


def weight_limit(chosen: WeightFormat) -> float:
    """The largest error, as a part of a tensor's norm, that storing it in a format explains (see the module's page)."""
    if chosen.group is not None:
        ratio = chosen.group / (4 * INTEGER_RANGES[chosen.name][1] ** 2)
        return 1.01 * math.sqrt(ratio / (1 + ratio))
    return {"f32": 1e-6, "f16": 2.0**-11, "bf16": 2.0**-8}[chosen.name]


def _limit(original: Tensor, chosen: WeightFormat) -> float:
    """`weight_limit` of a tensor, and what its format's smallest step explains where the numbers are near it.

    float16, which also holds the scales of groups, has no step below 2^-24.
    """
    if chosen.name != "f16" and chosen.group is None:
        return weight_limit(chosen)
    levels = 1 if chosen.group is None else INTEGER_RANGES[chosen.name][1]
    smallest = 2.0**-25 * levels * math.sqrt(original.numel()) / (float(original.norm()) or 1.0)
    return weight_limit(chosen) + smallest


def _weight_checks(file: EngineFile, source: Checkpoint) -> list[Check]:
    """For each format that occurs, its worst tensor against the format's limit."""
    worst: dict[str, Check] = {}
    fed_back = file.provenance.get("method") == GPTQ
    multiplied_names = {rule.name for rule in multiplied(source.rules)}
    for rule in source.rules:
        original = source.tensor(rule)
        stored = file.weight(rule.name)
        residual = residual_of(file, rule.name)
        if residual is not None:
            added = torch.from_numpy(residual.added_to(np.zeros(rule.shape, np.float32)))
            share = float(added.norm() / (original.norm() or 1.0))
            _keep_worst(
                worst, Check(f"residuals {stored.format}", share, RESIDUAL_FACTOR * weight_limit(stored.format))
            )
        if fed_back and stored.format.is_integer and rule.name in multiplied_names:
            found = neighbours(original, stored)
            _keep_worst(worst, Check(f"integers {stored.format}", found.distance, 1.0))
            _keep_worst(worst, Check(f"scales {stored.format}", found.scale, 1.0))
            continue
        error = float((torch.from_numpy(decode(stored)) - original).norm() / (original.norm() or 1.0))
        _keep_worst(worst, Check(f"weights {stored.format}", error, _limit(original, stored.format)))
    return list(worst.values())


def _keep_worst(worst: dict[str, Check], check: Check) -> None:
    kept = worst.get(check.name)
    if kept is None or check.strain > kept.strain:
        worst[check.name] = check


def _tokens(tokenizer: Tokenizer | None, vocab_size: int, n_tokens: int) -> tuple[list[int], bool]:
    if tokenizer is not None:
        with suppress(InputError):  # a vocabulary may lack what the sample is spelled with
            return tokenizer.encode(SAMPLE)[:n_tokens], True
    return np.random.default_rng(7).integers(0, vocab_size, n_tokens).tolist(), False


def _run_session(session: Session, tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    logits = session.feed(tokens, all_logits=True)
    return {"logits": logits, **{name: view.copy() for name, view in session.state.front.items()}}


def _initial_state(file: EngineFile) -> State:
    """What a fresh session of the engine begins with, each tensor with a batch axis."""
    if file.initial_state is not None:
        return {name: torch.from_numpy(values.copy())[None] for name, values in file.initial_state.items()}
    return _fresh_state(file)


def _fresh_state(file: EngineFile) -> State:
    return {tensor.name: torch.full((1, *tensor.shape), tensor.init) for tensor in file.state_spec.tensors}


@torch.no_grad()
def _run_torch(
    version: Version, spec: ModelSpec, ops: EagerOps, state: State, tokens: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    rows = []
    embedding = ops.weights[EMBEDDING]
    for token in tokens:
        pieces = token_pieces(embedding[token : token + 1], spec)
        logits, state = version.step(spec, ops, pieces, state)
        rows.append(logits)
    return {"logits": torch.cat(rows).numpy(), **{name: tensor[0].numpy() for name, tensor in state.items()}}


def _rounded_runs(
    source: Checkpoint,
    weights: dict[str, Tensor],
    rounding: Mapping[str, Rounding | None],
    start: State,
    tokens: Sequence[int],
    draws: range,
) -> list[dict[str, NDArray[np.float32]]]:
    """The torch step's outputs with products rounded, once for each draw."""
    return [
        _run_torch(source.version, source.spec, _RoundedActivationOps(weights, rounding, draw), start, tokens)
        for draw in draws
    ]


def _step_checks(
    what: str,
    found: dict[str, NDArray[np.float32]],
    expected: dict[str, NDArray[np.float32]],
    rounded: Sequence[dict[str, NDArray[np.float32]]],
) -> list[Check]:
    """One check for the logits and one for each kind of state tensor: its worst layer against that layer's limit."""
    worst: dict[str, Check] = {}
    for name, reference in expected.items():
        size = float(np.abs(reference).max()) or 1.0
        error = float(np.abs(found[name] - reference).max()) / size
        explained = max((float(np.abs(draw[name] - reference).max()) / size for draw in rounded), default=0.0)
        kind = name.split(".")[-1]
        _keep_worst(worst, Check(f"{what} {kind}", error, FLOAT_LIMIT + ACTIVATION_FACTOR * explained))
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
