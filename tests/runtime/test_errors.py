"""The wording of errors."""

import pytest

from goslet.errors import GosletError, InputError, one_line


def test_every_known_part_is_named_in_order() -> None:
    error = GosletError("is wrong", file="a.goslet", place="header", expected=1, found=2, remedy="get it again")
    assert str(error) == "a.goslet: header: is wrong (expected 1, found 2); get it again"
    assert str(GosletError("is wrong")) == "is wrong"
    assert str(InputError("is wrong", place="x", found=0)) == "x: is wrong (found 0)"


@pytest.mark.parametrize("part", ["problem", "file", "place", "expected", "found", "remedy"])
def test_no_part_can_drive_the_terminal_and_each_is_kept_as_it_is(part: str) -> None:
    nasty = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) + "\u202e\u2066\u200fé 世界"
    error = GosletError(**{"problem": "is wrong", part: nasty})
    assert str(error).isprintable()
    assert "\\x1b" in str(error)
    assert "\\x9b" in str(error)
    assert "\\u202e" in str(error)
    assert "é 世界" in str(error)
    assert getattr(error, part) == nasty


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("naïve café", "Привет, 世界! नमस्ते", "👩\u200d👧 \\ 'x'"):
        assert one_line(text) == text
    assert one_line(" two\n\tlines ") == "two lines"
