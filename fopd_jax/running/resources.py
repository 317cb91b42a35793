"""Is there memory and disk for a checkpoint? A full disk must neither end a run of days nor go unnoticed."""

import math
import shutil
from pathlib import Path

import jax

from fopd_jax.parallel.distributed import largest, warn
from fopd_jax.performance.host import available_memory
from fopd_jax.policy.velocity import Tree

MARGIN, SPARE = 1.25, 64 << 20  # of the state's bytes; and bytes beside it
PATIENCE = 3  # times in a row that writing may fail


class Misses:
    """Counts how often in a row something could not be written; `what`, in words, and `again`: when it is tried next.

    `told` is the last line while that is too often, and empty otherwise.
    """

    def __init__(self, what: str, again: str) -> None:
        self._what, self._again, self._count = what, again, 0
        self.told = ""

    def worked(self) -> None:
        """It was written: the count begins anew."""
        self._count, self.told = 0, ""

    def missed(self, step: int, problem: str, last: bool = False) -> None:
        """Note that it failed, with a line on stderr unless it is once too often, or the `last` time."""
        self._count += 1
        message = f"step {step}: no {self._what}: {problem}"
        if last or self._count >= PATIENCE:
            self.told = f"{message}; {self._count} in a row; the ones before are intact"
        else:
            warn(f"{message}; trying again at the next {self._again}, stopping if {PATIENCE} in a row fail")


class Space:
    """Lets a checkpoint be saved only where memory and disk will hold it; `folder` None asks nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._misses = folder, Misses("checkpoint saved", "one")

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
        self._misses.worked()

    def missed(self, step: int, problem: str, last: bool = False) -> None:
        """Note a checkpoint that could not be saved.

        Raises:
          OSError: it is one too many in a row, or the run's last; what was saved before is intact.
        """
        self._misses.missed(step, problem, last)
        if self._misses.told:
            raise OSError(self._misses.told)


def room_for(folder: Path, state: Tree) -> None:
    """Refuse a run that could not save its first checkpoint; `state`: arrays or shapes.

    Raises:
      ValueError: the disk of the folder has no room; names folder, need and what is free.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if lack := _disk_shortage(folder, MARGIN * size):
        raise ValueError(f"--workdir: {lack} for a checkpoint")


def shortage(folder: Path, state: Tree) -> str:
    """What is lacking to save `state` under `folder`, empty if nothing is."""
    whole, here = (MARGIN * size for size in state_bytes(state))
    memory = available_memory()
    if lack := _disk_shortage(folder, whole):
        return lack
    if memory is not None and memory < here:
        return f"host memory: {_gib(memory)} available, {_gib(here)} needed"
    return ""


def _disk_shortage(folder: Path, size: float) -> str:
    """What a folder's disk lacks to hold so many bytes and to spare, empty if nothing."""
    free = shutil.disk_usage(folder).free
    return "" if free >= size + SPARE else f"disk of {folder}: {_gib(free)} free, {_gib(size + SPARE)} needed"


def state_bytes(state: Tree) -> tuple[int, int]:
    """Bytes of the whole state, as on disk, and of the part that this process copies to its host memory."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    own = (shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.replica_id == 0)
    return sum(leaf.nbytes for leaf in leaves), sum(own)


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"
