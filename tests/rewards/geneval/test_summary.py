import json

import pytest

from fopd_jax.rewards.geneval.rule import VALUES
from fopd_jax.rewards.geneval.summary import summary


def record(tag: str, name: str = "cat") -> dict:
    return {"tag": tag, "include": [{"class": name, "count": 1}]}


def seen(official: bool, exact: bool = False, continuous: float = 0.0, fixed: float = 0.0) -> dict:
    return dict(zip(VALUES, (official, exact, continuous, fixed), strict=True))


def test_means_over_tags_images_and_prompts_by_hand():
    metadata = [record("colors"), record("colors"), record("colors", "dog"), record("position")]
    details = [seen(True, True, 1.0, 1.0), seen(False), seen(True, False, -1.0), seen(False, False, 0.75, 0.5)]
    result = summary(details, metadata)
    assert json.loads(json.dumps(result)) == result
    assert (result["images"], result["failed"]) == (4, 0)
    assert result["official"] == {
        "tag_mean": pytest.approx((2 / 3 + 0) / 2),
        "image_mean": 2 / 4,
        "prompt_mean": pytest.approx(2 / 3),  # the first two are of one prompt
        "tags": {"colors": pytest.approx(2 / 3), "position": 0.0},
    }
    assert result["exact"]["prompt_mean"] == pytest.approx(1 / 3)
    assert result["exact"]["tag_mean"] == pytest.approx(1 / 6)
    assert result["continuous"] == {
        "tag_mean": pytest.approx(0.375),
        "image_mean": pytest.approx(0.1875),
        "tags": {"colors": 0.0, "position": 0.75},
    }
    assert result["continuous_fixed"]["image_mean"] == pytest.approx(0.375)


def test_failures_are_counted_and_in_no_mean():
    result = summary([seen(True), {"error": "lost"}, {"error": "lost"}], [record("colors")] * 2 + [record("position")])
    assert (result["images"], result["failed"]) == (3, 2)
    assert result["official"] == {"tag_mean": 1.0, "image_mean": 1.0, "tags": {"colors": 1.0}, "prompt_mean": 1.0}


def test_of_nothing_there_is_no_mean():
    for details, metadata in (([], []), ([{"error": "lost"}], [record("colors")])):
        result = summary(details, metadata)
        assert result["official"] == {"tag_mean": None, "image_mean": None, "tags": {}, "prompt_mean": None}


def test_a_record_for_each_image():
    with pytest.raises(ValueError, match="found 1 records of 2 images"):
        summary([seen(True), seen(True)], [record("colors")])
