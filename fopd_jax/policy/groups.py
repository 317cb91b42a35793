"""Several networks on one panel, each of them asked about its own samples alone.

Teachers may be adapters on the student's base, other networks in the same latent space, adapters on those, or whole
networks like the student's. A forward costs what its rows cost, and a compiled program has to know how many there are:
so every network has *slots* for a fixed number of rows on each device. Of a device's rows a mask says which ask the
network; they are sorted to the front, the first of them fill the slots, and what the network says there goes back to
where it was asked. The sort is within a device's own rows, so that nothing moves between devices. Whoever places the
samples sees to it that there are slots enough (`worlds.placement`); a question that finds none is answered by NaN, so
that the update does not land.

Networks of one shape stand stacked and go through one compiled body, tile by tile of their slots.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.policy.panel import (
    Answer,
    Questions,
    RoutingTable,
    Rows,
    answered,
    block_of,
    entries_of,
    rows_of,
    say,
    scales_of,
    shares_of,
)
from fopd_jax.policy.velocity import Tree, Velocity

SURPLUS = 1 / 8
"""The share of a stack's slots that may stay empty for its tiles to be larger."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Of `samples` samples of a device the most questions to teachers and base that each group has slots for."""

    samples: int
    questions: tuple[int, ...]

    def of(self, group: int, samples: int) -> int:
        """The same of another number of samples: of several parts at once."""
        return -(-self.questions[group] * samples // self.samples)


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of a panel: `bank` holds adapters on it in the order of the panel's `entries`; {}: itself alone.

    `stacked`: the bank holds whole networks, one an entry, which share the constants of `variables`.
    """

    velocity: Velocity
    entries: tuple[int, ...]
    variables: Tree
    bank: Tree
    stacked: bool = False

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Entries that are asked by one forward."""
        return tuple((entry,) for entry in self.entries) if self.stacked else (self.entries,)


@dataclasses.dataclass(frozen=True)
class GroupedPanel:
    """A panel of several networks, over the entries of `table`.

    `ways`: devices that hold different samples. `slots`: by group, in the members' order; None: every group has slots
    for all that teachers could be asked, where nobody has placed the samples. `null`: the empty prompt.
    """

    members: tuple[Member, ...]
    table: RoutingTable
    null: Conditioning | None
    ways: int
    slots: Slots | None = None

    def ask(
        self, x: Array, sigma: Array, conditioning: Conditioning, questions: Sequence[Questions]
    ) -> tuple[Answer, ...]:
        """See `Panel`.

        Raises:
          ValueError: as `AdapterPanel.ask`.
        """
        block = block_of(questions)
        entries = entries_of(questions, block)
        wanted = jnp.where(shares_of(questions, block) != 0, entries, -1).reshape(self.ways, -1)
        rows = rows_of(questions, block, x, sigma, conditioning)
        asking = _Asking(rows, scales_of(questions, block, self.table.guidance), entries, entries)
        apart, counts, said = any(each.branches for each in questions), self.counts(questions, x.shape[0]), None
        for member in self.members:
            (own, counts) = counts[: len(member.groups)], counts[len(member.groups) :]
            found = self._hear(member, own, wanted, asking, apart)
            said = found if said is None else tuple(map(jnp.add, said, found))
        assert said is not None
        return answered(said, questions, block)

    def counts(self, questions: Sequence[Questions], samples: int) -> tuple[int, ...]:
        """Each group's slots on a device, for questions about so many samples of all devices."""
        groups = [group for member in self.members for group in member.groups]
        return tuple(self._count(number, group, questions, samples) for number, group in enumerate(groups))

    def rows(self, questions: Sequence[Questions], samples: int, *, apart: bool = False) -> tuple[int, ...]:
        """Each member's rows of a device, those under the empty prompt and slots that stay empty among them."""
        counts, found = self.counts(questions, samples), []
        for member in self.members:
            own, counts = counts[: len(member.groups)], counts[len(member.groups) :]
            sides = 2 if apart or self._guides(member) else 1
            found.append(sides * sum(_filled(own) if member.stacked else own))
        return tuple(found)

    def unanswered(self, questions: Sequence[Questions], samples: int) -> Int[Array, ""]:
        """How many of the questions find no slot."""
        block, groups = block_of(questions), [group for member in self.members for group in member.groups]
        wanted = jnp.where(shares_of(questions, block) != 0, entries_of(questions, block), -1).reshape(self.ways, -1)
        asked = (_among(wanted, group).sum(1) for group in groups)
        lost = [jnp.maximum(n - count, 0) for n, count in zip(asked, self.counts(questions, samples), strict=True)]
        return jnp.stack(lost).sum().astype(jnp.int32)

    def _count(self, number: int, group: tuple[int, ...], questions: Sequence[Questions], samples: int) -> int:
        count = 0
        for each in questions:
            most = each.bank.size // self.ways
            if each.entry is not None:
                count += most if each.entry in group else 0
            elif self.slots is not None:
                count += min(self.slots.of(number, samples // self.ways), most)
            elif any(entry < len(self.table.teachers) or entry == self.table.base for entry in group):
                count += most
        return count

    def _hear(
        self, member: Member, counts: tuple[int, ...], wanted: Int[Array, "w r"], asking: "_Asking", apart: bool
    ) -> tuple[Array, ...]:
        """What a member says at every row that asks it, 0 elsewhere."""
        counts, tile = _filled(counts) if member.stacked else counts, tile_of(counts)
        seats = [_Seats.of(_among(wanted, group), count) for group, count in zip(member.groups, counts, strict=True)]
        null = self.null if apart or self._guides(member) else None
        if not sum(counts):
            nothing = jnp.zeros((self.ways, 0, *asking.rows.x.shape[1:]), jnp.float32)
            said = (nothing,) * (3 if apart else 1)
        else:
            local = np.zeros(len(self.table.guidance), np.int32)
            local[list(member.entries)] = np.arange(len(member.entries))
            asking = dataclasses.replace(asking, local=jnp.asarray(local)[asking.entries])
            picked = jax.tree.map(lambda leaf: jnp.concatenate([each.take(leaf) for each in seats], 1), asking)
            ask = partial(_say_stack, tile, counts) if member.stacked else _say
            said = ask(member, null, apart, picked)
        ends = np.cumsum(counts)
        parts = [jnp.split(each, ends[:-1], axis=1) for each in said]
        return tuple(sum(seat.back(part) for seat, part in zip(seats, each, strict=True)) for each in parts)  # type: ignore[misc]

    def _guides(self, member: Member) -> bool:
        """Whether any of its entries needs the empty prompt; the base is asked under the teachers' scales."""
        scales = (self.table.guidance[entry] for entry in member.entries)
        return any(scale != 1 for scale in scales) or (self.table.base in member.entries and self.table.guided)


def tile_of(counts: Sequence[int]) -> int:
    """The most rows of a device that the networks of a stack go through at once: as many as leave few slots empty."""
    asked = [count for count in counts if count]
    sizes = range(max(asked, default=1), 0, -1)
    return next(t for t in sizes if sum(-(-count // t) * t for count in asked) <= (1 + SURPLUS) * sum(asked))


def _filled(counts: Sequence[int]) -> tuple[int, ...]:
    """Whole tiles."""
    tile = tile_of(counts)
    return tuple(-(-count // tile) * tile for count in counts)


@struct.dataclass
class _Asking:
    """What is known of each row: a forward's inputs, its guidance scale, its entry, by the panel and by its member."""

    rows: Rows
    scales: Float[Array, "*n"]
    entries: Int[Array, "*n"]
    local: Int[Array, "*n"]


@struct.dataclass
class _Seats:
    """Which of a device's r rows fill a group's c slots, and in which slot each of those that ask is."""

    filled: Int[Array, "w c"]
    mine: Bool[Array, "w r"]
    place: Int[Array, "w r"]

    @classmethod
    def of(cls, mine: Bool[Array, "w r"], count: int) -> "_Seats":
        """The first `count` that ask, in their order; where fewer do, rows that do not fill the rest."""
        filled = jnp.argsort(~mine, axis=1, stable=True)[:, :count]
        filled = jnp.pad(filled, ((0, 0), (0, count - filled.shape[1])))
        return cls(filled, mine, jnp.cumsum(mine, axis=1) - 1)

    def take(self, leaf: Array) -> Array:
        """`[w·r, …]` → `[w, c, …]`."""
        return _within(leaf.reshape(*self.mine.shape, *leaf.shape[1:]), self.filled)

    def back(self, said: Array) -> Array:
        """`[w, c, …]` → `[w·r, …]`: 0 at rows that do not ask, NaN at those that found no slot."""
        count, lost = said.shape[1], jnp.full((), jnp.nan, said.dtype)
        over = (...,) + (None,) * (said.ndim - 2)
        heard = lost
        if count:
            heard = jnp.where((self.place < count)[over], _within(said, jnp.clip(self.place, 0, count - 1)), lost)
        shape = (*self.mine.shape, *said.shape[2:])
        answers = jnp.where(self.mine[over], jnp.broadcast_to(heard, shape), jnp.zeros((), said.dtype))
        return answers.reshape(-1, *said.shape[2:])


def _within(rows: Array, index: Int[Array, "w c"]) -> Array:
    """`[w, r, …]` → `[w, c, …]`, each device's from its own."""
    return jax.vmap(lambda own, places: own.at[places].get(mode="promise_in_bounds"))(rows, index)


def _among(wanted: Int[Array, "w r"], group: tuple[int, ...]) -> Bool[Array, "w r"]:
    return jnp.stack([wanted == entry for entry in group]).any(0)


def _say(member: Member, null: Conditioning | None, apart: bool, asking: _Asking) -> tuple[Array, ...]:
    """One forward of all slots, `[w, c, …]`."""
    w, c = asking.entries.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(w * c, *leaf.shape[2:]), asking)
    route = flat.local if jax.tree.leaves(member.bank) else None
    said = say(member.velocity, member.variables, member.bank, flat.rows, null, lambda: flat.scales, route, apart=apart)
    return tuple(each.reshape(w, c, *each.shape[1:]) for each in said)


def _say_stack(
    tile: int, counts: tuple[int, ...], member: Member, null: Conditioning | None, apart: bool, asking: _Asking
) -> tuple[Array, ...]:
    """The same by whole networks, one tile after another; their shards are whole for one network at a time."""
    w, c = asking.entries.shape
    which = np.repeat(np.arange(len(counts)), [count // tile for count in counts])
    tiles = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(w, -1, tile, *leaf.shape[2:]), 1, 0), asking)

    def visit(_: None, inputs: tuple[Array, _Asking]) -> tuple[None, tuple[Array, ...]]:
        number, asking = inputs
        params = jax.tree.map(lambda leaf: leaf[number], member.bank)
        variables = {**member.variables, "params": params}
        return None, _say(dataclasses.replace(member, variables=variables, bank={}), null, apart, asking)

    _, said = jax.lax.scan(visit, None, (jnp.asarray(which), tiles))
    return tuple(jnp.moveaxis(each, 0, 1).reshape(w, c, *each.shape[3:]) for each in said)
