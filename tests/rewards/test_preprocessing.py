"""What towers are given, against transformers' processor with Pillow, and against the other scorers' steps in PyTorch.

torchvision is not needed: it resizes tensors by `torch.nn.functional.interpolate`, and crops and pads by places.
"""

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fopd_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD
from fopd_jax.parallel.parts import own_mesh
from fopd_jax.rewards.preprocessing import (
    BLIP_VQA,
    FLOW_GRPO,
    HPSV2,
    OPEN_CLIP,
    TRANSFORMERS,
    Preprocessing,
    preprocess,
    preprocess_within,
)

SIZE = 56
SIZES = [(56, 56), (80, 61), (61, 81), (20, 33), (33, 20), (128, 200), (56, 75), (90, 57), (1, 2), (300, 301)]
PILLOW = 2e-6
"""Of equal 8-bit pixels: /255, minus a mean and over a deviation of about 1/4 in float32."""
FLOAT = 1e-4
"""Of float resizes, 1e-5 in [0, 1], over a deviation of about 1/4, twice."""


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def ours(pictures: list[np.ndarray], how: Preprocessing) -> np.ndarray:
    return preprocess(pictures, how, SIZE, own_mesh(), 2)


def normalised(square: np.ndarray) -> np.ndarray:
    """RGB in [0, 1]."""
    return (square - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


def interpolated(picture: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    tensor = torch.tensor(picture).permute(2, 0, 1)[None] / 255
    if size != picture.shape[:2]:
        tensor = torch.nn.functional.interpolate(tensor, size=size, mode=mode, antialias=True, align_corners=False)
    return tensor[0].permute(1, 2, 0).numpy()


def test_transformers(pictures: list[np.ndarray]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    for found, picture in zip(ours(pictures, TRANSFORMERS), pictures, strict=True):
        if len(picture) > 1.5 * picture.shape[1]:
            continue  # where versions of Pillow differ from each other
        expected = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found, expected.transpose(1, 2, 0), rtol=0, atol=PILLOW, err_msg=str(picture.shape))


def test_open_clip(pictures: list[np.ndarray]) -> None:
    """Resize and CenterCrop of torchvision on Pillow's pictures: half a pixel over goes to the even place."""
    for found, picture in zip(ours(pictures, OPEN_CLIP), pictures, strict=True):
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (int(SIZE * height / short), int(SIZE * width / short))
        resized = Image.fromarray(picture).resize((size[1], height), 3).resize(size[::-1], 3)
        top, left = (round((each - SIZE) / 2.0) for each in size)
        square = np.asarray(resized, np.float32)[top : top + SIZE, left : left + SIZE] / 255
        np.testing.assert_allclose(found, normalised(square), rtol=0, atol=PILLOW, err_msg=str(picture.shape))


def test_flow_grpo(pictures: list[np.ndarray]) -> None:
    for found, picture in zip(ours(pictures, FLOW_GRPO), pictures, strict=True):
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (int(SIZE * height / short), int(SIZE * width / short))
        top, left = (round((each - SIZE) / 2.0) for each in size)
        square = interpolated(picture, size, "bilinear")[top : top + SIZE, left : left + SIZE]
        np.testing.assert_allclose(found, normalised(square), rtol=0, atol=FLOAT, err_msg=str(picture.shape))


def test_hpsv2(pictures: list[np.ndarray]) -> None:
    for found, picture in zip(ours(pictures, HPSV2), pictures, strict=True):
        scale = SIZE / max(picture.shape[:2])
        size = (round(picture.shape[0] * scale), round(picture.shape[1] * scale))
        resized = interpolated(picture, size, "bicubic")
        spare = [SIZE - each for each in size]
        square = np.pad(resized, [*((each // 2, each - each // 2) for each in spare), (0, 0)])
        np.testing.assert_allclose(found, normalised(square), rtol=0, atol=FLOAT, err_msg=str(picture.shape))


def test_company_changes_nothing(pictures: list[np.ndarray]) -> None:
    """Alone or among pictures of other sizes in the same program: the same bits."""
    together = ours(pictures, TRANSFORMERS)
    for i in (1, 4, 7):
        np.testing.assert_array_equal(ours([pictures[i]], TRANSFORMERS)[0], together[i])


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="found a picture of 0 x 5 pixels, expected at least 1 x 1"):
        ours([np.zeros((0, 5, 3), np.uint8)], TRANSFORMERS)


@pytest.mark.parametrize(
    ("how", "tolerance"), [(TRANSFORMERS, PILLOW), (BLIP_VQA, PILLOW), (FLOW_GRPO, FLOAT), (HPSV2, FLOAT)]
)
def test_within_a_program_pictures_are_the_same(how: Preprocessing, tolerance: float) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 70, 90, 3), dtype=np.uint8)
    found = jax.jit(lambda images: preprocess_within(images, how, SIZE))(images)
    np.testing.assert_allclose(found, ours(list(images), how), rtol=0, atol=tolerance)
