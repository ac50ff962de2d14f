"""The C++ classes through their bindings: memory, lengths and the rearranging of nibbles."""

import gc
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goslet._native import StateBuffer, VocabularyTrie, transpose_int4

SHAPES = [(3,), (2, 5, 7), (16,), (1, 1)]
INITS = [0.0, 1.5, -1e38, -0.25]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system does not say how much memory a process holds (/proc/self/statm)")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


class TestStateBuffer:
    def test_a_new_buffer_is_fresh_and_every_tensor_is_aligned(self) -> None:
        buffer = StateBuffer(SHAPES, INITS)
        assert buffer.n_tensors == 4
        assert buffer.size_bytes == 64 * (1 + 5 + 1 + 1)
        for index, (shape, init) in enumerate(zip(SHAPES, INITS, strict=True)):
            view = buffer.tensor(index)
            assert view.shape == shape
            assert view.dtype == np.float32
            assert address(view) % 64 == 0
            assert (view == np.float32(init)).all()

    def test_views_are_the_buffer_and_its_gaps_are_zero(self) -> None:
        buffer = StateBuffer(SHAPES, INITS)
        whole = np.frombuffer(buffer, np.float32)
        assert whole.nbytes == buffer.size_bytes
        assert address(whole) == address(buffer.tensor(0))
        buffer.tensor(1)[1, 4, 6] = 42
        assert whole[16 + 69] == 42
        for index in range(4):
            buffer.tensor(index)[...] = 0
        assert not whole.any()

    def test_reset_fills_with_the_initial_values_in_place(self) -> None:
        buffer = StateBuffer(SHAPES, INITS)
        views = [buffer.tensor(index) for index in range(4)]
        for view in views:
            view[...] = np.nan
        buffer.reset()
        for view, init in zip(views, INITS, strict=True):
            assert (view == np.float32(init)).all()

    def test_clone_and_copy_share_nothing(self) -> None:
        buffer = StateBuffer(SHAPES, INITS)
        buffer.tensor(1)[...] = 7
        twin = buffer.clone()
        assert bytes(memoryview(twin).cast("B")) == bytes(memoryview(buffer).cast("B"))
        twin.tensor(1)[...] = 8
        assert (buffer.tensor(1) == 7).all()
        before = address(buffer.tensor(1))
        buffer.copy_from(twin)
        assert (buffer.tensor(1) == 8).all()
        assert address(buffer.tensor(1)) == before
        buffer.copy_from(buffer)
        assert (buffer.tensor(1) == 8).all()

    @pytest.mark.parametrize(
        ("shapes", "inits"), [([(3,)], [0.0]), ([*SHAPES[:3], (2, 1)], INITS), (SHAPES, [0.0, 1.5, 0.0, -0.25])]
    )
    def test_copying_from_another_layout_copies_nothing(self, shapes: list, inits: list) -> None:
        buffer = StateBuffer(SHAPES, INITS)
        before = bytes(memoryview(buffer).cast("B"))
        other = StateBuffer(shapes, inits)
        other.tensor(0)[...] = 9
        with pytest.raises(ValueError, match="different layouts"):
            buffer.copy_from(other)
        assert bytes(memoryview(buffer).cast("B")) == before

    @pytest.mark.parametrize(
        "export", [lambda buffer: buffer.tensor(1), memoryview, lambda buffer: np.frombuffer(buffer, np.float32)]
    )
    def test_a_view_keeps_the_memory_alive(self, export) -> None:
        # 32 MiB come from the system and go back to it at once, so that reading freed memory would be a crash.
        view = export(StateBuffer([(1,), (1 << 23,)], [0.0, 3.0]))
        gc.collect()
        assert np.asarray(view).reshape(-1)[-1] == 3.0

    @pytest.mark.parametrize(
        ("shapes", "inits", "message"),
        [
            ([], [], "at least one tensor"),
            ([()], [0.0], "no dimensions"),
            ([(3,), (2, 0)], [0.0, 0.0], "tensor 1 has a dimension of 0"),
            ([(3,)], [], "1 shapes and 0 initial values"),
            ([(1 << 30, 1 << 30, 1 << 30)], [0.0], "tensor 0 takes the state past 4294967296 bytes"),
            ([((1 << 64) - 1,)], [0.0], "past 4294967296 bytes"),
            ([(1 << 32, 1 << 32)], [0.0], "past 4294967296 bytes"),
            ([(1 << 30,), (1,)], [0.0, 0.0], "tensor 1 takes the state past 4294967296 bytes"),
        ],
    )
    def test_a_bad_layout_is_refused_before_anything_is_allocated(self, shapes, inits, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StateBuffer(shapes, inits)

    def test_a_dimension_that_is_no_size_is_refused(self) -> None:
        for size in (-1, 1 << 64, 1.5):
            with pytest.raises(TypeError):
                StateBuffer([(size,)], [0.0])

    def test_a_tensor_that_is_not_there_is_an_index_error(self) -> None:
        with pytest.raises(IndexError, match="4 tensors"):
            StateBuffer(SHAPES, INITS).tensor(4)

    def test_cloning_and_resetting_a_hundred_thousand_times_leaks_nothing(self) -> None:
        buffer = StateBuffer([(1024,)], [0.0])

        def churn(times: int) -> None:
            for _ in range(times):
                twin = buffer.clone()
                twin.reset()
                buffer.copy_from(twin)
                twin.tensor(0)

        churn(1000)
        before = resident_bytes()
        churn(100_000)
        # One leaked clone in a hundred would be 4 MiB.
        assert resident_bytes() - before < 1 << 20


ENTRIES = [(0, b"a"), (5, b"abc"), (3, b"ab"), (2, b"\xff"), (9, b"bcd")]


class TestVocabularyTrie:
    def test_the_longest_entry_wins_and_a_dead_end_falls_back(self) -> None:
        trie = VocabularyTrie(10, ENTRIES)
        assert trie.encode(b"abcabdaa\xff") == ([5, 3], 5)
        assert trie.encode(b"ababcdaaa\xff") == ([3, 5], 5)
        assert trie.encode(b"bcdbc") == ([9], 3)
        assert trie.encode(b"ab") == ([3], 2)
        assert trie.encode(b"") == ([], 0)
        assert trie.encode(b"z") == ([], 0)

    def test_ids_decode_to_their_bytes_and_unused_ids_to_none(self) -> None:
        trie = VocabularyTrie(10, ENTRIES)
        assert (trie.vocab_size, trie.n_entries) == (10, 5)
        assert [trie.token_bytes(token) for token in range(10)] == [
            b"a", b"", b"\xff", b"ab", b"", b"abc", b"", b"", b"", b"bcd",
        ]  # fmt: skip
        assert trie.decode([9, 1, 0, 2]) == b"bcda\xff"
        for call in (lambda: trie.decode([1, 10]), lambda: trie.token_bytes(10)):
            with pytest.raises(IndexError):
                call()

    def test_the_blob_gives_the_same_trie(self) -> None:
        trie = VocabularyTrie(10, ENTRIES)
        blob = trie.to_blob()
        for form in (blob, memoryview(blob), bytearray(blob), np.frombuffer(blob, np.uint8)):
            again = VocabularyTrie.from_blob(form)
            assert again.to_blob() == blob
            assert again.encode(b"ababcdaaa\xff") == trie.encode(b"ababcdaaa\xff")

    def test_an_empty_vocabulary_matches_nothing(self) -> None:
        trie = VocabularyTrie.from_blob(VocabularyTrie(3, []).to_blob())
        assert trie.encode(b"x") == ([], 0)
        assert trie.decode([0, 2]) == b""

    @pytest.mark.parametrize(
        ("vocab_size", "entries", "message"),
        [
            (10, [(10, b"x")], "token 10 is not below the vocabulary size 10"),
            (10, [(1, b"x"), (1, b"y")], "token 1 appears twice"),
            (10, [(1, b"x"), (2, b"x")], "same byte string"),
            (10, [(1, b"")], "token 1 stands for an empty byte string"),
            (10, [(1, b"x" * 65536)], "65536 bytes long"),
            (0, [], "vocabulary size 0"),
            ((1 << 24) + 1, [], "vocabulary size 16777217"),
        ],
    )
    def test_a_bad_vocabulary_is_refused(self, vocab_size: int, entries: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VocabularyTrie(vocab_size, entries)

    def test_the_longest_possible_entry_works(self) -> None:
        trie = VocabularyTrie.from_blob(VocabularyTrie(2, [(1, b"x" * 65535)]).to_blob())
        assert trie.encode(b"x" * 65535) == ([1], 65535)
        assert trie.encode(b"x" * 65534) == ([], 0)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda b: b[:23], "less than its 24-byte header"),
            (lambda b: b"GVOX" + b[4:], "does not begin with GVOC"),
            (lambda b: b[:4] + b"\2" + b[5:], "has version 2"),
            (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "vocabulary size 4294967295"),
            (lambda b: b[:8] + b"\4" + b[9:], "5 entries for 4 ids"),
            (lambda b: b[:12] + b"\6" + b[13:], "declares 36 of tables"),
            (lambda b: b[:8] + b"\0\0\0\1\xff\xff\xff\0" + b[16:], "declares 100663290 of tables"),
            (lambda b: b[:16] + b"\xff" * 8 + b[24:], "and 18446744073709551615 of byte strings"),
            (lambda b: b[:16] + (2**64 - 30 + 10).to_bytes(8, "little") + b[24:], "of byte strings"),
            (lambda b: b[:-1], "has 39 bytes after its header"),
            (lambda b: b + b"\0", "has 41 bytes after its header"),
            (lambda b: b[:44] + b"\0\1" + b[46:], "lengths in the vocabulary blob add up"),
            (lambda b: b[:24] + b"\x0b" + b[25:], "token 11 is not below"),
            (lambda b: b[:24] + b"\3" + b[25:], "token 3 appears twice"),
            (lambda b: b[:44] + b"\0\0\3\0" + b[48:], "stands for an empty byte string"),
            (lambda b: b[:54] + b"ba" + b[56:], "not in lexicographic order"),
            (lambda b: b[:44] + b"\1\0\1\0\4\0" + b[50:54] + b"aaabcb" + b[60:], "same byte string"),
        ],
    )
    def test_a_damaged_blob_is_refused(self, damage, message: str) -> None:
        blob = VocabularyTrie(10, ENTRIES).to_blob()
        assert len(blob) == 24 + 5 * 6 + 10
        with pytest.raises(ValueError, match=message):
            VocabularyTrie.from_blob(damage(blob))

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_a_mutated_blob_is_refused_or_is_another_vocabulary(self, data: st.DataObject) -> None:
        blob = bytearray(VocabularyTrie(10, ENTRIES).to_blob())
        for _ in range(data.draw(st.integers(1, 3))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        try:
            trie = VocabularyTrie.from_blob(blob)
        except ValueError:
            return
        assert trie.to_blob() == blob
        ids, matched = trie.encode(b"abcabdaa\xff")
        assert trie.decode(ids) == b"abcabdaa\xff"[:matched]

    @settings(max_examples=200, deadline=None)
    @given(
        st.sets(st.lists(st.sampled_from(b"abc"), min_size=1, max_size=5).map(bytes), max_size=20),
        st.lists(st.sampled_from(b"abc"), max_size=40).map(bytes),
    )
    def test_encoding_is_greedy_longest_match(self, words: set[bytes], text: bytes) -> None:
        vocabulary = dict(enumerate(words))
        expected = []
        position = 0
        while position < len(text):
            fits = [token for token, word in vocabulary.items() if text.startswith(word, position)]
            if not fits:
                break
            expected.append(max(fits, key=lambda token: len(vocabulary[token])))
            position += len(vocabulary[expected[-1]])
        assert VocabularyTrie(20, list(vocabulary.items())).encode(text) == (expected, position)

    def test_encoding_lets_other_threads_run(self) -> None:
        # Quadratic on purpose: every start walks to the end of the text before it falls back to one byte.
        trie = VocabularyTrie(2, [(0, b"a" * 60_000), (1, b"a")])
        text = b"a" * 8_000

        def woken_before_the_end() -> bool:
            started = threading.Event()
            ended = threading.Event()

            def encode() -> None:
                started.set()
                trie.encode(text)
                ended.set()

            worker = threading.Thread(target=encode)
            worker.start()
            started.wait()
            woken = not ended.is_set()
            worker.join()
            return woken

        # With so long an interval this thread wakes only when the worker gives up the GIL of its own accord.
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(100.0)
        try:
            assert any(woken_before_the_end() for _ in range(5))
        finally:
            sys.setswitchinterval(interval_s)


def reference_transpose(rows: np.ndarray, k: int) -> np.ndarray:
    nibbles = np.stack([rows & 0x0F, rows >> 4], axis=-1).reshape(len(rows), 2 * rows.shape[1])[:, :k]
    flat = nibbles.T.reshape(-1)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[0::2] | flat[1::2] << 4


class TestTransposeInt4:
    # Around the tile of 128 rows by 128 nibbles, and every combination of odd and even.
    @pytest.mark.parametrize("n", [0, 1, 2, 3, 63, 127, 128, 129, 130, 257])
    @pytest.mark.parametrize("k", [1, 2, 3, 8, 63, 127, 128, 129, 130, 255])
    def test_equals_numpy(self, n: int, k: int) -> None:
        rows = np.random.default_rng(n * 1000 + k).integers(0, 256, (n, -(-k // 2)), np.uint8)
        result = transpose_int4(rows, k)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, reference_transpose(rows, k))

    def test_a_small_matrix_by_hand(self) -> None:
        # Rows (1, 2, 3) and (-8, -7, -1), that is 8, 9, 15 as nibbles; the fourth nibble of each row is noise.
        rows = np.array([[0x21, 0x53], [0x98, 0x6F]], np.uint8)
        assert transpose_int4(rows, 3).tolist() == [0x81, 0x92, 0xF3]

    def test_a_row_length_that_does_not_fit_is_refused(self) -> None:
        for k in (3, 6, 1 << 63):
            with pytest.raises(ValueError, match="nibbles take"):
                transpose_int4(np.zeros((4, 1), np.uint8), k)
        with pytest.raises(ValueError, match="2 dimensions"):
            transpose_int4(np.zeros(4, np.uint8), 2)

    def test_another_dtype_or_order_is_refused_rather_than_copied(self) -> None:
        for rows in (np.zeros((4, 2), np.int8), np.zeros((4, 4), np.uint8)[:, ::2], np.zeros((4, 2)), [[1, 2]]):
            with pytest.raises(TypeError):
                transpose_int4(rows, 4)
