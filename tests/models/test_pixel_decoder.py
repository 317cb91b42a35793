"""The pixel decoder against transformers', its samples against PyTorch's; float32, tolerance 2e-5 on ‖a - b‖/‖b‖."""

import jax
import numpy as np
import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

from fopd_jax.models.pixel_decoder import PixelDecoder, sample, sine_positions
from tests.models.mask2former_oracle import SMALL, channels_first, normal, oracle, relative_error, variables

TOLERANCE = 2e-5


def test_samples_are_pytorchs_inside_at_the_border_and_outside():
    """Positions on cells' centres, on borders, between, up to far outside, where nothing is."""
    value = normal(0, 2, 3, 5, 2, 4)  # b h w n d
    edges = np.array([-1e9, -7.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.75, 5.0, 6.0, 1e9], np.float32)
    x, y = (each.reshape(-1) for each in np.meshgrid(edges, edges))
    at = np.broadcast_to(np.stack([x, y], -1)[None, :, None, None], (2, x.size, 2, 1, 2)) + normal(1, 2, 1, 2, 3, 2) / 8
    at[..., 0, :] = np.stack([x, y], -1)[None, :, None]  # the first point unmoved
    weights = np.abs(normal(2, 2, x.size, 2, 3))
    expected = np.zeros((2, x.size, 2, 4), np.float32)
    for b, n in np.ndindex(2, 2):
        grid = (at[b, :, n] + 0.5) / np.array([5, 3], np.float32) * 2 - 1
        image = channels_first(value[b : b + 1, :, :, n])
        sampled = torch.nn.functional.grid_sample(image, torch.from_numpy(grid[None]), align_corners=False)
        expected[b, :, n] = np.einsum("dsp,sp->sd", sampled[0].numpy(), weights[b, :, n])
    x, y, shares = (np.moveaxis(each, 1, -1) for each in (at[..., 0], at[..., 1], weights))
    found = np.moveaxis(jax.jit(sample)(value, x, y, shares), -1, 1)
    assert relative_error(found, expected) <= TOLERANCE
    outside = np.any((at <= -1) | (at >= [5, 3]), axis=-1).all(-1)
    assert outside.any()
    assert not np.any(found[outside])


@pytest.mark.parametrize("size", [(3, 5), (25, 25)])
def test_positions_are_transformers(size: tuple[int, int]):
    embedding = Mask2FormerSinePositionEmbedding(16, normalize=True)
    expected = embedding(torch.Size([1, 32, *size]), torch.device("cpu"), torch.float32)[0]
    np.testing.assert_allclose(np.moveaxis(sine_positions(*size, 32), -1, 0), expected, atol=2e-6)


def test_the_decoder_is_transformers():
    maps = [normal(i, 2, 16 >> i, 40 >> i, 24 << i) for i in range(4)]
    with torch.no_grad():
        theirs = oracle(SMALL).model.pixel_level_module.decoder([channels_first(each) for each in maps])
    pixels, levels = jax.jit(PixelDecoder(SMALL.pixel_decoder).apply)(variables(SMALL, "pixel_decoder"), tuple(maps))
    assert relative_error(np.moveaxis(pixels, -1, 1), theirs.mask_features) <= TOLERANCE
    for ours, expected in zip(levels, theirs.multi_scale_features, strict=True):
        assert relative_error(np.moveaxis(ours, -1, 1), expected) <= TOLERANCE
