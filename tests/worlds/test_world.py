"""Choosing tasks and routing prompts to teachers."""

import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World, select_tasks


def _world() -> World:
    tasks = {name: Task(name, ("a",), ("b",)) for name in ("text", "composition", "extra")}
    return World((2, 2, 3), tasks, lambda prompts: Conditioning(None, None), lambda latents: latents)


def test_selected_tasks_keep_the_order_asked_for():
    world = _world()
    assert list(select_tasks(world, ("extra", "text"))) == ["extra", "text"]
    assert select_tasks(world, ("extra",))["extra"] is world.tasks["extra"]


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"tasks: found 'ocr'.*\('text', 'composition', 'extra'\)"):
        select_tasks(_world(), ("text", "ocr"))
