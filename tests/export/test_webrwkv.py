"""What a number means is not taken from its name alone: web-rwkv's files are undone, contradictions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv4, random_rwkv5, random_rwkv6, random_rwkv7, save  # noqa: E402

from goslet.errors import CheckpointError, TensorShapeError  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.models import VERSIONS  # noqa: E402

Tensors = dict[str, torch.Tensor]
HALF = torch.float16
WIDE = {"n_layer": 2, "n_embd": 32, "vocab_size": 19, "n_ffn": 48}
RANKS = {"rank_w": 4, "rank_a": 5, "rank_v": 6, "rank_g": 7}
MAKERS: dict[str, Callable[..., Tensors]] = {
    "4": partial(random_rwkv4, **WIDE),
    "5.0": partial(random_rwkv5, "5.0", **WIDE, head_size=8, first="time_first"),
    "5.0 faaaa": partial(random_rwkv5, "5.0", **WIDE, head_size=8),
    "5.1": partial(random_rwkv5, "5.1", **WIDE, head_size=8),
    "5.1 first": partial(random_rwkv5, "5.1", **WIDE, head_size=8, first="time_first"),
    "5.2": partial(random_rwkv5, "5.2", **WIDE, head_size=8),
    "5.2 one head": partial(random_rwkv5, "5.2", **WIDE, head_size=32),
    "6": partial(random_rwkv6, **WIDE, head_size=8, rank_mix=3, rank_decay=5),
    "6 square w1": partial(random_rwkv6, **{**WIDE, "n_embd": 40}, head_size=8, rank_mix=8, rank_decay=5),
    "6 square w2": partial(random_rwkv6, **WIDE, head_size=8, rank_mix=32, rank_decay=32),
    "7": partial(random_rwkv7, **WIDE, **RANKS, head_size=8),
    "7 square w": partial(random_rwkv7, **WIDE, **{**RANKS, "rank_w": 32}, head_size=8),
    "7a": partial(random_rwkv7, **WIDE, **RANKS, head_size=8, rank_s=3),
}
# Square LoRAs are told by their siblings, and one head's decay by its axes.
RULED = [version for version in MAKERS if "square" not in version]
_TURNED = ("time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2", "time_state")
_TURNED7 = tuple(f".{letter}{number}" for letter in "wavg" for number in "12")


def converted(tensors: Tensors, version: str) -> Tensors:
    """As cryscan/web-rwkv's assets/scripts/convert_safetensors.py does it."""
    width = tensors["emb.weight"].shape[1]
    out = {}
    for name, tensor in tensors.items():
        if version.startswith("5.1") and ("time_decay" in name or "time_faaaa" in name):
            tensor = tensor.unsqueeze(1).repeat(1, width // tensor.shape[0])
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        tensor = tensor.half()
        if name.endswith((*_TURNED, *_TURNED7)):
            tensor = tensor.transpose(-1, -2)
        out[name] = tensor.contiguous()
    return out


def identity(path: Path) -> tuple[str, str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec.version, checkpoint.model_id()


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError, match=path.name) as caught, open_checkpoint(path):
        pass
    return caught.value


@pytest.mark.parametrize("version", [version for version in MAKERS if not version.startswith("5.0")])
def test_a_converted_file_is_the_model_that_it_was_made_from(version: str, tmp_path: Path) -> None:
    tensors = MAKERS[version](dtype=HALF)
    save(tensors, tmp_path / "x.pth")
    save(converted(tensors, version), tmp_path / "x.safetensors")
    assert identity(tmp_path / "x.safetensors") == identity(tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert any("web-rwkv" in note for note in checkpoint.notes) == (version != "4")


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
def test_a_file_in_rwkvs_own_form_is_left_alone(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = MAKERS[version](dtype=dtype)
    save(tensors, tmp_path / "x.pth")
    save(tensors, tmp_path / "x.safetensors")
    if dtype is HALF and version in ("5.0", "5.1 first"):
        # time_first [heads] is RWKV's own, and also what old converters made of time_faaaa.
        assert "give the .pth" in str(refusal(tmp_path / "x.safetensors"))
        return
    assert identity(tmp_path / "x.safetensors") == identity(tmp_path / "x.pth")


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("form", ["one file", "shards", "a name of its own"])
def test_in_a_folder_a_converted_file_is_read_or_refused_as_it_is_alone(
    form: str, version: str, tmp_path: Path
) -> None:
    tensors = MAKERS[version](dtype=HALF)
    save(tensors, tmp_path / "x.pth")
    held = converted(tensors, version)
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_type": "rwkv"}
    if form == "shards":
        parts = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(held)}
        for part in set(parts.values()):
            save({name: held[name] for name in held if parts[name] == part}, folder / part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    else:
        file = "model.safetensors" if form == "one file" else "own.st"
        save(held, tmp_path / "own.safetensors")
        (tmp_path / "own.safetensors").rename(folder / file)
        if file == "own.st":
            config["transformers_weights"] = file
    (folder / "config.json").write_text(json.dumps(config))
    if version.startswith("5.0"):
        with pytest.raises(CheckpointError, match=r"give the \.pth"), open_checkpoint(folder):
            pass
        return
    assert identity(folder) == identity(tmp_path / "x.pth")


def test_in_a_folder_loras_that_may_lie_either_way_are_refused(tmp_path: Path) -> None:
    square = random_rwkv7(**WIDE, rank_w=32, rank_a=32, rank_v=32, rank_g=32, head_size=8, dtype=HALF)
    save(converted(square, "7"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv7"}')
    with pytest.raises(CheckpointError, match=r"give the \.pth"), open_checkpoint(tmp_path):
        pass


def test_a_tuned_state_in_a_converted_file_lies_as_rwkvs_own(tmp_path: Path) -> None:
    tensors = MAKERS["7"](dtype=HALF)
    state = torch.randn(2, 4, 8, 8).half()
    tensors |= {f"blocks.{layer}.att.time_state": state[layer] for layer in range(2)}
    save(converted(tensors, "7"), tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        for layer in range(2):
            found = checkpoint.tuned_state[f"blocks.{layer}.att.time_state"].read(slice(None))
            assert torch.equal(found, state[layer].float())


def test_half_converted_and_undecidable_loras_are_refused(tmp_path: Path) -> None:
    tensors = MAKERS["7"](dtype=HALF)
    mixed = {**tensors, "blocks.1.att.g2": tensors["blocks.1.att.g2"].T.contiguous()}
    save(mixed, tmp_path / "mixed.safetensors")
    assert "blocks.1.att.g2" in str(refusal(tmp_path / "mixed.safetensors"))
    square = random_rwkv7(**WIDE, rank_w=32, rank_a=32, rank_v=32, rank_g=32, head_size=8, dtype=HALF)
    save(square, tmp_path / "square.safetensors")
    assert "give the .pth" in str(refusal(tmp_path / "square.safetensors"))
    save(square, tmp_path / "square.pth")
    identity(tmp_path / "square.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_time_first_of_every_channel_is_no_official_form(ending: str, tmp_path: Path) -> None:
    """Its exponential would be taken: 8% of range on a file that only renamed time_faaaa."""
    tensors = MAKERS["5.2"]()
    renamed = {name.replace("time_faaaa", "time_first"): tensor for name, tensor in tensors.items()}
    save(renamed, tmp_path / f"x.{ending}")
    error = refusal(tmp_path / f"x.{ending}")
    assert isinstance(error, TensorShapeError)
    assert "blocks.0.att.time_first of shape [4, 8]" in str(error)
    assert "blocks.0.att.time_decay of shape [4]" in str(error)


def rules_of(tensors: Tensors, path: Path) -> list:
    save(tensors, path)
    with open_checkpoint(path) as checkpoint:
        return list(checkpoint.rules)


@pytest.mark.parametrize("version", RULED)
def test_every_rule_that_changes_numbers_says_what_must_stand_beside(version: str, tmp_path: Path) -> None:
    tensors = MAKERS[version]()
    changing = 0
    for rule in rules_of(tensors, tmp_path / "x.pth"):
        sources = [torch.rand(source.shape) + 0.1 for source in rule.sources]
        result = rule.derive(*sources)
        plain = len(sources) == 1 and result.numel() == sources[0].numel()
        if plain and torch.equal(result.reshape(-1), sources[0].reshape(-1)):
            continue
        changing += 1
        named = {source.name for source in (*rule.sources, *rule.beside)}
        assert len(named) > 1, rule.name
        assert named <= tensors.keys(), rule.name
    assert changing > 1


RENAMED = (
    ("time_faaaa", "time_first"),
    ("time_first", "time_faaaa"),
    ("time_maa", "time_mix"),
    ("time_mix", "time_maa"),
    ("time_decay", "time_first"),
)


@pytest.mark.parametrize(("ending", "dtype"), [("pth", torch.float32), ("safetensors", HALF)])
@pytest.mark.parametrize("version", RULED)
def test_a_mutated_checkpoint_is_refused_or_read_equal(
    version: str, ending: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Each tensor the other way round, alone and with its whole kind, and each name that another version uses."""
    tensors = MAKERS[version](dtype=dtype)
    rules = rules_of(tensors, tmp_path / "plain.pth")
    wanted = identity(tmp_path / "plain.pth")
    sources = {source.name for rule in rules for source in rule.sources}
    mutants: dict[str, Tensors] = {}
    for name in sources:
        shape = tensors[name].shape
        if len(shape) > 1 and shape[-1] != shape[-2]:
            kind = name.rpartition(".")[2] if "weight" not in name else name.partition(".")[2].partition(".")[2]
            swapped = tensors[name].transpose(-1, -2).contiguous()
            mutants[f"{name} turned"] = {**tensors, name: swapped}
            if kind in ("r_k", "time_faaaa") and version[0] in "67":
                continue  # 6 and 7 have nothing else that says how many heads there are, and of what size
            mutants[f"{kind} turned everywhere"] = {
                n: t.transpose(-1, -2).contiguous() if n.endswith(kind) and t.ndim > 1 else t
                for n, t in tensors.items()
            }
    for old, new in RENAMED:
        # Of 5.0 and 5.1 there are files with either, which differ in nothing else.
        either = version.startswith(("5.0", "5.1")) and {old, new} == {"time_first", "time_faaaa"}
        if not either and any(old in name for name in tensors):
            mutants[f"{old} as {new}"] = {name.replace(old, new): tensor for name, tensor in tensors.items()}
            one = next(name for name in tensors if old in name)
            mutants[f"{one} as {new}"] = {n.replace(old, new) if n == one else n: t for n, t in tensors.items()}
    assert len(mutants) > 3
    path = tmp_path / f"x.{ending}"
    equal = []
    for mutant, changed in mutants.items():
        save(changed, path)
        try:
            assert identity(path) == wanted, mutant
            equal.append(mutant)
        except CheckpointError as error:
            assert path.name in str(error)
    # What is read is not everything: that would be a test of nothing.
    assert len(equal) < len(mutants)


def test_versions_are_told_apart_by_axes_and_not_by_sizes(tmp_path: Path) -> None:
    """A single head's [1, 32] of 5.2 is not 5.1's [32], which would be 32 heads of one channel."""
    for version in MAKERS:
        save(MAKERS[version](), tmp_path / "x.pth")
        assert identity(tmp_path / "x.pth")[0] == version.split()[0]
    assert {name for version in VERSIONS for name in version.NAMES} == {version.split()[0] for version in MAKERS}
