"""Text to token ids and back: vocabularies in the RWKV World format, Hugging Face's ``tokenizer.json`` and raw bytes.

Every tokenizer here works on bytes, so that each id stands for fixed bytes whatever stands beside it. Decoding whole
and decoding piece by piece therefore give the same text, and a character that two ids share is never shown in halves.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import importlib.util
import operator
import os
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from ._native import VocabularyTrie
from .errors import DependencyError, InputError, TokenError, TokenizerError
from .output import Path
from .spec import MAX_VOCAB_SIZE
from .tokenizer_json import BYTE_OF_CHARACTER, MAX_FILE_BYTES, checked_tokenizer_json

if TYPE_CHECKING:
    import tokenizers

WORLD_VOCAB_SIZE = 65536
WORLD_LAST_ID = 65529
END_OF_TEXT = "<|endoftext|>"

_WORLD_FILE = "rwkv_vocab_v20230424.txt"
_MAX_LINE_CHARACTERS = 4096
_AGAIN = "get the file again"


class StreamDecoder:
    """Turns ids into text one at a time, holding back the bytes of a character until it is complete.

    What the calls return, joined, equals `Tokenizer.decode` of all the ids at once: bytes that are not UTF-8 become
    U+FFFD, as soon as they are known not to be.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps none.

        Raises:
            TokenError: the id is outside the vocabulary; the stream goes on as if it had not been pushed.
        """
        text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
        held = self._decoder.getstate()[0]
        # Python waits for a third byte after these two, which no character begins with (they spell half a surrogate).
        if len(held) == 2 and held[0] == 0xED and held[1] >= 0xA0:
            text += self._decoder.decode(b"", final=True)
        return text

    def finish(self) -> str:
        """What is still held back, as U+FFFD; the decoder can then begin a new text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: the name by which an engine file records this kind of tokenizer.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids go from 0 up to, and without, this."""

    @property
    @abstractmethod
    def end_token(self) -> int | None:
        """The id that ends a document, if there is one."""

    @abstractmethod
    def textless_tokens(self) -> frozenset[int]:
        """The ids that stand for no bytes, `end_token` excepted: nothing that is written can need them."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added.

        Text is text: where it spells a special token such as ``<|endoftext|>``, it is encoded by its letters.

        Raises:
            InputError: `text` is not a string, or holds half a surrogate pair, which is no text, or a byte that the
                vocabulary has no token for.
            TokenizerError: the package behind a ``tokenizer.json`` failed.
        """
        if not isinstance(text, str):
            raise InputError("is not text", place="text", expected="str", found=type(text).__name__)
        try:
            utf8 = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                "holds half a surrogate pair", place=f"text, character {error.start}", remedy="repair the text"
            ) from None
        return self._encode(text, utf8)

    @abstractmethod
    def _encode(self, text: str, utf8: bytes) -> list[int]:
        """The ids of a text given in both forms."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids; special ids and those that stand for nothing give none.

        Raises:
            TokenError: an id is not an integer or is outside the vocabulary; its position is named.
        """
        return self._decode_bytes(self._checked(ids))

    @abstractmethod
    def _decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of ids that are within the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, with U+FFFD for bytes that are not UTF-8.

        Raises:
            TokenError: an id is not an integer or is outside the vocabulary; its position is named.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    @abstractmethod
    def to_bytes(self) -> bytes:
        """What `load_tokenizer` reads back, with this `kind`, to an equal tokenizer."""

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = []
        size = self.vocab_size
        for position, token in enumerate(ids):
            try:
                value = operator.index(token)
            except TypeError:
                value = -1
            if not 0 <= value < size:
                raise TokenError(
                    "is not a token of this vocabulary",
                    place=f"token {position}",
                    expected=f"an integer from 0 to {size - 1}",
                    found=repr(token)[:50],
                )
            checked.append(value)
        return checked


class BytesTokenizer(Tokenizer):
    """Every byte of the UTF-8 text is a token; nothing ends a document."""

    kind = "bytes"

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    @property
    def end_token(self) -> int | None:
        """None."""
        return None

    def textless_tokens(self) -> frozenset[int]:
        """None of them."""
        return frozenset()

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        return list(utf8)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)

    def to_bytes(self) -> bytes:
        """Nothing: there is nothing to know."""
        return b""


class TrieTokenizer(Tokenizer):
    """A vocabulary of byte strings in the World format, of any size: greedy longest match.

    Ids that stand for nothing decode to no bytes, and encoding never gives them. Id 0 ends a document where it is one
    of them, as in RWKV's own vocabularies.

    Source: the published format of ``rwkv_vocab_v20230424.txt``.
    """

    kind = "trie"

    def __init__(self, trie: VocabularyTrie) -> None:
        self._trie = trie

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that stands for something; 65536 in the World vocabulary."""
        return self._trie.vocab_size

    @property
    def n_entries(self) -> int:
        """How many ids stand for something."""
        return self._trie.n_entries

    def single_bytes(self) -> bytes:
        """The bytes that are a token by themselves: with all 256 of them every text has ids."""
        return bytes(byte for byte in range(256) if self._trie.encode(bytes([byte]))[1])

    @property
    def end_token(self) -> int | None:
        """0, unless that stands for something."""
        return None if self._trie.token_bytes(0) else 0

    def textless_tokens(self) -> frozenset[int]:
        """The ids that stand for nothing, 0 excepted."""
        return frozenset(token for token in range(1, self.vocab_size) if not self._trie.token_bytes(token))

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        ids, matched_bytes = self._trie.encode(utf8)
        if matched_bytes < len(utf8):
            raise InputError(
                "the vocabulary has no token that begins with this byte",
                place=f"text, character {len(utf8[:matched_bytes].decode('utf-8', errors='ignore'))}",
                found=f"byte 0x{utf8[matched_bytes]:02x}",
                remedy="leave it out of the text, or use the vocabulary that the model was trained with",
            )
        return ids

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return self._trie.decode(ids)

    def to_bytes(self) -> bytes:
        """The compact form that csrc/vocabulary_trie.h describes."""
        return self._trie.to_blob()


class WorldTokenizer(TrieTokenizer):
    """The RWKV World vocabulary: 65529 byte strings, all 256 single bytes among them, so that every text has ids.

    All 65536 ids of a World model are valid. Id 0 ends a document; it and the unused ids 65530 to 65535 decode to no
    bytes, and encoding never gives them.

    Raises:
        TokenizerError: the trie is not such a vocabulary.
    """

    kind = "world"

    def __init__(self, trie: VocabularyTrie, file: Path | None = None) -> None:
        if not _is_world(trie):
            raise TokenizerError(
                "is not a World vocabulary",
                file=file,
                expected=f"ids 1 to {WORLD_LAST_ID} of {WORLD_VOCAB_SIZE}, and every single byte",
                found=f"{trie.n_entries} ids of {trie.vocab_size}",
                remedy=_AGAIN,
            )
        super().__init__(trie)


def _is_world(trie: VocabularyTrie) -> bool:
    unused = (0, *range(WORLD_LAST_ID + 1, WORLD_VOCAB_SIZE))
    return (
        trie.vocab_size == WORLD_VOCAB_SIZE
        and trie.n_entries == WORLD_LAST_ID
        and not any(trie.token_bytes(token) for token in unused)
        and all(trie.encode(bytes([byte]))[1] for byte in range(256))
    )


def vocabulary_from_text(data: bytes, file: Path | None = None) -> TrieTokenizer:
    """Read a vocabulary in the World format: lines of an id, a Python string or bytes literal and its length in bytes.

    Args:
        data: the file's content, UTF-8, with LF or CRLF ends.
        file: its name, for errors.

    Raises:
        TokenizerError: a line is not of this form, an id or a byte string appears twice, or there is none.
    """
    return vocabulary_of(_parse_vocabulary(data, file), file)


def vocabulary_of(bytes_of_id: Mapping[int, bytes], file: Path | None = None) -> TrieTokenizer:
    """The tokenizer of a vocabulary: a `WorldTokenizer` where it is of that size and complete.

    Args:
        bytes_of_id: the byte string of every id that stands for something.
        file: the file that it comes from, for errors.

    Raises:
        TokenizerError: there is none, or one is empty, too long or under two ids.
    """
    if not bytes_of_id:
        raise TokenizerError("the vocabulary is empty", file=file, expected="an id on every line", remedy=_AGAIN)
    vocab_size = max(bytes_of_id) + 1
    entries = list(bytes_of_id.items())
    try:
        if vocab_size == WORLD_LAST_ID + 1 and _is_world(world := VocabularyTrie(WORLD_VOCAB_SIZE, entries)):
            return WorldTokenizer(world, file)
        return TrieTokenizer(VocabularyTrie(vocab_size, entries))
    except ValueError as error:
        raise TokenizerError(str(error), file=file, remedy=_AGAIN) from None


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` whose tokens are byte strings (decoder ``ByteLevel``), run by the package `tokenizers`.

    `goslet.tokenizer_json` says which files are taken, and what of them the package is given. Truncation, padding and
    post-processor are not: a prompt is fed as it stands, without special tokens even where it spells one. Tokens that
    the file marks as special decode to no bytes. What the file's normalizer changes stays changed, and bytes that its
    vocabulary lacks are left out when it names no unknown token: both as that package does.

    Args:
        data: the file's content.
        file: its name, for errors.

    Raises:
        NotByteLevelError: its tokens are not byte strings, or it would lose some of the text.
        TokenizerError: it cannot be read, or holds what goslet does not know.
    """

    kind = "hf"

    def __init__(self, data: bytes, file: Path | None = None) -> None:
        self._data = bytes(data)
        self._file = file
        self._tokenizer = _parse_hugging_face(self._data, file)
        self._added = self._tokenizer.get_added_tokens_decoder()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self._vocab_size = max(ids, default=-1) + 1
        if not 0 < self._vocab_size <= MAX_VOCAB_SIZE:
            raise TokenizerError(
                "has a wrong number of tokens", file=file, expected=f"1 to {MAX_VOCAB_SIZE}", found=self._vocab_size
            )
        self._end_token: int | None = self._tokenizer.token_to_id(END_OF_TEXT)
        self._bytes_of_id: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; ids that the file leaves out below it decode to no bytes."""
        return self._vocab_size

    @property
    def end_token(self) -> int | None:
        """The id of ``<|endoftext|>``, if the file has it."""
        return self._end_token

    def textless_tokens(self) -> frozenset[int]:
        """The ids that the file leaves out below `vocab_size`, and its special tokens."""
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        unused = set(range(self._vocab_size)).difference(known.values())
        empty = {token for token in (*self._added, known.get("")) if token is not None and not self._token_bytes(token)}
        return frozenset((unused | empty) - {self._end_token})

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        with _package_errors("the tokenizer failed", self._file):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join([self._token_bytes(token) for token in ids])

    def _token_bytes(self, token: int) -> bytes:
        known = self._bytes_of_id.get(token)
        if known is None:
            if (added := self._added.get(token)) is not None:
                known = b"" if added.special else added.content.encode("utf-8")
            else:
                known = _byte_level_bytes(self._tokenizer.id_to_token(token) or "")
            self._bytes_of_id[token] = known
        return known

    def to_bytes(self) -> bytes:
        """The file as it was read."""
        return self._data


def load_tokenizer(kind: str, blob: bytes | memoryview, file: Path | None = None) -> Tokenizer:
    """The tokenizer whose `kind` and `to_bytes` an engine file records.

    Args:
        kind: its kind.
        blob: what `Tokenizer.to_bytes` gave.
        file: the engine file, for errors.

    Raises:
        TokenizerError: the kind is unknown or the bytes are not what it writes.
    """
    if kind in (WorldTokenizer.kind, TrieTokenizer.kind):
        try:
            trie = VocabularyTrie.from_blob(blob)
        except ValueError as error:
            raise TokenizerError(str(error), file=file, place="tokenizer", remedy="export the engine again") from None
        return WorldTokenizer(trie, file) if kind == WorldTokenizer.kind else TrieTokenizer(trie)
    if kind == HuggingFaceTokenizer.kind:
        return HuggingFaceTokenizer(bytes(blob), file)
    if kind == BytesTokenizer.kind:
        if len(blob):
            raise TokenizerError(
                "should be empty", file=file, place="tokenizer", expected="0 bytes", found=f"{len(blob)} bytes"
            )
        return BytesTokenizer()
    raise TokenizerError(
        "is of an unknown kind",
        file=file,
        place="tokenizer",
        expected="bytes, hf, trie or world",
        found=repr(kind)[:50],
        remedy="install a newer goslet",
    )


def tokenizer_from_file(path: Path) -> Tokenizer:
    """Read a vocabulary in the World format (``.txt``) or a Hugging Face ``tokenizer.json`` (``.json``).

    Raises:
        NotByteLevelError: a ``tokenizer.json`` whose tokens are not byte strings.
        TokenizerError: the file is missing, unreadable, too large, of neither kind or malformed.
    """
    suffix = pathlib.PurePath(path).suffix.lower()
    if suffix == ".txt":
        return vocabulary_from_text(_read(path), path)
    if suffix == ".json":
        return HuggingFaceTokenizer(_read(path), path)
    raise TokenizerError(
        "is not a tokenizer that goslet knows",
        file=path,
        expected="a World vocabulary (.txt) or tokenizer.json (.json)",
        found=suffix or "a name without an ending",
        remedy="world and bytes are names of tokenizers that goslet has",
    )


def world_tokenizer() -> WorldTokenizer:
    """The World vocabulary of the installed package pyrwkv-tokenizer, which is not imported.

    Raises:
        DependencyError: the package is not installed, or does not hold the vocabulary.
        TokenizerError: its vocabulary is malformed or incomplete.
    """
    spec = importlib.util.find_spec("pyrwkv_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = os.path.join(folder, _WORLD_FILE)
        if os.path.isfile(path):
            tokenizer = vocabulary_from_text(_read(path), path)
            if not isinstance(tokenizer, WorldTokenizer):
                raise TokenizerError(
                    "the vocabulary is incomplete",
                    file=path,
                    expected=f"{WORLD_LAST_ID} tokens",
                    found=tokenizer.n_entries,
                    remedy="pip install --force-reinstall pyrwkv-tokenizer",
                )
            return tokenizer
    raise DependencyError(
        "the World vocabulary is not installed",
        place="package pyrwkv-tokenizer",
        found="not installed" if spec is None else f"no {_WORLD_FILE}",
        remedy="pip install pyrwkv-tokenizer, or give the vocabulary file",
    )


def check_fits(tokenizer: Tokenizer, vocab_size: int, file: Path | None = None) -> None:
    """Refuse a tokenizer that can give ids that a model has no row for.

    Args:
        tokenizer: the tokenizer.
        vocab_size: V, rows of the model's embedding.
        file: the engine file that holds both, for errors.

    Raises:
        TokenizerError: its vocabulary is larger.
    """
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            "the tokenizer's vocabulary is larger than the model's",
            file=file,
            place=f"tokenizer of kind {tokenizer.kind}",
            expected=f"at most {vocab_size} ids",
            found=tokenizer.vocab_size,
            remedy="give the tokenizer that the model was trained with",
        )


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"cannot be read: {error.strerror or error}", file=path) from error
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError("is too large for a tokenizer", file=path, expected=f"at most {MAX_FILE_BYTES} bytes")
    return data


def _parse_vocabulary(data: bytes, file: Path | None) -> dict[int, bytes]:
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError("is not UTF-8", file=file, place=f"offset {error.start}", remedy=_AGAIN) from None
    if lines[-1] == "":
        lines.pop()
    bytes_of_id: dict[int, bytes] = {}
    id_of_bytes: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, content = _parse_vocabulary_line(line.removesuffix("\r"))
            if token in bytes_of_id:
                raise ValueError(f"the id {token} appears twice")
            if content in id_of_bytes:
                raise ValueError(f"the token is also that of id {id_of_bytes[content]}")
        except ValueError as error:
            raise TokenizerError(str(error), file=file, place=f"line {number}", remedy=_AGAIN) from None
        bytes_of_id[token] = content
        id_of_bytes[content] = token
    return bytes_of_id


def _parse_vocabulary_line(line: str) -> tuple[int, bytes]:
    """One entry; raises ValueError with what is wrong about it."""
    if len(line) > _MAX_LINE_CHARACTERS:
        raise ValueError(f"the line is longer than {_MAX_LINE_CHARACTERS} characters")
    token_text, _, rest = line.partition(" ")
    literal, _, length_text = rest.rpartition(" ")
    if not (token_text.isascii() and token_text.isdigit() and int(token_text) < MAX_VOCAB_SIZE):
        raise ValueError(f"the id is not a number from 0 to {MAX_VOCAB_SIZE - 1} (found {token_text[:20]!r})")
    try:
        content = ast.literal_eval(literal.strip(" "))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        content = None
    if not isinstance(content, str | bytes):
        raise ValueError(f"the token is not a string or bytes literal (found {literal[:40]!r})")
    try:
        encoded = content.encode("utf-8") if isinstance(content, str) else content
    except UnicodeEncodeError:
        raise ValueError("the token holds half a surrogate pair") from None
    if not encoded:
        raise ValueError("the token is empty")
    if not (length_text.isascii() and length_text.isdigit() and int(length_text) == len(encoded)):
        raise ValueError(f"the length is not the token's (expected {len(encoded)}, found {length_text[:20]!r})")
    return int(token_text), encoded


@contextlib.contextmanager
def _package_errors(problem: str, file: Path | None) -> Iterator[None]:
    """Turn what the package `tokenizers` raises into `TokenizerError`."""
    try:
        yield
    except BaseException as error:
        # Some malformed files make it panic, which is no Exception and which it gives no other name for.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{problem}: {str(error)[:200]}", file=file, remedy=_AGAIN) from error


def _parse_hugging_face(data: bytes, file: Path | None) -> tokenizers.Tokenizer:
    import tokenizers

    content = checked_tokenizer_json(data, file)
    with _package_errors("is not a tokenizer.json", file):
        tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        # As the package `tokenizers` does: a token outside the alphabet is taken literally.
        return token.encode("utf-8")
