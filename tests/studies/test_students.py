"""Students become commands, each with a name of its own."""

from fopd_jax.studies.jobs import Job
from fopd_jax.studies.students import Student, all_jobs, train

BUDGET = {"run.steps": 3}


def test_a_student_is_a_command_of_its_config_and_fields() -> None:
    made = train(Student("recipes/pdm:miniature", {"objective.mar_beta": 0.1}), BUDGET, 2)
    (job,) = made.jobs
    assert made.folder == f"students/{job.name}"
    assert job.done == f"{made.folder}/results.json"
    assert job.command == (
        "-m", "fopd_jax.main", "--config=configs/recipes/pdm.py:miniature", f"--workdir={{work}}/{made.folder}",
        "--config.run.steps=3", "--config.objective.mar_beta=0.1", "--config.seed=2",
    )  # fmt: skip


def test_names_are_those_of_what_is_trained() -> None:
    plain = train(Student(), BUDGET, 0)
    others = [
        train(Student(), BUDGET, 1), train(Student(), {"run.steps": 4}, 0),
        train(Student("miniature_large"), BUDGET, 0),
        train(Student(fields={"tasks.text.mix": {"text": 0.5, "composition": 0.5}}), BUDGET, 0),
        train(Student(fields={"tasks.text.mix": {"text": 0.6, "composition": 0.4}}), BUDGET, 0),
    ]  # fmt: skip
    names = [each.jobs[-1].name for each in (plain, *others)]
    assert len(set(names)) == len(names)
    assert all(len(name) < 120 and "/" not in name and " " not in name for name in names)
    assert train(Student(fields={}, scored=()), dict(BUDGET), 0) == plain


def test_what_is_needed_comes_first_and_once_and_evaluations_last() -> None:
    before = Job("set", ("-c", ""), "set")
    made = [train(Student(needs=(before,), scored=("rewritten",)), BUDGET, seed) for seed in (0, 1)]
    first, run, again = made[0].jobs
    assert first is before
    assert run.needs == ("set",)
    assert again.needs == (run.name,)
    assert again.done == f"{made[0].folder}/rewritten/results.json"
    assert "--config.eval.rewritten=True" in again.command
    assert len(all_jobs(made)) == 5
