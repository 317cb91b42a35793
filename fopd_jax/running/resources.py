"""Is there memory and disk for a checkpoint? A full disk must neither end a run of days nor go unnoticed."""

import os
import shutil
from pathlib import Path

import jax

from fopd_jax.parallel.distributed import largest
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.guards import warn

MARGIN, SPARE = 1.25, 64 << 20  # of the state's bytes; and bytes beside it
PATIENCE = 3  # checkpoints in a row that may fail to be saved
_GROUP = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")


class Space:
    """Lets a checkpoint be saved only where memory and disk will hold it; `folder` None asks nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._missed = folder, 0

    def allows(self, step: int, state: Tree, last: bool = False) -> bool:
        """Whether there is room on every process; tells on stderr if not.

        Raises:
          OSError: as `missed`.
        """
        problem = "" if self._folder is None else shortage(self._folder, state)
        if largest(int(bool(problem))):
            self.missed(step, problem or "another process is short of memory or disk", last)
            return False
        return True

    def saved(self) -> None:
        """A save has begun."""
        self._missed = 0

    def missed(self, step: int, problem: str, last: bool = False) -> None:
        """Note a checkpoint that could not be saved.

        Raises:
          OSError: it is one too many in a row, or the run's last; what was saved before is intact.
        """
        self._missed += 1
        message = f"step {step}: no checkpoint saved: {problem}"
        if last or self._missed >= PATIENCE:
            raise OSError(f"{message}; {self._missed} in a row; the ones before are intact")
        warn(f"{message}; trying again at the next one, stopping if {PATIENCE} in a row fail")


def shortage(folder: Path, state: Tree) -> str:
    """What is lacking to save `state` under `folder`, empty if nothing is."""
    whole, here = (MARGIN * size for size in state_bytes(state))
    disk, memory = shutil.disk_usage(folder).free, available_memory()
    if disk < whole + SPARE:
        return f"disk of {folder}: {_gib(disk)} free, {_gib(whole + SPARE)} needed"
    if memory is not None and memory < here:
        return f"host memory: {_gib(memory)} available, {_gib(here)} needed"
    return ""


def state_bytes(state: Tree) -> tuple[int, int]:
    """Bytes of the whole state, as on disk, and of the part that this process copies to its host memory."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    own = (shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.replica_id == 0)
    return sum(leaf.nbytes for leaf in leaves), sum(own)


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or its container's if that is less. None if unknown."""
    known = [value for value in (_machine_memory(), _group_memory()) if value is not None]
    return min(known, default=None)


def _machine_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _group_memory() -> int | None:
    """What the control group (version 2) leaves; cached file pages count as free."""
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics["inactive_file"])
    except (OSError, KeyError, ValueError):  # no group, no limit ("max"), another version
        return None


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"
