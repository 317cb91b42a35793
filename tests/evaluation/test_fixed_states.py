"""Fixed states against a Python loop over prompts, teachers and noise levels; and over meshes."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import effective, stack_bank
from fopd_jax.evaluation.fixed_states import DATA_LEVELS, PERTURBATION, held_out, mean_gaps
from fopd_jax.evaluation.score import noise_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.policy.groups import Slots
from fopd_jax.policy.velocity import guided_velocity
from tests.evaluation.fixed import COUNT, PICTURED, SEED, Images, encode, make_fixed, make_world, numbers, placed
from tests.parallel.processes import finish, free_port, start
from tests.quick import environment
from tests.steps.opd.network import (
    BANK,
    DIRECT,
    GUIDED,
    SHAPE,
    SIGMAS,
    STUDENT,
    TEACHERS,
    frozen_of,
    make_pieces,
    make_spec,
    make_velocity,
)

VOICES = (*TEACHERS, "anchor")
STEPS = len(SIGMAS) - 2


@functools.cache
def speak() -> Any:
    return jax.jit(functools.partial(guided_velocity, make_velocity()))


def ask(adapter: Any, scale: float, x: np.ndarray, sigma: float, prompt: str) -> np.ndarray:
    """One voice about one state."""
    frozen, conditioning = frozen_of(BANK), jax.tree.map(jnp.asarray, encode([prompt]))
    own = effective(adapter) if adapter else jax.tree.map(jnp.zeros_like, effective(STUDENT))
    v = speak()(frozen.variables, own, jnp.asarray(x)[None], jnp.float32(sigma), conditioning, frozen.null, scale)
    return np.asarray(v[0], np.float64)


def noises(task: str, i: int) -> list[np.ndarray]:
    key = noise_keys(SEED, f"fixed/{task}", np.arange(COUNT))[i]
    keys = jnp.stack([jax.random.fold_in(key, k) for k in range(3)])
    return list(np.asarray(standard_normal(keys, SHAPE)))


def loop(task: str, i: int) -> list[tuple[np.ndarray, float, str]]:
    """State, noise level and prompt, one after the other."""
    prompt, scale, (x, noise, _) = f"{task} {i * 7 // COUNT}", GUIDED[1][TEACHERS.index(task)], noises(task, i)
    found = []
    for t in range(STEPS):
        found.append((x, float(SIGMAS[t]), prompt))
        x = x + np.float32(SIGMAS[t + 1] - SIGMAS[t]) * ask(BANK[task], scale, x, SIGMAS[t], prompt).astype(np.float32)
    image = Images(task, SEED).batch(0, [i])["x0"][0].astype(np.float32)
    return found + [((1 - s) * image + s * noise, s, f"{task} image {i}") for s in DATA_LEVELS]


MEMBER = """import runpy, sys
from fopd_jax.parallel.distributed import initialize
process, port = int(sys.argv.pop()), sys.argv.pop()
initialize(f"localhost:{port}", 2, process, timeout_s=120)  # before anything that computes is imported
runpy.run_module("tests.evaluation.fixed", run_name="__main__")"""


@pytest.fixture(scope="module")
def found() -> Any:
    fixed = make_fixed()
    return numbers(fixed), *fixed.survey(placed(fixed.mesh)[0])


def test_of_several_networks_each_voice_is_asked_of_its_own(found: Any) -> None:
    """The second teacher and its adapter on a twin of the base; without a weight the anchor is a voice all the same."""
    spec = make_spec(dataclasses.replace(DIRECT, mar_beta=0.0), networks=("", "twin", ""), slots=Slots(1, (0, 0)))
    pieces = dataclasses.replace(make_pieces(spec), voices={"twin": make_velocity()})
    frozen = frozen_of({name: BANK[name] for name in ("ocr", "anchor")})
    frozen = dataclasses.replace(frozen, networks={"twin": (frozen.variables, stack_bank({"": BANK["counting"]}))})
    states, seen = dataclasses.replace(make_fixed(), pieces=pieces).survey(frozen)
    np.testing.assert_allclose(states.target, found[1].target, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), seen, found[2])


@pytest.mark.parametrize(("task", "i"), [("ocr", 1), ("counting", 2)])
def test_states_velocities_and_distances_are_those_of_a_loop(task: str, i: int, found: Any) -> None:
    _, states, seen = found
    k, (guidance, scales) = TEACHERS.index(task), GUIDED
    named = list(zip(VOICES, scales, strict=True))
    row, shake = k * COUNT + i, noises(task, i)[2]
    gaps = make_fixed().student()(*placed(make_fixed().mesh), states)
    for at, (x, sigma, prompt) in enumerate(loop(task, i)[: None if task in PICTURED else STEPS]):
        np.testing.assert_allclose(states.x[at, row], x, rtol=1e-4, atol=1e-5)
        v, base, moved, base_moved = (
            np.stack([ask(BANK[name] if adapted else None, scale, y, sigma, prompt) for name, scale in named])
            for y in (x, x + np.float32(PERTURBATION) * shake) for adapted in (True, False)
        )  # fmt: skip
        np.testing.assert_allclose(states.target[at, row], v[k], rtol=1e-4, atol=1e-4)
        own = ask(STUDENT, guidance, x, sigma, prompt)
        np.testing.assert_allclose(gaps[at, row], np.square(own - v[k]).mean(), rtol=1e-4)
        expected = {
            "between": np.square(v[:, None] - v[None]).mean((2, 3, 4)),
            "updates": np.einsum("ihwc,jhwc->ij", v - base, v - base) / x.size,
            "base": np.square(base).mean((1, 2, 3)),
            "moved": np.square(moved - v).mean((1, 2, 3)),
            "base_moved": np.square(base_moved - base).mean((1, 2, 3)),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(seen, name)[at, row], value, rtol=2e-3, atol=1e-4, err_msg=name)


def test_numbers_do_not_depend_on_the_mesh(found: Any) -> None:
    """Six rows on four devices are filled up to eight; 1e-4 of each, as programs round otherwise."""
    command = [sys.executable, "-m", "tests.evaluation.fixed", "2", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(4))
    other, own = json.loads(done.stdout), found[0]
    assert other["means"].keys() == own["means"].keys()
    for name, value in own["means"].items():
        np.testing.assert_allclose(other["means"][name], value, rtol=1e-4, err_msg=name)
    for name, values in own["survey"].items():
        np.testing.assert_allclose(other["survey"][name], values, rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_find_what_one_finds() -> None:
    """On the same mesh of four devices, to the bit, and both processes all of it."""
    alone, member = ["-m", "tests.evaluation.fixed", "2", "2"], ["-c", MEMBER, "2", "2", str(free_port())]
    programs = [start(alone, 4), *(start([*member, process], 2) for process in ("0", "1"))]
    one, *two = (json.loads(said.splitlines()[-1]) for said in finish(programs))
    assert two == [one, one]


def test_numbers_are_the_same_each_time(found: Any) -> None:
    assert numbers(make_fixed()) == found[0]


def test_means_are_by_task_and_by_group_of_noise_levels() -> None:
    sigma, image = np.asarray([1.0, 0.5, 0.1, 0.25, 0.75]), np.asarray([False, False, False, True, True])
    gaps = np.asarray(
        [[[1.0, 3.0], [9.0, 9.0]], [[4.0, 4.0]] * 2, [[6.0, 8.0]] * 2, [[1.0, 2.0]] * 2, [[3.0, 4.0]] * 2]
    )
    means = mean_gaps(("a", "b"), frozenset({"a"}), sigma, image, gaps)
    assert {name: value for name, value in means.items() if name.startswith("fixed/a")} == {
        "fixed/a/teacher": 26 / 6, "fixed/a/teacher/high": 2.0, "fixed/a/teacher/middle": 4.0,
        "fixed/a/teacher/low": 7.0, "fixed/a/data": 2.5, "fixed/a/data/low": 1.5, "fixed/a/data/high": 3.5,
    }  # fmt: skip
    assert {name for name in means if name.startswith("fixed/b")} == {
        f"fixed/b/teacher{end}" for end in ("", "/low", "/middle", "/high")
    }


def test_held_out_prompts_are_spread_over_the_set() -> None:
    world = make_world()
    assert held_out(world, "ocr", 3) == ["ocr 0", "ocr 2", "ocr 4"]
    assert held_out(world, "ocr", 9) == [f"ocr {i % 7}" for i in range(9)]
