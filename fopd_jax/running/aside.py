"""Damaged records of a workdir: they hold nothing that training needs, and nothing that is lost in silence."""

from pathlib import Path

from fopd_jax.files import set_aside
from fopd_jax.parallel.distributed import warn
from fopd_jax.running.guards import in_one_line


def begin_anew(path: Path, problem: Exception | str) -> None:
    """Move a damaged file out of the way, with a line; whoever writes it next begins a new one."""
    why = problem if isinstance(problem, str) else in_one_line(problem)
    what = f"cannot be read ({why})" if isinstance(problem, OSError) else f"damaged ({why})"
    try:
        warn(f"{path}: {what}; goes on without, and keeps it as {set_aside(path).name}")
    except OSError as error:
        warn(f"{path}: {what}, and cannot be set aside ({in_one_line(error)})")
