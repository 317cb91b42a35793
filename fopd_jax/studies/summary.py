"""What comes of a study: every row's scores by seed, their means and spread, as JSON, CSV and Markdown."""

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.evaluation.report import RESULTS_FILE
from fopd_jax.files import write_json, write_text
from fopd_jax.studies import efficiency
from fopd_jax.studies.efficiency import Curve
from fopd_jax.studies.students import Student
from fopd_jax.studies.tables import SKILLS, Table

Scores = dict[str, float]
"""By column: a skill, or a skill at another setting, `text, steps 4`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Of a table: the student, its scores by seed, and what is changed in its config; also models that were not trained
    for it, without seeds.
    """

    name: str
    student: Student | None
    scores: Mapping[int, Scores]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def mean(self, column: str) -> float:
        """Over seeds."""
        return statistics.fmean(each[column] for each in self.scores.values())

    def spread(self, column: str) -> float | None:
        """Standard deviation over seeds; None of one."""
        found = [each[column] for each in self.scores.values()]
        return statistics.stdev(found) if len(found) > 1 else None


def read_scores(folder: Path, table: Table, model: str) -> Scores:
    """Of one run.

    Raises:
      ValueError: its results are damaged, or lack the model or a column; names the file.
    """
    file = folder / RESULTS_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found: Scores = dict(kept["models"][model])
        for column in table.columns:
            if column in kept.get("settings", {}):
                other = kept["settings"][column]["models"][model]
            else:
                file = folder / column / RESULTS_FILE
                other = json.loads(file.read_text(encoding="utf-8"))["models"][model]
            found |= {f"{skill}, {column}": other[skill] for skill in SKILLS}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: damaged, or not of this study: {error}") from error
    return found


def columns_of(table: Table) -> list[str]:
    """Of its scores, in the order of a page."""
    return [*SKILLS, *(f"{skill}, {column}" for column in table.columns for skill in SKILLS)]


def as_markdown(table: Table, rows: Sequence[Row]) -> str:
    """Means ± deviations over seeds; the best mean of students bold."""
    columns = columns_of(table)
    students = [row for row in rows if row.student is not None]
    best = {column: max((row.mean(column) for row in students), default=0.0) for column in columns}
    lines = [f"### {table.title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            if any(column not in scores for scores in row.scores.values()):
                cells.append("")
                continue
            mean, spread = row.mean(column), row.spread(column)
            text = f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
            cells.append(
                f"**{text}**" if row.student is not None and round(mean, 3) == round(best[column], 3) else text
            )
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_summary(
    out: Path,
    found: Mapping[str, tuple[Table, Sequence[Row]]],
    curves: Mapping[str, Mapping[str, Curve]],
    about: Mapping[str, Any],
) -> None:
    """`tables.json`, `tables.csv` (a line a row, seed and column), `tables.md`; `curves`: of tables with any."""
    whole = {
        name: {
            "title": table.title,
            "rows": {
                row.name: {
                    "config": row.student.config if row.student else None,
                    "fields": dict(row.fields),
                    "scores": {str(seed): scores for seed, scores in row.scores.items()},
                }
                for row in rows
            },
            **({"curves": efficiency.as_fields(curves[name])} if name in curves else {}),
        }
        for name, (table, rows) in found.items()
    }
    write_json(out / "tables.json", {"tables": whole, **about})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "row", "seed", "column", "score"))
    for name, (_, rows) in found.items():
        for row in rows:
            for seed, scores in row.scores.items():
                writer.writerows((name, row.name, seed, column, score) for column, score in scores.items())
    write_text(out / "tables.csv", text.getvalue())
    pages = []
    for name, (table, rows) in found.items():
        pages.append(as_markdown(table, rows))
        if name in curves:
            pages.append(efficiency.as_markdown(curves[name]))
    write_text(out / "tables.md", "\n\n".join(pages) + "\n")
