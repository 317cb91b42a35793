"""What the folder of a run holds, as far as a report shows it; the run may still go on, or be half gone."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.evaluation.report import RESULTS_FILE, SAMPLES_FILE, TABLE_FILE
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.reporting.reading import (
    Problems,
    Series,
    as_number,
    as_object,
    numbers_of,
    read_object,
    read_series,
    read_text,
)
from fopd_jax.running.goodput import FILE as GOODPUT_FILE
from fopd_jax.running.metrics import CLOCKED, SCALARS
from fopd_jax.running.pace import SECONDS
from fopd_jax.running.workdir import CONFIG_FILE

TIMING_FILE = "timing.json"
PICTURES = (SAMPLES_FILE, "health.png")
READ = (CONFIG_FILE, RECORD_FILE, SCALARS, CLOCKED, GOODPUT_FILE, RESULTS_FILE, TABLE_FILE, TIMING_FILE)
TRAINED = ("student.safetensors", "adapter.safetensors")
"""What a run exports, with a card in it."""
GIVEN = re.compile(r"base|merge|start|teacher/.*")
"""Models of a final report that the run did not train."""
_CELL = re.compile(r"\s*[-.\dnaif]+\*?\s*(?:\((?P<lead>[-+]\d+\.\d+) ± (?P<error>\d+\.\d+)\)|\(no pair has both\))?")
"""Of a table: a mean, and in brackets a lead."""


class Lead(NamedTuple):
    """Of the run's own model over another one: mean of the paired differences, and its standard error."""

    mean: float
    error: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. What is not there is empty.

    `config`: whole where the record has it, else what differs from the defaults. `start`: the last one of the record.
    `scalars`: by name, those of the clock (`performance.jsonl`) among them. `leads`: by model and skill. `files`: all
    that was read, for who asks later whether something has changed.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    starts: int
    scalars: Mapping[str, Series]
    results: Mapping[str, Any]
    table: str
    leads: Mapping[str, Mapping[str, Lead]]
    goodput: Mapping[str, Any]
    timing: Mapping[str, float]
    card: Mapping[str, Any]
    problems: Problems

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", ""))

    @property
    def status(self) -> str:
        """The record's word; of a folder without one, nothing."""
        return str(self.start.get("status", ""))

    @property
    def step(self) -> int:
        """The newest that is known of."""
        written = [int(series.steps[-1]) for series in self.scalars.values()]
        kept = as_number(self.start.get("at_step")) or as_number(self.results.get("steps")) or 0
        return max([*written, int(kept)])

    @property
    def steps(self) -> int:
        """That the run is to have; 0 is unknown."""
        return int(as_number(self.config.get("run.steps")) or 0)

    @property
    def images(self) -> int:
        """Of one step; 0 is unknown."""
        return int(as_number(self.config.get("batch_size")) or 0)

    @property
    def devices(self) -> Mapping[str, float]:
        """How many of each kind."""
        return numbers_of(self.start.get("devices"))

    @property
    def seconds(self) -> Mapping[str, float]:
        """By phase, over all starts."""
        return numbers_of(self.goodput.get("seconds"))

    @property
    def pictures(self) -> Sequence[Path]:
        return [path for name in PICTURES if (path := self.folder / name).is_file()]

    @property
    def settings(self) -> Sequence[str]:
        """Names of the other settings that the final report was made at."""
        return list(as_object(self.results.get("settings")))

    def measured(self, setting: str = "") -> Mapping[str, Mapping[str, float]]:
        """Means of the final report by model and skill, at the run's own setting or another one."""
        found = {name: numbers_of(each) for name, each in as_object(self._report(setting).get("models")).items()}
        return {name: each for name, each in found.items() if each}

    def failed(self, setting: str = "") -> Mapping[str, Any]:
        """By model and skill how many scores failed."""
        return as_object(self._report(setting).get("failed"))

    def _report(self, setting: str) -> Mapping[str, Any]:
        return as_object(as_object(self.results.get("settings")).get(setting)) if setting else self.results

    @property
    def models(self) -> Mapping[str, Mapping[str, float]]:
        """Those of the run's own setting."""
        return self.measured()

    @property
    def own(self) -> str:
        """The name of the model that the run trained, in its final report; empty where that is not to be told."""
        led = [name for name in self.models if self.leads and name not in self.leads]
        left = led if len(led) == 1 else [name for name in self.models if not GIVEN.fullmatch(name)]
        return left[0] if len(left) == 1 else ""


def is_workdir(folder: Path) -> bool:
    """Whether anything of a run is there."""
    return any((folder / name).is_file() for name in READ)


def read_run(name: str, folder: Path) -> Run:
    """All of it, and what could not be read."""
    (identity, a), (record, b), (scalars, c), (clocked, d), (goodput, e), (results, f), (timing, h) = (
        read(folder / file)
        for read, file in (
            (read_object, CONFIG_FILE), (read_object, RECORD_FILE), (read_series, SCALARS), (read_series, CLOCKED),
            (read_object, GOODPUT_FILE), (read_object, RESULTS_FILE), (read_object, TIMING_FILE),
        )
    )  # fmt: skip
    table, g = read_text(folder / TABLE_FILE)
    card, i = _card(folder)
    starts = [each for each in record.get("starts") or [] if isinstance(each, dict)] if _has_starts(record) else []
    start = starts[-1] if starts else {}
    problems = [*a, *b, *c, *d, *e, *f, *g, *h, *i]
    if record and not _has_starts(record):
        problems.append(f"{folder / RECORD_FILE}: damaged, expected the starts of a run as JSON")
    return Run(
        name=name, folder=folder, config={**identity, **as_object(start.get("config"))}, start=start,
        starts=len(starts), scalars={**scalars, **clocked}, results=results, table=table, leads=read_leads(table),
        goodput=goodput, timing=numbers_of(timing), card=card, problems=problems,
    )  # fmt: skip


def hours_at(run: Run) -> Series | None:
    """Hours of updates at each step that a time was taken, evaluations and checkpoints apart; None: not known."""
    seconds = run.scalars.get(SECONDS)
    if seconds is None:
        return None
    since = np.diff(seconds.steps, prepend=0.0)
    return Series(seconds.steps, np.cumsum(np.nan_to_num(seconds.values) * since) / 3600)


def read_leads(table: str) -> dict[str, dict[str, Lead]]:
    """By model and skill, from the table of a final report; of tables at other settings nothing."""
    lines = table.partition("\n\n")[0].splitlines()
    if not lines:
        return {}
    skills = lines[0].split()
    found: dict[str, dict[str, Lead]] = {}
    for line in lines[1:]:
        name, _, rest = line.partition("  ")
        cells = list(_CELL.finditer(rest))
        if len(cells) == len(skills):
            pairs = zip(skills, cells, strict=True)
            leads = {skill: Lead(float(c["lead"]), float(c["error"])) for skill, c in pairs if c["lead"]}
            found |= {name.strip(): leads} if leads else {}
    return found


def _has_starts(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("starts"), list)


def _card(folder: Path) -> tuple[Mapping[str, Any], Problems]:
    """What the exported adapter says of itself."""
    for name in TRAINED:
        try:
            card = read_card(folder / name)
        except (OSError, ValueError) as error:
            return {}, [str(error)]
        if card is not None:
            return card.fields(), []
    return {}, []
