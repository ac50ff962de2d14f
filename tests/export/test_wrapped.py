"""What trainers and wrappers put around a model is taken off, or the file is refused by name."""

import argparse
from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.errors import CheckpointError, UnsafeCheckpointError  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.readers.wrapped import own_names  # noqa: E402

Tensors = dict[str, torch.Tensor]
SHAPE = {"n_layer": 2, "n_embd": 32, "head_size": 8, "vocab_size": 19}
RANKS = {"rank_w": 4, "rank_a": 5, "rank_v": 6, "rank_g": 7}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_rwkv7(**SHAPE, **RANKS)


@pytest.fixture(scope="module")
def plain_id(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    save(tensors, path)
    return model_id(path)


def model_id(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.model_id()


def notes(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return "; ".join(checkpoint.notes)


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError, match=path.name) as caught, open_checkpoint(path):
        pass
    return caught.value


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "_forward_module.",
        "module.",
        "model.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "student.net.",
    ],
)
def test_one_prefix_of_all_names_is_taken_off(
    prefix: str, ending: str, tensors: Tensors, plain_id: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{ending}"
    save({prefix + name: tensor for name, tensor in tensors.items()}, path)
    assert model_id(path) == plain_id


def test_words_of_wrappers_within_names(tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    """FSDP, activation checkpointing and torch.compile wrap single blocks and modules too."""
    wrapped = {
        "_fsdp_wrapped_module." + name.replace(".att.", "._checkpoint_wrapped_module.att._orig_mod."): tensor
        for name, tensor in tensors.items()
    }
    save(wrapped, tmp_path / "x.pth")
    assert model_id(tmp_path / "x.pth") == plain_id


@pytest.mark.parametrize("level", ["state_dict", "model_state_dict", "model", "module", "weights"])
def test_one_level_is_taken_off(level: str, tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    beside = {"epoch": 3, "hyper_parameters": argparse.Namespace(lr=1e-4), "optimizer": {"state": {0: {"step": 1}}}}
    torch.save({level: OrderedDict(tensors), **beside}, tmp_path / "x.ckpt")
    assert model_id(tmp_path / "x.ckpt") == plain_id
    assert repr(level) in notes(tmp_path / "x.ckpt")


def test_the_model_is_taken_and_not_its_average(tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    average = {name: tensor * 0.5 for name, tensor in tensors.items()}
    torch.save({"ema": average, "state_dict": {"model." + n: t for n, t in tensors.items()}}, tmp_path / "x.ckpt")
    assert model_id(tmp_path / "x.ckpt") == plain_id
    assert "'ema' beside it was left alone" in notes(tmp_path / "x.ckpt")
    torch.save({"ema": average, "online": tensors}, tmp_path / "y.ckpt")
    assert "ema, online" in str(refusal(tmp_path / "y.ckpt"))


@pytest.mark.parametrize("level", ["ema", "model_ema", "swa_state", "averaged_model", "ema_state_dict"])
def test_an_average_alone_is_the_model_and_said(level: str, tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    torch.save({"epoch": 1, level: tensors}, tmp_path / "x.ckpt")
    assert model_id(tmp_path / "x.ckpt") == plain_id
    assert f"from '{level}', by its name an average" in notes(tmp_path / "x.ckpt")
    torch.save({"epoch": 1, "schema": tensors}, tmp_path / "x.ckpt")
    assert "average" not in notes(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "level", ["optim_exp_avg", "exp_avg_sq", "optimizer", "OptimizerState", "optim", "momentum", "moments.1", "grads"]
)
def test_what_an_optimizer_keeps_is_no_model(level: str, tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    """It has the model's names and shapes: nothing else would tell it."""
    path = tmp_path / "x.ckpt"
    torch.save({"epoch": 1, level: tensors}, path)
    error = refusal(path)
    assert "state of an optimizer, not a model" in str(error)
    assert error.place == level
    save({f"{level}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert "state of an optimizer" in str(refusal(tmp_path / "x.safetensors"))
    torch.save({level: {name: tensor * 0.1 for name, tensor in tensors.items()}, "weights": tensors}, path)
    assert model_id(path) == plain_id
    assert f"'{level}' beside it was left alone" in notes(path)


@pytest.mark.parametrize("level", ["optimal", "gradual", "undergrad", "weights"])
def test_words_that_only_begin_as_an_optimizers(level: str, tensors: Tensors, plain_id: str, tmp_path: Path) -> None:
    torch.save({level: tensors}, tmp_path / "x.ckpt")
    assert model_id(tmp_path / "x.ckpt") == plain_id


def test_what_is_there_twice_or_for_two_models(tensors: Tensors, tmp_path: Path) -> None:
    both = {prefix + name: tensor for prefix in ("a.", "b.") for name, tensor in tensors.items()}
    save(both, tmp_path / "two.pth")
    assert "a., b." in str(refusal(tmp_path / "two.pth"))
    save({**tensors, "_orig_mod.emb.weight": tensors["emb.weight"]}, tmp_path / "twice.pth")
    assert "emb.weight" in str(refusal(tmp_path / "twice.pth"))
    save({**{"module." + n: t for n, t in tensors.items()}, "emb.weight": tensors["emb.weight"]}, tmp_path / "part.pth")
    refusal(tmp_path / "part.pth")


def test_files_of_deepspeed_without_the_numbers(tensors: Tensors, tmp_path: Path) -> None:
    hollow = {name: torch.zeros(0) for name in tensors}
    torch.save({"module": hollow, "ds_version": "0.16.2", "ds_config": {}}, tmp_path / "three.pt")
    assert "zero_to_fp32.py" in str(refusal(tmp_path / "three.pt"))
    torch.save({"optimizer_state_dict": {"state": {}}, "ds_version": "0.16.2"}, tmp_path / "optim.pt")
    assert "model_states.pt" in str(refusal(tmp_path / "optim.pt"))


def test_a_file_that_rwkv_converted_is_refused_by_name(tensors: Tensors, tmp_path: Path) -> None:
    torch.save({**tensors, "_strategy": "cpu fp32", "_version": 0.7, "_rescale_layer": 0}, tmp_path / "x.pth")
    said = str(refusal(tmp_path / "x.pth"))
    assert "package rwkv" in said
    assert "_strategy, _version" in said
    assert "give the original .pth" in said


def test_a_pickle_that_calls_something_says_what(tensors: Tensors, tmp_path: Path) -> None:
    torch.save({"state_dict": tensors, "trainer": Path("x")}, tmp_path / "x.ckpt")
    error = refusal(tmp_path / "x.ckpt")
    assert isinstance(error, UnsafeCheckpointError)
    assert "pathlib" in str(error)
    assert "state_dict" in str(error)


def test_names_of_adapters() -> None:
    names = {"base_model.model.blocks.0.att.key.lora_A.weight": 1, "base_model.model.head.lora_A.weight": 2}
    assert own_names(names, Path("x"))[0] == {"blocks.0.att.key.lora_A.weight": 1, "head.lora_A.weight": 2}
    names = {"rwkv.embeddings.weight": 1, "rwkv.blocks.0.attention.key.weight": 2, "head.weight": 3}
    assert own_names(names, Path("x"))[0].keys() == {
        "embeddings.weight",
        "blocks.0.attention.key.weight",
        "head.weight",
    }


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_out_of_a_folder_of_transformers_is_not_read_without_its_config(
    ending: str, tensors: Tensors, plain_id: str, tmp_path: Path
) -> None:
    prefix = "rwkv7." if ending == "pth" else "module.rwkv7."
    save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / f"model.{ending}")
    assert model_id(tmp_path / f"model.{ending}") == plain_id
    (tmp_path / "config.json").write_text("{}")
    assert f"give the folder {tmp_path}" in str(refusal(tmp_path / f"model.{ending}"))
