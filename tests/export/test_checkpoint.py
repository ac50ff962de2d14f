"""Reading checkpoints: every dtype and container, and one clear error for every way in which a file can be wrong."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.errors import (  # noqa: E402
    CheckpointError,
    ExtraTensorError,
    MissingTensorError,
    TensorShapeError,
    TensorValueError,
    UnsafeCheckpointError,
)
from goslet.export import checkpoint  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402

SHAPE = {
    "n_layer": 2,
    "n_embd": 32,
    "head_size": 8,
    "vocab_size": 19,
    "rank_w": 4,
    "rank_a": 5,
    "rank_v": 6,
    "rank_g": 7,
}

NARROW = {"n_layer": 2, "n_embd": 32, "vocab_size": 19}
MAKERS = {
    "4": partial(random_rwkv4, **NARROW),
    "5.2": partial(random_rwkv5, "5.2", **NARROW, head_size=8),
    "6": partial(random_rwkv6, **NARROW, head_size=8),
    "7": partial(random_rwkv7, **SHAPE),
    "7a": partial(random_rwkv7, **SHAPE, rank_s=3),
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_rwkv7(**SHAPE)


def read_all(path: Path) -> None:
    with open_checkpoint(path) as source:
        source.weights()


def test_dimensions_come_from_the_tensors(tensors: dict, tmp_path: Path) -> None:
    save(tensors, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as source:
        spec = source.spec
    assert (spec.version, spec.n_layer, spec.n_embd, spec.n_ffn) == ("7", 2, 32, 128)
    assert (spec.n_head, spec.head_size, spec.vocab_size) == (4, 8, 19)
    assert dict(spec.ranks) == {"w": 4, "a": 5, "v": 6, "g": 7}
    assert spec.norm_eps == 64e-5
    with open_checkpoint(tmp_path / "x.pth", norm_eps=1e-5) as source:
        assert source.spec.norm_eps == 1e-5


@pytest.mark.parametrize("vocab_size", [2, 65536])
def test_smallest_and_largest_vocabulary(vocab_size: int, tmp_path: Path) -> None:
    save(random_rwkv7(**{**SHAPE, "vocab_size": vocab_size, "n_layer": 1}), tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as source:
        assert source.spec.vocab_size == vocab_size
        assert "v" not in source.spec.ranks


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_containers_give_the_same_values(ending: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = random_rwkv7(**SHAPE, dtype=dtype)
    path = tmp_path / f"x.{ending}"
    save(given, path)
    with open_checkpoint(path) as source:
        assert source.format == ending
        found = source.weights()
        assert found["blocks.1.att.w1"].shape == (4, 32), "engines store every matrix as [out, in]"
        torch.testing.assert_close(found["blocks.1.att.w1"].T, given["blocks.1.att.w1"].float(), rtol=0, atol=0)
        torch.testing.assert_close(found["head.weight"], given["head.weight"].float(), rtol=0, atol=0)


def test_model_id_depends_on_values_alone(tensors: dict, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    ids = set()
    for name, content in {
        "bf16.pth": half,
        "f32.safetensors": {n: t.float() for n, t in half.items()},
        "squeezed.pth": {n: t.squeeze() for n, t in half.items()},
        "without-unused.pth": {n: t for n, t in half.items() if not n.startswith("blocks.0.att.v") or "value" in n},
        "another-order.pth": dict(reversed(half.items())),
    }.items():
        save(content, tmp_path / name)
        with open_checkpoint(tmp_path / name) as source:
            ids.add(source.model_id())
    assert len(ids) == 1
    changed = dict(half)
    changed["blocks.1.att.k_a"] = half["blocks.1.att.k_a"] * 2
    save(changed, tmp_path / "changed.pth")
    with open_checkpoint(tmp_path / "changed.pth") as source:
        assert source.model_id() not in ids


@pytest.mark.parametrize(
    "name", ["blocks.1.att.w2", "head.weight", "blocks.0.ln0.bias", "blocks.0.att.r_k", "emb.weight"]
)
def test_missing_tensor(name: str, tensors: dict, tmp_path: Path) -> None:
    del tensors[name]
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(MissingTensorError) as caught:
        read_all(tmp_path / "x.pth")
    assert name in str(caught.value)
    assert "x.pth" in str(caught.value)


def test_every_missing_tensor_is_counted(tensors: dict, tmp_path: Path) -> None:
    for name in [name for name in tensors if name.startswith("blocks.1.ffn")]:
        del tensors[name]
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(MissingTensorError) as caught:
        read_all(tmp_path / "x.pth")
    message = str(caught.value)
    assert "lacks 3 tensors" in message
    assert "blocks.1.ffn.x_k, blocks.1.ffn.key.weight, blocks.1.ffn.value.weight" in message
    assert "expected blocks.1.ffn.x_k of shape [32]" in message


def test_extra_tensor(tensors: dict, tmp_path: Path) -> None:
    tensors["blocks.1.att.mystery"] = torch.zeros(3, 4)
    save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ExtraTensorError, match=r"blocks\.1\.att\.mystery.*\[3, 4\]"):
        read_all(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["blocks.1.ffn.value.weight", "blocks.1.att.g1", "ln_out.weight", "blocks.1.att.r_k"])
def test_misshapen_tensor(name: str, tensors: dict, tmp_path: Path) -> None:
    expected = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(3, 5)
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(TensorShapeError) as caught:
        read_all(tmp_path / "x.pth")
    assert name in str(caught.value)
    assert "[3, 5]" in str(caught.value)
    assert str(list(expected)) in str(caught.value)


def test_transposed_lora_is_misshapen(tensors: dict, tmp_path: Path) -> None:
    """Hugging Face files store LoRA the other way round: this must not be read as a model of rank 32."""
    for letter in "wavg":
        tensors[f"blocks.1.att.{letter}1"] = tensors[f"blocks.1.att.{letter}1"].T.contiguous()
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(TensorShapeError, match=r"blocks\.1\.att\.w1"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite(value: float, tensors: dict, tmp_path: Path) -> None:
    tensors["blocks.1.ffn.key.weight"][7, 3] = value
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(TensorValueError, match=r"blocks\.1\.ffn\.key\.weight\[7, 3\]"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize("bad", [torch.int32, torch.float64])
def test_dtype_that_no_checkpoint_has(bad: torch.dtype, tensors: dict, tmp_path: Path) -> None:
    tensors["ln_out.bias"] = tensors["ln_out.bias"].to(bad)
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"ln_out\.bias.*{str(bad)[6:]}"):
        read_all(tmp_path / "x.pth")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_carries_code_is_refused_and_does_not_run(zipped: bool, tensors: dict, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = tmp_path / "x.pth"
    torch.save({**tensors, "bomb": Bomb(witness)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"x\.pth.*never runs code"):
        read_all(path)
    assert not witness.exists()


def test_bare_pickle_that_carries_code(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb(witness)))
    with pytest.raises(CheckpointError):
        read_all(tmp_path / "x.pth")
    assert not witness.exists()


def test_old_unzipped_pth_is_read(tensors: dict, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    read_all(tmp_path / "x.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.4, 0.99])
def test_truncated(ending: str, part: float, tensors: dict, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=path.name):
        read_all(path)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"\x80\x02", b"PK\x03\x04" + b"x" * 40, b"\xff" * 64])
def test_not_a_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [[1, 2], {"model": {"emb.weight": torch.zeros(2, 2)}}, {"step": 3}, torch.zeros(3)])
def test_not_a_dictionary_of_tensors(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize("names", [[], ["transformer.h.0.attn.weight"], ["blocks.0.att.other"]])
def test_another_kind_of_model(names: list[str], tmp_path: Path) -> None:
    save({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"RWKV-4, 5\.0, 5\.1, 5\.2, 6, 7 or 7a"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize(("name", "version"), [("blocks.0.qkv.k_emb.weight", "7b"), ("blocks.1.att.rosa_qkv.e", "8")])
def test_versions_whose_past_grows_are_refused_by_name(name: str, version: str, tmp_path: Path) -> None:
    save({**random_rwkv7(**SHAPE), name: torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: {name}: is an RWKV-{version}, .* no fixed size"):
        read_all(tmp_path / "x.pth")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_all(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_all(tmp_path)


def test_absurd_layer_numbers_do_not_allocate(tensors: dict, tmp_path: Path) -> None:
    tensors["blocks.999999999.att.r_k"] = torch.zeros(4, 8)
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(MissingTensorError, match="999999999"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "strange",
    [
        torch.zeros(1).expand(19, 1 << 30),
        torch.zeros(19, 32).to_sparse(),
        torch.empty(19, 32, device="meta"),
        torch._neg_view(torch.zeros(19, 32)),
    ],
    ids=["stride 0", "sparse", "meta", "negated view"],
)
def test_tensor_whose_numbers_are_not_in_the_file(
    strange: torch.Tensor, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A file of some kilobytes may claim a tensor of gigabytes; it is refused before anything is allocated."""
    tensors["head.weight"] = strange
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth.*head\.weight"):
        read_all(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "shape"), [("blocks.0.att.w1", (32, 0)), ("emb.weight", (0, 32)), ("emb.weight", (19, 0))]
)
def test_empty_axes(name: str, shape: tuple[int, int], tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors[name] = torch.zeros(shape)
    save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_all(tmp_path / "x.pth")


def test_vocabulary_of_one(tmp_path: Path) -> None:
    save(random_rwkv7(**{**SHAPE, "vocab_size": 1}), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"dimensions\.vocab_size"):
        read_all(tmp_path / "x.pth")


def test_flipped_bits_give_typed_errors_or_a_model(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Damage in the pickle and the archive's directories, where torch fails in many ways of its own."""
    path = tmp_path / "x.pth"
    save(tensors, path)
    content = path.read_bytes()
    start = content.index(b"data.pkl")
    places = random.Random(0).sample([*range(start, start + 4000), *range(len(content) - 4000, len(content))], 200)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except CheckpointError as error:
            assert "x.pth" in str(error)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7", "7a"])
def test_what_a_reader_says_of_layer_norm_reaches_spec_and_embedding(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(MAKERS[version](), tmp_path / "x.pth")
    told = replace(checkpoint.read_model(tmp_path / "x.pth"), layer_norm_eps=0.25, notes=("said by the file",))
    monkeypatch.setattr(checkpoint, "read_model", lambda path: told)
    with open_checkpoint(tmp_path / "x.pth") as source:
        assert source.spec.layer_norm_eps == 0.25
        assert source.notes == ("said by the file",)
        embedding, weight, bias = (source.source(s) for s in source.rules[0].sources[:3])
        width = source.spec.n_embd
        expected = torch.nn.functional.layer_norm(embedding, (width,), weight, bias, 0.25)
        assert torch.equal(source.tensor(source.rules[0])[:, :width], expected)
