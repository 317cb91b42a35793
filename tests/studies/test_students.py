"""Students become commands, each with a name of its own."""

from fopd_jax.studies.jobs import Job
from fopd_jax.studies.students import Student, all_jobs, fields_of, train

BUDGET, TASKS = {"run.steps": 3}, ("text", "composition")


def test_a_student_is_a_command_of_its_config_and_fields() -> None:
    made = train(Student("recipes/pdm:miniature", {"objective.mar_beta": 0.1}), TASKS, BUDGET, 2)
    (job,) = made.jobs
    assert made.folder == f"students/{job.name}"
    assert job.done == f"{made.folder}/results.json"
    assert job.command == (
        "-m", "fopd_jax.main", "--config=configs/recipes/pdm.py:miniature", f"--workdir={{work}}/{made.folder}",
        "--config.run.steps=3", "--config.objective.mar_beta=0.1", "--config.seed=2",
    )  # fmt: skip


def test_names_are_those_of_what_is_trained() -> None:
    plain = train(Student(), TASKS, BUDGET, 0)
    others = [
        train(Student(), TASKS, BUDGET, 1), train(Student(), TASKS, {"run.steps": 4}, 0),
        train(Student("miniature_large"), TASKS, BUDGET, 0),
        train(Student(fields={"tasks.text.mix": {"text": 0.5, "composition": 0.5}}), TASKS, BUDGET, 0),
        train(Student(fields={"tasks.text.mix": {"text": 0.6, "composition": 0.4}}), TASKS, BUDGET, 0),
    ]  # fmt: skip
    names = [each.jobs[-1].name for each in (plain, *others)]
    assert len(set(names)) == len(names)
    assert all(len(name) < 120 and "/" not in name and " " not in name for name in names)
    assert train(Student(fields={}, scored=()), TASKS, dict(BUDGET), 0) == plain


def test_what_is_needed_comes_first_and_once_and_evaluations_last() -> None:
    before = Job("set", ("-c", ""), "set")
    made = [train(Student(needs=(before,), scored=("rewritten",)), TASKS, BUDGET, seed) for seed in (0, 1)]
    first, run, again = made[0].jobs
    assert first is before
    assert run.needs == ("set",)
    assert again.needs == (run.name,)
    assert again.done == f"{made[0].folder}/rewritten/results.json"
    assert "--config.eval.rewritten=True" in again.command
    assert len(all_jobs(made)) == 5


def test_fields_of_every_task_and_functions_of_it() -> None:
    student = Student(fields={"tasks.*.weight": 2.0, "tasks.*.mix": lambda task, tasks: {task: len(tasks)}})
    assert fields_of(student, TASKS) == {
        "tasks.text.weight": 2.0, "tasks.composition.weight": 2.0,
        "tasks.text.mix": {"text": 2}, "tasks.composition.mix": {"composition": 2},
    }  # fmt: skip
