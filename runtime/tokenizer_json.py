"""What of a ``tokenizer.json`` reaches the package `tokenizers`: what byte-level BPE needs, checked, and nothing else.

That package was made for files that one trusts: values of some fields end the whole process, and others lose bytes of
the text. So a file is read here, every field of it has its place in a table below or is refused by name, and the
package is given a file that is written anew from what was read:

- ``version``: "1.0" or left out.
- ``truncation``, ``padding``, ``post_processor``: anything; never passed on, since goslet adds, cuts and pads nothing.
- ``added_tokens``: objects with ``id``, ``content`` and the five truth values; one that is not special must not strip
  the spaces beside it, which would be lost.
- ``normalizer``: null or one of Unicode's forms.
- ``pre_tokenizer``: ``ByteLevel``, or a ``Sequence`` with one among ``Split``, ``Digits`` and ``Punctuation`` that
  remove nothing. A pattern is bounded as `pattern_problem` says.
- ``decoder``: ``ByteLevel``.
- ``model``: ``BPE`` with ``vocab`` and ``merges`` that fit together, without dropout, subword prefix and suffix.

Source: the format as the package's own readers (tokenizers 0.19 to 0.23) take it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .errors import NotByteLevelError, TokenizerError
from .output import Path
from .spec import MAX_VOCAB_SIZE

MAX_FILE_BYTES = 64 << 20
# A vocabulary of a quarter of a million has three million at most, with its merges in pairs.
MAX_VALUES = 16 << 20
MAX_TOKEN_CHARACTERS = 4096
MAX_ADDED_TOKENS = 1 << 16
MAX_PATTERN_CHARACTERS = 4096
MAX_REPEATS = 1000
# Published patterns have two at most; each may take the text's length once more.
_MAX_LONG, _FEW = 3, 10
MAX_PARTS = 100

# Unicode's own; at most 18 characters come of one.
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
_TOP = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
    *("decoder", "model"),
)
_MODEL = (
    *("type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    *("ignore_merges", "vocab", "merges"),
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE_LEVEL = ("type", "add_prefix_space", "trim_offsets", "use_regex")
# Each keeps every character; Removed does not.
_BEHAVIORS = ("Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext")
_USE_BYTE_LEVEL = "use a byte-level tokenizer, or none and token ids"
_REMOVE = "use the file that its model was published with"


def _alphabet() -> dict[str, int]:
    """The byte that each character of a ByteLevel token stands for: itself if it is printable Latin-1, otherwise one
    of the characters from U+0100 on, given out in the order of the bytes (GPT-2's published alphabet)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER: Mapping[str, int] = _alphabet()


def checked_tokenizer_json(data: bytes, file: Path | None = None) -> str:
    """The file that the package is given in place of a ``tokenizer.json``.

    Args:
        data: the file's content, UTF-8.
        file: its name, for errors.

    Raises:
        NotByteLevelError: it is a tokenizer of another kind: its tokens are not byte strings, or it changes text.
        TokenizerError: it is not JSON, holds a field or a value that goslet does not know, or its parts do not fit
            together.
    """
    return _Reader(file).read(data)


class _Reader:
    def __init__(self, file: Path | None) -> None:
        self._file = file

    def _refuse(self, problem: str, place: str, expected: object = None, found: object = None) -> NoReturn:
        raise TokenizerError(
            problem, file=self._file, place=place, expected=expected, found=_shown(found), remedy=_REMOVE
        )

    def _refuse_kind(self, problem: str, place: str, expected: object, found: object) -> NoReturn:
        raise NotByteLevelError(
            problem, file=self._file, place=place, expected=expected, found=_shown(found), remedy=_USE_BYTE_LEVEL
        )

    def read(self, data: bytes) -> str:
        value = self._parsed(data)
        if not isinstance(value, dict) or "model" not in value:
            raise TokenizerError("is not a tokenizer.json", file=self._file, expected="an object with a model")
        content = self._object(value, "tokenizer.json", _TOP)
        if content.get("version", "1.0") != "1.0":
            self._refuse("is not a known version", "version", "1.0", str(content["version"]))
        self._check_decoder(content.get("decoder"))
        self._check_model_kind(content.get("model"))
        made = {
            "version": "1.0",
            "normalizer": self._normalizer(content.get("normalizer")),
            "pre_tokenizer": self._pre_tokenizer(content.get("pre_tokenizer")),
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
            "model": self._model(content["model"]),
            "added_tokens": self._added_tokens(content.get("added_tokens")),
        }
        text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self._refuse("holds half a surrogate pair", "a token or a pattern")
        return text

    def _parsed(self, data: bytes) -> Any:
        if len(data) > MAX_FILE_BYTES:
            raise TokenizerError(
                "is too large for a tokenizer", file=self._file, expected=f"at most {MAX_FILE_BYTES} bytes"
            )
        if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
            raise TokenizerError("is no tokenizer.json: too many values", file=self._file, expected=MAX_VALUES)
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise TokenizerError(
                f"is not a tokenizer.json: {str(error)[:200]}", file=self._file, remedy="get the file again"
            ) from None

    def _object(self, value: Any, place: str, fields: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse("is not an object", place, "an object", value)
        for key in value:
            if key not in fields:
                self._refuse("is not a field that goslet knows", f"{place}, {key[:60]}", ", ".join(fields))
        return value

    def _flag(self, value: Mapping[str, Any], key: str, place: str, default: bool = False) -> bool:
        flag = value.get(key)
        if flag is not None and not isinstance(flag, bool):
            self._refuse("is not a truth value", f"{place}.{key}", "true or false", flag)
        return default if flag is None else flag

    def _check_decoder(self, decoder: Any) -> None:
        kind = decoder.get("type") if isinstance(decoder, dict) else None
        if kind != "ByteLevel":
            self._refuse_kind(
                "its tokens are not byte strings, so that text could not be streamed exactly",
                "decoder",
                "ByteLevel",
                "none" if decoder is None else kind,
            )
        self._byte_level(decoder, "decoder")

    def _byte_level(self, value: Any, place: str) -> dict[str, Any]:
        self._object(value, place, _BYTE_LEVEL)
        return {
            "type": "ByteLevel",
            "add_prefix_space": self._flag(value, "add_prefix_space", place, True),
            "trim_offsets": False,
            "use_regex": self._flag(value, "use_regex", place, True),
        }

    def _bytes(self, value: Any, place: str) -> dict[str, Any]:
        if value.get("add_prefix_space") is None:
            self._refuse("is missing", f"{place}.add_prefix_space", "true or false")
        return self._byte_level(value, place)

    def _normalizer(self, normalizer: Any) -> dict[str, Any] | None:
        if normalizer is None:
            return None
        kind = normalizer.get("type") if isinstance(normalizer, dict) else None
        if kind not in NORMALIZERS:
            self._refuse_kind(
                "its normalizer may change the text's letters, or make a short text endless",
                "normalizer",
                f"none, {', '.join(NORMALIZERS)}",
                kind,
            )
        self._object(normalizer, "normalizer", ("type",))
        return {"type": kind}

    def _pre_tokenizer(self, value: Any) -> dict[str, Any]:
        place = "pre_tokenizer"
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "ByteLevel":
            return self._bytes(value, place)
        parts: Any = []
        if kind == "Sequence":
            parts = self._object(value, place, ("type", "pretokenizers")).get("pretokenizers")
            if not isinstance(parts, list) or len(parts) > MAX_PARTS:
                self._refuse("is not a list", f"{place}.pretokenizers", f"at most {MAX_PARTS}", parts)
        kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
        if kinds.count("ByteLevel") != 1:
            self._refuse_kind(
                "does not turn the text into bytes, so that spaces and bytes could be lost",
                place,
                "ByteLevel, or a Sequence with one",
                "none" if value is None else f"a Sequence of {kinds}" if kind == "Sequence" else kind,
            )
        made = [self._part(part, f"{place}.pretokenizers[{index}]") for index, part in enumerate(parts)]
        return {"type": "Sequence", "pretokenizers": made}

    def _part(self, value: dict[str, Any], place: str) -> dict[str, Any]:
        kind = value["type"] if isinstance(value, dict) and "type" in value else None
        makers: dict[Any, Callable[[Any, str], dict[str, Any]]] = {
            "ByteLevel": self._bytes,
            "Split": self._split,
            "Digits": self._digits,
            "Punctuation": self._punctuation,
        }
        if not isinstance(kind, str) or kind not in makers:
            self._refuse_kind("may lose spaces and bytes", place, ", ".join(makers), kind)
        return makers[kind](value, place)

    def _digits(self, value: Any, place: str) -> dict[str, Any]:
        self._object(value, place, ("type", "individual_digits"))
        return {"type": "Digits", "individual_digits": self._flag(value, "individual_digits", place)}

    def _punctuation(self, value: Any, place: str) -> dict[str, Any]:
        self._object(value, place, ("type", "behavior"))
        return {"type": "Punctuation", "behavior": self._behavior(value.get("behavior", "Isolated"), place)}

    def _behavior(self, value: Any, place: str) -> str:
        if value not in _BEHAVIORS:
            self._refuse_kind("removes characters of the text", f"{place}.behavior", ", ".join(_BEHAVIORS), value)
        return str(value)

    def _split(self, value: Any, place: str) -> dict[str, Any]:
        self._object(value, place, ("type", "pattern", "behavior", "invert"))
        invert = self._flag(value, "invert", place)
        pattern = self._object(value.get("pattern"), f"{place}.pattern", ("String", "Regex"))
        if len(pattern) != 1:
            self._refuse("is not one pattern", f"{place}.pattern", "String or Regex", ", ".join(pattern))
        form, text = next(iter(pattern.items()))
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_PATTERN_CHARACTERS:
            self._refuse("is not a pattern", f"{place}.pattern", f"1 to {MAX_PATTERN_CHARACTERS} characters", text)
        if form == "Regex" and (problem := pattern_problem(text)) is not None:
            self._refuse(f"has a pattern that could take forever: {problem}", f"{place}.pattern", None, text)
        behavior = value.get("behavior")
        if behavior == "Removed" and invert:
            # What the pattern finds, one piece each; here what it does not find stays too.
            behavior, invert = "Isolated", False
        return {
            "type": "Split",
            "pattern": {form: text},
            "behavior": self._behavior(behavior, place),
            "invert": invert,
        }

    def _check_model_kind(self, model: Any) -> None:
        if not isinstance(model, dict):
            self._refuse("is not an object", "model", "an object", model)
        # Old files leave the type out where it is BPE.
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE":
            self._refuse_kind("is not byte-level BPE", "model.type", "BPE", kind)

    def _model(self, value: Any) -> dict[str, Any]:
        model = self._object(value, "model", _MODEL)
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key) not in (None, ""):
                self._refuse_kind("marks parts of words, which bytes have not", f"model.{key}", "none", model[key])
        dropout = model.get("dropout")
        if dropout is not None and (isinstance(dropout, bool) or dropout not in (0, 0.0)):
            self._refuse("makes the ids of a text random", "model.dropout", "none", dropout)
        vocab = self._vocab(model.get("vocab"))
        unknown = model.get("unk_token")
        if unknown is not None and not isinstance(unknown, str):
            self._refuse("is not a token", "model.unk_token", "a text or none", unknown)
        fuse, fallback = (self._flag(model, key, "model") for key in ("fuse_unk", "byte_fallback"))
        if vocab.keys() >= BYTE_OF_CHARACTER.keys():
            # No byte is unknown, and what would stand for it never comes up.
            unknown, fuse = None, False
        elif fallback:
            self._refuse_kind("stands for bytes in another way", "model.byte_fallback", "false", fallback)
        elif unknown is not None and unknown not in vocab:
            self._refuse("is not in the vocabulary", "model.unk_token", "one of its tokens", unknown)
        return {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": fuse,
            "ignore_merges": self._flag(model, "ignore_merges", "model"),
            "vocab": vocab,
            "merges": self._merges(model.get("merges"), vocab),
        }

    def _vocab(self, vocab: Any) -> dict[str, int]:
        if not isinstance(vocab, dict) or len(vocab) > MAX_VOCAB_SIZE:
            self._refuse("is not an object of tokens", "model.vocab", f"at most {MAX_VOCAB_SIZE}", type(vocab).__name__)
        for token, number in vocab.items():
            if type(number) is not int or not 0 <= number < MAX_VOCAB_SIZE:
                self._refuse("is not an id", f"model.vocab, {_shown(token)}", f"0 to {MAX_VOCAB_SIZE - 1}", number)
            if len(token) > MAX_TOKEN_CHARACTERS:
                self._refuse("is too long", f"model.vocab, id {number}", f"{MAX_TOKEN_CHARACTERS} characters", token)
        if len(set(vocab.values())) != len(vocab):
            self._refuse("gives an id to two tokens", "model.vocab")
        return vocab

    def _merges(self, merges: Any, vocab: Mapping[str, int]) -> list[list[str]]:
        if not isinstance(merges, list):
            self._refuse("is not a list", "model.merges", "a list", type(merges).__name__)
        made = []
        for index, merge in enumerate(merges):
            # Old files have the pair in one text, and keep the first line of the file that it came from.
            if isinstance(merge, str) and merge.startswith("#version"):
                continue
            pair = merge.split(" ") if isinstance(merge, str) else merge
            # Of many tens of thousands: what is usual is told in the fewest steps.
            left, right = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
            if not left or not right or type(left) is not str or type(right) is not str:
                self._refuse("is not a pair of tokens", f"model.merges[{index}]", None, merge)
            if left not in vocab or right not in vocab or left + right not in vocab:
                self._refuse("joins what is not in the vocabulary", f"model.merges[{index}]", None, merge)
            made.append([left, right])
        return made

    def _added_tokens(self, tokens: Any) -> list[dict[str, Any]]:
        if tokens is None:
            return []
        if not isinstance(tokens, list) or len(tokens) > MAX_ADDED_TOKENS:
            self._refuse("is not a list", "added_tokens", f"at most {MAX_ADDED_TOKENS}", type(tokens).__name__)
        made = []
        for index, token in enumerate(tokens):
            place = f"added_tokens[{index}]"
            self._object(token, place, ("id", "content", *_FLAGS))
            content, number = token.get("content"), token.get("id")
            if not isinstance(content, str) or len(content) > MAX_TOKEN_CHARACTERS:
                self._refuse(
                    "is not a token", f"{place}.content", f"a text of {MAX_TOKEN_CHARACTERS} characters", content
                )
            if type(number) is not int or not 0 <= number < MAX_VOCAB_SIZE:
                self._refuse("is not an id", f"{place}.id", f"0 to {MAX_VOCAB_SIZE - 1}", number)
            flags = {key: self._flag(token, key, place) for key in _FLAGS}
            for key in ("lstrip", "rstrip"):
                # Special tokens are never looked for in a text.
                if flags[key] and not flags["special"]:
                    self._refuse("loses the spaces beside the token", f"{place}.{key}", "false", True)
                flags[key] = False
            made.append({"id": number, "content": content, **flags})
        return made


def _shown(value: object) -> str | None:
    return None if value is None else value[:60] if isinstance(value, str) else repr(value)[:60]


_REPEAT = re.compile(r"\{(?:(\d{1,4}),?|(\d{0,4}),(\d{1,4}))\}")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_]{1,40}\}|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4}|[sSdDwWbBnrtfvhH]|[^A-Za-z0-9])"
)
_GROUP = re.compile(r"\((?:\?(?:[im]*(?:-[im]+)?:|=|!|>))?")


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is none of those that tokenizers are published with; None where it is one.

    Allowed are alternatives of single characters, classes and escapes with a repetition, groups, and looking ahead. A
    group may be repeated where it can be read in one way only, and one alternative has few long repetitions. What is
    left out (looking back, references, recursion too) may take time that is exponential, or of a high power, in the
    length of the text.
    """
    place = 0
    ambiguous: list[bool] = []  # of each open group
    single = within = False  # of what has just been read: whether it may be repeated, and whether it is ambiguous
    n_long = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "[":
            end = _end_of_class(pattern, place)
            if end is None:
                return "a class has no end, or one of its escapes is not known"
            place, single, within = end, True, False
        elif character == "(":
            opened = _GROUP.match(pattern, place)
            assert opened is not None
            if pattern[opened.end() : opened.end() + 1] in ("?", "*", "+") or len(ambiguous) == 20:
                return "a group of a kind that is not known"
            ambiguous.append(False)
            place, single = opened.end(), False
        elif character == ")":
            if not ambiguous:
                return "a bracket without its other half"
            within = ambiguous.pop()
            place, single = place + 1, True
        elif character in "*+?{":
            repeat = _REPEAT.match(pattern, place)
            if character == "{" and repeat is None:
                return "a repetition that cannot be read"
            if not single:
                return "a repetition of nothing"
            if within and character != "?":
                return "a repetition of what can be read in several ways"
            most = _most_repeats(character, repeat)
            if most > MAX_REPEATS and repeat is not None and not repeat[0].endswith(",}"):
                return f"more than {MAX_REPEATS} repetitions"
            n_long += most > _FEW
            if n_long > _MAX_LONG:
                return f"more than {_MAX_LONG} long repetitions in one alternative"
            place = place + 1 if repeat is None else repeat.end()
            # Lazy and possessive.
            place += pattern[place : place + 1] in ("?", "+")
            within = within or repeat is None or "," in repeat[0]
            if ambiguous:
                ambiguous[-1] = ambiguous[-1] or within
            single = False
        elif character == "\\":
            escape = _ESCAPE.match(pattern, place)
            if escape is None:
                return f"the escape {pattern[place : place + 2]}"
            place, single, within = escape.end(), True, False
        else:
            if character == "|" and ambiguous:
                ambiguous[-1] = True
            elif character == "|":
                n_long = 0
            place, single, within = place + 1, character not in "|^$", False
        if ambiguous and single and within:
            ambiguous[-1] = True
    return "a bracket without its other half" if ambiguous else None


def _most_repeats(character: str, repeat: re.Match[str] | None) -> float:
    if repeat is None:
        return 1 if character == "?" else math.inf
    exact, most = repeat[1], repeat[3]
    return math.inf if repeat[0].endswith(",}") else int(most or exact)


def _end_of_class(pattern: str, place: int) -> int | None:
    """Where the class that begins at `place` is over; classes may lie within it."""
    depth = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            escape = _ESCAPE.match(pattern, place)
            if escape is None:
                return None
            place = escape.end()
            continue
        if character == "[":
            if (posix := re.compile(r"\[:\^?[a-z]{1,10}:\]").match(pattern, place)) is not None:
                place = posix.end()
                continue
            depth += 1
            # The first bracket of a class stands for itself.
            place += 2 if pattern[place + 1 : place + 2] == "^" else 1
            place += pattern[place : place + 1] == "]"
            if depth > 10:
                return None
            continue
        place += 1
        if character == "]":
            depth -= 1
            if depth == 0:
                return place
    return None
