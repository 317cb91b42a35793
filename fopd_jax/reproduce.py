"""`python -m fopd_jax.reproduce --workdir=FOLDER [--table=NAME …] [--seeds=3] [--workers=2]`.

Trains and scores what the miniature's tables compare, from nothing but the packaged base and teachers: recipes,
targets, anchors, cold starts, objectives, rollout noise, routing, rewritten prompts, few steps, noisy teachers. Runs
`configs/` and `tools/` of this clone as commands of their own, one a core side by side, each with its log in
`FOLDER/logs`; the same command goes on after an interruption. Writes `tables.md`, `tables.csv` and `tables.json` of all
rows that are there whole. `--plan` tells what would run, and how much of it is done.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from fopd_jax.config.load import load_config
from fopd_jax.config.parse import override, resolve
from fopd_jax.console import say
from fopd_jax.exits import Arguments, explained
from fopd_jax.files import check_writable, local_path
from fopd_jax.performance.host import ROOT, commit, hardware, versions
from fopd_jax.running.records import PACKAGES
from fopd_jax.studies.jobs import plan, run_jobs
from fopd_jax.studies.students import Student, Trained, all_jobs, fields_of, train
from fopd_jax.studies.summary import Row, Scores, read_scores, write_summary
from fopd_jax.studies.tables import BUDGET, REFERENCE, TABLES, Table

OTHERS = ("base", "teacher/text", "teacher/composition", "teacher/quality", "merge")
"""Models of the reference run that are told above every table."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained():
        work = local_path("--workdir", options.workdir).absolute()
        chosen = _choose(options)
        trained = {
            (name, row, seed): _train(student, table, seed)
            for name, table in chosen.items()
            for row, student in table.rows.items()
            for seed in range(options.seeds)
        }
        reference = _train(REFERENCE, Table("", {}), 0)
        jobs = all_jobs([reference, *trained.values()])
        say(f"{len(jobs)} jobs for {', '.join(chosen)}\n{plan(jobs, work)}")
        if options.plan:
            return
        check_writable(work, "--workdir")
        try:
            run_jobs(jobs, work, ROOT, options.workers)
        finally:
            _tell(work, chosen, trained, reference)


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--workdir", required=True, help="folder of all runs")
    parser.add_argument("--table", nargs="*", default=[*TABLES], choices=[*TABLES], help="which; default all")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="commands side by side")
    parser.add_argument("--plan", action="store_true", help="tell what would run, and end")
    return parser.parse_args(arguments)


def _choose(options: Namespace) -> dict[str, Table]:
    """
    Raises:
      ValueError: a number is out of range, or this is no clone.
    """
    for name in ("seeds", "workers"):
        if not 1 <= (found := getattr(options, name)) <= 64:
            raise ValueError(f"--{name}: found {found}, expected a number from 1 to 64")
    if not (ROOT / "configs" / "miniature.py").is_file():
        raise ValueError("reproduce: found no configs/ beside the package, expected a clone of the project")
    return {name: TABLES[name] for name in dict.fromkeys(options.table)}


def _train(student: Student, table: Table, seed: int) -> Trained:
    """Checked before anything runs."""
    budget = {**BUDGET, **table.budget}
    path, _, variant = student.config.partition(":")
    config = load_config(ROOT / "configs" / f"{path}.py", variant)
    tasks = tuple(config.tasks)
    resolve(override(config, {**budget, **fields_of(student, tasks)}))
    return train(student, tasks, budget, seed)


def _tell(
    work: Path, chosen: Mapping[str, Table], trained: Mapping[tuple[str, str, int], Trained], reference: Trained
) -> None:
    """Write and print the tables of what is done; rows of which some seed is missing have the others alone."""
    found: dict[str, tuple[Table, list[Row]]] = {}
    for name, table in chosen.items():
        rows = []
        for row, student in table.rows.items():
            runs = {seed: each for (*place, seed), each in trained.items() if place == [name, row]}
            scores: dict[int, Scores] = {
                seed: read_scores(work / each.folder, table, student.model)
                for seed, each in runs.items()
                if all((work / job.done).exists() for job in each.jobs)
            }
            if scores:
                rows.append(Row(row, student, scores))
        if rows:
            found[name] = table, [*_others(work, reference), *rows]
    if found:
        about = {"commit": commit(), **hardware(), "versions": versions(PACKAGES), "budget": BUDGET}
        write_summary(work, found, about)
        say(f"see {work / 'tables.md'}")


def _others(work: Path, reference: Trained) -> list[Row]:
    plain = Table("", {})
    if not (work / reference.jobs[-1].done).exists():
        return []
    return [Row(name, None, {0: read_scores(work / reference.folder, plain, name)}) for name in OTHERS]


if __name__ == "__main__":
    main()
