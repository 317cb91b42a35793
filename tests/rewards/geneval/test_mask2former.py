"""The detector, from a file of weights to detections, against cv2, transformers' network and mmdet 2's rule."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fopd_jax.interop.scorers.mask2former import convert
from fopd_jax.interop.scorers.weights import save_weights
from fopd_jax.models.instances import GREY, MEAN, STD
from fopd_jax.models.mask2former import Mask2FormerConfig
from fopd_jax.rewards.geneval.mask2former import LOWEST_SCORE, make_detector
from tests.models.mask2former_oracle import (
    SMALL,
    TRUE,
    channels_first,
    config_json,
    mmdet_instances,
    oracle,
    published,
)

TOLERANCE = 1e-4
FIELD = "rewards.geneval.weights"


def write(path: Path, config: Mask2FormerConfig) -> Path:
    save_weights(path, "mask2former", *convert(published(config), config_json(config)), {})
    return path


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Coloured noise of large cells."""
    cells = np.random.default_rng(0).integers(0, 256, (count, 3, 5, 3), dtype=np.uint8)
    return np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in cells])


def expected_detections(config: Mask2FormerConfig, image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Boxes, scores, labels and mask logits as mmdet would find them with transformers' network."""
    height, width = image.shape[:2]
    factor = min(1333 / max(height, width), 800 / min(height, width))
    inner = int(height * factor + 0.5), int(width * factor + 0.5)
    filled = tuple(-(-side // 32) * 32 for side in inner)
    pixels = np.full((*filled, 3), GREY, np.float32)
    pixels[: inner[0], : inner[1]] = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_LINEAR)
    with torch.no_grad():
        made = oracle(config)(pixel_values=channels_first(((pixels - MEAN) / STD).astype(np.float32)[None]))
    logits = made.class_queries_logits[0], made.masks_queries_logits[0]
    labels, scores, boxes, masks = (each.numpy() for each in mmdet_instances(*logits, filled, inner, (height, width)))
    keep = scores >= LOWEST_SCORE
    return boxes[keep], scores[keep], labels[keep], masks[keep]


def check(config: Mask2FormerConfig, weights: Path, images: np.ndarray) -> None:
    found = make_detector(weights, FIELD)(images)
    assert len(found) == len(images)
    for image, detections in zip(images, found, strict=True):
        boxes, scores, labels, masks = ordered(expected_detections(config, image))
        assert len(scores) > 3
        assert detections.masks is not None
        ours = ordered((detections.boxes, detections.scores, detections.labels, detections.masks))
        np.testing.assert_array_equal(ours[2], labels)
        np.testing.assert_allclose(ours[1], scores, atol=TOLERANCE)
        np.testing.assert_allclose(ours[0], boxes, atol=TOLERANCE)
        assert ours[3].shape == masks.shape
        sure = np.abs(masks) > TOLERANCE
        np.testing.assert_array_equal(ours[3][sure], masks[sure] > 0)


def ordered(found: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """By label and box: what is about equally likely may come in either order."""
    boxes, _, labels, _ = found
    order = np.lexsort((*boxes.T, labels))
    return [each[order] for each in found]


def test_detections_are_mmdets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three pictures, two at once, of 20 x 400 pixels, which become 67 x 1333 and are filled up to 96 x 1344."""
    monkeypatch.setattr("fopd_jax.rewards.geneval.mask2former.at_once", lambda *_: 2)
    check(SMALL, write(tmp_path / "weights.safetensors", SMALL), pictures(3, 20, 400))


@pytest.mark.slow
def test_detections_at_true_size_are_mmdets(tmp_path: Path):
    check(TRUE, write(tmp_path / "weights.safetensors", TRUE), pictures(1, 20, 400))


def test_wrong_weights_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{FIELD}: .*no such file"):
        make_detector(tmp_path / "absent.safetensors", FIELD)
    save_weights(tmp_path / "clip.safetensors", "clip", {}, {"a": np.zeros(1, np.float32)}, {})
    with pytest.raises(ValueError, match=rf"{FIELD}: .*found clip, expected mask2former"):
        make_detector(tmp_path / "clip.safetensors", FIELD)
    shape = convert(published(SMALL), None)[0]
    shape["decoder"]["num_classes"] = 133
    save_weights(tmp_path / "panoptic.safetensors", "mask2former", shape, {"a": np.zeros(1, np.float32)}, {})
    with pytest.raises(ValueError, match=rf"{FIELD}: .*found a detector of 133 classes, expected COCO's 80"):
        make_detector(tmp_path / "panoptic.safetensors", FIELD)
