"""Routing from a config: contradictions refused by name, batches with their teachers, costs, what `--check` tells."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import OPD, RoutedTask
from fopd_jax.config.stages import taught
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.weights import even_mix
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.stages import routing
from fopd_jax.stages.abstract import abstract_batch, abstract_update
from fopd_jax.stages.check import describe_plan
from fopd_jax.stages.files import input_files
from fopd_jax.stages.opd import Distillation, MixedOPD, OPDPlan, plan_opd
from fopd_jax.stages.routing import asked, make_routing
from fopd_jax.tasks.classifier import train_classifier
from fopd_jax.tasks.sampling import chance
from fopd_jax.worlds.miniature import prompts as miniature
from fopd_jax.worlds.miniature.world import make_world
from tests.configs import load

SOFT: dict[str, Any] = {"routing.method": "soft", "tasks.text.mix": {"text": 3.0, "composition": 1.0}}
CLASSIFIED: dict[str, Any] = {"routing.method": "classifier"}
NAMES = ("composition", "text")  # as they stand in the bank


def config(**changes: Any) -> OPD:
    made = load("miniature", "smoke")
    assign(made, changes)
    return resolve(made)


def with_unlabelled(folder: Path, **changes: Any) -> OPD:
    """A third task, whose prompts nobody has labelled."""
    for name, split in (("train", "train"), ("test", "test")):
        lines = [miniature.paraphrase(each, 0) for task in NAMES for each in miniature.prompts(task, split)[:6]]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    made = load("miniature", "smoke")
    made.tasks["other"] = RoutedTask(prompts=f"{folder}/train.txt", test=f"{folder}/test.txt", weight=2.0)
    assign(made, changes)
    return resolve(made)


def rows(plan: OPDPlan, made: OPD, folder: Path) -> dict[str, str]:
    lines = (line.split(maxsplit=1) for line in describe_plan(plan, made, folder / "run").splitlines())
    return {line[0]: line[1] for line in lines}


# ---- what contradicts itself


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tasks.text.mix": {"text": 1.0}}, r"^tasks\.text\.mix: found weights, expected {}, or routing\.method"),
        (CLASSIFIED | {"tasks.text.noisy_mix": {"text": 1.0}}, r"^tasks\.text\.noisy_mix: found weights, expected {}"),
        ({"routing.method": "soft"}, r"^routing\.method: found 'soft', expected 'hard', or weights in some"),
        (SOFT | {"tasks.text.mix": {"ocr": 1.0}}, r"^tasks\.text\.mix: found \['ocr'\], expected some of \('comp"),
        ({"routing.top": 1}, r"^routing\.top: found 1, expected 0: only 'classifier' has one$"),
        (SOFT | {"routing.temperature": 0.5}, r"^routing\.temperature: found 0\.5, expected 1: only 'classifier'"),
        (CLASSIFIED | {"routing.top": 3}, r"^routing\.top: found 3, expected at most 2, the number of teachers$"),
        (CLASSIFIED | {"tasks.text.teacher": ""}, r"^routing\.method: found 'classifier', expected 'hard': .*'composi"),
        ({"tasks.text.teacher": ""}, r"^tasks\.text\.teacher: .* has no teacher; .*routing\.method 'classifier' would"),
        (SOFT | {"tasks.text.teacher": ""}, r"^tasks\.text\.teacher: prompt 'sign .* has no teacher"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_are_refused_by_name(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        plan_opd(config(**changes))


def test_with_one_teacher_there_is_no_other_to_be_mistaken_for():
    made = load("miniature", "smoke")
    del made.tasks["text"]
    assign(made, {"routing.wrong": 0.1})
    with pytest.raises(ValueError, match=r"^routing\.wrong: found 0\.1, expected 0: there is no other teacher$"):
        make_routing(resolve(made), make_world())


def test_rewards_beside_teachers_need_a_teacher_of_every_task(tmp_path: Path):
    mixed = {"objective.name": "mixed", "images_per_prompt": 2, **CLASSIFIED}
    with pytest.raises(ValueError, match=r"^tasks\.other\.teacher: found '', expected one: objective 'mixed' counts"):
        make_routing(with_unlabelled(tmp_path, **mixed), make_world())


# ---- batches


def test_hard_routing_is_what_it_was():
    """No weights, and the routes of the tasks alone."""
    plan = plan_opd(config(batch_size=64))
    table = RoutingTable.of_tasks(dict.fromkeys(NAMES, 1.0), None)
    for step in range(3):
        batch, (tasks, prompts) = plan.stream.batch(step), plan.stream.draw(step)
        assert batch.mix is None
        np.testing.assert_array_equal(batch.route, table.routes(tasks, prompts))
    assert "routing" not in rows(plan, config(), Path("/nowhere"))


def test_wrong_routes_have_the_stated_share_and_stay_with_their_prompts():
    made = config(batch_size=64, **{"routing.wrong": 0.3})
    routed = make_routing(made, make_world())
    wrong = {}
    for k, name in enumerate(NAMES):
        prompts = list(miniature.prompts(name, "train"))
        wrong |= dict(zip(prompts, (routed.routes([name] * len(prompts), prompts) != k).tolist(), strict=True))
    assert abs(np.mean(list(wrong.values())) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(wrong))
    stream = plan_opd(made).stream
    for step in (0, 40):  # the second in another epoch
        tasks, prompts = stream.draw(step)
        found = stream.batch(step).route != [NAMES.index(task) for task in tasks]
        np.testing.assert_array_equal(found, [wrong[prompt] for prompt in prompts])


def test_soft_batches_count_under_their_chief_teacher(tmp_path: Path):
    made = config(batch_size=64, **SOFT)
    plan = plan_opd(made)
    batch, (tasks, _) = plan.stream.batch(0), plan.stream.draw(0)
    assert batch.mix is not None
    np.testing.assert_array_equal(batch.route, batch.mix.bank[:, 0])
    np.testing.assert_array_equal(batch.route, [NAMES.index(task) for task in tasks])
    of_text = np.asarray(tasks) == "text"
    np.testing.assert_array_equal(batch.mix.weights[of_text], np.broadcast_to([0.75, 0.25], (of_text.sum(), 2, 2)))
    assert "up to 2 of 2 teachers" in rows(plan, made, tmp_path)["routing"]


def test_the_weights_of_a_batch_reach_the_update():
    batch = plan_opd(config(**SOFT)).stream.batch(0)
    stage: Any = SimpleNamespace(pipeline=SimpleNamespace(world=make_world()))
    for each in (Distillation.embedded(stage, batch), MixedOPD.embedded(stage, batch)):
        assert each.mix is batch.mix is not None
        assert each.route is batch.route


def test_prompts_without_a_label_go_where_their_words_say(tmp_path: Path):
    made = with_unlabelled(tmp_path, batch_size=32, **CLASSIFIED)
    assert taught(made) == NAMES
    plan = plan_opd(made)
    batch, (tasks, prompts) = plan.stream.batch(0), plan.stream.draw(0)
    assert tasks.count("other") == 16
    expected = [NAMES.index("text" if '"' in prompt else "composition") for prompt in prompts]
    np.testing.assert_array_equal(batch.route, expected)
    assert {"teacher_gap/text", "teacher_gap/composition"} <= set(plan.metrics)
    assert "teacher_gap/other" not in plan.metrics
    assert plan.update.pieces.spec.teachers == NAMES
    told = rows(plan, made, tmp_path)
    assert "other ← whom the classifier finds" in told["teachers"]
    assert "trained on 1,712 prompts, right about those held out: 1.000, in other words 1.000" in told["routing"]
    assert "other: 12 to train on, 12 held out" in told["prompts"]


def test_the_prompts_of_a_task_more_are_files_that_a_run_depends_on(tmp_path: Path):
    found = input_files(with_unlabelled(tmp_path))
    assert {field for field in found if field.startswith("tasks.other")} == {"tasks.other.prompts", "tasks.other.test"}
    assert not {"tasks.text.prompts", "tasks.text.test"} & found.keys()


def test_a_task_more_needs_prompts(tmp_path: Path):
    made = load("miniature", "smoke", **CLASSIFIED)
    made.tasks["other"] = RoutedTask()
    with pytest.raises(ValueError, match=r"^tasks: found 'other', expected some of \('text', 'composition'\)$"):
        plan_opd(resolve(made))


def test_a_share_of_the_prompts_is_read_in_other_words_and_scored_as_it_was():
    made = config(batch_size=64, **{"tasks.composition.rewritten": 0.5})
    stream = plan_opd(made).stream
    changed = 0
    for step in range(4):
        tasks, read = stream.draw(step)
        for task, words, row in zip(tasks, read, stream.drawn(step), strict=True):
            rewritten = task == "composition" and chance(0, "rewritten", row.prompt) < 0.5
            assert words == (miniature.paraphrase(row.prompt, 0) if rewritten else row.prompt)
            changed += rewritten
    assert abs(changed - 64) < 4 * np.sqrt(128 * 0.25)
    ahead = set(stream.upto(4))
    assert ahead == {prompt for step in range(4) for prompt in stream.draw(step)[1]}


@pytest.mark.parametrize("main", [True, False])
def test_all_processes_have_the_weights_of_process_0(main: bool, monkeypatch: pytest.MonkeyPatch):
    """The others train nothing; what is told of held-out prompts is the same everywhere."""
    made, told = config(**CLASSIFIED), []
    alone = make_routing(made, make_world())
    of_main = routing._trained(make_world().tasks).dump()

    def share(about: str, word: str) -> list[str]:
        told.append(word)
        return [of_main, ""]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(routing, "share", share)
    monkeypatch.setattr(routing, "is_main", lambda: main)
    trained = []
    monkeypatch.setattr(routing, "train_classifier", lambda p: trained.append(p) or train_classifier(p))
    found = routing._trained(make_world().tasks)
    assert (told, len(trained)) == ([of_main if main else ""], int(main))
    assert found.dump() == of_main
    assert "right about those held out: 1.000" in alone.told


# ---- evaluation


def test_evaluation_reads_other_words_where_it_is_asked_to():
    plain, other = (plan_opd(config(**{"eval.rewritten": on})).setup.eval_set for on in (False, True))
    task = other.tasks["text"]
    assert next(plain.pairs(task))[0] == next(other.pairs(task))[0]  # what scores go by
    assert [plain.read(prompt) for prompt in task.test] == list(task.test)
    assert [other.read(prompt) for prompt in task.test] == [miniature.paraphrase(each, 1) for each in task.test]
    assert set(map(other.read, task.test)) < set(other.prompts())


# ---- what it costs


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 1), (SOFT, 2), (CLASSIFIED, 2), (CLASSIFIED | {"routing.top": 1}, 1), ({"routing.wrong": 0.5}, 1)],
    ids=str,
)
def test_every_teacher_asked_is_a_forward_more(changes: dict[str, Any], count: int):
    made, hard = config(**changes), config()
    assert asked(made) == count
    cost, plain = plan_opd(made).cost(), plan_opd(hard).cost()
    np.testing.assert_allclose(cost.teachers, plain.teachers * (count + 1) / 2)  # the anchor is the other one
    assert (cost.forward, cost.backward, cost.rollout) == (plain.forward, plain.backward, plain.rollout)


def test_programs_without_weights_have_the_mix_of_a_run():
    """Shapes of `compile_for` and of benchmarks are those that the stream gives."""
    made = config(**CLASSIFIED)
    mesh = make_mesh(made.run.mesh)
    update = abstract_update(made, mesh)
    batch, real = update.arguments[2], plan_opd(made).stream.batch(0)

    def alike(one: Any, two: Any) -> None:
        assert (one.shape, one.dtype) == (two.shape, two.dtype)

    jax.tree.map(alike, (batch.route, batch.mix), (real.route, real.mix))
    filled = even_mix(batch.mix)
    assert filled is not None
    jax.tree.map(alike, filled, real.mix)
    np.testing.assert_array_equal(filled.weights, 0.5)
    np.testing.assert_array_equal(filled.bank, np.broadcast_to([0, 1], (8, 2)))
    assert abstract_batch(config(), batch.conditioning, batch.route.sharding).mix is None
