"""What a step tells of its rewards: of each, and of each task where several share a batch."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fopd_jax.steps.grpo.spec import Credit

Metrics = dict[str, Array]
Tasks = Mapping[str, Mapping[str, float]]
"""The weights of each task's rewards."""
NO_TASKS: Tasks = MappingProxyType({})


def credit_metrics(rewards: tuple[str, ...], credit: Credit, tasks: Tasks = NO_TASKS) -> Metrics:
    """Of each reward the mean and the share of failures, of each task what it is trained on, and what becomes of the
    samples. `tasks`: those to tell apart, in the order of `credit.task`.

    `task_reward/TASK` is the mean of the weighted sum, over the samples that have one; `reward/NAME/TASK` a reward's
    mean on one of the tasks that share it. A batch may hold no sample of a task: a mean's weight is its count.
    """
    found: Metrics = {}
    for k, name in enumerate(rewards):
        there = credit.asked[k] & ~jnp.isnan(credit.values[k])
        found |= _mean(f"reward/{name}", credit.values[k], there)
        found |= _mean(f"failed/{name}", (~there).astype(jnp.float32), credit.asked[k])
    for number, (task, weights) in enumerate(tasks.items()):
        mine = credit.task == number
        total = jnp.zeros(credit.values.shape[1])
        for k, name in enumerate(rewards):
            if weight := weights.get(name, 0.0):
                total = total + weight * credit.values[k]
            if name in weights and _shared(name, tasks):
                found |= _mean(f"reward/{name}/{task}", credit.values[k], mine & ~jnp.isnan(credit.values[k]))
        found |= _mean(f"task_reward/{task}", total, mine & ~jnp.isnan(total))
    valid = credit.valid.sum()
    return found | {
        "flat_share": (credit.valid & credit.flat).sum() / jnp.maximum(valid, 1),
        "dropped_share": (credit.valid.size - valid) / credit.valid.size,
    }


def credit_names(rewards: tuple[str, ...], tasks: Tasks = NO_TASKS) -> Iterator[str]:
    """Of the same, weights apart."""
    yield from (f"{kind}/{name}" for name in rewards for kind in ("reward", "failed"))
    yield from (f"task_reward/{task}" for task in tasks)
    yield from (f"reward/{name}/{task}" for task, weights in tasks.items() for name in weights if _shared(name, tasks))
    yield from ("flat_share", "dropped_share")


def _shared(reward: str, tasks: Tasks) -> bool:
    return sum(reward in weights for weights in tasks.values()) > 1


def _mean(name: str, values: Float[Array, " b"], counted: Bool[Array, " b"]) -> Metrics:
    count = counted.sum().astype(jnp.float32)
    return {name: jnp.where(counted, values, 0.0).sum() / jnp.maximum(count, 1), f"weights/{name}": count}
