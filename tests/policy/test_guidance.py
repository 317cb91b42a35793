"""Guidance, with one scale and with one per sample. Tolerance 1e-6 absolute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.policy.guidance import guided


@pytest.fixture
def velocities():
    # Batch and channels of equal size: a per-sample scale on the wrong axis would still broadcast.
    return tuple(jax.random.normal(jax.random.key(seed), (4, 2, 2, 4)) for seed in (0, 1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5, jnp.float32(4.5)])
def test_guidance_extrapolates_from_the_null_velocity(velocities, scale):
    v_text, v_null = velocities
    expected = np.asarray(v_null) + float(scale) * (np.asarray(v_text) - np.asarray(v_null))
    np.testing.assert_allclose(guided(v_text, v_null, scale), expected, rtol=0, atol=1e-6)


def test_every_sample_keeps_its_own_scale(velocities):
    v_text, v_null = velocities
    scales = jnp.array([1.0, 4.5, 0.0, 7.0])
    found = guided(v_text, v_null, scales)
    assert found.shape == v_text.shape
    for i, scale in enumerate(scales):
        alone = guided(v_text[i : i + 1], v_null[i : i + 1], scale)
        np.testing.assert_allclose(found[i : i + 1], alone, rtol=0, atol=1e-6)


def test_half_precision_velocities_are_combined_in_float32(velocities):
    v_text, v_null = (v.astype(jnp.bfloat16) for v in velocities)
    found = guided(v_text, v_null, jnp.full(4, 4.5))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, guided(v_text.astype(jnp.float32), v_null.astype(jnp.float32), 4.5))


def test_scales_of_another_batch_are_refused(velocities):
    with pytest.raises((ValueError, TypeError), match="scale"):  # whichever of annotation and check comes first
        guided(*velocities, jnp.ones(3))
