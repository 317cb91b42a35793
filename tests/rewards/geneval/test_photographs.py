"""GenEval from pixels to scores: a real detector, of 1 MB, on real photographs and on scenes made of them for each tag.

Where it finds what a person sees, at a limit of .7, every score has to be the one that the rule gives by hand.
"""

from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from fopd_jax.config.schema import RewardConfig
from fopd_jax.rewards.geneval.reward import make
from fopd_jax.rewards.geneval.summary import summary
from fopd_jax.rewards.reward import Reward
from tests.shared_data import shared

PHOTOGRAPHS = {
    "cat": ("chelsea.png", (20, 0, 420, 300)),
    "cup": ("coffee.png", (120, 0, 460, 300)),
    "motorcycle": ("motorcycle_left.png", (60, 40, 720, 470)),
    "person": ("astronaut.png", (0, 0, 400, 512)),
}
GREEN, BLUE, PURPLE = (80, 230, 100), (90, 150, 255), (200, 90, 240)


def photograph(file: str) -> Image.Image:
    path = Path(skimage.__file__).parent / "data" / file
    if not path.exists():
        pytest.skip(f"needs {file} of scikit-image, which is not here")
    return Image.open(path).convert("RGB")


def cut_out(name: str, side: int, tint: tuple[int, int, int] | None = None) -> Image.Image:
    """A part of a photograph that shows one thing, no side longer than that; tinted, its light in one colour."""
    file, box = PHOTOGRAPHS[name]
    part = photograph(file).crop(box)
    part.thumbnail((side, side), Image.Resampling.LANCZOS)
    if tint is None:
        return part
    light = np.asarray(part.convert("L"))[..., None] / 255
    return Image.fromarray((light * tint).astype(np.uint8))


def scene(*placed: tuple[Image.Image, tuple[int, int]]) -> np.ndarray:
    canvas = Image.new("RGB", (512, 512), (205, 205, 200))
    for part, corner in placed:
        canvas.paste(part, corner)
    return np.asarray(canvas)


@pytest.fixture(scope="module")
def reward() -> Reward:
    options = {"detector": "onnx", "colours": "pixels", "score": 0.7, "counting_score": 0.7, "threads": 1}
    weights = str(shared("fastestdet/FastestDet.onnx"))
    return make("geneval", RewardConfig(kind="geneval", weights=weights, options=options), None)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("chelsea.png", "cat"), ("coffee.png", "cup"), ("motorcycle_left.png", "motorcycle"),
        ("astronaut.png", "person"), ("camera.png", "person"),
    ],
)  # fmt: skip
def test_photographs_as_they_are(reward: Reward, file: str, name: str):
    image = np.asarray(photograph(file))[None]
    asked = [{"tag": "single_object", "include": [{"class": each, "count": 1}]} for each in (name, "giraffe")]
    right, wrong = (reward.score(image, ["a photo"], [each]) for each in asked)
    assert right.values.tolist() == [1.0]
    assert right.details[0]["found"][name] == 1
    assert wrong.values.tolist() == [0.0]
    assert wrong.details[0]["reason"] == "expected 1 giraffe, found 0"


def item(name: str, count: int = 1, **more: object) -> dict:
    return {"class": name, "count": count, **more}


def scenes() -> dict[str, np.ndarray]:
    left, right, top, bottom = (3, 150), (256, 150), (131, 30), (131, 300)
    corners = [(8, 20), (264, 20), (136, 300)]
    return {
        "cat, motorcycle": scene((cut_out("cat", 250), left), (cut_out("motorcycle", 250), right)),
        "motorcycle over cat": scene((cut_out("motorcycle", 250), top), (cut_out("cat", 250), bottom)),
        "cup, cat": scene((cut_out("cup", 250), left), (cut_out("cat", 250), right)),
        "three motorcycles": scene(*[(cut_out("motorcycle", 240), corner) for corner in corners]),
        "three cats": scene(*[(cut_out("cat", 240), corner) for corner in corners]),
        "two persons": scene((cut_out("person", 250), left), (cut_out("person", 250), right)),
        "purple motorcycle": scene((cut_out("motorcycle", 400, PURPLE), (56, 80))),
        "green cup": scene((cut_out("cup", 400, GREEN), (56, 80))),
        "blue person, cat": scene((cut_out("person", 250, BLUE), left), (cut_out("cat", 250), right)),
    }


def counting(name: str, count: int) -> dict:
    return {"tag": "counting", "include": [item(name, count)], "exclude": [item(name, count + 1)]}


def position(name: str, relation: str, target: str) -> dict:
    return {"tag": "position", "include": [item(target), item(name, position=[relation, 0])]}


def colours(tag: str, *asked: tuple[str, str]) -> dict:
    return {"tag": tag, "include": [item(name, color=colour) for colour, name in asked]}


CASES = [
    # scene, record, official, exact, continuous, continuous_fixed
    ("cup, cat", {"tag": "single_object", "include": [item("cup")]}, 1, 1, 1, 1),
    ("three cats", {"tag": "single_object", "include": [item("cat")]}, 1, 0, -1, 0),
    ("cat, motorcycle", {"tag": "two_object", "include": [item("cat"), item("motorcycle")]}, 1, 1, 1, 1),
    ("cup, cat", {"tag": "two_object", "include": [item("cat"), item("cup")]}, 1, 1, 1, 1),
    ("cup, cat", {"tag": "two_object", "include": [item("cat"), item("motorcycle")]}, 0, 0, 0.5, 0.5),
    ("three motorcycles", counting("motorcycle", 3), 1, 1, 1, 1),
    ("three motorcycles", counting("motorcycle", 2), 0, 0, 0.5, 0.5),
    ("three cats", counting("cat", 4), 0, 0, 0.75, 0.75),
    ("two persons", counting("person", 2), 1, 1, 1, 1),
    ("cat, motorcycle", position("cat", "left of", "motorcycle"), 1, 1, 1, 1),
    ("cat, motorcycle", position("cat", "right of", "motorcycle"), 0, 0, 0.75, 2 / 3),
    ("cat, motorcycle", position("motorcycle", "right of", "cat"), 1, 1, 1, 1),
    ("motorcycle over cat", position("motorcycle", "above", "cat"), 1, 1, 1, 1),
    ("motorcycle over cat", position("motorcycle", "below", "cat"), 0, 0, 0.75, 2 / 3),
    ("purple motorcycle", colours("colors", ("purple", "motorcycle")), 1, 1, 1, 1),
    ("purple motorcycle", colours("colors", ("green", "motorcycle")), 0, 0, 0.5, 0.5),
    ("green cup", colours("colors", ("green", "cup")), 1, 1, 1, 1),
    ("blue person, cat", colours("color_attr", ("blue", "person"), ("brown", "cat")), 1, 1, 1, 1),
    ("blue person, cat", colours("color_attr", ("brown", "person"), ("blue", "cat")), 0, 0, 0.5, 0.5),
]  # fmt: skip


def test_scenes_of_the_six_tags(reward: Reward):
    pictures, records = scenes(), [record for _, record, *_ in CASES]
    scores = reward.score(np.stack([pictures[name] for name, *_ in CASES]), ["a photo"] * len(CASES), records)
    assert not scores.failed.any()
    for (name, record, *expected), value, seen in zip(CASES, scores.values, scores.details, strict=True):
        found = [seen[each] for each in ("official", "exact", "continuous", "continuous_fixed")]
        assert found == pytest.approx(expected), (name, record, seen)
        assert value == seen["continuous"]
    totals = summary(scores.details, records)
    assert totals["official"]["image_mean"] == pytest.approx(12 / 19)
    assert totals["official"]["tags"] == pytest.approx(
        {"single_object": 1, "two_object": 2 / 3, "counting": 0.5, "colors": 2 / 3, "position": 0.6, "color_attr": 0.5}
    )
