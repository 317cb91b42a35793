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

    `rows` runs in a thread, one step ahead, up to the step `stop`.
    """

    def __init__(
        self, rows: Callable[[int], Tree], sharding: jax.sharding.Sharding, batch_size: int, stop: int
    ) -> None:
        self._rows, self._sharding, self._batch_size = Prefetch(rows, stop), sharding, batch_size

    def __call__(self, step: int) -> Tree:
        """The batch of an update, on the devices."""
        with phase("data"), jax.transfer_guard("allow"):
            return put_batch(self._rows(step), self._sharding, self._batch_size)

    def whole(self, step: int) -> Tree:
        """The same batch as numpy, whole on every process."""
        return gather_rows(self._rows(step), self._sharding, self._batch_size)

    def close(self) -> None:
        """End the thread."""
        self._rows.close()
