"""The reward `jpeg_compressibility` against the definition: minus the kilobytes of Pillow's JPEG."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fopd_jax.config.schema import RewardConfig
from fopd_jax.rewards.jpeg import make


def score(images: np.ndarray, **options: Any) -> np.ndarray:
    reward = make("jpeg", RewardConfig(options=options), None)
    return reward.score(images, [""] * len(images), [{}] * len(images)).values


def test_the_value_is_minus_the_size_of_the_file():
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    images[1] = images[1, :1, :1]  # one colour
    for quality in (95, 30):
        sizes = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            sizes.append(len(file.getvalue()))
        np.testing.assert_array_equal(score(images, quality=quality), -np.array(sizes) / 1000)
    np.testing.assert_array_equal(score(images), score(images, quality=95))
    assert score(images)[1] > score(images)[0]


def test_it_says_where_it_runs_and_in_which_range():
    reward = make("jpeg", RewardConfig(), None)
    assert (reward.name, reward.runs, reward.limits) == ("jpeg", "host", (None, 0.0))
    assert len(reward.score(np.zeros((0, 8, 8, 3), np.uint8), [], [])) == 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (RewardConfig(options={"quality": 0}), "rewards.jpeg.options.quality: found 0, expected 1 to 95"),
        (
            RewardConfig(options={"quality": "high"}),
            "rewards.jpeg.options.quality: found 'high', expected a value",
        ),
        (RewardConfig(options={"size": 1}), "rewards.jpeg.options.size: no such option, expected some of quality"),
        (RewardConfig(weights="a.safetensors"), "rewards.jpeg.weights: found 'a.safetensors', expected ''"),
    ],
)
def test_wrong_settings_are_refused(settings: RewardConfig, problem: str):
    with pytest.raises(ValueError, match=problem):
        make("jpeg", settings, None)
