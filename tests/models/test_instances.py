"""What goes into Mask2Former against cv2, bit by bit; what comes out against mmdet 2's rule, written down in PyTorch.

Tolerances: scores and boxes 1e-4; masks equal but for pixels whose logit is within 1e-4 of 0.
"""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.models.instances import MEAN, STD, Instances, find_instances, input_size, make_input, resize_bytes
from tests.models.mask2former_oracle import mmdet_instances

TOLERANCE = 1e-4


# ---- input


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),
        ((300, 1000), (400, 1333)),  # the long side's limit
        ((1000, 37), (1333, 49)),
    ],
)
def test_the_short_side_is_800_unless_the_long_one_is_1333(size: tuple[int, int], wanted: tuple[int, int]):
    assert input_size(*size) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"), [((96, 96), (150, 150)), ((61, 83), (40, 31)), ((64, 48), (97, 73)), ((1, 7), (3, 5))]
)
def test_bytes_are_resized_as_by_cv2(size: tuple[int, int], wanted: tuple[int, int]):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = [cv2.resize(image, wanted[::-1], interpolation=cv2.INTER_LINEAR) for image in images]
    np.testing.assert_array_equal(jax.jit(resize_bytes, static_argnums=1)(images, wanted), expected)


def test_input_is_normalised_rgb_filled_up_with_grey():
    images = np.zeros((1, 48, 64, 3), np.uint8)
    images[..., 0], images[..., 2] = 255, 51
    found = np.asarray(jax.jit(make_input)(images))
    assert found.shape == (1, 800, 1088, 3)  # 800 x 1067, filled up
    colour, grey = ((np.array(each) - MEAN) / STD for each in ((255, 0, 51), (128, 128, 128)))
    np.testing.assert_allclose(found[:, :, :1067], np.broadcast_to(colour, (1, 800, 1067, 3)), atol=1e-5)
    np.testing.assert_allclose(found[:, :, 1067:], np.broadcast_to(grey, (1, 800, 21, 3)), atol=1e-5)


# ---- output


def logits(queries: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of which none ties with another; blobs of several sizes, one mask empty, one full, one of one pixel."""
    draw = np.random.default_rng(0)
    classes = 3 * draw.standard_normal((2, queries, 81), dtype=np.float32)
    coarse = draw.standard_normal((2, queries, 3, 4), dtype=np.float32)
    masks = np.array(jax.image.resize(coarse, (2, queries, height, width), "cubic")) * 4
    masks[:, 0], masks[:, 1], masks[:, 2] = -5, 5, -50
    masks[:, 2, height // 2, width // 2] = 400
    classes[:, :3, 7] = 12  # so that these three are among the best
    return classes, masks


@pytest.mark.parametrize(
    ("inner", "size"), [((96, 128), (60, 81)), ((90, 101), (57, 64)), ((96, 128), (200, 260)), ((33, 128), (33, 128))]
)
def test_instances_are_mmdets(inner: tuple[int, int], size: tuple[int, int]):
    classes, masks = logits(20, 24, 32)
    found = jax.jit(find_instances, static_argnums=(2, 3))(classes, masks, inner, size)
    assert found.masks.shape == (2, 20, size[0], -(-size[1] // 8))
    for picture in range(2):
        check_picture(Instances(*(np.asarray(each[picture]) for each in found)), size, mmdet_instances(
            torch.from_numpy(classes[picture]), torch.from_numpy(masks[picture]), (96, 128), inner, size
        ))  # fmt: skip


def check_picture(found: Instances, size: tuple[int, int], expected: tuple[torch.Tensor, ...]) -> None:
    labels, scores, boxes, theirs = (each.numpy() for each in expected)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.scores, scores, atol=TOLERANCE)
    np.testing.assert_allclose(found.boxes, boxes, atol=TOLERANCE)
    ours = np.unpackbits(found.masks, axis=-1, count=size[1])[found.queries].astype(bool)
    sure = np.abs(theirs) > TOLERANCE
    np.testing.assert_array_equal(ours[sure], theirs[sure] > 0)
    assert sure.mean() > 0.999
    covered = ours.mean((1, 2))
    assert covered.min() == 0 and covered.max() == 1, "the empty and the full mask are among the best"  # noqa: PT018


def test_fewer_pairs_than_100_are_all_kept():
    classes, masks = jnp.zeros((1, 3, 5)), jnp.ones((1, 3, 8, 8))
    found = find_instances(classes, masks, (32, 32), (32, 32))
    assert found.scores.shape == (1, 12)
    np.testing.assert_allclose(found.scores, jax.nn.sigmoid(1.0) / 5, rtol=1e-5)
