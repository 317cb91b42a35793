"""Students become commands, each with a name of its own."""

from typing import Any

from fopd_jax.studies.jobs import Job
from fopd_jax.studies.students import Student, Trained, all_jobs, fields_of, train
from tests.configs import load

BUDGET = {"run.steps": 3}
CONFIG = load("miniature")


def trained(student: Student, budget: dict[str, Any] = BUDGET, seed: int = 0, named: str = "miniature") -> Trained:
    return train(student, named, CONFIG, budget, seed)


def test_a_student_is_a_command_of_its_config_and_fields() -> None:
    made = trained(Student(fields={"objective.mar_beta": 0.1}), seed=2, named="recipes/pdm:miniature")
    (job,) = made.jobs
    assert made.folder == f"students/{job.name}"
    assert job.done == f"{made.folder}/results.json"
    assert job.command == (
        "-m", "fopd_jax.main", "--config=configs/recipes/pdm.py:miniature", f"--workdir={{work}}/{made.folder}",
        "--config.run.steps=3", "--config.objective.mar_beta=0.1", "--config.seed=2",
    )  # fmt: skip


def test_names_are_those_of_what_is_trained() -> None:
    plain = trained(Student())
    mixes = ({"text": share, "composition": 1 - share} for share in (0.5, 0.625))
    others = [
        trained(Student(), seed=1),
        trained(Student(), {"run.steps": 4}),
        trained(Student(), named="miniature_large"),
        *(trained(Student(fields={"tasks.text.mix": mix})) for mix in mixes),
    ]
    names = [each.jobs[-1].name for each in (plain, *others)]
    assert len(set(names)) == len(names)
    assert all(len(name) < 120 and "/" not in name and " " not in name for name in names)


def test_what_a_config_has_anyway_changes_nothing() -> None:
    assert CONFIG.guidance == 1.0
    assert trained(Student(fields={"guidance": 1.0})) == trained(Student())


def test_what_is_needed_comes_first_and_once_and_evaluations_last() -> None:
    before = Job("set", ("-c", ""), "set")
    made = [trained(Student(needs=(before,), scored=("rewritten",)), seed=seed) for seed in (0, 1)]
    first, run, again = made[0].jobs
    assert first is before
    assert run.needs == ("set",)
    assert again.needs == (run.name,)
    assert again.done == f"{made[0].folder}/rewritten/results.json"
    assert "--config.eval.rewritten=True" in again.command
    assert len(all_jobs(made)) == 5


def test_fields_of_every_task_and_functions_of_it() -> None:
    student = Student(fields={"tasks.*.weight": 2.0, "tasks.*.mix": lambda task, tasks: {task: len(tasks)}})
    assert fields_of(student, CONFIG) == {
        "tasks.text.weight": 2.0, "tasks.composition.weight": 2.0,
        "tasks.text.mix": {"text": 2}, "tasks.composition.mix": {"composition": 2},
    }  # fmt: skip
