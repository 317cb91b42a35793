"""Tables of a page: scores by model, with intervals, what is best, and what cannot be told apart from it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fopd_jax.reporting.evaluations import Kept, most_samples, prompts_of, score_matrix, skills_of
from fopd_jax.reporting.intervals import Interval, mean_interval
from fopd_jax.reporting.reading import as_object, distinct, numbers_of
from fopd_jax.reporting.workdirs import Run

MOST_COMPARED = 12
"""Models of which each is compared with each."""
BEST, LEVEL = "best", "level"
"""Marks of a column's largest mean, and of those that are not told apart from it."""


def evaluation_tables(cells: Sequence[Kept]) -> Iterator[dict[str, Any]]:
    """One of each suite and setting: rows are models, columns scores; `pairs`: differences by score and two models."""
    kinds = distinct((each.cell.suite, each.cell.setting) for each in cells)
    for suite, setting in kinds:
        yield _evaluation_table(
            suite, setting, [each for each in cells if (each.cell.suite, each.cell.setting) == (suite, setting)]
        )


def _evaluation_table(suite: str, setting: str, cells: Sequence[Kept]) -> dict[str, Any]:
    skills, prompts, samples = skills_of(cells), prompts_of(cells), most_samples(cells)
    scores = {
        skill: {each.cell.model: score_matrix(each, skill, prompts, samples) for each in cells} for skill in skills
    }
    rows = [
        {
            "label": each.cell.model,
            "entity": each.cell.model,
            "about": {name: str(value) for name, value in each.cell.about.items()},
            "settings": dataclasses.asdict(each.cell.settings),
            "images": len(each.cell.records),
            "cells": {skill: _cell(each, skill, mean_interval(scores[skill][each.cell.model])) for skill in skills},
        }
        for each in cells
    ]
    pairs = {skill: compared(by_model) for skill, by_model in scores.items()}
    for skill in skills:
        mark(rows, skill, pairs[skill])
    return {
        "suite": suite, "setting": setting, "skills": skills, "rows": rows, "pairs": pairs,
        "prompts": len(prompts), "warnings": unequal(cells),
    }  # fmt: skip


def _cell(kept: Kept, skill: str, found: Interval | None) -> dict[str, Any]:
    failed = [record.failed[skill] for record in kept.cell.records if skill in record.failed]
    told = {"failed": len(failed), "why": failed[0][:200]} if failed else {}
    return {**(found._asdict() if found else {}), **told}


def compared(by_model: Mapping[str, np.ndarray]) -> dict[str, dict[str, Interval]]:
    """Mean of one model's scores minus another's over the images that both have, each way; the first dozen models."""
    found: dict[str, dict[str, Interval]] = {}
    for one, other in itertools.permutations(list(by_model)[:MOST_COMPARED], 2):
        interval = mean_interval(by_model[one] - by_model[other])
        if interval is not None:
            found.setdefault(one, {})[other] = interval
    return found


def mark(rows: Sequence[dict[str, Any]], skill: str, pairs: Mapping[str, Mapping[str, Interval]]) -> None:
    """Write marks into a column's cells; larger is better. Level is what the best one's lead over may well be none."""
    means = {row["label"]: row["cells"][skill].get("mean") for row in rows if skill in row["cells"]}
    known = [mean for mean in means.values() if mean is not None]
    if len(known) < 2:
        return
    best = [label for label, mean in means.items() if mean == max(known)]
    for row in rows:
        lead = pairs.get(best[0], {}).get(row["label"])
        if row["label"] in best:
            row["cells"][skill]["mark"] = BEST
        elif lead is not None and lead.low is not None and lead.low <= 0:
            row["cells"][skill]["mark"] = LEVEL


def unequal(cells: Sequence[Kept]) -> list[str]:
    """What makes a comparison of a table's rows unfair, in words."""
    said = []
    settings = {each.cell.model: dataclasses.asdict(each.cell.settings) for each in cells}
    for name in next(iter(settings.values()), {}):
        values = {model: each[name] for model, each in settings.items()}
        if len({repr(value) for value in values.values()}) > 1:
            told = ", ".join(f"{model} {value}" for model, value in values.items())
            said.append(f"{name} differs: {told}")
    keys = {each.cell.model: frozenset(each.by_key) for each in cells}
    if len(set(keys.values())) > 1:
        told = ", ".join(f"{model} {len(each)}" for model, each in keys.items())
        said.append(f"not the same prompts and samples; images: {told}; differences are over those that both have")
    return said


# ---- final reports of runs


def report_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What runs measured at their ends: of each run the model that it trained, then the models that it began from.

    A given model that several runs measured alike is one row. None: no run has a report.
    """
    reported = [run for run in runs if run.models]
    rows = [_row(run, run.own, run.name) for run in reported if run.own]
    given: list[dict[str, Any]] = []
    for run, model in [(each, name) for each in reported for name in each.models if name != each.own]:
        row = {**_row(run, model, model), "given": True, "measured": [run.name]}
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
        "suite": "Final reports of the runs", "setting": "", "skills": skills, "rows": rows, "pairs": {},
        "prompts": 0, "warnings": _unequal_reports(reported),
    }  # fmt: skip


def _alike(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two reports measured a model alike, in all skills that both have, and they have some."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[skill] == other[skill] for skill in common)


def _row(run: Run, model: str, label: str) -> dict[str, Any]:
    counts, failed = numbers_of(run.results.get("samples")), as_object(as_object(run.results.get("failed")).get(model))
    cells = {
        skill: {
            "mean": mean,
            **({"images": int(counts[skill])} if skill in counts else {}),
            **({"failed": int(count)} if (count := numbers_of(failed).get(skill)) else {}),
        }
        for skill, mean in run.models[model].items()
    }
    settings = {name.removeprefix("eval."): value for name, value in run.config.items() if name.startswith("eval.")}
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    own = {"entity": run.name, "leads": run.leads} if model == run.own else {"entity": ""}
    return {"label": label, **own, "settings": plain, "cells": cells}


_DECISIVE = ("eval.num_steps", "eval.guidance", "eval.transition", "eval.seed", "eval.rewritten", "eval.final_samples")


def _unequal_reports(runs: Sequence[Run]) -> list[str]:
    """Settings of their evaluations that move scores and are not the same."""
    said = []
    for name in _DECISIVE:
        values = {run.name: run.config[name] for run in runs if name in run.config}
        if len({repr(value) for value in values.values()}) > 1:
            said.append(f"{name} differs: " + ", ".join(f"{run} {value}" for run, value in values.items()))
    return said
