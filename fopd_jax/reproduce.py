"""`python -m fopd_jax.reproduce --workdir=FOLDER [--table NAME …] [--seeds=3] [--workers=2] [--plan]`.

Trains and scores what the miniature's tables compare, from nothing but the packaged base and teachers: the main table
(one policy on all rewards beside distillation, each from base, SFT and merge), recipes, targets, students beyond their
teachers, cold starts, few steps, noisy teachers, routing, how many teachers, rewritten prompts, anchors, objectives,
weightings, rollout noise, what a score costs; a larger teacher, which is pretrained for hours, only by its name. Runs
`configs/` and `tools/` of this clone as commands of their own, one a core side by side, each with its log in
`FOLDER/logs`; the same command goes on after an interruption. Writes `tables.md`, `tables.csv` and `tables.json` of the
rows and seeds that are done, and `efficiency.png`, what scores cost in images and FLOPs (extra `plots`). `--plan` tells
what would run, and how much of it is done.

`--scale=sd35m` plans the same tables for Stable Diffusion 3.5 Medium and trains nothing: it tells students, FLOPs and
chip-hours by arithmetic at `--utilisation` of a chip's peak, and writes the commands into `FOLDER/commands.sh`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()

import os
import shlex
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from fopd_jax.config.load import load_config
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import align, say
from fopd_jax.exits import Arguments, explained, need
from fopd_jax.files import check_writable, local_path, write_text
from fopd_jax.performance.host import ROOT, commit, hardware, versions
from fopd_jax.running.records import PACKAGES
from fopd_jax.studies.efficiency import Curve, draw, read_curve
from fopd_jax.studies.estimate import as_rows, costs_of
from fopd_jax.studies.jobs import Job, plan, run_jobs
from fopd_jax.studies.students import EVERYBODY, Student, Trained, all_jobs, fields_of, train
from fopd_jax.studies.summary import Row, read_scores, write_summary
from fopd_jax.studies.tables import MINIATURE, NAMES, REFERENCE, SD35M, TAUGHT_BY, Scale, Table, tables

SCALES = {"miniature": MINIATURE, "sd35m": SD35M}
OTHERS = ("base", "teacher/text", "teacher/composition", "teacher/quality", "merge")
"""Models beside the reference that are told above every table."""
Study = Mapping[tuple[str, str, int], tuple[Trained, StageConfig]]
"""By table, row and seed."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    logging.set_verbosity(logging.WARNING)
    with explained():
        scale, work = SCALES[options.scale], local_path("--workdir", options.workdir).absolute()
        chosen = _choose(options, scale)
        study: Study = {
            (name, row, seed): _train(student, table, scale, seed)
            for name, table in chosen.items()
            for row, student in table.rows.items()
            for seed in range(options.seeds or table.seeds)
        }
        references = {name: _train(REFERENCE, table, scale, 0)[0] for name, table in chosen.items()}
        jobs = all_jobs([*references.values(), *(each for each, _ in study.values())])
        if scale is not MINIATURE:
            _tell_costs(study, jobs, work, options.utilisation)
            return
        say(f"{len(jobs)} jobs for {', '.join(chosen)}\n{plan(jobs, work)}")
        if options.plan:
            return
        for name in (name for name, table in chosen.items() if table.curves):
            need(f"--table {name}", "plots", "matplotlib")
        check_writable(work, "--workdir")
        try:
            run_jobs(jobs, work, ROOT, options.workers)
        finally:
            _tell(work, chosen, study, references)


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/reproduce", help="folder of all runs; default runs/reproduce")
    parser.add_argument("--table", nargs="+", choices=[*NAMES], help="which; default all but larger_teacher")
    parser.add_argument("--seeds", type=int, help="how many, from 0; default 3 in the main table, else 1")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="commands side by side")
    parser.add_argument("--plan", action="store_true", help="tell what would run, and end")
    parser.add_argument("--scale", default="miniature", choices=[*SCALES], help="default miniature")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of a chip's peak; default .35, assumed")
    return parser.parse_args(arguments)


def _choose(options: Namespace, scale: Scale) -> dict[str, Table]:
    """
    Raises:
      ValueError: a number is out of range, or this is no clone.
    """
    for name in ("seeds", "workers"):
        if (found := getattr(options, name)) is not None and not 1 <= found <= 64:
            raise ValueError(f"--{name}: found {found}, expected a number from 1 to 64")
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"--utilisation: found {options.utilisation:g}, expected a share of 1, above 0")
    if not (ROOT / "configs" / f"{scale.main}.py").is_file():
        raise ValueError("reproduce: found no configs/ beside the package, expected a clone of the project")
    there = tables(scale)
    usual = [name for name, table in there.items() if not table.long]
    return {name: there[name] for name in dict.fromkeys(options.table or usual)}


def _train(student: Student, table: Table, scale: Scale, seed: int) -> tuple[Trained, StageConfig]:
    """Its jobs and its config, checked before anything runs."""
    budget = {**scale.budget, **table.budget} if student.budget is None else student.budget
    named = student.config or scale.main
    config = override(_load(named), budget)
    made = train(student, named, config, budget, seed)
    return made, resolve(override(config, fields_of(student, config)))


def _load(named: str) -> StageConfig:
    path, _, variant = named.partition(":")
    return load_config(ROOT / "configs" / f"{path}.py", variant)


def _tell_costs(study: Study, jobs: Mapping[str, Job], work: Path, utilisation: float) -> None:
    students: dict[str, list[tuple[str, StageConfig]]] = {}
    for (name, _, _), (made, config) in study.items():
        students.setdefault(name, []).append((made.folder, config))
    rows = as_rows(costs_of(students), utilisation)
    say(align(rows, right=range(1, len(rows[0]))))
    say(f"by arithmetic, training alone, at {utilisation:.0%} of a chip's peak, which is assumed; nothing was run")
    check_writable(work, "--workdir")
    lines = (
        shlex.join(["python", *(word.replace("{work}", str(work)) for word in job.command)]) for job in jobs.values()
    )
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "commands.sh", "".join(f"{line}\n" for line in lines))
    say(f"see {work / 'commands.sh'}")


def _tell(work: Path, chosen: Mapping[str, Table], study: Study, references: Mapping[str, Trained]) -> None:
    """Write and print the tables of what is done; rows of which some seed is missing have the others alone."""
    found: dict[str, tuple[Table, list[Row]]] = {}
    curves: dict[str, dict[str, Curve]] = {}
    taught_by = [_load(each) for each in TAUGHT_BY]
    for name, table in chosen.items():
        rows = []
        for row, student in table.rows.items():
            runs = {seed: each for (*place, seed), each in study.items() if place == [name, row]}
            done = {
                seed: each for seed, each in runs.items() if all((work / job.done).exists() for job in each[0].jobs)
            }
            scores = {seed: read_scores(work / made.folder, table, student.model) for seed, (made, _) in done.items()}
            if scores:
                rows.append(Row(row, student, scores, runs[0][0].fields))
            if table.curves and done:
                made, config = done[min(done)]
                teachers = taught_by if isinstance(config, OPD) else []
                curves.setdefault(name, {})[row] = read_curve(work / made.folder, config, teachers)
        if rows:
            found[name] = table, [*_others(work, references[name]), *rows]
    if found:
        about = {"commit": commit(), **hardware(), "versions": versions(PACKAGES), "budget": dict(MINIATURE.budget)}
        write_summary(work, found, curves, about)
        for name, each in curves.items():
            draw(each, work / f"{name}.png")
        say(f"see {work / 'tables.md'}")


def _others(work: Path, reference: Trained) -> list[Row]:
    if not (work / reference.jobs[-1].done).exists():
        return []
    folder, plain = work / reference.folder / EVERYBODY, Table("", {})
    return [Row(name, None, {0: read_scores(folder, plain, name)}) for name in OTHERS]


if __name__ == "__main__":
    main()
