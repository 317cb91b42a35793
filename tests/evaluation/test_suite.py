"""Evaluation pairs: the same for every model, a function of seed, task and index alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.conditioning import Conditioning
from fopd_jax.evaluation.suite import EvalSet, evaluate, make_sampler, means, noise_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.tasks.task import Task, World

LATENT = (2, 2, 3)
PROMPTS = ("a", "b", "c")
Row = dict[str, np.ndarray]


def _score(images: np.ndarray, prompts: Any) -> Row:
    """The image's mean, shifted by the prompt so that a wrong pairing shows."""
    assert len(images) == len(prompts)
    return {"skill": images.mean((1, 2, 3)) + 100 * np.array([ord(prompt) for prompt in prompts])}


def _score_two(images: np.ndarray, prompts: Any) -> Row:
    return {"other": images.std((1, 2, 3)), **_score(images, prompts)}


def _world() -> World:
    tasks = {"one": Task("one", (), PROMPTS, _score), "two": Task("two", (), PROMPTS[::-1], _score_two)}

    def encode(prompts: Any) -> Conditioning:
        codes = np.array([[ord(prompt)] for prompt in prompts], np.float32)
        return Conditioning(codes[:, None], codes)

    return World(LATENT, tasks, encode, lambda latents: latents)


def _sampler(variables: Any, adapter: Any, conditioning: Conditioning, keys: jax.Array) -> jax.Array:
    """A network that returns its noise plus the weight that tells models apart."""
    return standard_normal(keys, LATENT) + variables


def _evaluate(samples: int, batch_size: int, *, seed: int = 0, shift: float = 0.0, world: World | None = None) -> Row:
    world = world or _world()
    return evaluate(_sampler, world, EvalSet(world.tasks, samples, batch_size, seed), jnp.float32(shift), {})


def test_pairs_go_round_the_prompts_and_fill_up_the_last_batch():
    eval_set = EvalSet({}, samples=5, batch_size=2, seed=0)
    batches = list(eval_set.pairs(_world().tasks["one"]))
    assert [prompts for prompts, _ in batches] == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert [index.tolist() for _, index in batches] == [[0, 1], [2, 3], [4, 5]]


def test_noise_keys_depend_on_seed_task_and_index_alone():
    def data(*arguments: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(noise_keys(*arguments)))

    whole = data(1, "text", np.arange(6))
    np.testing.assert_array_equal(data(1, "text", np.array([4, 2])), whole[[4, 2]])
    everything = np.concatenate([whole, data(2, "text", np.arange(6)), data(1, "composition", np.arange(6))])
    assert len(np.unique(everything, axis=0)) == 18


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 16])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int):
    reference = _evaluate(7, 7)
    for skill, values in _evaluate(7, batch_size).items():
        np.testing.assert_array_equal(values, reference[skill])


def test_more_samples_only_add_pairs():
    few, many = _evaluate(4, 4), _evaluate(9, 4)
    np.testing.assert_array_equal(many["other"][:4], few["other"])


def test_every_model_sees_the_same_pairs():
    one, two = _evaluate(7, 4), _evaluate(7, 4, shift=10.0)
    np.testing.assert_allclose(two["skill"] - one["skill"], 10, atol=1e-4)
    np.testing.assert_allclose(two["other"], one["other"], atol=1e-5)
    assert not np.allclose(_evaluate(7, 4, seed=1)["other"], one["other"], atol=1e-2)


def test_prompts_stay_with_their_images_and_repeats_get_fresh_noise():
    values = _evaluate(6, 4)["skill"][:6]  # task "one"
    noise = values - 100 * np.array([ord(prompt) for prompt in PROMPTS * 2])
    assert np.abs(noise).max() < 5
    assert len(np.unique(noise)) == 6


def test_skills_that_tasks_share_are_joined_and_only_wanted_samples_count():
    scores = _evaluate(5, 4)
    assert {skill: len(values) for skill, values in scores.items()} == {"skill": 10, "other": 5}
    assert means(scores) == {skill: float(values.mean()) for skill, values in scores.items()}


def test_progress_counts_the_wanted_samples():
    world, counted = _world(), []
    evaluate(_sampler, world, EvalSet(world.tasks, 5, 4, 0), jnp.float32(0), {}, counted.append)
    assert counted == [4, 1, 4, 1]


SIGMAS = np.array([1.0, 0.7, 0.2, 0.0], np.float32)


def _velocity(variables: Any, adapter: Any, x: jax.Array, sigma: Any, text: Conditioning, route: Any) -> jax.Array:
    return jnp.broadcast_to(variables * text.pooled[:, :, None, None] + adapter, x.shape)


@pytest.mark.parametrize(("guidance", "factor"), [(1.0, 2.0), (3.0, 0.5 + 3 * 1.5)])
def test_the_sampler_integrates_the_guided_velocity_from_noise_to_image(guidance: float, factor: float):
    """A constant velocity v moves noise by exactly -v; text pools to 2, the empty prompt to 0.5."""
    null = Conditioning(jnp.zeros((1, 1, 1)), jnp.full((1, 1), 0.5))
    text = Conditioning(jnp.zeros((4, 1, 1)), jnp.full((4, 1), 2.0))
    sampler = make_sampler(_velocity, SIGMAS, null if guidance != 1 else None, guidance, LATENT)
    keys = noise_keys(0, "text", np.arange(4))
    found = sampler(jnp.float32(10), jnp.float32(0.25), text, keys)
    np.testing.assert_allclose(found, standard_normal(keys, LATENT) - (10 * factor + 0.25), rtol=1e-5, atol=1e-5)
