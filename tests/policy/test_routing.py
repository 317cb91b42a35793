"""Which teachers a prompt has: by tasks or a classifier, with mistakes on purpose; and what a panel makes of them.

Oracles: float64 sums of velocities asked one by one (tolerance 1e-6 on ‖a - b‖/‖b‖), binomial bounds of 4 deviations.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import effective, stack_bank
from fopd_jax.policy.panel import AdapterPanel, RoutingTable
from fopd_jax.policy.routing import NONE, ClassifiedMixes, Mistakes, TaskMixes
from fopd_jax.tasks.classifier import UNIT, train_classifier
from fopd_jax.tasks.sampling import chance
from fopd_jax.worlds.miniature import prompts as miniature
from fopd_jax.worlds.prompt_stream import Mix
from tests.steps.opd.network import SHAPE, adapter, check, make_velocity, normal, prompts, quick, variables

TEACHERS, SCALES, TOLERANCE = ("a", "b", "c"), (4.5, 1.0, 2.0), 1e-6
PROMPTS = [f"prompt {i}" for i in range(3000)]
MIXES: dict[str, Any] = {
    "a": ({}, {}), "b": ({"a": 1.0, "b": 3.0}, {}), "c": ({"c": 2.0}, {"b": 1.0, "a": 1.0}),
}  # fmt: skip


def within(count: int, total: int, share: float) -> bool:
    """Whether a binomial count lies within 4 standard deviations of its mean."""
    return abs(count - total * share) <= 4 * np.sqrt(total * share * (1 - share))


# ---- mistakes


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_stated_share_of_prompts_is_taken_for_others_evenly(share: float):
    taken = Mistakes(TEACHERS, share, 0)(["a"] * len(PROMPTS), PROMPTS)
    counts = {name: taken.count(name) for name in TEACHERS}
    assert within(counts["a"], len(PROMPTS), 1 - share)
    assert within(counts["b"], counts["b"] + counts["c"], 0.5)


def test_a_mistake_is_a_function_of_seed_and_prompt():
    mistakes, tasks = Mistakes(TEACHERS, 0.5, 7), [TEACHERS[i % 3] for i in range(300)]
    whole = mistakes(tasks, PROMPTS[:300])
    assert [mistakes.of(*pair) for pair in zip(tasks[::-1], PROMPTS[:300][::-1], strict=True)] == whole[::-1]
    assert whole != Mistakes(TEACHERS, 0.5, 8)(tasks, PROMPTS[:300])
    more = Mistakes(TEACHERS, 0.7, 7)(tasks, PROMPTS[:300])  # those of a smaller share are among those of a larger one
    assert all(b != own for own, a, b in zip(tasks, whole, more, strict=True) if a != own)
    assert chance(7, "x", "prompt \ud800") == chance(7, "x", "prompt \ud800") != chance(7, "y", "prompt \ud800")


def test_no_share_and_all_of_them():
    assert Mistakes(TEACHERS, 0.0)(["a", "x"], ["p", "q"]) == ["a", "x"]
    assert NONE(["a", "x"], ["p", "q"]) == ["a", "x"]
    everyone = Mistakes(TEACHERS, 1.0)
    assert all(everyone.of("b", prompt) in ("a", "c") for prompt in PROMPTS[:100])
    assert everyone.of("x", "p") == "x"  # a task without a teacher


# ---- weights by task


def test_rows_are_in_order_of_weight_and_in_proportion():
    mixes = TaskMixes(TEACHERS, MIXES)
    assert mixes.asked == 3
    found = mixes(["b", "a", "c"], ["p"] * 3)
    np.testing.assert_array_equal(found.bank, [[1, 0, 2], [0, 1, 2], [2, 0, 1]])
    np.testing.assert_array_equal(found.weights[0], [[0.75, 0.25, 0], [0.75, 0.25, 0]])
    np.testing.assert_array_equal(found.weights[1], [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(found.weights[2], [[1, 0, 0], [0, 0.5, 0.5]])
    assert found.bank.dtype == np.int32
    assert found.weights.dtype == np.float32


def test_no_more_teachers_are_asked_than_any_task_names():
    mixes = TaskMixes(TEACHERS, {"a": ({}, {}), "b": ({"a": 1.0, "b": 0.0, "c": 2.0}, {}), "c": ({}, {})})
    assert mixes.asked == 2
    found = mixes(["a", "b", "c"], ["p"] * 3)
    np.testing.assert_array_equal(found.bank, [[0, 1], [2, 0], [2, 0]])
    np.testing.assert_array_equal(found.weights.sum(2), 1)


def test_of_equal_weights_a_tasks_own_teacher_is_the_chief():
    even = dict.fromkeys(TEACHERS, 1.0)
    found = TaskMixes(TEACHERS, dict.fromkeys(TEACHERS, (even, {})))(list(TEACHERS), ["p"] * 3)
    np.testing.assert_array_equal(found.bank[:, 0], [0, 1, 2])


def test_mistaken_prompts_have_another_tasks_row():
    mistakes = Mistakes(TEACHERS, 0.5, 3)
    tasks = [TEACHERS[i % 3] for i in range(200)]
    found = TaskMixes(TEACHERS, MIXES, mistakes)(tasks, PROMPTS[:200])
    expected = TaskMixes(TEACHERS, MIXES)(mistakes(tasks, PROMPTS[:200]), PROMPTS[:200])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---- weights by a classifier


def classified(**fields: Any) -> ClassifiedMixes:
    classifier = train_classifier({name: miniature.prompts(name, "train")[:100] for name in miniature.TASKS})
    return ClassifiedMixes(classifier, **fields)


UNCERTAIN = ['"K7B"', "one", "sign red", "two red squares", 'sign "K7B"', "and", "sign one"]


def test_a_prompts_words_decide_whatever_its_task():
    mixes = classified(temperature=4.0)
    found = mixes(["other"] * len(UNCERTAIN), UNCERTAIN)
    chances = mixes.classifier.probabilities(UNCERTAIN, 4.0)
    spread = np.zeros_like(chances)
    np.put_along_axis(spread, found.bank, np.float64(found.weights[:, 0]), axis=1)
    np.testing.assert_allclose(spread, chances / chances.sum(1, keepdims=True), atol=1e-7)
    np.testing.assert_array_equal(found.weights[:, 0], found.weights[:, 1])
    assert (np.diff(found.weights[:, 0], axis=1) <= 0).all()
    jax.tree.map(np.testing.assert_array_equal, mixes(["text"] * len(UNCERTAIN), UNCERTAIN), found)
    rows = [mixes(["x"], [prompt]) for prompt in UNCERTAIN]
    np.testing.assert_array_equal(np.concatenate([row.weights for row in rows]), found.weights)


def test_the_likeliest_alone_has_all_the_weight():
    for mixes in (classified(top=1), classified(temperature=1e-3)):
        found = mixes(["x"] * 4, UNCERTAIN[:4])
        chief = mixes.classifier.probabilities(UNCERTAIN[:4]).argmax(1)
        np.testing.assert_array_equal(found.bank[:, 0], chief)
        np.testing.assert_array_equal(found.weights[:, :, 0], 1)
        assert found.bank.shape == (4, mixes.asked)
    assert (classified(top=1).asked, classified().asked, classified(top=2).asked) == (1, 2, 2)


def test_mistaken_prompts_have_their_likeliest_teacher_and_another_exchanged():
    plain, wrong = classified(temperature=4.0), classified(temperature=4.0, mistakes=Mistakes(miniature.TASKS, 0.5, 0))
    texts = list(miniature.prompts("text", "test")) + list(miniature.prompts("composition", "test"))
    one, two = (mixes([""] * len(texts), texts) for mixes in (plain, wrong))
    changed = one.bank[:, 0] != two.bank[:, 0]
    assert within(int(changed.sum()), len(texts), 0.5)
    np.testing.assert_array_equal(np.sort(one.weights, axis=2), np.sort(two.weights, axis=2))
    expected = [chance(0, "wrong route", text) < 0.5 for text in texts]
    np.testing.assert_array_equal(changed, expected)


def test_weights_that_were_rounded_still_sum_to_one():
    found = classified(temperature=3.0)(["x"] * 256, miniature.prompts("text", "test"))
    np.testing.assert_allclose(found.weights.sum(2), 1, atol=1e-6)
    assert found.weights.min() >= 0
    assert UNIT == 1024


# ---- what a panel makes of them


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_a_target_is_the_weighted_sum_of_velocities_at_any_noise_level(sigma: float):
    """Clean and noisy ends, linear between them; in float64 from unrouted forwards, each under its own scale."""
    bank = {name: adapter(20 * k + 20) for k, name in enumerate(TEACHERS)}
    batch, tasks = 6, ["a", "b", "c", "c", "b", "a"]
    x, text, null = (
        jnp.asarray(normal(3, batch, *SHAPE)),
        *(jax.tree.map(jnp.asarray, prompts(*each)) for each in ((1, batch), (7, 1))),
    )
    mix = jax.tree.map(jnp.asarray, TaskMixes(TEACHERS, MIXES)(tasks, ["p"] * batch))
    table = RoutingTable.of_tasks(dict(zip(TEACHERS, SCALES, strict=True)), None)
    panel = AdapterPanel(make_velocity(), SCALES, variables(), stack_bank(bank), null)
    questions = table.questions(mix.bank[:, 0], mix=mix, sigma=jnp.float32(sigma))
    (found,) = quick(panel.ask)(x, jnp.float32(sigma), text, questions)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape[1:])), null)
    alone = {}
    for name, scale in zip(TEACHERS, SCALES, strict=True):
        own = effective(bank[name])
        v, v0 = (np.float64(make_velocity()(variables(), own, x, jnp.float32(sigma), each)) for each in (text, empty))
        alone[name] = v0 + scale * (v - v0)
    for i, task in enumerate(tasks):
        clean, noisy = ((end or MIXES[task][0] or {task: 1.0}) for end in MIXES[task])
        weights = {
            name: (1 - sigma) * clean.get(name, 0) / sum(clean.values())
            + sigma * noisy.get(name, 0) / sum(noisy.values())
            for name in TEACHERS
        }
        check(found.velocity[i], sum(weights[name] * alone[name][i] for name in TEACHERS), TOLERANCE)


def test_one_teacher_of_weight_one_is_hard_routing_and_nothing_is_asked_that_was_not():
    table = RoutingTable.of_tasks(dict(zip(TEACHERS, SCALES, strict=True)), 1.0)
    route = jnp.asarray([2, 0, 1])
    plain, one = table.questions(route), table.questions(route, mix=Mix(route[:, None], jnp.ones((3, 2, 1))))
    assert plain[0].coefficient is None
    np.testing.assert_array_equal(one[0].bank, plain[0].bank)
    np.testing.assert_array_equal(one[0].coefficient, 1)
    assert [each.bank.shape for each in plain] == [(3, 1), (3, 1)]
