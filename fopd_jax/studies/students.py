"""Students to compare: a config with some fields changed, trained at several seeds, and scored."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.config.parse import flatten
from fopd_jax.config.stages import StageConfig
from fopd_jax.evaluation.report import RESULTS_FILE
from fopd_jax.studies.jobs import Job

STUDENTS = "students"


@dataclasses.dataclass(frozen=True)
class Student:
    """`config`: below configs/, as `recipes/pdm:miniature`, or '' for the study's main one; `fields`: what is changed
    in it, over the budget's; texts may name the study's folder as `{work}`. `needs`: what has to be made first.
    `scored`: further evaluations, by their names in `EVALUATIONS`. `model`: its name in what it leaves.
    `budget`: in place of its table's.

    A field `tasks.*.x` is that of every task; a value may be a function of the task and all of them.
    """

    config: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[Job, ...] = ()
    scored: tuple[str, ...] = ()
    model: str = "student"
    budget: Mapping[str, Any] | None = None


EVERYBODY = "everybody"
EVALUATIONS: dict[str, dict[str, Any]] = {"rewritten": {"eval.rewritten": True}, EVERYBODY: {"eval.alone": False}}
"""Done after a run beside its own report."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A student at a seed: its folder, the jobs that fill it, those that it needs first, and what is changed in its
    config over the budget.
    """

    folder: str
    jobs: tuple[Job, ...]
    fields: Mapping[str, Any]


def fields_of(student: Student, config: StageConfig) -> dict[str, Any]:
    """What is changed in its config under the budget, without what would stay as it is."""
    tasks, known, found = tuple(config.tasks), flatten(config), dict[str, Any]()
    for field, value in student.fields.items():
        for task in tasks if "*" in field else ("",):
            found[field.replace("*", task)] = value(task, tasks) if callable(value) else value
    return {field: value for field, value in found.items() if field not in known or known[field] != value}


def train(student: Student, named: str, config: StageConfig, budget: Mapping[str, Any], seed: int) -> Trained:
    """The jobs of one student, whose config is `named` and has the budget in it. Equal students have equal names, in
    whatever table they stand.
    """
    own = fields_of(student, config)
    fields = {**budget, **own, "seed": seed}
    name = _name(named, own, fields)
    folder = f"{STUDENTS}/{name}"
    flags = tuple(f"--config.{field}={value}" for field, value in fields.items())
    command = ("-m", "fopd_jax.main", config_flag(named), f"--workdir={{work}}/{folder}", *flags)
    jobs = [
        *student.needs,
        Job(name, command, f"{folder}/{RESULTS_FILE}", tuple(job.name for job in student.needs), "run"),
    ]
    for evaluation in student.scored:
        flags = tuple(f"--config.{field}={value}" for field, value in EVALUATIONS[evaluation].items())
        again = ("-m", "fopd_jax.evaluate", f"--workdir={{work}}/{folder}", f"--out={{work}}/{folder}/{evaluation}")
        done = f"{folder}/{evaluation}/{RESULTS_FILE}"
        jobs.append(Job(f"{name}.{evaluation}", (*again, *flags), done, (name,), "evaluation"))
    return Trained(folder, tuple(jobs), own)


def config_flag(named: str) -> str:
    """Of a config below configs/."""
    path, _, variant = named.partition(":")
    return f"--config=configs/{path}.py" + (f":{variant}" if variant else "")


def _name(config: str, own: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Readable, and no other student's."""
    told = ",".join([config, *(f"{field}={value}" for field, value in own.items())])
    whole = repr((config, sorted((field, str(value)) for field, value in fields.items())))
    slug = re.sub(r"[^A-Za-z0-9.=,_-]+", "_", told)[:80].strip("_")
    return f"{slug}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}-seed{fields['seed']}"


def all_jobs(trained: Sequence[Trained]) -> dict[str, Job]:
    """Each once."""
    return {job.name: job for each in trained for job in each.jobs}
