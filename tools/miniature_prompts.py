"""Write the miniature's prompts as files, for tasks that are added to its own two.

    python tools/miniature_prompts.py --dst runs/miniature_prompts

Leaves train.jsonl and test.jsonl, the prompts of both tasks with those held out apart. Columns 4 and 8 part each task's
at random into halves and quarters, named text_1, text_2, … (see configs/miniature_teachers.py). Takes a second.

Exit status: 0 done; 2 bad input, 1 any other error, with one line that says what is wrong; 130 interrupted.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fopd_jax.exits import Arguments, explained
from fopd_jax.files import local_path, replacing_folder, write_text
from fopd_jax.tasks.sampling import chance
from fopd_jax.worlds.miniature.prompts import SPLITS, TASKS, prompts

COUNTS = (4, 8)
"""Of all tasks' parts together."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Arguments(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dst", required=True, help="folder to make")
    options = parser.parse_args(arguments)
    with explained(options.dst):
        write(local_path("dst", options.dst))


def write(folder: Path) -> None:
    """Both files, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as begun:
        for split in SPLITS:
            lines = (json.dumps(row) for task in TASKS for row in rows(task, split))
            write_text(begun / f"{split}.jsonl", "\n".join(lines) + "\n")


def rows(task: str, split: str) -> list[dict[str, str]]:
    """Each prompt with the part that it is of, a function of its text."""
    found = []
    for prompt in prompts(task, split):
        place = chance(0, "part", prompt)
        parts = {str(count): f"{task}_{1 + int(place * (count // len(TASKS)))}" for count in COUNTS}
        found.append({"prompt": prompt, **parts})
    return found


if __name__ == "__main__":
    main()
