"""Threads that score batches one after another, and outlive a reward that hangs."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from fopd_jax.exits import spell_error
from fopd_jax.rewards.reward import Scores, all_failed

CLOSED = "the pool of rewards is closed"


class Job:
    """One reward's scores of one batch: what comes first counts, an answer or a reason why there is none.

    `timed(images, seconds)` is told of what began; `keep` of the scores, before anybody has them, unless the job was
    given up.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[], Scores],
        timed: Callable[[int, float], None],
        keep: Callable[[Scores], None] = lambda scores: None,
    ) -> None:
        self.scores: Future[Scores] = Future()
        self._count, self._timed, self._keep = count, timed, keep
        self._work: Callable[[], Scores] | None = work
        self._began: float | None = None
        self._lock, self._settled = threading.Lock(), False

    def run(self) -> None:
        """Score, unless that is settled already."""
        if (work := self._work) is not None:
            self._began = time.monotonic()
            try:
                self._settle(work())
            finally:
                self.fail("the reward ended its thread")

    def waits(self) -> bool:
        """Whether nobody has begun to score it."""
        return self._began is None

    def fail(self, reason: str) -> None:
        """Unless it is settled already, all have failed."""
        self._settle(all_failed(self._count, reason))

    def give_up(self, reason: str) -> None:
        """The same, but it is no failure of the reward's: nobody waits for the scores any more."""
        self._settle(all_failed(self._count, reason), kept=False)

    def _settle(self, scores: Scores, kept: bool = True) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
        self._work = None  # it holds the images
        if self._began is not None:
            self._timed(self._count, time.monotonic() - self._began)
        try:
            if kept:
                self._keep(scores)
        finally:
            self.scores.set_result(scores)


class Lane:
    """One reward's batches, in the order in which they came, on so many threads.

    `limit`: seconds a batch; `tell(kind, problem)` is told of one that takes longer.
    """

    def __init__(self, name: str, threads: int, limit: float, tell: Callable[[str, str], None]) -> None:
        self._name, self._limit, self._tell = f"reward-{name}", limit, tell
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._lock, self._stopped = threading.Lock(), False
        self._jobs: list[Job] = []  # some may be settled
        self._threads = [start(self._name, self._serve) for _ in range(threads)]

    def put(self, job: Job) -> None:
        """Last in the row; it fails at once if the lane is stopped."""
        with self._lock:
            self._jobs = [*self._open(), job]
            self._queue.put(job)
            stopped = self._stopped
        if stopped:
            job.give_up(CLOSED)

    def length(self) -> int:
        """Batches that are not settled."""
        with self._lock:
            return len(self._open())

    def stop(self) -> None:
        """Begin no other batch."""
        with self._lock:
            self._stopped, waiting = True, [job for job in self._open() if job.waits()]
        for job in waiting:
            job.give_up(CLOSED)
        for _ in self._threads:
            self._queue.put(None)

    def end(self, deadline: float) -> None:
        """Once stopped, wait for what is being scored, and leave what does not come to itself."""
        join(self._threads, deadline)
        with self._lock:
            left = self._open()
        for job in left:
            job.give_up(CLOSED)

    def _open(self) -> list[Job]:
        return [job for job in self._jobs if not job.scores.done()]

    def _serve(self) -> None:
        """Every batch has a thread of its own, so that one which hangs can be left."""
        while (job := self._queue.get()) is not None:
            try:
                thread = start(self._name, job.run)
            except RuntimeError as error:  # the system, or a Python that ends, has no thread to give
                job.fail(spell_error(error))
                continue
            thread.join(self._limit)
            if thread.is_alive():
                reason = f"TimeoutError: no answer within {self._limit:g} s"
                self._tell("hang", f"{reason}; its thread is left behind")
                job.fail(reason)


def start(name: str, work: Callable[[], None]) -> threading.Thread:
    """A thread that Python does not wait for at its end."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def join(threads: Sequence[threading.Thread], deadline: float) -> None:
    """Wait for their ends, but not beyond a time of `time.monotonic`."""
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
