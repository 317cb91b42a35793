"""Rewards in the background while the devices go on, and what becomes of those that fail, raise or hang.

Nothing that a reward does ends in a number that it did not give: an exception, an answer of the wrong length and a
silence are failures with a reason. They are counted, and past a stated share the run stops by name.
"""

import collections
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial

import numpy as np
from jaxtyping import UInt8

from fopd_jax.console import note
from fopd_jax.exits import Outage, spell_error
from fopd_jax.rewards.lanes import CLOSED, Job, Lane
from fopd_jax.rewards.reward import Metadata, Reward, Scores, all_failed

LEAST = 64
"""Scores of a reward before its share of failures can stop a run."""
CLOSING_S = 10.0
"""What `close` waits for the batches that are being scored."""
_SHOWN, _REASON = 3, 200  # reasons in a message, and characters of one


class TooManyFailures(Outage):
    """A reward failed for more images than a run allows."""


class Ticket:
    """Scores of one batch, which may still be under way."""

    def __init__(
        self, jobs: Mapping[str, Job], known: Mapping[str, Scores], collect: Callable[[Mapping[str, Scores]], None]
    ) -> None:
        self._jobs, self._known, self._collect = jobs, known, collect
        self._scores: dict[str, Scores] | None = None

    def result(self, timeout: float | None = None) -> dict[str, Scores]:
        """Each reward's scores, once they are all there; what is not within `timeout` seconds has failed.

        Raises:
          TooManyFailures: with this batch a reward's share of failures is past what is allowed; the next call returns
            the scores.
        """
        if self._scores is None:
            wait([job.scores for job in self._jobs.values()], timeout)
            for job in self._jobs.values():
                job.fail(f"TimeoutError: no answer within {timeout} s")
            self._scores = {**self._known, **{name: job.scores.result() for name, job in self._jobs.items()}}
            self._collect(self._scores)
        return self._scores

    def give_up(self) -> None:
        """Nobody will ask for the result: what has not begun is not scored."""
        for job in self._jobs.values():
            if job.waits():
                job.give_up("nobody waits for it")


class Pool:
    """Scores batches by several rewards, which whoever made them closes after it.

    "host" and "remote" rewards run in threads of their own, side by side, each on its batches in their order: one at a
    time, or of a remote reward up to `workers`. "device" rewards run within `submit`, in the caller's thread: beside
    the program that trains they would be entered in another order on every host. No more than `outstanding` batches
    are under way; `submit` waits for room, so that images do not pile up.

    `most_failed`: share of failures, among a reward's last `window` scores, past which `Ticket.result` raises. It
    counts this process's scores alone: several processes have to agree on what they do then. `limit`: seconds that a
    batch may take in the background; then it has failed, and the thread that hangs is left behind and replaced.

    Raises:
      ValueError: a limit is out of range.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        most_failed: float,
        workers: int = 1,
        window: int = 4096,
        outstanding: int = 2,
        limit: float = 600.0,
    ) -> None:
        for name, found, least in (("workers", workers, 1), ("window", window, LEAST), ("outstanding", outstanding, 1)):
            if found < least:
                raise ValueError(f"{name}: found {found}, expected at least {least}")
        if not limit > 0:
            raise ValueError(f"limit: found {limit}, expected seconds above 0")
        if not 0 <= most_failed <= 1:
            raise ValueError(f"most_failed: found {most_failed}, expected a share from 0 to 1")
        self._rewards, self._most_failed = dict(rewards), most_failed
        self._tallies = {name: _Tally(name, window) for name in rewards}
        self._room = threading.BoundedSemaphore(outstanding)
        self._closed = threading.Event()
        self._lanes = {
            name: Lane(name, workers if reward.runs == "remote" else 1, limit, self._tallies[name].tell)
            for name, reward in rewards.items()
            if reward.runs != "device"
        }

    def submit(
        self,
        images: UInt8[np.ndarray, "n h w 3"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        names: Sequence[str] | None = None,
        known: Mapping[str, Scores] | None = None,
        keep: Callable[[str, Scores], None] = lambda name, scores: None,
    ) -> Ticket:
        """Begin to score a batch by the named rewards, or by all. The images must not change until they are scored.

        Rewards whose scores are `known` are not asked. `keep(name, scores)` is told of what each of the others has
        said, failures included, in its thread and before the ticket has it.

        Raises:
          ValueError: a reward is unknown, or the numbers of images, prompts and metadata differ.
          RuntimeError: the pool is closed.
        """
        if not len(images) == len(prompts) == len(metadata):
            found = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"rewards: found {found}, expected as many of each")
        wanted = list(self._rewards if names is None else dict.fromkeys(names))
        if unknown := [name for name in wanted if name not in self._rewards]:
            raise ValueError(f"rewards: found {unknown}, expected some of {', '.join(self._rewards) or 'none'}")
        self._room.acquire()
        if self._closed.is_set():
            self._room.release()
            raise RuntimeError(CLOSED)
        known = {name: scores for name, scores in (known or {}).items() if name in wanted}
        wanted = [name for name in wanted if name not in known]
        works = {name: partial(self._score, name, images, prompts, metadata) for name in wanted}
        jobs = {
            name: Job(len(images), work, self._tallies[name].time, partial(keep, name)) for name, work in works.items()
        }
        _after([job.scores for job in jobs.values()], self._room.release)
        for name in [each for each in wanted if each in self._lanes]:
            self._lanes[name].put(jobs[name])
        for name in [each for each in wanted if each not in self._lanes]:  # last: the others run meanwhile
            jobs[name].run()
        return Ticket(jobs, known, self.count)

    def statistics(self) -> dict[str, float]:
        """Metrics of each reward since the last call, flat: `rewards/NAME/…`.

        `queue`: batches that wait or are scored now. Where anything was scored `latency`, seconds a batch, and
        `per_second`, images a second of them; where anything was collected `failed`, the share of failures.
        """
        found = {}
        for name, tally in self._tallies.items():
            queue = self._lanes[name].length() if name in self._lanes else 0
            values = {"queue": float(queue), **tally.take()}
            found |= {f"rewards/{name}/{key}": value for key, value in values.items()}
        return found

    def close(self) -> None:
        """Give up what has not begun, wait `CLOSING_S` for the rest, and end; the rewards stay open. Twice is once.

        No thread is left that Python would wait for at its end.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        for lane in self._lanes.values():
            lane.stop()
        deadline = time.monotonic() + CLOSING_S
        for lane in self._lanes.values():
            lane.end(deadline)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _score(
        self,
        name: str,
        images: UInt8[np.ndarray, "n h w 3"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> Scores:
        """What the reward answers, or why it does not."""
        try:
            scores = self._rewards[name].score(images, prompts, metadata)
            if not isinstance(scores, Scores):
                raise TypeError(f"found a {type(scores).__name__}, expected Scores")
            if len(scores) != len(images):
                raise ValueError(f"found {len(scores)} scores, expected those of {len(images)} images")
        except Exception as error:
            self._tallies[name].tell(_place(error), f"{spell_error(error)} ({_place(error)})")
            return all_failed(len(images), spell_error(error))
        return scores

    def count(self, found: Mapping[str, Scores]) -> None:
        """Count a batch's scores, as is done with those of a ticket once they are collected.

        Raises:
          TooManyFailures: as `Ticket.result`.
        """
        for name, scores in found.items():
            self._tallies[name].count(scores)
        for name in found:
            if (tally := self._tallies[name]).share() > self._most_failed:
                raise TooManyFailures(f"rewards.{name}: {tally.describe()}; at most {self._most_failed:.0%} may fail")


class _Tally:
    """What there is to say of one reward's batches."""

    def __init__(self, name: str, window: int) -> None:
        self._name, self._lock = name, threading.Lock()
        self._told: set[str] = set()
        self._recent: collections.deque[str | None] = collections.deque(maxlen=window)  # reasons; None: a value
        self._failed = self._collected = 0
        self._seconds: list[float] = []  # from here on since the last `take`
        self._images = self._new_failed = self._new = 0

    def tell(self, kind: str, problem: str) -> None:
        """On stderr, the first problem of its kind."""
        with self._lock:
            known = kind in self._told
            self._told.add(kind)
        if not known:
            note(f"warning: rewards.{self._name}: {problem}")

    def time(self, images: int, seconds: float) -> None:
        """A batch was scored, or given up."""
        with self._lock:
            self._images += images
            self._seconds.append(seconds)

    def count(self, scores: Scores) -> None:
        """A batch was collected."""
        failed = int(scores.failed.sum())
        reasons = [
            str(each["error"])[:_REASON] if bad else None
            for each, bad in zip(scores.details, scores.failed, strict=True)
        ]
        with self._lock:
            self._recent.extend(reasons)
            self._failed, self._collected = self._failed + failed, self._collected + len(scores)
            self._new_failed, self._new = self._new_failed + failed, self._new + len(scores)

    def share(self) -> float:
        """Of failures among the recent scores; 0 while they are few."""
        with self._lock:
            return 0.0 if len(self._recent) < LEAST else _share(self._recent)

    def describe(self) -> str:
        """The same in words, with its reasons."""
        with self._lock:
            reasons = collections.Counter(reason for reason in self._recent if reason is not None).most_common(_SHOWN)
            why = "; ".join(f"{reason} ({count} times)" for reason, count in reasons)
            return (
                f"{_share(self._recent):.0%} of its last {len(self._recent)} scores failed "
                f"({self._failed} of {self._collected} in all), most often: {why}"
            )

    def take(self) -> dict[str, float]:
        """Metrics since the last call."""
        with self._lock:
            values, spent = {}, sum(self._seconds)
            if self._seconds:
                values = {"latency": spent / len(self._seconds), "per_second": self._images / max(spent, 1e-9)}
            if self._new:
                values["failed"] = self._new_failed / self._new
            self._seconds, self._images, self._new_failed, self._new = [], 0, 0, 0
            return values


def _share(reasons: Collection[str | None]) -> float:
    return sum(reason is not None for reason in reasons) / len(reasons)


def _after(pending: Sequence["Future[Scores]"], act: Callable[[], None]) -> None:
    """Call `act` once, when all are there."""
    left, lock = len(pending), threading.Lock()

    def one(_: object = None) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left <= 0
        if last:
            act()

    for each in pending:
        each.add_done_callback(one)
    if not pending:
        one()


def _place(error: Exception) -> str:
    """Where it was raised, the last line of its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}, in {last.name}"
