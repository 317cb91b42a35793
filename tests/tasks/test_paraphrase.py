"""Prompts in other words: what they keep, that they differ, and GenEval's sentences read back to their records."""

import re
from collections import Counter

import pytest

from fopd_jax.rewards.geneval.records import COLOURS
from fopd_jax.tasks import geneval, ocr
from fopd_jax.tasks.paraphrase import paraphrase
from tests.shared_data import shared

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GENEVAL = dict(zip(*geneval.generate("test", None, 0), strict=True))
NUMBERS = {"exactly two": 2, "exactly three": 3, "exactly four": 4, "2": 2, "3": 3, "4": 4}


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def quotes(text: str) -> list[str]:
    return re.findall(r'"[^"]*"', text)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_becomes_another_one_with_its_quotes(seed: int):
    for prompt in [*GENEVAL, *ocr.generate("test", 400, 3)[0]]:
        other = paraphrase(prompt, seed)
        assert plain(other) != plain(prompt)
        assert quotes(other) == quotes(prompt)
        assert other == paraphrase(prompt, seed)


@pytest.mark.parametrize("name", ["flow_grpo/ocr/test.txt", "pickscore_sfw_clean/test.txt"])
def test_published_prompts_keep_their_quotes_too(name: str):
    for prompt in shared(name).read_text(encoding="utf-8").splitlines():
        other = paraphrase(prompt, 0)
        assert plain(other) != plain(prompt)
        assert quotes(other) == quotes(prompt)
        assert not re.search(r'["\0]', re.sub(r'"[^"]*"', "", other)) or '"' in re.sub(r'"[^"]*"', "", prompt)


def test_seeds_give_several_forms():
    counts = Counter(paraphrase("a photo of a red car left of a blue dog", seed) for seed in range(200))
    assert len(counts) > 40
    assert len({paraphrase('A sign that reads "Open", in the rain.', seed) for seed in range(50)}) > 4


def test_things_counts_and_colours_are_those_of_the_record():
    for prompt, record in GENEVAL.items():
        other = paraphrase(prompt, 0)
        for item in record["include"]:
            name, colour = item["class"], item.get("color")
            assert name in other
            if colour:
                assert re.search(rf"{colour} {name}|{name} (that is|coloured) {colour}", other), other
            if item["count"] > 1:
                number = re.search(rf"(exactly \w+|\d) {name}", other) or re.search(rf"{name}e?s, (\w+) of them", other)
                assert number, other
                assert NUMBERS.get(number[1], NUMBERS.get(f"exactly {number[1]}")) == item["count"]
        assert {each for each in COLOURS if re.search(rf"\b{each}\b", other)} == {
            each for each in COLOURS if re.search(rf"\b{each}\b", prompt)
        }


def test_places_are_those_of_the_record():
    """Read back by patterns of this test: who is where, from whichever side it is told."""
    found = 0
    for prompt, record in GENEVAL.items():
        if record["tag"] != "position":
            continue
        target, subject = record["include"]
        relation = subject["position"][0]
        a, b = subject["class"], target["class"]
        beside = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
        long = {"left of": "to the left of", "right of": "to the right of"}
        forms = (
            rf"an? {b} {OPPOSITE[relation]} an? {a}\b",
            rf"an? {b} with an? {a} {beside[relation]}",
            rf"an? {a} {long.get(relation, f'that is {relation}')} an? {b}\b",
        )
        other = paraphrase(prompt, 0)
        assert sum(bool(re.search(form, other)) for form in forms) == 1, (prompt, other)
        found += 1
    assert found > 50


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("", ""), ("   ", "   "),
        ('a photo of a sign "a photo of a dog"', '"a photo of a dog"'), ("the small “big photo” sign", "“big photo”"),
        ('an open "quote, in the rain', '"quote, in the rain'), ("photo", None), ("日本の写真", "日本の写真"),
    ],
)  # fmt: skip
def test_texts_of_any_kind_are_taken(prompt: str, kept: str | None):
    for seed in range(20):
        other = paraphrase(prompt, seed)
        assert (other == prompt) == (not prompt.strip())
        assert kept is None or kept in other


def test_clauses_move_where_they_can_stand():
    forms = {paraphrase("A cat in a hat, in the rain.", seed) for seed in range(40)}
    assert "In the rain, a cat in a hat." in forms
    kept = {paraphrase("A cat in a big, glowing box.", seed) for seed in range(40)}
    assert all("big, glowing box" in each or "large, glowing box" in each for each in kept)
