"""Folders: whatever a config.json says of a model's numbers is computed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("safetensors", reason="folders hold .safetensors files")

from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from goslet.errors import CheckpointError, MissingTensorError  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.readers import configs  # noqa: E402
from goslet.spec import ModelSpec  # noqa: E402

from .folder_forms import Tensors, save_fla, save_fla6, save_native, save_old  # noqa: E402

D, N, V, L = 32, 16, 23, 2
SHAPE = {"n_layer": L, "n_embd": D, "vocab_size": V}
RANKS = {"rank_w": 3, "rank_a": 4, "rank_v": 5, "rank_g": 6}


def seven(seed: int = 3) -> Tensors:
    return random_rwkv7(**SHAPE, **RANKS, head_size=N, seed=seed, unused=False)


def six() -> Tensors:
    return random_rwkv6(**SHAPE, head_size=N, rank_mix=3, rank_decay=4, seed=3)


def old(kind: str) -> Callable[..., None]:
    return lambda tensors, folder, **config: save_old(tensors, folder, kind, **config)


@dataclass(frozen=True)
class Form:
    """A library's folder: how it is written, its table, and the right size for each key that has one."""

    family: configs.Family
    tensors: Callable[[], Tensors]
    save: Callable[..., None]
    sizes: dict[str, Any]


TOP = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L}
LORA = {"decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 5, "gate_low_rank_dim": 6}
HEADS = {"head_dim": N, "num_heads": D // N, "intermediate_size": 4 * D}
FORMS = {
    "fla7": Form(configs.FLA7, seven, save_fla, {**TOP, **LORA, **HEADS, "value_dim": [D, D]}),
    "fla6": Form(
        configs.FLA6,
        six,
        save_fla6,
        {**TOP, "intermediate_size": 112, "num_heads": D // N, "proj_low_rank_dim": 3, "gate_low_rank_dim": 4},
    ),
    "native7": Form(configs.NATIVE7, seven, save_native, {**TOP, **LORA, **HEADS}),
    "own7": Form(configs.NATIVE7, seven, lambda t, f, **c: save_own(t, f, "model.pth", **c), {**TOP, **LORA, **HEADS}),
    "old4": Form(
        configs.OLD,
        lambda: random_rwkv4(**SHAPE, seed=3),
        old("rwkv"),
        {**TOP, "intermediate_size": 4 * D, "attention_hidden_size": D},
    ),
    "old5": Form(
        configs.OLD,
        lambda: random_rwkv5("5.2", **SHAPE, head_size=N, seed=3),
        old("rwkv5"),
        {**TOP, "intermediate_size": 112, "attention_hidden_size": D, "head_size": N},
    ),
    "old6": Form(
        configs.OLD,
        six,
        old("rwkv6"),
        {**TOP, "intermediate_size": 112, "attention_hidden_size": D, "head_size": N},
    ),
}
# The keys that the libraries write: fla 0.6's two configs as transformers 5.24 saves them, transformers' RwkvConfig and
# Rwkv7Config, and the Rwkv5Config and Rwkv6Config of the models' own code.
SAVED_BY_ANY = """_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id problem_type return_dict
    tie_word_embeddings transformers_version use_cache torch_dtype auto_map quantization_config vocab_size hidden_size
    num_hidden_layers intermediate_size"""
SAVED_BY_FLA = """attn attn_mode fuse_cross_entropy fuse_linear_cross_entropy fuse_norm gate_low_rank_dim hidden_act
    hidden_ratio initializer_range max_position_embeddings norm_bias norm_eps norm_first num_heads use_l2warp"""
SAVED = {
    "fla7": f"{SAVED_BY_FLA} a_low_rank_dim decay_low_rank_dim head_dim v_low_rank_dim value_dim",
    "fla6": f"{SAVED_BY_FLA} expand_k expand_v proj_low_rank_dim",
    "native7": """head_dim num_heads decay_low_rank_dim a_low_rank_dim v_low_rank_dim gate_low_rank_dim norm_eps
        norm_bias max_position_embeddings use_deep_embed wkv_state_dtype""",
    "old4": "context_length attention_hidden_size layer_norm_epsilon rescale_every",
    "old5": """attention_hidden_size num_attention_heads head_size head_size_divisor layer_norm_epsilon rescale_every
        model_version""",
}


def save_own(tensors: Tensors, folder: Path, name: str, **config: Any) -> None:
    folder.mkdir()
    save(tensors, folder / name)
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "rwkv7", **config}))


def change(folder: Path, **config: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def read(path: Path, **how: Any) -> tuple[ModelSpec, str, tuple[str, ...]]:
    with open_checkpoint(path, **how) as source:
        return source.spec, source.model_id(), source.notes


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    assert caught.value.file is not None
    return caught.value


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def drop(folder: Path, *endings: str) -> None:
    kept = {name: tensor for name, tensor in load_file(weights(folder)).items() if not name.endswith(endings)}
    save_file(kept, weights(folder))


# ---------------------------------------------------------------------------------------------------------- every key


@pytest.mark.parametrize("form", list(SAVED))
def test_every_key_that_a_library_writes_is_in_its_table(form: str) -> None:
    family = FORMS[form].family
    known = family.read | family.fixed.keys() | family.sizes.keys() | family.irrelevant
    assert set(f"{SAVED_BY_ANY} {SAVED[form]}".split()) <= known


@pytest.mark.parametrize("name", list(FORMS))
def test_every_key_of_a_table_is_held_to_what_it_says(name: str, tmp_path: Path) -> None:
    form, folder = FORMS[name], tmp_path / "x"
    form.save(form.tensors(), folder, norm_eps=1e-5, head_dim=None, num_heads=None)
    plain = read(folder)
    config = (folder / "config.json").read_text()
    sizes = form.sizes
    for key, fixed in form.family.fixed.items():
        for value in fixed.values:
            change(folder, **{key: value})
            assert read(folder) == plain, key
        for value in ("gelu", 7, True, {"layers": [0]}):
            change(folder, **{key: value})
            error = refusal(folder)
            assert (error.place, error.expected) == (key, fixed.computed)
        (folder / "config.json").write_text(config)
    assert set(sizes) == {key for key in form.family.sizes if key != "head_size" or name != "old4"}
    for key, size in sizes.items():
        change(folder, **{key: size})
        assert read(folder) == plain, key
        for value in (D + V, str(size), float(D), [D, 2 * D], 10**400):
            change(folder, **{key: value})
            assert refusal(folder).place == key
        (folder / "config.json").write_text(config)
    change(folder, **dict.fromkeys(form.family.irrelevant, 3), **dict.fromkeys([*form.family.fixed, *sizes]))
    assert read(folder) == plain


def test_hidden_act_of_fla_and_of_others(tmp_path: Path) -> None:
    save_fla(seven(), tmp_path / "x", head_dim=N)
    for value in ("swish", "silu", "relu", "gelu", "sigmoid"):
        change(tmp_path / "x", hidden_act=value)
        said = str(refusal(tmp_path / "x"))
        assert "hidden_act" in said and "relu²" in said and value in said


def test_keys_that_nobody_knows(tmp_path: Path) -> None:
    save_fla(seven(), tmp_path / "x", head_dim=N)
    plain = read(tmp_path / "x")
    change(tmp_path / "x", rope=None, sparsity=False, tags=[])
    assert read(tmp_path / "x") == plain
    change(tmp_path / "x", mixture="deep", tags=["a"])
    spec, model_id, notes = read(tmp_path / "x")
    assert (spec, model_id) == plain[:2]
    assert [note for note in notes if "mixture, tags" in note]
    for key, right, wrong in (
        ("ffn_activation_function", "relu2", "silu"),
        ("attention_act_fn", "sqrelu", "relu"),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("group_norm_epsilon", "1e-5", "no"),
    ):
        change(tmp_path / "x", **{key: right})
        assert read(tmp_path / "x") == (spec, model_id, notes)
        change(tmp_path / "x", **{key: wrong})
        assert refusal(tmp_path / "x").place == key
        change(tmp_path / "x", **{key: None})


# ---------------------------------------------------------------------------------------------------------------- eps


@pytest.mark.parametrize(
    ("name", "config", "norm_eps", "layer_norm_eps"),
    [
        ("fla7", {}, 16e-5, 1e-5),
        ("fla7", {"norm_eps": 1e-3}, 16e-3, 1e-3),
        ("fla7", {"norm_eps": "1e-6"}, 16e-6, 1e-6),
        ("fla7", {"norm_eps": 1}, 16.0, 1.0),
        ("native7", {"norm_eps": 1e-4}, 16e-4, 1e-4),
        ("fla6", {}, 1e-5, 1e-5),
        ("fla6", {"norm_eps": 64e-5}, 64e-5, 64e-5),
        ("old5", {}, 64e-5, 1e-5),
        ("old6", {"head_size_divisor": 4}, 16e-5, 1e-5),
        ("old4", {}, 1e-5, 1e-5),
    ],
)
def test_eps_is_what_the_folders_library_computes(
    name: str, config: dict[str, Any], norm_eps: float, layer_norm_eps: float, tmp_path: Path
) -> None:
    FORMS[name].save(FORMS[name].tensors(), tmp_path / "x", head_dim=None, **config)
    spec, _, notes = read(tmp_path / "x")
    assert (spec.norm_eps, spec.layer_norm_eps) == (norm_eps, layer_norm_eps)
    told = [note for note in notes if f"is {norm_eps:g}," in note and "--norm-eps" in note]
    assert len(told) == int(norm_eps != 64e-5 and name != "old4")
    if name != "old4":
        assert read(tmp_path / "x", norm_eps=64e-5)[0].norm_eps == 64e-5


@pytest.mark.parametrize("value", ["small", "nan", -1e-5, 0, True, [1e-5], 10**400])
def test_an_eps_that_is_none(value: object, tmp_path: Path) -> None:
    save_fla(seven(), tmp_path / "x", head_dim=N, norm_eps=value)
    assert refusal(tmp_path / "x").place == "norm_eps"


def test_layer_norm_epsilon_of_transformers_which_ln_out_does_not_have(tmp_path: Path) -> None:
    save_old(random_rwkv4(**SHAPE), tmp_path / "x", "rwkv", layer_norm_epsilon=1e-3)
    assert "ln_out" in str(refusal(tmp_path / "x"))


# --------------------------------------------------------------------------------------------------- heads and norms


def test_a_tied_head_is_the_embedding_whichever_of_them_is_stored(tmp_path: Path) -> None:
    tensors = seven()
    tensors["head.weight"] = tensors["emb.weight"].clone()
    for save_as, head, embedding in (
        (save_fla, "lm_head.weight", "model.embeddings.weight"),
        (save_native, "head.weight", "rwkv7.emb.weight"),
    ):
        for index, missing in enumerate((head, embedding, "nothing")):
            folder = tmp_path / f"{save_as.__name__}{index}"
            save_as(tensors, folder, head_dim=N, tie_word_embeddings=True)
            drop(folder, missing)
            save(tensors, tmp_path / "x.pth")
            _, model_id, notes = read(folder)
            assert model_id == read(tmp_path / "x.pth")[1]
            assert any("one matrix" in note for note in notes) == (missing != "nothing")


def test_a_head_that_differs_although_it_is_said_to_be_tied(tmp_path: Path) -> None:
    save(seven(), tmp_path / "x.pth")
    save_fla(seven(), tmp_path / "x", head_dim=N, tie_word_embeddings=True)
    _, model_id, notes = read(tmp_path / "x")
    assert model_id == read(tmp_path / "x.pth")[1]
    assert any("both are there and differ" in note for note in notes)


def test_a_head_that_is_missing_and_not_tied(tmp_path: Path) -> None:
    save_fla(seven(), tmp_path / "x", head_dim=N)
    drop(tmp_path / "x", "lm_head.weight")
    error = refusal(tmp_path / "x")
    assert isinstance(error, MissingTensorError) and "tie_word_embeddings" in str(error)
    change(tmp_path / "x", tie_word_embeddings="yes")
    assert refusal(tmp_path / "x").place == "tie_word_embeddings"


@pytest.mark.parametrize("name", ["fla7", "fla6", "native7"])
def test_norms_without_biases_have_zeros(name: str, tmp_path: Path) -> None:
    tensors = FORMS[name].tensors()
    FORMS[name].save(tensors, tmp_path / "x", norm_bias=False, head_dim=None)
    assert refusal(tmp_path / "x").place == "norm_bias"
    for key, tensor in tensors.items():
        if key.endswith(".bias") and "ln_x" not in key:
            tensor.zero_()
    save(tensors, tmp_path / "x.pth")
    norms = ("pre_norm", "attn_norm", "ffn_norm", "model.norm", "ln0", "ln1", "ln2", "ln_out")
    drop(tmp_path / "x", *(f"{norm}.bias" for norm in norms))
    assert read(tmp_path / "x")[1] == read(tmp_path / "x.pth")[1]
    change(tmp_path / "x", norm_bias=True)
    assert isinstance(refusal(tmp_path / "x"), MissingTensorError)


@pytest.mark.parametrize("name", ["fla7", "fla6"])
def test_a_model_without_its_first_norm_has_the_embedding_as_it_is(name: str, tmp_path: Path) -> None:
    tensors = FORMS[name].tensors()
    FORMS[name].save(tensors, tmp_path / "x", norm_first=False, head_dim=None)
    assert refusal(tmp_path / "x").place == "norm_first"
    drop(tmp_path / "x", "pre_norm.weight", "pre_norm.bias")
    with open_checkpoint(tmp_path / "x") as source:
        (embedding,) = (rule for rule in source.rules if rule.name == "emb.weight")
        assert torch.equal(source.tensor(embedding), tensors["emb.weight"])
        assert torch.equal(torch.cat(list(source.blocks(embedding))), tensors["emb.weight"])
    change(tmp_path / "x", norm_first=True)
    assert "ln0" in str(refusal(tmp_path / "x"))


@pytest.mark.parametrize("config", [{"num_heads": D // N}, {}, {"head_dim": N, "num_heads": 7}])
def test_heads_that_are_told_one_way_or_another(config: dict[str, Any], tmp_path: Path) -> None:
    save(seven(), tmp_path / "x.pth")
    save_fla(seven(), tmp_path / "x", **{"head_dim": None, **config})
    spec, model_id, _ = read(tmp_path / "x")
    assert spec.head_size == N
    assert model_id == read(tmp_path / "x.pth")[1]


@pytest.mark.parametrize("unused", [True, False])
def test_transformers_own_rwkv7(unused: bool, tmp_path: Path) -> None:
    tensors = random_rwkv7(**SHAPE, **RANKS, head_size=N, seed=3, unused=unused)
    save(tensors, tmp_path / "x.pth")
    save_native(tensors, tmp_path / "x", num_heads=D // N, wkv_state_dtype="float16")
    assert read(tmp_path / "x")[1] == read(tmp_path / "x.pth")[1]


def test_names_tell_whose_a_folder_is_and_not_model_type(tmp_path: Path) -> None:
    save(seven(), tmp_path / "x.pth")
    save_fla(seven(), tmp_path / "x", head_dim=N, model_type="rwkv7_native")
    inner = {name.removeprefix("model."): tensor for name, tensor in load_file(weights(tmp_path / "x")).items()}
    expected = read(tmp_path / "x.pth")[1]
    assert read(tmp_path / "x")[1] == expected
    save_file(inner, weights(tmp_path / "x"))
    assert read(tmp_path / "x")[1] == expected
    change(tmp_path / "x", model_type="another")
    assert read(tmp_path / "x")[1] == expected


# -------------------------------------------------------------------------------------------------- which file is read


def test_the_file_that_transformers_takes_is_read(tmp_path: Path) -> None:
    """Each form of weights from a model of its own; one after the other is taken away."""
    folder, ids = tmp_path / "x", []
    for seed in range(4):
        save(seven(seed), tmp_path / f"{seed}.pth")
        ids.append(read(tmp_path / f"{seed}.pth")[1])
    save_fla(seven(1), folder, head_dim=N, shards=2)
    torch_form = tmp_path / "torch"
    save_fla(seven(3), torch_form, head_dim=N, shards=2)
    places = {}
    for shard in (1, 2):
        name = f"pytorch_model-0000{shard}-of-00002.bin"
        content = load_file(torch_form / f"model-0000{shard}-of-00002.safetensors")
        torch.save(content, folder / name)
        places |= dict.fromkeys(content, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    single = {}
    for seed in (0, 2):
        save_fla(seven(seed), tmp_path / f"single{seed}", head_dim=N)
        single[seed] = load_file(weights(tmp_path / f"single{seed}"))
    save_file(single[0], folder / "model.safetensors")
    torch.save(single[2], folder / "pytorch_model.bin")
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for seed, name in enumerate(order):
        _, model_id, notes = read(folder)
        assert model_id == ids[seed]
        rest = ", ".join(order[seed + 1 :])
        assert [
            note for note in notes if note.startswith(f"{name} is read") and note.endswith(f"not {rest} beside it")
        ] == ([notes[0]] if rest else [])
        (folder / name).unlink()


def test_weights_that_the_config_names(tmp_path: Path) -> None:
    save_fla(seven(1), tmp_path / "x", head_dim=N, transformers_weights="other.safetensors")
    assert refusal(tmp_path / "x").place == "transformers_weights"
    save_fla(seven(2), tmp_path / "y", head_dim=N)
    weights(tmp_path / "y").rename(tmp_path / "x/other.safetensors")
    save(seven(2), tmp_path / "y.pth")
    assert read(tmp_path / "x")[1] == read(tmp_path / "y.pth")[1]
    change(tmp_path / "x", transformers_weights="../y.pth")
    assert refusal(tmp_path / "x").place == "transformers_weights"


@pytest.mark.parametrize("name", ["model.pth", "rwkv-final.pth", "x.safetensors", "model.safetensors"])
@pytest.mark.parametrize("config", [{}, {"hidden_size": D}])
def test_a_folder_around_one_of_rwkvs_own_files(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    save_own(seven(), tmp_path / "x", name, **config)
    save(seven(), tmp_path / "x.pth")
    assert read(tmp_path / "x")[1] == read(tmp_path / "x.pth")[1]
    if config:
        change(tmp_path / "x", hidden_size=D + 1)
        assert refusal(tmp_path / "x").place == "hidden_size"


def test_a_hybrids_folder_is_named_and_not_its_activation(tmp_path: Path) -> None:
    save_own(seven(), tmp_path / "x", "x.pth", model_type="rwkv_hybrid", hidden_act="silu")
    (tmp_path / "x/x.pth").unlink()
    names = ("self_attn.time_mixer.receptance.weight", "mlp.gate_proj.weight")
    save_file({f"model.layers.0.{name}": torch.ones(2, 2) for name in names}, weights(tmp_path / "x"))
    error = refusal(tmp_path / "x")
    assert error.place != "hidden_act" and "model.layers.0" in str(error)


def test_folders_whose_model_is_not_told(tmp_path: Path) -> None:
    save_own(seven(), tmp_path / "x", "one.pth")
    save(seven(), tmp_path / "x/two.pth")
    said = str(refusal(tmp_path / "x"))
    assert "one.pth, two.pth" in said and "give the one file" in said
    save_fla(seven(), tmp_path / "fla", head_dim=N)
    (tmp_path / "fla/config.json").unlink()
    assert "without its config.json" in str(refusal(tmp_path / "fla"))
    save_fla(seven(), tmp_path / "shards", head_dim=N, shards=2)
    (tmp_path / "shards/config.json").unlink()
    assert "without its config.json" in str(refusal(tmp_path / "shards"))
    (tmp_path / "shards/model.safetensors.index.json").unlink()
    assert "index" in str(refusal(tmp_path / "shards"))
