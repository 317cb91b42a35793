"""The reward `geneval` by detectors and classifiers whose answers are known: values, details, failures, refusals."""

import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.config.schema import RewardConfig
from fopd_jax.rewards.geneval.colours import Crop, pixel_colours
from fopd_jax.rewards.geneval.detections import CLASSES, Detections
from fopd_jax.rewards.geneval.reward import Options, geneval_reward, make
from fopd_jax.rewards.preprocessing import OPEN_CLIP
from tests.rewards.geneval.onnx_files import write_model

PLAIN = Options(detector="onnx", colours="pixels")
RED, BLUE = (200, 30, 35), (40, 85, 180)
SINGLE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
COLOR = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
COLOR_ATTR = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


def draw(*things: tuple[str, tuple[int, int, int]]) -> np.ndarray:
    """Things side by side, each a square of its colour; what they are stands in the first column, for `read`."""
    image = np.full((32, 128, 3), 128, np.uint8)
    image[:, 0] = 255
    for i, (name, colour) in enumerate(things):
        image[4:28, 4 + 30 * i : 28 + 30 * i] = colour
        image[i, 0] = CLASSES.index(name)
    return image


def read(images: np.ndarray) -> list[Detections]:
    """A detector of what `draw` draws."""
    results = []
    for image in images:
        labels = [int(each) for each in image[:, 0, 0] if each < 80]
        boxes = np.array([(4 + 30 * i, 4, 28 + 30 * i, 28) for i in range(len(labels))], np.float32).reshape(-1, 4)
        results.append(Detections(boxes, np.linspace(0.99, 0.95, len(labels)), np.array(labels, int)))
    return results


CAT, TWO_CATS = draw(("cat", RED)), draw(("cat", RED), ("cat", RED))
BLUE_CAT, NOTHING = draw(("cat", BLUE)), draw()
BOTH, SWAPPED = draw(("cat", RED), ("dog", BLUE)), draw(("cat", BLUE), ("dog", RED))


@pytest.mark.parametrize(
    ("value", "expected", "limits"),
    [
        ("continuous", [1, -0.0, 0, 0.5, 1, 0.5], (-14, 1)),
        ("continuous_fixed", [1, 0, 0, 0.5, 1, 0.5], (0, 1)),
        ("official", [1, 1, 0, 0, 1, 0], (0, 1)),
        ("exact", [1, 0, 0, 0, 1, 0], (0, 1)),
    ],
)
def test_the_value_is_the_one_that_is_chosen_and_all_are_kept(value: str, expected: list, limits: tuple):
    reward = geneval_reward("geneval", read, pixel_colours, dataclasses.replace(PLAIN, value=value))
    images = np.stack([CAT, TWO_CATS, NOTHING, BLUE_CAT, BOTH, SWAPPED])
    metadata = [SINGLE, SINGLE, COLOR, COLOR, COLOR_ATTR, COLOR_ATTR]
    scores = reward.score(images, ["a photo"] * 6, metadata)
    assert scores.values.tolist() == expected
    assert not scores.failed.any()
    assert reward.limits == limits
    assert reward.runs == "host"
    told = json.loads(json.dumps(scores.details))
    assert told[1] == {
        "tag": "single_object", "official": True, "exact": False, "continuous": 0.0, "continuous_fixed": 0.0,
        "reason": "", "exact_reason": "expected 1 cat, found 2", "found": {"cat": 2},
    }  # fmt: skip
    assert told[5]["reason"] == "expected 1 red cat, found blue; expected 1 blue dog, found red"


def test_all_crops_of_a_batch_go_to_the_classifier_at_once_and_only_those_that_decide():
    batches: list[list[str]] = []

    def classify(crops: Sequence[Crop]) -> list[str]:
        batches.append([crop.name for crop in crops])
        return pixel_colours(crops)

    reward = geneval_reward("geneval", read, classify, PLAIN)
    images = np.stack([CAT, BOTH, CAT, TWO_CATS, NOTHING])
    reward.score(images, [""] * 5, [SINGLE, COLOR_ATTR, COLOR, COLOR, COLOR])
    assert batches == [["cat", "dog", "cat", "cat"]]


def test_masks_are_cut_with_the_boxes():
    """Only the object's own pixels count, where the detector tells them."""
    image = draw(("cat", BLUE))
    image[12:20, 12:20] = RED  # most of the box is blue

    def masked(images: np.ndarray) -> list[Detections]:
        mask = np.zeros((1, 32, 128), bool)
        mask[:, 12:20, 12:20] = True
        return [dataclasses.replace(each, masks=mask) for each in read(images)]

    values = [
        geneval_reward("geneval", detect, pixel_colours, PLAIN).score(image[None], [""], [COLOR]).values[0]
        for detect in (read, masked)
    ]
    assert values == [0.5, 1.0]


# ---- failures


def bad_detector(images: np.ndarray) -> list[Detections]:
    if (images == 7).any():
        raise RuntimeError("cannot see it")
    return read(images)


def test_an_image_that_the_detector_fails_on_fails_alone():
    broken = draw(("cat", (7, 7, 7)))
    reward = geneval_reward("geneval", bad_detector, pixel_colours, PLAIN)
    scores = reward.score(np.stack([CAT, broken, TWO_CATS]), [""] * 3, [SINGLE] * 3)
    assert scores.failed.tolist() == [False, True, False]
    assert scores.values[[0, 2]].tolist() == [1, 0]
    assert scores.details[1] == {"error": "RuntimeError: cannot see it"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"boxes": np.full((1, 4), np.nan)}, "not finite"),
        ({"labels": np.array([80])}, "label 80"),
        ({"masks": np.ones((1, 5, 5), bool)}, "masks of (5, 5) of an image of (32, 128)"),
    ],
)
def test_detections_that_make_no_sense_are_that_image_s_failure(change: dict, error: str):
    def detect(images: np.ndarray) -> list[Detections]:
        first, *rest = read(images)
        return [dataclasses.replace(first, **change), *rest]

    scores = geneval_reward("geneval", detect, pixel_colours, PLAIN).score(
        np.stack([CAT, CAT]), ["", ""], [COLOR, COLOR]
    )
    assert scores.failed.tolist() == [True, False]
    assert error in scores.details[0]["error"]


def test_a_detector_that_answers_for_others_fails_them_all():
    reward = geneval_reward("geneval", lambda images: [], pixel_colours, PLAIN)
    scores = reward.score(np.stack([CAT, CAT]), ["", ""], [SINGLE, SINGLE])
    assert scores.failed.all()
    assert scores.details[0] == {"error": "ValueError: the detector answers for 0 images, expected 1"}


@pytest.mark.parametrize(
    ("classify", "error"),
    [
        (lambda crops: 1 / 0, "ZeroDivisionError"),
        (lambda crops: ["red"], "the classifier answers for 1 crops, expected 2"),
        (lambda crops: ["grey"] * len(crops), "colours of 1 cat"),
    ],
)
def test_a_classifier_that_fails_fails_those_that_need_it(classify, error: str):
    reward = geneval_reward("geneval", read, classify, PLAIN)
    scores = reward.score(np.stack([CAT, CAT, BLUE_CAT]), [""] * 3, [SINGLE, COLOR, COLOR])
    assert scores.failed.tolist() == [False, True, True]
    assert scores.values[0] == 1
    assert all(error in each["error"] for each in scores.details[1:])


def test_a_prompt_without_a_record_fails_alone():
    reward = geneval_reward("geneval", read, pixel_colours, PLAIN)
    scores = reward.score(np.stack([CAT, CAT]), ["a cat", "a photo"], [{}, SINGLE])
    assert scores.failed.tolist() == [True, False]
    assert scores.details[0]["error"].startswith("ValueError: GenEval prompt 'a cat', tag None: tag: expected one of")


def test_no_images_are_no_failure():
    scores = geneval_reward("geneval", read, pixel_colours, PLAIN).score(np.zeros((0, 8, 8, 3), np.uint8), [], [])
    assert len(scores) == 0


# ---- before anything is sampled


def test_check_names_prompts_that_can_never_be_scored():
    reward = geneval_reward("geneval", read, pixel_colours, PLAIN)
    reward.check(["a", "b"], [SINGLE, COLOR])
    with pytest.raises(ValueError, match=r"GenEval prompt 'b', tag 'colors': include\[0\]\.region: no such key"):
        reward.check(["a", "b"], [SINGLE, {**COLOR, "include": [{**COLOR["include"][0], "region": "left"}]}])
    many = {"tag": "counting", "include": [{"class": "cat", "count": 17}]}
    with pytest.raises(ValueError, match=r"'c', tag 'counting': found count 17 of cat, expected at most 16"):
        reward.check(["c"], [many])
    geneval_reward("geneval", read, pixel_colours, dataclasses.replace(PLAIN, most=17)).check(["c"], [many])


def config(weights: str = "x.onnx", **options: object) -> RewardConfig:
    return RewardConfig(weights=weights, options={"detector": "onnx", "colours": "pixels", **options})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(value="strict"), "rewards.eyes.options.value: found 'strict', expected one of official, exact,"),
        (config(colours="eye"), "rewards.eyes.options.colours: found 'eye', expected one of clip, pixels"),
        (config(colours="clip"), "rewards.eyes.options.clip: found '', expected the file of CLIP's weights"),
        (
            config(clip="c.safetensors"),
            "rewards.eyes.options.clip: found 'c.safetensors', expected '': colours = 'pixels'",
        ),
        (
            config(detector="mask2former", size=64),
            "rewards.eyes.options.size: found 64, expected none: mask2former takes",
        ),
        (config(detector="json:loads"), "rewards.eyes.weights: found 'x.onnx', expected '': json:loads reads its own"),
        (config(score=1.5), "rewards.eyes.options.score: found 1.5, expected 0 to 1"),
        (config(overlap=-1.0), "rewards.eyes.options.overlap: found -1.0, expected 0 to 1"),
        (config(most=0), "rewards.eyes.options.most: found 0, expected 1 to 1000"),
        (config(nms=2.0), "rewards.eyes.options.nms: found 2.0, expected 0 to 1"),
        (config(threshold=0.3), "rewards.eyes.options.threshold: no such option, expected some of"),
        (config(most="16"), "rewards.eyes.options.most: found '16', expected a value of type int"),
        (config(detector="eyes"), "rewards.eyes.options.detector: found 'eyes', expected mask2former, onnx or"),
        (config(""), "rewards.eyes.weights: found '', expected the file of the detector onnx"),
        (config("", detector="mask2former"), "rewards.eyes.weights: found '', expected the file of the detector mask2"),
        (config("absent.onnx"), "rewards.eyes.weights: absent.onnx: no such file"),
    ],
)
def test_wrong_settings_are_named(settings: RewardConfig, message: str):
    with pytest.raises(ValueError) as error:
        make("eyes", settings, None)
    assert message in str(error.value)
    assert str(error.value).startswith("rewards.eyes.")


# ---- parts that are named


def test_an_onnx_file_and_options_make_a_reward(tmp_path: Path):
    boxes = np.array([[[4.0, 4, 28, 28, 0.5, CLASSES.index("cat")]]], np.float32)
    weights = write_model(tmp_path / "model.onnx", [boxes], shape=("b", 3, 32, 32))
    image = draw(("cat", RED))[None, :, :32]
    for score, value in ((0.4, 1.0), (0.6, 0.0)):
        reward = make("geneval", config(str(weights), score=score), None)
        assert reward.name == "geneval"
        assert reward.score(image, [""], [COLOR]).values.tolist() == [value]


def test_mask2former_and_clip_run_on_the_device(monkeypatch: pytest.MonkeyPatch):
    """Each is made from its own file; `make` asks for nothing else of them."""
    made = []

    class Clip:
        def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
            return np.tile(np.eye(10, dtype=np.float32)[0], (len(images), 1))  # red

        def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
            return np.repeat(np.eye(10, dtype=np.float32), 3, axis=0)

    def module(name: str, function: str, result: object) -> None:
        there = types.ModuleType(f"fopd_jax.rewards.{name}")
        setattr(there, function, lambda path, *others: made.append((name, str(path), *others)) or result)
        monkeypatch.setitem(sys.modules, there.__name__, there)
        parent, _, last = there.__name__.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], last, there, raising=False)

    module("geneval.mask2former", "make_detector", read)
    module("clip", "load_clip", Clip())
    reward = make("eyes", RewardConfig(weights="m.safetensors", options={"clip": "c.safetensors"}), None)
    assert made == [
        ("geneval.mask2former", "m.safetensors", "rewards.eyes.weights"),
        ("clip", "c.safetensors", "rewards.eyes.options.clip", OPEN_CLIP),
    ]
    assert reward.runs == "device"
    assert reward.score(np.stack([CAT, BLUE_CAT]), ["", ""], [COLOR, COLOR]).values.tolist() == [1, 1]


def test_a_detector_of_one_s_own():
    reward = make("geneval", config("", detector=f"{read.__module__}:read"), None)
    assert reward.score(CAT[None], [""], [COLOR]).values.tolist() == [1]
    assert reward.runs == "host"


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("nowhere.at_all:read", "cannot import nowhere.at_all:read (ModuleNotFoundError: No module named 'nowhere')"),
        ("json:nothing", "cannot import json:nothing (AttributeError: module 'json' has no attribute 'nothing')"),
        ("json:__name__", "json:__name__ is of type str, expected a function"),
        (":read", "cannot import :read (ValueError: Empty module name)"),
    ],
)
def test_detectors_that_are_not_there_are_named(detector: str, message: str):
    with pytest.raises(ValueError) as error:
        make("geneval", config("", detector=detector), None)
    assert str(error.value) == f"rewards.geneval.options.detector: {message}"
