"""Calibration: the moments of what a model is given, their file, and engines made with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    ChecksumError,
    ContainerError,
    HeaderError,
    InputError,
    NonFiniteError,
    OutputError,
    QuantizationError,
    TokenError,
    TokenizerError,
    WrongMagicError,
)
from goslet.export import calibration, export_engine  # noqa: E402
from goslet.export.calibration import MomentsFile, collect_moments, multiplied  # noqa: E402
from goslet.export.calibration_text import calibration_tokens  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.models.blocks import EagerOps, token_pieces  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402
from goslet.spec import EMBEDDING  # noqa: E402
from goslet.tokenizer import load_tokenizer  # noqa: E402
from goslet.weights import quantized_values  # noqa: E402

BYTES = load_tokenizer("bytes", b"")
N_CHUNKS = 3


@pytest.fixture(scope="module")
def moments(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The moments file of `tiny_checkpoint` and `text`."""
    path = tmp_path_factory.mktemp("moments") / "tiny.moments"
    with open_checkpoint(tiny_checkpoint) as source:
        tokens = calibration_tokens(text, BYTES, 256 * N_CHUNKS)
        collect_moments(source, source.model_id(), tokens, path)
    return path


@pytest.fixture(scope="module")
def engine(moments: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` in int4 with error feedback from `moments`."""
    path = tmp_path_factory.mktemp("engine") / "gptq.goslet"
    export_engine(tiny_checkpoint, path, quant="int4", moments=moments)
    return path


class TestText:
    def test_chunks_are_spread_over_the_text(self, text: Path) -> None:
        content = text.read_bytes()
        chunks = calibration_tokens(text, BYTES, 256 * 4 + 100)
        assert chunks.shape == (4, 256)
        assert chunks.dtype == np.int32
        assert bytes(chunks[0].tolist()) == content[:256]
        assert bytes(chunks[-1].tolist()) == content[-256:]

    def test_a_short_text_gives_what_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_bytes(b"ab" * 400)
        assert calibration_tokens(tmp_path / "short.txt", BYTES, 8192).shape == (3, 256)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "too short to calibrate on .*found 0"),
            (b"tiny", "512 tokens or more, found 4"),
            (b"\xff\xfe" * 600, "not UTF-8 text .*0xff"),
            (b"text\0" * 600, "byte 4: is not text .*0x00"),
        ],
    )
    def test_what_is_no_text_to_calibrate_on(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            calibration_tokens(tmp_path / "x.txt", BYTES, 8192)

    def test_a_text_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"absent\.txt.*cannot be read"):
            calibration_tokens(tmp_path / "absent.txt", BYTES, 8192)

    @pytest.mark.parametrize("n_tokens", [0, 511, -1, 600.0, True])
    def test_too_few_tokens(self, n_tokens: object, text: Path) -> None:
        with pytest.raises(InputError, match="calibration tokens"):
            calibration_tokens(text, BYTES, n_tokens)  # type: ignore[arg-type]


class TestMoments:
    def test_they_equal_a_direct_computation(self, moments: Path, tiny_checkpoint: Path) -> None:
        """One token after another, in float64, with every input kept; to what float32 activations differ."""
        with open_checkpoint(tiny_checkpoint) as source, MomentsFile(moments) as file:
            weights = {name: tensor.double() for name, tensor in source.weights().items()}
            seen: dict[str, list] = {rule.name: [] for rule in multiplied(source.rules)}

            class Keeping(EagerOps):
                def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
                    seen[name].append(x[0])
                    return super().linear(name, x)

            for chunk in file.tokens:
                state = {
                    t.name: torch.full((1, *t.shape), t.init, dtype=torch.float64)
                    for t in source.version.state_spec(source.spec).tensors
                }
                for token in chunk.tolist():
                    pieces = token_pieces(weights[EMBEDDING][token : token + 1], source.spec)
                    _, state = source.version.step(source.spec, Keeping(weights), pieces, state)
            held = calibration.held_out_chunks(N_CHUNKS)
            assert held == [1]
            for rule in multiplied(source.rules):
                inputs = torch.stack(seen[rule.name]).reshape(N_CHUNKS, 256, -1)
                kept = inputs[[0, 2]].flatten(0, 1)
                expected = kept.T @ kept / len(kept)
                found = file.inputs(rule)
                assert (found.moments - expected).abs().max() <= 2e-5 * expected.abs().max(), rule.name
                assert torch.equal(found.moments, found.moments.T)
                assert (found.held_out - inputs[1]).abs().max() <= 2e-5 * inputs[1].abs().max()

    def test_the_file_says_whose_they_are(self, moments: Path, tiny_checkpoint: Path) -> None:
        with open_checkpoint(tiny_checkpoint) as source, MomentsFile(moments) as file:
            assert file.model_id == source.model_id()
            assert file.done == [rule.name for rule in multiplied(source.rules)]
            with pytest.raises(InputError, match="another model"):
                file.check_model("0" * 64)

    def test_many_passes_give_the_same_file(
        self, moments: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where not all moments fit into memory; and what was cut off in the second pass goes on from the first."""
        monkeypatch.setattr(calibration, "MOMENTS_BYTES", 0)
        path = tmp_path / "x.moments"
        with open_checkpoint(tiny_checkpoint) as source, MomentsFile(moments) as whole:
            tokens = whole.tokens.copy()

            def interrupt(stage: str, done: int, total: int) -> None:
                if done > 1.5 * tokens.size:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                collect_moments(source, whole.model_id, tokens, path, progress=interrupt)
            with MomentsFile(path) as begun:
                assert 0 < len(begun.done) < len(whole.done)
            collect_moments(source, whole.model_id, tokens, path)
        assert path.read_bytes() == moments.read_bytes()

    def test_another_text_or_state_is_refused(self, moments: Path, tiny_checkpoint: Path) -> None:
        before = moments.read_bytes()
        with open_checkpoint(tiny_checkpoint) as source, MomentsFile(moments) as file:
            other = file.tokens.copy()
            other[1, 7] ^= 1
            with pytest.raises(InputError, match="another text"):
                collect_moments(source, file.model_id, other, moments)
            states = {t.name: np.zeros(t.shape, np.float32) for t in source.version.state_spec(source.spec).tensors}
            with pytest.raises(InputError, match="another initial state"):
                collect_moments(source, file.model_id, file.tokens.copy(), moments, initial_state=states)
        assert moments.read_bytes() == before

    @pytest.mark.parametrize("token", [-1, 256])
    def test_tokens_outside_the_vocabulary(self, token: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
        tokens = np.full((2, 256), 7, np.int32)
        tokens[1, 9] = token
        with open_checkpoint(tiny_checkpoint) as source, pytest.raises(TokenError, match="outside the vocabulary"):
            collect_moments(source, "0" * 64, tokens, tmp_path / "x")
        assert os.listdir(tmp_path) == []

    def test_a_damaged_file(self, moments: Path, tmp_path: Path) -> None:
        content = bytearray(moments.read_bytes())
        content[-100] ^= 1
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ChecksumError, match=r"value\.weight|head"):
            MomentsFile(tmp_path / "x")

    def test_a_file_with_numbers_that_are_not(self, moments: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with open_checkpoint(tiny_checkpoint) as source, MomentsFile(moments) as file:
            rule = multiplied(source.rules)[0]
            inputs = file.inputs(rule)
            inputs.moments[2, 3] = torch.nan
            calibration._append(tmp_path / "x", {"model_id": file.model_id}, file.tokens, [], {rule.name: inputs})
        with MomentsFile(tmp_path / "x") as bad, pytest.raises(HeaderError, match=rf"{rule.name}: holds NaN"):
            bad.inputs(rule)

    @pytest.mark.parametrize("scale", [1e38, 1e30])
    def test_activations_that_overflow(self, scale: float, tmp_path: Path, text: Path) -> None:
        """NaN or infinity itself, and numbers whose squares are: the matrix is named and nothing is written."""
        tensors = random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=256)
        tensors["blocks.0.att.ln_x.weight"] = tensors["blocks.0.att.ln_x.weight"].float() * 0 + scale
        tensors["blocks.0.att.ln_x.bias"] = tensors["blocks.0.att.ln_x.bias"].float() * 0 + scale
        save(tensors, tmp_path / "x.pth")
        with pytest.raises(NonFiniteError, match=r"input of blocks\.0"):
            export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="int4", calibrate=text)
        assert os.listdir(tmp_path) == ["x.pth"]


class TestExport:
    def test_moments_of_a_text_or_from_their_file_give_the_same_engine(
        self, engine: Path, moments: Path, text: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        """Also in a file that is kept, and where that was not finished; beside the engine nothing else is left."""
        options = {"quant": "int4", "calibrate": text, "calibration_tokens": 256 * N_CHUNKS}
        report = export_engine(tiny_checkpoint, tmp_path / "a.goslet", **options)
        assert report.calibration_tokens == 256 * N_CHUNKS
        assert os.listdir(tmp_path) == ["a.goslet"]
        export_engine(tiny_checkpoint, tmp_path / "b.goslet", moments=tmp_path / "kept", **options)
        assert (tmp_path / "kept").read_bytes() == moments.read_bytes()
        for name in ("a.goslet", "b.goslet"):
            assert (tmp_path / name).read_bytes() == engine.read_bytes()

    def test_cut_off_while_quantizing_it_goes_on_from_the_moments(
        self, engine: Path, moments: Path, text: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        stages: list[str] = []

        def interrupt(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            if stage == "quantizing" and done == total // 2:
                raise KeyboardInterrupt

        options = {
            "quant": "int4", "calibrate": text, "calibration_tokens": 256 * N_CHUNKS, "moments": tmp_path / "kept",
        }  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            export_engine(tiny_checkpoint, tmp_path / "x.goslet", progress=interrupt, **options)
        assert os.listdir(tmp_path) == ["kept"]
        assert "calibrating" in stages
        stages.clear()
        export_engine(
            tiny_checkpoint, tmp_path / "x.goslet", progress=lambda stage, done, total: stages.append(stage), **options
        )
        assert "calibrating" not in stages
        assert (tmp_path / "x.goslet").read_bytes() == engine.read_bytes()

    def test_it_verifies_and_the_integers_are_others(
        self, engine: Path, tiny_engines: dict[str, Path], tiny_checkpoint: Path
    ) -> None:
        report = verify_engine(engine, tiny_checkpoint)
        assert report.passed, report
        checks = {check.name: check for check in report.checks}
        assert 0.5 < checks["integers int4/32"].value <= checks["integers int4/32"].limit == 1
        assert 0.5 < checks["scales int8/32"].value <= checks["scales int8/32"].limit == 1
        with EngineFile.open(engine) as fed_back, EngineFile.open(tiny_engines["int4"]) as nearest:
            assert fed_back.provenance["method"] == "gptq"
            assert fed_back.provenance["calibration_tokens"] == 256 * N_CHUNKS
            assert "method" not in nearest.provenance
            name = "blocks.1.ffn.key.weight"
            assert (quantized_values(fed_back.weight(name)) != quantized_values(nearest.weight(name))).mean() > 0.1
            assert fed_back.weight(EMBEDDING).data.tobytes() == nearest.weight(EMBEDDING).data.tobytes()

    def test_a_budget_is_met_and_spent(self, moments: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        formats = []
        for bits, method in ((7.0, "gptq"), (9.0, "rtn")):
            path = tmp_path / f"{method}.goslet"
            report = export_engine(tiny_checkpoint, path, bits=bits, moments=moments, method=method)
            assert bits - 0.5 < report.bits_per_weight <= bits
            with EngineFile.open(path) as file:
                formats.append({str(entry.format) for entry in file.tensors.values() if len(entry.shape) == 2})
                assert file.provenance["recipe"]["name"] == f"{bits:g} bits"
                assert file.provenance.get("method", "rtn") == method
            assert verify_engine(path, tiny_checkpoint, n_tokens=16).passed
        assert len(formats[0]) > 1
        assert formats[0] != formats[1]

    def test_a_budget_that_cannot_be_met(self, moments: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(QuantizationError, match=r"bits: cannot be met \(expected \d\.\d+ or more"):
            export_engine(tiny_checkpoint, tmp_path / "x.goslet", bits=2.5, moments=moments)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 4.5}, "bits: needs a calibration"),
            ({"bits": float("nan"), "moments": "m"}, "bits: is not a positive number"),
            ({"quant": "int4", "method": "gptq"}, "method gptq: needs a calibration"),
            ({"quant": "int4", "method": "obq"}, "no such method"),
            ({"quant": "int4", "method": "rtn", "moments": "m"}, "would change nothing"),
            ({"quant": "f16", "moments": "m"}, "would change nothing"),
        ],
    )
    def test_what_cannot_be_asked_for(self, options: dict, message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            export_engine(tiny_checkpoint, tmp_path / "x.goslet", **options)
        assert os.listdir(tmp_path) == []

    def test_moments_of_another_model_or_none(
        self, moments: Path, text: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        save(random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=256), tmp_path / "other.pth")
        out = tmp_path / "x.goslet"
        with pytest.raises(InputError, match="another model"):
            export_engine(tmp_path / "other.pth", out, quant="int4", moments=moments)
        with pytest.raises(ContainerError, match="does not exist"):
            export_engine(tiny_checkpoint, out, quant="int4", moments=tmp_path / "absent")
        (tmp_path / "mine").write_text("a letter to a friend, and no moments file at all")
        for options in ({}, {"calibrate": text}):
            with pytest.raises(WrongMagicError, match="moments file"):
                export_engine(tiny_checkpoint, out, quant="int4", moments=tmp_path / "mine", **options)
        for name in ("text", "engine"):
            with pytest.raises(OutputError, match=f"is also the .*{name}"):
                place = text if name == "text" else out
                export_engine(tiny_checkpoint, out, quant="int4", calibrate=text, moments=place)
        assert sorted(os.listdir(tmp_path)) == ["mine", "other.pth"]

    def test_a_model_without_tokenizer(self, text: Path, tmp_path: Path) -> None:
        save(random_rwkv7(n_layer=1, n_embd=32, head_size=16, vocab_size=300), tmp_path / "x.pth")
        with pytest.raises(TokenizerError, match="no tokenizer"):
            export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant="int4", calibrate=text)
        assert os.listdir(tmp_path) == ["x.pth"]
