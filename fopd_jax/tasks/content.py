"""What a file of prompts is: which of the known forms, or another one, which would train on its own syntax."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from fopd_jax.tasks.tables import header_mark

Form = Literal["lines", "records", "list", ",", "\t"]
"""One prompt a line, a JSON record a line, one JSON list, or a table by what separates its columns."""

MAGIC: Mapping[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"\xff\xfe\x00\x00": "UTF-32 text; save it as UTF-8", b"\x00\x00\xfe\xff": "UTF-32 text; save it as UTF-8",
    b"\xff\xfe": "UTF-16 text (not utf-8); save it as UTF-8", b"\xfe\xff": "UTF-16 text (not utf-8); save it as UTF-8",
    b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive inside of one", b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive", b"\x28\xb5\x2f\xfd": "a zstd archive", b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table", b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document", b"SQLite format 3\x00": "an SQLite database",
}  # fmt: skip
COLUMNS = {"prompt", "prompts", "caption", "captions", "text", "texts"}
_FIRST = 4096  # bytes that tell what a file is


def form_of(text: str, suffix: str) -> Form:
    """How a file's prompts are written, by its content; `suffix`, of its name, decides where that is damaged."""
    lines = [line for line in text.split("\n") if line.strip()]
    start = text.lstrip()[:1]
    whole = _kind(text) if start in ("[", "{") else None
    if start == "[" and (suffix == ".json" or (isinstance(whole, list) and not _all_lists(lines))):
        return "list"
    records = sum(line.lstrip().startswith(('{"', '{ "')) for line in lines)
    if suffix in (".jsonl", ".ndjson") or (2 * records > len(lines) and (whole is None or len(lines) == 1)):
        return "records"
    if suffix == ".csv":
        return "," if header_mark(text, sure=True) == "," else "lines"
    mark = header_mark(text, sure=suffix == ".tsv")
    return "," if mark == "," else "\t" if mark else "lines"


def _all_lists(lines: Sequence[str]) -> bool:
    """Whether each of several lines is a list of its own, in which nothing says what is the prompt."""
    return len(lines) > 1 and all(isinstance(_kind(line), list) for line in lines)


def other_format(data: bytes) -> str:
    """What the bytes of a file look like that are no text; empty: nothing else."""
    for magic, what in MAGIC.items():
        if data.startswith(magic):
            return what
    first = data[:_FIRST]
    if first[1::2].count(0) > len(first) // 4 or first[::2].count(0) > len(first) // 4:
        return "UTF-16 text or a binary file; save it as UTF-8"
    if first.count(0) > len(first) // 100:
        return "a binary file"
    return ""


def other_syntax(text: str) -> str:
    """What a text looks like that is not of one prompt a line, naming the line where there is one; empty: it is."""
    start = text.lstrip()[:_FIRST].lower()
    if re.match(r"<(!doctype\b|html\b|\?xml\b|head\b|body\b)", start):
        return "a web page or XML"
    if (tag := re.match(r"<(\w+)[^<>]*>", text.lstrip())) and text.rstrip().endswith(f"</{tag[1]}>"):
        return "XML"
    if start[:1] in ("[", "{") and _kind(text) is not None:
        return "one JSON value (a list or an object)" if "\n" in text.strip() else _lines_of_json(text)
    if _is_python(text.strip()):
        return "a list as Python writes it"
    lines = text.strip().split("\n")
    return _lines_of_json(text) or _table(lines[:2]) or _markup(lines) or _pairs(lines)


def _is_python(text: str) -> bool:
    """Whether a text is one Python list, tuple, set or dict with a text in it."""
    if not re.fullmatch(r"[\[({]\s*[\"'].*[\])}]", text, re.DOTALL):
        return False
    try:
        return isinstance(ast.literal_eval(text), list | tuple | set | dict)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False


def _markup(lines: Sequence[str]) -> str:
    """What every line says that belongs to a list's or a table's syntax; the first one may be a heading."""
    if len(lines) > 2 and all(re.match(r"\w+ *= *[\"'\[]|\[[\w.]+\]$", line) for line in lines):
        return "TOML or INI: every line is a name and its value"
    rows = lines[1:] if re.match(r"#|\w+:$", lines[0]) else lines
    for mark, what in ((r"- |\* |• ", "a list (Markdown or YAML)"), (r"\d+[.)] ", "a numbered list")):
        if len(rows) > 1 and all(re.match(mark, line) for line in rows):
            return f"{what}: every line begins like {rows[0].split()[0]!r}; keep what follows"
    return ""


def _lines_of_json(text: str) -> str:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line[:1] not in ("{", "[") or (found := _kind(line)) is None:
            continue
        fields = sorted(map(str, found)) if isinstance(found, dict) else []
        what = f"a JSON object with {', '.join(fields[:6])}" if fields else "a JSON value"
        return f"JSON among other lines: line {number} is {what}"
    return ""


def _kind(text: str) -> dict[str, object] | list[object] | None:
    """A text's JSON value, if it is an object or a list."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def _table(lines: Sequence[str]) -> str:
    """A table is told by its header: names alone, one of which means prompts, over a row with as many marks."""
    for mark, name, word in (("\t", "TSV", r"[\w -]+"), (",", "CSV", r"[\w-]+"), (";", "CSV", r"[\w-]+")):
        cells = [cell.strip("\"'").lower() for cell in lines[0].split(mark)]
        names = COLUMNS & set(cells) and all(re.fullmatch(word, cell) for cell in cells)
        if names and 1 < len(cells) <= lines[-1].count(mark) + 1 and len(lines) > 1:
            how = "separate columns by commas" if mark == ";" else "call the column of prompts 'prompt'"
            return f"a table ({name}) with the columns {', '.join(cells)}; {how}"
    if len(lines) > 1 and lines[0].strip().strip("\"'").lower() in COLUMNS:
        return f"a table with the one column {lines[0].strip()!r}; remove that line"
    return ""


def _pairs(lines: Sequence[str]) -> str:
    """T2I-CompBench's new_objects.txt and its like."""
    pairs = [re.fullmatch(r"(\w+(?: \w+)?) - (\w+(?: \w+)?)", line.strip()) for line in lines if line.strip()]
    if len(pairs) > 1 and all(pairs):
        return f"pairs of words (singular - plural): every line is like {lines[0].strip()!r}"
    return ""
