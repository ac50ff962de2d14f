"""Chat templates: the texts they write, and the files that are none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goslet.chat import BUILT_IN, FREE_TEXT, ChatMode, ChatTemplate, chat_template
from goslet.errors import HeaderError, InputError
from goslet.sampling import SamplingOptions

from .chat_templates import BAD

WORLD, G1, G1_2025 = BUILT_IN["world"], BUILT_IN["g1"], BUILT_IN["g1-2025"]


def test_the_texts_that_the_models_authors_give() -> None:
    """As RWKV7-G1x-templates.txt and the model cards of 2025 write them out."""
    assert WORLD.prompt("hi") == "User: hi\n\nAssistant:"
    assert WORLD.instructions("Be brief.") == "System: Be brief.\n\n"
    assert WORLD.stop == "\n\nUser:"
    assert {mode: G1.prompt("hi", mode) for mode in G1.modes} == {
        "plain": "User: hi\n\nAssistant:",
        "think": "User: hi (think)\n\nAssistant: <think",
        "think-a-bit": "User: hi (think a bit)\n\nAssistant: <think",
        "think-a-lot": "User: hi (think a lot)\n\nAssistant: <think",
        "think-freely": "User: hi\n\nAssistant: <think",
        "fake-think": "User: hi\n\nAssistant: <think>\n</think",
        "fake-think-short": "User: hi\n\nAssistant: <think></think",
        "call": "User: hi\n\nAssistant: ```json",
    }
    assert {mode: G1_2025.prompt("hi", mode) for mode in G1_2025.modes} == {
        "plain": "User: hi\n\nAssistant:",
        "think": "User: hi\n\nAssistant: <think",
        "think-a-bit": "User: hi think a bit\n\nAssistant: <think",
        "think-a-lot": "User: hi think a lot\n\nAssistant: <think",
        "fake-think": "User: hi\n\nAssistant: <think>\n</think",
    }
    for template in BUILT_IN.values():
        for mode in template.modes:
            assert template.prompt("hi", mode).endswith("Assistant:" + template.opening(mode))


def test_tools_as_the_authors_write_them() -> None:
    """The two examples of RWKV7-G1x-templates.txt: signatures; and a list, a call, its output, and the next call."""
    signatures = [
        'get_weather(location: string, unit?: "celsius" | "fahrenheit")',
        "get_stock_price(ticker: string)",
        "translate_text(text: string, target_language: string)",
    ]
    asked = 'Translate "Will it rain tomorrow?" into Japanese.'
    assert G1.render([{"role": "user", "content": asked}], signatures) == (
        'System: Tools:\n- get_weather(location: string, unit?: "celsius" | "fahrenheit")\n'
        "- get_stock_price(ticker: string)\n- translate_text(text: string, target_language: string)\n"
        f"Return only a JSON function call.\n\nUser: {asked}\n\nAssistant: ```json"
    )
    slots = {
        "date": {"type": "string"},
        "duration_minutes": {"type": "integer"},
        "time_window": {"type": "string"},
    }
    event = {"title": {"type": "string"}, "attendees": {"type": "array", "items": {"type": "string"}}}
    tools = [
        {"name": "find_free_slots", "description": "Find free calendar slots", "arguments": slots},
        {  # as OpenAI writes it
            "type": "function",
            "function": {
                "name": "create_calendar_event",
                "description": "Create a calendar event",
                "parameters": {"type": "object", "properties": event, "required": ["title"]},
            },
        },
    ]
    arguments = {"date": "2026-05-08", "duration_minutes": 30, "time_window": "afternoon"}
    call = {"id": "c1", "type": "function", "function": {"name": "find_free_slots", "arguments": json.dumps(arguments)}}
    output = '{"free_slots":[{"start":"2026-05-08T15:00:00+09:00"}]}'
    messages = [
        {"role": "user", "content": "Schedule a 30-minute sync with Bob."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": output},
    ]
    assert G1.render(messages, tools) == (
        'System: Tools:\n[\n{"name":"find_free_slots","description":"Find free calendar slots","arguments":'
        '{"date":{"type":"string"},"duration_minutes":{"type":"integer"},"time_window":{"type":"string"}}},\n'
        '{"name":"create_calendar_event","description":"Create a calendar event","arguments":'
        '{"title":{"type":"string"},"attendees":{"type":"array","items":{"type":"string"}}},"required":["title"]}\n]\n'
        "Return only a JSON function call.\n\nUser: Schedule a 30-minute sync with Bob.\n\nAssistant: ```json\n"
        '{"name":"find_free_slots","arguments":{"date":"2026-05-08","duration_minutes":30,"time_window":"afternoon"}}\n'
        f"```\n\nUser: Function output:\n{output}\n\nAssistant: ```json"
    )
    assert G1.render(messages, tools, mode="think").endswith(f"{output} (think)\n\nAssistant: <think")
    with_system = G1.render([{"role": "system", "content": "Be brief."}, *messages], signatures)
    assert with_system.startswith("System: Be brief.\nTools:\n- get_weather(")
    with pytest.raises(InputError, match="g1"):
        WORLD.render(messages[:1], tools)


def test_a_conversation_is_rendered_as_it_is_had() -> None:
    """Turn by turn, as the command chat writes it, and whole, as a server has it: the same text."""
    had = G1.instructions("Be brief.") + G1.prompt("a\n\nb") + " Hello." + G1.end + G1.prompt("again", "think-a-bit")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a\n\nb"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "again"},
    ]
    assert G1.render(messages, mode="think-a-bit") == had


@given(st.text(alphabet="User: \n", max_size=40), st.sampled_from(["\n\n", "\n", "<end>", "", " "]))
def test_what_was_said_cannot_begin_a_turn(text: str, end: str) -> None:
    template = ChatTemplate("System: {}", "User: {}", "Assistant:", end, {"plain": ChatMode()})
    for role in ("user", "assistant"):
        rendered = template.render([{"role": role, "content": text}, {"role": "user", "content": "hi"}])
        turns = rendered.split(template.stop) if end else []
        assert len(turns) <= 2  # the second turn alone begins with the stop text


MARKED = ChatTemplate("System: {}", "User: {}", "Assistant:", "<end>", {"plain": ChatMode()})


@pytest.mark.parametrize(
    ("role", "text", "left"),
    [
        ("user", "a<end>b", "User: ab<end>"),
        ("user", "a<e<end>nd>b", "User: ab<end>"),
        ("user", "a<en<e<end>nd>d>b", "User: ab<end>"),
        ("assistant", "a<end>User: b", "Assistant: aUser: b<end>"),
        ("assistant", "a<end><end>User:User: b", "Assistant: aUser:User: b<end>"),
        ("assistant", "a<en<end>User:d>User: b", "Assistant: a<enUser:d>User: b<end>"),
    ],
)
def test_what_is_left_of_a_mark_is_no_mark(role: str, text: str, left: str) -> None:
    rendered = MARKED.render([{"role": role, "content": text}, {"role": "user", "content": "hi"}])
    assert rendered == f"{left}User: hi<end>Assistant:"


USER = {"role": "user", "content": "hi"}
BAD_MESSAGES: dict[str, tuple[Any, Any, str]] = {
    "none": ([], (), "messages"),
    "a text": ("hi", (), "messages"),
    "no object": (["hi"], (), r"messages\[0\]"),
    "no role": ([{"content": "hi"}], (), r"messages\[0\].role"),
    "another role": ([{"role": "bot", "content": "hi"}], (), "system, user, assistant or tool"),
    "no content": ([{"role": "user"}], (), r"messages\[0\].content"),
    "an image": ([{"role": "user", "content": [{"type": "image_url"}]}], (), "text"),
    "nothing to answer": ([USER, {"role": "assistant", "content": "a"}], (), r"messages\[1\].role"),
    "a user that calls": ([{**USER, "tool_calls": [{}]}], (), "tool_calls"),
    "a call without a name": ([{"role": "assistant", "tool_calls": [{}]}, USER], (), r"tool_calls\[0\]"),
    "arguments that are not JSON": (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, USER],
        (),
        "arguments",
    ),
    "tools in one text": ([USER], "f()", "tools"),
    "a tool without a name": ([USER], [{"description": "x"}], r"tools\[0\]"),
    "a tool that is not JSON": ([USER], [{"name": "f", "parameters": {1, 2}}], r"tools\[0\]"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_cannot_be_used_are_named(name: str) -> None:
    messages, tools, named = BAD_MESSAGES[name]
    with pytest.raises(InputError, match=named):
        G1.render(messages, tools)


@given(st.text(alphabet="a{} \n\r\t", max_size=30))
def test_what_a_user_says_cannot_end_the_turn(text: str) -> None:
    """An empty line divides turns, so none is left within one; nothing else but the ends of the text is lost."""
    said = WORLD.prompt(text).removeprefix("User: ").removesuffix("\n\nAssistant:")
    assert "\n\n" not in said and "\r" not in said
    assert [line for line in said.split("\n") if line.strip()] == [
        line for line in text.strip().replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()
    ]


def test_decoding_parameters_are_the_modes_or_the_templates() -> None:
    assert G1.decoding("think") == SamplingOptions(top_p=0.5, top_k=100)
    assert G1.decoding().presence_penalty == 0.5
    bare = ChatTemplate("{}", "{}", "", "", {"plain": ChatMode()})
    assert bare.decoding() == FREE_TEXT != SamplingOptions()
    for template in BUILT_IN.values():
        assert ChatTemplate.from_json(json.loads(json.dumps(template.to_json()))) == template
        assert template.is_extended


def test_templates_of_older_engines_are_read() -> None:
    """What the G1 engines of goslet 0.1 hold, word for word."""
    old = {
        "system": "System: {}",
        "user": "User: {}",
        "assistant": "Assistant:",
        "end": "\n\n",
        "modes": {"plain": {"ask": "", "open": ""}, "think-a-bit": {"ask": " think a bit", "open": " <think"}},
    }
    read = ChatTemplate.from_json(old)
    assert read.to_json() == old and not read.is_extended
    assert read.prompt("hi", "think-a-bit") == "User: hi think a bit\n\nAssistant: <think"


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


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_template(name: str, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="chat"):
        ChatTemplate.from_json(BAD[name])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(BAD[name]))
    with pytest.raises(InputError, match=r"bad\.json") as caught:
        chat_template(path)
    assert "\n" not in str(caught.value)


def places(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every text of a JSON value, spoilt in a copy of its own."""
    if isinstance(value, str):
        yield place, f"a{value}\ud800"
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ((at, {**value, key: spoilt}) for at, spoilt in places(inner, f"{place}.{key}"))
            rest = {other: kept for other, kept in value.items() if other != key}
            yield f"{place}.{key}\\udfff", {**rest, f"{key}\udfff": inner}


def test_half_a_surrogate_pair_is_refused_where_it_is(tmp_path: Path) -> None:
    """JSON may spell one, and nothing could write the engine or feed the model with it."""
    path = tmp_path / "half.json"
    spoilt = list(places(BUILT_IN["g1"].to_json(), "template"))
    assert {"template.assistant", "template.modes.think.ask", "template.tools.call"} <= {place for place, _ in spoilt}
    for place, value in spoilt:
        path.write_text(json.dumps(value))
        with pytest.raises(InputError, match="half a surrogate pair") as caught:
            chat_template(path)
        assert (caught.value.file, caught.value.place) == (str(path), place)
        str(caught.value).encode("ascii")
    whole = dataclasses.replace(BUILT_IN["g1"], system="\U0001f600 {}")
    path.write_text(json.dumps(whole.to_json()))
    assert "\\ud83d\\ude00" in path.read_text() and chat_template(path) == whole


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        chat_template(tmp_path / "bad.json")
    with pytest.raises(InputError, match="world, g1"):
        chat_template(tmp_path / "absent.json")
