"""Which prompts come when: a function of the seed and of a prompt's number among all that are drawn, nothing else.

How many of the first n draws are a task's has a closed form (`Shares`), also where its weight changes as training goes
on (`Curriculum`), and so has which prompt of it comes as its j-th (`Walk`): any step can be asked for without the ones
before it.
"""

import dataclasses
import hashlib
import heapq
import math
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

_KEPT = 4  # permutations of a task at a time: its epoch, those that a batch goes on to, a neighbouring step's


@dataclasses.dataclass(frozen=True)
class Shares:
    """How n draws divide among tasks, for every n: by halving them, in whole numbers.

    The tasks are the leaves of a binary tree, Huffman's of their weights. At each fork of weights a and b, m draws
    part into the nearest whole number to m·a/(a + b) and the rest. Neither part falls as m grows, so the draws of a
    step are a difference of two counts; they add up to n; and a task's count differs from n times its share by at most
    `bound()`, ½·(1 + p + p·p' + …) over the shares p at the forks above it: ½ for two tasks, ¾ for 3 : 1 : 1. A task
    of weight 0 is never drawn. The arithmetic is exact, of any weights and any n.

    Raises:
      ValueError: no weight is above 0.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not any(weight > 0 for weight in self.weights):
            raise ValueError(f"tasks: found weights {list(self.weights)}, expected at least one above 0")

    def counts(self, draws: int) -> Int[np.ndarray, " tasks"]:
        """Of the first so many draws those of each task."""
        found = np.zeros(len(self.weights), np.int64)
        for task, count in _parted(_tree(self.weights), draws):
            found[task] = count
        return found

    def most(self, draws: int) -> Int[np.ndarray, " tasks"]:
        """The most of each task that any `draws` successive ones hold."""
        found = np.zeros(len(self.weights), np.int64)
        for task, count in _most(_tree(self.weights), draws, draws):
            found[task] = count
        return found

    def bound(self) -> float:
        """The most by which a task's count ever differs from draws times share."""
        return max(_bounds(_tree(self.weights), 0.0))


@runtime_checkable
class Weighted(Protocol):
    """A task's weight, and others from later steps on, by the step's number."""

    weight: float
    schedule: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """The tasks' weights as a function of the step, constant between a few steps at which they change.

    `stretches`: the first step of each, 0 that of the first one, and the shares there. A stretch divides its draws by
    shares of its own, and a task's count is the sum over them: nothing of it is lost or repeated at a change, and at
    any step it differs from the sum of its shares by at most the sum of the stretches' bounds.

    `turn`: tasks take turns of so many steps, which their shares divide instead of draws; 0: they share every step.
    Each stretch begins with a turn of its own.
    """

    stretches: tuple[tuple[int, Shares], ...]
    turn: int = 0

    @classmethod
    def of(cls, tasks: Sequence[Weighted], turn: int = 0) -> "Curriculum":
        """From the weights of tasks, in their order.

        Raises:
          ValueError: no weight is above 0, of a stretch; names its first step.
        """
        starts = sorted({0, *(int(step) for task in tasks for step in task.schedule)})
        found = []
        for start in starts:
            try:
                found.append((start, Shares(tuple(_weight_at(task, start) for task in tasks))))
            except ValueError as error:
                raise ValueError(f"{error}, from step {start} on" if start else str(error)) from error
        return cls(tuple(found), turn)

    def counts(self, steps: int, draws: int) -> Int[np.ndarray, " tasks"]:
        """Of the first so many steps, with so many draws each, those of each task."""
        found = self.stretches[0][1].counts(0)
        for start, stop, shares in self.within(steps):
            found = found + self.divided(shares, stop - start, draws)
        return found

    def divided(self, shares: Shares, steps: int, draws: int) -> Int[np.ndarray, " tasks"]:
        """The same of a stretch's first so many steps."""
        if not self.turn:
            return shares.counts(draws * steps)
        turns, rest = divmod(steps, self.turn)
        over = shares.counts(turns)
        return draws * (self.turn * over + rest * (shares.counts(turns + 1) - over))

    def most(self, draws: int) -> Int[np.ndarray, " tasks"]:
        """The most of each task in any step of so many draws."""
        each = [draws * shares.most(1) if self.turn else shares.most(draws) for _, shares in self.stretches]
        return np.max(each, axis=0)

    def within(self, steps: int) -> Iterator[tuple[int, int, Shares]]:
        """The stretches that begin in the first so many steps: from which step, to which, and their shares."""
        stops = [*(start for start, _ in self.stretches[1:]), steps]
        for (start, shares), stop in zip(self.stretches, stops, strict=True):
            if start < steps:
                yield start, min(stop, steps), shares


def _weight_at(task: Weighted, step: int) -> float:
    """The weight that was set last."""
    since = {0: task.weight} | {int(start): weight for start, weight in task.schedule.items()}
    return float(since[max(start for start in since if start <= step)])


@dataclasses.dataclass(frozen=True)
class _Fork:
    left: "int | _Fork"
    right: "int | _Fork"
    part: int  # of `whole` draws those that go left
    whole: int


@lru_cache(maxsize=64)
def _tree(weights: tuple[float, ...]) -> int | _Fork:
    """Huffman's tree of the tasks with weight; equal ones in their order."""
    exact = [Fraction(weight) for weight in weights]
    unit = math.lcm(*(each.denominator for each in exact))
    heap: list[tuple[int, int, int | _Fork]] = [(int(each * unit), k, k) for k, each in enumerate(exact) if each > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, j, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, min(i, j), _Fork(left, right, a, a + b)))
    return heap[0][2]


def _parted(node: int | _Fork, draws: int) -> Iterator[tuple[int, int]]:
    if isinstance(node, int):
        yield node, draws
        return
    left = (2 * draws * node.part + node.whole) // (2 * node.whole)  # to the nearest
    yield from _parted(node.left, left)
    yield from _parted(node.right, draws - left)


def _most(node: int | _Fork, least: int, most: int) -> Iterator[tuple[int, int]]:
    """Of successive draws, between `least` and `most` of which come to a node. Roundings of two counts differ by what
    lies between them, rounded down or up.
    """
    if isinstance(node, int):
        yield node, most
        return
    for child, part in ((node.left, node.part), (node.right, node.whole - node.part)):
        yield from _most(child, least * part // node.whole, -(-most * part // node.whole))


def _bounds(node: int | _Fork, bound: float) -> Iterator[float]:
    if isinstance(node, int):
        yield bound
        return
    part = node.part / node.whole
    yield from _bounds(node.left, 0.5 + part * bound)
    yield from _bounds(node.right, 0.5 + (1 - part) * bound)


class Walk:
    """A task's prompts in the order in which they come: every epoch a permutation of its own, by seed, task and epoch.

    So no prompt comes twice within an epoch, and equal texts at two places of the set are two prompts. A task's walk
    does not depend on the other tasks.
    """

    def __init__(self, seed: int, task: str, size: int) -> None:
        key = zlib.crc32(task.encode())

        @lru_cache(maxsize=_KEPT)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, key, epoch)).permutation(size)

        self._permutation, self._size = permutation, size

    def __call__(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """The places in the set of its draws number `start` to `stop`."""
        parts: Sequence[np.ndarray] = [
            self._permutation(epoch)[max(start - epoch * self._size, 0) : stop - epoch * self._size]
            for epoch in range(start // self._size, -(-stop // self._size))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def chance(seed: int, purpose: str, prompt: str) -> float:
    """A number in [0, 1), uniform over prompts: the same at every step, in every process and version of Python."""
    text = f"{seed}\0{purpose}\0{prompt}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / 2**48
