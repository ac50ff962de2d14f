"""Chat templates: the text that a conversation is written in, as its model was trained to read it.

An engine file carries one. The two built in are those that RWKV's authors give with their models: ``world`` for World
models, and ``g1`` for the G series of RWKV-7, which can also think before it answers. A model's turn ends where it
would begin the user's next one; an empty line divides turns, which is why those within a turn are taken out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import HeaderError, InputError

_PLACE = "{}"
_MAX_CHARACTERS = 1000
_MAX_MODES = 20
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}", re.ASCII)
_KEYS = ("system", "user", "assistant", "end", "modes")
_MODE_KEYS = ("ask", "open")


@dataclass(frozen=True)
class ChatMode:
    """One way to answer.

    Attributes:
        ask: what follows the user's text.
        open: how the answer begins; the model goes on from there.
    """

    ask: str = ""
    open: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written.

    Attributes:
        system: how instructions are, ``{}`` being their place.
        user: how a user's turn is.
        assistant: how the model's turn begins.
        end: what ends every turn.
        modes: the ways to answer by name; the first is the usual one.
    """

    system: str
    user: str
    assistant: str
    end: str
    modes: Mapping[str, ChatMode]

    @property
    def stop(self) -> str:
        """The text at which the model's turn is over: the beginning of the user's next one."""
        return self.end + self.user.partition(_PLACE)[0].rstrip()

    def instructions(self, text: str) -> str:
        """What a conversation with instructions begins with."""
        return _filled(self.system, _within_turn(text)) + self.end

    def prompt(self, text: str, mode: str | None = None) -> str:
        """A user's turn, and the model's up to where it goes on.

        Args:
            text: what the user says.
            mode: a name in `modes`; None is the first.

        Raises:
            InputError: the template has no such mode.
        """
        chosen = self._mode(mode)
        return _filled(self.user, _within_turn(text) + chosen.ask) + self.end + self.assistant + chosen.open

    def opening(self, mode: str | None = None) -> str:
        """How an answer begins in this mode, the last part of `prompt`.

        Raises:
            InputError: the template has no such mode.
        """
        return self._mode(mode).open

    def _mode(self, mode: str | None) -> ChatMode:
        name = next(iter(self.modes)) if mode is None else mode
        if name not in self.modes:
            raise InputError(
                "is not a mode of this engine's chat template",
                place="mode",
                expected=", ".join(self.modes),
                found=name,
                remedy="choose one of these, or another template",
            )
        return self.modes[name]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back to an equal template."""
        modes = {name: {"ask": mode.ask, "open": mode.open} for name, mode in self.modes.items()}
        return {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant,
            "end": self.end,
            "modes": modes,
        }

    @classmethod
    def from_json(cls, value: Any, place: str = "chat") -> ChatTemplate:
        """Read a template from a file's header or a file of its own.

        Raises:
            HeaderError: a key is missing, unknown or of the wrong type, or a text has no place to fill; it is named.
        """
        fields = _texts(value, _KEYS, place)
        for key in ("system", "user"):
            if fields[key].count(_PLACE) != 1:
                raise HeaderError(
                    "has not one place for the text", place=f"{place}.{key}", expected=_PLACE, found=fields[key][:60]
                )
        modes = value["modes"]
        if not isinstance(modes, Mapping) or not 1 <= len(modes) <= _MAX_MODES:
            raise HeaderError("is not an object of modes", place=f"{place}.modes", expected=f"1 to {_MAX_MODES}")
        read = {}
        for name, mode in modes.items():
            if not _NAME.fullmatch(name):
                raise HeaderError("is not a name", place=f"{place}.modes", found=name[:60])
            read[name] = ChatMode(**_texts(mode, _MODE_KEYS, f"{place}.modes.{name}"))
        return cls(**fields, modes=MappingProxyType(read))


def _filled(pattern: str, text: str) -> str:
    before, _, after = pattern.partition(_PLACE)
    return before + text + after


def _within_turn(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n").strip())


def _texts(value: Any, keys: tuple[str, ...], place: str) -> dict[str, str]:
    """The texts of an object that has exactly these keys, all but ``modes``."""
    if not isinstance(value, Mapping):
        raise HeaderError("is not a JSON object", place=place, found=type(value).__name__)
    if set(value) != set(keys):
        raise HeaderError(
            "has other keys than it should",
            place=place,
            expected=", ".join(keys),
            found=", ".join(map(str, value))[:100] or "none",
        )
    texts = {}
    for key in keys:
        if key == "modes":
            continue
        text = value[key]
        if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
            raise HeaderError("is not a text", place=f"{place}.{key}", expected=f"at most {_MAX_CHARACTERS} characters")
        texts[key] = text
    return texts


_WORLD = ChatTemplate("System: {}", "User: {}", "Assistant:", "\n\n", MappingProxyType({"plain": ChatMode()}))
_G1 = ChatTemplate(
    _WORLD.system,
    _WORLD.user,
    _WORLD.assistant,
    _WORLD.end,
    MappingProxyType(
        {
            "plain": ChatMode(),
            "think": ChatMode(open=" <think"),
            "think-a-bit": ChatMode(" think a bit", " <think"),
            "think-a-lot": ChatMode(" think a lot", " <think"),
            "fake-think": ChatMode(open=" <think>\n</think"),
        }
    ),
)
BUILT_IN: Mapping[str, ChatTemplate] = MappingProxyType({"world": _WORLD, "g1": _G1})


def chat_template(choice: str | os.PathLike[str]) -> ChatTemplate:
    """A template by its name, ``world`` or ``g1``, or from a JSON file that holds what `ChatTemplate.to_json` gives.

    Raises:
        InputError: there is no such name or file, or the file holds no template.
    """
    if choice in BUILT_IN:
        return BUILT_IN[os.fspath(choice)]
    try:
        with open(choice, encoding="utf-8") as file:
            return ChatTemplate.from_json(json.load(file), "template")
    except OSError as error:
        raise InputError(
            f"is no chat template: {error.strerror}",
            file=choice,
            expected=", ".join(BUILT_IN) + " or the path of a JSON file",
        ) from None
    except HeaderError as error:
        raise InputError(
            error.problem, file=choice, place=error.place, expected=error.expected, found=error.found
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", file=choice) from None
