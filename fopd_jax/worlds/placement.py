"""Which devices the draws of a step are dealt to, so that none is asked for more of a network than the others.

A batch is split over devices, and each device's rows into parts that go through the network one after the other. Where
networks have slots for a fixed number of rows a device and part (`policy.groups`), draws that ask the same networks
must be spread evenly over those: they are dealt out like cards.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Deals draws to hands in turn, kind after kind: of n draws of a kind each of C hands gets n / C, rounded.

    `kinds`: of each task, by number; tasks that ask the same networks are of one kind. `hands`: of each place in the
    batch, in the order of draws; each hand has as many.
    """

    kinds: Int[np.ndarray, " tasks"]
    hands: Int[np.ndarray, " draws"]

    def __call__(self, tasks: Int[np.ndarray, " draws"], rng: np.random.Generator) -> Int[np.ndarray, " draws"]:
        """Which draw comes to each place, of draws in a random order, which each hand's keep."""
        count = int(self.hands.max()) + 1
        dealt = np.empty_like(self.hands)
        dealt[np.argsort(self.kinds[tasks], kind="stable")] = np.resize(rng.permutation(count), len(dealt))
        places = np.empty_like(dealt)
        places[np.argsort(self.hands, kind="stable")] = np.argsort(dealt, kind="stable")
        return places


@dataclasses.dataclass(frozen=True)
class Split:
    """How a batch of `batch_size` rows, `repeats` a draw, is split over `ways` devices and their `parts`.

    Raises:
      ValueError: the batch is not.
    """

    batch_size: int
    repeats: int
    ways: int
    parts: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.ways * self.parts) or self.batch_size % self.repeats:
            raise ValueError(f"batch_size: found {self.batch_size}, expected a multiple of its parts")

    @property
    def samples(self) -> int:
        """Of a device and part."""
        return self.batch_size // (self.ways * self.parts)

    def blocks(self) -> Int[np.ndarray, "draws repeats"]:
        """The device and part of each draw's rows: part p of n holds the rows p, p + n, … (`steps.visits`)."""
        rows = np.arange(self.batch_size)
        block = rows // (self.batch_size // self.ways) * self.parts + rows % self.parts
        return block.reshape(-1, self.repeats)

    def hands(self) -> Int[np.ndarray, " draws"]:
        """Draws whose rows share blocks are of one hand; all of them are, where hands would differ in size."""
        blocks = self.blocks()
        owner = np.arange(self.ways * self.parts)
        while True:  # the smallest block that rows of a draw connect a block to
            least = owner[blocks].min(1)
            joined = owner.copy()
            np.minimum.at(joined, blocks, np.repeat(least[:, None], self.repeats, axis=1))
            if (joined == owner).all():
                break
            owner = joined
        _, hands, sizes = np.unique(owner[blocks[:, 0]], return_inverse=True, return_counts=True)
        return hands if len(set(sizes.tolist())) == 1 else np.zeros_like(hands)

    def rows_a_block(self) -> int:
        """The most rows of one draw in one block."""
        return max(int(np.unique(each, return_counts=True)[1].max()) for each in self.blocks())


def most_a_block(split: Split, asks: Int[np.ndarray, "tasks groups"], most: Sequence[int]) -> tuple[int, ...]:
    """The most questions to each group about the samples of any device and part, as `placement_of` places them.

    `asks`: how many questions a sample of each task asks each group; `most`: of each task's draws in a step.
    """
    kinds, hands = np.unique(asks, axis=0, return_inverse=True)[1].reshape(-1), int(split.hands().max()) + 1
    rows, found = split.rows_a_block(), np.zeros(asks.shape[1], np.int64)
    for kind in np.unique(kinds):
        draws = min(sum(np.asarray(most)[kinds == kind].tolist()), split.batch_size // split.repeats)
        samples = min(rows * -(-draws // hands), split.samples)
        found += samples * asks[kinds == kind][0]
    return tuple(np.minimum(found, split.samples * asks.max(0)).tolist())


def placement_of(split: Split, asks: Int[np.ndarray, "tasks groups"]) -> Placement:
    """Tasks that ask alike are of one kind."""
    return Placement(np.unique(asks, axis=0, return_inverse=True)[1].reshape(-1), split.hands())
