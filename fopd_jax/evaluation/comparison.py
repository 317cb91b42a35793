"""Which cells of an evaluation may be compared, and how: image by image, of the same prompt and sample.

The settings that images are made at move scores more than most methods do: guidance 1 or 4.5 alone takes SD3.5-Medium
from 8 to 22 on GenEval 2. So cells that are unequal in anything are refused by name, unless that is asked for.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.evaluation.records import Cell, Record, Settings
from fopd_jax.evaluation.statistics import Sums

CHOICES: tuple[str, ...] = ("prompts", "samples", *(field.name for field in dataclasses.fields(Settings)))
"""What two cells of a suite can be unequal in."""
OWN_GUIDANCE = "guidance own"
"""In the name of a setting at which each model has the scale that it is for: there scales may be unequal."""
Key = tuple[str, str, int]
"""Of an image: its pool of prompts (the suite's name, as a rule), prompt and sample."""


# ---- what may be compared


def check_choices(allowed: Collection[str], field: str = "allow_unequal") -> None:
    """Raises ValueError for a name that is none of `CHOICES`."""
    for name in allowed:
        if name not in CHOICES:
            raise ValueError(f"{field}: found {name!r}, expected some of {', '.join(CHOICES)}")


def check_comparable(one: Cell, other: Cell, allowed: Collection[str] = ()) -> None:
    """Refuse to compare two models' cells that are unequal in more than `allowed` names.

    Raises:
      ValueError: they are; names the cells, and each field with both values.
    """
    if one.suite != other.suite:
        raise ValueError(f"{_place(one)} and {_place(other)}: found suites {one.suite} and {other.suite}, expected one")
    unequal = {name: said for name, said in differences(one, other).items() if name not in allowed}
    if unequal:
        said = "; ".join(f"{name}: found {what}" for name, what in unequal.items())
        raise ValueError(
            f"{_place(one)} and {_place(other)} are not comparable: {said}, expected equal ones, "
            f"or --allow-unequal={','.join((*allowed, *unequal))}"
        )


def differences(one: Cell, other: Cell) -> dict[str, str]:
    """In what two cells are unequal, by the names of `CHOICES`; values of both in words."""
    prompts, others = _prompts(one), _prompts(other)
    found = {}
    texts = [{name: text for name, (text, _) in each.items()} for each in (prompts, others)]
    if texts[0] != texts[1]:
        wrong = next(name for name in sorted({*prompts, *others}) if texts[0].get(name) != texts[1].get(name))
        first, second = (_shown(each.get(wrong)) for each in texts)
        found["prompts"] = f"{len(prompts)} and {len(others)} prompts, {wrong!r} being {first} and {second}"
    for name in (name for name in prompts if name in others):
        if prompts[name][1] != others[name][1]:
            counts = len(prompts[name][1]), len(others[name][1])
            found["samples"] = f"{counts[0]} and {counts[1]} of prompt {name!r}, or of other numbers"
            break
    values = [dataclasses.asdict(each.settings) for each in (one, other)]
    asked = {"guidance"} if OWN_GUIDANCE in one.setting and OWN_GUIDANCE in other.setting else set()
    unequal = (name for name in values[0] if values[0][name] != values[1][name] and name not in asked)
    return {**found, **{name: f"{_plain(values[0][name])} and {_plain(values[1][name])}" for name in unequal}}


def by_image(cell: Cell) -> dict[tuple[str, int], Record]:
    """A cell's records by prompt and sample, in the order of these: the files' order means nothing.

    Raises:
      ValueError: an image is there twice, or a score is not finite; names the cell and the image.
    """
    found: dict[tuple[str, int], Record] = {}
    for record in cell.records:
        key = record.prompt_id, record.sample
        if key in found:
            raise ValueError(f"{_place(cell)}: sample {record.sample} of prompt {record.prompt_id!r} is there twice")
        for name, value in record.scores.items():
            if not math.isfinite(value):
                raise ValueError(f"{_place(cell)}: {name} of sample {key[1]} of prompt {key[0]!r}: found {value}")
        found[key] = record
    return {key: found[key] for key in sorted(found)}


def gathered(folders: Mapping[Path, Sequence[Cell]]) -> list[Cell]:
    """The cells of several evaluations, each once. Models of one name that are unequal where they meet are told apart
    by folders.
    """
    names = names_apart(folders)
    found: dict[tuple[str, str, str], Cell] = {}
    for folder, cells in folders.items():
        for cell in cells:
            model = names[folder, cell.model]
            found.setdefault((model, cell.suite, cell.setting), dataclasses.replace(cell, model=model))
    return list(found.values())


def names_apart(folders: Mapping[Path, Sequence[Cell]]) -> dict[tuple[Path, str], str]:
    """By folder and name of a model the name that no unequal one has: its own, or with the folder's before it."""
    seen: dict[tuple[str, str, str], Cell] = {}
    apart: set[str] = set()
    for cell in (cell for cells in folders.values() for cell in cells):
        first = seen.setdefault((cell.model, cell.suite, cell.setting), cell)
        if (first.settings, _sorted(first)) != (cell.settings, _sorted(cell)):
            apart.add(cell.model)
    short = _short(list(folders))
    return {
        (folder, cell.model): f"{short[folder]}/{cell.model}" if cell.model in apart else cell.model
        for folder, cells in folders.items()
        for cell in cells
    }


def _sorted(cell: Cell) -> list[Record]:
    return sorted(cell.records, key=lambda record: (record.prompt_id, record.sample))


def _short(folders: Sequence[Path]) -> dict[Path, str]:
    """Names of folders, or where two are equal, their paths."""
    names = [folder.resolve().name for folder in folders]
    return {
        folder: name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names, strict=True)
    }


def _prompts(cell: Cell) -> dict[str, tuple[str, set[int]]]:
    """By their names the texts of prompts, and which samples there are."""
    found: dict[str, tuple[str, set[int]]] = {}
    for record in cell.records:
        found.setdefault(record.prompt_id, (record.prompt, set()))[1].add(record.sample)
    return found


def _place(cell: Cell) -> str:
    return ", ".join(part for part in (cell.model, cell.suite, cell.setting) if part)


def _shown(text: str | None) -> str:
    return "none" if text is None else repr(text if len(text) <= 60 else f"{text[:60]}…")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- what is compared


@dataclasses.dataclass(frozen=True)
class Part:
    """One mean of a column: over images, or `by_prompt`, over the means of prompts.

    `failed`: why images have no value. `weight`: of the mean in the column.
    """

    values: Mapping[Key, float]
    failed: Mapping[Key, str] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    by_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of a model on a suite: the weighted sum of its parts. `table`: which of the suite's it stands in.

    `ranked`: whether larger is better. `note`: what has to be known of it.
    """

    name: str
    parts: Mapping[str, Part]
    table: str = ""
    ranked: bool = True
    note: str = ""

    @property
    def count(self) -> int:
        """How many values it rests on."""
        return sum(len(part.values) for part in self.parts.values())

    @property
    def failed(self) -> int:
        return sum(len(part.failed) for part in self.parts.values())


def paired(one: Column, other: Column) -> Column | None:
    """The same column of differences, one model's minus another's, of images that both have a value of.

    An image that failed in either is in `failed`. None where the two are not made of the same parts.
    """
    if one.parts.keys() != other.parts.keys():
        return None
    parts = {name: _paired(part, other.parts[name]) for name, part in one.parts.items()}
    return dataclasses.replace(one, parts=parts)


def _paired(one: Part, other: Part) -> Part:
    both = {key: value - other.values[key] for key, value in one.values.items() if key in other.values}
    there = [{**each.values, **each.failed}.keys() for each in (one, other)]
    failed = {key: reason for key, reason in (*other.failed.items(), *one.failed.items()) if _in_all(key, there)}
    return dataclasses.replace(one, values=both, failed=failed)


def _in_all(key: Key, sets: Iterable[Collection[Key]]) -> bool:
    return all(key in each for each in sets)


def sums_of(column: Column) -> Sums | None:
    """What statistics are made of, a row a prompt; None where there is no value.

    Prompts are drawn among those that take part in the same parts: tags, suites.
    """
    parts = list(column.parts.values())
    prompts: dict[tuple[str, str], list[dict[int, float]]] = {}
    taking: dict[tuple[str, str], set[int]] = {}
    for place, part in enumerate(parts):
        for (pool, prompt, sample), value in part.values.items():
            prompts.setdefault((pool, prompt), [{} for _ in parts])[place][sample] = value
        for pool, prompt, _ in (*part.values, *part.failed):
            taking.setdefault((pool, prompt), set()).add(place)
    if not prompts:
        return None
    names = sorted(prompts)
    sums, counts = np.zeros((len(names), len(parts))), np.zeros((len(names), len(parts)))
    for row, name in enumerate(names):
        for place, (part, values) in enumerate(zip(parts, prompts[name], strict=True)):
            if values:
                total = math.fsum(values.values())  # the same in any order
                sums[row, place], counts[row, place] = (
                    (total / len(values), 1) if part.by_prompt else (total, len(values))
                )
    kinds = [tuple(sorted(taking[name])) for name in names]
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    weights = np.array([part.weight for part in parts])
    return Sums(sums, counts, weights, np.array([numbers[kind] for kind in kinds]))
