"""Tables as prompts: CSV (DrawBench, UniGenBench, OneIG-Bench) and TSV (PartiPrompts), told by their header.

The prompts stand in the first column of that name; the other columns are their metadata, under their names in the
header; one without a name numbers the rows and is left out. In CSV a cell may be quoted, hold line breaks, or be an
object or a list, as JSON or as Python writes it; in TSV quotes are text. All other cells are texts: "007" stays.
"""

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from fopd_jax.tasks.prompt_set import Row

PROMPTS = ("prompt", "prompts", "prompt_en")
"""Names of the column of prompts, in any case."""
_MARKS = {"\t": r"[\w &-]*", ",": r"[\w-]*"}  # what a column's name is made of


def header_mark(text: str, sure: bool) -> str:
    """What separates the columns of a table of prompts; empty: the text is none.

    A header is a line of names alone, one of which means prompts; `sure`: the file's name says that it is a table,
    otherwise the line after it has to have as many columns.
    """
    first, _, rest = text.lstrip("\n").partition("\n")
    second = rest.lstrip("\n").partition("\n")[0]
    for mark, name in _MARKS.items():
        cells = [cell.strip("\"'") for cell in first.split(mark)]
        named = all(re.fullmatch(name, cell) for cell in cells) and {cell.lower() for cell in cells} & set(PROMPTS)
        if named and len(cells) > 1 and rest.strip() and (sure or len(cells) <= second.count(mark) + 1):
            return mark
    return ""


def read_table(text: str, mark: str, place: str) -> tuple[list[Row], int]:
    """The rows below the header, and how many blank lines there were between them.

    Raises:
      ValueError: a row has another number of cells, a quote is not closed, columns share a name, or a cell is none of
        what its column holds; names the line where the row begins.
    """
    lines = _quoted(text, place) if mark == "," else _plain(text, mark)
    filled = [(number, cells) for number, cells in lines if cells]
    names = [name.strip() for name in filled[0][1]]
    if twice := sorted(name for name in set(names) - {""} if names.count(name) > 1):
        raise ValueError(f"{place}, line {filled[0][0]}: two columns are called {twice[0]!r}, expected different names")
    for number, cells in filled[1:]:
        if len(cells) != len(names):
            what = f"found {len(cells)} cells, expected {len(names)}, those of the header ({', '.join(names)})"
            raise ValueError(f"{place}, line {number}: {what}")
    lowered = [name.lower() for name in names]
    prompts = lowered.index(next(name for name in PROMPTS if name in lowered))
    places = [number for number, _ in filled[1:]]
    beside = {
        name: _column([cells[k] for _, cells in filled[1:]], places, f"column {name!r}", place)
        for k, name in enumerate(names)
        if k != prompts and name
    }
    rows = [
        Row(number, cells[prompts], {name: column[i] for name, column in beside.items()})
        for i, (number, cells) in enumerate(filled[1:])
    ]
    return rows, len(lines) - len(filled)


def _plain(text: str, mark: str) -> list[tuple[int, list[str]]]:
    lines = text.rstrip("\n").split("\n")
    return [(number, line.split(mark) if line.strip() else []) for number, line in enumerate(lines, start=1)]


def _quoted(text: str, place: str) -> list[tuple[int, list[str]]]:
    return list(_csv_rows(text.rstrip("\n"), place))


def _csv_rows(text: str, place: str) -> Iterator[tuple[int, list[str]]]:
    """Each row's first line and its cells; none of a blank line."""
    reader, first = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{place}, line {first}: no row of CSV ({error})") from error
        yield first, [] if all(not cell.strip() for cell in cells) else cells
        first = reader.line_num + 1


def _column(cells: list[str], places: list[int], name: str, place: str) -> list[Any]:
    """A column's cells: objects and lists where every one of them begins like one, else texts."""
    if not cells or not all(cell.lstrip()[:1] in ("[", "{") and cell.lstrip() for cell in cells):
        return list(cells)
    return [_structured(cell, f"{place}, line {number}: {name}") for cell, number in zip(cells, places, strict=True)]


def _structured(cell: str, place: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return json.loads(json.dumps(read(cell.strip()), allow_nan=False))  # nothing but JSON, whichever wrote it
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise ValueError(f"{place}: found {cell[:60]!r}, expected an object or a list as in the other rows")
