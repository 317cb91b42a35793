"""The prompts of a config's tasks, and which of those held out are trained on."""

from collections.abc import Mapping
from pathlib import Path

from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.schema import RoutedTask
from fopd_jax.parallel.distributed import warn
from fopd_jax.tasks.reading import read_file
from fopd_jax.tasks.sources import read_sets
from fopd_jax.tasks.task import Task


def read_prompts(path: Path, field: str) -> tuple[str, ...]:
    """The prompts of a file, in its order.

    Raises:
      ValueError: as `reading.read_file`.
    """
    return read_file(path, field).texts


def check_overlaps(tasks: Mapping[str, Task]) -> None:
    """Tell how many held-out prompts are trained on, in any task; case and spaces are no difference.

    Raises:
      ValueError: all of a task's are, so that it holds nothing out; names the field.
    """
    trained = {plain(prompt): name for name, task in tasks.items() for prompt in task.train}
    for name, task in tasks.items():
        both = [prompt for prompt in dict.fromkeys(task.test) if plain(prompt) in trained]
        count = len(dict.fromkeys(task.test))
        if both and len(both) == count:
            whose = sorted({trained[plain(prompt)] for prompt in both})
            raise ValueError(
                f"tasks.{name}.test: all {count} prompts are training prompts of {', '.join(whose)}, "
                "expected held-out ones"
            )
        if both:
            warn(f"tasks.{name}.test: {len(both)} of {count} prompts are training prompts, too, such as {both[0]!r}")


def plain(prompt: str) -> str:
    """A prompt without what makes no difference: case and the number of spaces."""
    return " ".join(prompt.casefold().split())


def read_tasks(tasks: Mapping[str, RoutedTask | RewardedTask]) -> dict[str, Task]:
    """The tasks whose prompts are read or generated (`tasks.sources`); they have no scores of their own.

    Raises:
      ValueError: as `read_sets`, for `tasks.NAME.prompts` or `tasks.NAME.test`.
    """
    sources = {f"tasks.{name}.prompts": (task.prompts, "train") for name, task in tasks.items()}
    sources |= {f"tasks.{name}.test": (task.test, "test") for name, task in tasks.items()}
    found = read_sets(sources)
    made = {}
    for name in tasks:
        train, test = found[f"tasks.{name}.prompts"], found[f"tasks.{name}.test"]
        made[name] = Task(name, train.texts, test.texts, train_metadata=train.metadata, test_metadata=test.metadata)
    return made
