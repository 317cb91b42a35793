"""Batches on their way to the devices, the next one made while this one's step runs."""

from collections.abc import Callable
from typing import Any

import jax

from fopd_jax.parallel.distributed import gather_rows, put_batch
from fopd_jax.running.goodput import phase
from fopd_jax.running.prefetch import Prefetch

Tree = Any


class Feed:
    """`rows(step)`, this process's rows of a batch, put where `sharding` says; that time is charged to data.

    `rows` runs in a thread, one step ahead, up to the step `stop`. Where it gives several batches, as a tuple,
    `batch_size` is a tuple, too.
    """

    def __init__(
        self,
        rows: Callable[[int], Tree],
        sharding: jax.sharding.Sharding,
        batch_size: int | tuple[int, ...],
        stop: int,
    ) -> None:
        self._rows, self._sharding, self._batch_size = Prefetch(rows, stop), sharding, batch_size

    def __call__(self, step: int) -> Tree:
        """The batch of an update, on the devices."""
        with phase("data"), jax.transfer_guard("allow"):
            return self._each(put_batch, step)

    def whole(self, step: int) -> Tree:
        """The same batch as numpy, whole on every process."""
        return self._each(gather_rows, step)

    def _each(self, put: Callable[[Tree, jax.sharding.Sharding, int], Tree], step: int) -> Tree:
        rows, sizes = self._rows(step), self._batch_size
        if isinstance(sizes, int):
            return put(rows, self._sharding, sizes)
        return tuple(put(each, self._sharding, size) for each, size in zip(rows, sizes, strict=True))

    def close(self) -> None:
        """End the thread."""
        self._rows.close()
