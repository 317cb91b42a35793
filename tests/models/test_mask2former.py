"""The whole of Mask2Former against transformers', on random weights; float32, tolerance 1e-4 on ‖a - b‖/‖b‖."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.models.mask2former import Mask2Former, Mask2FormerConfig, attended
from tests.models.mask2former_oracle import SMALL, TRUE, channels_first, normal, oracle, relative_error, variables

TOLERANCE = 1e-4


def check_whole(config: Mask2FormerConfig, *size: int) -> None:
    pixels = normal(0, *size, 3)
    with torch.no_grad():
        expected = oracle(config)(pixel_values=channels_first(pixels))
    classes, masks = jax.jit(Mask2Former(config).apply)(variables(config), pixels)
    covered = (expected.masks_queries_logits > 0).float().mean((2, 3))
    assert 0.1 < covered.mean() < 0.9, "the masks of these weights do not vary"
    errors = {
        "classes": relative_error(classes, expected.class_queries_logits),
        "masks": relative_error(masks, expected.masks_queries_logits),
    }
    print(errors)
    assert max(errors.values()) <= TOLERANCE, errors


def test_logits_of_classes_and_masks_are_transformers():
    check_whole(SMALL, 2, 64, 160)


@pytest.mark.slow
def test_logits_at_true_size_are_transformers():
    check_whole(TRUE, 1, 256, 384)


def test_a_query_looks_where_its_mask_is_or_everywhere():
    pixels = np.array([[[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]], np.float32)
    embedded = np.array([[[1.0, 0.0], [0.0, 1.0], [-2.0, 2.0], [0.0, 0.0]]], np.float32)
    expected = [[[True, False, True], [True, True, False], [False, True, False], [True, True, True]]]
    np.testing.assert_array_equal(attended(jnp.asarray(embedded), jnp.asarray(pixels)), expected)
    nowhere = attended(jnp.full((1, 1, 2), -1.0), jnp.ones((1, 3, 2)))
    assert bool(nowhere.all())


def test_pictures_that_are_not_filled_up_are_refused():
    with pytest.raises(ValueError, match="found 64 x 72, expected multiples of 32"):
        jax.eval_shape(Mask2Former(SMALL).apply, variables(SMALL), jnp.zeros((1, 64, 72, 3)))
