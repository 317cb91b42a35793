"""Who is on a page: runs and models, each with one colour wherever it is shown.

The colours are told apart by people with any of the usual kinds of colour vision, on light and on dark ground; dashes
and the shapes of points say the same again, and go on where there are more than colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.exits import is_plain
from fopd_jax.reading import real_path
from fopd_jax.reporting.evaluations import Kept
from fopd_jax.reporting.workdirs import Run

LIGHT = ("#004ccc", "#e96900", "#00835d", "#af6d8e", "#008fd1", "#7f5c00", "#553670", "#3c3f36")
DARK = ("#3e8db9", "#e65022", "#00e0a9", "#ffabff", "#c3ffff", "#e2ca17", "#575cce", "#77786e")
"""Any two of a row differ by more than 12 (CIEDE2000) to normal, protan, deutan and tritan eyes alike."""
GROUND = {"light": "#fcfcfb", "dark": "#1b1c1f"}
"""Behind the charts."""


def unique_names(folders: Sequence[tuple[str, Path]]) -> list[str]:
    """Of each folder the name that was given, or its own; with more of its path where others have the same."""
    given = [name or folder.absolute().name or str(folder) for name, folder in folders]
    names = [
        "/".join(folder.absolute().parts[-2:]) if not said and given.count(name) > 1 else name
        for name, (said, folder) in zip(given, folders, strict=True)
    ]
    earlier = [names[:k].count(name) for k, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier, strict=True)]


def named_folder(text: str) -> tuple[str, str]:
    """`NAME=DIR` or `DIR`, as (name, folder); a folder that has such a sign in its name is meant where it is there."""
    name, sign, folder = text.partition("=")
    is_name = sign and folder and "/" not in name and is_plain(name) and not Path(text).exists()
    return (name, folder) if is_name and name else ("", text)


def slots(runs: Sequence[Run], cells: Sequence[Kept]) -> dict[str, int]:
    """Numbers of colours by name: runs first, then models. A model that a run made has the run's."""
    found = {run.name: number for number, run in enumerate(runs)}
    places = {real_path(run.folder): number for number, run in enumerate(runs)}
    for each in cells:
        if each.cell.model not in found:
            made_by = _made_by(each.cell.about, places)
            found[each.cell.model] = max(found.values(), default=-1) + 1 if made_by is None else made_by
    return found


def _made_by(about: Mapping[str, Any], places: Mapping[Path, int]) -> int | None:
    texts = [value for value in about.values() if isinstance(value, str) and value and is_plain(value)]
    return next((places[path] for text in texts if (path := real_path(Path(text))) in places), None)
