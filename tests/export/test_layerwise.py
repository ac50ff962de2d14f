"""Texts read a step at a time, against the same texts fed token by token."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import HeaderError, InputError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.layerwise import LayerwiseReader  # noqa: E402
from goslet.residuals import effective_weight  # noqa: E402

from ..runtime.rewriting import rewritten  # noqa: E402
from .oracle import MODELS  # noqa: E402

# Two orders of summation in float32, as in test_step.py.
LIMIT = 3e-5


def logits_of(file: EngineFile, tokens: np.ndarray) -> np.ndarray:
    reader = LayerwiseReader(file, tokens)
    for _ in reader.steps(lambda name, x: x @ effective_weight(file, name).T):
        pass
    return reader.registers["logits"].reshape(*tokens.shape, -1)


@pytest.mark.parametrize("name", [name for name in MODELS if "odd sizes" in name or "narrow" in name])
def test_every_version_gives_what_sessions_give(name: str, tmp_path: Path) -> None:
    save(MODELS[name](seed=4), tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="f32", tokenizer=None)
    with goslet.open(tmp_path / "x.goslet", backend="native", threads=1) as engine:
        tokens = np.random.default_rng(2).integers(0, engine.spec.vocab_size, (3, 17))
        found = logits_of(engine.file, tokens)
        for lane, ids in enumerate(tokens):
            expected = engine.session().feed(ids, all_logits=True)
            assert np.abs(found[lane] - expected).max() <= LIMIT * np.abs(expected).max()


def test_texts_begin_with_the_engines_own_state(tiny_engine: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    with EngineFile.open(tiny_engine) as file:
        state = {t.name: rng.normal(size=t.shape).astype(np.float32) for t in file.state_spec.tensors}
    path = rewritten(tiny_engine, tmp_path / "x.goslet", initial_state=state)
    with goslet.open(path, backend="native", threads=1) as engine:
        expected = engine.session().feed([7, 8], all_logits=True)
        found = logits_of(engine.file, np.array([[7, 8]]))[0]
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


def test_what_cannot_be_read_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    with EngineFile.open(tiny_engine) as file:
        for tokens in (np.zeros((0, 4), int), np.zeros(4, int), np.array([[256]]), np.array([[-1]])):
            with pytest.raises(InputError):
                LayerwiseReader(file, tokens)
    with (
        EngineFile.open(rewritten(tiny_engine, tmp_path / "x.goslet", program=None)) as file,
        pytest.raises(HeaderError, match="no program"),
    ):
        LayerwiseReader(file, np.array([[1]]))
