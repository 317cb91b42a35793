"""Training prompts: a function of the step alone, routed by task, all known beforehand; each process has its own."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.parse import assign
from fopd_jax.config.schema import OPD, RoutedTask
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.tasks.task import Task
from fopd_jax.worlds import prompt_stream
from fopd_jax.worlds.foreseen import foresee
from fopd_jax.worlds.prompt_stream import PromptStream
from fopd_jax.worlds.world import World

TASKS = ("geneval", "ocr", "pickscore")


def _world() -> World:
    """Prompts are numbers, which their conditioning holds."""
    tasks = {name: Task(name, tuple(str(100 * k + i) for i in range(20)), ()) for k, name in enumerate(TASKS)}

    def encode(prompts: Any) -> Conditioning:
        codes = np.array([[float(prompt)] for prompt in prompts], np.float32)
        return Conditioning(codes[:, None], codes)

    return World((2, 2, 3), tasks, encode, lambda latents: latents)


def _stream(world: World, rows: Any = None, **changes: Any) -> PromptStream:
    shares = zip(TASKS, (3.0, 1.0, 1.0), strict=True)
    tasks = {name: RoutedTask(f"teachers/{name}", weight=weight) for name, weight in shares}
    config = OPD(seed=0, batch_size=12, images_per_prompt=2, tasks=tasks)
    assign(config, changes)
    table = RoutingTable.of_tasks({name: 1.0 for name, task in tasks.items() if task.teacher}, None)
    return PromptStream(
        world, config.tasks, table.routes, batch_size=config.batch_size, images_per_prompt=config.images_per_prompt,
        seed=config.seed, rows=rows, alternate=config.alternate,
    )  # fmt: skip


def _codes(stream: PromptStream, step: int) -> list[int]:
    return stream.batch(step).conditioning.pooled[:, 0].astype(int).tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    one, two, other = (_stream(_world(), seed=seed) for seed in (0, 0, 1))
    batches = [_codes(one, step) for step in range(4)]
    assert [_codes(two, step) for step in (3, 2, 1, 0)] == batches[::-1]
    assert len({tuple(batch) for batch in [*batches, _codes(other, 0)]}) == 5


def test_each_prompt_comes_as_a_group_and_goes_to_its_tasks_teacher():
    stream = _stream(_world())
    for step in range(4):
        batch, codes = stream.batch(step), _codes(stream, step)
        assert codes[::2] == codes[1::2]
        assert batch.route.tolist() == [code // 100 for code in codes]
        assert batch.conditioning.context.shape == (12, 1, 1)


def test_tasks_come_by_their_weights():
    """To within one draw, at every step; in a shuffled order."""
    stream = _stream(_world(), batch_size=7, images_per_prompt=1)
    counts: Counter[int] = Counter()
    for step in range(100):
        counts.update(stream.batch(step).route.tolist())
        for k, share in enumerate((0.6, 0.2, 0.2)):
            assert abs(counts[k] - 7 * (step + 1) * share) <= 1
    orders = {tuple(stream.batch(step).route.tolist()) for step in range(20)}
    assert len(orders) > 10
    only = _stream(_world(), **{"tasks.geneval.weight": 0.0, "tasks.pickscore.weight": 0.0})
    assert set(only.batch(0).route.tolist()) == {1}


@pytest.mark.parametrize(("batch_size", "images"), [(1, 1), (7, 1), (12, 2), (64, 4), (400, 1)])
def test_no_prompt_comes_twice_within_an_epoch(batch_size: int, images: int):
    """Whatever the batch; what stands at a step does not depend on which steps were asked for before."""
    stream = _stream(_world(), batch_size=batch_size, images_per_prompt=images)
    counts = {name: dict.fromkeys((str(100 * k + i) for i in range(20)), 0) for k, name in enumerate(TASKS)}
    steps = 240 * images // batch_size + 1
    batches = [stream.draw(step) for step in range(steps)]
    for tasks, prompts in batches:
        for task, prompt in zip(tasks, prompts, strict=True):
            counts[task][prompt] += 1
        for each in counts.values():  # so each epoch is over before another prompt comes once more
            assert max(each.values()) - min(each.values()) <= 1
    assert max(counts["geneval"].values()) >= 7
    other = _stream(_world(), batch_size=batch_size, images_per_prompt=images)
    assert [other.draw(step) for step in reversed(range(steps))] == batches[::-1]


def test_rows_tell_prompt_metadata_id_and_group():
    world = _world()
    tasks = {
        name: dataclasses.replace(task, train_metadata=tuple({"n": prompt} for prompt in task.train))
        for name, task in world.tasks.items()
        if name != "pickscore"
    }
    stream = _stream(dataclasses.replace(world, tasks={**world.tasks, **tasks}))
    for step in range(6):
        rows, codes = stream.drawn(step), _codes(stream, step)
        assert [int(row.prompt) for row in rows] == codes
        assert (
            [row.id for row in rows] == [code // 100 * 20 + code % 100 for code in codes] == stream.ids(step).tolist()
        )
        assert [row.task for row in rows] == [TASKS[code // 100] for code in codes]
        assert [row.metadata for row in rows] == [{} if row.task == "pickscore" else {"n": row.prompt} for row in rows]
        assert [row.group for row in rows] == [k // 2 for k in range(12)]
    assert stream.ids(0).dtype == np.int32


def test_equal_texts_stay_apart_unless_they_are_merged():
    """Two prompts of a set with the same text have ids and groups of their own; of two tasks they never share one."""
    tasks = {name: Task(name, ("1", "1", "1", "2"), ()) for name in TASKS}
    stream = _stream(dataclasses.replace(_world(), tasks=tasks), batch_size=20, images_per_prompt=1)
    rows, merged = stream.drawn(0), stream.drawn(0, merge_equal_prompts=True)
    assert len({row.group for row in rows}) == 20
    assert len({row.id for row in rows}) == 12
    assert len({row.group for row in merged}) == len({(row.task, row.prompt) for row in rows}) == 6
    assert [row.id for row in merged] == [row.id for row in rows]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 12])
def test_processes_share_a_batch_without_overlap(processes: int):
    rows = np.arange(12).reshape(processes, -1)
    streams = [_stream(_world(), mine) for mine in rows]
    for step in range(3):
        whole = _codes(_stream(_world()), step)
        assert [code for stream in streams for code in _codes(stream, step)] == whole


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_every_prompt_of_a_run_is_known_before_it_starts(steps: int):
    stream = _stream(_world())
    asked = [str(code) for step in range(steps) for code in _codes(stream, step)[::2]]
    assert list(stream.upto(steps)) == list(dict.fromkeys(asked))


def test_a_run_of_any_length_is_foreseen_at_once(monkeypatch: pytest.MonkeyPatch):
    """A task of weight 0 is never drawn, and of a weight next to none its prompts cannot be waited for: they follow."""
    monkeypatch.setattr(prompt_stream, "MOST_ORDERED", 3000)
    stream = _stream(_world(), **{"tasks.ocr.weight": 0.0})
    drawn = list(stream.upto(10**9))
    assert sorted(drawn, key=int) == [str(100 * k + i) for k in (0, 2) for i in range(20)]
    rare = _stream(_world(), **{"tasks.ocr.weight": 1e-6})
    prompts = list(foresee(lambda step: rare.draw(step)[1], 10**9, [*drawn, "100"], most=3000))
    assert set(prompts[:-1]) == set(drawn)
    assert prompts[-1] == "100"
    asked = list(rare.upto(10**6))  # six million draws hold one or two of ocr's
    assert set(drawn) < set(asked)
    assert len(asked) - len(drawn) in (1, 2)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [0, 2, 3, 9], [5], list(range(12))])
def test_a_process_has_its_rows_of_the_same_batch_and_encodes_no_other_prompt(rows: list[int]):
    world, asked = _world(), []
    recording = dataclasses.replace(world, encode=lambda prompts: (asked.extend(prompts), world.encode(prompts))[1])
    whole, part = _stream(world), _stream(recording, np.array(rows))
    for step in range(3):
        asked.clear()
        expected, found = whole.batch(step), part.batch(step)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[np.array(rows)], b), expected, found)
        assert len(asked) == len({row // 2 for row in rows})
        assert part.draw(step) == whole.draw(step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks.ocr.teacher": ""},
            r"prompt '100': its task 'ocr' has no teacher; teachers: \('geneval', 'pickscore'\)",
        ),
        ({"batch_size": 7}, "images_per_prompt: found 2, expected a divisor of batch_size 7"),
        ({f"tasks.{name}.weight": 0.0 for name in TASKS}, r"tasks: found weights \[0\.0, 0\.0, 0\.0\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        _stream(_world(), **changes)


def test_a_task_that_the_world_lacks_is_named():
    tasks = {"aesthetics": RoutedTask("teachers/aesthetics")}
    with pytest.raises(ValueError, match="tasks: found 'aesthetics', expected some of"):
        PromptStream(_world(), tasks, RoutingTable.of_tasks({}, None).routes, batch_size=2, images_per_prompt=1, seed=0)


# ---- weights that change


CHANGING = {"tasks.geneval.schedule": {"5": 0.0}, "tasks.ocr.schedule": {"5": 4.0, "9": 0.5}}


def test_a_change_of_weights_repeats_and_loses_no_prompt():
    """Each task walks on through its epochs; a run that begins anywhere draws what one from the beginning does."""
    stream = _stream(_world(), **CHANGING)
    batches = [stream.draw(step) for step in range(40)]
    counts = {name: dict.fromkeys(stream.tasks[name].train, 0) for name in TASKS}
    for tasks, prompts in batches:
        for task, prompt in zip(tasks, prompts, strict=True):
            counts[task][prompt] += 1
        for each in counts.values():  # so each epoch is over before another prompt comes once more
            assert max(each.values()) - min(each.values()) <= 1
    assert min(sum(each.values()) for each in counts.values()) > 15
    assert not any("geneval" in tasks for tasks, _ in batches[5:])
    resumed = _stream(_world(), **CHANGING)
    assert [resumed.draw(step) for step in range(39, 2, -1)] == batches[:2:-1]


@pytest.mark.parametrize("steps", [1, 5, 7, 40])
def test_the_prompts_of_changing_weights_are_known(steps: int):
    stream = _stream(_world(), **CHANGING)
    asked = [prompt for step in range(steps) for prompt in stream.draw(step)[1]]
    assert list(stream.upto(steps)) == list(dict.fromkeys(asked))


def test_without_a_change_nothing_is_drawn_otherwise():
    plain, same = _stream(_world()), _stream(_world(), **{"tasks.geneval.schedule": {"3": 3.0}})
    assert [plain.draw(step) for step in range(3)] == [same.draw(step) for step in range(3)]


# ---- whole batches of one task, by turns


def _turns(alternate: int, rows: Any = None, **changes: Any) -> PromptStream:
    return _stream(_world(), rows, alternate=alternate, **changes)


@pytest.mark.parametrize("alternate", [1, 2])
def test_a_batch_by_turns_is_of_one_task_and_no_prompt_comes_twice_within_an_epoch(alternate: int):
    stream = _turns(alternate)
    batches = [stream.draw(step) for step in range(20 * alternate)]
    turns = [tasks[0] for tasks, _ in batches]
    assert all(set(tasks) == {turn} for (tasks, _), turn in zip(batches, turns, strict=True))
    assert all(len(set(turns[k : k + alternate])) == 1 for k in range(0, len(turns), alternate))
    assert Counter(turns) == {"geneval": 12 * alternate, "ocr": 4 * alternate, "pickscore": 4 * alternate}
    counts = {name: dict.fromkeys(stream.tasks[name].train, 0) for name in TASKS}
    for tasks, prompts in batches:
        for task, prompt in zip(tasks, prompts, strict=True):
            counts[task][prompt] += 1
        for each in counts.values():
            assert max(each.values()) - min(each.values()) <= 1


def test_turns_do_not_depend_on_what_was_asked_before():
    """So a run that goes on anywhere draws what one from the beginning does, and knows its prompts beforehand."""
    stream, changes = _turns(3, **CHANGING), range(39, -1, -1)
    batches = [stream.draw(step) for step in reversed(changes)]
    resumed = _turns(3, **CHANGING)
    assert [resumed.draw(step) for step in changes] == batches[::-1]
    asked = [prompt for _, prompts in batches for prompt in prompts]
    assert list(stream.upto(40)) == list(dict.fromkeys(asked))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_turn_without_overlap(processes: int):
    streams = [_turns(2, mine) for mine in np.arange(12).reshape(processes, -1)]
    for step in range(6):
        assert [code for stream in streams for code in _codes(stream, step)] == _codes(_turns(2), step)


def test_tasks_walk_through_their_prompts_as_where_they_share_batches():
    """Only when they come is another: of each task the first prompts are the same."""
    found = []
    for alternate, steps in ((0, 40), (1, 40)):
        stream = _turns(alternate, batch_size=5, images_per_prompt=1)
        drawn = [stream.draw(step) for step in range(steps)]
        walks = {name: Counter[str]() for name in TASKS}
        for tasks, prompts in drawn:
            for task, prompt in zip(tasks, prompts, strict=True):
                walks[task][prompt] += 1
        found.append(walks)
    assert found[0] == found[1]  # after eight cycles of 3 : 1 : 1
