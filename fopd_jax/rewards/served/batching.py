"""Batches across requests: what several clients ask of one reward at a time is scored together."""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from fopd_jax.rewards.reward import Metadata, Reward, Scores, all_failed
from fopd_jax.rewards.served.wire import Request, encode_results

Scored = Callable[[str, int, int], None]
"""Told of each batch: the reward, how many images, how many of them failed."""


class Full(Exception):
    """No room for more images now."""


@dataclasses.dataclass(eq=False)
class Job:
    """One image on its way; `result` becomes its part of an answer, or is cancelled when nobody waits any more."""

    image: UInt8[np.ndarray, "h w 3"]
    prompt: str
    metadata: Metadata
    result: asyncio.Future[str]

    @property
    def pixels(self) -> int:
        return self.image.shape[0] * self.image.shape[1]


class Batcher:
    """One reward's queue, and the thread that scores it: no reward needs to bear two calls at a time.

    `batch`: most images in one call. `linger`: seconds that a call waits for others to join it. `room`: pixels that
    may wait or be scored at a time; only an empty queue takes a larger request.
    """

    def __init__(self, reward: Reward, scored: Scored, room: int, *, batch: int = 32, linger: float = 0.005) -> None:
        self._reward, self._scored = reward, scored
        self._batch, self._linger, self._room = batch, linger, room
        self._jobs: deque[Job] = deque()
        self._running: Sequence[Job] = ()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{reward.name}")

    @property
    def queued(self) -> int:
        """Images that wait or are being scored."""
        return len(self._jobs) + len(self._running)

    def submit(self, request: Request) -> list[asyncio.Future[str]]:
        """What will be the parts of the answer.

        Raises:
          Full: there is no room.
        """
        new = sum(image.shape[0] * image.shape[1] for image in request.images)
        if self.queued and new + sum(job.pixels for job in (*self._jobs, *self._running)) > self._room:
            raise Full
        each = zip(request.images, request.prompts, request.metadata, strict=True)
        jobs = [Job(*item, asyncio.get_running_loop().create_future()) for item in each]
        self._jobs.extend(jobs)
        self._arrived.set()
        return [job.result for job in jobs]

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self._jobs) < self._batch:
                await asyncio.sleep(self._linger)
            self._running = self._take()
            if not self._running:
                continue
            prompts, metadata = [job.prompt for job in self._running], [job.metadata for job in self._running]
            images = [job.image for job in self._running]
            scores = await loop.run_in_executor(self._thread, score_all, self._reward, images, prompts, metadata)
            for job, result in zip(self._running, encode_results(scores), strict=True):
                if not job.result.done():
                    job.result.set_result(result)
            self._scored(self._reward.name, len(scores), int(scores.failed.sum()))
            self._running = ()

    def _take(self) -> list[Job]:
        """The next batch: images of the first one's size. Those nobody waits for any more are dropped."""
        waiting = [job for job in self._jobs if not job.result.done()]
        taken = [job for job in waiting if job.image.shape == waiting[0].image.shape][: self._batch]
        self._jobs = deque(job for job in waiting if job not in taken)
        if not self._jobs:
            self._arrived.clear()
        return taken

    def close(self) -> None:
        """End the thread once it is idle, and what the reward has started."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._reward.close()


def score_all(
    reward: Reward, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Scores:
    """Scores of images of one size, whatever the reward does: what it cannot score or raises for becomes failures."""
    problems = [_problem(reward, *each) for each in zip(prompts, metadata, strict=True)]
    values, failed = np.full(len(images), np.nan), np.ones(len(images), bool)
    details: list[Metadata] = [{"error": problem} for problem in problems]
    if fit := [i for i, problem in enumerate(problems) if not problem]:
        chosen = np.stack([images[i] for i in fit])
        scores = _score(reward, chosen, [prompts[i] for i in fit], [metadata[i] for i in fit])
        values[fit], failed[fit] = scores.values, scores.failed
        for i, each in zip(fit, scores.details, strict=True):
            details[i] = each
    return Scores(values, failed, tuple(details))


def _problem(reward: Reward, prompt: str, metadata: Metadata) -> str:
    """Why this prompt can never be scored, or nothing."""
    try:
        reward.check([prompt], [metadata])
    except Exception as error:  # the reward may be anybody's code
        return str(error) or type(error).__name__
    return ""


def _score(reward: Reward, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    try:
        scores = reward.score(images, prompts, metadata)
        if not isinstance(scores, Scores) or len(scores) != len(images):
            raise ValueError(f"returned no Scores of {len(images)} images")
        return scores
    except BaseException as error:  # in a thread of its own, where even SystemExit is the reward's doing
        return all_failed(len(images), f"the reward raised {type(error).__name__}: {error}")
