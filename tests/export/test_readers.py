"""Other forms of a checkpoint: GGUF as llama.cpp writes it and Hugging Face folders, against the same model as .pth."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
gguf = pytest.importorskip("gguf", reason="gguf is not installed (tools/requirements-demo.txt)")

from gguf_rwkv7 import write_gguf  # noqa: E402
from random_checkpoint import random_rwkv4, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import CheckpointError, MissingTensorError, TensorShapeError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402

from .folder_forms import save_fla, save_fla6, save_old  # noqa: E402

Tensors = dict[str, torch.Tensor]

SEVEN = {"n_layer": 3, "n_embd": 128, "vocab_size": 256, "rank_w": 8, "rank_a": 12, "rank_v": 16, "rank_g": 20}
SIX = {"n_layer": 3, "n_embd": 128, "vocab_size": 256, "rank_mix": 8, "rank_decay": 12}


def same_engine(one: Path, other: Path) -> None:
    """All but where they come from: sections byte by byte, and everything that the header says of the model."""
    with EngineFile.open(one) as a, EngineFile.open(other) as b:
        assert (a.spec, a.state_spec, a.model_id, a.tokenizer_kind) == (
            b.spec,
            b.state_spec,
            b.model_id,
            b.tokenizer_kind,
        )
        assert bytes(a.graph_bytes) == bytes(b.graph_bytes)
        assert bytes(a.program_bytes or b"") == bytes(b.program_bytes or b"")
        assert a.tensors == b.tensors
        for name in a.tensors:
            x, y = a.packed(name), b.packed(name)
            assert bytes(x.data) == bytes(y.data), name
            assert (x.scales is None) == (y.scales is None)
            assert x.scales is None or y.scales is None or bytes(x.scales) == bytes(y.scales), name


def write_gguf6(tensors: Tensors, path: Path, *, rescale: int) -> None:
    """As llama.cpp's conversion/rwkv.py writes an RWKV-6 in F32."""
    names = {"emb.weight": "token_embd.weight", "head.weight": "output.weight"}
    parts = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"}
    att = {"time_faaaa": "first", "time_decay": "decay", "time_decay_w1": "decay_w1", "time_decay_w2": "decay_w2"}
    att |= {"time_maa_w1": "w1", "time_maa_w2": "w2", "time_maa_x": "lerp_x"}
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_wkv_head_size(64)
    writer.add_embedding_length(tensors["emb.weight"].shape[1])
    writer.add_block_count(sum(name.endswith(".ln1.weight") for name in tensors))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rescale_every_n_layers(rescale)
    for name, tensor in tensors.items():
        words = name.split(".")
        if name.startswith("ln_out"):
            new = name.replace("ln_out", "output_norm")
        elif ".ln0." in name:
            new = f"token_embd_norm.{words[-1]}"
        elif name in names:
            new = names[name]
        else:
            layer, middle = int(words[1]), ".".join(words[2:])
            stem = middle.removesuffix(".weight").removesuffix(".bias")
            ending = "bias" if name.endswith(".bias") else "weight"
            if stem in parts:
                new = f"blk.{layer}.{parts[stem]}.{ending}"
            elif words[3] in att:
                new = f"blk.{layer}.time_mix_{att[words[3]]}.weight"
            elif words[3] == "time_maa_w":
                stacked = [tensors[f"blocks.{layer}.att.time_maa_{i}"].squeeze()[None] for i in "wkvrg"]
                new, tensor = f"blk.{layer}.time_mix_lerp_fused.weight", torch.stack(stacked).unsqueeze(1)
            elif words[2] == "att" and words[3].startswith("time_maa_"):
                continue
            elif words[2] == "ffn" and words[3].startswith("time_maa_"):
                new = f"blk.{layer}.channel_mix_lerp_{words[3][-1]}.weight"
            else:
                new = f"blk.{layer}.{'time' if words[2] == 'att' else 'channel'}_mix_{words[3]}.weight"
            if new.endswith(("mix_w1.weight", "decay_w1.weight", "decay_w2.weight")):
                tensor = tensor.T
            elif new.endswith("mix_w2.weight"):
                tensor = tensor.permute(0, 2, 1)
            elif new.endswith(("mix_decay.weight", "lerp_x.weight", "lerp_k.weight", "lerp_r.weight")):
                tensor = tensor.squeeze()
            if rescale and new.endswith(("time_mix_output.weight", "channel_mix_value.weight")):
                tensor = tensor / 2 ** (layer // rescale)
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seven") / "x.pth"
    save(random_rwkv7(**SEVEN, seed=5), path)
    return path


def test_an_rwkv7_in_every_form_is_one_engine(seven: Path, tmp_path: Path) -> None:
    tensors = torch.load(seven)
    save(tensors, tmp_path / "x.safetensors")
    write_gguf(seven, tmp_path / "x.gguf", "F32")
    save_fla(tensors, tmp_path / "single")
    save_fla(tensors, tmp_path / "sharded", shards=3, fused=True)
    export_engine(seven, tmp_path / "pth.goslet", quant="int4")
    for name in ("x.safetensors", "x.gguf", "single", "sharded"):
        export_engine(tmp_path / name, tmp_path / f"{name}.goslet", quant="int4")
        same_engine(tmp_path / "pth.goslet", tmp_path / f"{name}.goslet")


@pytest.mark.parametrize("rescale", [0, 1, 6])
def test_an_rwkv6_in_every_form_is_one_engine(rescale: int, tmp_path: Path) -> None:
    tensors = random_rwkv6(**SIX, seed=5)
    save(tensors, tmp_path / "x.pth")
    write_gguf6(tensors, tmp_path / "x.gguf", rescale=rescale)
    save_old(tensors, tmp_path / "folder", "rwkv6")
    save_fla6(tensors, tmp_path / "fla", shards=2)
    export_engine(tmp_path / "x.pth", tmp_path / "pth.goslet", quant="int8")
    for name in ("x.gguf", "folder", "fla"):
        # fla gives its group norm the eps of its other norms, whatever the weights were trained with.
        norm_eps = 64e-5 if name == "fla" else None
        export_engine(tmp_path / name, tmp_path / f"{name}.goslet", quant="int8", norm_eps=norm_eps)
        same_engine(tmp_path / "pth.goslet", tmp_path / f"{name}.goslet")


def test_an_rwkv4_of_transformers_is_the_same_engine(tmp_path: Path) -> None:
    tensors = random_rwkv4(n_layer=2, n_embd=64, vocab_size=256, seed=5)
    save(tensors, tmp_path / "x.pth")
    save_old(tensors, tmp_path / "folder", "rwkv")
    for name in ("x.pth", "folder"):
        export_engine(tmp_path / name, tmp_path / f"{name}.goslet", quant="f16")
    same_engine(tmp_path / "x.pth.goslet", tmp_path / "folder.goslet")


def test_the_norms_eps_of_a_folder_is_in_parts_of_the_heads_size(tmp_path: Path) -> None:
    tensors = random_rwkv7(**{**SEVEN, "head_size": 32}, seed=5)
    save_fla(tensors, tmp_path / "folder", head_dim=32)
    with open_checkpoint(tmp_path / "folder") as source:
        assert source.spec.norm_eps == 32e-5
    with open_checkpoint(tmp_path / "folder", norm_eps=64e-5) as source:
        assert source.spec.norm_eps == 64e-5
    config = tmp_path / "folder" / "config.json"
    right = config.read_text()
    for wrong in ("64", "1" + 400 * "0"):
        config.write_text(right.replace('"head_dim": 32', f'"head_dim": {wrong}'))
        assert "head_dim" in str(refusal(tmp_path / "folder"))
    config.write_text(100_000 * "[")
    assert "is not JSON" in str(refusal(tmp_path / "folder"))


def test_an_engine_of_another_eps_is_not_the_checkpoints(tmp_path: Path) -> None:
    """A folder with heads of 32 says 32e-5, while a GGUF has no place for it: same tensors, other numbers."""
    tensors = random_rwkv7(**{**SEVEN, "n_layer": 1, "n_embd": 64, "head_size": 32}, seed=5)
    save(tensors, tmp_path / "x.pth")
    save_fla(tensors, tmp_path / "folder", head_dim=32)
    write_gguf(tmp_path / "x.pth", tmp_path / "x.gguf", "F32")
    for name in ("folder", "x.gguf"):
        export_engine(tmp_path / name, tmp_path / f"{name}.goslet", quant="f32")
    for engine, other, said in (
        ("folder", "x.gguf", "norm_eps (0.00032 in the engine, 0.00064 in the checkpoint)"),
        ("x.gguf", "folder", "norm_eps (0.00064 in the engine, 0.00032 in the checkpoint)"),
    ):
        report = verify_engine(tmp_path / f"{engine}.goslet", tmp_path / other)
        assert report.differences == (said,)
        assert not report.passed
    change = {"norm_eps": 32e-5}
    assert verify_engine(tmp_path / "folder.goslet", tmp_path / "x.gguf", **change, n_tokens=4).passed


def test_a_folders_vocabulary_is_taken(seven: Path, shared_data: Path, tmp_path: Path) -> None:
    tensors = random_rwkv7(**{**SEVEN, "n_layer": 1, "vocab_size": 65536, "n_embd": 64}, seed=5)
    save_fla(tensors, tmp_path / "folder")
    vocabulary = (shared_data / "tokenizers/rwkv_vocab_v20230424.txt").read_bytes()
    (tmp_path / "folder/rwkv_vocab_v20230424.txt").write_bytes(vocabulary)
    assert export_engine(tmp_path / "folder", tmp_path / "x.goslet").tokenizer_kind == "world"


# ----------------------------------------------------------------------------------------------------------- bad files


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    assert caught.value.file is not None
    return caught.value


def test_folders_that_do_not_fit_together(seven: Path, tmp_path: Path) -> None:
    tensors = torch.load(seven)
    save_fla(tensors, tmp_path / "x", shards=3)
    shard = tmp_path / "x/model-00002-of-00003.safetensors"
    content = shard.read_bytes()

    shard.unlink()
    error = refusal(tmp_path / "x")
    assert isinstance(error, MissingTensorError) and error.place == shard.name

    shard.write_bytes((tmp_path / "x/model-00001-of-00003.safetensors").read_bytes())
    assert "places elsewhere" in str(refusal(tmp_path / "x"))

    shard.write_bytes(content[: len(content) // 2])
    assert "model-00002" in str(refusal(tmp_path / "x"))

    shard.write_bytes(content)
    index = tmp_path / "x/model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(places))
    assert "elsewhere" in str(refusal(tmp_path / "x"))
    for broken in ("", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(broken)
        refusal(tmp_path / "x")


def test_folders_of_something_else(tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    assert "config.json" in str(refusal(tmp_path / "empty"))
    for config, said in (
        ("{", "not JSON"),
        ("3", "not a JSON object"),
        ('{"model_type": "llama"}', "a kind that goslet does not read"),
        ('{"model_type": "rwkv7"}', "holds no weights"),
    ):
        (tmp_path / "empty/config.json").write_text(config)
        assert said in str(refusal(tmp_path / "empty"))


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_gguf_files_of_something_else(seven: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    text = b"\x08\0\0\0\x05\0\0\0\0\0\0\0"  # the kind of a value, and its length
    for old, new, said in (
        (text + b"rwkv7", text + b"llama", "architecture"),
        (b"rwkv7.wkv.head_size", b"rwkv7.wkv.tail_size", "size of heads"),
        (b"blk.1.time_mix_key.weight", b"blk.1.time_mix_toy.weight", "lacks a tensor"),
    ):
        write_gguf(seven, path, "F32")
        patched(path, old, new)
        assert said in str(refusal(path))


@pytest.mark.parametrize(
    ("extra", "said"), [("blocks.0.ln1.weight", "two tensors stand for one"), ("blk.00.attn_norm.weight", "blk.00")]
)
def test_a_gguf_tensor_that_is_there_twice(extra: str, said: str, seven: Path, tmp_path: Path) -> None:
    write_gguf(seven, tmp_path / "plain.gguf", "F32")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "rwkv7")
    writer.add_wkv_head_size(64)
    for item in gguf.GGUFReader(tmp_path / "plain.gguf").tensors:
        writer.add_tensor(item.name, np.array(item.data))
    writer.add_tensor(extra, np.ones(128, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert said in str(refusal(tmp_path / "x.gguf"))


def test_gguf_files_that_are_damaged(seven: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(seven, path, "F32")
    whole = path.read_bytes()
    for length in (4, 8, 23, 100, 1000, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refusal(path)
    for offset, number in ((8, 1 << 60), (16, 1 << 60), (8, 1 << 31)):
        path.write_bytes(whole[:offset] + struct.pack("<Q", number) + whole[offset + 8 :])
        refusal(path)
    # A tensor's dimensions and its place follow its name: number of axes, sizes, type, offset.
    at = whole.index(b"blk.1.time_mix_key.weight") + len(b"blk.1.time_mix_key.weight")
    for sizes in ((1 << 62, 128), (1 << 32, 1 << 32), (0, 128)):
        path.write_bytes(whole[: at + 4] + struct.pack("<QQ", *sizes) + whole[at + 20 :])
        refusal(path)
    for place, said in ((0, "lies over another"), (1 << 40, "")):
        path.write_bytes(whole[: at + 24] + struct.pack("<Q", place) + whole[at + 32 :])
        assert said in str(refusal(path))


def test_gguf_shapes_that_do_not_fit(seven: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    reader_source = tmp_path / "plain.gguf"
    write_gguf(seven, reader_source, "F32")
    for name, shape in (("blk.0.time_mix_lerp_fused.weight", (5, 1, 1, 128)), ("blk.0.time_mix_w1.weight", (8, 2, 64))):
        writer = gguf.GGUFWriter(path, "rwkv7")
        writer.add_wkv_head_size(64)
        for item in gguf.GGUFReader(reader_source).tensors:
            writer.add_tensor(item.name, np.zeros(shape, np.float32) if item.name == name else np.array(item.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        error = refusal(path)
        assert isinstance(error, TensorShapeError) and error.place == name
