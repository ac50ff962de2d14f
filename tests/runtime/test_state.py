"""The state of a session: its buffers, and that a state file is read whole or not at all."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goslet import errors
from goslet import state as state_module
from goslet.container import Section, write_container
from goslet.spec import StateSpec, StateTensor
from goslet.state import MAX_TOKENS_SEEN, STATE_FILE_MAGIC, STATE_FILE_VERSION, State

from .interruptions import interrupted_at

SPEC = StateSpec(
    (
        StateTensor("0.att_shift", (5,), "channel"),
        StateTensor("0.wkv", (2, 3, 3), "head,value,key"),
        StateTensor("0.pp", (5,), "channel", init=-1e38),
    )
)
MODEL = "sha256:" + "a" * 64


def fill(state: State, seed: int) -> State:
    """Put random numbers into a state, in both buffers, and give it a position."""
    rng = np.random.default_rng(seed)
    for tensors in (state.front, state.back) if state.double_buffered else (state.front,):
        for view in tensors.values():
            view[...] = rng.standard_normal(view.shape)
    # As native code does it: the count lies behind the tensors.
    state.front_buffer.tensor(len(state.spec.tensors)).view(np.int64)[0] = seed
    return state


def snapshot(state: State) -> tuple:
    return state.tokens_seen, {name: view.tobytes() for name, view in state.front.items()}


def addresses(tensors) -> dict[str, int]:
    return {name: view.__array_interface__["data"][0] for name, view in tensors.items()}


@pytest.mark.parametrize("double_buffered", [False, True])
class TestBuffers:
    def test_a_new_state_is_fresh(self, double_buffered: bool) -> None:
        state = State(SPEC, MODEL, double_buffered=double_buffered)
        assert state.double_buffered is double_buffered
        assert state.tokens_seen == 0
        assert state.size_bytes == 64 * (1 + 2 + 1 + 1) * (1 + double_buffered)
        assert list(state.front) == ["0.att_shift", "0.wkv", "0.pp"]
        for tensor in SPEC.tensors:
            view = state.front[tensor.name]
            assert (view.shape, view.dtype) == (tensor.shape, np.float32)
            assert (view == np.float32(tensor.init)).all()
            assert addresses(state.front)[tensor.name] % 64 == 0

    def test_reset_forgets_everything(self, double_buffered: bool) -> None:
        state = fill(State(SPEC, MODEL, double_buffered=double_buffered), 7)
        state.reset()
        assert snapshot(state) == snapshot(State(SPEC, MODEL))
        if double_buffered:
            state.advance()
            assert snapshot(state)[1] == snapshot(State(SPEC, MODEL))[1]

    def test_clone_shares_nothing(self, double_buffered: bool) -> None:
        state = fill(State(SPEC, MODEL, double_buffered=double_buffered), 7)
        before = snapshot(state)
        twin = state.clone()
        assert snapshot(twin) == before
        assert twin.double_buffered is double_buffered
        fill(twin, 8)
        assert snapshot(state) == before

    def test_copying_keeps_every_address(self, double_buffered: bool) -> None:
        state = State(SPEC, MODEL, double_buffered=double_buffered)
        before = addresses(state.front)
        other = fill(State(SPEC, MODEL, double_buffered=not double_buffered), 7)
        state.copy_from(other)
        assert snapshot(state) == snapshot(other)
        assert addresses(state.front) == before

    def test_a_file_gives_back_the_state_exactly(self, double_buffered: bool, tmp_path: Path) -> None:
        state = fill(State(SPEC, MODEL, double_buffered=double_buffered), 7)
        if double_buffered:
            state.advance()
        state.save(tmp_path / "s.state")
        other = State(SPEC, MODEL, double_buffered=not double_buffered)
        before = addresses(other.front)
        other.load(tmp_path / "s.state")
        assert snapshot(other) == snapshot(state)
        assert addresses(other.front) == before


def test_advancing_exchanges_two_fixed_buffers_and_counts() -> None:
    state = State(SPEC, MODEL, double_buffered=True)
    front, back = addresses(state.front), addresses(state.back)
    assert set(front.values()).isdisjoint(back.values())
    for count in (1, 2, 3):
        state.back["0.wkv"][...] = count
        state.advance()
        front, back = back, front
        assert (addresses(state.front), addresses(state.back)) == (front, back)
        assert (state.front["0.wkv"] == count).all()
        assert state.tokens_seen == count
        assert np.shares_memory(np.frombuffer(state.front_buffer, np.float32), state.front["0.wkv"])


def test_a_single_buffered_state_has_no_back() -> None:
    state = State(SPEC, MODEL)
    for call in (lambda: state.back, state.advance):
        with pytest.raises(errors.InputError, match="no back buffer"):
            call()


def test_the_count_stops_where_a_file_could_not_hold_it(tmp_path: Path) -> None:
    state = fill(State(SPEC, MODEL, double_buffered=True), MAX_TOKENS_SEEN - 1)
    for _ in range(3):
        state.advance()
        assert state.tokens_seen == MAX_TOKENS_SEEN
    state.save(tmp_path / "old.state")
    other = State(SPEC, MODEL)
    other.load(tmp_path / "old.state")
    assert snapshot(other) == snapshot(state)


@pytest.mark.parametrize(
    ("change", "double_buffered"),
    [("advance", True), *((change, both) for change in ("reset", "copy_from", "load") for both in (False, True))],
)
def test_ctrl_c_falls_before_a_change_or_after_it(change: str, double_buffered: bool, tmp_path: Path) -> None:
    other = fill(State(SPEC, MODEL), 5)
    other.save(tmp_path / "5.state")
    arguments = {"copy_from": (other,), "load": (tmp_path / "5.state",)}.get(change, ())
    changed = fill(State(SPEC, MODEL, double_buffered=double_buffered), 4)
    before = snapshot(changed)
    getattr(changed, change)(*arguments)
    after = snapshot(changed)
    assert before != after
    met = set()
    place = 0
    while True:
        state = fill(State(SPEC, MODEL, double_buffered=double_buffered), 4)
        interrupted = interrupted_at(place, lambda state=state: getattr(state, change)(*arguments), state_module)
        met.add(snapshot_key(state, before, after, place))
        assert addresses(state.front)["0.att_shift"] == state.front_buffer.tensor(0).__array_interface__["data"][0]
        if not interrupted:
            break
        # Nothing stays behind that a later change stumbles over.
        state.load(tmp_path / "5.state")
        assert snapshot(state) == snapshot(other)
        place += 1
    assert place > 5
    assert met == {"before", "after"}


def snapshot_key(state: State, before: tuple, after: tuple, place: int) -> str:
    found = snapshot(state)
    assert found in (before, after), f"half changed by Ctrl-C before instruction {place}"
    return "before" if found == before else "after"


def test_a_state_outlives_its_owner_only_as_its_own_views() -> None:
    view = State(StateSpec((StateTensor("x", (1 << 22,), "channel", init=2.0),)), MODEL).front["x"]
    assert view[-1] == 2.0


def test_a_tensor_of_the_mapping_cannot_be_replaced() -> None:
    with pytest.raises(TypeError):
        State(SPEC, MODEL).front["0.wkv"] = np.zeros((2, 3, 3), np.float32)  # type: ignore[index]


def test_an_absurd_state_is_refused() -> None:
    spec = StateSpec((StateTensor("x", (1 << 20, 1 << 20, 1 << 20, 1 << 20), "a,b,c,d"),))
    with pytest.raises(errors.StateError, match=r"cannot be allocated.*past 4294967296 bytes"):
        State(spec, MODEL)


def altered(index: int, **changes: object) -> StateSpec:
    tensors = list(SPEC.tensors)
    tensors[index] = dataclasses.replace(tensors[index], **changes)
    return StateSpec(tuple(tensors))


MISMATCHES = {
    "model": (SPEC, "sha256:" + "b" * 64, ["sha256:" + "a" * 64, "sha256:" + "b" * 64]),
    "version": (dataclasses.replace(SPEC, layout_version=2), MODEL, ["expected 1", "found 2"]),
    "shape": (altered(1, shape=(3, 2, 3)), MODEL, ["tensor 1", "(2, 3, 3)", "(3, 2, 3)"]),
    "axes": (altered(1, axes="head,key,value"), MODEL, ["head,value,key", "head,key,value"]),
    "name": (altered(0, name="1.att_shift"), MODEL, ["0.att_shift", "1.att_shift"]),
    "init": (altered(2, init=0.0), MODEL, ["-1e+38", "init=0.0"]),
    "fewer": (StateSpec(SPEC.tensors[:2]), MODEL, ["tensor 2", "0.pp", "found none"]),
    "more": (StateSpec((*SPEC.tensors, StateTensor("1.x", (1,), "channel"))), MODEL, ["tensor 3", "1.x"]),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_state_of_another_model_or_layout_is_refused_and_both_are_named(case: str, tmp_path: Path) -> None:
    spec, model_id, words = MISMATCHES[case]
    other = fill(State(spec, model_id), 3)
    other.save(tmp_path / "other.state")
    state = fill(State(SPEC, MODEL), 4)
    before = snapshot(state)
    for call in (lambda: state.load(tmp_path / "other.state"), lambda: state.copy_from(other)):
        with pytest.raises(errors.StateMismatchError) as caught:
            call()
        for word in words:
            assert word in str(caught.value)
        assert snapshot(state) == before


def write_state_file(path: Path, header: dict | None = None, data: bytes | None = None, **changes) -> None:
    """A state file with right checksums whose content may be wrong."""
    if header is None:
        header = {"model_id": MODEL, "tokens_seen": 5, "state": SPEC.to_json()}
    write_container(
        path,
        **{"magic": STATE_FILE_MAGIC, "version": STATE_FILE_VERSION, **changes},
        header={key: value for key, value in header.items() if value is not None},
        sections=[Section.of("state", bytes(SPEC.size_bytes) if data is None else data)],
        overwrite=True,
    )


def header_with(**changes: object) -> dict:
    return {"model_id": MODEL, "tokens_seen": 5, "state": SPEC.to_json(), **changes}


def floats_with(value: float, at: int) -> bytes:
    values = np.zeros(SPEC.size_bytes // 4, "<f4")
    values[at] = value
    return values.tobytes()


BAD_FILES = {
    "nan": ({"data": floats_with(np.nan, 6)}, errors.StateError, "tensor 0.wkv: the state holds NaN or infinity.*1 of"),
    "infinity": ({"data": floats_with(-np.inf, 4)}, errors.StateError, "tensor 0.att_shift: .*NaN or infinity"),
    "short": ({"data": bytes(SPEC.size_bytes - 4)}, errors.HeaderError, "section state: has a wrong length"),
    "long": ({"data": bytes(SPEC.size_bytes + 1)}, errors.HeaderError, "section state: has a wrong length"),
    "magic": ({"magic": b"GOSLETXX"}, errors.WrongMagicError, "state file"),
    "newer": ({"version": STATE_FILE_VERSION + 1}, errors.NewerVersionError, "newer goslet"),
    "feature": ({"required_features": ["sparse"]}, errors.UnknownFeatureError, "sparse"),
    "no model": ({"header": header_with(model_id=None)}, errors.HeaderError, "model_id: is not text"),
    "model of a wrong type": ({"header": header_with(model_id=[1])}, errors.HeaderError, "model_id: is not text"),
    "no spec": ({"header": header_with(state=None)}, errors.HeaderError, "state: is not a JSON object"),
    "no version": ({"header": header_with(state={})}, errors.HeaderError, "layout_version: is not a count"),
    "no tensors": ({"header": header_with(state={"layout_version": 1})}, errors.HeaderError, "state.dtype"),
    "no position": ({"header": header_with(tokens_seen=None)}, errors.HeaderError, "tokens_seen: is not a count"),
    "negative position": ({"header": header_with(tokens_seen=-1)}, errors.HeaderError, "tokens_seen: is not a count"),
    "huge position": ({"header": header_with(tokens_seen=1 << 63)}, errors.HeaderError, "tokens_seen"),
    "fractional position": ({"header": header_with(tokens_seen=1.5)}, errors.HeaderError, "tokens_seen"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_has_its_own_error_and_changes_nothing(case: str, tmp_path: Path) -> None:
    changes, error, message = BAD_FILES[case]
    path = tmp_path / "bad.state"
    write_state_file(path, **changes)
    state = fill(State(SPEC, MODEL), 4)
    before = snapshot(state)
    with pytest.raises(error, match=message) as caught:
        state.load(path)
    assert str(path) in str(caught.value)
    assert snapshot(state) == before


def test_the_good_twin_of_the_bad_files_loads(tmp_path: Path) -> None:
    write_state_file(tmp_path / "good.state", data=floats_with(2.5, 6))
    state = State(SPEC, MODEL)
    state.load(tmp_path / "good.state")
    assert state.tokens_seen == 5
    assert state.front["0.wkv"].reshape(-1).tolist() == [0.0, 2.5, *[0.0] * 16]


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "good.state"
    fill(State(SPEC, MODEL), 3).save(path)
    return path


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_of_one_byte_or_of_the_length_goes_unnoticed(good_file: Path, data: st.DataObject) -> None:
    path = good_file.with_name("damaged.state")
    content = bytearray(good_file.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    state = fill(State(SPEC, MODEL), 4)
    before = snapshot(state)
    with pytest.raises((errors.ContainerError, errors.StateError)):
        state.load(path)
    assert snapshot(state) == before


def test_a_missing_file_changes_nothing(tmp_path: Path) -> None:
    state = fill(State(SPEC, MODEL), 4)
    before = snapshot(state)
    with pytest.raises(errors.ContainerError, match=r"none\.state"):
        state.load(tmp_path / "none.state")
    assert snapshot(state) == before


def test_saving_replaces_an_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    fill(State(SPEC, MODEL), 3).save(path)
    state = fill(State(SPEC, MODEL), 4)
    state.save(path)
    assert os.listdir(tmp_path) == ["talk.state"]
    other = State(SPEC, MODEL)
    other.load(path)
    assert snapshot(other) == snapshot(state)


def test_the_same_state_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(State(SPEC, MODEL), 3).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_state_that_could_not_be_loaded_does_not_replace_one_that_can(tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    state = fill(State(SPEC, MODEL), 3)
    state.save(path)
    good = path.read_bytes()
    state.front["0.wkv"][1, 2, 0] = np.inf
    with pytest.raises(errors.StateError, match=r"tensor 0\.wkv: the state holds NaN or infinity"):
        state.save(path)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["talk.state"]


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(errors.OutputError, match="folder does not exist"):
        State(SPEC, MODEL).save(tmp_path / "no" / "talk.state")


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    fill(State(SPEC, MODEL), 3).save(path)
    content = path.read_bytes()
    assert content[:8] == STATE_FILE_MAGIC
    header = json.loads(content[24 : 24 + int.from_bytes(content[16:24], "little")])
    assert (header["model_id"], header["tokens_seen"]) == (MODEL, 3)
    assert StateSpec.from_json(header["state"]) == SPEC
