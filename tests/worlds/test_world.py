"""Choosing tasks and routing prompts to teachers."""

import numpy as np
import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World, routes, select_tasks


def _world() -> World:
    tasks = {name: Task(name, ("a",), ("b",), lambda images, prompts: {}) for name in ("text", "composition", "extra")}
    return World((2, 2, 3), tasks, lambda prompts: Conditioning(None, None), lambda latents: latents)


def test_routes_are_indices_into_the_teachers_in_their_order():
    found = routes(["b", "a", "c", "b"], list("wxyz"), ("c", "b", "a"))
    assert found.tolist() == [1, 2, 0, 1]
    assert found.dtype == np.int32
    assert routes([], [], ("a",)).shape == (0,)


def test_a_prompt_whose_task_has_no_teacher_is_named_with_the_task_and_the_teachers():
    with pytest.raises(ValueError, match=r"prompt 'two red squares': its task 'composition' has no teacher") as error:
        routes(["text", "composition"], ['sign "ABC"', "two red squares"], ("text", "quality"))
    assert "('text', 'quality')" in str(error.value)


def test_tasks_and_prompts_come_in_pairs():
    with pytest.raises(ValueError, match="zip"):
        routes(["text", "text"], ["one"], ("text",))


def test_selected_tasks_keep_the_order_asked_for():
    world = _world()
    assert list(select_tasks(world, ("extra", "text"))) == ["extra", "text"]
    assert select_tasks(world, ("extra",))["extra"] is world.tasks["extra"]


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"tasks: found 'ocr'.*\('text', 'composition', 'extra'\)"):
        select_tasks(_world(), ("text", "ocr"))
