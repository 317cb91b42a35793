"""Where a task's prompts come from: `tasks.NAME.prompts` and `.test` in words.

  FILE                       of any form that `tasks.reading` knows, gzipped or not
  geneval:train?count=50000&seed=0   a set that is generated (`GENERATORS`); count and seed may be left out
  FOLDER                     a set that `python -m fopd_jax.tasks build` made (`tasks.builders`): its split `train` for
                             training, `test` for what is held out
  …#COLUMN=VALUE             of any of these the rows whose metadata say so: one set, several tasks
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fopd_jax.exits import naming
from fopd_jax.parallel.distributed import warn
from fopd_jax.tasks.builders import is_built, read_built
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.reading import read_file

GENERATORS: Mapping[str, str] = {"geneval": "fopd_jax.tasks.geneval", "ocr": "fopd_jax.tasks.ocr"}
"""Modules with `generate(split, count, seed) → (texts, metadata)`; `count` None: as many as the set has."""
_MOST_ROWS = 10**7
_SHOWN = 12  # values of a column in a message


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source names: `path`, or a set of `generator` with its split and parameters; rows by `column`."""

    name: str
    path: Path | None = None
    generator: str = ""
    split: str = ""
    count: int | None = None
    seed: int = 0
    column: str = ""
    value: str = ""


def parse_source(text: str, field: str) -> Source:
    """A source from its words; the path of a file that is there means that file, whatever signs are in it.

    Raises:
      ValueError: a generated set is unknown or has unknown parameters; names the field.
    """
    if _exists(text):
        return Source(text, Path(text))
    name, selector = text, None
    if found := re.fullmatch(r"(.*)#([^=#]+)=([^#]*)", text, re.DOTALL):
        name, *selector = found.groups()
    column, value = (each.strip() for each in selector or ("", ""))
    generated = re.fullmatch(r"(\w+):(\w+)(?:\?(.*))?", name)
    if generated is None or _exists(name):
        return Source(name, Path(name), column=column, value=value)
    generator, split, parameters = generated.groups()
    if generator not in GENERATORS:
        known = " and ".join(f"{each}:train" for each in GENERATORS)
        raise ValueError(f"{field}: found {name!r}, expected a file, or a generated set such as {known}")
    return Source(name, None, generator, split, **_parameters(parameters or "", field), column=column, value=value)


def file_of(text: str) -> Path | None:
    """The file or folder that a source reads; None of a set that is generated.

    Raises:
      ValueError: as `parse_source`.
    """
    return parse_source(text, "prompts").path


def read_set(text: str, field: str, split: str = "train") -> PromptSet:
    """The prompts of one source; `split`: of folders.

    Raises:
      ValueError: as `read_sets`.
    """
    return read_sets({field: (text, split)})[field]


def read_sets(sources: Mapping[str, tuple[str, str]]) -> dict[str, PromptSet]:
    """The prompts of several sources, by field `(source, split)`; each file is read, and told of, once.

    Rows of a set of which only parts are asked for, and which no part holds, are counted and told.

    Raises:
      ValueError: as `parse_source`, `reading.read_file` and `builders.read_built`; a selector's column is not there,
        or no row has its value; names the field.
    """
    wholes: dict[tuple[str, str], PromptSet] = {}
    chosen: dict[tuple[str, str], dict[str, list[bool]]] = {}
    found = {}
    for field, (text, split) in sources.items():
        source = parse_source(text, field)
        key = source.name, split if source.path is not None and is_built(source.path) else ""
        if key not in wholes:
            wholes[key] = _read(source, field, split)
        mask = _selected(wholes[key], source, field)
        chosen.setdefault(key, {})[field] = mask
        found[field] = wholes[key] if all(mask) else _part(wholes[key], mask)
    for (name, _), masks in chosen.items():
        left = sum(not any(row) for row in zip(*masks.values(), strict=True))
        if left:
            warn(f"{', '.join(masks)}: {left} of {len(next(iter(masks.values())))} rows of {name} are of no task")
    return found


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _parameters(text: str, field: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in filter(None, text.split("&")):
        name, _, value = each.partition("=")
        if name not in ("count", "seed"):
            raise ValueError(f"{field}: found the parameter {name!r}, expected count or seed")
        if not value.isascii() or not value.isdecimal() or not (name == "seed" or 0 < int(value) <= _MOST_ROWS):
            what = "a whole number from 0" if name == "seed" else f"a whole number from 1 to {_MOST_ROWS}"
            raise ValueError(f"{field}: found {name}={value}, expected {what}")
        found[name] = int(value)
    return found


def _read(source: Source, field: str, split: str) -> PromptSet:
    if source.path is None:
        with naming(field):
            module = importlib.import_module(GENERATORS[source.generator])
            texts, metadata = module.generate(source.split, source.count, source.seed)
        return PromptSet(tuple(texts), tuple(metadata), f"generated, {source.name}")
    if is_built(source.path):
        return read_built(source.path, split, field)
    return read_file(source.path, field)


# ---- rows by a column


def _selected(prompts: PromptSet, source: Source, field: str) -> list[bool]:
    if not source.column:
        return [True] * len(prompts)
    columns = {name for each in prompts.beside() for name in each}
    if source.column not in columns:
        there = f"those of {source.name} are {', '.join(sorted(columns))}" if columns else f"{source.name} has none"
        raise ValueError(f"{field}: no column {source.column!r}; {there}")
    values = [_words(each.get(source.column)) for each in prompts.beside()]
    if source.value not in values:
        counts = {value: values.count(value) for value in sorted(set(values))[:_SHOWN]}
        there = ", ".join(f"{value!r} ({count})" for value, count in counts.items())
        raise ValueError(f"{field}: no row of {source.name} has {source.column}={source.value}; there are {there}")
    return [value == source.value for value in values]


def _words(value: Any) -> str:
    """A column's value as it is written in a selector."""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _part(prompts: PromptSet, mask: list[bool]) -> PromptSet:
    def kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value for value, stays in zip(values, mask, strict=True) if stays)

    return dataclasses.replace(
        prompts, texts=kept(prompts.texts), metadata=kept(prompts.metadata) if prompts.metadata else ()
    )
