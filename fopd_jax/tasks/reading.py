"""Files of prompts, of any known form, gzipped or not; which form it is, the content tells (`tasks.content`).

What a file's maker left in it is evened out and told in one line a file: blank lines, spaces at the edges of prompts,
repeats (which stay). Line ends, byte order marks and a missing last newline make no difference. What is damaged or
unknown is refused, with its line.
"""

import codecs
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

from fopd_jax.exits import GUIDE
from fopd_jax.parallel.distributed import warn
from fopd_jax.reading import read_regular
from fopd_jax.tasks.content import form_of, other_format, other_syntax
from fopd_jax.tasks.prompt_set import PromptSet, Row
from fopd_jax.tasks.records import read_list, read_records
from fopd_jax.tasks.tables import PROMPTS, read_table

EXPECTED = "a text of one prompt a line, JSON lines or a table"
MOST_BYTES = 2**28
"""Of a gzipped file's content: larger than any list of prompts, smaller than a host."""
_GZIP = b"\x1f\x8b"
_FORMS = {"lines": "one prompt a line", "records": "JSON lines", "list": "a JSON list", ",": "CSV", "\t": "TSV"}
_HEADLESS = f"a table whose first line names no column {' or '.join(PROMPTS)}"
_SURROGATE = re.compile("[\ud800-\udfff]")
_DOUBTFUL = {
    "hold control characters": re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]"),  # but tabs and, in quotes, line breaks
    "begin with '# ', which is read as part of the prompt": re.compile(r"\A# "),
    "hold U+FFFD, which stands for what another program could not decode": re.compile("\ufffd"),
    "hold byte order marks or marks of direction, which are not seen": re.compile("[\ufeff\u202a-\u202e\u2066-\u2069]"),
}
"""Of prompts that are kept: what may be wrong with them."""


def read_file(path: Path, field: str) -> PromptSet:
    """The prompts of a file, in its order, with what stands beside each; what is doubtful about them is told.

    Raises:
      ValueError: the file is missing, not UTF-8, empty, of an unknown form, or damaged; a prompt is blank or holds a
        NUL character; names the config's field, the file and, where there is one, the line and key.
    """
    data, place = _read(path, field), f"{field}: {path}"
    text = _decoded(data, path, field)
    if not text.strip():
        raise ValueError(f"{place} is empty, expected one prompt a line")
    quirks = ["a byte order mark"] if data.startswith(codecs.BOM_UTF8) else []
    quirks += ["CR LF line ends"] if "\r\n" in text else []
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    quirks += [] if text.endswith("\n") else ["no newline at the end"]
    form = form_of(text, _suffix(path))
    lines = text.rstrip().split("\n")  # not at the separators that occur inside prompts
    if form == "list":
        rows, blank = read_list(text, place), 0
    elif form == "records":
        rows, blank = read_records(lines, place), sum(not line.strip() for line in lines)
    elif form == "lines":
        if what := other_syntax(text) or _HEADLESS * (_suffix(path) in (".csv", ".tsv")):
            raise ValueError(f"{place} looks like {what}; expected {EXPECTED}")
        rows = [Row(number, line, {}) for number, line in enumerate(lines, start=1) if _seen(line)]
        blank = len(lines) - len(rows)
    else:
        rows, blank = read_table(text, form, place)
    return _checked(rows, blank, _FORMS[form], quirks, place)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read(path: Path, field: str) -> bytes:
    try:
        data = read_regular(path)
    except OSError as error:
        raise ValueError(_unreadable(path, field, error.strerror)) from error
    if data.startswith(_GZIP):
        data = _unzipped(data, f"{field}: {path}")
    if what := other_format(data):
        raise ValueError(f"{field}: {path} looks like {what}; expected {EXPECTED}")
    return data


def _unzipped(data: bytes, place: str) -> bytes:
    found = b""
    while data:  # a file may hold several members
        member = zlib.decompressobj(wbits=31)
        try:
            found += member.decompress(data, MOST_BYTES + 1 - len(found))
        except zlib.error as error:
            raise ValueError(f"{place} is a damaged gzip archive ({error})") from error
        if len(found) > MOST_BYTES:
            raise ValueError(f"{place} holds over {MOST_BYTES >> 20} MiB when unzipped, expected a list of prompts")
        if not member.eof:
            raise ValueError(f"{place} is a damaged gzip archive (it ends too early)")
        data = member.unused_data.lstrip(b"\0")  # padding
    return found


def _decoded(data: bytes, path: Path, field: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(_unreadable(path, field, f"line {line}: {error}")) from error


def _unreadable(path: Path, field: str, reason: object) -> str:
    return f"{field}: cannot read {str(path)!r} ({reason}); expected {EXPECTED}, see {GUIDE}"


# ---- prompts, whatever they were read from


def _checked(rows: Sequence[Row], blank: int, form: str, quirks: list[str], place: str) -> PromptSet:
    """Refuse prompts that are blank or no text, tell of what was evened out and of what may be wrong with others."""
    what = "entry" if form == _FORMS["list"] else "line"
    if not rows:
        raise ValueError(f"{place} holds no prompts ({form})")
    for row in rows:
        if problem := _problem(row.prompt):
            raise ValueError(f"{place}, {what} {row.place} {problem}")
    edged = sum(row.prompt != row.prompt.strip() for row in rows)
    evened = [f"{_count(blank, 'blank line')} left out"] if blank else []
    evened += [f"{_count(edged, 'prompt')} had spaces at an edge"] if edged else []
    metadata = tuple(row.metadata for row in rows)
    form = "GenEval's metadata" if all("include" in each for each in metadata) else form
    texts = tuple(row.prompt.strip() for row in rows)
    found = PromptSet(texts, metadata if any(metadata) else (), form, (*quirks, *evened))
    told = evened + ([f"{found.repeats} repeat an earlier one and stay"] if found.repeats else [])
    if told:
        warn(f"{place}: {_count(len(found), 'prompt')}; {'; '.join(told)}")
    _tell(rows, what, place)
    return found


def _problem(prompt: str) -> str:
    if "\0" in prompt:
        return "holds a NUL character, expected text"
    if not _seen(prompt):
        return "is blank, expected a prompt"
    if _SURROGATE.search(prompt):
        return "holds half of a surrogate pair, which is no character"
    return ""


def _tell(rows: Sequence[Row], what: str, place: str) -> None:
    """Tell of control characters, and of what may be syntax or wrongly decoded."""
    for name, pattern in _DOUBTFUL.items():
        if found := [row.place for row in rows if pattern.search(row.prompt.strip())]:
            warn(f"{place}: {len(found)} of {len(rows)} prompts {name}, the first in {what} {found[0]}")


def _seen(text: str) -> bool:
    """Whether there is anything to see; NUL is something, to be refused by its name."""
    return any(
        character == "\0" or not (character.isspace() or unicodedata.category(character) in ("Cc", "Cf"))
        for character in text
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
