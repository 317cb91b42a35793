"""GenEval's grammar, held to the published list and to its counts."""

import hashlib
import json
import re
from collections import Counter

import pytest

from fopd_jax.rewards.geneval.detections import CLASSES
from fopd_jax.tasks import geneval
from fopd_jax.tasks.geneval import COLOURS, RELATIONS, TRAIN_MIX, UNSEEN, generate
from tests.shared_data import shared

TAGS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""Of the published set."""


def published() -> list[dict]:
    prompts, records = generate("test", None, 0)
    return [{**record, "prompt": prompt} for prompt, record in zip(prompts, records, strict=True)]


def test_the_test_split_is_the_published_file_byte_by_byte():
    lines = "".join(f"{json.dumps(row)}\n" for row in published()).encode()
    assert lines == shared("geneval/evaluation_metadata.jsonl").read_bytes()


def test_the_test_split_without_that_file():
    """Its hash and the counts that are published of it; the seed does not matter."""
    rows = published()
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    assert hashlib.sha256(lines).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert Counter(row["tag"] for row in rows) == TAGS
    assert Counter(row["include"][0]["count"] for row in rows if row["tag"] == "counting") == {2: 26, 3: 28, 4: 26}
    assert rows[0]["prompt"] == "a photo of a bench"
    assert rows[-1]["tag"] == "color_attr"
    assert generate("test", None, 0) == generate("test", None, 12345)


def test_a_part_of_the_test_split_keeps_its_tags():
    prompts, records = generate("test", 55, 0)
    assert len(set(prompts)) == 55
    for tag, count in Counter(record["tag"] for record in records).items():
        assert abs(count - TAGS[tag] / 553 * 55) < 1


def test_other_random_numbers_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geneval, "_TEST_SEED", 44)
    with pytest.raises(ValueError, match=r"geneval:test: numpy .* evaluation_metadata.jsonl by its path"):
        generate("test", None, 0)


def parsed(prompt: str) -> dict:
    """The record that a prompt's words stand for, read by hand-written patterns: the other way round."""
    text = prompt.removeprefix("a photo of ")
    names, article = "|".join(sorted(CLASSES, key=len, reverse=True)), "(an?)"
    colours, relations = "|".join(COLOURS), "|".join(RELATIONS)
    if found := re.fullmatch(rf"(two|three|four) ({names})(s|es)", text):
        count = {"two": 2, "three": 3, "four": 4}[found[1]]
        assert (found[3] == "es") == found[2].endswith("s")
        include, exclude = [{"class": found[2], "count": count}], [{"class": found[2], "count": count + 1}]
        return {"tag": "counting", "include": include, "exclude": exclude}
    if found := re.fullmatch(rf"{article} ({names}) ({relations}) {article} ({names})", text):
        a, b = {"class": found[2], "count": 1, "position": [found[3], 0]}, {"class": found[5], "count": 1}
        return {"tag": "position", "include": [b, a]}
    things = re.fullmatch(rf"{article} ((?:{colours}) )?({names})(?: and {article} ((?:{colours}) )?({names}))?", text)
    assert things, prompt
    include = [
        {"class": name, "count": 1, **({"color": colour.strip()} if colour else {})}
        for colour, name in ((things[2], things[3]), (things[5], things[6]))
        if name
    ]
    tags = {(1, 0): "single_object", (2, 0): "two_object", (1, 1): "colors", (2, 2): "color_attr"}
    return {"tag": tags[len(include), sum("color" in each for each in include)], "include": include}


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_say_what_prompts_say(split: str):
    for prompt, record in zip(*generate(split, 500, 3), strict=True):
        assert record == parsed(prompt)
        assert all(name[0] in "aeiou" for name in re.findall(r"\ban (\w+)", prompt))
        assert not any(name[0] in "aeiou" for name in re.findall(r"\ba (\w+)", prompt))


def test_training_prompts_are_in_the_mix_and_none_is_held_out():
    prompts, records = generate("train", None, 0)
    assert len(prompts) == len(records) == 50_000
    counts = Counter(record["tag"] for record in records)
    for tag, parts in TRAIN_MIX.items():
        assert counts[tag] == pytest.approx(50_000 * parts / 17, abs=1)
    assert sum(counts.values()) == 50_000
    assert counts["single_object"] == 0
    assert not set(prompts) & set(generate("test", None, 0)[0])
    assert Counter(record["tag"] for record in records[:1000])["position"] == pytest.approx(412, abs=60)  # shuffled


def test_every_class_colour_relation_and_count_is_trained_on():
    prompts, records = generate("train", 20_000, 1)
    include = [each for record in records for each in record["include"]]
    assert {each["class"] for each in include} == set(CLASSES)
    assert {each.get("color") for each in include} == {None, *COLOURS}
    assert {each["position"][0] for each in include if "position" in each} == set(RELATIONS)
    assert {record["include"][0]["count"] for record in records if "exclude" in record} == {2, 3, 4}
    assert not [each for each in include if each["class"] == "person" and "color" in each]
    pairs = [record["include"] for record in records if len(record["include"]) == 2]
    assert all(a["class"] != b["class"] for a, b in pairs)
    assert all(a["color"] != b["color"] for a, b in pairs if "color" in a)
    assert len(set(prompts)) < len(prompts)  # with replacement


def test_a_seed_gives_the_same_rows_and_another_others():
    assert generate("train", 300, 5) == generate("train", 300, 5)
    assert generate("train", 300, 5) != generate("train", 300, 6)


def test_classes_that_are_not_seen():
    _, records = generate("train_seen", 5000, 0)
    seen = {each["class"] for record in records for each in record["include"]}
    assert seen == set(CLASSES) - UNSEEN
    assert len(seen) == 60


def test_the_unseen_classes_are_those_of_the_published_test():
    lines = shared("flow_grpo/geneval_unseen_objects/test_metadata.jsonl").read_text().splitlines()
    assert {each["class"] for line in lines for each in json.loads(line)["include"]} == UNSEEN


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("val", None, "found split 'val', expected one of train, train_seen, test"),
        ("test", 554, "geneval:test: found a count of 554, expected 1 to 553"),
        ("test", 0, "geneval:test: found a count of 0"),
        ("train", -1, "geneval:train: found a count of -1, expected 1 to 1000000"),
    ],
)
def test_refusals(split: str, count: int | None, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(split, count, 0)


@pytest.mark.parametrize("count", [1, 16, 17, 18, 1000])
def test_any_number_of_rows(count: int):
    assert len(generate("train", count, 0)[0]) == count
    assert len(generate("test", min(count, 553), 0)[0]) == min(count, 553)


def test_the_rows_of_a_seed_stay_what_they_were():
    """A run is resumed from its seed."""
    expected = ["a photo of a cell phone right of a broccoli", "a photo of a motorcycle left of a backpack"]
    assert generate("train", 3, 0)[0] == [*expected, "a photo of four birds"]
