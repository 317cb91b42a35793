"""The OCR reward: its rule by the published vectors and by hand, and RapidOCR on rendered texts, offline."""

import csv
import functools
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fopd_jax.config.schema import RewardConfig
from fopd_jax.rewards import ocr, recogniser
from fopd_jax.rewards.ocr import edit_distance, find_target, make, ocr_reward, quoted_target, rate
from fopd_jax.rewards.reward import Reward
from fopd_jax.tasks.ocr import generate
from tests.shared_data import shared

# ---- the rule


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


@pytest.mark.parametrize(
    ("read", "reward"), [("Hello world", 1.0), ("hell", 0.8), ("", 0.0), ("xxxxxxxxxx", 0.0), ("he llo", 1.0)]
)
def test_published_vectors(read: str, reward: float):
    """That of an image that cannot be read, 0 as published, is a failure here: see below."""
    assert ocr_reward(read, 'a wall with "hello"') == pytest.approx(reward)


def test_stray_text_without_the_substring_rule():
    assert rate("hello wo", "hello", substring=False) == (pytest.approx(1 - 2 / 5), 2)
    assert rate("hello wonderful world", "hello", substring=False) == (0.0, 5)
    assert rate("Hel Lo", "hello", substring=False) == (1.0, 0)


@pytest.mark.parametrize(
    ("read", "penalty", "reward"),
    [
        ("hello", 0.5, 1.0),
        ("hello" + "x" * 5, 0.5, 0.5),  # as much again as the target has
        ("he llo x y", 0.5, 1 - 0.5 * 2 / 5),  # spaces are no text
        ("hello" + "x" * 50, 0.5, 0.0),  # never negative
        ("hell", 0.5, 0.8),  # less than the target is none too much
        ("hxllo y", 0.5, 1 - 2 / 5 - 0.5 / 5),  # beside what is wrong
    ],
)
def test_penalty_of_stray_text(read: str, penalty: float, reward: float):
    assert rate(read, "hello", extra_text_penalty=penalty)[0] == pytest.approx(reward)


@pytest.mark.parametrize(
    ("prompt", "metadata", "quotes", "target"),
    [
        ('a "b" c', {"target": "d"}, "double", "d"),
        ('a "b" c', {"text": "e"}, "double", "e"),
        ('a "b" c', {"tag": "x"}, "double", "b"),
        ('a "b" and "c"', {}, "any", "b"),
        ("a “b c” d", {}, "any", "b c"),
        ("a 'Hello World' on it", {}, "any", "Hello World"),
        ("it's a sign that says 'Don't Stop' in the dogs' park", {}, "any", "Don't Stop"),
        ("a ‘Don’t Stop’ sign", {}, "any", "Don’t Stop"),
        ("'x' or \"y\"", {}, "any", "y"),  # double quotes come first
        ('“x” or "y"', {}, "double", "y"),
    ],
)
def test_targets(prompt: str, metadata: Mapping[str, Any], quotes: str, target: str):
    assert find_target(prompt, metadata, quotes) == target


def test_targets_of_published_prompts():
    """DrawBench has 21 targets, in single quotes; those of Chinese LongText-Bench are curly; Flow-GRPO's are double."""
    with shared("drawbench/DrawBench.csv").open(encoding="utf-8", newline="") as table:
        texts = [row["Prompts"] for row in csv.DictReader(table) if row["Category"] == "Text"]
    assert [find_target(prompt, {}, "any") for prompt in texts] == [prompt.split("'")[1] for prompt in texts]
    chinese = shared("longtext_bench/text_prompts_zh.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(find_target(json.loads(line)["prompt"], {}, "any") for line in chinese)
    for prompt in shared("flow_grpo/ocr/test.txt").read_text(encoding="utf-8").splitlines():
        assert find_target(prompt, {}) == find_target(prompt, {}, "any") == prompt.split('"')[1]


@pytest.mark.parametrize(
    ("prompt", "metadata", "quotes", "message"),
    [
        ("a “b” c", {}, "double", "must hold its target text in double quotes"),
        ("it's the dogs' park", {}, "any", "must hold its target text in double quotes"),
        ("a “ ” c", {}, "any", "has empty double quotes"),
        ('a "b"', {"target": " "}, "double", "has the target ' ' beside it"),
        ('a "b"', {"text": ["b", "c"]}, "double", re.escape("has the text ['b', 'c'] beside it, expected a text")),
    ],
)
def test_prompts_that_can_never_be_scored(prompt: str, metadata: Mapping[str, Any], quotes: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        find_target(prompt, metadata, quotes)
    assert repr(prompt) in str(error.value)


# ---- its making


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "x.onnx"}, r"rewards\.read\.weights: found 'x\.onnx', expected none"),
        ({"options": {"worker": 2}}, r"rewards\.read\.options\.worker: no such option, expected some of workers"),
        ({"options": {"workers": -1}}, r"rewards\.read\.options\.workers: found -1, expected 0 \(one a core\) to 1024"),
        ({"options": {"timeout": 0.0}}, r"rewards\.read\.options\.timeout: found 0\.0, expected seconds above 0"),
        ({"options": {"timeout": math.nan}}, r"rewards\.read\.options\.timeout: found nan"),
        ({"options": {"extra_text_penalty": -0.1}}, r"rewards\.read\.options\.extra_text_penalty: found -0\.1"),
        (
            {"options": {"quotes": "curly"}},
            r"rewards\.read\.options\.quotes: found 'curly', expected 'double' or 'any'",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("read", RewardConfig(**settings), None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name))
    with pytest.raises(ValueError, match=r"rewards\.read: needs rapidocr: pip install 'fopd_jax\[ocr\]'"):
        make("read", RewardConfig(), None)


def worker(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"from fopd_jax.rewards.ocr_worker import load_rapidocr, serve\n{code}")


def with_command(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setattr(ocr, "Recogniser", functools.partial(recogniser.Recogniser, command=command))


def test_missing_models_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code = (
        f"import pathlib, rapidocr.main\nrapidocr.main.root_dir = pathlib.Path({str(tmp_path)!r})\nserve(load_rapidocr)"
    )
    with_command(monkeypatch, worker(code))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"rewards\.read: RapidOCR does not start: .*nothing is downloaded"):
        make("read", RewardConfig(options={"workers": 1}), None)
    assert time.monotonic() - start < 60
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


FAKE = """
def read(image):
    if image[0, 0, 0] == 1:
        raise ValueError("bad picture")
    return ["Hel", "lo"] if image[0, 0, 0] == 2 else []
serve(lambda: read)
"""


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reward]:
    with_command(monkeypatch, worker(FAKE))
    reward = make("read", RewardConfig(options={"workers": 1}), None)
    yield reward
    reward.close()


def test_failures_are_no_zeros(faked: Reward):
    """As published, what cannot be read scores 0; a negative advantage for what nobody looked at."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = (0, 1, 2, 2)
    scores = faked.score(images, ['a "hello"', 'a "hello"', 'a "hello"', "no target"], [{}, {}, {}, {}])
    np.testing.assert_array_equal(scores.values, [0.0, np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(scores.failed, [False, True, False, True])
    assert scores.details[0] == {"read": "", "target": "hello", "distance": 5}
    assert scores.details[1] == {"error": "ReadingError: ValueError: bad picture"}
    assert scores.details[2] == {"read": "Hello", "target": "hello", "distance": 0}
    assert "must hold its target text in double quotes" in scores.details[3]["error"]
    assert len(faked.score(images[:0], [], [])) == 0


def test_check_names_the_first_prompt_without_a_target(faked: Reward):
    faked.check(['a "b"', "c"], [{}, {"target": "d"}])
    with pytest.raises(ValueError, match=r"^OCR prompt 'c' must hold .* \(one of 2 such among 3\)"):
        faked.check(['a "b"', "c", "d"], [{}, {}, {}])
    assert (faked.name, faked.limits, faked.runs) == ("read", (0.0, 1.0), "host")


# ---- RapidOCR itself

FONTS = ("", *(f"DejaVu{style}.ttf" for style in (
    "Sans", "Sans-Bold", "Sans-Oblique", "SansCondensed-Bold", "SansMono", "Serif", "Serif-Bold", "Serif-Italic"
)))  # fmt: skip
"""Pillow's own, and those that most systems have; where they are absent, Pillow's own for all."""
SIDE, MARGIN = 512, 16


def font(name: str, size: int) -> Any:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return ImageFont.load_default(size)


def render(text: str, rng: np.random.Generator) -> np.ndarray:
    """A text in some font, size, colours and place, in as many lines as it needs; on half of them a mottled ground."""
    luminance = np.array([0.299, 0.587, 0.114])
    ground, ink = rng.integers(0, 256, (2, 3))
    while abs((ground - ink) @ luminance) < 90:
        ink = rng.integers(0, 256, 3)
    mottled = ground + (rng.normal(0, 12, (8, 8, 3)) if rng.random() < 0.5 else np.zeros((8, 8, 3)))
    image = Image.fromarray(np.clip(mottled, 0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw, name, size = ImageDraw.Draw(image), FONTS[rng.integers(len(FONTS))], int(rng.integers(24, 65))
    while (width := _width(lines := _lines(text, font(name, size)), font(name, size))) > SIDE - 2 * MARGIN:
        size -= 2
    height = round(1.25 * size * len(lines))
    left, top = (int(rng.integers(MARGIN, SIDE - MARGIN - extent + 1)) for extent in (width, height))
    for row, line in enumerate(lines):
        draw.text((left, top + round(1.25 * size * row)), line, tuple(map(int, ink)), font(name, size))
    return np.asarray(image)


def _width(lines: list[str], chosen: Any) -> int:
    return math.ceil(max(map(chosen.getlength, lines)))


def _lines(text: str, chosen: Any) -> list[str]:
    first, *rest = text.split()
    lines = [first]
    for word in rest:
        longer = f"{lines[-1]} {word}"
        fits = _width([longer], chosen) <= SIDE - 2 * MARGIN
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return lines


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    made = make("ocr", RewardConfig(options={"workers": 1}), None)
    yield made
    made.close()


def test_rendered_texts_are_read(reward: Reward):
    targets = ["Open 24 Hours", "Step Goal Achieved", "Gate B42", "MIND THE GAP", "wild honey"]
    rng = np.random.default_rng(0)
    images = np.stack([*(render(target, rng) for target in targets), np.full((SIDE, SIDE, 3), 128, np.uint8)])
    scores = reward.score(images, [f'a sign "{target}"' for target in [*targets, "nothing"]], [{}] * 6)
    np.testing.assert_array_equal(scores.values, [1, 1, 1, 1, 1, 0])
    assert not scores.failed.any()
    assert scores.details[2] == {"read": "Gate B42", "target": "Gate B42", "distance": 0}


def test_lines_are_joined_from_top_to_bottom_and_from_left_to_right(reward: Reward):
    image = Image.new("RGB", (640, 384), "white")
    draw = ImageDraw.Draw(image)
    for place, text in (((60, 60), "North"), ((380, 60), "South"), ((60, 240), "East"), ((380, 240), "West")):
        draw.text(place, text, "black", font("", 48))
    scores = reward.score(np.asarray(image)[None], ['a "north south east west"'], [{}])
    assert scores.values == 1
    assert scores.details[0]["read"] == "NorthSouthEastWest"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_of_200_rendered_sentences_95_in_a_hundred_are_exact(seed: int):
    """At 512 pixels, offline; sentences of 2 to 27 characters."""
    reward = make("ocr", RewardConfig(), None)
    prompts, metadata = generate("test", 200, seed)
    rng = np.random.default_rng(seed)
    images = np.stack([render(record["target"], rng) for record in metadata])
    start = time.monotonic()
    scores = reward.score(images, prompts, metadata)
    seconds = time.monotonic() - start
    reward.close()
    print(f"exact {np.mean(scores.values == 1):.3f}, mean {np.mean(scores.values):.4f}, {200 / seconds:.1f} images/s")
    assert not scores.failed.any()
    assert np.mean(scores.values == 1) >= 0.95
