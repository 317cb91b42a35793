"""Tables of what runs measured at their ends (`results.json`, `table.txt`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.reporting.reading import distinct, numbers_of
from fopd_jax.reporting.tables import mark
from fopd_jax.reporting.workdirs import Run

_DECISIVE = ("num_steps", "guidance", "transition", "seed", "rewritten", "final_samples")


def report_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """At the runs' own settings, then at each other one that any of them was reported at."""
    settings = distinct(setting for run in runs for setting in run.settings)
    return [table for setting in ("", *settings) if (table := report_table(runs, setting)) is not None]


def report_table(runs: Sequence[Run], setting: str = "") -> dict[str, Any] | None:
    """What runs measured at their ends: of each run the model that it trained, then the models that it began from.

    A given model that several runs measured alike is one row. None: no run has a report.
    """
    reported = [run for run in runs if run.measured(setting)]
    rows = [_row(run, run.own, run.name, setting) for run in reported if run.own in run.measured(setting)]
    given: list[dict[str, Any]] = []
    for run, model in [(each, name) for each in reported for name in each.measured(setting) if name != each.own]:
        row = {**_row(run, model, model, setting), "given": True, "measured": [run.name]}
        known = next((each for each in given if each["label"] == model and _alike(each["cells"], row["cells"])), None)
        if known is None:
            given.append(row)
        else:
            known["measured"].append(run.name)
            known["cells"] = {**row["cells"], **known["cells"]}
    names = [row["label"] for row in given]
    rows += [
        row if names.count(row["label"]) == 1 else {**row, "label": f"{row['label']} ({row['measured'][0]})"}
        for row in given
    ]
    if not rows:
        return None
    skills = distinct(name for row in rows for name in row["cells"])
    for skill in skills:
        for row in rows:
            row["cells"].setdefault(skill, {})
        mark(rows, skill, {})
    return {
        "suite": "Final reports of the runs", "setting": setting, "skills": skills, "rows": rows, "pairs": {},
        "prompts": 0, "warnings": _unequal_reports(reported), "notes": [],
    }  # fmt: skip


def _alike(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two reports measured a model alike, in all skills that both have, and they have some."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[skill] == other[skill] for skill in common)


def _row(run: Run, model: str, label: str, setting: str) -> dict[str, Any]:
    counts, failed = numbers_of(run.results.get("samples")), numbers_of(run.failed(setting).get(model))
    cells = {
        skill: {
            "mean": mean,
            **({"images": int(counts[skill])} if skill in counts else {}),
            **({"failed": int(count)} if (count := failed.get(skill)) else {}),
        }
        for skill, mean in run.measured(setting)[model].items()
    }
    evaluated = {name: run.config[f"eval.{name}"] for name in _DECISIVE if f"eval.{name}" in run.config}
    settings = {**evaluated, **({"here": setting} if setting else {})}
    own = {"entity": run.name, "leads": {} if setting else run.leads} if model == run.own else {"entity": ""}
    return {"label": label, **own, "settings": settings, "cells": cells}


def _unequal_reports(runs: Sequence[Run]) -> list[str]:
    """Settings of their evaluations that move scores and are not the same."""
    said = []
    for name in (f"eval.{name}" for name in _DECISIVE):
        values = {run.name: run.config[name] for run in runs if name in run.config}
        if len({repr(value) for value in values.values()}) > 1:
            said.append(f"{name} differs: " + ", ".join(f"{run} {value}" for run, value in values.items()))
    return said
