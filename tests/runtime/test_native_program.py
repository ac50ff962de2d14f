"""Programs that are well-formed JSON and wrong: each is refused by name before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goslet
from goslet import _native
from goslet.enginefile import EngineFile
from goslet.errors import BackendError

from .rewriting import rewritten

pytest.importorskip("torch", reason="exporting the test's engines needs torch")

Program = dict[str, Any]


def step(program: Program, op: str, index: int = 0) -> dict[str, Any]:
    return [one for one in program["steps"] if one["op"] == op][index]


def change(path: str, value: object, op: str = "linear") -> Callable[[Program], None]:
    """Set a member of the first step of an op, `path` being keys and indices between dots."""

    def apply(program: Program) -> None:
        place: Any = step(program, op)
        *way, last = path.split(".")
        for key in way:
            place = place[int(key) if key.isdecimal() else key]
        assert last in place
        place[last] = value

    return apply


def top(key: str, value: object) -> Callable[[Program], None]:
    return lambda program: program.__setitem__(key, value)


FAULTS: dict[str, tuple[Callable[[Program], object], str]] = {
    "another version": (top("version", 1), "another version"),
    "no steps": (top("steps", []), "no steps"),
    "steps that are no list": (top("steps", {}), "steps"),
    "no logits": (lambda p: p["steps"].pop(), "logits"),
    "logits before the end": (lambda p: p["steps"].insert(0, p["steps"][-1]), "logits"),
    "an unknown op": (lambda p: step(p, "wkv7").update(op="wkv9"), "does not know"),
    "a missing member": (lambda p: step(p, "wkv7").pop("k_k"), "k_k"),
    "an input of another size": (top("input", ["hidden"]), "wrong shape"),
    "no input": (top("input", []), "no registers"),
    "an input that comes twice": (top("input", ["x", "x"]), "comes twice"),
    "an input that is no register": (top("input", ["nowhere"]), "not a register"),
    "a product of a piece of the token": (
        lambda p: (
            p["registers"].update(x=32, piece=32),
            p.update(input=["x", "piece"]),
            p["steps"].insert(0, step(p, "linear")),
            change("products.0.x", "piece")(p),
        ),
        "piece of the token",
    ),
    "a register of no size": (lambda p: p["registers"].update(x=0), "out of range"),
    "a register too large": (lambda p: p["registers"].update(x=1 << 40), "out of range"),
    "registers too large together": (
        lambda p: p["registers"].update({f"more{i}": 1 << 20 for i in range(8)}),
        "too much memory",
    ),
    "too many registers": (lambda p: p["registers"].update({f"more{i}": 1 for i in range(2100)}), "too many"),
    "an unknown register": (change("products.0.x", "nowhere"), "not a register"),
    "an unknown tensor": (change("products.0.weight", "nothing"), "missing"),
    "a matrix of another shape": (change("products.0.weight", "head.weight"), "wrong shape"),
    "a vector as a matrix": (change("products.0.weight", "ln_out.weight"), "wrong shape"),
    "a matrix as a vector": (change("products.0.bias", "head.weight"), "wrong shape"),
    "an unknown activation": (change("products.0.activation", "gelu"), "not an activation"),
    "a product into its input": (change("products.0.out", "mixed_r"), "touch each other"),
    "two products into one register": (change("products.1.out", "r"), "touch each other"),
    "two products that are added": (
        lambda p: [one.update(combine="add") for one in step(p, "linear")["products"][:2]],
        "only one product",
    ),
    "an unknown way to combine": (change("products.0.combine", "subtract"), "no way to combine"),
    "too few operands": (change("products.0.combine", "gate"), "number of operands"),
    "too many operands": (change("products.0.operands", ["r"]), "number of operands"),
    "an operand of another size": (
        lambda p: step(p, "linear")["products"][0].update(combine="gate", operands=["hidden"]),
        "wrong size",
    ),
    "an operand that is no register": (
        lambda p: step(p, "linear")["products"][0].update(combine="gate", operands=["nowhere"]),
        "not a register",
    ),
    "an operand that is stretched over": (
        lambda p: step(p, "linear")["products"][0].update(combine="lerp", operands=["v", "r"]),
        "overwrite",
    ),
    "an operand that another product makes": (
        lambda p: step(p, "linear")["products"][0].update(combine="gate", operands=["k"]),
        "touch each other",
    ),
    "a norm kept in its input": (change("normed", "x", "norm_shift"), "overwrite"),
    "a shift kept where a mix goes": (change("previous", "mixed_r", "norm_shift"), "overwrite"),
    "no products": (change("products", []), "no products"),
    "a mix into its input": (change("mixes.0.out", "x", "norm_shift"), "overwrite"),
    "an eps of zero": (change("eps", 0, "norm_shift"), "positive"),
    "a shift of another shape": (change("shift", "0.wkv", "norm_shift"), "wrong shape"),
    "an unknown state": (change("shift", "9.att_shift", "norm_shift"), "missing"),
    "a state moved on twice": (change("shift", "0.ffn_shift", "norm_shift"), "twice"),
    "a state not moved on": (
        lambda p: p["steps"].remove(step(p, "norm_shift")),
        "no step moves",
    ),
    "heads that do not divide": (change("head_size", 7, "wkv7"), "size of heads"),
    "heads of no size": (change("head_size", 0, "wkv7"), "size of heads"),
    "a time mix into its input": (change("out", "r", "wkv7"), "overwrite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_program_is_refused(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    fault, said = FAULTS[name]
    with EngineFile.open(tiny_engine) as file:
        program = json.loads(bytes(file.program_bytes or b""))
    fault(program)
    path = rewritten(tiny_engine, tmp_path / "x.goslet", program=json.dumps(program).encode())
    with pytest.raises(BackendError, match=said) as caught:
        goslet.open(path, backend="native")
    assert caught.value.file is not None and caught.value.place


def test_the_program_unchanged_is_taken(tiny_engine: Path, tmp_path: Path) -> None:
    """So that the refusals above are for their faults."""
    with EngineFile.open(tiny_engine) as file:
        program = json.loads(bytes(file.program_bytes or b""))
    path = rewritten(tiny_engine, tmp_path / "x.goslet", program=json.dumps(program).encode())
    goslet.open(path, backend="native").close()


def test_arrays_of_another_type_are_refused_not_converted(tiny_engine: Path) -> None:
    """A converted copy would take the logits, and the caller's array would stay as it was."""
    with goslet.open(tiny_engine, backend="native", threads=1) as engine:
        native: _native.NativeEngine = engine.backend._engine  # type: ignore[attr-defined]
        state = engine.session().state
        tokens, logits = np.array([1]), np.zeros((1, engine.spec.vocab_size), np.float32)
        for wrong_tokens, wrong_logits in ((tokens.astype(np.int32), logits), (tokens, logits.astype(np.float64))):
            with pytest.raises(ValueError, match=r"int64|float32"):
                native.feed([(state.front_buffer, wrong_tokens, wrong_logits)])
        assert state.tokens_seen == 0
