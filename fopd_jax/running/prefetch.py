"""The next batch is made while this one's step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Rows = TypeVar("Rows")


class Prefetch(Generic[Rows]):
    """`batch(i)` as before, but after each call `batch(i + 1)` is made in a thread, unless that reaches `stop`.

    `batch` has to be a function of `i` alone, and must not run what all processes run together: the order in which
    they do is the main thread's. One thread makes all batches, also those that are asked for out of order; those throw
    away what was made ahead. An error surfaces where its batch is asked for. `close` ends the thread.
    """

    def __init__(self, batch: Callable[[int], Rows], stop: int) -> None:
        self._batch, self._stop = batch, stop
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[int, Future[Rows]] | None = None

    def __call__(self, i: int) -> Rows:
        """Batch `i`.

        Raises:
          Exception: whatever `batch(i)` raised.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == i:
            asked = ahead[1]
        else:
            if ahead is not None:
                ahead[1].cancel()
            asked = self._thread.submit(self._batch, i)
        if i + 1 < self._stop:
            self._ahead = i + 1, self._thread.submit(self._batch, i + 1)
        return asked.result()

    def close(self) -> None:
        """End the thread, once the batch that it makes is made."""
        self._thread.shutdown(cancel_futures=True)
