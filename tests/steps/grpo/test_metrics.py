"""What a step tells of its rewards, against plain numpy over the samples of each task."""

import jax.numpy as jnp
import numpy as np

from fopd_jax.steps.grpo.metrics import credit_metrics, credit_names
from fopd_jax.steps.grpo.spec import Credit

REWARDS = ("composition", "quality", "text")
TASKS = {"composition": {"composition": 1.0, "quality": 0.5}, "text": {"quality": 0.25, "text": 2.0}}
TASK = np.array([0, 1, 0, 1, 1, 0])


def credit_of(values: np.ndarray, task: np.ndarray = TASK) -> Credit:
    asked = np.array([[name in list(TASKS.values())[k] for k in task] for name in REWARDS])
    valid = ~(np.isnan(values) & asked).any(0)
    fields = np.zeros(6, np.float32), np.where(asked, values, np.nan), asked, valid, ~valid, task
    return Credit(*map(jnp.asarray, fields))


def test_means_of_each_task_and_of_what_they_share():
    values = np.random.default_rng(0).random((3, 6)).astype(np.float32)
    values[1, 2] = values[2, 3] = np.nan  # a failure of each task
    found = credit_metrics(REWARDS, credit_of(values), TASKS)
    text, composition = [1, 4], [0, 5]  # whose sums are there
    expected = {
        "task_reward/text": (0.25 * values[1, text] + 2 * values[2, text]).mean(),
        "task_reward/composition": (values[0, composition] + 0.5 * values[1, composition]).mean(),
        "reward/quality/text": values[1, [1, 3, 4]].mean(),
        "reward/quality/composition": values[1, [0, 5]].mean(),
        "reward/quality": values[1, [0, 1, 3, 4, 5]].mean(),
        "reward/text": values[2, [1, 4]].mean(),
        "failed/quality": 1 / 6,
        "failed/text": 1 / 3,
        "weights/task_reward/text": 2,
        "weights/reward/quality/text": 3,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert sorted(credit_names(REWARDS, TASKS)) == sorted(name for name in found if not name.startswith("weights/"))


def test_a_batch_without_a_task_gives_its_means_no_weight():
    found = credit_metrics(REWARDS, credit_of(np.ones((3, 6)), np.zeros(6, int)), TASKS)
    assert found["weights/task_reward/text"] == found["task_reward/text"] == 0
    assert found["weights/task_reward/composition"] == 6
    assert all(np.isfinite(value) for value in found.values())


def test_one_task_alone_is_not_told_twice():
    assert set(credit_names(("text",))) == {"reward/text", "failed/text", "flat_share", "dropped_share"}
