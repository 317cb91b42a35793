"""A window of updates traced with JAX's profiler, for xprof or TensorBoard."""

from pathlib import Path

import jax

from fopd_jax.config.schema import Run
from fopd_jax.console import say
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.policy.velocity import Tree

FOLDER = "profile"
Window = tuple[int, int]
_NEVER: Window = (0, 0)


def check(run: Run, workdir: Path, newest: int) -> None:
    """Refuse a window that no update will be in; `newest`: step of the newest checkpoint.

    A run that a job manager starts again and again has its window behind it, and its folder there.

    Raises:
      ValueError: `run.profile` begins beyond the run's steps, or ends before those that are left.
    """
    if run.profile is None:
        return
    if run.profile[0] >= run.steps:
        raise ValueError(f"run.profile: found {run.profile}, expected a start below the run's {run.steps} steps")
    if run.profile[1] <= newest and not _folder(workdir, run.profile).exists():
        raise ValueError(f"run.profile: found {run.profile}, but {workdir} is already at step {newest}")


def _folder(workdir: Path, window: Window) -> Path:
    return workdir / FOLDER / f"{window[0]}_{window[1]}"


class Profile:
    """Traces the updates `start` to `stop - 1`, counted from 0, into `profile/START_STOP`; of process 0 alone.

    Every process calls every method. A trace that cannot be made is told and stops nothing.
    """

    def __init__(self, workdir: Path = Path(), window: Window | None = None) -> None:
        self._window = window if window is not None and is_main() else _NEVER
        self._folder = _folder(workdir, self._window)
        self._since: int | None = None
        self._last = 0

    def begin(self, i: int, state: Tree) -> None:
        """Before update i: start if it is in the window, and nothing of the one before is still running."""
        start, stop = self._window
        if self._since is not None or not start <= i < stop:
            return
        jax.block_until_ready(state)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder)
        except (OSError, RuntimeError) as error:
            self._window = _NEVER
            warn(f"run.profile: no trace ({error})")
        else:
            self._since = i

    def end(self, i: int, state: Tree) -> None:
        """After update i was dispatched: wait for it and write the trace if it is the last in the window."""
        self._last = i
        if self._since is not None and i + 1 >= self._window[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one, of as many updates as there were."""
        if self._since is None:
            return
        first, self._since, self._window = self._since, None, _NEVER
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            warn(f"run.profile: no trace ({error})")
        else:
            say(f"profile: updates {first} to {self._last} are in {self._folder}")
