"""Sketches of a reference, and engines that follow it by them alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    BackendError,
    ChecksumError,
    HeaderError,
    InputError,
    OutputError,
    TokenizerError,
    WrongMagicError,
)
from goslet.export import export_engine  # noqa: E402
from goslet.export.compensate import Compensation  # noqa: E402
from goslet.export.recalibration import SketchFile, recalibrate, sketch  # noqa: E402
from goslet.residuals import residual_of  # noqa: E402

from ..runtime.rewriting import rewritten  # noqa: E402

TOKENS = 2048
NAME = "blocks.0.att.key.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fables.txt"
    path.write_bytes(bytes(np.random.default_rng(3).integers(32, 127, 2 * TOKENS, dtype=np.uint8)))
    return path


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of `tiny_checkpoint` with an update of rank 1 on every projection, as tuning with a LoRA leaves it."""
    folder = tmp_path_factory.mktemp("tuned")
    tensors = torch.load(tiny_checkpoint)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2 and name.startswith("blocks."):
            n_out, n_in = tensor.shape
            update = torch.randn(n_out, 1, generator=generator) @ torch.randn(1, n_in, generator=generator)
            tensors[name] = tensor + 0.4 * tensor.norm() / update.norm() * update
    save(tensors, folder / "tuned.pth")
    export_engine(folder / "tuned.pth", folder / "tuned.goslet", quant="f32")
    return folder / "tuned.goslet"


@pytest.fixture(scope="module")
def sketches(tuned: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sketches") / "tuned.sketches"
    report = sketch(tuned, path, text, n_tokens=TOKENS, per_token=4)
    assert (report.tokens, report.matrices) == (TOKENS, 12)
    return path


@pytest.fixture(scope="module")
def deployed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployed") / "x.goslet"
    export_engine(tiny_checkpoint, path, quant="int8", compensation=Compensation(rank=2, low_rank="zero"))
    return path


@pytest.fixture(scope="module")
def followed(deployed: Path, sketches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("followed") / "x.goslet"
    report = recalibrate(deployed, sketches, path)
    assert report.before == pytest.approx(1)
    assert report.after < 0.1
    assert (report.matrices, report.same_model) == (12, False)
    assert report.improved == 12
    return path


def logits(path: Path) -> np.ndarray:
    with goslet.open(path, backend="native", threads=1) as engine:
        return engine.session().feed(np.random.default_rng(8).integers(0, 256, 40), all_logits=True)


def test_an_engine_follows_a_tuned_reference(tuned: Path, deployed: Path, followed: Path) -> None:
    """8192 scalars a matrix are 16 times the 2 · (64 + 192) numbers and more that a residual of rank 2 has."""
    wanted, before, after = logits(tuned), logits(deployed), logits(followed)
    assert np.square(after - wanted).mean() < 0.1 * np.square(before - wanted).mean()


def test_everything_else_stays(deployed: Path, followed: Path, sketches: Path) -> None:
    with EngineFile.open(deployed) as old, EngineFile.open(followed) as new:
        assert new.model_id == old.model_id
        assert bytes(new.graph_bytes) == bytes(old.graph_bytes)
        assert list(new.tensors) == list(old.tensors)
        for name in old.tensors:
            if not name.endswith((".up", ".down")):
                assert (new.packed(name).data == old.packed(name).data).all()
        assert new.provenance["recalibrated"]["tokens"] == TOKENS
        assert new.tokenizer_kind == old.tokenizer_kind == "bytes"


def test_again_is_no_worse(followed: Path, sketches: Path, tmp_path: Path) -> None:
    report = recalibrate(followed, sketches, tmp_path / "again.goslet")
    assert report.after <= report.before < 0.1


def test_nothing_to_gain_changes_nothing(tiny_engine: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The engine is its own reference: every sketch is met already, up to float32's rounding."""
    export_engine(
        tiny_checkpoint, tmp_path / "x.goslet", quant="f32", compensation=Compensation(rank=2, low_rank="zero")
    )
    sketch(tiny_engine, tmp_path / "sketches", text, n_tokens=512)
    report = recalibrate(tmp_path / "x.goslet", tmp_path / "sketches", tmp_path / "y.goslet")
    assert report.same_model
    assert np.abs(logits(tmp_path / "y.goslet") - logits(tiny_engine)).max() < 1e-4


def test_a_sketch_file_holds_no_weights(sketches: Path, tuned: Path, text: Path, tmp_path: Path) -> None:
    with EngineFile.open(tuned) as file:
        found = SketchFile(sketches)
        assert found.model_id == file.model_id
        assert found.tokens.shape == (TOKENS // 256, 256)
        assert {len(values) for values in found.values.values()} == {4 * TOKENS}
    sketch(tuned, tmp_path / "again", text, n_tokens=TOKENS, per_token=4)
    assert (tmp_path / "again").read_bytes() == sketches.read_bytes()
    sketch(tuned, tmp_path / "other", text, n_tokens=TOKENS, per_token=4, seed=1)
    assert (SketchFile(tmp_path / "other").values[NAME] != found.values[NAME]).any()


def test_it_runs_without_torch_and_gives_the_same(
    deployed: Path, followed: Path, sketches: Path, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'onnxruntime'): sys.modules[name] = None\n"
        "from goslet.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["recalibrate", str(deployed), "--sketches", str(sketches), "-o", str(tmp_path / "x.goslet")]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 matrices improved" in done.stderr
    assert "another model" in done.stderr
    assert (tmp_path / "x.goslet").read_bytes() == followed.read_bytes()


def test_inputs_that_hardly_occur_are_left_alone(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Nothing is learned of them, and what descent began with must not stay there: they may occur in another text."""
    tensors = torch.load(tiny_checkpoint)
    tensors["blocks.0.ffn.key.weight"][3] = 0
    save(tensors, tmp_path / "x.pth")
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", compensation=Compensation(rank=2, low_rank="zero"))
    value = tensors["blocks.0.ffn.value.weight"]
    value += 0.1 * torch.outer(torch.linspace(-1, 1, value.shape[0]), torch.linspace(1, -1, value.shape[1]))
    save(tensors, tmp_path / "tuned.pth")
    export_engine(tmp_path / "tuned.pth", tmp_path / "tuned.goslet", quant="f32")
    sketch(tmp_path / "tuned.goslet", tmp_path / "sketches", text, n_tokens=1024)
    recalibrate(tmp_path / "x.goslet", tmp_path / "sketches", tmp_path / "y.goslet")
    with EngineFile.open(tmp_path / "y.goslet") as file:
        residual = residual_of(file, "blocks.0.ffn.value.weight")
    assert residual is not None and residual.down is not None
    assert not residual.down[:, 3].any()
    assert residual.down[:, 4].any()


def test_a_sparse_residual_stays_and_counts(
    tiny_checkpoint: Path, sketches: Path, text: Path, tmp_path: Path, followed: Path, tuned: Path
) -> None:
    wanted = Compensation(rank=2, low_rank="zero", share=0.3, sparse="magnitude")
    export_engine(
        tiny_checkpoint, tmp_path / "x.goslet", quant="int3", method="rtn", compensation=wanted,
        calibrate=text, calibration_tokens=512,
    )  # fmt: skip
    report = recalibrate(tmp_path / "x.goslet", sketches, tmp_path / "y.goslet")
    assert report.after < 0.6 * report.before
    with EngineFile.open(tmp_path / "x.goslet") as old, EngineFile.open(tmp_path / "y.goslet") as new:
        for name in old.tensors:
            if name.endswith((".kept", ".kept_inputs")):
                assert (new.packed(name).data == old.packed(name).data).all()
    wrong, right = np.square(logits(tmp_path / "x.goslet") - logits(tuned)).mean(), logits(tmp_path / "y.goslet")
    assert np.square(right - logits(tuned)).mean() < 0.5 * wrong


def test_what_cannot_be_learned_is_not_taken_for_gain(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A reference whose matrices differ by noise of full rank, and few tokens: descent fits what it sees, and those
    held out, of which one half judges what the other half chose, tell."""
    tensors = torch.load(tiny_checkpoint)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2 and name.startswith("blocks."):
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + 0.02 * tensor.norm() / noise.norm() * noise
    save(tensors, tmp_path / "noisy.pth")
    export_engine(tmp_path / "noisy.pth", tmp_path / "noisy.goslet", quant="f32")
    text = tmp_path / "text"
    text.write_bytes(bytes(np.random.default_rng(3).integers(32, 127, 600, dtype=np.uint8)))
    sketch(tmp_path / "noisy.goslet", tmp_path / "sketches", text, n_tokens=512, per_token=1)
    wanted = Compensation(rank=8, low_rank="zero")
    export_engine(tiny_checkpoint, tmp_path / "x.goslet", quant="f32", compensation=wanted)
    report = recalibrate(tmp_path / "x.goslet", tmp_path / "sketches", tmp_path / "y.goslet")
    assert report.after > 0.9


class TestBadInput:
    def test_of_sketches(self, tuned: Path, text: Path, tmp_path: Path) -> None:
        for wrong in ({"per_token": 0}, {"per_token": 257}, {"seed": -1}, {"seed": 2**32}, {"n_tokens": 100}):
            with pytest.raises(InputError):
                sketch(tuned, tmp_path / "x", text, **{"n_tokens": 512, **wrong})
        (tmp_path / "short.txt").write_text("short")
        with pytest.raises(InputError, match="too short"):
            sketch(tuned, tmp_path / "x", tmp_path / "short.txt", n_tokens=512)
        with pytest.raises(TokenizerError):
            sketch(rewritten(tuned, tmp_path / "mute.goslet"), tmp_path / "x", text, n_tokens=512)
        for same in (tuned, text):
            with pytest.raises(InputError, match="also what is read"):
                sketch(tuned, same, text, n_tokens=512, overwrite=True)
        (tmp_path / "x").write_text("mine")
        with pytest.raises(OutputError, match="exists"):
            sketch(tuned, tmp_path / "x", text, n_tokens=512)
        assert (tmp_path / "x").read_text() == "mine"

    def test_of_recalibration(self, deployed: Path, sketches: Path, tiny_engine: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.goslet"
        with pytest.raises(InputError, match="no low-rank residual"):
            recalibrate(tiny_engine, sketches, out)
        for same in (deployed, sketches):
            before = same.read_bytes()
            with pytest.raises(InputError, match="also what is read"):
                recalibrate(deployed, sketches, same, overwrite=True)
            assert same.read_bytes() == before
        save(random_rwkv7(n_layer=1, n_embd=64, head_size=16, vocab_size=256, seed=1), tmp_path / "other.pth")
        export_engine(
            tmp_path / "other.pth", tmp_path / "other.goslet", compensation=Compensation(rank=2, low_rank="zero")
        )
        with pytest.raises(InputError, match="other dimensions"):
            recalibrate(tmp_path / "other.goslet", sketches, out)
        with pytest.raises(WrongMagicError):
            recalibrate(deployed, tiny_engine, out)
        damaged = bytearray(sketches.read_bytes())
        damaged[-1] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ChecksumError):
            recalibrate(deployed, tmp_path / "damaged", out)
        assert not out.exists()

    def test_of_a_program(self, deployed: Path, sketches: Path, text: Path, tmp_path: Path) -> None:
        """What a session would refuse is refused by the same names."""
        for index, program in enumerate((b"[", b"[]", b'{"version":3,"registers":{},"input":["x"],"steps":[]}')):
            path = rewritten(deployed, tmp_path / f"{index}.goslet", program=program)
            with pytest.raises(BackendError):
                recalibrate(path, sketches, tmp_path / "out.goslet")
            with pytest.raises(BackendError):
                sketch(path, tmp_path / "out", text, n_tokens=512)

    def test_of_a_header(self, deployed: Path, sketches: Path, tmp_path: Path) -> None:
        from goslet.container import Section, write_container

        found = SketchFile(sketches)
        header = {
            "model_id": found.model_id,
            "model": found.model,
            "seed": 0,
            "per_token": 4,
            "tensors": [NAME],
        }
        tokens = Section.of("tokens", found.tokens.tobytes())
        values = Section.of(NAME, found.values[NAME].tobytes())
        nan = Section.of(NAME, np.full_like(found.values[NAME], np.nan).tobytes())
        for index, (changes, sections, said) in enumerate((
            ({"per_token": 1 << 40}, [tokens, values], "per_token"),
            ({"seed": "0"}, [tokens, values], "seed"),
            ({"tensors": 3}, [tokens, values], "tensors"),
            ({"model_id": ["x"] * 1000}, [tokens, values], "model_id"),
            ({}, [Section.of("tokens", found.tokens[:1].tobytes()), values], "tokens"),
            ({"per_token": 5}, [tokens, values], NAME),
            ({}, [tokens, nan], "NaN"),
            ({}, [Section.of("tokens", b"1234"), values], "tokens"),
            ({}, [tokens], NAME),
        )):  # fmt: skip
            path = tmp_path / f"{index}"
            write_container(
                path, magic=b"GOSLETSK", version=1, header={**header, **changes}, sections=sections, overwrite=False
            )
            with pytest.raises(HeaderError, match=said):
                recalibrate(deployed, path, tmp_path / "out.goslet")


def test_a_residual_that_is_there_is_the_start(followed: Path) -> None:
    with EngineFile.open(followed) as file:
        residual = residual_of(file, NAME)
    assert residual is not None and residual.up is not None and residual.down is not None
    # Both factors are alike in size, so that fp16 holds both.
    assert np.linalg.norm(residual.up) == pytest.approx(np.linalg.norm(residual.down), rel=0.01)
