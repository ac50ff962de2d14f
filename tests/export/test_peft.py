"""Adapters of Hugging Face's PEFT: their folders, their configs and their names; and DoRA, whoever trained it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv4, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.errors import CheckpointError, GosletError, InputError, TensorShapeError  # noqa: E402
from goslet.export.adapters import Adapter, adapter_config, read_adapter  # noqa: E402
from goslet.export.adapters.adapter_config import read_adapter_config  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402

Tensors = dict[str, torch.Tensor]
SHAPE = {"n_layer": 2, "n_embd": 48, "head_size": 16, "vocab_size": 256}
SEVEN = random_rwkv7(**SHAPE, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3)
MODELS: dict[str, Tensors] = {
    "4": random_rwkv4(n_layer=2, n_embd=48, vocab_size=256),
    "6": random_rwkv6(**SHAPE, rank_mix=8, rank_decay=8, seed=3),
    "7": SEVEN,
}
KEY = "blocks.1.ffn.key"  # [192, 48]
RANK, ALPHA = 4, 12
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


DOWN, UP = normal(RANK, 48), normal(192, RANK)
PRODUCT = UP @ DOWN


def lora(module: str = KEY, middle: str = "") -> Tensors:
    return {f"{module}.lora_A{middle}.weight": DOWN, f"{module}.lora_B{middle}.weight": UP}


def put(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, *, name: str = "") -> Path:
    """A folder as PEFT saves it."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        whole = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(whole, folder / (name or "adapter_model.safetensors"), metadata={"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder: Path, adapter: Adapter | None, model: Tensors = SEVEN) -> Tensors:
    """The model's tensors with an adapter in them."""
    save(model, folder / "base.pth")
    with open_checkpoint(folder / "base.pth", adapter=adapter) as source:
        return {name: source.source(one) for name, one in source.sources.items()}


def key(folder: Path, path: Path, alpha: float | None = None) -> torch.Tensor:
    return merged(folder, read_adapter(path, alpha))[KEY + ".weight"]


def assert_scaled(found: torch.Tensor, scale: float) -> None:
    """Two orders of a product's rounding differ by less than 1e-6 of range."""
    expected = SEVEN[KEY + ".weight"].float() + scale * PRODUCT
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_alpha_comes_from_the_config_beside_the_adapter(tmp_path: Path) -> None:
    """Of a folder and of a file, in any container, with the adapter's own name in its tensors' names or not."""
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora().items()}
    named = {f"base_model.model.{name}": tensor for name, tensor in lora(middle=".default").items()}
    for index, (content, name) in enumerate(
        ((tensors, "adapter_model.safetensors"), (tensors, "adapter_model.bin"), (named, "adapter_model.bin"))
    ):
        folder = put(tmp_path / str(index), content, CONFIG, name=name)
        assert_scaled(key(tmp_path, folder), ALPHA / RANK)
        assert_scaled(key(tmp_path, folder / name), ALPHA / RANK)
        assert_scaled(key(tmp_path, folder / name, float(ALPHA)), ALPHA / RANK)


def test_a_rank_stabilized_lora_is_scaled_by_the_root_of_its_rank(tmp_path: Path) -> None:
    stabilized = put(tmp_path / "a", lora(), {**CONFIG, "use_rslora": True})
    assert_scaled(key(tmp_path, stabilized), ALPHA / math.sqrt(RANK))
    assert_scaled(key(tmp_path, stabilized, float(ALPHA)), ALPHA / math.sqrt(RANK))


def test_an_alpha_that_contradicts_the_config_is_an_error_that_names_both(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", lora(), CONFIG)
    with pytest.raises(InputError, match=r"alpha: contradicts.*12, which is lora_alpha in .*adapter_config\.json.*16"):
        key(tmp_path, folder, 16.0)


def test_patterns_give_modules_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    for pattern in ("ffn.key", "blocks.1.ffn.key", "^blocks.1.ffn.key", "key"):
        told = {**CONFIG, "r": 64, "rank_pattern": {pattern: RANK}, "alpha_pattern": {pattern: 6, "value": 99}}
        assert_scaled(key(tmp_path, put(tmp_path / "a", lora(), told)), 6 / RANK)
    for pattern in ("^ffn.key", "fn.key", "blocks.0.ffn.key"):
        told = {**CONFIG, "alpha_pattern": {pattern: 6}}
        assert_scaled(key(tmp_path, put(tmp_path / "a", lora(), told)), ALPHA / RANK)
    with pytest.raises(CheckpointError, match=r"states another rank.*expected 4.*found 64 for blocks\.1\.ffn\.key"):
        key(tmp_path, put(tmp_path / "a", lora(), {**CONFIG, "r": 64}))
    with pytest.raises(CheckpointError, match="regular expression"):
        key(tmp_path, put(tmp_path / "a", lora(), {**CONFIG, "alpha_pattern": {r".*\.(key|value)": 6}}))


# What a file has before a module's name, that name in RWKV's own words, and what PEFT took it for.
LONG_NAMES = [
    ("base_model.model.", "7", KEY, KEY),
    ("", "7", KEY, KEY),
    ("base_model.model.model.", "7", KEY, f"model.{KEY}"),
    ("base_model.model.rwkv.", "7", KEY, f"rwkv.{KEY}"),
    ("base_model.model.rwkv7.", "7", KEY, f"rwkv7.{KEY}"),
    ("base_model.model._orig_mod.", "7", KEY, f"_orig_mod.{KEY}"),
    ("base_model.model._orig_mod.model.", "7", KEY, f"_orig_mod.model.{KEY}"),
    ("_orig_mod.base_model.model.", "7", KEY, KEY),
    ("_forward_module.model.base_model.model.", "7", KEY, KEY),
    ("_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.rwkv.", "7", KEY, f"rwkv.{KEY}"),
    ("base_model.model.", "7", "model.layers.1.ffn.key", "model.layers.1.ffn.key"),
    ("base_model.model.", "4", "rwkv.blocks.1.feed_forward.key", "rwkv.blocks.1.feed_forward.key"),
]


@pytest.mark.parametrize(("prefix", "version", "written", "module"), LONG_NAMES)
def test_patterns_go_by_the_names_of_the_trained_model(
    prefix: str, version: str, written: str, module: str, tmp_path: Path
) -> None:
    """Whatever of a name is not the model's own for us was part of it for PEFT."""
    base = MODELS[version][KEY + ".weight"].float()

    def scale(**config: Any) -> tuple[float, str]:
        adapter = read_adapter(put(tmp_path / "a", lora(prefix + written), {**CONFIG, **config}), None)
        assert adapter is not None
        change = merged(tmp_path, adapter, MODELS[version])[KEY + ".weight"] - base
        return round(float((change * PRODUCT).sum() / PRODUCT.square().sum()), 3), " ".join(adapter.notes)

    ends = [".".join(module.split(".")[start:]) for start in range(module.count(".") + 1)]
    for pattern in (*ends, f"^{module}"):
        found, notes = scale(alpha_pattern={pattern: 32}, r=64, rank_pattern={pattern: RANK})
        assert found == 32 / RANK and "of no use" not in notes, pattern
        found, _ = scale(alpha_pattern={pattern: 32}, use_rslora=True)
        assert found == 32 / math.sqrt(RANK), pattern
    for pattern in (f"x.{module}", f"{module}.x", module[1:], *(f"^{end}" for end in ends[1:])):
        found, notes = scale(alpha_pattern={pattern: 32, "key": 6})
        assert found == 6 / RANK, pattern
        assert f"alpha_pattern {pattern}: of no use" in notes and module in notes
    with pytest.raises(CheckpointError, match=f"found 64 for {module}"):
        scale(r=64, rank_pattern={f"x.{module}": RANK})


def test_the_first_pattern_that_fits_counts(tmp_path: Path) -> None:
    for first, second in (("key", "ffn.key"), ("ffn.key", "key"), ("^blocks.1.ffn.key", "key")):
        told = {**CONFIG, "r": 64, "rank_pattern": {first: RANK, second: 8}, "alpha_pattern": {first: 6, second: 99}}
        assert_scaled(key(tmp_path, put(tmp_path / "a", lora(), told)), 6 / RANK)


def test_dora_is_scaled_to_its_magnitudes_along_the_axis_of_its_trainer(tmp_path: Path) -> None:
    """PEFT's has a magnitude for each row, that of RWKV-LM-RLHF one for each column."""
    changed = SEVEN[KEY + ".weight"].float() + ALPHA / RANK * PRODUCT
    rows, columns = normal(192).abs() + 0.5, normal(1, 48).abs() + 0.5
    by_row = rows[:, None] * changed / changed.norm(dim=1, keepdim=True)
    by_column = columns * changed / (changed.norm(dim=0, keepdim=True) + 1e-6)
    for suffix in ("", ".weight"):
        tensors = {**lora(), f"{KEY}.lora_magnitude_vector{suffix}": rows}
        found = key(tmp_path, put(tmp_path / "a", tensors, {**CONFIG, "use_dora": True}))
        assert (found - by_row).abs().max() <= 1e-6 * by_row.abs().max()
    torch.save({f"{KEY}.lora_A": DOWN, f"{KEY}.lora_B": UP, f"{KEY}.lora_M": columns}, tmp_path / "dora.pth")
    found = key(tmp_path, tmp_path / "dora.pth", float(ALPHA))
    assert (found - by_column).abs().max() <= 1e-6 * by_column.abs().max()
    # A checkpoint that was scaled to its own norms and not changed is itself.
    same = {
        f"{KEY}.lora_A": DOWN,
        f"{KEY}.lora_B": 0 * UP,
        f"{KEY}.lora_M": SEVEN[KEY + ".weight"].float().norm(dim=0)[None],
    }
    torch.save(same, tmp_path / "same.pth")
    assert torch.allclose(key(tmp_path, tmp_path / "same.pth", 1.0), SEVEN[KEY + ".weight"].float(), rtol=1e-4)
    torch.save({**same, f"{KEY}.lora_M": normal(192, 1)}, tmp_path / "bad.pth")
    with pytest.raises(TensorShapeError, match="does not fit"):
        key(tmp_path, tmp_path / "bad.pth", 1.0)


def test_miss_is_bone_and_its_bat_goes_by_the_outputs(tmp_path: Path) -> None:
    base = SEVEN[KEY + ".weight"].float()
    shared = normal(5, 192)
    for kind in ("MISS", "BONE"):
        config = {"peft_type": kind, "r": 5, "init_weights": True}
        found = key(tmp_path, put(tmp_path / "a", {f"{KEY}.miss_block": shared}, config))
        assert torch.equal(found, base + shared[torch.arange(48) % 5].T)
    few = normal(8, 16)
    mini = {"peft_type": "MISS", "r": 8, "init_weights": "mini", "mini_r": 16}
    found = key(tmp_path, put(tmp_path / "a", {f"{KEY}.miss_block": few}, mini))
    assert torch.equal(found, base + few.repeat(1, 12)[torch.arange(48) % 8].T)
    each = normal(24, 8, 8)
    found = key(
        tmp_path, put(tmp_path / "a", {f"{KEY}.miss_block": each}, {"peft_type": "MISS", "init_weights": "bat"})
    )
    expected = base.clone()
    for a in range(24):
        for b in range(6):
            rows, columns = slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8)
            expected[rows, columns] += base[rows, columns] @ each[a] + each[a]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


FLA7 = {
    "model.layers.0.attn.r_proj": ("blocks.0.att.receptance.weight", False),
    "model.layers.1.attn.o_proj": ("blocks.1.att.output.weight", False),
    "model.layers.1.ffn.key": ("blocks.1.ffn.key.weight", False),
    "model.layers.1.attn.w_lora.lora.0": ("blocks.1.att.w1", True),
    "model.layers.1.attn.g_lora.lora.2": ("blocks.1.att.g2", True),
    "lm_head": ("head.weight", False),
}
FLA6 = {
    "model.layers.0.attn.k_proj.linear": ("blocks.0.att.key.weight", False),
    "model.layers.1.ffn.receptance.linear": ("blocks.1.ffn.receptance.weight", False),
    "model.layers.1.attn.w_proj.linear.lora.0": ("blocks.1.att.time_decay_w1", True),
}
TRANSFORMERS = {
    "rwkv.blocks.0.attention.key": ("blocks.0.att.key.weight", False),
    "rwkv.blocks.1.feed_forward.value": ("blocks.1.ffn.value.weight", False),
}
OWN = {"blocks.0.att.output": ("blocks.0.att.output.weight", False), "head": ("head.weight", False)}
NAMES = {"7": [OWN, FLA7], "6": [OWN, FLA6], "4": [OWN, TRANSFORMERS]}


@pytest.mark.parametrize("version", NAMES)
def test_modules_are_found_under_the_names_of_every_library(version: str, tmp_path: Path) -> None:
    """Each gets the product that its trainer added; matrices that RWKV's own files hold turned, turned."""
    model = MODELS[version]
    for number, names in enumerate(NAMES[version]):
        tensors, expected = {}, {name: tensor.float() for name, tensor in model.items()}
        for module, (own, turned) in names.items():
            shape = model[own].shape[::-1] if turned else model[own].shape
            down, up = normal(RANK, shape[1], seed=len(module)), normal(shape[0], RANK, seed=2)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            product = ALPHA / RANK * (up @ down)
            expected[own] = expected[own] + (product.T if turned else product)
        found = merged(tmp_path, read_adapter(put(tmp_path / str(number), tensors, CONFIG), None), model)
        for name, tensor in found.items():
            assert (tensor.flatten() - expected[name].flatten()).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_an_embedding_and_modules_that_were_trained_whole(tmp_path: Path) -> None:
    """PEFT holds an embedding's LoRA the other way round, and whole modules under the model's own names."""
    first, second, head = normal(RANK, 256), normal(48, RANK), normal(256, 48)
    norm, share = normal(48), normal(1, 1, 48)
    tensors = {
        "base_model.model.model.embeddings.lora_embedding_A": first,
        "base_model.model.model.embeddings.lora_embedding_B": second,
        "base_model.model.lm_head.modules_to_save.default.weight": head,
        "base_model.model.model.layers.1.attn_norm.bias": norm,
        "base_model.model.model.layers.0.attn.w_lora.lora.2.bias": share,
    }
    config = {**CONFIG, "modules_to_save": ["lm_head"], "bias": "all"}
    found = merged(tmp_path, read_adapter(put(tmp_path / "a", tensors, config), None))
    expected = SEVEN["emb.weight"].float() + ALPHA / RANK * (second @ first).T
    assert (found["emb.weight"] - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(found["head.weight"], head) and torch.equal(found["blocks.1.ln1.bias"], norm)
    assert torch.equal(found["blocks.0.att.w0"].flatten(), share.flatten())


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**CONFIG, **values}))
    return path


def test_every_key_of_a_config_is_used_or_harmless_or_refused_by_name(tmp_path: Path) -> None:
    tables = (
        adapter_config.USED_KEYS,
        adapter_config.TOLD_BY_THE_FILE_KEYS,
        adapter_config.WITHOUT_EFFECT_KEYS,
        adapter_config.REFUSED_KEYS,
    )
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys)), "each is in one table"
    read_adapter_config(config_file(tmp_path, **{key: None for key in adapter_config.REFUSED_KEYS}))
    read_adapter_config(config_file(tmp_path, **{key: ["x"] for key in adapter_config.TOLD_BY_THE_FILE_KEYS}))
    read_adapter_config(config_file(tmp_path, **{key: {"x": 1} for key in adapter_config.WITHOUT_EFFECT_KEYS}))
    for key in (*adapter_config.REFUSED_KEYS, "a_key_of_the_future"):
        for value in (True, [[0, 1]], {"x": 1}):
            with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key}: .*PEFT.*export") as caught:
                read_adapter_config(config_file(tmp_path, **{key: value}))
            assert ("does not know" in str(caught.value)) == (key not in adapter_config.REFUSED_KEYS)


@pytest.mark.parametrize(
    "kind", [*adapter_config.UNMERGEABLE_TYPES, "LOHA", "LOKR", "IA3", "VERA", "OFT", "ADALORA", None]
)
def test_other_kinds_of_adapters_are_refused_by_name(kind: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"peft_type.*found {kind}.*PEFT"):
        read_adapter_config(config_file(tmp_path, peft_type=kind))


def test_how_training_began_is_told_apart(tmp_path: Path) -> None:
    for beginning in adapter_config.PLAIN_BEGINNINGS:
        assert not read_adapter_config(config_file(tmp_path, init_lora_weights=beginning)).took_out
    for beginning in (*adapter_config.RESIDUAL_BEGINNINGS, "pissa_niter_16"):
        folder = put(tmp_path / "a", lora(), {**CONFIG, "init_lora_weights": beginning})
        assert read_adapter_config(folder / "adapter_config.json").took_out
        with pytest.raises(
            CheckpointError, match=rf"began its training with {beginning.split('_n')[0]}.*--adapter-init"
        ):
            key(tmp_path, folder)
    for beginning, words in (("loftq", "LoftQ"), ("tomorrow", "does not know"), (3, "does not know")):
        with pytest.raises(CheckpointError, match=rf"init_lora_weights: .*{words}.*PEFT"):
            read_adapter_config(config_file(tmp_path, init_lora_weights=beginning))


BAD_VALUES: dict[str, Any] = {
    "r": [0, -1, 1.5, "8", True, 1 << 40],
    "lora_alpha": [0, -1, "16", None, True, 1e300],
    "use_rslora": ["yes", 1],
    "use_dora": [2],
    "rank_pattern": [["x"], {"x": 0}, {"x": "y"}],
    "alpha_pattern": [3, {"x": -1}],
}


def test_values_that_no_adapter_has(tmp_path: Path) -> None:
    for place, values in BAD_VALUES.items():
        for value in values:
            with pytest.raises(CheckpointError, match=r"adapter_config\.json: .*no adapter has.*expected"):
                read_adapter_config(config_file(tmp_path, **{place: value}))
    path = tmp_path / "adapter_config.json"
    for text, words in (
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("[]", "not a JSON object"),
        (" " * 2**21, "large"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_adapter_config(path)


BAD: dict[str, tuple[Tensors, dict[str, Any] | None, type[GosletError], str]] = {
    "no config": (lora(), None, CheckpointError, r"without adapter_config\.json"),
    "DoRA without a word of it": (
        {**lora(), f"{KEY}.lora_magnitude_vector": normal(192)},
        CONFIG,
        CheckpointError,
        "another adapter",
    ),
    "DoRA that is not there": (lora(), {**CONFIG, "use_dora": True}, CheckpointError, "another adapter.*use_dora"),
    "MiSS that is a LoRA": (lora(), {"peft_type": "MISS"}, CheckpointError, "another adapter.*MISS"),
    "two adapters": ({**lora(middle=".a"), **lora(middle=".b")}, CONFIG, CheckpointError, "several adapters.*a, b"),
    "a quantized base": (
        {**lora(), f"{KEY}.weight.quant_state.bitsandbytes__nf4": torch.ones(8, dtype=torch.uint8)},
        CONFIG,
        CheckpointError,
        "quantized weights of a base.*save the adapter alone",
    ),
    "AdaLoRA": ({**lora(), f"{KEY}.lora_E": normal(RANK, 1)}, CONFIG, GosletError, "lora_E"),
    "a layer that is not there": (lora("blocks.9.ffn.key"), CONFIG, GosletError, r"blocks\.9.*does not have"),
}


@pytest.mark.parametrize("name", BAD)
def test_folders_that_do_not_fit(name: str, tmp_path: Path) -> None:
    tensors, config, error, words = BAD[name]
    folder = put(tmp_path / "a", tensors, config)
    with pytest.raises(error, match=words) as caught:
        key(tmp_path, folder)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_folders_without_weights_and_of_whole_models(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"holds no weights.*adapter_model\.safetensors"):
        read_adapter(tmp_path / "a", None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole model is exported by itself"):
        read_adapter(tmp_path / "b", None)


@pytest.mark.parametrize("prefix", ["rwkv7.", "base_model.model.rwkv7.", "base_model.model.model.", "module.rwkv7."])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_beside_a_models_config_is_read(ending: str, prefix: str, tmp_path: Path) -> None:
    """As in folders that a trainer of transformers leaves: config.json belongs to the model, not to the adapter."""
    names = {prefix + name: tensor for name, tensor in lora().items()}
    folder = put(tmp_path / "x", names, CONFIG)
    file = folder / f"adapter_model.{ending}"
    if ending == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save(names, file)
    (folder / "config.json").write_text('{"model_type": "rwkv7"}')
    for path in (folder, file):
        adapter = read_adapter(path, None)
        assert adapter is not None
        assert set(adapter.modules) == {KEY}
