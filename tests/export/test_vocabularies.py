"""Vocabularies on their way into an engine: in the World format but of another size."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save

import goslet
from goslet.errors import InputError
from goslet.export import export_engine
from goslet.export.verify import verify_engine

TINY = {"n_layer": 1, "n_embd": 32, "head_size": 16, "rank_w": 8, "rank_a": 8, "rank_v": 8, "rank_g": 8, "seed": 3}


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RWKV-7 with 40 rows, less than there are bytes."""
    path = tmp_path_factory.mktemp("forty") / "x.pth"
    save(random_rwkv7(**TINY, vocab_size=40), path)
    return path


def test_a_small_vocabulary_with_gaps_makes_an_engine(forty: Path, tmp_path: Path) -> None:
    vocabulary = tmp_path / "small.txt"
    vocabulary.write_text("1 'a' 1\n2 'b' 1\n7 'ab' 2\n30 '\\n' 1\n")
    report = export_engine(forty, tmp_path / "x.goslet", quant="f32", tokenizer=vocabulary)
    assert report.tokenizer_kind == "trie"
    assert verify_engine(tmp_path / "x.goslet", forty, n_tokens=8).passed
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert engine.encode("abba\n") == [7, 2, 1, 30]
        with pytest.raises(InputError, match=r"character 2: .*byte 0x63"):
            engine.encode("abc")
        text = "".join("".join(engine.generate("ab", max_tokens=9, seed=seed)) for seed in range(9))
        assert set(text) <= set("ab\n") and text
