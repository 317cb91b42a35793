"""Is there memory and disk for a checkpoint? A full disk must neither end a run of days nor go unnoticed."""

import math
import shutil
from pathlib import Path

import jax

from fopd_jax.parallel.distributed import largest
from fopd_jax.performance.host import available_memory
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.guards import warn

MARGIN, SPARE = 1.25, 64 << 20  # of the state's bytes; and bytes beside it
PATIENCE = 3  # checkpoints in a row that may fail to be saved


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


def room_for(folder: Path, state: Tree) -> None:
    """Refuse a run that could not save its first checkpoint; `state`: arrays or shapes.

    Raises:
      ValueError: the disk of the folder has no room; names folder, need and what is free.
    """
    needed = MARGIN * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) + SPARE
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(f"--workdir: disk of {folder}: {_gib(free)} free, {_gib(needed)} needed for a checkpoint")


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


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"
