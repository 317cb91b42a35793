"""Evaluation pairs: the same for every model, a function of seed, task and index alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import MeshShape
from fopd_jax.evaluation.sampler import Sampler, make_sampler
from fopd_jax.evaluation.score import EvalSet, Measured, check_failures, evaluate, measure, noise_keys
from fopd_jax.flow.transition import CPS, ODE, SDE, Transition, standard_normal
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.rewards.reward import Reward, Scores, all_failed, collect
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

LATENT = (2, 2, 3)
PROMPTS = ("a", "b", "c")
Row = dict[str, np.ndarray]


def _skill(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    """The image's mean, shifted by the prompt so that a wrong pairing shows."""
    assert images.dtype == np.uint8
    assert len(images) == len(prompts) == len(metadata) > 0
    return collect([(image.mean() + 1000 * ord(prompt), {}) for image, prompt in zip(images, prompts, strict=True)])


def _other(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    return collect([(float(image.std()), {}) for image in images])


def _rewards(**scores: Any) -> dict[str, Reward]:
    everyone = {"skill": _skill, "other": _other, **scores}
    return {name: Reward(name, score, (None, None), "host") for name, score in everyone.items()}


def _world() -> World:
    tasks = {"one": Task("one", (), PROMPTS, ("skill",)), "two": Task("two", (), PROMPTS[::-1], ("other", "skill"))}

    def encode(prompts: Any) -> Conditioning:
        codes = np.array([[ord(prompt)] for prompt in prompts], np.float32)
        return Conditioning(codes[:, None], codes)

    return World(LATENT, tasks, encode, lambda latents: latents / 8, rewards=_rewards())


def _draw(variables: Any, adapter: Any, conditioning: Conditioning, null: None, keys: jax.Array) -> jax.Array:
    """A network that returns its noise plus the weight that tells models apart."""
    return standard_normal(keys, LATENT) + variables


MESH = make_mesh(MeshShape())
SAMPLER = Sampler(_draw, guided=False, mesh=MESH)


def _evaluate(samples: int, batch_size: int, *, seed: int = 0, shift: float = 0.0, world: World | None = None) -> Row:
    world = world or _world()
    return evaluate(SAMPLER, world, EvalSet(world.tasks, samples, batch_size, seed), jnp.float32(shift), {}).values


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
    one, two = _evaluate(7, 4), _evaluate(7, 4, shift=8 * 10 / 127.5)  # ten bytes, but for rounding
    np.testing.assert_allclose(two["skill"] - one["skill"], 10, atol=0.2)
    np.testing.assert_allclose(two["other"], one["other"], atol=0.2)
    assert not np.allclose(_evaluate(7, 4, seed=1)["other"], one["other"], atol=1)


def test_prompts_stay_with_their_images_and_repeats_get_fresh_noise():
    values = _evaluate(6, 4)["skill"][:6]  # task "one"
    noise = values - 1000 * np.array([ord(prompt) for prompt in PROMPTS * 2])
    assert np.abs(noise - 127.5).max() < 50
    assert len(np.unique(noise)) == 6


def test_networks_may_read_other_words_than_rewards_do():
    world, read = _world(), []

    def encode(prompts: Any) -> Any:
        read.extend(prompts)
        return world.encode(prompts)

    eval_set = EvalSet(world.tasks, 3, 3, 0, read=str.upper)
    found = evaluate(SAMPLER, dataclasses.replace(world, encode=encode), eval_set, jnp.float32(0), {}).values
    assert set(read) == {"A", "B", "C"} < set(eval_set.prompts())
    for skill, values in _evaluate(3, 3).items():  # whose images do not depend on the prompt, but whose scores do
        np.testing.assert_array_equal(found[skill], values)


def test_skills_that_tasks_share_are_joined_and_only_wanted_samples_count():
    world = _world()
    found = evaluate(SAMPLER, world, EvalSet(world.tasks, 5, 4, 0), jnp.float32(0), {})
    assert {skill: len(values) for skill, values in found.values.items()} == {"skill": 10, "other": 5}
    assert found.means() == {skill: float(values.mean()) for skill, values in found.values.items()}
    assert list(found.values) == EvalSet(world.tasks, 5, 4, 0).skills()
    assert (found.failed(), found.told()) == ({}, [])


def test_progress_counts_the_wanted_samples():
    world, counted = _world(), []
    evaluate(SAMPLER, world, EvalSet(world.tasks, 5, 4, 0), jnp.float32(0), {}, counted.append)
    assert counted == [4, 1, 4, 1]


SIGMAS = np.array([1.0, 0.7, 0.2, 0.0], np.float32)


def _velocity(variables: Any, adapter: Any, x: jax.Array, sigma: Any, text: Conditioning, route: Any) -> jax.Array:
    return jnp.broadcast_to(variables * text.pooled[:, :, None, None] + adapter, x.shape)


def _sampler(transition: Transition, guidance: float) -> Sampler:
    return make_sampler(_velocity, transition, SIGMAS, guidance, LATENT, MESH)


def _pooling_world() -> World:
    """Text pools to the code of its letter less 95 (a: 2), the empty prompt to 0.5; others of a batch do not matter."""

    def encode(prompts: Any) -> Conditioning:
        pooled = np.array([[ord(prompt) - 95 if prompt else 0.5] for prompt in prompts], np.float32)
        return Conditioning(np.zeros((len(prompts), 1, 1), np.float32), pooled)

    return World(LATENT, {}, encode, lambda latents: latents)


@pytest.mark.parametrize(("guidance", "factor"), [(1.0, 2.0), (3.0, 0.5 + 3 * 1.5)])
def test_the_sampler_integrates_the_guided_velocity_from_noise_to_image(guidance: float, factor: float):
    """A constant velocity v moves noise by exactly -v; text pools to 2, the empty prompt to 0.5."""
    sampler = _sampler(ODE(), guidance)
    assert sampler.guided == (guidance != 1)
    keys = noise_keys(0, "text", np.arange(4))
    found = sampler(_pooling_world(), jnp.float32(10), jnp.float32(0.25), ["a"] * 4, keys)
    np.testing.assert_allclose(found, standard_normal(keys, LATENT) - (10 * factor + 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7)])
def test_a_noisy_sampler_draws_each_step_from_the_images_own_key(transition: Transition):
    """The key gives the starting noise, and folded with the step's number that step's."""
    keys = noise_keys(0, "text", np.arange(3))
    found = _sampler(transition, 1.0)(_pooling_world(), jnp.float32(0.5), jnp.float32(0.25), ["a", "b", "a"], keys)
    assert found.dtype == np.float32
    for i, pooled in enumerate((2, 3, 2)):
        x = jax.random.normal(keys[i], LATENT)[None]
        v = jnp.full(x.shape, 0.5 * pooled + 0.25)
        for t in range(len(SIGMAS) - 1):
            mean, std = transition.moments(x, v, jnp.asarray(SIGMAS[t]), jnp.asarray(SIGMAS[t + 1]))
            x = mean + std * jax.random.normal(jax.random.fold_in(keys[i], t), LATENT)[None]
        np.testing.assert_allclose(found[i], x[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
def test_an_image_depends_on_its_prompt_and_key_alone(transition: Transition):
    keys, sampler, world = noise_keys(0, "text", np.arange(4)), _sampler(transition, 3.0), _pooling_world()

    def draw(prompts: str, rows: list[int]) -> np.ndarray:
        return sampler(world, jnp.float32(0.5), jnp.float32(0.25), list(prompts), keys[np.array(rows)])

    together = draw("abcd", [0, 1, 2, 3])
    np.testing.assert_allclose(draw("db", [3, 1]), together[[3, 1]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(draw("aaac", [0, 3, 1, 2])[[0, 3]], together[[0, 2]], rtol=0, atol=1e-5)
    # Another key under the same prompt is another image.
    assert np.abs(draw("aa", [0, 1])[1] - together[0]).max() > 0.1


def test_transitions_give_different_images():
    keys = noise_keys(0, "text", np.arange(1))
    images = [
        _sampler(transition, 1.0)(_pooling_world(), jnp.float32(0.5), jnp.float32(0), ["a"], keys)
        for transition in (ODE(), SDE(0.7), CPS(0.7), SDE(0.3))
    ]
    for i, one in enumerate(images):
        assert all(np.abs(one - other).max() > 1e-2 for other in images[:i])


# ---- tasks that nothing measures


def _mixed_world() -> World:
    """Task "one" has no scores; "two" has."""
    world = _world()
    return dataclasses.replace(world, tasks=dict(world.tasks) | {"one": Task("one", (), PROMPTS)})


def test_tasks_without_scores_are_not_sampled():
    counted: list[int] = []
    world = _mixed_world()
    scores = evaluate(SAMPLER, world, EvalSet(world.tasks, 5, 4, 0), jnp.float32(0), {}, counted.append).values
    assert {skill: len(values) for skill, values in scores.items()} == {"other": 5, "skill": 5}
    assert counted == [4, 1]
    for skill, values in scores.items():  # what the others score is as if it were alone
        np.testing.assert_array_equal(values, _evaluate(5, 4)[skill][-5:])


def test_the_prompts_of_an_evaluation_are_told_beforehand():
    """Of a task that is only drawn its first batch, of one that is scored everything, and the empty prompt."""
    world = _mixed_world()
    asked: list[str] = []
    encode = world.encode
    recorded = dataclasses.replace(world, encode=lambda prompts: (asked.extend(prompts), encode(prompts))[1])
    eval_set = EvalSet(world.tasks, 5, 2, 0)
    told = eval_set.prompts()
    assert set(told) == {"", *PROMPTS}
    assert set(EvalSet({"one": world.tasks["one"]}, 5, 2, 0).prompts()) == {"", "a", "b"}
    evaluate(SAMPLER, recorded, eval_set, jnp.float32(0), {})
    assert set(asked) <= set(told)


def test_filling_up_batches_for_a_mesh_changes_no_score():
    world = _world()
    sets = [EvalSet(world.tasks, 7, batch_size, 0, ways) for batch_size, ways in ((2, 1), (2, 4), (3, 8), (6, 4))]
    assert [each.made_at_once for each in sets] == [2, 4, 8, 8]
    expected, *found = [evaluate(SAMPLER, world, each, jnp.float32(0), {}).values for each in sets]
    for scores in found:
        for skill, values in expected.items():
            np.testing.assert_array_equal(scores[skill], values)


# ---- scores that fail


def _failing(which: Any) -> Any:
    """A reward that scores 1, 2, 3, … in the order of the prompts `p0`, `p1`, …, and fails where `which(i)` holds."""

    def score(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
        places = [int(prompt[1:]) for prompt in prompts]
        return collect([TimeoutError(f"no answer to p{i}") if which(i) else (i + 1.0, {}) for i in places])

    return score


def _failing_world(rewards: Any = None, **scores: Any) -> World:
    task = Task("one", (), tuple(f"p{i}" for i in range(20)), ("a",), rewards=rewards or {})
    return dataclasses.replace(
        _world(), tasks={"one": task}, rewards=_rewards(**scores),
        encode=lambda prompts: Conditioning(np.zeros((len(prompts), 1, 1)), np.zeros((len(prompts), 1))),
    )  # fmt: skip


def _found(world: World, samples: int = 20) -> Measured:
    return evaluate(SAMPLER, world, EvalSet(world.tasks, samples, 8, 0), jnp.float32(0), {})


def test_scores_that_fail_are_left_out_counted_and_told():
    found = _found(_failing_world({"b": 0.0}, a=_failing(lambda i: i % 5 == 1), b=_failing(lambda i: False)))
    assert np.flatnonzero(np.isnan(found.values["a"])).tolist() == [1, 6, 11, 16]
    valid = [i + 1 for i in range(20) if i % 5 != 1]
    assert found.means() == {"a": pytest.approx(np.mean(valid)), "b": 10.5}
    assert found.failed() == {"a": 4}
    assert found.told() == ["a: 4 of 20 failed: TimeoutError: no answer to p1"]
    check_failures(found, 0.2)
    with pytest.raises(
        FloatingPointError, match=r"^scores of base: a: 4 of 20 failed: TimeoutError: no answer to p1 \("
    ):
        check_failures(found, 0.19, " of base")


def test_means_of_nothing_are_refused_whatever_share_may_fail():
    found = _found(_failing_world(a=_failing(lambda i: True)))
    with pytest.raises(FloatingPointError, match=r"^scores: a: 20 of 20 failed: .*run\.max_failed_rewards is 1\)$"):
        check_failures(found, 1.0)


def test_a_value_that_is_not_finite_is_a_failure():
    def score(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
        return collect([(np.inf if prompt == "p3" else 1.0, {}) for prompt in prompts])

    found = _found(_failing_world(a=score))
    assert found.told() == ["a: 1 of 20 failed: the value is inf"]
    assert found.means() == {"a": 1.0}


def test_a_tasks_reward_is_the_weighted_sum_of_those_that_count():
    places = {"a": 0, "b": 2, "c": 3}
    scores = {name: _failing(lambda i, place=place: i == place) for name, place in places.items()}
    world = _failing_world({"b": 0.5, "c": 2.0, "other": 0.0}, **scores)
    found = _found(world)
    assert list(found.values) == ["a", "b", "c", "other", "reward/one"] == EvalSet(world.tasks, 1, 1, 0).skills()
    expected = 2.5 * (np.arange(20) + 1.0)
    expected[[2, 3]] = np.nan
    np.testing.assert_array_equal(found.values["reward/one"], expected)
    assert found.told()[-1] == "reward/one: 2 of 20 failed: b: TimeoutError: no answer to p2"


def test_metadata_stand_beside_their_prompts():
    seen: list[tuple[str, Any]] = []

    def score(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
        seen.extend(zip(prompts, metadata, strict=True))
        return all_failed(len(images), "nothing")

    beside = ({"n": 1}, {"n": 2}, {"n": 3})
    task = Task("one", (), PROMPTS, ("a",), test_metadata=beside)
    evaluated = dataclasses.replace(_world(), tasks={"one": task}, rewards=_rewards(a=score))
    _found(evaluated, 7)
    assert seen == list(zip(PROMPTS, beside, strict=True)) * 2 + [("a", {"n": 1})]


def test_another_number_of_scores_than_of_images_is_refused():
    rewards = _rewards(short=lambda images, prompts, metadata: collect([(1.0, {})]))
    with pytest.raises(ValueError, match=r"^rewards\.short: found 1 scores of 2 images, expected one each$"):
        measure(rewards, ["skill", "short"], np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])


def test_an_image_that_is_not_finite_is_never_scored():
    world = dataclasses.replace(_world(), decode=lambda latents: np.full_like(latents, np.nan))
    with pytest.raises(ValueError, match=r"^images: 4 of 4 are not finite, the first of prompt 'a'$"):
        _evaluate(7, 4, world=world)
