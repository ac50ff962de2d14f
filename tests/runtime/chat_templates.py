"""Chat templates of every kind that is refused, and of some that look so and are not."""

from __future__ import annotations

from typing import Any

from goslet.chat import BUILT_IN

WORLD, G1 = BUILT_IN["world"].to_json(), BUILT_IN["g1"].to_json()
PLAIN = {"plain": {"ask": "", "open": ""}}
BARE = {**WORLD, "modes": PLAIN}

BAD: dict[str, Any] = {
    "a list": [],
    "a text": "world",
    "a key missing": {key: value for key, value in WORLD.items() if key != "end"},
    "a key more": {**WORLD, "stop": "x"},
    "a number": {**WORLD, "assistant": 1},
    "no place": {**WORLD, "user": "User:"},
    "two places": {**WORLD, "system": "{} {}"},
    "far too long": {**WORLD, "end": "x" * 1001},
    "no modes": {**WORLD, "modes": {}},
    "modes a list": {**WORLD, "modes": ["plain"]},
    "too many modes": {**WORLD, "modes": {f"m{i}": {"ask": "", "open": ""} for i in range(21)}},
    "a mode without a name": {**WORLD, "modes": {"": {"ask": "", "open": ""}}},
    "a mode named at length": {**WORLD, "modes": {"m" * 41: {"ask": "", "open": ""}}},
    "a mode named to drive a terminal": {**WORLD, "modes": {"\x1b[2J": {"ask": "", "open": ""}}},
    "half a mode": {**WORLD, "modes": {"plain": {"ask": ""}}},
    "a mode of numbers": {**WORLD, "modes": {"plain": {"ask": 1, "open": ""}}},
    "a mode with a key more": {**WORLD, "modes": {"plain": {"ask": "", "open": "", "close": ""}}},
    "tools that are none": {**G1, "tools": None},
    "tools without an output": {**G1, "tools": {key: text for key, text in G1["tools"].items() if key != "output"}},
    "tools without a place": {**G1, "tools": {**G1["tools"], "call": "```json"}},
    "tools of an unknown mode": {**G1, "tools": {**G1["tools"], "mode": "calls"}},
    "sampling a list": {**WORLD, "sampling": []},
    "sampling a seed": {**WORLD, "sampling": {"seed": 1}},
    "sampling a text": {**WORLD, "sampling": {"temperature": "1"}},
    "sampling a truth": {**WORLD, "sampling": {"temperature": True}},
    "a negative temperature": {**WORLD, "sampling": {"temperature": -1}},
    "top-p above 1": {**WORLD, "sampling": {"top_p": 1.5}},
    "half a token": {**WORLD, "sampling": {"top_k": 1.5}},
    "tokens beyond counting": {**WORLD, "sampling": {"top_k": 2**70}},
    "a repeat penalty of 0": {**WORLD, "sampling": {"repeat_penalty": 0}},
    "a mode's penalty out of range": {
        **WORLD,
        "modes": {"plain": {"ask": "", "open": "", "sampling": {"presence_penalty": 1e7}}},
    },
}

GOOD: dict[str, Any] = {
    **{name: template.to_json() for name, template in BUILT_IN.items()},
    "bare": BARE,
    "turns without an end": {**BARE, "end": ""},
    "nothing but places": {"system": "{}", "user": "{}", "assistant": "", "end": "", "modes": PLAIN},
    "long in other letters": {**BARE, "end": "\u00e9" * 1000},
    "braces": {**BARE, "system": "{{}", "user": "{}}"},
    "no decoding parameters": {**BARE, "sampling": {}},
    "every decoding parameter": {
        **BARE,
        "sampling": {
            "temperature": 0,
            "top_k": 1 << 24,
            "top_p": 1.0,
            "min_p": 0.05,
            "presence_penalty": -2,
            "frequency_penalty": 1e6,
            "repeat_penalty": 100,
            "penalty_decay": 0.5,
        },
    },
}
