"""GGUF: types, byte orders, splits, keys and the vocabulary inside, on files that are made here."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
gguf = pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")

from gguf_rwkv7 import write_gguf  # noqa: E402
from random_checkpoint import random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import CheckpointError, MissingTensorError, TensorShapeError, TokenizerError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.readers.gguf_file import read_gguf  # noqa: E402
from goslet.export.readers.gguf_header import read_header  # noqa: E402
from goslet.export.readers.gguf_keys import AGREES, NEUTRAL, settings  # noqa: E402
from goslet.tokenizer import Tokenizer, world_tokenizer  # noqa: E402

from .ggml_blocks import DECODERS, decoded, random_blocks  # noqa: E402
from .test_readers import refusal, write_gguf6  # noqa: E402

SEVEN = {"n_layer": 2, "n_embd": 64, "vocab_size": 40, "rank_w": 8, "rank_a": 12, "rank_v": 16, "rank_g": 20}
Change = Callable[[Any], None]


def decodes(kind: Any) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind.name for kind in gguf.GGMLQuantizationType if decodes(kind) and kind.name not in ("F32", "F16")]


def written(
    path: Path, tensors: dict[str, tuple[Any, Any]], change: Change = lambda writer: None, **options: Any
) -> Path:
    """A GGUF of some tensors: the data and the type, None for that of the data."""
    writer = gguf.GGUFWriter(path, "rwkv7", **options)
    writer.add_wkv_head_size(64)
    change(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one(path: Path, change: Change = lambda writer: None, **options: Any) -> Path:
    """A GGUF of one small tensor."""
    data = np.arange(128, dtype=np.float32).reshape(2, 64)
    return written(path, {"token_embd.weight": (data, None)}, change, **options)


def changed(source: Path, path: Path, change: Change = lambda writer: None, **options: Any) -> Path:
    """The tensors of another file, with other keys."""
    tensors = {item.name: (np.array(item.data), None) for item in gguf.GGUFReader(source).tensors}
    return written(path, tensors, change, **options)


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert caught.value.file is not None
    return caught.value


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seven")
    save(random_rwkv7(**SEVEN, seed=5), folder / "x.pth")
    write_gguf(folder / "x.pth", folder / "x.gguf", "F32")
    return folder / "x.gguf"


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "x.gguf"
    write_gguf6(random_rwkv6(n_layer=3, n_embd=64, vocab_size=40, rank_mix=8, rank_decay=12, seed=5), path, rescale=0)
    return path


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_that_gguf_decodes_is_read_by_rows(kind: str, tmp_path: Path) -> None:
    """Against a decoder of our own where there is one; the types of `IQ` with grids, NVFP4 and BF16 against gguf's."""
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    n_blocks = 512 // block
    if kind in DECODERS:
        data = random_blocks(kind, 6, n_blocks, block_bytes)
        expected = decoded(kind, data, block_bytes)
    else:
        data = np.random.default_rng(3).integers(0, 60, (6, n_blocks * block_bytes), np.uint8)
        expected = gguf.quants.dequantize(data, number)
    tensors = {"token_embd.weight": (data, number), "output_norm.weight": (data[1], number)}
    found = read_gguf(written(tmp_path / "x.gguf", tensors)).tensors
    assert expected.std() > 0 and found["emb.weight"].shape == (6, 512)
    # Products of a half and an integer of at most 13 bits, rounded twice at most.
    limit = 2**-22 * np.abs(expected).max()
    for rows in (slice(None), slice(2, 5), slice(5, 6)):
        np.testing.assert_allclose(found["emb.weight"].read(rows).numpy(), expected[rows], rtol=0, atol=limit)
        np.testing.assert_allclose(found["ln_out.weight"].read(rows).numpy(), expected[1][rows], rtol=0, atol=limit)


def test_the_types_that_people_publish_are_among_them() -> None:
    published = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"}
    assert published | {"MXFP4", "TQ1_0", "TQ2_0", "BF16"} <= set(KINDS)


@pytest.mark.parametrize(
    ("number", "named"), [(41, "Q1_0"), (42, "type 42, Q2_0 in llama.cpp"), (9, "Q8_1"), (24, "I8"), (999, "type 999")]
)
def test_a_type_that_gguf_does_not_decode_is_named(number: int, named: str, tmp_path: Path) -> None:
    path = one(tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(content)
    error = refused(path)
    assert error.found == named and error.place == "token_embd.weight"
    assert error.remedy is not None and "Q8_0" in error.remedy and "TQ1_0" in str(error.expected)


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    path = one(tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", gguf.GGMLQuantizationType.Q4_K)
    path.write_bytes(content)
    error = refused(path)
    assert "whole blocks" in str(error) and (error.place, error.found) == ("token_embd.weight", 64)


def rewritten(source: Path, path: Path, kind: str, order: str) -> Path:
    """The same model in another byte order, its large matrices in another type."""
    wanted = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, tuple[Any, Any]] = {}
    for item in gguf.GGUFReader(source).tensors:
        data = np.array(item.data)
        if data.ndim == 2 and min(data.shape) >= 40:
            data = gguf.quants.quantize(data, wanted)
        tensors[item.name] = (data, wanted if data.dtype == np.uint8 else None)
    return written(path, tensors, endianess=gguf.GGUFEndian[order])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "BF16"])
def test_the_other_byte_order_is_the_same_model_or_refused_by_name(kind: str, seven: Path, tmp_path: Path) -> None:
    little, big = (rewritten(seven, tmp_path / f"{order}.gguf", kind, order) for order in ("LITTLE", "BIG"))
    if kind in ("F32", "F16"):
        with open_checkpoint(little) as a, open_checkpoint(big) as b:
            assert a.model_id() == b.model_id()
            rows, source = slice(3, 7), a.sources["emb.weight"]
            assert torch.equal(a.source(source, rows), b.source(source, rows))
            assert b.source(source, rows).abs().max() > 1e-3
    else:
        error = refused(big)
        assert "big-endian" in str(error) and error.found == kind and error.remedy


def test_another_version_of_ggmls_formats_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {"token_embd.weight": (random_blocks("Q8_0", 2, 2, 34), kind)}
    read_gguf(written(tmp_path / "x.gguf", tensors, lambda writer: writer.add_quantization_version(2)))
    old = written(tmp_path / "old.gguf", tensors, lambda writer: writer.add_quantization_version(1))
    assert refused(old).place == "general.quantization_version"
    read_gguf(one(tmp_path / "plain.gguf", lambda writer: writer.add_quantization_version(1)))


# -------------------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_the_header_is_what_the_package_reads(order: str, seven: Path, tmp_path: Path) -> None:
    def every_kind(writer: Any) -> None:
        for bits in (8, 16, 32, 64):
            getattr(writer, f"add_uint{bits}")(f"a.u{bits}", 2**bits - 3)
            getattr(writer, f"add_int{bits}")(f"a.i{bits}", 3 - 2 ** (bits - 1))
        writer.add_float32("a.f32", 1e-5)
        writer.add_float64("a.f64", 1e-5)
        writer.add_bool("a.bool", True)
        writer.add_string("a.text", "Gänse")
        writer.add_array("a.numbers", [1, -2, 3])
        writer.add_array("a.texts", ["", "é", "a\\x00"])

    path = changed(seven, tmp_path / "x.gguf", every_kind, endianess=gguf.GGUFEndian[order])
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    texts = header.values["a.texts"]
    assert isinstance(texts, list) and [text.decode() for text in texts] == fields.pop("a.texts")
    assert np.asarray(header.values["a.numbers"]).tolist() == fields.pop("a.numbers")
    assert {key: header.values[key] for key in fields} == fields
    assert len(header.values) == len(fields) + 2
    assert [(e.name, list(e.shape), e.type_number, e.start_bytes) for e in header.entries] == [
        (t.name, t.shape.tolist()[::-1], int(t.tensor_type), t.data_offset) for t in reader.tensors
    ]


def test_versions(seven: Path, tmp_path: Path) -> None:
    content, path = bytearray(seven.read_bytes()), tmp_path / "x.gguf"
    for version, said in ((1, "newer converter"), (4, "newer goslet"), (2, "")):
        content[4:8] = struct.pack("<I", version)
        path.write_bytes(content)
        if said:
            assert said in str(refused(path))
        else:
            with open_checkpoint(path) as two, open_checkpoint(seven) as three:
                assert two.model_id() == three.model_id()


def test_lengths_that_are_too_large_are_refused_at_once(tmp_path: Path) -> None:
    """Each of them would be memory or hours: a text, an array of texts or numbers, keys and tensors."""
    path = one(tmp_path / "x.gguf", lambda writer: (writer.add_array("k.t", ["aa"]), writer.add_array("k.n", [7.5])))
    whole = path.read_bytes()
    texts, numbers = whole.index(b"k.t") + 3 + 4 + 4, whole.index(b"k.n") + 3 + 4 + 4
    for at in (8, 16, texts, texts + 8, numbers, whole.index(b"k.t") - 8):
        for length in (1 << 60, 1 << 40, 1 << 63):
            path.write_bytes(whole[:at] + struct.pack("<Q", length) + whole[at + 8 :])
            assert "ends before" in str(refused(path)) or "too long" in str(refused(path))


def test_headers_that_contradict_themselves(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_array("k.n", [7.5])
        writer.add_uint8("k.l", 1)
        writer.add_custom_alignment(64)

    path = one(tmp_path / "x.gguf", change)
    whole = path.read_bytes()
    name = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    for at, new, said in (
        (whole.index(b"k.n") + 7, struct.pack("<I", 9), "of a kind"),  # an array of arrays
        (whole.index(b"k.n") + 3, struct.pack("<I", 77), "of a kind"),
        (whole.index(b"general.alignment") + 21, struct.pack("<I", 48), "power of two"),
        (whole.index(b"general.alignment") + 21, struct.pack("<I", 0), "power of two"),
        (name, struct.pack("<I", 5), "number of axes"),
        (name, struct.pack("<I", 0), "number of axes"),
        (name + 4, struct.pack("<Q", 0), "impossible shape"),
        (whole.index(b"k.n"), b"k.m", ""),
    ):
        path.write_bytes(whole[:at] + new + whole[at + len(new) :])
        if said:
            assert said in str(refused(path))
        else:
            read_gguf(path)
    path.write_bytes(whole.replace(b"k.n", b"k.m").replace(b"k.l", b"k.m"))
    assert "a key is there twice" in str(refused(path))


def test_a_damaged_header_is_read_or_refused_and_nothing_else(seven: Path, tmp_path: Path) -> None:
    """Bytes and lengths of the header changed at random: no other exception, and no tensor that cannot be read."""
    whole, path, rng = seven.read_bytes(), tmp_path / "x.gguf", np.random.default_rng(11)
    end, n_refused = gguf.GGUFReader(seven).data_offset, 0
    for _ in range(200):
        content = bytearray(whole)
        at = int(rng.integers(4, end - 8))
        if rng.random() < 0.5:
            content[at] = int(rng.integers(256))
        else:
            content[at : at + 8] = struct.pack("<Q", int(rng.choice([0, 1, 1 << 31, 1 << 62])))
        path.write_bytes(content)
        try:
            for tensor in read_gguf(path).tensors.values():
                tensor.read(slice(None))
        except CheckpointError as error:
            n_refused += 1
            assert error.file is not None
    assert 50 < n_refused < 200


def test_what_is_no_model_of_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for architecture, said in (("rwkv6qwen2", "hybrid"), ("arwkv7", "hybrid"), ("llama", "architecture")):
        writer = gguf.GGUFWriter(path, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        error = refused(path)
        assert said in str(error) and error.found == architecture and error.remedy
    assert "--adapter" in str(refused(one(path, lambda writer: writer.add_type("adapter"))))


# -------------------------------------------------------------------------------------------------------------- splits


def split(source: Path, path: Path) -> list[Path]:
    changed(source, path, split_max_tensors=20)
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def test_a_split_model_is_read_whole_whichever_part_is_given(seven: Path, tmp_path: Path) -> None:
    parts = split(seven, tmp_path / "x.gguf")
    assert len(parts) > 2
    with open_checkpoint(seven) as whole:
        for part in parts:
            with open_checkpoint(part) as source:
                assert source.model_id() == whole.model_id()


def test_parts_that_do_not_fit_together(seven: Path, tmp_path: Path) -> None:
    parts = split(seven, tmp_path / "x.gguf")
    second = parts[1].read_bytes()

    parts[1].unlink()
    error = refusal(parts[0])
    assert isinstance(error, MissingTensorError) and error.place == parts[1].name and "one folder" in str(error)

    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(second)
    assert f"-00002-of-{len(parts):05}.gguf" in str(refusal(renamed))

    parts[1].write_bytes(parts[2].read_bytes())
    assert "part of another model" in str(refusal(parts[0]))

    parts[1].write_bytes(seven.read_bytes())
    assert "part of another model" in str(refusal(parts[0]))

    def with_split(content: bytes, key: bytes, value: bytes) -> bytes:
        at = content.index(key) + len(key) + 4
        return content[:at] + value + content[at + len(value) :]

    parts[1].write_bytes(with_split(second, b"split.tensors.count", struct.pack("<i", 5)))
    assert "part of another model" in str(refusal(parts[0])) and "found 5" in str(refusal(parts[0]))

    parts[1].write_bytes(with_split(parts[0].read_bytes(), b"split.no", struct.pack("<H", 1)))
    assert "two tensors stand for one" in str(refusal(parts[0]))
    parts[1].write_bytes(second)
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(with_split(parts[0].read_bytes(), b"split.no", struct.pack("<H", len(parts) - 1)))
    assert "the parts are not of one model" in str(refusal(parts[0]))
    parts[-1].write_bytes(last)

    save(random_rwkv7(**{**SEVEN, "n_embd": 128}, seed=6), tmp_path / "other.pth")
    write_gguf(tmp_path / "other.pth", tmp_path / "other.gguf", "F32")
    parts[1].write_bytes(split(tmp_path / "other.gguf", tmp_path / "y.gguf")[1].read_bytes())
    assert isinstance(refusal(parts[0]), TensorShapeError)

    parts[1].write_bytes(second[: len(second) // 2])
    assert parts[1].name in str(refusal(parts[0]))
    parts[1].write_bytes(b"")
    assert "too short" in str(refusal(parts[0]))


# ---------------------------------------------------------------------------------------------------------------- keys


def stated(architecture: str, source: Path, path: Path, key: str, value: Any) -> Path:
    """The model, with one key more or other than llama.cpp's."""

    def change(writer: Any) -> None:
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)]
            add(f"{architecture}.{key}", value)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_wkv_head_size(64)
    change(writer)
    for item in gguf.GGUFReader(source).tensors:
        writer.add_tensor(item.name, np.array(item.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# llama.cpp's keys of other architectures, and the values with which its own graphs leave the numbers as they are:
# a softcap, clamp, bias or scale of 0 is off, a factor of 1 too; 64e-5 is the constant in its rwkv graphs.
CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "token_shift_count": (2,),
    "attention.layer_norm_rms_epsilon": (),
    "attention.group_norm_epsilon": (64e-5,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
# What models have there that compute something else, and what only looks like the right value.
CHANGES_SOMETHING: dict[str, tuple[Any, ...]] = {
    "token_shift_count": (0, 1, 3),
    "attention.layer_norm_rms_epsilon": (0.0, 1e-6, 1e-5),
    "attention.group_norm_epsilon": (0.0, 1e-6, 1e-5, 64e-6, 1e-3, 64e-5 * 1.001),
    "attention.causal": (False,),
    "attention.clamp_kqv": (6.0, 8.0),
    "attention.max_alibi_bias": (8.0,),
    "attention.scale": (0.125, 1.0),
    "attn_logit_softcapping": (1.0, 30.0, 50.0),
    "router_logit_softcapping": (1.0, 30.0),
    "final_logit_softcapping": (1.0, 15.0, 30.0),
    "logit_scale": (0.0625, 0.5, 2.0, -1.0),
    "residual_scale": (0.22, 0.5, 2.0),
    "embedding_scale": (12.0, 0.5, 8.0),
    "expert_count": (1, 8),
    "expert_used_count": (1, 2),
    "swin_norm": (True,),
    "use_parallel_residual": (True,),
}


@pytest.mark.parametrize("architecture", ["rwkv6", "rwkv7"])
def test_what_changes_the_numbers_is_known_value_by_value(architecture: str) -> None:
    assert NEUTRAL.keys() == CHANGES_NOTHING.keys() == CHANGES_SOMETHING.keys()
    shapes = {"emb.weight": (40, 64)}
    for key in NEUTRAL:
        name = f"{architecture}.{key}"
        for value in CHANGES_NOTHING[key]:
            assert settings({name: value}, architecture, 64, shapes, Path("x.gguf")).notes == (), name
        for value in CHANGES_SOMETHING[key]:
            with pytest.raises(CheckpointError, match=re.escape(name)):
                settings({name: value}, architecture, 64, shapes, Path("x.gguf"))


@pytest.mark.parametrize("architecture", ["rwkv6", "rwkv7"])
def test_every_key_agrees_with_the_tensors_or_is_refused(
    architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue({"rwkv6": "six", "rwkv7": "seven"}[architecture])
    shapes = {name: tensor.shape for name, tensor in read_gguf(source).tensors.items()}
    right: dict[str, tuple[Any, ...]] = {key: (size(shapes),) for key, size in AGREES[architecture].items()}
    right |= {"attention.head_count": (0, 1), "attention.head_count_kv": (0, 1, [1, 1]), "context_length": (1, 2)}
    right |= CHANGES_NOTHING
    right["rescale_every_n_layers"] = (0,) if architecture == "rwkv7" else (0, 2)
    free = {"context_length"} | ({"rescale_every_n_layers"} if architecture == "rwkv6" else set())
    assert None not in {value for values in right.values() for value in values if not isinstance(value, list)}
    path = tmp_path / "x.gguf"
    for key, values in right.items():
        for value in values:
            model = read_gguf(stated(architecture, source, path, key, value))
            assert model.notes == (), key
        if key not in free:
            for wrong in (7, [7, 7]):
                error = refused(stated(architecture, source, path, key, wrong))
                assert error.place == f"{architecture}.{key}" and error.remedy


def test_llama_cpps_own_keys_are_all_known(seven: Path) -> None:
    """Those that its converter writes, which the tool writes too."""
    assert read_gguf(seven).notes == ()
    keys = {key for key in read_header(seven).values if key.startswith("rwkv7.")}
    assert len(keys) >= 13 and {f"rwkv7.{key}" for key in AGREES["rwkv7"]} <= keys


def test_an_unknown_key_is_told(seven: Path, tmp_path: Path) -> None:
    assert any("rwkv7.colour" in note for note in read_gguf(stated("rwkv7", seven, tmp_path / "x", "colour", 3)).notes)


def test_the_eps_of_the_layer_norms_is_the_files(seven: Path, tmp_path: Path) -> None:
    with open_checkpoint(seven) as source:
        assert source.spec.layer_norm_eps == 1e-5 and source.notes == ()
    path = tmp_path / "x.gguf"
    for eps in (1e-6, 1e-3):
        with open_checkpoint(stated("rwkv7", seven, path, "attention.layer_norm_epsilon", eps)) as source:
            assert (source.spec.layer_norm_eps, source.spec.norm_eps) == (eps, 64e-5)
            assert "--norm-eps" in " ".join(source.notes)
    for eps in (0.0, -1e-5, float("nan"), float("inf"), 1):
        error = refused(stated("rwkv7", seven, path, "attention.layer_norm_epsilon", eps))
        assert error.place == "rwkv7.attention.layer_norm_epsilon"


@pytest.mark.parametrize("architecture", ["rwkv6", "rwkv7"])
def test_a_config_beside_changes_no_eps_that_it_does_not_say(
    architecture: str, six: Path, seven: Path, tmp_path: Path
) -> None:
    source = six if architecture == "rwkv6" else seven
    for eps in (1e-3, 1e-5):
        stated(architecture, source, tmp_path / "x.gguf", "attention.layer_norm_epsilon", eps)
        for config in ({}, {"norm_eps": None}, {"norm_eps": 1e-5}, {"layer_norm_epsilon": 1e-5}, {"ln_eps": 1e-5}):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, **config}))
            if eps == 1e-3 and any(config.values()):
                error = refusal(tmp_path)
                assert "another eps than the file of weights beside it (expected 0.001, found 1e-05)" in str(error)
                assert error.place == next(iter(config))
                continue
            with open_checkpoint(tmp_path) as checkpoint:
                assert (checkpoint.spec.layer_norm_eps, checkpoint.spec.norm_eps) == (eps, 64e-5)


def test_a_config_beside_may_say_the_head_norms_eps(six: Path, seven: Path, tmp_path: Path) -> None:
    for source, config, norm_eps in (
        (seven, {"norm_eps": 1e-3}, 64e-3),
        (six, {"head_size_divisor": 4}, 16e-5),
    ):
        architecture = "rwkv6" if source == six else "rwkv7"
        eps = config.get("norm_eps", 1e-5)
        stated(architecture, source, tmp_path / "x.gguf", "attention.layer_norm_epsilon", eps)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, **config}))
        with open_checkpoint(tmp_path) as checkpoint:
            assert (checkpoint.spec.layer_norm_eps, checkpoint.spec.norm_eps) == (eps, norm_eps)


def test_the_owner_of_heads_that_are_not_64_is_told_of_the_norms_eps(tmp_path: Path) -> None:
    save(random_rwkv7(**{**SEVEN, "head_size": 32}, seed=5), tmp_path / "x.pth")
    write_gguf(tmp_path / "x.pth", tmp_path / "x.gguf", "F32")
    with open_checkpoint(tmp_path / "x.gguf") as source:
        assert source.spec.norm_eps == 64e-5
        assert "0.00032" in source.notes[0] and "--norm-eps" in source.notes[0]
    with open_checkpoint(tmp_path / "x.gguf", norm_eps=32e-5) as source:
        assert source.spec.norm_eps == 32e-5


# ---------------------------------------------------------------------------------------------------------- vocabulary


def with_tokens(tokens: list[str], types: list[int] | None, kind: str = "rwkv") -> Change:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_token_list(tokens)
        if types is not None:
            writer.add_token_types(types)

    return change


def converted(contents: dict[int, bytes], vocab_size: int) -> tuple[list[str], list[int]]:
    """As llama.cpp's converter writes them: a control token, the inside of bytes literals, padding."""
    normal, control, unused = (int(gguf.TokenType[name]) for name in ("NORMAL", "CONTROL", "UNUSED"))
    tokens, types = ["<s>"], [control]
    for token in range(1, vocab_size):
        tokens.append(repr(contents[token])[2:-1] if token in contents else f"[PAD{token}]")
        types.append(normal if token in contents else unused)
    return tokens, types


def vocabulary_inside(path: Path) -> Tokenizer:
    read = read_gguf(path).tokenizer
    assert callable(read)
    return read()


def test_the_worlds_vocabulary_inside_is_the_worlds(tmp_path: Path) -> None:
    pytest.importorskip("pyrwkv_tokenizer", reason="the World vocabulary comes from the package pyrwkv-tokenizer")
    world = world_tokenizer()
    contents = {token: content for token in range(65536) if (content := world.decode_bytes([token]))}
    inside = vocabulary_inside(one(tmp_path / "x.gguf", with_tokens(*converted(contents, 65536))))
    assert (inside.kind, inside.to_bytes()) == ("world", world.to_bytes())


SMALL = {1: b"a", 2: b"\\", 3: b"'\"", 4: b"\x00\t\n\r", 5: b"\xff\\x41", 6: "é".encode(), 9: b"\\n", 30: b" "}


def test_escapes_are_undone_and_gaps_kept(tmp_path: Path) -> None:
    tokens, types = converted(SMALL, 40)
    inside = vocabulary_inside(one(tmp_path / "x.gguf", with_tokens(tokens, types)))
    assert {token: content for token in range(31) if (content := inside.decode_bytes([token]))} == SMALL
    assert (inside.vocab_size, inside.end_token) == (31, 0)
    # Hexadecimal digits may be large, characters may stand for themselves, and kinds may be missing.
    inside = vocabulary_inside(one(tmp_path / "y.gguf", with_tokens(["<s>", "\\xC3\\xA9", "ü", "\\q"], None)))
    assert [inside.decode_bytes([token]) for token in range(4)] == [b"", "é".encode(), "ü".encode(), b"q"]


def test_the_vocabulary_inside_becomes_the_engines_when_none_is_given(seven: Path, tmp_path: Path) -> None:
    path = changed(seven, tmp_path / "x.gguf", with_tokens(*converted(SMALL, 40)))
    report = export_engine(path, tmp_path / "x.goslet", quant="int4")
    assert report.tokenizer_kind == "trie"
    assert "8 tokens for the model's 40 ids" in report.notes[0] and "253 of the 256 bytes" in report.notes[1]
    with EngineFile.open(tmp_path / "x.goslet") as engine:
        assert bytes(engine.tokenizer_bytes) == vocabulary_inside(path).to_bytes()


@pytest.mark.parametrize(
    ("tokens", "types", "said"),
    [
        (["<s>", "\\x4"], None, "ends within an escape"),
        (["<s>", "a\\"], None, "ends within an escape"),
        (["<s>", "a", "a"], None, "same byte string"),
        (["<s>", ""], None, "empty"),
        (["<s>"], None, "is empty"),
        (["<s>", "a"], [3], "not whole"),
    ],
)
def test_a_damaged_vocabulary_stops_only_those_who_want_it(
    tokens: list[str], types: list[int] | None, said: str, seven: Path, tmp_path: Path
) -> None:
    path = changed(seven, tmp_path / "x.gguf", with_tokens(tokens, types))
    with pytest.raises(TokenizerError, match=said) as caught:
        export_engine(path, tmp_path / "x.goslet")
    assert caught.value.file is not None and not (tmp_path / "x.goslet").exists()
    with open_checkpoint(path) as source:
        assert source.model_id()


def test_another_vocabulary_inside_is_told(seven: Path, tmp_path: Path) -> None:
    model = read_gguf(changed(seven, tmp_path / "x.gguf", with_tokens(["a", "b"], None, "gpt2")))
    assert model.tokenizer is None and "tokenizer.json" in model.notes[0]
