"""The rewards that a config's tasks name: put beside the world's own, and asked about the prompts to score."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.schema import RoutedTask
from fopd_jax.config.stages import StageConfig
from fopd_jax.exits import naming
from fopd_jax.rewards.registry import check_named, make_rewards
from fopd_jax.rewards.reward import Reward
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.prompt_stream import Drawn
from fopd_jax.worlds.world import World


def furnish(config: StageConfig, world: World, evaluated: Iterable[str], others: Collection[str] = ()) -> World:
    """The world with its tasks' rewards: their weights, and those of the `evaluated` tasks ready to score.

    `others`: rewards that are wanted beside them.

    Raises:
      ValueError: settings are of a reward that no task names, or wrong; names the field.
    """
    weights = {name: dict(task.rewards) for name, task in config.tasks.items()}
    tasks = {name: dataclasses.replace(task, rewards=weights.get(name, {})) for name, task in world.tasks.items()}
    named = {
        *others,
        *(name for task in tasks.values() for name in task.scored),
        *(n for w in weights.values() for n in w),
    }
    check_named(named, config.rewards, config.run.servers)
    wanted = [*(name for task in evaluated for name in tasks[task].scored), *others]
    made = make_rewards(wanted, config.rewards, config.run.servers, world.rewards)
    return dataclasses.replace(world, tasks=tasks, rewards={**world.rewards, **made})


def check_prompts(tasks: Mapping[str, Task], rewards: Mapping[str, Reward]) -> None:
    """Refuse held-out prompts that a reward of their task can never score; those to train on are not scored.

    Raises:
      ValueError: names the task's field, the prompt and the reason.
    """
    for task in tasks.values():
        for name in task.scored:
            with naming(f"tasks.{task.name}.rewards.{name}"):
                rewards[name].check(task.test, task.beside("test"))


Rewarded = Mapping[str, RewardedTask] | Mapping[str, RoutedTask] | Mapping[str, Task]


def reward_names(tasks: Rewarded) -> tuple[str, ...]:
    """Of all tasks, each once, in their order: that of `Credit.values`."""
    return tuple(dict.fromkeys(name for task in tasks.values() for name in task.rewards))


def told_apart(tasks: Rewarded) -> dict[str, dict[str, float]]:
    """The weights of each task's rewards, where there are several tasks."""
    return {name: dict(task.rewards) for name, task in tasks.items()} if len(tasks) > 1 else {}


def task_numbers(tasks: Mapping[str, Task], drawn: Sequence[Drawn]) -> Int[np.ndarray, " b"] | None:
    """Which task each sample is of, where there are several."""
    places = {name: number for number, name in enumerate(tasks)}
    return np.array([places[each.task] for each in drawn], np.int32) if len(places) > 1 else None
