"""OCR prompts, generated: varied scenes around a quoted text of 2 to 27 characters, as the published sets have them.

Those were written by a language model and cannot be made again; these are built from words and sentences of our own
(`ocr_grammar`). Texts to train on and texts held out differ, and so do their scenes.
"""

import random
import re
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from fopd_jax.tasks.ocr_grammar import ENDINGS, TARGETS, TEST_SCENES, TRAIN_SCENES, WORDS

ROWS = {"train": 20_000, "test": 1_000}
MOST_ROWS = 100_000
SHORTEST, LONGEST = 2, 27
"""Characters of a target, spaces not counted."""

T = TypeVar("T")
_HELD_OUT = 8  # one target in so many is held out
_UPPER, _LOWER = 0.12, 0.08  # shares of targets all in capitals, all in small letters
_SLOT = re.compile(r"\{(\w+|\d+-\d+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def generate(split: str, count: int | None, seed: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts, all different, each with one pair of double quotes, and beside each its text as {"target": …}.

    `train`: 20,000 unless `count` says else, `test`: 1,000. The same seed gives the same rows on any version of
    Python: all draws come from `random.Random.random`, whose numbers are promised to stay.

    Raises:
      ValueError: another split, or a count out of range.
    """
    if split not in ROWS:
        raise ValueError(f"ocr: found split {split!r}, expected 'train' or 'test'")
    count = ROWS[split] if count is None else count
    if not 1 <= count <= MOST_ROWS:
        raise ValueError(f"ocr:{split}: found a count of {count}, expected 1 to {MOST_ROWS}")
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        prompt, target = _draw(split, rng)
        rows.setdefault(prompt, target)
    return list(rows), [{"target": target} for target in rows.values()]


def is_held_out(target: str) -> bool:
    """Whether a text is one to test with; case and spaces are no difference, as for the reward."""
    return zlib.crc32(target.replace(" ", "").lower().encode()) % _HELD_OUT == 0


def _draw(split: str, rng: random.Random) -> tuple[str, str]:
    kinds, scene = _one(TRAIN_SCENES if split == "train" else TEST_SCENES, rng)
    target = _target(_one(kinds, rng), split == "test", rng)
    ending = _one(ENDINGS, rng)
    if "{indoors}" in scene:
        ending = ending.replace("{light}", "{lamp}")
    written = _fill(scene + ending + ".", rng)
    return _ARTICLE.sub(r"\1n ", written).replace("{text}", f'"{target}"'), target


def _target(kind: str, held_out: bool, rng: random.Random) -> str:
    while True:
        target = _fill(_one(TARGETS[kind], rng), rng)
        if SHORTEST <= len(target.replace(" ", "")) <= LONGEST and is_held_out(target) == held_out:
            break
    case = rng.random()
    return target.upper() if case < _UPPER else target.lower() if case > 1 - _LOWER else target


def _fill(pattern: str, rng: random.Random) -> str:
    """Every slot but `{text}` filled."""
    return _SLOT.sub(lambda slot: _word(slot[0], slot[1], rng), pattern)


def _word(slot: str, name: str, rng: random.Random) -> str:
    """One of the list of that name, or a number of that range."""
    low, _, high = name.partition("-")
    if high:
        return str(int(low) + int(rng.random() * (int(high) - int(low) + 1)))
    return slot if name == "text" else _one(WORDS[name], rng)


def _one(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]
