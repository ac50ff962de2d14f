"""Exporting: what ends up in the engine, and that nothing half-written is ever left behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

import onnx  # noqa: E402
from random_checkpoint import random_rwkv7, save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import (  # noqa: E402
    GosletError,
    InputError,
    OutputError,
    QuantizationError,
    TensorValueError,
    TokenizerError,
)
from goslet.export import Recipe, export_engine, recipe  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.exporter import usual_chat  # noqa: E402
from goslet.export.models.tensors import Kind  # noqa: E402
from goslet.spec import EMBEDDING  # noqa: E402
from goslet.weights import WeightFormat, decode, encode  # noqa: E402

ONE_LAYER = {"n_layer": 1, "n_embd": 32, "head_size": 16, "vocab_size": 256, "rank_w": 4, "rank_a": 4, "rank_g": 4}


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    save(random_rwkv7(**ONE_LAYER), tmp_path / "one.pth")
    return tmp_path / "one.pth"


def test_same_checkpoint_gives_the_same_bytes(one_layer: Path, tmp_path: Path) -> None:
    for name in ("a.goslet", "b.goslet"):
        export_engine(one_layer, tmp_path / name, quant="int4")
    assert (tmp_path / "a.goslet").read_bytes() == (tmp_path / "b.goslet").read_bytes()


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4", "int3"])
def test_every_weight_is_the_checkpoints_encoded(
    quant: str, tiny_engines: dict[str, Path], tiny_checkpoint: Path
) -> None:
    """Each stored tensor equals the checkpoint's, ln0 folded into the embedding, in the format of the recipe."""
    with EngineFile.open(tiny_engines[quant]) as engine, open_checkpoint(tiny_checkpoint) as source:
        weights = source.weights()
        raw = [source.source(source.sources[n]) for n in (EMBEDDING, "blocks.0.ln0.weight", "blocks.0.ln0.bias")]
        weights[EMBEDDING] = torch.nn.functional.layer_norm(raw[0], (64,), *raw[1:], 1e-5)
        assert set(engine.tensors) == set(weights)
        for name, entry in engine.tensors.items():
            is_vector = len(entry.shape) == 1
            careful = name == EMBEDDING or name[-2:] in {f"{letter}{n}" for letter in "wavg" for n in "12"}
            careful |= quant == "int3" and name == "head.weight"
            kept = {"int4": "int8", "int3": "int4"}.get(quant, quant)
            computed = name == EMBEDDING and quant == "bf16"
            expected = "f32" if is_vector or computed else kept if careful else quant
            assert entry.format.name == expected, name
            values = decode(engine.weight(name))
            reference = decode(encode(weights[name].numpy(), entry.format, name))
            np.testing.assert_array_equal(values, reference)


def test_recipe_of_ones_own(one_layer: Path, tmp_path: Path) -> None:
    base = recipe("int4", 64)
    mixed = Recipe(
        "mine", {**base.by_kind, Kind.HEAD: WeightFormat("f16")}, {"blocks.0.ffn.key.weight": WeightFormat("int8", 32)}
    )
    export_engine(one_layer, tmp_path / "x.goslet", quant=mixed)
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        assert str(engine.tensors["head.weight"].format) == "f16"
        assert str(engine.tensors["blocks.0.ffn.key.weight"].format) == "int8/32"
        assert str(engine.tensors["blocks.0.ffn.value.weight"].format) == "int4/64"
        assert engine.provenance["recipe"]["name"] == "mine"
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert np.isfinite(engine.session().feed([1, 2])).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int3"])
def test_rows_of_the_embedding_are_the_same_to_all(name: str, tmp_path: Path) -> None:
    """The native engine reads them itself. Other weights are float32: nothing else differs. Short groups, odd bytes."""
    from goslet.export.verify import verify_engine

    save(random_rwkv7(n_layer=1, n_embd=36, head_size=12, vocab_size=50, seed=3), tmp_path / "x.pth")
    base = recipe("f32")
    mixed = Recipe("mine", {**base.by_kind, Kind.EMBEDDING: WeightFormat(name, 32)})
    export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant=mixed)
    report = verify_engine(tmp_path / "x.goslet", tmp_path / "x.pth", n_tokens=20)
    assert report.passed, report
    assert all(check.limit == 3e-5 for check in report.checks if check.name.startswith("native"))


def test_recipes_that_cannot_be(one_layer: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="int5"):
        export_engine(one_layer, tmp_path / "x.goslet", quant="int5")
    with pytest.raises(QuantizationError, match="48"):
        export_engine(one_layer, tmp_path / "x.goslet", quant="int4", group=48)
    low = Recipe("low", recipe("int4").by_kind, {"blocks.0.att.k_k": WeightFormat("int4", 32)})
    with pytest.raises(QuantizationError, match=r"blocks\.0\.att\.k_k"):
        export_engine(one_layer, tmp_path / "x.goslet", quant=low)
    assert os.listdir(tmp_path) == ["one.pth"]


def test_tokenizer_choices(one_layer: Path, tmp_path: Path) -> None:
    export_engine(one_layer, tmp_path / "bytes.goslet")
    with EngineFile.open(tmp_path / "bytes.goslet") as engine:
        assert engine.tokenizer_kind == "bytes"
    with pytest.raises(TokenizerError):
        export_engine(one_layer, tmp_path / "x.goslet", tokenizer="world")
    with pytest.raises(TokenizerError, match=r"absent\.json"):
        export_engine(one_layer, tmp_path / "x.goslet", tokenizer=tmp_path / "absent.json")
    assert not (tmp_path / "x.goslet").exists()


def write_metaspace_tokenizer(path: Path) -> None:
    """A tokenizer.json of Llama's kind: pieces of text with spaces made visible, and bytes only to fall back to."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581": 0, "a": 1, "<0x0A>": 2}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(path))


def test_a_tokenizer_beside_the_checkpoint_that_is_not_exact(one_layer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copy(one_layer, folder / "model.pth")
    write_metaspace_tokenizer(folder / "tokenizer.json")
    report = export_engine(folder, tmp_path / "x.goslet")
    assert report.tokenizer_kind is None
    assert [
        note for note in report.notes if "token ids only" in note and "tokenizer.json" in note and "ByteLevel" in note
    ]
    with pytest.raises(TokenizerError, match="--tokenizer none"):
        export_engine(folder, tmp_path / "y.goslet", tokenizer=folder / "tokenizer.json")


def test_no_tokenizer_where_bytes_would_do(one_layer: Path, tmp_path: Path) -> None:
    report = export_engine(one_layer, tmp_path / "x.goslet", tokenizer="none")
    assert report.tokenizer_kind is None
    assert report.notes == ()


def test_world_tokenizer_from_the_package(tmp_path: Path) -> None:
    pytest.importorskip("pyrwkv_tokenizer", reason="the World vocabulary comes from pyrwkv-tokenizer")
    save(random_rwkv7(**{**ONE_LAYER, "vocab_size": 65536}), tmp_path / "x.pth")
    report = export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", tokenizer="world", quant="int4")
    assert report.tokenizer_kind == "world"
    with goslet.open(tmp_path / "x.goslet") as engine:
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(engine.encode("a goslet, 小鹅")) == "a goslet, 小鹅"


def test_self_contained_onnx_equals_the_engine(one_layer: Path, tmp_path: Path) -> None:
    """ONNX Runtime alone, on the one file and with a token as input, against the engine."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the file here")
    for quant in ("f32", "bf16", "int4"):
        path = tmp_path / f"{quant}.onnx"
        export_engine(one_layer, tmp_path / f"{quant}.goslet", quant=quant, onnx=path)
        model = onnx.load(path)
        assert model.graph.input[0].name == "token"
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        alone = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        with goslet.open(tmp_path / f"{quant}.goslet", backend="ort") as engine:
            session = engine.session()
            state = {f"state_in.{name}": view[None].copy() for name, view in session.state.front.items()}
            for token in (3, 250):
                logits, *after = alone.run(None, {"token": np.array([token]), **state})
                state = dict(zip(state, after, strict=True))
                expected = session.feed([token])
                assert np.abs(logits[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_existing_output_needs_overwrite_and_is_refused_before_any_work(one_layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.goslet"
    path.write_text("mine")
    stages: list[str] = []
    with pytest.raises(OutputError, match=r"x\.goslet"):
        export_engine(one_layer, path, progress=lambda stage, done, total: stages.append(stage))
    assert path.read_text() == "mine"
    assert stages == []
    export_engine(one_layer, path, overwrite=True)
    with EngineFile.open(path, check=True):
        pass


def test_a_bad_weight_found_late_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_rwkv7(**ONE_LAYER)
    tensors["head.weight"] *= 1e30
    save(tensors, tmp_path / "x.pth")
    for quant in ("f16", "int4"):
        with pytest.raises(TensorValueError, match=r"head\.weight"):
            export_engine(tmp_path / "x.pth", tmp_path / "x.goslet", quant=quant)
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("when", [1, 20, "last"])
def test_interrupt_leaves_nothing(when: int | str, one_layer: Path, tmp_path: Path) -> None:
    """At the first weight, in the middle, and when the last one is made but the file has not got its name yet."""

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "quantizing" and done == (total if when == "last" else when):
            assert any(entry.endswith(".tmp") for entry in os.listdir(tmp_path)), "the test is about a file begun"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_engine(one_layer, tmp_path / "x.goslet", progress=interrupt)
    assert os.listdir(tmp_path) == ["one.pth"]


def test_interrupt_keeps_the_engine_that_was_there(one_layer: Path, tmp_path: Path) -> None:
    export_engine(one_layer, tmp_path / "x.goslet", quant="int4")
    before = (tmp_path / "x.goslet").read_bytes()

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "quantizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_engine(one_layer, tmp_path / "x.goslet", quant="f32", overwrite=True, progress=interrupt)
    assert (tmp_path / "x.goslet").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["one.pth", "x.goslet"]


def test_signal_in_the_middle_leaves_nothing(one_layer: Path, tmp_path: Path) -> None:
    """A real SIGINT while weights are being written: the process dies of it and the folder is as before."""
    program = (
        "import sys, time\n"
        "from goslet.export import export_engine\n"
        "def slow(stage, done, total):\n"
        "    if stage == 'quantizing':\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(0.2)\n"
        "export_engine(sys.argv[1], sys.argv[2], progress=slow)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, one_layer, tmp_path / "x.goslet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert os.listdir(tmp_path) == ["one.pth"]


def test_report_and_provenance(one_layer: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    report = export_engine(
        one_layer, tmp_path / "x.goslet", progress=lambda stage, done, total: seen.update({stage: (done, total)})
    )
    assert report.size_bytes == (tmp_path / "x.goslet").stat().st_size
    assert all(done == total for done, total in seen.values())
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        assert engine.provenance["source"] == "one.pth"
        assert str(tmp_path) not in str(engine.provenance)
        assert engine.model_id == report.model_id
        plain_bytes = sum(engine.weight(name).size_bytes for name in engine.tensors)
        stored_bytes = sum(engine.packed(name).size_bytes for name in engine.tensors)
        assert 8 < 8 * plain_bytes / engine.n_weights < 10
        assert plain_bytes < stored_bytes, "this model's ranks are padded"
        assert report.bits_per_weight == 8 * stored_bytes / engine.n_weights


def test_layouts_are_those_that_the_kernels_multiply(tiny_engines: dict[str, Path]) -> None:
    with EngineFile.open(tiny_engines["int4"]) as engine:
        for name, entry in engine.tensors.items():
            if len(entry.shape) == 1 or name == EMBEDDING:
                assert entry.layout == "rows", name
            else:
                assert entry.layout == ("columns" if name.endswith("ffn.value.weight") else "tiles"), name
        assert {entry.layout for entry in engine.tensors.values()} == {"rows", "columns", "tiles"}


def test_norm_eps_reaches_graph_and_spec(one_layer: Path, tmp_path: Path) -> None:
    export_engine(one_layer, tmp_path / "x.goslet", norm_eps=1e-5)
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        assert engine.spec.norm_eps == 1e-5
        graph = onnx.ModelProto.FromString(bytes(engine.graph_bytes)).graph
        values = {round(a.f, 9) for node in graph.node for a in node.attribute if a.name == "epsilon"}
        assert values == {1e-5}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "x", 3])
def test_norm_eps_that_is_no_positive_float(value: object, one_layer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="norm_eps"):
        export_engine(one_layer, tmp_path / "x.goslet", norm_eps=value)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["one.pth"]


@pytest.mark.parametrize(
    ("path", "version", "expected"),
    [
        ("rwkv-g1k-13b-5228.pth", "7", "g1"),
        ("rwkv7-2.9B-g1", "7", "g1"),
        ("rwkv7-2.9B-g1/model.safetensors", "7", "g1"),
        ("rwkv7a-g1d-0.1b-20260212-ctx8192.pth", "7a", "g1"),
        ("Mollysama_rwkv-7-g1f-1.5b.Q8_0.gguf", "7", "g1"),
        ("RWKV7-G0a2-7.2b.pth", "7", "g1"),
        ("rwkv7-g1a-0.1b-20250728-ctx4096.pth", "7", "g1-2025"),
        ("rwkv7-g1-0.4b-20250324-ctx4096-Q8_0.gguf", "7", "g1-2025"),
        ("rwkv7-g1b-1.5b-20251231-ctx8192.pth", "7", "g1-2025"),
        ("RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth", "7", "world"),
        ("RWKV7-Goose-World3-2.9B-HF", "7", "world"),
        ("rwkv7-g1/rwkv7-world-0.1b.pth", "7", "world"),
        ("rwkv7-0.1b-g64.pth", "7", "world"),
        ("rwkv7-pg19.pth", "7", "world"),
        ("rwkv7-gguf-1.5b.gguf", "7", "world"),
        ("g1.pth", "7", "world"),
        ("rwkv-6-g1.pth", "6", "world"),
        ("model.pth", "7", "world"),
    ],
)
def test_the_chat_template_goes_by_the_checkpoints_name(path: str, version: str, expected: str, tmp_path: Path) -> None:
    assert usual_chat(tmp_path / path, version) == expected


def test_nothing_that_is_read_is_written_over(one_layer: Path, tmp_path: Path) -> None:
    before = one_layer.read_bytes()
    (tmp_path / "link.goslet").symlink_to(one_layer)
    for output in (one_layer, tmp_path / "link.goslet"):
        with pytest.raises(OutputError, match="is also the checkpoint"):
            export_engine(one_layer, output, overwrite=True)
    with pytest.raises(OutputError, match="is also the engine"):
        export_engine(one_layer, tmp_path / "x.goslet", onnx=tmp_path / "x.goslet", overwrite=True)
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text("{}")
    with pytest.raises(OutputError, match="is also the tokenizer"):
        export_engine(one_layer, vocabulary, tokenizer=vocabulary, overwrite=True)
    template = tmp_path / "chat.json"
    template.write_text("{}")
    with pytest.raises(OutputError, match="is also the chat template"):
        export_engine(one_layer, template, chat=template, overwrite=True)
    (tmp_path / "folder").mkdir()
    shard = tmp_path / "folder" / "model.safetensors"
    shard.write_text("weights")
    with pytest.raises(OutputError, match="is part of the checkpoint"):
        export_engine(tmp_path / "folder", shard, overwrite=True)
    assert one_layer.read_bytes() == before
    assert vocabulary.read_text() == template.read_text() == "{}"
    assert shard.read_text() == "weights"
    assert not (tmp_path / "x.goslet").exists()


def test_exports_in_two_threads_leave_the_process_as_it_was(one_layer: Path, tmp_path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    before = (sys.stdout, logger.level)
    threads = [
        threading.Thread(target=export_engine, args=(one_layer, tmp_path / f"{index}.goslet")) for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stdout, logger.level) == before
    assert (tmp_path / "0.goslet").read_bytes() == (tmp_path / "1.goslet").read_bytes()


@pytest.mark.parametrize("signalled", [KeyboardInterrupt, SystemExit])
def test_interrupt_that_torch_turns_into_its_own_error(
    signalled: type[BaseException], one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C or SIGTERM while torch imports or traces comes out as an error about torch; it is still that."""
    monkeypatch.setattr("goslet.export.graph._TRACES", {})

    def interrupted(*_: object, **__: object) -> None:
        try:
            raise signalled
        except signalled as interrupt:
            raise RuntimeError("please submit a PR") from interrupt

    monkeypatch.setattr("torch.onnx.export", interrupted)
    with pytest.raises(signalled):
        export_engine(one_layer, tmp_path / "x.goslet")

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("please submit a PR")

    monkeypatch.setattr("torch.onnx.export", failing)
    with pytest.raises(GosletError, match="cannot be traced: RuntimeError"):
        export_engine(one_layer, tmp_path / "x.goslet")
    assert os.listdir(tmp_path) == ["one.pth"]
