"""PiSSA: merged as its trainers merge it, and never taken for a LoRA."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from random_checkpoint import random_rwkv7, save  # noqa: E402

from goslet.cli import main  # noqa: E402
from goslet.errors import CheckpointError, GosletError, InputError, MissingTensorError, TensorShapeError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.adapters import read_adapter  # noqa: E402
from goslet.export.adapters.pissa import ALIGNED, LARGEST_SHARE, align, holds_principal_part, sampled  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.models import rwkv7  # noqa: E402
from goslet.export.models.blocks import EagerOps, token_pieces  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402

Tensors = dict[str, torch.Tensor]
BASE = random_rwkv7(n_layer=2, n_embd=48, head_size=16, vocab_size=256, rank_w=8, rank_a=8, rank_v=8, rank_g=8, seed=3)
ENDS = (".receptance.weight", ".key.weight", ".value.weight", ".output.weight")
STEMS = [name.removesuffix(".weight") for name in BASE if name.endswith(ENDS)]
KEY = "blocks.1.ffn.key"
RANK = 8


def principal(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 and A0 as PiSSA begins."""
    left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def moved(tensor: torch.Tensor, by: float, seed: int) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return tensor + by * tensor.norm() / math.sqrt(tensor.numel()) * noise


def pissa(scale: float = 1.0, by: float = 0.1, rank: int = RANK) -> tuple[Tensors, Tensors, Tensors]:
    """What was taken out, what was trained, and the model that both make: W - s·B0·A0 + s·B·A."""
    init, trained, tuned = {}, {}, dict(BASE)
    for index, stem in enumerate(STEMS):
        up, down = (part / math.sqrt(scale) for part in principal(BASE[stem + ".weight"], rank))
        init[f"{stem}.init_lora_A"], init[f"{stem}.init_lora_B"] = down, up
        trained[f"{stem}.lora_A"], trained[f"{stem}.lora_B"] = moved(down, by, 2 * index), moved(up, by, 2 * index + 1)
        product = trained[f"{stem}.lora_B"] @ trained[f"{stem}.lora_A"]
        tuned[f"{stem}.weight"] = BASE[f"{stem}.weight"].float() - scale * (up @ down) + scale * product
    return init, trained, tuned


INIT, TRAINED, TUNED = pissa()


def peft(tensors: Tensors) -> Tensors:
    """The same under PEFT's names."""
    return {
        f"base_model.model.{name.replace('.init_lora_', '.lora_')}.weight": tensor.contiguous()
        for name, tensor in tensors.items()
    }


def put(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A folder of PEFT's."""
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return folder


def weight(folder: Path, adapter: Path, alpha: float | None = None, init: Path | None = None) -> torch.Tensor:
    save(BASE, folder / "base.pth")
    with open_checkpoint(folder / "base.pth", adapter=read_adapter(adapter, alpha, init)) as source:
        return source.source(source.sources[KEY + ".weight"])


def saved(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model."])
def test_the_beginning_is_taken_out_and_the_trained_product_added(prefix: str, tmp_path: Path) -> None:
    """As RWKV-PEFT's merge does, whatever its trainer put before the names of the beginning; no alpha takes part."""
    trained = saved(TRAINED, tmp_path / "rwkv-5.pth")
    init = saved({prefix + name: tensor for name, tensor in INIT.items()}, tmp_path / "init_pissa.pth")
    assert torch.equal(weight(tmp_path, trained, init=init), TUNED[KEY + ".weight"])


def test_the_engine_is_that_of_the_tuned_model(tmp_path: Path) -> None:
    save(BASE, tmp_path / "base.pth")
    changed = {
        "adapter": saved(TRAINED, tmp_path / "rwkv-5.pth"),
        "adapter_init": saved(INIT, tmp_path / "init_pissa.pth"),
    }
    report = export_engine(tmp_path / "base.pth", tmp_path / "x.goslet", quant="f32", **changed)
    with open_checkpoint(save(TUNED, tmp_path / "tuned.pth") or tmp_path / "tuned.pth") as source:
        assert report.model_id == source.model_id()
    assert verify_engine(tmp_path / "x.goslet", tmp_path / "base.pth", n_tokens=8, **changed).passed
    with pytest.raises(CheckpointError, match="PiSSA"):
        verify_engine(tmp_path / "x.goslet", tmp_path / "base.pth", adapter=changed["adapter"], alpha=8.0)


@pytest.mark.parametrize("alpha", [None, 8.0, 16.0])
def test_without_its_beginning_it_is_refused_before_there_is_any_output(alpha: float | None, tmp_path: Path) -> None:
    """It has a LoRA's names, with or without the alpha that a LoRA needs."""
    save(BASE, tmp_path / "base.pth")
    saved(TRAINED, tmp_path / "rwkv-5.pth")
    with pytest.raises(CheckpointError, match=r"rwkv-5\.pth.*PiSSA.*--adapter-init.*init_pissa\.pth"):
        export_engine(tmp_path / "base.pth", tmp_path / "x.goslet", adapter=tmp_path / "rwkv-5.pth", alpha=alpha)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pth", "rwkv-5.pth"]


def matrices() -> dict[str, torch.Tensor]:
    """Spectra from the flattest, which random numbers have, to steeper ones than trained matrices'."""
    generator = torch.Generator().manual_seed(5)
    found = {"tall": torch.randn(192, 48, generator=generator), "square": torch.randn(128, 128, generator=generator)}
    for power in (0.5, 1.0):
        left, right = (torch.linalg.qr(torch.randn(96, 96, generator=generator))[0] for _ in range(2))
        found[f"power {power}"] = left @ torch.diag(torch.arange(1.0, 97.0) ** -power) @ right
    return found


@pytest.mark.parametrize("rank", [1, 4, 16, 48])
def test_numbers_of_both_kinds_lie_far_from_the_limits(rank: int) -> None:
    """Half and twice the limit of alignment, and the share of everything that began as a projection is below 1.

    Of what has nothing to do with W, alignment is about 1 / sqrt(out · rank), 0.1 at most here: three of its standard
    deviations in the mean of eight matrices are 0.1. What moved by its own norm keeps 1/2 of the alignment that it
    began with: 1 from an SVD, and from two iterations of a fast one at least 0.8.
    """
    for name, matrix in matrices().items():
        n_out, n_in = matrix.shape
        unrelated = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(100 * rank + seed)
            up, down = torch.randn(n_out, rank, generator=generator), torch.randn(rank, n_in, generator=generator)
            for size in (1e-3, 1.0, 1e3):
                unrelated.append(align(matrix, up, down).times(size))
        assert abs(sum(one.aligned for one in unrelated) / len(unrelated)) < ALIGNED / 2, name
        assert not holds_principal_part(unrelated)
        torch.manual_seed(rank)
        beginnings = {"svd": principal(matrix, rank)}
        for iterations in (2, 4, 16):
            left, sizes, right = torch.svd_lowrank(matrix, rank, niter=iterations)
            beginnings[f"fast svd {iterations}"] = (left * sizes.sqrt(), sizes.sqrt()[:, None] * right.T)
        for kind, (up, down) in beginnings.items():
            for scale in (0.5, 1.0, 4.0):
                found = align(matrix, up / scale, down).times(scale)
                assert abs(found.share - 1) < 1e-3, (name, kind)
                assert found.aligned > 0.75, (name, kind)
            for by in (0.1, 0.3, 0.5):
                found = align(matrix, moved(up, by, 1), moved(down, by, 2))
                assert found.aligned > 2 * ALIGNED and found.share < 1.1 < LARGEST_SHARE, (name, kind, by)
                assert holds_principal_part([found])


def test_a_small_product_along_the_principal_part_is_a_lora() -> None:
    """Its share tells: of c·P it is 1 / c. A PiSSA may have shrunk; to two thirds of its norm is far for one."""
    for name, matrix in matrices().items():
        up, down = principal(matrix, 4)
        for size, is_pissa in ((1.5, True), (1.0, True), (0.8, True), (0.7, True), (0.6, False), (0.1, False)):
            found = align(matrix, up, down).times(size)
            assert found.aligned > 0.75 and abs(found.share * size - 1) < 1e-3
            assert holds_principal_part([found]) == is_pissa, (name, size)
        # All of them count, not the first: one that is aligned by chance among others that are not, and the reverse.
        chance = align(matrix, up, down).times(0.9)
        none = align(matrix, torch.zeros_like(up) + 1e-9, down)
        assert holds_principal_part([chance]) and not holds_principal_part([chance, *[none] * 8])
        assert holds_principal_part([none, *[chance] * 8])


def test_what_is_looked_at_is_spread_over_all_matrices() -> None:
    for count in range(100):
        names = [str(index) for index in range(count)]
        found = [int(name) for name in sampled(names)]
        assert len(found) == min(count, 8)
        gaps = {after - before for before, after in itertools.pairwise([*found, count])}
        assert found[:1] == [0][:count] and (not gaps or max(gaps) - min(gaps) <= 1), count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_beginning_that_was_rounded_fits(dtype: torch.dtype, tmp_path: Path) -> None:
    init = {name: tensor.to(dtype) for name, tensor in INIT.items()}
    found = weight(tmp_path, saved(TRAINED, tmp_path / "t.pth"), init=saved(init, tmp_path / "i.pth"))
    expected = TUNED[KEY + ".weight"]
    # Two factors, each rounded by at most half a unit of its last place.
    assert (found - expected).abs().max() <= RANK * torch.finfo(dtype).eps * expected.abs().max()


def test_a_lora_that_was_trained_hard_is_no_pissa(tmp_path: Path) -> None:
    """Gradients of a real step until a text is learnt by heart.

    Measured: products of 0.6 to 2.5 times W's norm, alignments between -0.04 and 0.07, 0.03 in the mean.
    """
    torch.manual_seed(1)
    with open_checkpoint(save(BASE, tmp_path / "base.pth") or tmp_path / "base.pth") as source:
        weights, spec = source.weights(), source.spec
    rank = 4
    pairs = {
        stem: (torch.zeros(len(BASE[stem + ".weight"]), rank), torch.randn(rank, BASE[stem + ".weight"].shape[1]) / 7)
        for stem in STEMS
    }
    parameters = [part.requires_grad_() for pair in pairs.values() for part in pair]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    text = list(b"the lamp")
    losses = []
    for _ in range(40):
        tuned = {**weights, **{f"{s}.weight": weights[f"{s}.weight"] + up @ down for s, (up, down) in pairs.items()}}
        ops = EagerOps(tuned)
        state = {one.name: torch.full((1, *one.shape), one.init) for one in rwkv7.state_spec(spec).tensors}
        loss = torch.zeros(())
        for token, wanted in itertools.pairwise(text):
            logits, state = rwkv7.step(spec, ops, token_pieces(tuned["emb.weight"][token : token + 1], spec), state)
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor([wanted]))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[0] / 10, "it must have learnt"
    found = [align(weights[f"{s}.weight"], up.detach(), down.detach()) for s, (up, down) in pairs.items()]
    assert max(one.squared for one in found) > 1.0, "the products must be large"
    assert max(abs(one.aligned) for one in found) < ALIGNED
    assert abs(sum(one.aligned for one in found) / len(found)) < ALIGNED / 2
    assert not holds_principal_part(found)
    trained = {
        f"{s}.lora_{end}": part.detach() for s, (up, down) in pairs.items() for end, part in (("A", down), ("B", up))
    }
    weight(tmp_path, saved(trained, tmp_path / "lora.pth"), alpha=4.0)  # merged without a word


def test_pefts_pissa_scales_what_it_takes_out_as_what_it_adds(tmp_path: Path) -> None:
    """lora_alpha 16 at rank 8; rank-stabilized likewise; and converted by PEFT itself, which is a LoRA of rank 2r."""
    for stabilized, scale in ((False, 2.0), (True, 16 / math.sqrt(8))):
        init, trained, tuned = pissa(scale)
        told = {"lora_alpha": 16, "use_rslora": stabilized}
        before = put(tmp_path / f"before{stabilized}", peft(init), init_lora_weights=True, **told)
        after = put(tmp_path / f"after{stabilized}", peft(trained), init_lora_weights="pissa_niter_4", **told)
        found = weight(tmp_path, after, init=before)
        expected = tuned[KEY + ".weight"]
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        with pytest.raises(CheckpointError, match=r"pissa.*--adapter-init"):
            weight(tmp_path, after)
    # The config may be gone: then alpha is told, and the numbers tell.
    with pytest.raises(CheckpointError, match="PiSSA"):
        weight(tmp_path, saved(peft(trained), tmp_path / "bare.pth"), alpha=16 * math.sqrt(8))
    init, trained, tuned = pissa(2.0)
    both = {
        name: torch.cat([trained[name], init[name.replace(".lora_", ".init_lora_")]])
        if name.endswith("A")
        else torch.cat([trained[name], -init[name.replace(".lora_", ".init_lora_")]], 1)
        for name in trained
    }
    converted = put(tmp_path / "converted", peft(both), r=2 * RANK, lora_alpha=32, init_lora_weights=True)
    assert (weight(tmp_path, converted) - tuned[KEY + ".weight"]).abs().max() <= 1e-5


def test_olora_takes_out_a_projection_times_the_scale(tmp_path: Path) -> None:
    """PEFT begins with Q and R of W's QR decomposition, not divided by alpha / r as PiSSA's parts are."""
    init, trained, expected = {}, {}, BASE[KEY + ".weight"].float()
    for index, stem in enumerate(STEMS):
        q, r = torch.linalg.qr(BASE[stem + ".weight"].float())
        init[f"{stem}.lora_A"], init[f"{stem}.lora_B"] = r[:RANK], q[:, :RANK]
        trained[f"{stem}.lora_A"], trained[f"{stem}.lora_B"] = moved(r[:RANK], 0.1, index), moved(q[:, :RANK], 0.1, 99)
        if stem == KEY:
            product = trained[f"{stem}.lora_B"] @ trained[f"{stem}.lora_A"]
            expected = expected + 2 * (product - q[:, :RANK] @ r[:RANK])
    before = put(tmp_path / "before", peft(init), lora_alpha=16)
    after = put(tmp_path / "after", peft(trained), lora_alpha=16, init_lora_weights="olora")
    found = weight(tmp_path, after, init=before)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    with pytest.raises(CheckpointError, match="PiSSA"):
        weight(tmp_path, saved(peft(trained), tmp_path / "bare.pth"), alpha=16.0)


OTHER = {name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9)) for name, tensor in INIT.items()}
BAD: dict[str, tuple[Tensors, Tensors | None, float | None, type[GosletError], str]] = {
    "another model's": (TRAINED, OTHER, None, CheckpointError, "not what was taken out of this model"),
    "another scale's": (
        TRAINED,
        {name: 2 * tensor for name, tensor in INIT.items()},
        None,
        CheckpointError,
        "not what was taken out",
    ),
    "a slightly larger scale's": (
        TRAINED,
        {name: math.sqrt(1.25) * tensor for name, tensor in INIT.items()},  # share 0.8
        None,
        CheckpointError,
        "not what was taken out",
    ),
    "a slightly smaller scale's": (
        TRAINED,
        {name: math.sqrt(0.8) * tensor for name, tensor in INIT.items()},  # share 1.25
        None,
        CheckpointError,
        "not what was taken out",
    ),
    "another model's in one layer": (
        TRAINED,
        {name: (OTHER if "blocks.1" in name else INIT)[name] for name in INIT},
        None,
        CheckpointError,
        r"init\.pth: blocks\.1.*not what was taken out",
    ),
    "one that overflows": (
        TRAINED,
        {name: 1e25 * tensor for name, tensor in INIT.items()},
        None,
        CheckpointError,
        "not what was taken out",
    ),
    "the trained one": (TRAINED, TRAINED, None, InputError, "trained adapter itself"),
    "half of it": (
        TRAINED,
        {n: t for n, t in INIT.items() if n.endswith("A")},
        None,
        MissingTensorError,
        "init_lora_B",
    ),
    "too few": (TRAINED, {n: t for n, t in INIT.items() if KEY in n}, None, MissingTensorError, "nothing of a matrix"),
    "an alpha beside it": (TRAINED, INIT, 8.0, InputError, "PiSSA.*leave it out"),
    "as the adapter": (INIT, None, None, CheckpointError, "--adapter-init"),
    "ranks that differ": (
        TRAINED,
        {name: tensor[:4] if name.endswith("A") else tensor for name, tensor in INIT.items()},
        None,
        TensorShapeError,
        r"init\.pth.*does not fit",
    ),
    "of bone": ({f"{KEY}.bone": torch.ones(8, 192)}, INIT, None, InputError, "PiSSA, which this adapter is not"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_beginning_that_does_not_fit(name: str, tmp_path: Path) -> None:
    trained, init, alpha, error, words = BAD[name]
    adapter = saved(trained, tmp_path / "rwkv-5.pth")
    with pytest.raises(error, match=words) as caught:
        weight(tmp_path, adapter, alpha, None if init is None else saved(init, tmp_path / "init.pth"))
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_a_beginning_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_init.*without an adapter"):
        read_adapter(None, None, tmp_path / "init_pissa.pth")


def test_the_commands_take_and_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BASE, tmp_path / "base.pth")
    adapter = ("--adapter", str(saved(TRAINED, tmp_path / "rwkv-5.pth")))
    init = ("--adapter-init", str(saved(INIT, tmp_path / "init_pissa.pth")))
    checkpoint, engine = str(tmp_path / "base.pth"), str(tmp_path / "x.goslet")
    assert main(["export", checkpoint, "-o", engine, *adapter, "--alpha", "8"]) == 1
    assert "--adapter-init" in capsys.readouterr().err and not Path(engine).exists()
    assert main(["export", checkpoint, "-o", engine, *adapter, *init]) == 0
    assert main(["verify", engine, checkpoint, *adapter, *init]) == 0
    assert main(["inspect", engine]) == 0
    assert "init_pissa.pth" in capsys.readouterr().out
