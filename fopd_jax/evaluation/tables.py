"""An evaluation's tables as files, which hold no times and are functions of its cells alone.

results.json   everything: values, paired differences with p-values, settings, failures, notes
results.csv    the values, a line each
results.md     tables to read
results.tex    the same for a paper
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from fopd_jax.evaluation.records import Cell, Settings, read_cells
from fopd_jax.evaluation.results import Difference, Results, Value, as_csv, as_json, failures
from fopd_jax.evaluation.typesetting import Entry, Grid, as_latex, as_markdown, with_best
from fopd_jax.files import write_json, write_text

JSON_FILE, CSV_FILE, MARKDOWN_FILE, LATEX_FILE = "results.json", "results.csv", "results.md", "results.tex"
_NAMED = 10
"""Failures of a score that are told one by one in Markdown; `results.json` has all."""
_BEST = "Bold: the best; in brackets: 95% intervals, by bootstrap over prompts."
_FAILED = " *: without scores that failed, see the notes."
_LEADS = (
    "Paired differences, {} minus each model, with 95% intervals, by bootstrap over prompts; p by a two-sided "
    "randomisation test over prompts, corrected by Holm's method for the {} differences of this suite{}."
)


def cells_of(out: Path) -> list[Cell]:
    """Raises ValueError if a folder holds none, or a damaged one."""
    if not (cells := read_cells(out)):
        raise ValueError(f"{out}: found no evaluation, expected MODEL/SUITE/SETTING/settings.json below it")
    return cells


def write_results(folder: Path, results: Results) -> str:
    """Returns the tables as Markdown."""
    grids = list(grids_of(results))
    text = as_markdown(grids, notes_of(results))
    write_json(folder / JSON_FILE, as_json(results))
    write_text(folder / CSV_FILE, as_csv(results.values))
    write_text(folder / MARKDOWN_FILE, text)
    write_text(folder / LATEX_FILE, as_latex(grids))
    return text


def notes_of(results: Results) -> list[str]:
    """What people have to know of the tables: unequal settings that were asked for, failures, what is not there."""
    allowed = [f"compared though unequal in: {', '.join(results.allowed)}"] if results.allowed else []
    found: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for each in failures(results.cells):
        where = tuple(each[name] for name in ("model", "suite", "setting", "score") if each[name])
        found[where].append(f"prompt {each['prompt_id']}, sample {each['sample']}: {each['reason']}")
    failed = [
        f"{', '.join(where)}: {len(images)} failed: {'; '.join(images[:_NAMED])}{' …' * (len(images) > _NAMED)}"
        for where, images in found.items()
    ]
    return [*allowed, *results.notes, *failed]


# ---- layout


def grids_of(results: Results) -> Iterator[Grid]:
    """Suite by suite: of one setting a table of its columns, of several a table a column, which has the settings."""
    for suite in dict.fromkeys(value.suite for value in results.values):
        values = [value for value in results.values if value.suite == suite]
        leads = [lead for lead in results.differences if lead.suite == suite]
        settings = list(dict.fromkeys(value.setting for value in values))
        if len(settings) == 1:
            for table in dict.fromkeys(value.table for value in values):
                own = [value for value in values if value.table == table]
                title = f"{suite}, {table}" if table else suite
                yield from _both(
                    results, title, own, [lead for lead in leads if lead.table == table], "column", settings
                )
        else:
            for column in dict.fromkeys(value.column for value in values):
                own = [value for value in values if value.column == column]
                name = suite if column == suite else f"{suite}: {column}"
                yield from _both(
                    results, name, own, [lead for lead in leads if lead.column == column], "setting", settings
                )


def _both(
    results: Results,
    title: str,
    values: Sequence[Value],
    leads: Sequence[Difference],
    head: str,
    settings: Sequence[str],
) -> Iterator[Grid]:
    """The table of the numbers, and below it the table of the leads."""
    suite = values[0].suite
    heads = list(dict.fromkeys(getattr(value, head) for value in values))
    models = list(dict.fromkeys(value.model for value in values))
    by_place = {(value.model, getattr(value, head)): value for value in values}
    columns = [[_entry(by_place.get((model, name))) for model in models] for name in heads]
    ranked = {getattr(value, head) for value in values if value.ranked}
    columns = [with_best(column) if name in ranked else column for name, column in zip(heads, columns, strict=True)]
    rows = [(model, [column[k] for column in columns]) for k, model in enumerate(models)]
    marked = any(value.failed for value in values)
    caption = f"{spell_cells(results.cells, suite, settings)} {_BEST}{_FAILED if marked else ''}"
    shown = [name or "value" for name in heads]
    yield Grid(title, caption, "model", shown, rows, title)
    if leads:
        by_lead = {(lead.model, getattr(lead, head)): lead for lead in leads}
        others = list(dict.fromkeys(lead.model for lead in leads))
        rows = [(model, [_lead(by_lead.get((model, name))) for name in heads]) for model in others]
        family = sum(lead.suite == suite and lead.setting == leads[0].setting for lead in results.differences)
        where = " at one setting" if len(settings) > 1 else ""
        caption = _LEADS.format(results.against, family, where)
        yield Grid(title, caption, f"{results.against} minus", shown, rows, f"{title} differences")


def _entry(value: Value | None) -> Entry | None:
    return value and Entry(value.value, value.low, value.high, failed=value.failed)


def _lead(lead: Difference | None) -> Entry | None:
    return lead and Entry(lead.value, lead.low, lead.high, failed=lead.left_out, signed=True, p=lead.p_holm)


# ---- captions


def spell_cells(cells: Sequence[Cell], suite: str, settings: Sequence[str]) -> str:
    """How many images a suite has and how they were made: what all cells have in common, then what they have not."""
    found = [cell for cell in cells if cell.suite == suite] or list(cells)  # the average is of several suites
    found = [cell for cell in found if cell.setting in settings]
    parts = [[spell_size(cell), *spell_settings(cell.settings)] for cell in found]
    common = [part for part in parts[0] if all(part in each for each in parts)]
    rest: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell, each in zip(found, parts, strict=True):
        text = ", ".join(part for part in each if part not in common)
        rest.setdefault((cell.suite, cell.setting), {}).setdefault(text, []).append(cell.model)
    several = len({place[0] for place in rest}) > 1, len({place[1] for place in rest}) > 1
    said = [", ".join(common)] if common else []
    for place, texts in rest.items():
        names = [name for name, is_told in zip(place, several, strict=True) if is_told]
        for text, models in texts.items():
            label = [*names, *(models if len(texts) > 1 else ())]
            said += [f"{', '.join(label)}: {text}"] if text else []
    return "; ".join(said) + "."


def spell_size(cell: Cell) -> str:
    """`553 prompts × 4 samples`, or where prompts have not as many each, how many images."""
    counts = collections.Counter(record.prompt_id for record in cell.records)
    if len({*counts.values()}) == 1:
        each = next(iter(counts.values()))
        return f"{len(counts)} prompts × {each} sample{'s' * (each != 1)}"
    return f"{len(counts)} prompts, {len(cell.records)} images"


def spell_settings(settings: Settings) -> list[str]:
    """All that images depend on beside their prompts, in words; of pictures made elsewhere what is known."""
    given = settings.sampler == "given"
    parts = {
        "sampler": "images made elsewhere" if given else f"sampler {settings.sampler}",
        "noise_level": f"noise level {settings.noise_level:g}" if settings.noise_level else "",
        "steps": f"{settings.steps} steps",
        "guidance": f"guidance {settings.guidance:g}",
        "resolution": f"{settings.resolution} px",
        "shift": f"shift {settings.shift:g}",
        "seed": f"seed {settings.seed}",
        "rewritten": "prompts rewritten" if settings.rewritten else "",
    }
    known = dataclasses.asdict(settings)
    return [text for name, text in parts.items() if text and (known[name] or not given)]
