"""Bytes of images, of numpy and within a program."""

import jax
import numpy as np

from fopd_jax.rewards.pixels import to_pixels


def test_levels_are_rounded_to_the_nearest_byte_and_clipped():
    exact = np.arange(256)
    images = (exact / 127.5 - 1).astype(np.float32).reshape(16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(to_pixels(images), exact.reshape(16, 16, 1).repeat(3, -1))
    np.testing.assert_array_equal(to_pixels(images + np.float32(0.49 / 127.5))[..., 0].ravel(), exact)
    np.testing.assert_array_equal(to_pixels(images - np.float32(0.49 / 127.5))[..., 0].ravel(), exact)
    beyond = np.array([-np.inf, -1.2, 1.2, np.inf], np.float32).reshape(2, 2, 1).repeat(3, -1)
    assert to_pixels(beyond)[..., 0].ravel().tolist() == [0, 0, 255, 255]


def test_pixels_keep_leading_axes():
    images = np.zeros((2, 3, 4, 5, 3), np.float32)
    assert to_pixels(images).shape == images.shape
    assert to_pixels(images).dtype == np.uint8


def test_a_program_makes_the_same_bytes_to_the_bit():
    """Near whole levels too, where one rounding in place of two gives the next byte."""
    levels = ((np.arange(256) - 128) / 127.5).astype(np.float32)[np.arange(256) != 128]
    near = (levels.view(np.int32)[None] + np.arange(-40, 41, dtype=np.int32)[:, None]).view(np.float32)
    random = np.random.default_rng(0).uniform(-1.1, 1.1, 3 * 10**5).astype(np.float32)
    images = np.concatenate([near.ravel(), random]).reshape(1, -1, 3)
    found = jax.jit(to_pixels)(images)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, to_pixels(images))
    twice_rounded = np.clip(images * np.float32(127.5) + np.float32(128), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(found, twice_rounded)
