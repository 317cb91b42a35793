"""The schedule against the published ten-step list and against diffusers. Tolerance 1e-6 absolute unless said."""

import numpy as np
import pytest

from fopd_jax.flow.schedule import flow_match_sigmas, make_levels, sublevels


def test_ten_steps_at_shift_three_are_the_published_levels():
    published = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    np.testing.assert_allclose(flow_match_sigmas(10), published, rtol=0, atol=5.1e-5)  # given to four places


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.73, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 28, 40, 1000])
def test_levels_equal_diffusers(num_steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = flow_match_sigmas(num_steps, shift)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(1000 * sigmas[:-1], scheduler.timesteps.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 40])
def test_levels_fall_from_one_to_zero_in_float32(num_steps):
    sigmas = flow_match_sigmas(num_steps)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1  # exactly: the SDE recognises its first step by it
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_schedule_without_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps: found {num_steps}, expected an integer >= 1"):
        flow_match_sigmas(num_steps)


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_and_finite_is_refused(shift):
    with pytest.raises(ValueError, match=r"shift: found .*, expected a finite number > 0"):
        flow_match_sigmas(10, shift)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("num_steps", "finer"), [(2, 5), (4, 4), (10, 3)])
def test_levels_within_steps_are_those_of_a_finer_schedule(num_steps: int, finer: int, shift: float):
    """But for the last step, which is longer than the others in the time before the shift."""
    sigmas = flow_match_sigmas(num_steps, shift)
    within = sublevels(sigmas, finer, shift)
    whole = flow_match_sigmas(finer * (num_steps - 1) + 1, shift)[:-1]
    np.testing.assert_allclose(whole[::finer], sigmas[:-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(within[:-1].ravel(), np.delete(whole, np.s_[::finer]), rtol=0, atol=1e-6)
    path = np.concatenate([sigmas[:-1, None], within], axis=1).ravel()
    assert within.dtype == np.float32
    assert np.all(np.diff(np.append(path, sigmas[-1])) < 0)


def test_levels_within_steps_are_stacked_with_their_steps():
    sigmas = flow_match_sigmas(4)
    within = sublevels(sigmas, 3)
    levels = make_levels(sigmas, steps=(1, 3), between=within)
    np.testing.assert_array_equal(levels.between, within[1:3])
    assert sublevels(sigmas, 1).shape == (4, 0)
    with pytest.raises(ValueError, match="between: found 3 steps, expected 4, one fewer than sigmas"):
        make_levels(sigmas, between=within[:3])
