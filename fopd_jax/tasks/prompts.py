"""Prompt files: UTF-8 text, one prompt a line."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from fopd_jax.config.schema import RoutedTask
from fopd_jax.exits import GUIDE
from fopd_jax.parallel.distributed import warn
from fopd_jax.reading import read_regular
from fopd_jax.tasks.content import other_format, other_syntax
from fopd_jax.tasks.task import Task

_DOUBTFUL = {
    "begin with '# ', which is read as part of the prompt": re.compile(r"\A# "),
    "hold U+FFFD, which stands for what another program could not decode": re.compile("\ufffd"),
    "hold byte order marks or marks of direction, which are not seen": re.compile("[\ufeff\u202a-\u202e\u2066-\u2069]"),
}
"""Of prompts that are kept: what may be wrong with them."""


def read_prompts(path: Path, field: str) -> tuple[str, ...]:
    """The prompts of a file, in its order; control characters in them are kept and told of.

    Raises:
      ValueError: the file is missing, not UTF-8, empty, of another format, has a blank line between prompts or a NUL
        character; names the config's field, file and line.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        raise ValueError(_unreadable(path, field, error.strerror)) from error
    if what := other_format(data):
        raise ValueError(f"{field}: {path} looks like {what}; expected a text of one prompt a line")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(_unreadable(path, field, error)) from error
    if not text.strip():
        raise ValueError(f"{field}: {path} is empty, expected one prompt a line")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if what := other_syntax(text):
        raise ValueError(f"{field}: {path} looks like {what}; expected a text of one prompt a line")
    lines = [line.strip() for line in text.rstrip().split("\n")]  # not at the separators that occur inside prompts
    _check_lines(lines, f"{field}: {path}")
    return tuple(lines)


def _unreadable(path: Path, field: str, reason: object) -> str:
    return f"{field}: cannot read {str(path)!r} ({reason}); expected a text of one prompt a line, see {GUIDE}"


def _check_lines(lines: Sequence[str], place: str) -> None:
    """Refuse blank lines and NUL; tell of other control characters, and of what may be syntax or wrongly decoded."""
    blank = [number for number, line in enumerate(lines, start=1) if not any(map(_is_seen, line))]
    if blank:
        among = f" (one of {len(blank)})" if len(blank) > 1 else ""
        raise ValueError(f"{place}, line {blank[0]} is blank{among}, expected a prompt")
    control = [number for number, line in enumerate(lines, start=1) if any(map(_is_control, line))]
    for number in control:
        if "\0" in lines[number - 1]:
            raise ValueError(f"{place}, line {number} holds a NUL character, expected text")
    if control:
        warn(f"{place}: {len(control)} of {len(lines)} prompts hold control characters, the first in line {control[0]}")
    for what, pattern in _DOUBTFUL.items():
        if found := [number for number, line in enumerate(lines, start=1) if pattern.search(line)]:
            warn(f"{place}: {len(found)} of {len(lines)} prompts {what}, the first in line {found[0]}")


def _is_control(character: str) -> bool:
    return character != "\t" and unicodedata.category(character) == "Cc"


def _is_seen(character: str) -> bool:
    return character == "\0" or not (character.isspace() or unicodedata.category(character) in ("Cc", "Cf"))


def check_overlaps(tasks: Mapping[str, Task]) -> None:
    """Tell how many held-out prompts are trained on, in any task; case and spaces are no difference.

    Raises:
      ValueError: all of a task's are, so that it holds nothing out; names the field.
    """
    trained = {_plain(prompt): name for name, task in tasks.items() for prompt in task.train}
    for name, task in tasks.items():
        both = [prompt for prompt in dict.fromkeys(task.test) if _plain(prompt) in trained]
        count = len(dict.fromkeys(task.test))
        if both and len(both) == count:
            whose = sorted({trained[_plain(prompt)] for prompt in both})
            raise ValueError(
                f"tasks.{name}.test: all {count} prompts are training prompts of {', '.join(whose)}, "
                "expected held-out ones"
            )
        if both:
            warn(f"tasks.{name}.test: {len(both)} of {count} prompts are training prompts, too, such as {both[0]!r}")


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def read_tasks(tasks: Mapping[str, RoutedTask]) -> dict[str, Task]:
    """The tasks whose prompts lie in files; they have no scores of their own.

    Raises:
      ValueError: as `read_prompts`, for `tasks.NAME.prompts` or `tasks.NAME.test`.
    """
    return {
        name: Task(
            name,
            read_prompts(Path(task.prompts), f"tasks.{name}.prompts"),
            read_prompts(Path(task.test), f"tasks.{name}.test"),
        )
        for name, task in tasks.items()
    }
