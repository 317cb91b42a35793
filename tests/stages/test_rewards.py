"""The rewards of a config's tasks: which are made, with which weights, and which prompts they refuse."""

from collections.abc import Sequence
from typing import Any

import pytest

from fopd_jax.config.schema import OPD, RewardConfig, RoutedTask
from fopd_jax.rewards.reward import Reward, all_failed
from fopd_jax.stages.rewards import check_prompts, furnish
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.miniature.world import make_world


def constant(images: Any, prompts: Any, metadata: Any) -> list[float]:
    return [1.0] * len(images)


MINE = RewardConfig(kind=f"{__name__}:constant")


def _config(**weights: dict[str, float]) -> OPD:
    config = OPD(name="any", tasks={name: RoutedTask(rewards=each) for name, each in weights.items()})
    config.rewards = {name: MINE for each in weights.values() for name in each if name.startswith("mine")}
    return config


def test_a_world_gets_the_weights_and_the_rewards_of_the_evaluated_tasks():
    config, world = _config(text={"mine": 0.5, "quality": 0.0}, composition={"mine_too": 1.0}), make_world()
    found = furnish(config, world, ["text"], ["text"])
    assert found.tasks["text"].rewards == {"mine": 0.5, "quality": 0.0}
    assert found.tasks["text"].scored == ("text", "quality", "mine")
    assert found.tasks["text"].weights == {"mine": 0.5}
    assert found.tasks["composition"].scored[-1] == "mine_too"
    assert found.rewards.keys() == {*world.rewards, "mine"}  # what no evaluated task names is not made
    assert found.rewards["quality"] is world.rewards["quality"]
    assert world.tasks["text"].rewards == {}


def test_settings_of_another_tasks_reward_are_no_mistake_and_of_nobodys_are():
    config = _config(text={}, composition={"mine": 1.0})
    furnish(config, make_world(), ["text"])
    config.rewards["other"] = MINE
    with pytest.raises(ValueError, match=r"^rewards\.other: no task names this reward; they name composition, comp"):
        furnish(config, make_world(), ["text"])
    furnish(config, make_world(), ["text"], ["other"])


def test_every_reward_sees_the_held_out_prompts_of_its_task_with_their_metadata():
    seen: list[tuple[Any, ...]] = []

    def check(prompts: Sequence[str], metadata: Sequence[Any]) -> None:
        seen.append((tuple(prompts), tuple(metadata)))
        if "bad" in prompts:
            raise ValueError("prompt 'bad': has nothing to score")

    reward = Reward("a", lambda images, *_: all_failed(len(images), "none"), (None, None), "host", check)
    task = Task("one", ("x", "y"), ("z",), ("a",), test_metadata=({"n": 3},))
    check_prompts({"one": task, "two": Task("two", ("bad",), ())}, {"a": reward})
    assert seen == [(("z",), ({"n": 3},))]
    with pytest.raises(ValueError, match=r"^tasks\.one\.rewards\.a: prompt 'bad': has nothing to score$"):
        check_prompts({"one": Task("one", (), ("bad",), rewards={"a": 1.0})}, {"a": reward})
