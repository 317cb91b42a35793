import copy
import json

import pytest

from fopd_jax.rewards.geneval.detections import CLASSES
from fopd_jax.rewards.geneval.records import COLOURS, RELATIONS, TAGS, Item, Record, read_record
from tests.shared_data import shared

RECORD = {
    "tag": "position",
    "include": [
        {"class": "teddy bear", "count": 1},
        {"class": "dog", "count": 2, "color": "red", "position": ["right of", 0]},
    ],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a photo",
}


def test_a_record_as_it_stands_in_files():
    assert read_record("a photo", RECORD) == Record(
        "position", (Item("teddy bear", 1), Item("dog", 2, "red", "right of", 0)), (Item("dog", 3),)
    )
    assert read_record("", {**RECORD, "id": 7}).tag == "position"  # keys of others beside it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each.pop("tag"), "tag None: tag: expected one of single_object, two_object,"),
        (lambda each: each.update(tag="spatial_count_attr"), "tag 'spatial_count_attr': tag: expected one of"),
        (lambda each: each.pop("include"), "include: found no items, expected at least one"),
        (lambda each: each.update(include={}), "include: found {}, expected a list"),
        (lambda each: each.update(exclude="dog"), "exclude: found 'dog', expected a list"),
        (lambda each: each["include"].append("dog"), "include[2]: found 'dog', expected an object"),
        (lambda each: each["include"][0].update(region="left"), "include[0].region: no such key in GenEval"),
        (lambda each: each["include"][1].update(size="larger"), "include[1].size: no such key in GenEval"),
        (lambda each: each["exclude"][0].update(color="red"), "exclude[0].color: no such key in GenEval"),
        (lambda each: each["include"][0].update({"class": "sofa"}), "include[0].class: found 'sofa'"),
        (lambda each: each["include"][0].update({"class": ["dog"]}), "include[0].class: found ['dog']"),
        (lambda each: each["include"][0].pop("class"), "include[0].class: found None"),
        (lambda each: each["include"][0].update(count=0), "include[0].count: found 0, expected a whole number"),
        (lambda each: each["include"][0].update(count=1.0), "include[0].count: found 1.0"),
        (lambda each: each["include"][0].update(count=True), "include[0].count: found True"),
        (lambda each: each["exclude"][0].pop("count"), "exclude[0].count: found None"),
        (lambda each: each["include"][1].update(color="grey"), "include[1].color: found 'grey', expected one of red,"),
        (lambda each: each["include"][1].update(color=None), "include[1].color: found None"),
        (lambda each: each["include"][1].update(position=["beside", 0]), "include[1].position: found ['beside', 0]"),
        (lambda each: each["include"][1].update(position="left of"), "include[1].position: found 'left of'"),
        (lambda each: each["include"][1].update(position=["above"]), "include[1].position: found ['above']"),
        (lambda each: each["include"][1].update(position=["above", 1]), "found target 1, expected the place"),
        (lambda each: each["include"][1].update(position=["above", 2]), "found target 2, expected the place"),
        (lambda each: each["include"][1].update(position=["above", -1]), "found target -1"),
        (lambda each: each["include"][1].update(position=["above", "0"]), "found target '0'"),
        (lambda each: each["include"][0].update(position=["above", 0]), "before include[0]"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_named(change, message: str):
    record = copy.deepcopy(RECORD)
    change(record)
    with pytest.raises(ValueError) as error:
        read_record("a photo of dogs", record)
    assert str(error.value).startswith("GenEval prompt 'a photo of dogs', tag ")
    assert message in str(error.value)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in shared(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("geneval/evaluation_metadata.jsonl", 553),
        ("geneval_long/evaluation_metadata_long.jsonl", 553),
        ("flow_grpo/geneval/test_metadata.jsonl", 2212),
        ("flow_grpo/geneval_unseen_objects/test_metadata.jsonl", 1024),
    ],
)
def test_the_published_records_are_all_read(name: str, count: int):
    records = [read_record(row["prompt"], row) for row in rows(name)]
    assert len(records) == count
    items = [item for record in records for item in record.include]
    assert {record.tag for record in records} == set(TAGS)
    assert {item.colour for item in items} == {None, *COLOURS}
    assert {item.relation for item in items} == {None, *RELATIONS}
    assert name.startswith("flow_grpo/geneval_unseen") or {item.name for item in items} == set(CLASSES)


def test_the_published_names_of_classes_in_their_order():
    assert tuple(shared("geneval/object_names.txt").read_text(encoding="utf-8").splitlines()) == CLASSES


def test_of_geneval_plus_plus_only_what_geneval_knows_is_read():
    known = {"counting", "color_attr"}
    for row in rows("geneval_plus_plus/Geneval++.jsonl"):
        if row["tag"] in known:
            read_record(row["prompt"], row)
        else:
            with pytest.raises(ValueError, match=f"tag '{row['tag']}'") as error:
                read_record(row["prompt"], row)
            assert repr(row["prompt"]) in str(error.value)


@pytest.mark.parametrize("key", ["region", "size"])
def test_geneval_plus_plus_s_keys_are_refused_by_name(key: str):
    row = next(each for each in rows("geneval_plus_plus/Geneval++.jsonl") if key in each["include"][0])
    with pytest.raises(ValueError, match=rf"include\[0\]\.{key}: no such key in GenEval"):
        read_record(row["prompt"], {**row, "tag": "two_object", "include": [{"class": "cat", "count": 1, key: "left"}]})
