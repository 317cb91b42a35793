"""The same prompt and noise side by side: a gallery of each suite and setting, no larger than it may be."""

from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.console import Progress
from fopd_jax.evaluation.records import Record
from fopd_jax.reporting.evaluations import Kept, Key, skills_of
from fopd_jax.reporting.pictures import Album
from fopd_jax.reporting.reading import distinct

LONGEST_PROMPT = 600


def galleries(cells: Sequence[Kept], album: Album, most: int, count: Progress = lambda n: None) -> list[dict[str, Any]]:
    """`most`: rows of each; the rest is told, by number and by how rows were chosen. `count`: told of images."""
    kinds = distinct((each.cell.suite, each.cell.setting) for each in cells)
    found = []
    for suite, setting in kinds:
        own = [each for each in cells if (each.cell.suite, each.cell.setting) == (suite, setting)]
        found.append({"suite": suite, "setting": setting, **_gallery(own, album, most, count)})
    return found


def _gallery(cells: Sequence[Kept], album: Album, most: int, count: Progress) -> dict[str, Any]:
    by_model = {each.cell.model: (each, each.by_key) for each in cells}
    keys = distinct(key for _, records in by_model.values() for key in records)
    skills = skills_of(cells)
    chosen = choose(keys, {model: records for model, (_, records) in by_model.items()}, skills, most)
    full = album.full
    rows = []
    for key in chosen:
        rows.append(_row(key, by_model, album))
        count(len(rows[-1]["models"]))
    note = [f"{len(chosen)} of {len(keys)} rows are shown: half of them those on which models differ most, the others "
            "spread evenly"] if len(chosen) < len(keys) else []  # fmt: skip
    if album.full > full:
        note.append(f"{album.full - full} images did not fit into the page's limit and are left out")
    return {"skills": skills, "models": list(by_model), "rows": rows, "total": len(keys), "note": "; ".join(note)}


def choose(
    keys: Sequence[Key], by_model: Mapping[str, Mapping[Key, Record]], skills: Sequence[str], most: int
) -> list[Key]:
    """In their order: all, or half of `most` by the largest difference of any score between any two models, in units of
    that score's largest one, and the others evenly from the rest.
    """
    if len(keys) <= most:
        return list(keys)
    spreads = {key: {s: _spread([m[key] for m in by_model.values() if key in m], s) for s in skills} for key in keys}
    largest = {skill: max(each[skill] for each in spreads.values()) or 1.0 for skill in skills}
    differ = {key: max((each[s] / largest[s] for s in skills), default=0.0) for key, each in spreads.items()}
    first = sorted(keys, key=lambda key: -differ[key])[: most // 2]
    rest = [key for key in keys if key not in set(first)]
    left = most - len(first)
    return [key for key in keys if key in {*first, *(rest[k * len(rest) // left] for k in range(left))}]


def _spread(records: Sequence[Record], skill: str) -> float:
    values = [record.scores[skill] for record in records if skill in record.scores]
    return max(values) - min(values) if values else 0.0


def _row(key: Key, by_model: Mapping[str, tuple[Kept, Mapping[Key, Record]]], album: Album) -> dict[str, Any]:
    found = {model: (kept, records[key]) for model, (kept, records) in by_model.items() if key in records}
    _, first = next(iter(found.values()))
    shown = {}
    for model, (kept, record) in found.items():
        path = kept.image(record)
        shown[model] = {
            "image": album.add(path) if path else "",
            "scores": {name: float(f"{value:.6g}") for name, value in record.scores.items()},
            **({"failed": {name: why[:200] for name, why in record.failed.items()}} if record.failed else {}),
        }
    tags = {name: str(value)[:80] for name, value in first.tags.items() if isinstance(value, str | int | float)}
    prompt = first.prompt if len(first.prompt) <= LONGEST_PROMPT else first.prompt[:LONGEST_PROMPT] + " …"
    return {"id": key[0], "sample": key[1], "prompt": prompt, "tags": tags, "models": shown}
