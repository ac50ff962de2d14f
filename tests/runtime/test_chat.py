"""Chat templates: the texts they write, and the files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goslet.chat import BUILT_IN, ChatMode, ChatTemplate, chat_template
from goslet.errors import HeaderError, InputError

WORLD, G1 = BUILT_IN["world"], BUILT_IN["g1"]


def test_the_texts_that_the_models_authors_give() -> None:
    assert WORLD.prompt("hi") == "User: hi\n\nAssistant:"
    assert WORLD.instructions("Be brief.") == "System: Be brief.\n\n"
    assert WORLD.stop == "\n\nUser:"
    asked = {mode: G1.prompt("hi", mode) for mode in G1.modes}
    assert asked == {
        "plain": "User: hi\n\nAssistant:",
        "think": "User: hi\n\nAssistant: <think",
        "think-a-bit": "User: hi think a bit\n\nAssistant: <think",
        "think-a-lot": "User: hi think a lot\n\nAssistant: <think",
        "fake-think": "User: hi\n\nAssistant: <think>\n</think",
    }
    for mode in G1.modes:
        assert asked[mode].endswith("Assistant:" + G1.opening(mode))


@given(st.text(alphabet="a{} \n\r\t", max_size=30))
def test_what_a_user_says_cannot_end_the_turn(text: str) -> None:
    """An empty line divides turns, so none is left within one; nothing else but the ends of the text is lost."""
    said = WORLD.prompt(text).removeprefix("User: ").removesuffix("\n\nAssistant:")
    assert "\n\n" not in said and "\r" not in said
    assert [line for line in said.split("\n") if line.strip()] == [
        line for line in text.strip().replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()
    ]


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "bob.json"
    mine = ChatTemplate("# {}", "Bob: {} ", "Alice:", "\n\n", {"slow": ChatMode(" (slowly)", " Well")})
    path.write_text(json.dumps(mine.to_json()))
    read = chat_template(path)
    assert read == mine
    assert read.prompt("hi") == "Bob: hi (slowly) \n\nAlice: Well"
    assert read.stop == "\n\nBob:"
    with pytest.raises(InputError, match="slow"):
        read.prompt("hi", "plain")


GOOD = WORLD.to_json()
BAD: dict[str, Any] = {
    "a list": [],
    "a text": "world",
    "a key missing": {key: value for key, value in GOOD.items() if key != "end"},
    "a key more": {**GOOD, "stop": "x"},
    "a number": {**GOOD, "assistant": 1},
    "no place": {**GOOD, "user": "User:"},
    "two places": {**GOOD, "system": "{} {}"},
    "far too long": {**GOOD, "end": "x" * 1001},
    "no modes": {**GOOD, "modes": {}},
    "modes a list": {**GOOD, "modes": ["plain"]},
    "too many modes": {**GOOD, "modes": {f"m{i}": {"ask": "", "open": ""} for i in range(21)}},
    "a mode without a name": {**GOOD, "modes": {"": {"ask": "", "open": ""}}},
    "a mode named to drive a terminal": {**GOOD, "modes": {"\x1b[2J": {"ask": "", "open": ""}}},
    "half a mode": {**GOOD, "modes": {"plain": {"ask": ""}}},
    "a mode of numbers": {**GOOD, "modes": {"plain": {"ask": 1, "open": ""}}},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_template(name: str, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="chat"):
        ChatTemplate.from_json(BAD[name])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(BAD[name]))
    with pytest.raises(InputError, match=r"bad\.json") as caught:
        chat_template(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        chat_template(tmp_path / "bad.json")
    with pytest.raises(InputError, match="world, g1"):
        chat_template(tmp_path / "absent.json")
