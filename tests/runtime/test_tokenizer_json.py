"""Which tokenizer.json is taken: the forms that models are published with, and nothing that goslet does not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Package
from tokenizers import pre_tokenizers

from goslet.errors import NotByteLevelError, TokenizerError
from goslet.tokenizer import HuggingFaceTokenizer
from goslet.tokenizer_json import BYTE_OF_CHARACTER, checked_tokenizer_json, pattern_problem

Content = dict[str, Any]
Edit = Callable[[Content], None]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# As models are published with: Llama 3, Qwen 2, o200k, DeepSeek V3 (its first alternative shortened), Falcon.
PATTERNS = {
    "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "falcon": "[0-9][0-9][0-9]",
    "threes": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\D+",
    "classes": r" ?[\p{L}&&[^\p{Han}]]+|\p{Han}+|[[:space:]]+|[^]a]|.",
}


def content(**changes: Any) -> Content:
    """A small tokenizer of GPT-2's form."""
    vocab = {character: index for index, character in enumerate(BYTE_OF_CHARACTER)}
    vocab |= {"Ġt": 256, "he": 257, "Ġthe": 258}
    made: Content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 259, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True},
        ],
        "normalizer": None,
        "pre_tokenizer": {**BYTE_LEVEL, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": ["Ġ t", "h e", "Ġt he"],
        },
    }  # fmt: skip
    return {**made, **changes}


def split(pattern: dict[str, str], behavior: str = "Isolated", invert: bool = False) -> Content:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*parts: Content) -> Content:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def taken(value: Content) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(value).encode(), "tokenizer.json")


GOOD: dict[str, Content] = {
    "GPT-2": content(),
    "GPT-2's old form": content(model={**{k: v for k, v in content()["model"].items() if k != "type"},
                                       "merges": ["#version: 0.2", "Ġ t", "h e", "Ġt he"]}),
    "pairs": content(model={**content()["model"], "merges": [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]}),
    "NFC": content(normalizer={"type": "NFC"}),
    "nothing but what is needed": {
        "model": {"type": "BPE", "vocab": content()["model"]["vocab"], "merges": content()["model"]["merges"]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
    },
    **{name: content(pre_tokenizer=sequence(split({"Regex": pattern}), BYTE_LEVEL))
       for name, pattern in PATTERNS.items()},
    "StarCoder": content(pre_tokenizer=sequence({"type": "Digits", "individual_digits": True},
                                                {**BYTE_LEVEL, "use_regex": True})),
    "Falcon": content(pre_tokenizer=sequence({"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL,
                                             {"type": "Digits", "individual_digits": False},
                                             split({"Regex": "[0-9][0-9][0-9]"}))),
    "from tiktoken": content(pre_tokenizer=sequence(split({"Regex": PATTERNS["llama"]}, "Removed", True), BYTE_LEVEL)),
    "a literal": content(pre_tokenizer=sequence(split({"String": " ("}, "MergedWithNext"), BYTE_LEVEL)),
    "what never reaches the package": content(
        truncation={"max_length": 5, "anything": [1e308]}, padding={"length": 7}, post_processor={"type": "Other"}
    ),
    "no dropout": content(model={**content()["model"], "dropout": 0.0}),
    "unknown tokens that never come up": content(
        model={**content()["model"], "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    ),
}  # fmt: skip

# The package itself needs more fields, or cuts at these.
NOT_THE_PACKAGES = ("nothing but what is needed", "what never reaches the package")
TEXT = "The  theory,\r\n\n isn't  12345 (of) 漢字 ﬁ é\u0301 \u00a0x\t  "


@pytest.mark.parametrize("name", GOOD)
def test_a_published_form_is_taken_and_loses_nothing(name: str) -> None:
    tokenizer = taken(GOOD[name])
    text = TEXT if name != "NFC" else "The  theory 12345\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" the")) == 1


@settings(max_examples=150, deadline=None)
@given(st.text(), st.sampled_from([name for name in GOOD if name != "NFC"]))
def test_any_text_survives(text: str, name: str) -> None:
    tokenizer = taken(GOOD[name])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [name for name in GOOD if name not in NOT_THE_PACKAGES])
def test_ids_are_the_packages(name: str) -> None:
    package = Package.from_str(json.dumps(GOOD[name]))
    assert taken(GOOD[name]).encode(TEXT) == package.encode(TEXT, add_special_tokens=False).ids


def test_published_files_are_taken(repository: Path) -> None:
    data = (repository / "runtime" / "demo" / "tokenizer.json").read_bytes()
    assert HuggingFaceTokenizer(data).encode(TEXT) == Package.from_str(data.decode()).encode(TEXT).ids


# ------------------------------------------------------------------------------------------------------------ refusals


def put(*path: str | int, value: Any) -> Edit:
    def edit(made: Content) -> None:
        at: Any = made
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


OTHER_KINDS: dict[str, tuple[Edit, str]] = {
    "WordLevel": (put("model", "type", value="WordLevel"), "model.type: .*expected BPE, found WordLevel"),
    "Unigram": (put("model", value={"type": "Unigram", "vocab": []}), "model.type: .*found Unigram"),
    "Llama 2": (put("normalizer", value={"type": "Sequence", "normalizers": []}), "normalizer: .*found Sequence"),
    "lower case": (put("normalizer", value={"type": "Lowercase"}), "normalizer: .*found Lowercase"),
    "bytes by the normalizer": (put("normalizer", value={"type": "ByteLevel"}), "normalizer: .*found ByteLevel"),
    "no decoder": (put("decoder", value=None), "decoder: .*expected ByteLevel, found none"),
    "Metaspace behind": (put("decoder", value={"type": "Metaspace"}), "decoder: .*found Metaspace"),
    "no pre-tokenizer": (put("pre_tokenizer", value=None), "pre_tokenizer: .*spaces and bytes could be lost.*none"),
    "Whitespace": (put("pre_tokenizer", value={"type": "Whitespace"}), "pre_tokenizer: .*found Whitespace"),
    "Metaspace": (put("pre_tokenizer", value={"type": "Metaspace"}), "pre_tokenizer: .*found Metaspace"),
    "a Sequence without bytes": (
        put("pre_tokenizer", value=sequence({"type": "Digits"})),
        r"pre_tokenizer: .*found a Sequence of \['Digits'\]",
    ),
    "bytes twice": (put("pre_tokenizer", value=sequence(BYTE_LEVEL, BYTE_LEVEL)), "pre_tokenizer: "),
    "bytes and Whitespace": (
        put("pre_tokenizer", value=sequence({"type": "WhitespaceSplit"}, BYTE_LEVEL)),
        r"pretokenizers\[0\]: may lose spaces and bytes .*found WhitespaceSplit",
    ),
    "a Sequence in a Sequence": (
        put("pre_tokenizer", value=sequence(sequence(), BYTE_LEVEL)), r"pretokenizers\[0\]: .*found Sequence"
    ),
    "what is split off is removed": (
        put("pre_tokenizer", value=sequence(split({"String": " "}, "Removed"), BYTE_LEVEL)),
        r"pretokenizers\[0\].behavior: removes characters",
    ),
    "a prefix of subwords": (put("model", "continuing_subword_prefix", value="##"), "continuing_subword_prefix: "),
    "a suffix of words": (put("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix: "),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_another_kind_is_refused_as_such(name: str) -> None:
    edit, message = OTHER_KINDS[name]
    made = copy.deepcopy(content())
    edit(made)
    with pytest.raises(NotByteLevelError, match=message) as caught:
        taken(made)
    assert str(caught.value).startswith("tokenizer.json: ")
    assert "use a byte-level tokenizer, or none and token ids" in str(caught.value)


# A harmless one in every object that the package reads.
PLACES: dict[str, Content] = {
    "tokenizer.json": content(),
    "added_tokens[0]": content(),
    "normalizer": content(normalizer={"type": "NFC"}),
    "pre_tokenizer": content(),
    "pre_tokenizer.pretokenizers[0]": content(pre_tokenizer=sequence(split({"String": "a"}), BYTE_LEVEL)),
    "pre_tokenizer.pretokenizers[0].pattern": content(pre_tokenizer=sequence(split({"String": "a"}), BYTE_LEVEL)),
    "pre_tokenizer.pretokenizers[1]": content(pre_tokenizer=sequence({"type": "Digits"}, BYTE_LEVEL)),
    "decoder": content(),
    "model": content(),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_is_refused_by_name(place: str) -> None:
    made = copy.deepcopy(PLACES[place])
    taken(made)
    at: Any = made
    if place != "tokenizer.json":
        for key in place.replace("[", ".").replace("]", "").split("."):
            at = at[int(key) if key.isdigit() else key]
    at["note"] = "harmless"
    with pytest.raises(TokenizerError, match="note: is not a field that goslet knows") as caught:
        taken(made)
    assert place in str(caught.value)
    assert not isinstance(caught.value, NotByteLevelError)


BAD_VALUES: dict[str, tuple[Edit, str]] = {
    "version": (put("version", value="2.0"), "version: is not a known version .expected 1.0, found 2.0"),
    "dropout": (put("model", "dropout", value=0.1), "model.dropout: makes the ids of a text random"),
    "dropout true": (put("model", "dropout", value=True), "model.dropout: "),
    "a flag as a number": (put("model", "fuse_unk", value=1), "model.fuse_unk: is not a truth value"),
    "vocab a list": (put("model", "vocab", value=[]), "model.vocab: is not an object of tokens"),
    "an id below zero": (put("model", "vocab", "a", value=-1), "model.vocab, a: is not an id"),
    "an id as a float": (put("model", "vocab", "a", value=1.0), "model.vocab, a: is not an id"),
    "an id true": (put("model", "vocab", "a", value=True), "model.vocab, a: is not an id"),
    "an id twice": (put("model", "vocab", "zz", value=0), "model.vocab: gives an id to two tokens"),
    "a token too long": (put("model", "vocab", "a" * 5000, value=300), "model.vocab, id 300: is too long"),
    "merges an object": (put("model", "merges", value={}), "model.merges: is not a list"),
    "a merge of three": (put("model", "merges", 1, value=["a", "b", "c"]), r"merges\[1\]: is not a pair"),
    "a merge of nothing": (put("model", "merges", 1, value=["", "he"]), r"merges\[1\]: is not a pair"),
    "a merge of numbers": (put("model", "merges", 1, value=[1, 2]), r"merges\[1\]: is not a pair"),
    "a merge of strangers": (put("model", "merges", 1, value="zz y"), r"merges\[1\]: joins what is not in the vocab"),
    "a merge to a stranger": (put("model", "merges", 1, value="h t"), r"merges\[1\]: joins what is not in the vocab"),
    "half a surrogate pair": (put("model", "vocab", "\ud800", value=300), "holds half a surrogate pair"),
    "added tokens an object": (put("added_tokens", value={}), "added_tokens: is not a list"),
    "an added token as text": (put("added_tokens", 0, value="x"), r"added_tokens\[0\]: is not an object"),
    "an added id too large": (put("added_tokens", 0, "id", value=1 << 40), r"added_tokens\[0\].id: is not an id"),
    "an added flag": (put("added_tokens", 0, "special", value="yes"), r"added_tokens\[0\].special: is not a truth"),
    "spaces lost": (
        put("added_tokens", 0, value={"id": 259, "content": "x", "special": False, "lstrip": True}),
        r"added_tokens\[0\].lstrip: loses the spaces",
    ),
    "no word on the first space": (
        put("pre_tokenizer", value={"type": "ByteLevel"}), "pre_tokenizer.add_prefix_space: is missing"
    ),
    "an empty pattern": (
        put("pre_tokenizer", value=sequence(split({"String": ""}), BYTE_LEVEL)), "pattern: is not a pattern"
    ),
    "two patterns": (
        put("pre_tokenizer", value=sequence(split({"String": "a", "Regex": "a"}), BYTE_LEVEL)), "is not one pattern"
    ),
    "a pattern that looks back": (
        put("pre_tokenizer", value=sequence(split({"Regex": "(?<=a)b"}), BYTE_LEVEL)), "could take forever: a group"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_refused_by_name(name: str) -> None:
    edit, message = BAD_VALUES[name]
    made = copy.deepcopy(content())
    edit(made)
    with pytest.raises(TokenizerError, match=message):
        taken(made)


def test_bytes_that_are_missing_need_a_token_for_the_unknown() -> None:
    made = copy.deepcopy(content())
    del made["model"]["vocab"]["z"]
    assert taken(made).encode("az") == taken(made).encode("a")
    made["model"]["unk_token"] = "<none>"
    with pytest.raises(TokenizerError, match=r"model.unk_token: is not in the vocabulary"):
        taken(made)
    made["model"]["unk_token"] = "a"
    assert taken(made).encode("z") == taken(made).encode("a")
    made["model"]["byte_fallback"] = True
    with pytest.raises(NotByteLevelError, match=r"model.byte_fallback"):
        taken(made)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_published_pattern_is_taken(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a|b)*", "(?:a?b)+", "(a*)*", "((a+))+", "(?:(?:a+)?b){2}", "(a{2,3})*"),
        *(
            "a+b+c+d+",
            "a*a*a*a*",
            "a{1,5000}",
            "(?<=a)b",
            "(?<!a)b",
            "(?<name>a)",
            "(?(1)a)",
            r"(a)\1",
            r"\k<a>",
            r"\g<0>",
        ),
        *("a**", "*a", "a{", "a{x}", "(", ")", "(a", "[a", r"[\q]", r"\q", "(?#a)", r"\p{L", "(" * 30 + ")" * 30),
    ],
)
def test_a_pattern_that_may_take_forever_is_refused(pattern: str) -> None:
    assert pattern_problem(pattern) is not None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=r"ab\psSL{}[]()?*+|^-:!1,3 ", max_size=30))
def test_a_pattern_that_is_taken_is_read_by_the_package_or_refused_by_it(pattern: str) -> None:
    if pattern and pattern_problem(pattern) is None:
        try:
            taken(content(pre_tokenizer=sequence(split({"Regex": pattern}), BYTE_LEVEL))).encode("aab  ab1L")
        except TokenizerError as error:
            assert "is not a tokenizer.json" in str(error)


def test_what_the_package_is_given_is_written_anew() -> None:
    made = json.loads(checked_tokenizer_json(json.dumps(GOOD["what never reaches the package"]).encode()))
    assert set(made) == {"version", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model"}
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(BYTE_OF_CHARACTER)


def test_an_absurdly_large_file_is_refused_before_it_is_read() -> None:
    with pytest.raises(TokenizerError, match="too large"):
        checked_tokenizer_json(b" " * ((64 << 20) + 1))
    with pytest.raises(TokenizerError, match="too many values"):
        checked_tokenizer_json(b"[" * ((16 << 20) + 1))
