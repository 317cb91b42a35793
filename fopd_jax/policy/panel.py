"""Who is asked for velocities, about which samples, and how the answers are summed.

A *question* about a sample is a bank entry and a coefficient; a *target* is the sum of the answers to a sample's m
questions. Hard routing is one question of coefficient 1; soft routing asks K teachers, `v = Σ α_k·v_k`; extrapolation
asks the teacher with 1 + λ and the base with -λ, `v = v_k + λ·(v_k - v_base)`; the anchor is a second target. A panel
answers all questions at once. Entries of the bank are adapters on one network; of several networks see `policy.groups`.

A guided velocity is linear in its scale, so however many teachers a sample has, the base is asked about it once: under
the mean of their scales by α_k·λ_k. (Where these cancel though the scales differ, they are taken to sum up to 1e-6.)

Rows stay on the devices that hold them: joining sharded batches end to end would cost an all-to-all at every timestep,
so the rows of all questions are interleaved, sample by sample, and samples are picked by selection, not by gathering.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.flow.transition import at_least_float32
from fopd_jax.policy.guidance import guided
from fopd_jax.policy.velocity import Tree, Velocity, branches
from fopd_jax.worlds.prompt_stream import Mix

_LEAST_TOTAL = 1e-6


@struct.dataclass
class Questions:
    """What makes up one target: of each of n samples m questions, `bank [n, m]` with `coefficient [n, m]`.

    All samples of the batch are asked about, or one of every `every` neighbours, the one at `pick [n]` among them.
    `coefficient` None: 1, where m is 1. `scale [n, m]`: of guidance; None: the entries' own. `branches`: the answer is
    not guided, but the velocity under the prompt and what it differs from that under the empty one. `entry`: the only
    one that is asked, where that is known beforehand.
    """

    bank: Any  # int32 arrays and float ones; Any because tree operations put anything into a leaf
    coefficient: Any = None
    pick: Any = None
    every: int = struct.field(pytree_node=False, default=1)
    scale: Any = None
    branches: bool = struct.field(pytree_node=False, default=False)
    entry: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Answer:
    """A target's velocity `[B, h, w, c]` at every sample, and how often it counts there `[B]` (None: once).

    Where one of m neighbours was asked about, all m hold its velocity, and it alone counts, m times. `difference`: of
    the branches, where they were asked for.
    """

    velocity: Any
    counts: Any = None
    difference: Any = None


@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """Who teaches what: the tasks with a teacher, in the bank's order, and each bank entry's guidance scale.

    `anchor`: the anchor's bank entry, where there is one. `extrapolation`: λ of each teacher; where one is not 0, or a
    mix names the base among the teachers, `base` is its entry.

    Raises:
      ValueError: a teacher, the anchor or the base has no scale, that is, no entry.
    """

    teachers: tuple[str, ...]
    guidance: tuple[float, ...]
    anchor: int | None = None
    extrapolation: tuple[float, ...] = ()
    base: int | None = None

    def __post_init__(self) -> None:
        needed = max(len(self.teachers), *(0 if each is None else each + 1 for each in (self.anchor, self.base)))
        if len(self.guidance) < needed:
            raise ValueError(f"guidance: found {len(self.guidance)} scales, expected {needed}, one for each bank entry")

    @classmethod
    def of_tasks(cls, teachers: Mapping[str, float], anchor: float | None) -> "RoutingTable":
        """From each routed task's guidance scale and the anchor's, if it is asked; the anchor follows the teachers."""
        scales = tuple(teachers.values())
        if anchor is None:
            return cls(tuple(teachers), scales)
        return cls(tuple(teachers), (*scales, anchor), len(scales))

    @property
    def guided(self) -> bool:
        """Whether any entry needs the empty prompt."""
        return any(scale != 1 for scale in self.guidance)

    def routes(self, tasks: Sequence[str], prompts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Hard routing T(c) = k: each prompt's bank entry, by its task.

        Raises:
          ValueError: a prompt's task has no teacher; names prompt, task and the teachers there are.
        """
        index = {name: i for i, name in enumerate(self.teachers)}
        for task, prompt in zip(tasks, prompts, strict=True):
            if task not in index:
                short = prompt if len(prompt) <= 60 else f"{prompt[:60]}…"
                problem = f"prompt {short!r}: its task {task!r} has no teacher; teachers: {self.teachers}"
                problem += "; routing.method 'classifier' would find one by the prompt"
                raise ValueError(f"tasks.{task}.teacher: {problem}")
        return np.asarray([index[task] for task in tasks], np.int32)

    def questions(
        self,
        route: Int[Array, " b"],
        every: int = 1,
        pick: Int[Array, " n"] | None = None,
        mix: Mix | None = None,
        sigma: Float[Array, "*s"] | float = 0.0,
        *,
        branches: bool = False,
    ) -> tuple[Questions, ...]:
        """Each sample's own teacher, or several by `mix` at the noise level `sigma`; and of the anchor all samples or
        one of every `every`, the one at `pick`.
        """
        own = Questions(route[:, None]) if mix is None else self._mixed(route, mix, jnp.asarray(sigma))
        own = dataclasses.replace(self._extrapolated(own), branches=branches)
        if self.anchor is None:
            return (own,)
        anchor = jnp.full((route.shape[0] // every, 1), self.anchor, route.dtype)
        return own, Questions(anchor, pick=pick, every=every, branches=branches, entry=self.anchor)

    def _mixed(self, route: Int[Array, " b"], mix: Mix, sigma: Array) -> Questions:
        """Several teachers a sample; the base, where it is one of them, under the scale of the sample's own teacher."""
        own = Questions(mix.bank, mix.at(sigma))
        if self.base is None:
            return own
        scales = jnp.asarray(self.guidance, jnp.float32)
        return dataclasses.replace(
            own, scale=jnp.where(mix.bank == self.base, scales[route][:, None], scales[mix.bank])
        )

    def _extrapolated(self, own: Questions) -> Questions:
        """With one question more, to the base: Σ α_k·(v_k + λ_k·(v_k - v_base)), each under its teacher's scale."""
        if self.base is None or not any(self.extrapolation):
            return own
        shares = jnp.ones(own.bank.shape) if own.coefficient is None else own.coefficient
        scales = _scales(own, jnp.asarray(self.guidance, float))
        lambdas = self.extrapolation + (0.0,) * (len(self.guidance) - len(self.extrapolation))
        beyond = shares * jnp.asarray(lambdas, float)[own.bank]
        total, scaled = beyond.sum(1, keepdims=True), (beyond * scales).sum(1, keepdims=True)
        total = jnp.where((scaled != 0) & (jnp.abs(total) < _LEAST_TOTAL), _LEAST_TOTAL, total)
        scale = scaled / jnp.where(total == 0, 1.0, total)
        return Questions(
            bank=jnp.concatenate([own.bank, jnp.full_like(own.bank[:, :1], self.base)], axis=1),
            coefficient=jnp.concatenate([shares + beyond, -total], axis=1),
            scale=jnp.concatenate([scales, scale], axis=1),
        )


@runtime_checkable
class Panel(Protocol):
    """Answers questions about a batch; `sigma` is 0-d, or one value a sample."""

    def ask(
        self, x: Array, sigma: Array, conditioning: Conditioning, questions: Sequence[Questions]
    ) -> tuple[Answer, ...]:
        """One answer for each target that the questions make up."""
        ...


def make_panel(
    velocity: Velocity,
    table: RoutingTable,
    variables: Tree,
    bank: Tree,
    null: Conditioning,
    *,
    branches: bool = False,
) -> Panel:
    """The panel over a bank of adapters on the network `variables`.

    `null`: the empty prompt (one row). `branches`: questions will ask for them.
    """
    return AdapterPanel(velocity, table.guidance, variables, bank, null if table.guided or branches else None)


@dataclasses.dataclass(frozen=True)
class AdapterPanel:
    """One network under a bank of adapters: the questions of all targets are rows of one routed forward.

    `guidance`: a scale per bank entry; `null` None: all of them are 1.
    """

    velocity: Velocity
    guidance: tuple[float, ...]
    variables: Tree
    bank: Tree
    null: Conditioning | None

    def ask(
        self, x: Array, sigma: Array, conditioning: Conditioning, questions: Sequence[Questions]
    ) -> tuple[Answer, ...]:
        """See `Panel`.

        Raises:
          ValueError: two targets are asked about subsets of different sizes.
        """
        block = block_of(questions)
        entries = entries_of(questions, block)
        rows = rows_of(questions, block, x, sigma, conditioning)
        scales = partial(scales_of, questions, block, self.guidance)
        apart = any(each.branches for each in questions)
        said = say(self.velocity, self.variables, self.bank, rows, self.null, scales, entries, apart=apart)
        return answered(said, questions, block)


@struct.dataclass
class Rows:
    """What a forward reads of n rows."""

    conditioning: Any
    x: Any
    sigma: Any


def say(
    velocity: Velocity,
    variables: Tree,
    bank: Tree,
    rows: Rows,
    null: Conditioning | None,
    scales: Callable[[], Array],
    route: Array | None,
    *,
    apart: bool,
) -> tuple[Array, ...]:
    """One network's velocity at every row, guided by `scales()` [n] where there is an empty prompt `null`; if branches
    are asked for `apart`, then also that under the prompt, and what it differs from that under the empty one.
    """
    if null is None:
        return (velocity(variables, bank, rows.x, rows.sigma, rows.conditioning, route),)
    text, empty = branches(velocity, variables, bank, rows.x, rows.sigma, rows.conditioning, null, route)
    velocities = guided(text, empty, scales())
    return (velocities, text, text - empty) if apart else (velocities,)


def answered(said: Sequence[Array], questions: Sequence[Questions], block: int) -> tuple[Answer, ...]:
    """An answer to each target from what was said at its rows, see `say`."""
    answers = _answers(said[0], questions, block)
    if len(said) == 1:
        return answers
    sides = zip(questions, answers, *(_answers(each, questions, block) for each in said[1:]), strict=True)
    return tuple(
        dataclasses.replace(plain, difference=apart.velocity) if each.branches else answer
        for each, answer, plain, apart in sides
    )


# ---- rows of one forward, in blocks of `block` neighbours: of each block the rows of the first target, then the next's


def block_of(questions: Sequence[Questions]) -> int:
    """How many neighbours a block holds.

    Raises:
      ValueError: two targets are asked about subsets of different sizes.
    """
    block = max(each.every for each in questions)
    if any(each.every not in (1, block) for each in questions):
        raise ValueError(f"every: found {[each.every for each in questions]}, expected 1 or one other number")
    return block


def entries_of(questions: Sequence[Questions], block: int) -> Int[Array, " n"]:
    """The bank entry that each row asks."""
    return _joined([each.bank.reshape(-1, _rows_of(each, block)) for each in questions])


def shares_of(questions: Sequence[Questions], block: int) -> Float[Array, " n"]:
    """The coefficient of each row's answer."""
    shares = (jnp.ones(each.bank.shape) if each.coefficient is None else each.coefficient for each in questions)
    return _joined([share.reshape(-1, _rows_of(each, block)) for share, each in zip(shares, questions, strict=True)])


def scales_of(questions: Sequence[Questions], block: int, guidance: Sequence[float]) -> Float[Array, " n"]:
    """The guidance scale of each row."""
    own = jnp.asarray(guidance, float)
    scales = (_scales(each, own) for each in questions)
    return _joined([scale.reshape(-1, _rows_of(each, block)) for scale, each in zip(scales, questions, strict=True)])


def _scales(questions: Questions, own: Float[Array, " k"]) -> Float[Array, "n m"]:
    """Of each question: the entry's own, where none is said."""
    return own[questions.bank] if questions.scale is None else questions.scale


def rows_of(questions: Sequence[Questions], block: int, x: Array, sigma: Array, conditioning: Conditioning) -> Rows:
    """Every target's rows of a batch."""
    batch = Rows(conditioning, x, jnp.broadcast_to(sigma, x.shape[:1]))
    return jax.tree.map(lambda leaf: _joined([_asked(leaf, each, block) for each in questions]), batch)


def _rows_of(questions: Questions, block: int) -> int:
    """A target's rows in each block."""
    return block // questions.every * questions.bank.shape[1]


def _joined(parts: Sequence[Array]) -> Array:
    """`[B/block, rows, …]` of all targets as rows."""
    joined = jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def _asked(leaf: Array, questions: Questions, block: int) -> Array:
    """The rows that one target needs of a batch, `[B/block, rows, …]`: every sample that it is asked about, m times."""
    blocks = leaf.reshape(-1, block, *leaf.shape[1:])
    if questions.every > 1:
        blocks = _picked(blocks, questions.pick)[:, None]
    return jnp.repeat(blocks, questions.bank.shape[1], axis=1)


def _picked(blocks: Array, pick: Array) -> Array:
    """Of each block the entry at `pick`; a selection, not a gather, which could move rows between devices."""
    picked = blocks[:, 0]
    for k in range(1, blocks.shape[1]):
        picked = jnp.where((pick == k).reshape(-1, *(1,) * (picked.ndim - 1)), blocks[:, k], picked)
    return picked


def _answers(v: Array, questions: Sequence[Questions], block: int) -> tuple[Answer, ...]:
    """The rows' velocities parted by target, summed over each sample's questions, and spread to all samples."""
    counts = [_rows_of(each, block) for each in questions]
    blocks = v.reshape(-1, sum(counts), *v.shape[1:])
    parts = [blocks[:, end - count : end] for count, end in zip(counts, np.cumsum(counts), strict=True)]
    return tuple(spread(_summed(part, each), each) for part, each in zip(parts, questions, strict=True))


def _summed(part: Array, questions: Questions) -> Array:
    """`[n, h, w, c]`, Σ_m coefficient·velocity."""
    answers = part.reshape(*questions.bank.shape, *part.shape[2:])
    if questions.coefficient is None:
        return answers[:, 0]
    return (questions.coefficient[..., None, None, None] * at_least_float32(answers)).sum(1)


def asked_rows(tree: Tree, questions: Questions) -> Tree:
    """The samples that a target of one question a sample is asked about, all of them or one of every few neighbours."""
    if questions.every == 1:
        return tree
    return jax.tree.map(lambda leaf: _asked(leaf, questions, questions.every)[:, 0], tree)


def spread(v: Array, questions: Questions) -> Answer:
    """A target's velocities, one for each row that it was asked about, at every sample of the batch."""
    every = questions.every
    if every == 1:
        return Answer(v)
    counts = jnp.where(jnp.arange(every)[None] == questions.pick[:, None], float(every), 0.0)
    return Answer(jnp.repeat(v, every, axis=0), counts.reshape(-1))
