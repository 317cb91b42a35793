"""DPM-Solver++(2M): diffusers' scheduler on the same velocity, its order of convergence, where it is Euler's step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.flow.rollout import sample_final
from fopd_jax.flow.schedule import flow_match_sigmas, make_levels
from fopd_jax.flow.solver import DPM2, make_solver, solve, trace
from fopd_jax.flow.transition import CPS, ODE, SDE


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 4, 3), dtype=np.float32)


def velocity(x: Any, sigma: Any) -> Any:
    """Smooth and not linear; of numpy, torch and jax alike."""
    sine = {np.ndarray: np.sin, torch.Tensor: torch.sin}.get(type(x), jnp.sin)
    return x * (0.3 + sigma) - 0.8 * sine(2 * x + 3 * sigma) + 0.4


def solved(sigmas: Any, solver: Any = DPM2(), start: Any = None) -> np.ndarray:  # noqa: B008
    x = jnp.asarray(noise() if start is None else start)
    keys = jax.vmap(lambda t: jax.random.split(jax.random.key(t), len(x)))(jnp.arange(len(sigmas) - 1))
    return np.asarray(jax.jit(lambda x, keys: solve(solver, velocity, make_levels(sigmas), x, keys))(x, keys))


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_diffusers(steps: int) -> None:
    """Its flow schedule, shift 3; the tolerance is 1e-5 of the largest number."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    x = torch.tensor(noise())
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[index]), t, x).prev_sample
    found = solved(scheduler.sigmas.numpy())
    np.testing.assert_allclose(found, x.numpy(), atol=1e-5 * np.abs(x.numpy()).max())


def exact(start: float, end: float, steps: int = 4000) -> np.ndarray:
    """By Runge-Kutta in float64."""
    x, h = np.float64(noise()), (end - start) / steps
    for k in range(steps):
        s = start + k * h
        a = velocity(x, s)
        b = velocity(x + h / 2 * a, s + h / 2)
        c = velocity(x + h / 2 * b, s + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + velocity(x + h * c, s + h))
    return x


def test_order_of_convergence() -> None:
    """Between levels that are neither noise nor data: 2, where Euler has 1."""
    with jax.enable_x64(True):
        truth, counts = exact(0.9, 0.2), np.array([20, 40, 80, 160])
        for solver, order in ((DPM2(), 2.0), (ODE(), 1.0)):
            ends = [solved(np.linspace(0.9, 0.2, n + 1), solver, np.float64(noise())) for n in counts]
            errors = [np.abs(end - truth).max() for end in ends]
            slopes = -np.diff(np.log(errors)) / np.log(2)
            print(solver, errors, slopes)
            assert abs(slopes[-1] - order) < 0.15


def test_few_steps_are_eulers() -> None:
    """From noise to data: the first step, the second, whose predecessor begins at noise, and the last."""
    np.testing.assert_allclose(solved(flow_match_sigmas(2)), solved(flow_match_sigmas(2), ODE()), rtol=1e-5, atol=1e-6)
    assert np.abs(solved(flow_match_sigmas(4)) - solved(flow_match_sigmas(4), ODE())).max() > 1e-3
    assert np.isfinite(solved(flow_match_sigmas(10))).all()


def test_transitions_are_sampled_as_ever() -> None:
    levels, x = make_levels(flow_match_sigmas(3)), jnp.asarray(noise())
    keys = jax.vmap(lambda t: jax.random.split(jax.random.key(t), 2))(jnp.arange(3))
    for name, kind in (("sde", SDE), ("cps", CPS), ("ode", ODE)):
        solver = make_solver(name, 0.7)
        assert isinstance(solver, kind)
        np.testing.assert_array_equal(
            solve(solver, velocity, levels, x, keys), sample_final(velocity, solver, levels, x, keys)
        )
    assert make_solver("dpm2") == DPM2()
    with pytest.raises(ValueError, match="transition: found 'heun', expected one of"):
        make_solver("heun")


@pytest.mark.parametrize("name", ["dpm2", "ode", "sde"])
def test_a_trace_ends_as_the_solver_does_and_holds_states_and_velocities(name: str) -> None:
    sigmas, solver = flow_match_sigmas(5), make_solver(name)
    keys = jax.vmap(lambda t: jax.random.split(jax.random.key(t), 2))(jnp.arange(5))
    run = jax.jit(lambda x, keys: trace(solver, velocity, make_levels(sigmas), x, keys))
    end, (states, velocities) = run(jnp.asarray(noise()), keys)
    np.testing.assert_allclose(end, solved(sigmas, solver), rtol=0, atol=1e-5)
    assert states.shape == velocities.shape == (5, *noise().shape)
    np.testing.assert_array_equal(states[0], noise())
    for t, (x, v) in enumerate(zip(states, velocities, strict=True)):
        np.testing.assert_allclose(v, velocity(x, sigmas[t]), rtol=1e-5, atol=1e-5)
    if name == "ode":
        after = np.concatenate([states[1:], end[None]])
        steps = np.diff(sigmas).reshape(-1, 1, 1, 1, 1)
        np.testing.assert_allclose(after, states + velocities * steps, rtol=0, atol=1e-5)
