"""Tokenizers: equal to the official ones on their vectors, exact in both directions, and strict about their files."""

import functools
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Package

from goslet import errors
from goslet.tokenizer import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    TrieTokenizer,
    WorldTokenizer,
    check_fits,
    load_tokenizer,
    tokenizer_from_file,
    vocabulary_from_text,
    world_tokenizer,
)

TEXTS = [
    "",
    "Once upon a time",
    "\x00\x01\t\r\n  \u00a0\u2028",
    "naïve café e\u0301",
    "Привет, 世界! 안녕 नमस्ते",
    "👩‍👩‍👧‍👦🏳️‍🌈\U0010ffff",
    "a" * 200 + " " * 200,
]


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    pytest.importorskip("pyrwkv_tokenizer", reason="the World vocabulary comes from the package pyrwkv-tokenizer")
    return world_tokenizer()


def byte_level(*, vocab_size: int = 400) -> Package:
    """A small byte-level BPE with one special token and one that is not."""
    package = Package(models.BPE())
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    package.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    package.train_from_iterator(["the goose and the gosling, the café"] * 20, trainer)
    package.add_tokens([AddedToken("  é  ", normalized=False)])
    return package


def as_file(package: Package) -> bytes:
    return package.to_str().encode("utf-8")


@pytest.fixture(scope="module")
def small() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(as_file(byte_level()))


@pytest.fixture(scope="module", params=["world", "trie", "bytes", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return BytesTokenizer()
    if request.param == "trie":
        # Every byte, two tokens of several, and a gap.
        words = {token: bytes([token - 1]) for token in range(1, 257)}
        return vocabulary_from_text(trie_text(words | {300: "é".encode(), 400: b"goose"}))
    return request.getfixturevalue({"world": "world", "hf": "small"}[request.param])


def vectors(shared_data: Path, name: str) -> list[dict]:
    with open(shared_data / "tokenizers" / f"{name}_vectors.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class TestEveryKind:
    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_undoes_encoding(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text

    def test_the_engine_form_gives_an_equal_tokenizer(self, tokenizer: Tokenizer) -> None:
        blob = tokenizer.to_bytes()
        again = load_tokenizer(tokenizer.kind, memoryview(blob))
        assert again.to_bytes() == blob
        assert (again.kind, again.vocab_size, again.end_token) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.end_token,
        )
        everything = range(tokenizer.vocab_size)
        assert [again.decode_bytes([token]) for token in everything] == [
            tokenizer.decode_bytes([token]) for token in everything
        ]
        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text)

    @pytest.mark.parametrize("bad", [-1, 1 << 24, 1 << 70, 1.0, "1", None, np.float32(1)])
    def test_an_id_outside_the_vocabulary_is_a_token_error(self, tokenizer: Tokenizer, bad: object) -> None:
        for call in (tokenizer.decode, tokenizer.decode_bytes):
            with pytest.raises(errors.TokenError, match=r"token 1: .*expected an integer from 0 to"):
                call([1, bad])  # type: ignore[list-item]

    def test_the_first_id_past_the_vocabulary_is_a_token_error(self, tokenizer: Tokenizer) -> None:
        tokenizer.decode([tokenizer.vocab_size - 1])
        with pytest.raises(errors.TokenError, match=f"found {tokenizer.vocab_size}"):
            tokenizer.decode([tokenizer.vocab_size])

    def test_numpy_integers_are_ids(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("goose")
        for dtype in (np.uint16, np.int64):
            assert tokenizer.decode(np.array(ids, dtype)) == "goose"

    def test_what_is_not_text_is_an_input_error(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(errors.InputError, match="text, character 2: holds half a surrogate pair"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(errors.InputError, match="found bytes"):
            tokenizer.encode(b"ab")  # type: ignore[arg-type]

    def test_textless_tokens_are_those_that_decode_to_nothing(self, tokenizer: Tokenizer) -> None:
        nothing = {token for token in range(tokenizer.vocab_size) if not tokenizer.decode_bytes([token])}
        assert tokenizer.textless_tokens() == nothing - {tokenizer.end_token}

    def test_a_model_with_fewer_rows_is_refused(self, tokenizer: Tokenizer) -> None:
        check_fits(tokenizer, tokenizer.vocab_size)
        check_fits(tokenizer, tokenizer.vocab_size + 1)
        with pytest.raises(errors.TokenizerError, match=f"at most {tokenizer.vocab_size - 1} ids, found"):
            check_fits(tokenizer, tokenizer.vocab_size - 1)

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_a_stream_gives_the_same_text_as_the_whole(self, tokenizer: Tokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        if data.draw(st.booleans()):
            ids += tokenizer.encode(data.draw(st.text(max_size=20)))
        assert_streams(tokenizer, ids)


def assert_streams(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        # Everything that is certain is shown at once: only an unfinished character, at most 3 bytes, is held back.
        whole = tokenizer.decode(ids[:count])
        assert whole.startswith(shown)
        assert set(whole[len(shown) :]) <= {"\ufffd"}
        assert len(whole) - len(shown) <= 1
    assert shown + stream.finish() == tokenizer.decode(ids)


class TestStream:
    """Through the raw bytes, where every byte is an id."""

    @staticmethod
    def pieces(data: bytes) -> list[str]:
        stream = BytesTokenizer().stream()
        return [*(stream.push(byte) for byte in data), stream.finish()]

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            ("aé€😀b".encode(), ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]),
            (b"\xff\x80a", ["\ufffd", "\ufffd", "a", ""]),
            (b"\xe2\x82a", ["", "", "\ufffda", ""]),
            (b"\xe2\x82\xe2\x82\xac", ["", "", "\ufffd", "", "€", ""]),
            (b"\xed\xa0\x80", ["", "\ufffd\ufffd", "\ufffd", ""]),
            (b"\xed\xbf", ["", "\ufffd\ufffd", ""]),
            (b"\xed\x9f\xbf", ["", "", "\ud7ff", ""]),
            (b"\xe0\x80", ["", "\ufffd\ufffd", ""]),
            (b"\xf4\x90", ["", "\ufffd\ufffd", ""]),
            (b"\xf0\x9f\x98", ["", "", "", "\ufffd"]),
        ],
    )
    def test_nothing_is_shown_early_or_late(self, data: bytes, expected: list[str]) -> None:
        assert self.pieces(data) == expected

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(b"a\x80\x9f\xa0\xbf\xc3\xe0\xe2\xed\xef\xf0\xf4\xff"), max_size=12).map(bytes))
    @example(b"\xed\xa0\xed\xa0\x80")
    def test_any_bytes(self, data: bytes) -> None:
        assert_streams(BytesTokenizer(), list(data))

    def test_a_refused_id_changes_nothing(self) -> None:
        stream = BytesTokenizer().stream()
        stream.push(0xC3)
        with pytest.raises(errors.TokenError):
            stream.push(256)
        assert stream.push(0xA9) == "é"

    def test_finish_begins_anew(self) -> None:
        stream = BytesTokenizer().stream()
        stream.push(0xC3)
        assert stream.finish() == "\ufffd"
        assert stream.finish() == ""
        assert stream.push(0xA9) == "\ufffd"


class TestBytes:
    def test_every_byte_is_its_own_id(self) -> None:
        tokenizer = BytesTokenizer()
        assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
        assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
        assert (tokenizer.vocab_size, tokenizer.end_token) == (256, None)

    @settings(deadline=None)
    @given(st.text())
    def test_any_text_survives(self, text: str) -> None:
        assert BytesTokenizer().decode(BytesTokenizer().encode(text)) == text

    def test_an_engine_has_nothing_to_say_about_it(self) -> None:
        with pytest.raises(errors.TokenizerError, match="should be empty"):
            load_tokenizer("bytes", b"x")


class TestWorld:
    def test_the_vectors_are_equal(self, world: WorldTokenizer, shared_data: Path) -> None:
        cases = vectors(shared_data, "world")
        assert len(cases) > 300
        for case in cases:
            assert world.encode(case["text"]) == case["ids"]
            assert world.decode(case["ids"]) == case["text"]

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=200))
    def test_any_text_survives_and_encodes_as_in_the_published_package(self, world: WorldTokenizer, text: str) -> None:
        ids = world.encode(text)
        assert world.decode(ids) == text
        assert ids == published().encode(text)

    def test_all_ids_are_accounted_for(self, world: WorldTokenizer) -> None:
        assert (world.vocab_size, world.end_token) == (65536, 0)
        contents = [world.decode_bytes([token]) for token in range(65536)]
        assert [token for token, content in enumerate(contents) if not content] == [0, *range(65530, 65536)]
        assert len(set(contents)) == 65529 + 1
        assert contents[1:257] == [bytes([byte]) for byte in range(256)]
        assert contents[65529] == b" " * 128

    def test_line_ends_make_no_difference(self, world: WorldTokenizer, tmp_path: Path, shared_data: Path) -> None:
        content = (shared_data / "tokenizers" / "rwkv_vocab_v20230424.txt").read_bytes()
        assert b"\r" not in content
        for name, form in {
            "lf.txt": content.removesuffix(b"\n"),
            "crlf.TXT": content.replace(b"\n", b"\r\n"),
        }.items():
            (tmp_path / name).write_bytes(form)
            read = tokenizer_from_file(tmp_path / name)
            assert (read.kind, read.to_bytes()) == ("world", world.to_bytes())

    def test_without_the_package_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(errors.DependencyError, match="pip install pyrwkv-tokenizer"):
            world_tokenizer()

    def test_the_package_is_found_and_not_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "pyrwkv_tokenizer"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "pyrwkv_tokenizer", raising=False)
        with pytest.raises(errors.DependencyError, match=r"no rwkv_vocab_v20230424.txt"):
            world_tokenizer()
        (folder / "rwkv_vocab_v20230424.txt").write_bytes(vocabulary_file())
        assert world_tokenizer().encode("\x02") == [3]


@functools.cache
def published() -> Any:
    import pyrwkv_tokenizer

    return pyrwkv_tokenizer.RWKVTokenizer()


@functools.cache
def vocabulary_lines() -> tuple[str, ...]:
    """A complete vocabulary that nobody uses: all bytes, then two- and three-byte strings."""
    words = [bytes([byte]) for byte in range(256)]
    words += [bytes([first, second]) for first in range(256) for second in range(254)]
    words += [bytes([first, 255, 255]) for first in range(65529 - len(words))]
    return tuple(f"{token} {word!r} {len(word)}" for token, word in enumerate(words, start=1))


def vocabulary_file(**lines: str) -> bytes:
    """The file of `vocabulary_lines`, with `line_N` replaced by its value."""
    content = list(vocabulary_lines())
    for name, line in lines.items():
        content[int(name.removeprefix("line_")) - 1] = line
    return ("\n".join(content) + "\n").encode("utf-8", errors="surrogatepass")


BAD_LINES = {
    "no id": ("b'\\x63' 1", "line 100: the id is not a number"),
    "id too large": ("16777216 b'c' 1", "line 100: the id is not a number from 0 to 16777215"),
    "id with a sign": ("+100 b'c' 1", "line 100: the id is not a number"),
    "id in other digits": ("\u0661\u0660\u0660 b'c' 1", "line 100: the id is not a number"),
    "huge id": ("9" * 4000 + " b'c' 1", "line 100: the id is not a number"),
    "id twice": ("99 b'zzz' 3", "line 100: the id 99 appears twice"),
    "token twice": ("100 'b' 1", "line 100: the token is also that of id 99"),
    "wrong length": ("100 b'c' 2", "line 100: the length is not the token's .expected 1, found '2'"),
    "length in characters": ("100 'é' 1", "line 100: the length is not the token's .expected 2"),
    "length of another form": ("100 b'c' 0x1", "line 100: the length is not the token's"),
    "huge length": ("100 b'c' " + "1" * 3000, "line 100: the length is not the token's"),
    "no length": ("100 b'c'", "line 100: the token is not a string or bytes literal"),
    "empty token": ("100 b'' 0", "line 100: the token is empty"),
    "not a literal": ("100 c 1", "line 100: the token is not a string or bytes literal"),
    "a number": ("100 5 1", "line 100: the token is not a string or bytes literal"),
    "a list": ("100 ['c'] 1", "line 100: the token is not a string or bytes literal"),
    "an open quote": ("100 'c 1", "line 100: the token is not a string or bytes literal"),
    "half a surrogate pair": ("100 '\\ud83d' 3", "line 100: the token holds half a surrogate pair"),
    "deep nesting": ("100 " + "(" * 3000 + "'c'" + ")" * 900 + " 1", "line 100: the token is not a string or bytes"),
    "long line": ("100 '" + "c" * 5000 + "' 5000", "line 100: the line is longer than 4096 characters"),
    "blank line": ("", "line 100: the id is not a number"),
    "NUL": ("100 \x00 1", "line 100: the token is not a string or bytes literal"),
}


class TestBadVocabularies:
    @pytest.mark.parametrize("case", BAD_LINES)
    def test_a_bad_line_is_named(self, case: str, tmp_path: Path) -> None:
        line, message = BAD_LINES[case]
        path = tmp_path / "vocabulary.txt"
        path.write_bytes(vocabulary_file(line_100=line))
        with pytest.raises(errors.TokenizerError, match=message) as caught:
            tokenizer_from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_good_twin_of_the_bad_files_is_read(self) -> None:
        # A string instead of bytes, and blanks at the token's ends.
        tokenizer = vocabulary_from_text(vocabulary_file(line_100="100 'c' 1", line_65529="65529 ' é ' 4"))
        assert (tokenizer.encode("b"), tokenizer.encode("c"), tokenizer.encode(" é ")) == ([99], [100], [65529])

    def test_code_is_refused_and_not_run(self, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        for form in (code, f"f'{{{code}}}'", f"[{code}, 'c'][1]", f"'c' if {code} else 'c'"):
            with pytest.raises(errors.TokenizerError, match="line 100: the token is not a string or bytes literal"):
                vocabulary_from_text(vocabulary_file(line_100=f"100 {form} 1"))
        assert not mark.exists()

    def test_an_empty_file_is_refused(self) -> None:
        with pytest.raises(errors.TokenizerError, match="the vocabulary is empty"):
            vocabulary_from_text(b"")

    def test_an_incomplete_package_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "pyrwkv_tokenizer"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "rwkv_vocab_v20230424.txt").write_bytes(b"\n".join(vocabulary_file().split(b"\n")[:65500]))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "pyrwkv_tokenizer", raising=False)
        with pytest.raises(errors.TokenizerError, match=r"incomplete.*expected 65529 tokens, found 65500"):
            world_tokenizer()

    def test_a_file_that_is_not_utf8_is_refused(self) -> None:
        with pytest.raises(errors.TokenizerError, match="offset 3: is not UTF-8"):
            vocabulary_from_text(b"1 '\xff' 1\n")

    @pytest.mark.parametrize(
        ("name", "make", "message"),
        [
            ("none.txt", lambda path: None, "cannot be read: No such file"),
            ("folder.json", Path.mkdir, "cannot be read: Is a directory"),
            ("model.bin", Path.touch, "not a tokenizer that goslet knows.*found .bin"),
            ("model", Path.touch, "found a name without an ending"),
            ("large.json", lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40), "too large"),
        ],
    )
    def test_a_file_that_cannot_be_one_is_refused(
        self, name: str, make: Callable[[Path], None], message: str, tmp_path: Path
    ) -> None:
        make(tmp_path / name)
        with pytest.raises(errors.TokenizerError, match=message) as caught:
            tokenizer_from_file(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    def test_an_unknown_kind_is_refused(self) -> None:
        with pytest.raises(
            errors.TokenizerError, match=r"unknown kind.*expected bytes, hf, trie or world, found 'sentence'"
        ):
            load_tokenizer("sentence", b"")

    def test_a_damaged_blob_is_refused(self) -> None:
        blob = vocabulary_from_text(vocabulary_file()).to_bytes()
        assert load_tokenizer("world", blob).encode("c") == [100]
        for damaged in (b"", blob[:20], blob[:-1], blob + b"\0", b"X" + blob[1:], blob[:24] + b"\xff" * 4 + blob[28:]):
            with pytest.raises(errors.TokenizerError, match=r"tokenizer: .*export the engine again"):
                load_tokenizer("world", damaged)

    def test_a_sound_blob_that_is_no_world_vocabulary_is_refused(self) -> None:
        from goslet._native import VocabularyTrie

        words = [bytes([byte]) for byte in range(256)]
        for size, first in ((65536, 1), (256, 0)):
            blob = VocabularyTrie(size, list(enumerate(words, start=first))).to_blob()
            with pytest.raises(errors.TokenizerError, match="is not a World vocabulary"):
                load_tokenizer("world", blob)


def trie_text(bytes_of_id: dict[int, bytes]) -> bytes:
    return "".join(f"{token} {content!r} {len(content)}\n" for token, content in bytes_of_id.items()).encode()


class TestOtherVocabularies:
    """In the World format, but of another size: gaps in the ids, bytes that are missing, special tokens at the end."""

    SMALL: ClassVar = {1: b"a", 2: b"b", 5: b"ab", 9: b"\xc3", 300: "é".encode()}

    def test_the_longest_match_is_taken_and_gaps_stand_for_nothing(self) -> None:
        tokenizer = vocabulary_from_text(trie_text(self.SMALL))
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_token) == ("trie", 301, 0)
        assert tokenizer.encode("abéba") == [5, 300, 2, 1]
        assert tokenizer.decode([5, 0, 300, 3, 2]) == "abéb"
        assert tokenizer.textless_tokens() == set(range(1, 301)) - set(self.SMALL)
        assert (tokenizer.n_entries, tokenizer.single_bytes()) == (5, b"ab\xc3")
        again = load_tokenizer("trie", tokenizer.to_bytes())
        assert again.to_bytes() == tokenizer.to_bytes() and again.encode("abé") == [5, 300]

    @pytest.mark.parametrize(
        ("text", "said"), [("abc", "character 2: .*found byte 0x63"), ("éèa", "character 1: .*found byte 0xa8")]
    )
    def test_a_byte_that_is_missing_is_named_when_it_is_needed(self, text: str, said: str) -> None:
        with pytest.raises(errors.InputError, match=said):
            vocabulary_from_text(trie_text(self.SMALL)).encode(text)

    def test_an_id_behind_the_last_is_a_token_error(self) -> None:
        with pytest.raises(errors.TokenError, match="found 301"):
            vocabulary_from_text(trie_text(self.SMALL)).decode([301])

    def test_id_0_may_stand_for_something(self) -> None:
        tokenizer = vocabulary_from_text(trie_text({token: bytes([token]) for token in range(256)}))
        assert (tokenizer.vocab_size, tokenizer.end_token) == (256, None)
        assert tokenizer.encode("\x00é") == [0, 0xC3, 0xA9]
        assert tokenizer.textless_tokens() == frozenset()

    def test_the_worlds_vocabulary_with_tokens_more_or_less_is_not_the_worlds(self) -> None:
        whole = vocabulary_from_text(vocabulary_file())
        assert isinstance(whole, WorldTokenizer)
        more = vocabulary_from_text(vocabulary_file() + b"65530 '<|im_start|>' 12\n")
        assert isinstance(more, TrieTokenizer) and (more.kind, more.vocab_size) == ("trie", 65531)
        assert more.encode("<|im_start|>") == [65530]
        less = vocabulary_from_text(b"\n".join(vocabulary_file().split(b"\n")[:65500]))
        assert (less.kind, less.vocab_size) == ("trie", 65501)


class TestHuggingFace:
    def test_the_vectors_are_equal(self, shared_data: Path) -> None:
        tokenizer = tokenizer_from_file(shared_data / "tokenizers" / "20B_tokenizer.json")
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_token) == ("hf", 50277, 0)
        cases = vectors(shared_data, "neox20b")
        assert len(cases) > 300
        package = Package.from_file(str(shared_data / "tokenizers" / "20B_tokenizer.json"))
        for case in cases:
            assert tokenizer.encode(case["text"]) == case["ids"]
            assert tokenizer.decode(case["ids"]) == package.decode(case["ids"])

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_any_ids_decode_as_in_the_package(self, small: HuggingFaceTokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=20))
        package = Package.from_str(small.to_bytes().decode())
        # The package reads the letter of an added token as a byte when the alphabet has it; we keep the token's text.
        assume(package.token_to_id("  é  ") not in ids)
        assert small.decode(ids) == package.decode(ids)

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def test_any_text_survives(self, small: HuggingFaceTokenizer, text: str) -> None:
        assert small.decode(small.encode(text)) == text

    def test_every_byte_has_an_exact_token(self, small: HuggingFaceTokenizer) -> None:
        alphabet = [small.decode_bytes([token]) for token in range(1, 257)]
        assert sorted(alphabet) == [bytes([byte]) for byte in range(256)]

    @pytest.mark.parametrize("text", ["<|endoftext|>", "the goose<|endoftext|> and", "<|endoftext|><|endoftext|>"])
    def test_text_that_spells_a_special_token_stays_text(self, small: HuggingFaceTokenizer, text: str) -> None:
        ids = small.encode(text)
        assert small.end_token == 0
        assert 0 not in ids
        assert small.decode(ids) == text

    def test_special_tokens_show_nothing(self, small: HuggingFaceTokenizer) -> None:
        assert small.decode([*small.encode("a"), 0, *small.encode("b")]) == "ab"

    def test_special_tokens_spelled_in_text_are_text_in_the_published_vocabulary_too(self, shared_data: Path) -> None:
        tokenizer = tokenizer_from_file(shared_data / "tokenizers" / "20B_tokenizer.json")
        text = "a <|endoftext|> b <|padding|>"
        assert not {0, 1} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.textless_tokens() == {1}

    def test_added_tokens_keep_their_text(self, small: HuggingFaceTokenizer) -> None:
        ids = small.encode("a  é  b")
        assert ids[1] == small.vocab_size - 1
        assert small.decode(ids) == "a  é  b"

    def test_without_an_end_of_text_there_is_no_end(self) -> None:
        package = byte_level()
        content = package.to_str().replace("<|endoftext|>", "<s>")
        assert HuggingFaceTokenizer(content.encode()).end_token is None

    def test_nothing_is_added_cut_or_padded(self) -> None:
        package = byte_level()
        package.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        package.enable_truncation(3)
        package.enable_padding(length=50)
        tokenizer = HuggingFaceTokenizer(as_file(package))
        text = "the goose and the gosling"
        assert 0 not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("x")) == 1

    @pytest.mark.parametrize("name", ["NFC", "NFD", "NFKC", "NFKD"])
    def test_a_normalizer_of_unicode_keeps_its_say(self, name: str) -> None:
        package = byte_level()
        package.normalizer = getattr(normalizers, name)()
        tokenizer = HuggingFaceTokenizer(as_file(package))
        for text in ("e\u0301", "é", "ﬁ"):
            assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize(name, text)
        assert len(tokenizer.decode(tokenizer.encode("\ufdfa" * 100))) <= 18 * 100  # the longest that one may become

    @pytest.mark.parametrize(
        "normalizer",
        [
            normalizers.Replace("a", "a" * 1000),
            normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 3),
            normalizers.Sequence([normalizers.NFC()]),
            normalizers.Prepend("▁"),
            normalizers.Lowercase(),
        ],
        ids=str,
    )
    def test_other_normalizers_are_refused_before_they_see_text(self, normalizer: Any, tmp_path: Path) -> None:
        package = byte_level(vocab_size=260)
        package.normalizer = normalizer
        path = tmp_path / "tokenizer.json"
        path.write_bytes(as_file(package))
        with pytest.raises(errors.TokenizerError, match=f"normalizer: .*NFKD, found {type(normalizer).__name__}"):
            tokenizer_from_file(path)

    def test_ids_left_out_are_valid_and_empty(self) -> None:
        content = json.loads(byte_level(vocab_size=257).to_str())
        content["model"]["vocab"]["zz"] = 300
        content["added_tokens"] = content["added_tokens"][:1]
        tokenizer = HuggingFaceTokenizer(json.dumps(content).encode())
        assert tokenizer.vocab_size == 301
        assert tokenizer.textless_tokens() == set(range(257, 300))
        assert [tokenizer.decode_bytes([token]) for token in (299, 300)] == [b"", b"zz"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not a tokenizer.json"),
            (b"{}", "is not a tokenizer.json"),
            (b"\xff", "is not a tokenizer.json"),
            (b"[" * 100_000, "is not a tokenizer.json"),
            (as_file(Package(models.WordLevel({"a": 0}, "a"))), "decoder: its tokens are not byte strings"),
        ],
        ids=["empty", "no keys", "not UTF-8", "deep", "no decoder"],
    )
    def test_a_file_that_cannot_be_one_is_refused(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(errors.TokenizerError, match=message) as caught:
            tokenizer_from_file(path)
        assert str(path) in str(caught.value)
        with pytest.raises(errors.TokenizerError, match=message):
            load_tokenizer("hf", content)

    def test_a_decoder_on_characters_is_refused(self) -> None:
        package = byte_level()
        package.decoder = decoders.Metaspace()
        with pytest.raises(errors.TokenizerError, match="expected ByteLevel, found Metaspace"):
            HuggingFaceTokenizer(as_file(package))

    def test_a_failure_of_the_package_is_a_tokenizer_error(
        self, small: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class PanicException(BaseException):  # as the package calls it, which is no Exception
            pass

        class Failing:
            def __init__(self, error: BaseException) -> None:
                self.error = error

            def encode(self, text: str, add_special_tokens: bool) -> None:
                raise self.error

        for error in (ValueError("no"), PanicException("no")):
            monkeypatch.setattr(small, "_tokenizer", Failing(error))
            with pytest.raises(errors.TokenizerError, match="the tokenizer failed: no"):
                small.encode("z")
        monkeypatch.setattr(small, "_tokenizer", Failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            small.encode("z")

    def test_an_absurd_id_is_refused_before_it_costs_memory(self) -> None:
        content = json.loads(byte_level(vocab_size=257).to_str())
        content["model"]["vocab"]["zz"] = (1 << 32) - 1
        with pytest.raises(errors.TokenizerError, match=r"is not an id.*found 4294967295"):
            HuggingFaceTokenizer(json.dumps(content).encode())

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_a_mutated_file_is_refused_or_still_works(self, data: st.DataObject) -> None:
        package = byte_level(vocab_size=260)
        package.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        content = bytearray(as_file(package))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0129az"{}[],:-+\\ '))
        try:
            tokenizer = HuggingFaceTokenizer(bytes(content))
        except errors.TokenizerError:
            return
        tokenizer.decode(tokenizer.encode("the goose  and"))
