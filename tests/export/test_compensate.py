"""Residuals: found by every method, stored, and run by both backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")

from onnx import ModelProto  # noqa: E402
from random_checkpoint import save  # noqa: E402

import goslet  # noqa: E402
from goslet.enginefile import EngineFile  # noqa: E402
from goslet.errors import BackendError, HeaderError, InputError, NonFiniteError  # noqa: E402
from goslet.export import export_engine  # noqa: E402
from goslet.export.checkpoint import open_checkpoint  # noqa: E402
from goslet.export.compensate import Compensation, _Task, compensate  # noqa: E402
from goslet.export.onnxfile import write_onnx  # noqa: E402
from goslet.export.residuals import add_to_graph, add_to_program  # noqa: E402
from goslet.export.verify import verify_engine  # noqa: E402
from goslet.residuals import Residual, effective_weight, residual_of, with_residuals  # noqa: E402
from goslet.weights import decode, encode_places  # noqa: E402

from ..runtime.rewriting import rewritten  # noqa: E402
from .oracle import MODELS  # noqa: E402
from .test_layerwise import LIMIT, logits_of  # noqa: E402

RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whichever run before it."""
    RNG.bit_generator.state = np.random.default_rng(12).bit_generator.state


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def random_residual(n_out: int, n_in: int, kind: int) -> Residual:
    """Low-rank, sparse, or both; an odd rank and number, and inputs that come twice."""
    low = (normal(5, n_in) * 0.05, normal(n_out, 5) * 0.05) if kind != 1 else (None, None)
    sparse = (normal(n_out, 3) * 0.1, RNG.integers(0, n_in, (n_out, 3))) if kind != 0 else (None, None)
    return Residual(*low, *sparse).stored()


def with_random_residuals(source: Path, target: Path) -> Path:
    with EngineFile.open(source) as file:
        matrices = [name for name, entry in file.tensors.items() if entry.layout != "rows" and name != "head.weight"]
        residuals = {name: random_residual(*file.tensors[name].shape, index % 3) for index, name in enumerate(matrices)}
        graph = ModelProto.FromString(bytes(file.graph_bytes))
        add_to_graph(graph, residuals)
        return rewritten(
            source,
            target,
            graph=graph.SerializeToString(),
            tensors=with_residuals(file, residuals),
            program=add_to_program(bytes(file.program_bytes or b""), residuals),
        )


class TestRunning:
    @pytest.mark.parametrize("name", [name for name in MODELS if "odd sizes" in name or "narrow" in name])
    def test_both_backends_add_them(self, name: str, tmp_path: Path) -> None:
        save(MODELS[name](seed=6), tmp_path / "x.pth")
        export_engine(tmp_path / "x.pth", tmp_path / "plain.goslet", quant="f32", tokenizer=None)
        path = with_random_residuals(tmp_path / "plain.goslet", tmp_path / "x.goslet")
        tokens = RNG.integers(0, 50, 21)
        with EngineFile.open(tmp_path / "plain.goslet") as plain, EngineFile.open(path) as file:
            expected, without = logits_of(file, tokens[None])[0], logits_of(plain, tokens[None])[0]
        size = np.abs(expected).max()
        assert np.abs(expected - without).max() > 100 * LIMIT * size
        for backend in ("native", "ort"):
            with goslet.open(path, backend=backend, threads=2) as engine:
                session = engine.session()
                found = session.feed(tokens, all_logits=True)
                steps = engine.session()
                one_by_one = np.concatenate([steps.feed([token], all_logits=True) for token in tokens])
            assert np.abs(found - expected).max() <= LIMIT * size, backend
            assert np.abs(one_by_one - expected).max() <= LIMIT * size, backend

    def test_the_models_numbers_are_counted_without_them(self, tiny_engine: Path, tmp_path: Path) -> None:
        path = with_random_residuals(tiny_engine, tmp_path / "x.goslet")
        with EngineFile.open(tiny_engine) as plain, EngineFile.open(path) as file:
            assert file.n_weights == plain.n_weights
            more = sum(entry.size_bytes for name, entry in file.tensors.items() if name not in plain.tensors)
            assert file.bits_per_weight == pytest.approx(plain.bits_per_weight + 8 * more / plain.n_weights)


NAME = "blocks.0.att.key.weight"


def first_residual(program: dict) -> dict:
    return next(
        product["residual"]
        for step in program["steps"]
        if step["op"] == "linear"
        for product in step["products"]
        if product["residual"] is not None and product["residual"]["low"] and product["residual"]["kept"]
    )


FAULTS = {
    "no such tensor": ({"up": "nothing"}, "missing"),
    "up of another shape": ({"up": "head.weight"}, "wrong shape"),
    "no such register": ({"low": "nowhere"}, "not a register"),
    "a register of another size": ({"low": "r"}, "wrong shape"),
    "kept of another shape": ({"kept": "head.weight"}, "wrong shape"),
    "places that are none": ({"kept_inputs": None}, "kept_inputs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_program_is_refused(fault: str, tiny_engine: Path, tmp_path: Path) -> None:
    changes, said = FAULTS[fault]
    path = with_random_residuals(tiny_engine, tmp_path / "whole.goslet")
    with EngineFile.open(path) as file:
        program = json.loads(bytes(file.program_bytes or b""))
        first_residual(program).update(changes)
        wrong = rewritten(path, tmp_path / "x.goslet", program=json.dumps(program).encode())
    with pytest.raises(BackendError, match=said):
        goslet.open(wrong, backend="native")


@pytest.mark.parametrize("place", [64, 65535])
def test_a_place_outside_the_inputs_is_refused_not_read(place: int, tiny_engine: Path, tmp_path: Path) -> None:
    with EngineFile.open(tiny_engine) as file:
        n_out, n_in = file.tensors[NAME].shape
        places = RNG.integers(0, n_in, (n_out, 2))
        places[-1, -1] = place
        residuals = {NAME: Residual(None, None, normal(n_out, 2), places)}
        graph = ModelProto.FromString(bytes(file.graph_bytes))
        add_to_graph(graph, residuals)
        path = rewritten(
            tiny_engine,
            tmp_path / "x.goslet",
            graph=graph.SerializeToString(),
            tensors=with_residuals(file, residuals),
            program=add_to_program(bytes(file.program_bytes or b""), residuals),
        )
    with pytest.raises(BackendError, match="is not an input"):
        goslet.open(path, backend="native")
    # ONNX Runtime looks when it runs; whatever it says, it is an error of its own and not a crash.
    with pytest.raises(BackendError), goslet.open(path, backend="ort") as engine:
        engine.session().feed([1])


def test_places_are_stored_as_such_and_nothing_else_is(tiny_engine: Path, tmp_path: Path) -> None:
    with EngineFile.open(tiny_engine) as file:
        tensors = with_residuals(file, {})
        places = encode_places(np.zeros(file.tensors["emb.weight"].shape, int))
        wrong = [
            source._replace(format=places.format, produce=lambda: places) if source.name == "emb.weight" else source
            for source in tensors
        ]
        path = rewritten(tiny_engine, tmp_path / "x.goslet", tensors=wrong)
    with pytest.raises(HeaderError, match="stored as places"):
        EngineFile.open(path)


def test_half_of_a_residual_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    path = with_random_residuals(tiny_engine, tmp_path / "whole.goslet")
    with EngineFile.open(path) as file:
        name = next(name for name in file.tensors if name.endswith(".down"))
    wrong = rewritten(path, tmp_path / "x.goslet", without=name)
    with EngineFile.open(wrong) as file, pytest.raises(HeaderError, match="missing"):
        residual_of(file, name.removesuffix(".down"))


# ------------------------------------------------------------------------------------------------------------ methods


def task(error: np.ndarray, drift: float = 0.0, n_tokens: int = 1200) -> _Task:
    """A matrix with inputs of sizes from 0.1 to 10; its own model's differ from them by `drift` in two directions."""
    n_out, n_in = error.shape
    scales = np.logspace(-1, 1, n_in).astype(np.float32)
    inputs = normal(n_tokens, n_in) * scales
    own = inputs + drift * (inputs @ normal(n_in, 2)) @ normal(2, n_in)
    weight = normal(n_out, n_in)
    missing = own @ weight.T - inputs @ (weight - error).T
    held_out = torch.zeros(n_tokens, dtype=torch.bool)
    held_out[-200:] = True
    return _Task(*(torch.from_numpy(array) for array in (error, own, inputs, missing)), held_out)


def left_over(made: _Task, residual: Residual) -> float:
    """The part of what is missing on held-out inputs that a residual leaves, in the square."""
    dense = torch.from_numpy(residual.added_to(np.zeros(made.error.shape, np.float32)))
    left = made.held_missing - made.held_inputs @ dense.T
    return float(left.square().sum() / made.held_missing.square().sum())


def solved(error: np.ndarray, wanted: Compensation, drift: float = 0.0) -> float:
    made = task(error, drift)
    before = _Task.__new__(_Task)
    before.__dict__.update(made.__dict__)
    return left_over(before, made.solve(wanted))


class TestLowRank:
    def test_svd_is_the_best_approximation_of_the_error(self) -> None:
        error = normal(24, 40)
        residual = task(error).solve(Compensation(rank=3, low_rank="svd"))
        left = error - residual.added_to(np.zeros_like(error))
        # Eckart and Young: what is left are the other singular values.
        assert np.sum(left**2) == pytest.approx(np.sum(np.linalg.svd(error)[1][3:] ** 2), rel=1e-4)

    def test_each_closed_form_does_better_where_it_knows_more(self) -> None:
        error = normal(24, 40)
        svd, weighted = (solved(error, Compensation(rank=3, low_rank=method)) for method in ("svd", "weighted"))
        assert weighted < 0.8 * svd
        blind, aware = (
            solved(0.05 * error, Compensation(rank=3, low_rank=method), drift=0.1) for method in ("weighted", "drift")
        )
        assert aware < 0.8 * blind

    @pytest.mark.parametrize("method", ["weighted", "drift", "sensing"])
    def test_an_error_of_low_rank_is_recovered(self, method: str) -> None:
        """Closed forms up to the damping of H; descent stops a little before."""
        error = normal(24, 2) @ normal(2, 40)
        assert solved(error, Compensation(rank=2, low_rank=method)) < (1e-2 if method == "sensing" else 1e-4)

    def test_the_damping_is_chosen_on_inputs_held_out(self) -> None:
        """Two tokens a direction, and noise that no residual explains: little damping would fit the noise."""
        made = task(0.1 * normal(24, 40), n_tokens=280)
        made.missing = made.missing + 3 * torch.from_numpy(normal(*made.missing.shape))
        choices = [made._by_regression(8, damping) for damping in (0.001, 1.0)]
        chosen = made._low_rank(8, "drift")
        assert made._held_out_error(*chosen) <= min(made._held_out_error(*choice) for choice in choices)
        assert made._held_out_error(*chosen) < made._held_out_error(*choices[0])

    def test_no_error_needs_no_residual(self) -> None:
        for method in ("svd", "weighted", "drift", "sensing"):
            residual = task(np.zeros((24, 40), np.float32)).solve(Compensation(rank=2, low_rank=method))
            assert np.abs(residual.added_to(np.zeros((24, 40), np.float32))).max() < 1e-6, method


class TestSparse:
    @pytest.mark.parametrize("method", ["magnitude", "weighted", "l1", "flow"])
    def test_a_sparse_error_is_recovered(self, method: str) -> None:
        """Two of 40 numbers an output. The lasso finds inputs of a hundredth of the others' size late, and `flow` sees
        only 8 tokens: both may miss numbers that make up some hundredths of what is missing."""
        error = np.zeros((24, 40), np.float32)
        for row in error:
            row[RNG.choice(40, 2, replace=False)] = RNG.choice([-1, 1], 2) * RNG.uniform(0.5, 1.5, 2)
        left = solved(error, Compensation(share=0.05, sparse=method))
        silent = task(error)
        silent.moments.zero_()
        silent.inputs.zero_()
        assert np.isfinite(silent.solve(Compensation(share=0.05, sparse=method)).kept).all()
        assert left < {"l1": 0.01, "flow": 0.1}.get(method, 1e-5)

    def test_what_inputs_are_like_counts(self) -> None:
        error = normal(24, 40)
        blind, weighted, lasso = (
            solved(error, Compensation(share=0.1, sparse=method)) for method in ("magnitude", "weighted", "l1")
        )
        assert weighted < 0.8 * blind
        assert lasso < 0.8 * blind

    def test_both_go_together(self) -> None:
        error = 0.3 * normal(24, 2) @ normal(2, 40)
        error[np.arange(24), RNG.integers(0, 40, 24)] += 5
        left = solved(error, Compensation(rank=2, share=1 / 40, low_rank="drift", sparse="l1"))
        assert left < 0.3 * solved(error, Compensation(rank=2, low_rank="drift"))


# -------------------------------------------------------------------------------------------------------------- export


class TestExport:
    def test_a_compensated_engine_is_right_and_nearer(self, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
        wanted = Compensation(rank=3, share=0.04)
        for name, compensation in (("plain", None), ("x", wanted)):
            export_engine(
                tiny_checkpoint,
                tmp_path / f"{name}.goslet",
                quant="int4",
                calibrate=text,
                calibration_tokens=512,
                moments=tmp_path / "moments",
                compensation=compensation,
            )
        reports = {
            name: verify_engine(tmp_path / f"{name}.goslet", tiny_checkpoint, backend="native", n_tokens=24)
            for name in ("plain", "x")
        }
        assert reports["x"].passed, [check for check in reports["x"].checks if not check.passed]
        with EngineFile.open(tmp_path / "x.goslet") as file:
            write_onnx(file, tmp_path / "x.onnx")
        assert any(check.name.startswith("residuals") for check in reports["x"].checks)
        assert reports["x"].divergence["kl_bits_per_token"] < reports["plain"].divergence["kl_bits_per_token"]
        with EngineFile.open(tmp_path / "x.goslet") as file, EngineFile.open(tmp_path / "plain.goslet") as plain:
            assert file.provenance["compensation"] == wanted.to_json()
            assert (decode(file.weight(NAME)) == decode(plain.weight(NAME))).all()
            assert (effective_weight(file, NAME) != decode(file.weight(NAME))).any()

    def test_a_wrong_residual_does_not_pass_verify(self, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
        export_engine(
            tiny_checkpoint, tmp_path / "x.goslet", quant="int4",
            calibrate=text, calibration_tokens=512, compensation=Compensation(rank=3, low_rank="svd"),
        )  # fmt: skip
        with EngineFile.open(tmp_path / "x.goslet") as file:
            residuals = {name: residual for name in file.tensors if (residual := residual_of(file, name)) is not None}
            right = residuals[NAME]
            assert right.up is not None
            residuals[NAME] = Residual(right.down, np.ascontiguousarray(right.up * 100))
            path = rewritten(tmp_path / "x.goslet", tmp_path / "y.goslet", tensors=with_residuals(file, residuals))
        report = verify_engine(path, tiny_checkpoint, backend="native", n_tokens=24)
        assert [check.name for check in report.checks if not check.passed] == ["residuals int4/32"]

    def test_room_needs_no_text(self, tiny_checkpoint: Path, tiny_engines: dict[str, Path], tmp_path: Path) -> None:
        export_engine(
            tiny_checkpoint, tmp_path / "x.goslet", quant="int8", compensation=Compensation(rank=4, low_rank="zero")
        )
        with EngineFile.open(tmp_path / "x.goslet") as file, EngineFile.open(tiny_engines["int8"]) as plain:
            residual = residual_of(file, NAME)
            assert residual is not None and residual.rank == 4
            assert (effective_weight(file, NAME) == decode(plain.weight(NAME))).all()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({}, "asks for nothing"),
            ({"rank": -1}, "not a rank"),
            ({"rank": True}, "not a rank"),
            ({"rank": 2, "low_rank": "best"}, "no such method"),
            ({"share": 0.5}, "not a share"),
            ({"share": -0.1}, "not a share"),
            ({"share": float("nan")}, "not a share"),
            ({"share": 0.1, "sparse": "best"}, "no such method"),
        ],
    )
    def test_what_cannot_be_asked_for_is_refused(self, arguments: dict, said: str) -> None:
        with pytest.raises(InputError, match=said):
            Compensation(**arguments)

    def test_what_a_model_cannot_have_is_refused_and_nothing_written(
        self, tiny_checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="needs a calibration"):
            export_engine(tiny_checkpoint, tmp_path / "x.goslet", quant="int4", compensation=Compensation(rank=2))
        with pytest.raises(InputError, match="not below a matrix's own sides"):
            export_engine(
                tiny_checkpoint, tmp_path / "x.goslet", quant="int4", calibrate=text, calibration_tokens=512,
                compensation=Compensation(rank=64),
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []

    def test_numbers_that_are_not_finite_are_named(
        self, tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path
    ) -> None:
        tensors = torch.load(tiny_checkpoint)
        tensors[NAME] = torch.full_like(tensors[NAME], 3e38)
        save(tensors, tmp_path / "x.pth")
        with (
            open_checkpoint(tmp_path / "x.pth") as source,
            EngineFile.open(tiny_engine) as file,
            pytest.raises(NonFiniteError, match=r"blocks\.0\.att\.key"),
        ):
            compensate(file, source, np.ones((4, 8), np.int32), Compensation(rank=2))
