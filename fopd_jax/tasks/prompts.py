"""Prompt files: UTF-8 text, one prompt a line."""

from collections.abc import Mapping
from pathlib import Path

from fopd_jax.config.schema import RoutedTask
from fopd_jax.exits import GUIDE
from fopd_jax.tasks.task import Task


def read_prompts(path: Path, field: str) -> tuple[str, ...]:
    """The prompts of a file, in its order.

    Raises:
      ValueError: the file is missing, not UTF-8, empty or has a blank line; names the config's field, file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{field}: cannot read {str(path)!r} ({reason}); expected a text of one prompt a line, see {GUIDE}"
        ) from error
    if not text.strip():
        raise ValueError(f"{field}: {path} is empty, expected one prompt a line")
    lines = text.removesuffix("\n").split("\n")  # unlike splitlines, not at the separators that occur inside prompts
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{field}: {path}, line {number} is blank, expected a prompt")
    return tuple(line.strip() for line in lines)


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
