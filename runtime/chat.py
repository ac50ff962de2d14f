"""Chat templates: the text that a conversation is written in, as its model was trained to read it.

An engine file carries one. Those built in are what RWKV's authors give with their models: ``world`` for World models,
``g1`` for the G series of RWKV-7, which can also think before it answers and call tools, and ``g1-2025`` for the files
of that series up to 2025, which were told in other words how long to think. A model's turn ends where it would begin
the user's next one; an empty line divides turns, which is why those within a turn are taken out.

A template also names decoding parameters: those that the authors use in their own demonstrations of the series.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from .errors import HeaderError, InputError
from .reading import MAX_SETTINGS_BYTES, check_unicode, read_file
from .sampling import DECODING, SamplingOptions

_PLACE = "{}"
_MAX_CHARACTERS = 1000
_MAX_MODES = 20
_MAX_TOP_K = 1 << 24
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}", re.ASCII)
# Those that every template has; csrc/chat_template.cpp holds files to the same rules.
_KEYS = ("system", "user", "assistant", "end", "modes")
_MODE_KEYS = ("ask", "open")
_TOOL_KEYS = ("system", "call", "output", "mode")

# Text that is no conversation, and whatever a template says nothing of: ChatRWKV (BlinkDL), API_DEMO.py.
FREE_TEXT = SamplingOptions(temperature=1.0, top_p=0.7, presence_penalty=0.25, frequency_penalty=0.25)


@dataclass(frozen=True)
class ChatMode:
    """One way to answer.

    Attributes:
        ask: what follows the user's text.
        open: how the answer begins; the model goes on from there.
        sampling: the decoding parameters for such answers; None leaves them to the template.
    """

    ask: str = ""
    open: str = ""
    sampling: SamplingOptions | None = None


@dataclass(frozen=True)
class ToolForm:
    """How tools are told to the model, and how it calls them.

    Attributes:
        system: what the instructions say of them, ``{}`` being the place of their list.
        call: an answer that calls, ``{}`` being the place of the JSON object.
        output: what a user's turn says of a function's output, ``{}`` being its place.
        mode: the name of the mode that answers with a call.
    """

    system: str
    call: str
    output: str
    mode: str


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written.

    Attributes:
        system: how instructions are, ``{}`` being their place.
        user: how a user's turn is.
        assistant: how the model's turn begins.
        end: what ends every turn; where it is empty, the next turn's beginning alone does.
        modes: the ways to answer by name; the first is the usual one.
        tools: how tools are told and called; None where the model was not trained on any.
        sampling: the decoding parameters for text in general; None where nothing is known of them.
    """

    system: str
    user: str
    assistant: str
    end: str
    modes: Mapping[str, ChatMode]
    tools: ToolForm | None = None
    sampling: SamplingOptions | None = None

    @property
    def stop(self) -> str:
        """The text at which the model's turn is over, the beginning of the user's next one; empty where it has none."""
        return self.end + self.user.partition(_PLACE)[0].rstrip()

    @property
    def is_extended(self) -> bool:
        """Whether it says more than the templates of the first engine files could: tools or decoding parameters."""
        return (
            self.tools is not None
            or self.sampling is not None
            or any(mode.sampling is not None for mode in self.modes.values())
        )

    def instructions(self, text: str, tools: Sequence[Any] = ()) -> str:
        """What a conversation begins with that has instructions, tools or both.

        Args:
            text: the instructions.
            tools: what can be called: texts, such as ``get_time(city: string)``, or objects with ``name``,
                ``description`` and ``parameters``, alone or as the ``function`` of an object, as OpenAI writes them.

        Raises:
            InputError: there are tools and the template has no form for them, or one is neither text nor such an
                object; it is named.
        """
        said = [self._within_turn(text)]
        if tools:
            said.append(self._within_turn(_filled(self._tool_form().system, _tool_list(tools))))
        return _filled(self.system, "\n".join(filter(None, said))) + self.end

    def prompt(self, text: str, mode: str | None = None) -> str:
        """A user's turn, and the model's up to where it goes on.

        Args:
            text: what the user says.
            mode: a name in `modes`; None is the first.

        Raises:
            InputError: the template has no such mode.
        """
        chosen = self._mode(mode)
        return self._asked(text, chosen.ask) + self.assistant + chosen.open

    def function_output(self, text: str) -> str:
        """What the user's turn says that gives back what a called function returned.

        Raises:
            InputError: the template has no form for tools.
        """
        return _filled(self._tool_form().output, self._within_turn(text))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), mode: str | None = None) -> str:
        """A whole conversation, up to where the model goes on.

        Args:
            messages: the turns, each an object with ``role`` (system, user, assistant or tool) and ``content``, a text
                or OpenAI's list of text parts; the last is a user's or a tool's. An assistant's may have
                ``tool_calls``, as OpenAI writes them.
            tools: what can be called, as for `instructions`.
            mode: how to answer, a name in `modes`; None is the mode of calls where there are tools, else the first.

        Raises:
            InputError: there is no such mode, the template has no form for tools, or a message cannot be used; it is
                named.
        """
        chosen = self._mode(self.usual_mode(tools) if mode is None else mode)
        if not isinstance(messages, Sequence) or not messages:
            raise InputError("are no conversation", place="messages", expected="a list of at least one message")
        turns = [_Turn.read(message, f"messages[{index}]") for index, message in enumerate(messages)]
        if turns[-1].role not in ("user", "tool"):
            raise InputError(
                "is not to be answered",
                place=f"messages[{len(turns) - 1}].role",
                expected="user or tool",
                found=turns[-1].role,
            )
        written = []
        if turns[0].role == "system":
            written.append(self.instructions(turns.pop(0).text, tools))
        elif tools:
            written.append(self.instructions("", tools))
        for turn in turns:
            if turn.role == "system":
                written.append(self.instructions(turn.text))
            elif turn.role == "assistant":
                written.append(self._answered(turn))
            else:
                said = self.function_output(turn.text) if turn.role == "tool" else turn.text
                written.append(self._asked(said, chosen.ask if turn is turns[-1] else ""))
        return "".join(written) + self.assistant + chosen.open

    def opening(self, mode: str | None = None) -> str:
        """How an answer begins in this mode, the last part of `prompt`.

        Raises:
            InputError: the template has no such mode.
        """
        return self._mode(mode).open

    def usual_mode(self, tools: Sequence[Any] = ()) -> str:
        """The name of the mode that answers where none is asked for.

        Raises:
            InputError: there are tools and the template has no form for them.
        """
        return self._tool_form().mode if tools else next(iter(self.modes))

    def decoding(self, mode: str | None = None) -> SamplingOptions:
        """The decoding parameters for answers in this mode.

        Raises:
            InputError: the template has no such mode.
        """
        return self._mode(mode).sampling or self.sampling or FREE_TEXT

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

    def _tool_form(self) -> ToolForm:
        if self.tools is None:
            raise InputError(
                "cannot be told in this engine's chat template",
                place="tools",
                remedy="choose a template that has them, such as g1, if the model was trained on it",
            )
        return self.tools

    def _asked(self, text: str, ask: str) -> str:
        return _filled(self.user, self._within_turn(text) + ask) + self.end

    def _answered(self, turn: _Turn) -> str:
        """A turn of the model that is over."""
        said = turn.text.replace("\r\n", "\n").strip()
        # Nothing that it said may be read as the user's next turn.
        said = _without(said, self.stop, self._gap + self.stop[len(self.end) :] if self.end else "")
        # The model writes this space itself: the authors' templates end in "Assistant:".
        said = f" {said}" if said and self.assistant.endswith(":") else said
        said += "\n".join(_filled(self._tool_form().call, call) for call in turn.calls)
        return self.assistant + said + self.end

    def _within_turn(self, text: str) -> str:
        """A text without what divides turns."""
        text = re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n").strip())
        return _without(text, self.end, self._gap)

    @property
    def _gap(self) -> str:
        """What stands for an end of turn within one."""
        return " " if self.end.isspace() and self.end not in " " else ""

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back to an equal template."""
        value: dict[str, Any] = {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant,
            "end": self.end,
            "modes": {name: _mode_json(mode) for name, mode in self.modes.items()},
        }
        if self.tools is not None:
            value["tools"] = {key: getattr(self.tools, key) for key in _TOOL_KEYS}
        if self.sampling is not None:
            value["sampling"] = _sampling_json(self.sampling)
        return value

    @classmethod
    def from_json(cls, value: Any, place: str = "chat") -> ChatTemplate:
        """Read a template from a file's header or a file of its own.

        Raises:
            HeaderError: a key is missing, unknown or of the wrong type, a text has no place to fill, or a number is out
                of range; it is named.
        """
        fields = _texts(value, _KEYS, place, optional=("tools", "sampling"))
        _check_places(fields, ("system", "user"), place)
        modes = value["modes"]
        if not isinstance(modes, Mapping) or not 1 <= len(modes) <= _MAX_MODES:
            raise HeaderError("is not an object of modes", place=f"{place}.modes", expected=f"1 to {_MAX_MODES}")
        read = {}
        for name, mode in modes.items():
            if not _NAME.fullmatch(name):
                raise HeaderError("is not a name", place=f"{place}.modes", found=name[:60])
            at = f"{place}.modes.{name}"
            read[name] = ChatMode(**_texts(mode, _MODE_KEYS, at, optional=("sampling",)), sampling=_sampling(mode, at))
        return cls(
            **fields,
            modes=MappingProxyType(read),
            tools=_tools(value, read, place),
            sampling=_sampling(value, place),
        )


@dataclass(frozen=True, eq=False)
class _Turn:
    """One message of a conversation; `calls` are JSON objects, as the model writes them."""

    role: str
    text: str
    calls: tuple[str, ...] = ()

    @classmethod
    def read(cls, message: Any, place: str) -> _Turn:
        if not isinstance(message, Mapping):
            raise InputError("is not a message", place=place, expected="an object with role and content")
        role = message.get("role")
        if role == "developer":  # OpenAI's newer word
            role = "system"
        if role not in ("system", "user", "assistant", "tool"):
            raise InputError(
                "is no role", place=f"{place}.role", expected="system, user, assistant or tool", found=repr(role)[:60]
            )
        calls = message.get("tool_calls") or ()
        if calls and role != "assistant":
            raise InputError("calls tools", place=f"{place}.tool_calls", expected="calls of the assistant alone")
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InputError("are not calls", place=f"{place}.tool_calls", expected="a list of objects")
        text = _content_text(message.get("content"), f"{place}.content", may_be_none=bool(calls))
        at = f"{place}.tool_calls"
        return cls(role, text, tuple(_call(call, f"{at}[{index}]") for index, call in enumerate(calls)))


def _content_text(content: Any, place: str, *, may_be_none: bool) -> str:
    if content is None and may_be_none:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and content:
        texts = [
            part["text"] if isinstance(part, Mapping) and part.get("type") == "text" and "text" in part else None
            for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    raise InputError("is not text", place=place, expected="a text, or a list of text parts")


def _call(call: Any, place: str) -> str:
    """A call in the form in which the model writes it: one object with ``name`` and ``arguments``."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError("is no call", place=place, expected="an object with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI has JSON within JSON here
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON: {error}", place=f"{place}.arguments") from None
    return _json_text({"name": name, "arguments": arguments}, f"{place}.arguments")


def _tool_list(tools: Sequence[Any]) -> str:
    """Tools as the authors list them: signatures with a dash each, or a JSON list, an object on each line."""
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise InputError("are not a list", place="tools", expected="a list of texts or of objects")
    if all(isinstance(tool, str) for tool in tools):
        return "\n".join(f"- {' '.join(tool.split())}" for tool in tools)
    return "[\n" + ",\n".join(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)) + "\n]"


def _tool(tool: Any, place: str) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError("is no tool", place=place, expected="an object with name, description and parameters")
    told: dict[str, Any] = {"name": name}
    if function.get("description"):
        told["description"] = function["description"]
    arguments = function.get("arguments", function.get("parameters", {}))
    # The models were shown the properties alone; what may be left out is said only where that is not all or nothing.
    if isinstance(arguments, Mapping) and isinstance(arguments.get("properties"), Mapping):
        told["arguments"] = arguments["properties"]
        required = arguments.get("required")
        if isinstance(required, Sequence) and set(map(str, required)) != set(arguments["properties"]):
            told["required"] = required
    else:
        told["arguments"] = arguments
    return _json_text(told, place)


def _json_text(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be written as JSON: {error}", place=place) from None


def _filled(pattern: str, text: str) -> str:
    before, _, after = pattern.partition(_PLACE)
    return before + text + after


def _without(text: str, mark: str, instead: str) -> str:
    """A text in which a mark does not occur, nor comes to be when one is replaced by what is less of it."""
    while mark and mark in text:
        text = text.replace(mark, instead)
    return text


def _texts(value: Any, keys: tuple[str, ...], place: str, optional: tuple[str, ...] = ()) -> dict[str, str]:
    """The texts of an object that has these keys and perhaps optional ones; all of `keys` but ``modes`` are texts."""
    if not isinstance(value, Mapping):
        raise HeaderError("is not a JSON object", place=place, found=type(value).__name__)
    if set(value) - set(optional) != set(keys):
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


def _check_places(fields: Mapping[str, str], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if fields[key].count(_PLACE) != 1:
            raise HeaderError(
                "has not one place for the text", place=f"{place}.{key}", expected=_PLACE, found=fields[key][:60]
            )


def _tools(value: Mapping[str, Any], modes: Mapping[str, ChatMode], place: str) -> ToolForm | None:
    if "tools" not in value:
        return None
    place = f"{place}.tools"
    fields = _texts(value["tools"], _TOOL_KEYS, place)
    _check_places(fields, ("system", "call", "output"), place)
    if fields["mode"] not in modes:
        raise HeaderError("is no mode", place=f"{place}.mode", expected=", ".join(modes), found=fields["mode"][:60])
    return ToolForm(**fields)


def _sampling(value: Mapping[str, Any], place: str) -> SamplingOptions | None:
    if "sampling" not in value:
        return None
    place, numbers = f"{place}.sampling", value["sampling"]
    if not isinstance(numbers, Mapping) or not set(numbers) <= set(DECODING):
        raise HeaderError("are not decoding parameters", place=place, expected=f"an object of {', '.join(DECODING)}")
    try:
        options = SamplingOptions(**numbers)
    except InputError as error:
        raise HeaderError(
            error.problem, place=f"{place}.{error.place}", expected=error.expected, found=error.found
        ) from None
    if options.top_k > _MAX_TOP_K:
        raise HeaderError("is out of range", place=f"{place}.top_k", expected=f"0 to {_MAX_TOP_K}", found=options.top_k)
    return options


def _sampling_json(options: SamplingOptions) -> dict[str, Any]:
    neutral = SamplingOptions()
    return {name: getattr(options, name) for name in DECODING if getattr(options, name) != getattr(neutral, name)}


def _mode_json(mode: ChatMode) -> dict[str, Any]:
    value: dict[str, Any] = {"ask": mode.ask, "open": mode.open}
    if mode.sampling is not None:
        value["sampling"] = _sampling_json(mode.sampling)
    return value


# ------------------------------------------------------------------------------------------------------- the built in

# Decoding parameters, from ChatRWKV (BlinkDL): questions to a World model as in API_DEMO_WORLD.py; chat with the G
# series as in API_DEMO_CHAT.py; thinking, as in the README of rwkv_pip_package, whose example is one. A call is JSON,
# whose quotes and braces must not cost more each time: it takes the parameters without penalties.
_WORLD_QUESTIONS = SamplingOptions(temperature=1.0, top_p=0.2, presence_penalty=0.4, frequency_penalty=0.4)
_G1_CHAT = SamplingOptions(temperature=1.0, top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5)
_G1_THINKING = SamplingOptions(temperature=1.0, top_p=0.5, top_k=100)

_THINK, _FAKE, _SHORT_FAKE = " <think", " <think>\n</think", " <think></think"
_WORLD = ChatTemplate(
    system="System: {}",
    user="User: {}",
    assistant="Assistant:",
    end="\n\n",
    modes=MappingProxyType({"plain": ChatMode(sampling=_WORLD_QUESTIONS)}),
    sampling=FREE_TEXT,
)
# RWKV-LM (BlinkDL), RWKV-v7/RWKV7-G1x-templates.txt of July 2026.
_G1 = replace(
    _WORLD,
    modes=MappingProxyType(
        {
            "plain": ChatMode(sampling=_G1_CHAT),
            "think": ChatMode(" (think)", _THINK, _G1_THINKING),
            "think-a-bit": ChatMode(" (think a bit)", _THINK, _G1_THINKING),
            "think-a-lot": ChatMode(" (think a lot)", _THINK, _G1_THINKING),
            "think-freely": ChatMode("", _THINK, _G1_THINKING),
            "fake-think": ChatMode("", _FAKE, _G1_CHAT),
            "fake-think-short": ChatMode("", _SHORT_FAKE, _G1_CHAT),
            "call": ChatMode("", " ```json", _G1_THINKING),
        }
    ),
    tools=ToolForm(
        system="Tools:\n{}\nReturn only a JSON function call.",
        call=" ```json\n{}\n```",
        output="Function output:\n{}",
        mode="call",
    ),
)
# What the model cards of 2025 give, for the G1, G1a and G1b files.
_G1_2025 = replace(
    _WORLD,
    modes=MappingProxyType(
        {
            "plain": ChatMode(sampling=_G1_CHAT),
            "think": ChatMode("", _THINK, _G1_THINKING),
            "think-a-bit": ChatMode(" think a bit", _THINK, _G1_THINKING),
            "think-a-lot": ChatMode(" think a lot", _THINK, _G1_THINKING),
            "fake-think": ChatMode("", _FAKE, _G1_CHAT),
        }
    ),
)
BUILT_IN: Mapping[str, ChatTemplate] = MappingProxyType({"world": _WORLD, "g1": _G1, "g1-2025": _G1_2025})


def chat_template(choice: str | os.PathLike[str]) -> ChatTemplate:
    """A template by its name in `BUILT_IN`, or from a JSON file that holds what `ChatTemplate.to_json` gives.

    Raises:
        InputError: there is no such name or file, or the file holds no template.
    """
    if choice in BUILT_IN:
        return BUILT_IN[os.fspath(choice)]
    try:
        data = read_file(choice, MAX_SETTINGS_BYTES)
    except OSError as error:
        raise InputError(
            f"is no chat template: {error.strerror}",
            file=choice,
            expected=", ".join(BUILT_IN) + " or the path of a JSON file",
        ) from None
    try:
        value = json.loads(data.decode("utf-8"))
        check_unicode(value, choice, "template")
        return ChatTemplate.from_json(value, "template")
    except HeaderError as error:
        raise InputError(
            error.problem, file=choice, place=error.place, expected=error.expected, found=error.found
        ) from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", file=choice) from None
