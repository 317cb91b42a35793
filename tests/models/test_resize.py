"""Resizing against Pillow, bit by bit, and against PyTorch's antialiased interpolation of float tensors.

Pillow from 13 on takes columns first where that is less work, as with tall pictures; in two calls, along rows first,
every version of it does what earlier ones do in one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from fopd_jax.models.resize import (
    Kernel,
    _digits,
    bucket,
    centre,
    fixed_point,
    longest_to,
    padded,
    resample,
    resample_float,
    resize,
    shortest_to,
    weights,
)

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
KERNELS: list[Kernel] = ["bilinear", "bicubic"]
_resample = jax.jit(resample)


def pillow(image: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    along_rows = Image.fromarray(image).resize((width, len(image)), FILTERS[kernel])
    return np.asarray(along_rows.resize((width, height), FILTERS[kernel]))


def picture(random: np.random.Generator, height: int, width: int, hard: bool) -> np.ndarray:
    """Noise, or black and white alone, where cubic weights overshoot most."""
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(noise > 127, 255, 0).astype(np.uint8) if hard else noise


def sized(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.pad(table, ((0, rows - table.shape[0]), (0, columns - table.shape[1])))


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_size_to_any_size(kernel: Kernel) -> None:
    """In one program: 300 pairs of sizes, a pixel among them, in tables and pictures that are filled up to 80."""
    random, most = np.random.default_rng(0), 80
    sizes = random.integers(1, most + 1, (300, 4))
    sizes[:40:4, 0] = sizes[1:40:4, 1] = sizes[2:40:4, 2] = sizes[3:40:4, 3] = 1
    sizes[40:50, 2], sizes[45:55, 3] = sizes[40:50, 0], sizes[45:55, 1]
    for start in range(0, len(sizes), 50):
        own = sizes[start : start + 50]
        images = [picture(random, h, w, i % 2 == 0) for i, (h, w, _, _) in enumerate(own)]
        rows = [sized(fixed_point(weights(int(h), int(oh), kernel)), most, most) for h, _, oh, _ in own]
        columns = [sized(fixed_point(weights(int(w), int(ow), kernel)), most, most) for _, w, _, ow in own]
        batch = np.stack([np.pad(each, ((0, most - len(each)), (0, most - each.shape[1]), (0, 0))) for each in images])
        found = np.asarray(_resample(batch, np.stack(rows), np.stack(columns)))
        for image, (h, w, oh, ow), ours in zip(images, own.tolist(), found, strict=True):
            np.testing.assert_array_equal(ours[:oh, :ow], pillow(image, oh, ow, kernel), f"{h}x{w} to {oh}x{ow}")
            assert not ours[oh:].any(), "rows of zeros give black"
            assert not ours[:, ow:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("height", "width", "to"),
    [(512, 512, (224, 224)), (480, 640, (224, 298)), (1, 300, (7, 5)), (2047, 3, (16, 4)), (31, 33, (224, 238))],
)
def test_one_call_of_pillow(height: int, width: int, to: tuple[int, int], kernel: Kernel) -> None:
    image = picture(np.random.default_rng(1), height, width, True)
    found = np.asarray(resize(jnp.asarray(image)[None], *to, kernel))[0]
    np.testing.assert_array_equal(found, pillow(image, *to, kernel))
    if height / to[0] <= width / to[1] * 1.01:
        expected = Image.fromarray(image).resize((to[1], to[0]), FILTERS[kernel])
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_pillow_takes_rows_first_for_a_shortest_side(kernel: Kernel) -> None:
    """Unless a picture is far taller than wide one call and two agree in every version of Pillow."""
    random = np.random.default_rng(2)
    for width, ratio in zip(random.integers(20, 300, 60).tolist(), random.uniform(0.3, 1.5, 60), strict=True):
        height = int(width * ratio)
        image = picture(random, height, width, True)
        to = shortest_to(56, height, width)
        once = np.asarray(Image.fromarray(image).resize((to[1], to[0]), FILTERS[kernel]))
        np.testing.assert_array_equal(once, pillow(image, *to, kernel))


def test_a_pixel_more_is_refused_where_sums_would_not_be_exact() -> None:
    fixed_point(weights(128 * 64, 64, "bicubic"))
    with pytest.raises(ValueError, match="found 520 pixels that go into one, expected at most 514"):
        fixed_point(weights(130 * 64, 64, "bicubic"))
    with pytest.raises(ValueError, match="found 0 to 4 pixels"):
        weights(0, 4, "bicubic")


def test_the_largest_reduction_is_exact() -> None:
    image = np.full((128, 128 * 4, 3), 255, np.uint8)
    image[:, ::2] = 254
    np.testing.assert_array_equal(resize(jnp.asarray(image)[None], 1, 4, "bicubic")[0], pillow(image, 1, 4, "bicubic"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_some_outputs_alone(kernel: Kernel) -> None:
    """As a crop keeps them, of a line that would be far too long: the very same weights."""
    whole = weights(17, 90, kernel)
    np.testing.assert_array_equal(weights(17, 90, kernel, range(31, 64)), whole[31:64])
    long = weights(1000, 224_000, kernel, range(111_888, 112_112))
    assert long.shape == (224, 1000)
    np.testing.assert_allclose(long.sum(1), 1, rtol=1e-12)


def test_digits_lose_nothing_in_the_least_precision_of_a_matrix_unit() -> None:
    """bfloat16 has 8 bits of mantissa: every digit and pixel is exact in it, and sums stay below 2²⁴."""
    tables = [fixed_point(weights(a, b, kernel)) for kernel in KERNELS for a, b in ((7, 90), (90, 7), (512, 224))]
    for table in tables:
        digits = np.asarray(_digits(jnp.asarray(table)[None]))[0]
        np.testing.assert_array_equal(digits, digits.astype(jnp.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(digits.astype(np.int64).T @ [1, 256, 256**2], table.T)
        assert (np.abs(digits) * 255).sum(-1).max() < 2**24
    pixels = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(pixels, pixels.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(48, 60, 20, 25), (20, 25, 48, 60), (30, 30, 30, 30), (33, 64, 12, 64)])
def test_float_tensors_as_pytorch(sizes: tuple[int, int, int, int], kernel: Kernel) -> None:
    """torchvision resizes tensors by this function. It computes places up to 64 in float32, so weights are off by a few
    of their half-ulps, 4e-6."""
    height, width, *to = sizes
    image = picture(np.random.default_rng(3), height, width, True)
    expected = torch.nn.functional.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None] / 255, size=to, mode=kernel, antialias=True, align_corners=False
    )
    tables = (weights(a, b, kernel).astype(np.float32)[None] for a, b in zip((height, width), to, strict=True))
    found = jax.jit(resample_float)(image[None], *tables)
    np.testing.assert_allclose(found[0], expected[0].permute(1, 2, 0).numpy(), rtol=0, atol=1e-5)


# ---- sizes


def test_sizes() -> None:
    assert shortest_to(224, 480, 640) == (224, 298)
    assert shortest_to(224, 640, 480) == (298, 224)
    assert shortest_to(224, 512, 512) == (224, 224)
    assert longest_to(224, 480, 640) == (168, 224)
    assert longest_to(224, 2000, 3) == (224, 1)
    assert [bucket(length) for length in (1, 64, 65, 512, 513)] == [64, 64, 128, 512, 1024]


@pytest.mark.parametrize(("length", "floor", "even"), [(7, 1, 2), (5, 0, 0), (8, 2, 2), (4, 0, 0)])
def test_centre_crop(length: int, floor: int, even: int) -> None:
    """Half a pixel over: transformers cuts at the lower place, torchvision rounds to the even one."""
    assert centre(length, 4, "floor") == range(floor, floor + 4)
    assert centre(length, 4, "even") == range(even, even + 4)


def test_padding() -> None:
    assert padded(np.ones((3, 1)), 6)[:, 0].tolist() == [0, 1, 1, 1, 0, 0]
