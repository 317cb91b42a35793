"""Cards: what an adapter says of itself comes back from JSON, and what is no card is refused by its field."""

import dataclasses
import json
from typing import Any

import pytest

from fopd_jax.adapters.card import AdapterCard, parse_card

FULL = AdapterCard(
    algorithm="diffusion_nft",
    rewards={"ocr": 1.0, "pickscore": 0.5},
    guidance=1.0,
    resolution=(512, 768),
    train_steps=10,
    eval_steps=40,
    preset="sd35_medium",
    base="c0ffee",
    rank=32,
    alpha=64.0,
    targets=("attn", "mlp"),
    updates=400,
    scores={"ocr": 0.92, "reward/ocr": -0.5},
    scored_at=380,
    config="sd35m_nft",
    config_hash="0123456789abcdef",
    version="0.1.0",
    coordinates=("ocr", "geneval"),
    coordinates_high=1.25,
)


def test_a_card_comes_back_from_json():
    assert parse_card(json.loads(json.dumps(FULL.fields()))) == FULL
    assert set(FULL.fields()) == {field.name for field in dataclasses.fields(AdapterCard)}  # none is left out above


def test_what_is_not_known_is_left_out():
    assert AdapterCard().fields() == {}
    assert parse_card({}) == AdapterCard()
    zeros = AdapterCard(guidance=0.0, updates=0, scored_at=0, scores={"text": 0.0})
    assert parse_card(zeros.fields()) == zeros


def test_equal_cards_give_equal_text():
    other = dataclasses.replace(FULL, rewards=dict(reversed(list(FULL.rewards.items()))))
    assert json.dumps(other.fields()) == json.dumps(FULL.fields())


def test_the_scale_is_that_of_the_geometry():
    assert FULL.scale == 2.0
    assert dataclasses.replace(FULL, rank=None).scale is None


def test_fields_of_later_versions_are_left_alone():
    assert parse_card(FULL.fields() | {"curriculum": [1, 2], "later": None}) == FULL


WRONG: dict[str, list[Any]] = {
    "text": [None, 1, True, ["flow_grpo"], {}],
    "count": [None, -1, 1.0, "10", True, [10]],
    "number": [None, "4.5", True, float("nan"), float("inf"), 10**400, [1.0]],
    "numbers": [None, [], "ocr", {"ocr": None}, {"ocr": "1"}, {"ocr": float("nan")}, {"ocr": True}],
    "size": [None, 512, [512], [512, 512, 512], [512, 0], ["512", "512"], [512.0, 512], [True, 512], "512"],
    "texts": [None, "attn", [1], ["attn", None], {"attn": 1}],
}
KINDS = {
    "algorithm": "text", "rewards": "numbers", "guidance": "number", "resolution": "size", "train_steps": "count",
    "eval_steps": "count", "preset": "text", "base": "text", "rank": "count", "alpha": "number", "targets": "texts",
    "updates": "count", "scores": "numbers", "scored_at": "count", "config": "text", "config_hash": "text",
    "version": "text", "coordinates": "texts", "coordinates_high": "number",
}  # fmt: skip


@pytest.mark.parametrize("field", dataclasses.fields(AdapterCard), ids=lambda field: field.name)
def test_a_field_of_another_type_is_refused_by_name(field: Any):
    further = {"guidance": [-1, 101], "rank": [0], "alpha": [0], "coordinates_high": [0.9, 2.1]}.get(field.name, [])
    for value in WRONG[KINDS[field.name]] + further:
        with pytest.raises(ValueError, match=rf"^{field.name}: found .*, expected ") as caught:
            parse_card(FULL.fields() | {field.name: value})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("found", [None, [], "card", 1, [["guidance", 1.0]]])
def test_json_that_is_no_object_is_refused(found: Any):
    with pytest.raises(ValueError, match=r"^found JSON of type \w+, expected an object$"):
        parse_card(found)
