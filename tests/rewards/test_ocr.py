import pytest

from fopd_jax.rewards.ocr import edit_distance, ocr_reward, quoted_target


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abd", 1),  # one substitution
        ("abc", "ac", 1),  # one deletion
        ("ab", "xab", 1),  # one insertion
        ("ab", "ba", 2),  # a transposition is not one edit
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("aaaa", "bbbb", 4),
    ],
)
def test_edit_distance_by_hand(a: str, b: str, distance: int):
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


def test_quoted_target_is_the_first_quoted_text_as_written():
    assert quoted_target('a "Neon Sign" beside "another"') == "Neon Sign"


@pytest.mark.parametrize("prompt", ["", "sign K7B", 'sign "K7B', 'sign ""', 'sign "  "'])
def test_prompts_without_a_target_are_named(prompt: str):
    with pytest.raises(ValueError, match="double quotes") as error:
        quoted_target(prompt)
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize(
    ("read", "reward"),
    [
        ("K7B", 1.0),
        ("k 7 b", 1.0),  # case and spaces do not count
        ("xxK7Byy", 1.0),  # a substring is free
        ("K7A", 2 / 3),
        ("KB", 2 / 3),
        ("B", 1 / 3),
        ("7KB", 1 / 3),
        ("", 0.0),
        ("AAA", 0.0),
        ("AAAAAAAA", 0.0),  # never negative
    ],
)
def test_reward_by_hand(read: str, reward: float):
    result = ocr_reward(read, 'sign "K7B"')
    assert isinstance(result, float)
    assert result == pytest.approx(reward)


def test_length_is_counted_without_spaces():
    assert ocr_reward("hell", 'a wall with "he llo"') == pytest.approx(4 / 5)
