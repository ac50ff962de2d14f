"""The step against other people's implementations: PyPI's rwkv, and the logits that rwkv.cpp's authors published."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.models.blocks import EagerOps  # noqa: E402

N_TOKENS = 200
# Both sides compute in float32 in different orders of summation. rwkv itself is within 3e-6 of range of a float64
# reference; ten times that leaves room for the longer sums of the deepest shape and for nothing else.
LIMIT = 3e-5

SHAPES: dict[str, dict[str, int]] = {
    "one layer, heads of 16": {"n_layer": 1, "n_embd": 48, "head_size": 16, "vocab_size": 97, "rank_g": 20},
    "heads of 32": {"n_layer": 2, "n_embd": 96, "head_size": 32, "vocab_size": 257, "rank_v": 8, "rank_a": 24},
    "a single head of 64": {"n_layer": 3, "n_embd": 64, "head_size": 64, "vocab_size": 2, "rank_w": 4, "rank_a": 4},
    "heads of 64, six layers, odd ranks": {
        "n_layer": 6,
        "n_embd": 128,
        "head_size": 64,
        "vocab_size": 301,
        "rank_w": 7,
        "rank_a": 13,
        "rank_v": 5,
        "rank_g": 31,
    },
    "heads of 8, narrow channel mix": {
        "n_layer": 4,
        "n_embd": 40,
        "head_size": 8,
        "vocab_size": 64,
        "n_ffn": 72,
        "rank_w": 16,
        "unused": False,
    },
    "tiny activations and keys": {"n_layer": 2, "n_embd": 32, "head_size": 8, "vocab_size": 40},
}


def shrink(tensors: dict[str, torch.Tensor]) -> None:
    """Make every eps matter: a residual of a variance near LayerNorm's eps, keys near the norm's floor, zero keys."""
    for name, tensor in tensors.items():
        if ".ln0." in name or name.endswith(("att.output.weight", "ffn.value.weight")):
            tensor *= 2e-3
        if name.endswith(".k_k"):
            tensor[..., :8] *= 1e-12
            tensor[..., 8:16] = 0


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Checkpoint, tokens, logits and states by shape, as PyPI's rwkv computes them."""
    pytest.importorskip("rwkv", reason="PyPI's rwkv is the oracle here")
    folder = tmp_path_factory.mktemp("oracle")
    rng = np.random.default_rng(3)
    paths = []
    for index, shape in enumerate(SHAPES.values()):
        paths.append(folder / f"{index}.pth")
        tensors = random_rwkv7(**{**{"rank_w": 16, "rank_a": 16, "rank_v": 16, "rank_g": 16}, **shape}, seed=index)
        if index == len(SHAPES) - 1:
            shrink(tensors)
        save(tensors, paths[-1])
    tokens = np.stack([rng.integers(0, shape["vocab_size"], N_TOKENS) for shape in SHAPES.values()])
    np.save(folder / "tokens.npy", tokens)
    program = Path(__file__).with_name("rwkv_oracle.py")
    subprocess.run(
        [sys.executable, program, folder / "out.npz", folder / "tokens.npy", *paths],
        check=True,
        capture_output=True,
        timeout=600,
    )
    results = np.load(folder / "out.npz")
    return {
        name: {
            "path": paths[index],
            "tokens": tokens[index],
            "logits": results[f"logits_{index}"],
            "states": [results[f"state_{index}_{part}"] for part in range(3 * shape["n_layer"])],
        }
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def of_range(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", SHAPES)
def test_f32_engine_equals_pypi_rwkv(name: str, oracle: dict[str, dict], tmp_path: Path) -> None:
    golden = oracle[name]
    export_engine(golden["path"], tmp_path / "x.goslet", quant="f32", tokenizer=None)
    with goslet.open(tmp_path / "x.goslet", backend="ort", threads=1) as engine:
        session = engine.session()
        logits = session.feed(golden["tokens"], all_logits=True)
        assert of_range(logits, golden["logits"]) <= LIMIT
        states = session.state.front
        assert len(states) == len(golden["states"])
        for (part, found), expected in zip(states.items(), golden["states"], strict=True):
            assert of_range(found, expected) <= LIMIT, part


@pytest.mark.parametrize("name", SHAPES)
def test_random_weights_exercise_the_model(name: str, oracle: dict[str, dict]) -> None:
    """The comparison above means something only where logits depend on the past and no state has died."""
    golden = oracle[name]
    assert np.abs(golden["logits"]).max() > 0.3
    assert np.std(golden["logits"], axis=0).max() > 0.1
    for state in golden["states"]:
        assert 1e-2 < np.abs(state).max() < 1e3


def test_published_logits_of_a_trained_model(shared_data: Path, tmp_path: Path) -> None:
    """1e-5 absolute: the model is so barely trained that a looser bound would pass without attention."""
    expected = np.fromfile(shared_data / "checkpoints/expected-logits-7v0-834K.bin", "<f4")
    for ending in ("pth", "safetensors"):
        path = tmp_path / f"{ending}.goslet"
        export_engine(shared_data / f"checkpoints/tiny-rwkv-7v0-834K.{ending}", path, quant="f32")
        with goslet.open(path, backend="ort") as engine:
            logits = engine.session().feed(list(b'"in'))
            assert np.abs(logits - expected).max() <= 1e-5


def test_eager_step_in_float64_equals_float32(tiny_checkpoint: Path) -> None:
    """The torch step that `verify` uses agrees with itself in double precision: no hidden float32 constant."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        with open_checkpoint(tiny_checkpoint) as source:
            version, spec = source.version, source.spec
            weights = {name: tensor.to(dtype) for name, tensor in source.weights().items()}
            embedding = version.fold_embedding(weights, spec)
            state = {t.name: torch.full((1, *t.shape), t.init, dtype=dtype) for t in version.state_spec(spec).tensors}
            for token in range(40):
                logits, state = version.step(spec, EagerOps(weights), embedding[token : token + 1], state)
        assert logits.dtype == dtype
        results[dtype] = logits.double().numpy()
    assert of_range(results[torch.float32], results[torch.float64]) <= LIMIT
