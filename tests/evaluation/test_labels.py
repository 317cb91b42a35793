"""Labels of pictures: no boxes, whatever the script; lines that fit."""

import pytest
from PIL import ImageFont

from fopd_jax.evaluation import labels
from fopd_jax.evaluation.labels import FONT_SIZE, LINE, MOST_LINES, make_label

DEFAULT = ImageFont.load_default(FONT_SIZE)
WIDE = 10**4


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without fonts."""
    monkeypatch.setattr(labels, "_other_fonts", lambda: ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('two "red" squares, 50% [a_b]', 'two "red" squares, 50% [a_b]'),
        ("猫 cat", "\\u732b cat"),
        ("سلام", "\\u0633\\u0644\\u0627\\u0645"),
        ("a\x00b\x1bc", "a\\u0000b\\u001bc"),
        ("\u202eabc\u200d", "\\u202eabc\\u200d"),
        ("😀", "\\U0001f600"),
        ("\ufffd\u25a1", "\\ufffd\\u25a1"),
        ("", ""),
    ],
)
def test_letters_that_the_font_lacks_are_escaped(text: str, expected: str, alone: None):
    label = make_label(text, WIDE)
    assert label.lines == (expected,)
    box = labels._drawn(DEFAULT, "\U0010ffff")
    assert all(labels._drawn(label.font, letter) != box for letter in label.lines[0])


def test_a_font_of_the_machine_that_has_all_letters_is_taken(monkeypatch: pytest.MonkeyPatch):
    try:
        other = ImageFont.truetype("DejaVuSans.ttf", FONT_SIZE)
    except OSError:
        pytest.skip("no other font here")
    monkeypatch.setattr(labels, "_other_fonts", lambda: (other,))
    found = make_label("cafe\u0301 ж", WIDE)
    assert (found.lines, found.font) == (("café ж",), other)
    assert make_label("cafe", WIDE).font is not other
    assert make_label("ж 猫", WIDE).lines == ("\\u0436 \\u732b",)  # neither font has both


@pytest.mark.parametrize("text", ["many words " * 9, "x" * 200, "short " + "x" * 60 + " end", "猫" * 30])
def test_no_line_is_longer_than_it_may_be(text: str, alone: None):
    label = make_label(text, 96)
    assert label.width <= 96
    assert 1 < len(label.lines) <= MOST_LINES
    assert label.height == LINE * len(label.lines)
    if len(label.lines) < MOST_LINES:
        letters = "".join(label.lines).replace(" ", "")
        assert letters == "".join(make_label(text, WIDE).lines).replace(" ", "")


def test_each_of_a_texts_lines_is_wrapped_and_shortened_by_itself():
    label = make_label("word " * 500 + "\nseed 4", 96)
    assert label.lines[MOST_LINES - 1 :] == ("...", "seed 4")
    assert make_label("a\tb  c", WIDE).lines == ("a b c",)
