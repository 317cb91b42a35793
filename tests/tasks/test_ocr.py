"""Generated OCR prompts: what is promised of them, and that what is held out is held out."""

import math
import random
import re
import statistics
from collections import Counter

import pytest

from fopd_jax.rewards.ocr import find_target
from fopd_jax.tasks import ocr_grammar
from fopd_jax.tasks.ocr import generate, is_held_out
from tests.shared_data import shared

Rows = tuple[list[str], list[dict]]


@pytest.fixture(scope="module")
def train() -> Rows:
    return generate("train", None, 0)


@pytest.fixture(scope="module")
def held_out() -> Rows:
    return generate("test", None, 0)


def plain(text: str) -> str:
    return text.replace(" ", "").lower()


def targets(rows: Rows) -> list[str]:
    return [record["target"] for record in rows[1]]


def test_counts_and_quotes(train: Rows, held_out: Rows):
    for rows, count in ((train, 20_000), (held_out, 1_000)):
        prompts, records = rows
        assert len(prompts) == len(records) == len(set(prompts)) == count
        for prompt, record in zip(prompts, records, strict=True):
            assert prompt.count('"') == 2
            assert list(record) == ["target"]
            assert find_target(prompt, {}) == record["target"]
            assert prompt.isascii()
            assert prompt.isprintable()
            assert "{" not in prompt
            assert prompt == " ".join(prompt.split())
            assert prompt[0].isupper()
            assert prompt.endswith(".")


def test_targets_are_as_long_as_the_published_ones(train: Rows, held_out: Rows):
    """Those have 2 to 27 characters, 14.8 on average."""
    for rows in (train, held_out):
        lengths = [len(plain(target)) for target in targets(rows)]
        assert min(lengths) >= 2
        assert max(lengths) <= 27
        assert statistics.mean(lengths) == pytest.approx(14.8, abs=1)
        assert statistics.median(lengths) == pytest.approx(15, abs=1)
    assert set(map(len, map(plain, targets(train)))) == set(range(2, 28))


def test_targets_differ(train: Rows, held_out: Rows):
    assert len(set(targets(train))) > 12_000
    assert len(set(targets(held_out))) > 750
    assert max(Counter(targets(held_out)).values()) < 20
    digits = sum(bool(re.search(r"\d", target)) for target in targets(train))
    assert 0.2 < digits / 20_000 < 0.4  # 23% of the published ones


def test_neither_targets_nor_scenes_are_shared(train: Rows, held_out: Rows):
    assert not set(map(plain, targets(train))) & set(map(plain, targets(held_out)))
    assert all(map(is_held_out, targets(held_out)))
    assert not any(map(is_held_out, targets(train)))
    scenes = [{scene for _, scene in part} for part in (ocr_grammar.TRAIN_SCENES, ocr_grammar.TEST_SCENES)]
    assert not scenes[0] & scenes[1]
    assert len(scenes[0]) >= 60
    assert len(scenes[1]) >= 20
    patterns = [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(scene))) for scene in scenes[0]]
    assert not [prompt for prompt in held_out[0] if any(pattern.match(prompt) for pattern in patterns)]


def test_a_target_is_held_out_whatever_its_case_and_spaces():
    assert {is_held_out(text) for text in ("Open 24 Hours", "open24hours", "OPEN 24HOURS")} == {
        is_held_out("open24hours")
    }
    share = statistics.mean(is_held_out(f"Room {number}") for number in range(4000))
    assert share == pytest.approx(1 / 8, abs=0.02)


def test_no_prompt_is_longer_than_clip_reads(train: Rows, held_out: Rows):
    """CLIP reads 77 tokens, two of them its own. A piece of a word has four letters at least on average.

    This bound was never below a count by CLIP's vocabulary: 31 on average, 56 at most (published ones: 45 and 72).
    """

    def at_most(prompt: str) -> int:
        pieces = re.findall(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+", prompt)
        return 2 + sum(math.ceil(len(piece) / 4) if piece.isalpha() else 1 for piece in pieces)

    assert max(map(at_most, train[0] + held_out[0])) <= 77
    assert statistics.mean(map(at_most, train[0])) < 50


def test_rows_depend_on_the_seed_alone(train: Rows):
    random.seed(1)
    assert generate("train", 500, 0)[0] == train[0][:500]
    assert generate("train", 500, 1)[0] != train[0][:500]
    assert not set(generate("test", 200, 1)[0]) <= set(generate("test", 200, 2)[0])


def test_the_rows_of_a_seed_stay_what_they_were(train: Rows):
    """A run is resumed from its seed."""
    first = 'A row of spice boxes, the black one marked "Learn" in gold leaf, surrounded by strings of lights.'
    assert train[0][0] == first


def test_articles(train: Rows):
    outside = [re.sub(r'"[^"]*"', "", prompt) for prompt in train[0]]
    assert not [text for text in outside if re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)]


def test_every_word_and_every_pattern_can_be_drawn():
    """No slot is misspelt, no list unused, no kind without a scene in both splits."""
    texts = [pattern for patterns in ocr_grammar.TARGETS.values() for pattern in patterns]
    texts += [scene for _, scene in (*ocr_grammar.TRAIN_SCENES, *ocr_grammar.TEST_SCENES)]
    slots = {slot for text in [*texts, *ocr_grammar.ENDINGS, "{lamp}"] for slot in re.findall(r"\{([a-z]+)\}", text)}
    assert slots == {*ocr_grammar.WORDS, "text"}
    for scenes in (ocr_grammar.TRAIN_SCENES, ocr_grammar.TEST_SCENES):
        assert {kind for kinds, _ in scenes for kind in kinds} == set(ocr_grammar.TARGETS)
        assert all(scene.count("{text}") == 1 for _, scene in scenes)
    for name, words in ocr_grammar.WORDS.items():
        assert len(set(words)) == len(words), name


def test_no_prompt_is_a_published_test_prompt(train: Rows):
    published = shared("flow_grpo/ocr/test.txt").read_text(encoding="utf-8").splitlines()
    assert not set(published) & set(train[0])


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("val", None, "found split 'val', expected 'train' or 'test'"),
        ("train", 0, "ocr:train: found a count of 0, expected 1 to 100000"),
        ("test", 100_001, "ocr:test: found a count of 100001"),
    ],
)
def test_refusals(split: str, count: int | None, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(split, count, 0)
