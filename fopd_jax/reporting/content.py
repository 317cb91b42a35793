"""All that a page shows, as one value of JSON types: numbers in `data`, pictures by name beside it."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fopd_jax import __version__
from fopd_jax.console import progress
from fopd_jax.evaluation.comparison import names_apart
from fopd_jax.evaluation.records import RECORDS_FILE, SETTINGS_FILE
from fopd_jax.reporting import curves
from fopd_jax.reporting.differences import differences
from fopd_jax.reporting.entities import DARK, LIGHT, slots, unique_names
from fopd_jax.reporting.evaluations import Kept, is_evaluation, read_evaluation
from fopd_jax.reporting.final_reports import report_tables
from fopd_jax.reporting.galleries import galleries
from fopd_jax.reporting.pictures import WIDE, Album
from fopd_jax.reporting.reading import Problems
from fopd_jax.reporting.tables import evaluation_tables
from fopd_jax.reporting.workdirs import Run, is_workdir, read_run

HOUR, MOST_PROBLEMS = 3600.0, 100


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is to be shown: folders of runs with the names that were given ('' is the folder's own), of evaluations.

    `title`: of the page. `rows`: of a gallery, at most; `bytes`: of all pictures.
    """

    runs: tuple[tuple[str, Path], ...]
    evaluations: tuple[Path, ...] = ()
    title: str = "Flow-OPD report"
    rows: int = 200
    bytes: int = 24_000_000

    def check(self) -> None:
        """
        Raises:
          ValueError: a folder is none of a run's or of an evaluation's; names flag and folder.
        """
        for _, folder in self.runs:
            if not is_workdir(folder):
                what = "is no run's folder (no config.json, metrics.jsonl or results.json)"
                raise ValueError(f"--runs: {folder} {what if folder.is_dir() else 'is no folder'}")
        for folder in self.evaluations:
            if not is_evaluation(folder):
                what = "holds no finished evaluation (no MODEL/SUITE/SETTING/settings.json)"
                raise ValueError(f"--evaluations: {folder} {what if folder.is_dir() else 'is no folder'}")


@dataclasses.dataclass(frozen=True)
class Content:
    """`data`: see `gather`; `pictures`: data URIs by name; `problems`: what could not be read."""

    data: Mapping[str, Any]
    pictures: Mapping[str, str]
    problems: Problems


def gather(sources: Sources) -> Content:
    """Read everything. What cannot be read is left out and told under `problems`."""
    names = unique_names(sources.runs)
    folders = [folder for _, folder in sources.runs]
    runs = [read_run(name, folder) for name, folder in zip(names, folders, strict=True)]
    stamps = tuple(stamp for folder in sources.evaluations for stamp in _stamps(folder))
    found = _evaluated(sources.evaluations, stamps, sources.rows, sources.bytes)
    album = Album(max(sources.bytes - sum(map(len, found.pictures.values())), 0))
    shown = [_run(run, album) for run in runs]
    problems = _few([*(line for run in runs for line in run.problems), *found.problems, *album.problems])
    data = {
        "title": sources.title,
        "version": __version__,
        "runs": shown,
        "slots": slots(runs, found.cells),
        "colours": {"light": LIGHT, "dark": DARK},
        "tables": [*found.tables, *report_tables(runs)],
        "curves": curves.curves(runs),
        "skills": curves.skills(runs),
        "galleries": found.galleries,
        "fields": differences(runs),
        "problems": problems,
    }
    return Content(data, {**found.pictures, **album.pictures}, problems)


def _few(problems: Problems) -> Problems:
    """As many as anybody reads."""
    more = len(problems) - MOST_PROBLEMS
    return problems if more <= 0 else [*problems[:MOST_PROBLEMS], f"… and {more} more"]


class _Evaluated(NamedTuple):
    cells: list[Kept]
    tables: list[dict[str, Any]]
    galleries: list[dict[str, Any]]
    pictures: Mapping[str, str]
    problems: Problems


def _stamps(out: Path) -> Iterator[tuple[str, int, int]]:
    """What changes with an evaluation's records, of which all else is made."""
    for path in sorted((*out.glob(f"*/*/*/{SETTINGS_FILE}"), *out.glob(f"*/*/*/{RECORDS_FILE}"))):
        with contextlib.suppress(OSError):
            found = path.stat()
            yield str(path), found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=2)
def _evaluated(folders: tuple[Path, ...], stamps: tuple[Any, ...], rows: int, most: int) -> _Evaluated:
    """`stamps`: so that it is made again where something has changed, and nowhere else: intervals take a while."""
    del stamps
    read = {folder: read_evaluation(folder) for folder in folders}
    cells, album = _distinct({folder: kept for folder, (kept, _) in read.items()}), Album(most)
    with progress("pictures", sum(min(len(each.cell.records), rows) for each in cells), "images") as count:
        shown = galleries(cells, album, rows, count)
    tables, unfit = evaluation_tables([each.cell for each in cells])
    problems = [*(line for _, said in read.values() for line in said), *unfit, *album.problems]
    return _Evaluated(cells, tables, shown, album.pictures, problems)


def _run(run: Run, album: Album) -> dict[str, Any]:
    """What is shown of a run apart from its curves."""
    seconds = sum(run.seconds.values())
    devices = int(sum(run.devices.values())) or 1
    start = {name: run.start[name] for name in ("began", "ended", "commit", "backend") if run.start.get(name)}
    command = run.start.get("command")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "stage": run.stage,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "images": run.images,
        "starts": run.starts,
        "devices": run.devices,
        "hours": seconds / HOUR,
        "device_hours": seconds * devices / HOUR,
        "seconds": run.seconds,
        "rate": _last(run, "time/samples_per_second"),
        "step_seconds": _last(run, "time/step_seconds"),
        "memory": _last(run, "memory/peak_gib") or _last(run, "memory/host_peak_gib"),
        "clock": curves.clock(run),
        "gaps": curves.gaps(run),
        "fixed": curves.fixed_gaps(run),
        "base": run.models.get("base", {}),
        "final": run.models.get(run.own, {}),
        "about": {
            **start,
            **({"command": " ".join(map(str, command))} if isinstance(command, list) else {}),
            **{f"card: {name}": str(value) for name, value in run.card.items()},
        },
        "table": run.table,
        "pictures": {path.stem: name for path in run.pictures if (name := album.add(path, WIDE))},
    }


def _last(run: Run, name: str) -> float | None:
    return curves.points(run.scalars[name])["y"][-1] if name in run.scalars else None


def _distinct(evaluations: Mapping[Path, Sequence[Kept]]) -> list[Kept]:
    """All cells, each once; unequal models of one name are told apart by their folders."""
    names = names_apart({folder: [each.cell for each in kept] for folder, kept in evaluations.items()})
    first: dict[tuple[str, str, str], Kept] = {}
    for folder, kept in evaluations.items():
        for each in kept:
            cell = dataclasses.replace(each.cell, model=names[folder, each.cell.model])
            first.setdefault((cell.model, cell.suite, cell.setting), each._replace(cell=cell))
    return list(first.values())
