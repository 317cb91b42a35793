"""From a rollout's latents to each sample's credit, on the host: decoded, scored in the background, compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from fopd_jax.config.learning import Comparison, Decoding
from fopd_jax.evaluation.sampler import refuse_broken
from fopd_jax.parallel.agreement import together
from fopd_jax.parallel.distributed import fetch, gather_rows, held_rows, put_replicated, rows_of, spread, warn
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.rewards.combine import Normalise, combine
from fopd_jax.rewards.monitors import EXTRA_TEXT, extra_text_of
from fopd_jax.rewards.pool import Pool, Ticket, TooManyFailures
from fopd_jax.rewards.reward import Scores
from fopd_jax.running.journal import Journal, fingerprint
from fopd_jax.stages.looks import draw_group, look, metrics
from fopd_jax.stages.rewards import reward_names, task_numbers
from fopd_jax.stages.traced_scoring import Seen, see
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.worlds.prompt_stream import Drawn
from fopd_jax.worlds.world import World

IDLE = 10
"""Steps without a difference to learn from, after which that is told."""
LIMIT_S = 1800.0
"""That a reward may take for a rollout of one task: as long as a step may, before the watchdog speaks."""
_VALUES = "values"


@dataclasses.dataclass(frozen=True)
class Pending:
    """A rollout that is being scored: whose rows `drawn` are, and tickets with this process's rows of the batch."""

    step: int
    drawn: Sequence[Drawn]
    pixels: UInt8[np.ndarray, "n h w 3"]
    tickets: Sequence[tuple[np.ndarray, Ticket]]


class _Group(NamedTuple):
    """What `draw_group` asks for."""

    prompt: str
    pixels: UInt8[np.ndarray, "n h w 3"]
    rank: Float[np.ndarray, " n"]
    labels: Sequence[str]


def make_pictures(world: World, mesh: Mesh, decoding: Decoding) -> Callable[[Array], Seen]:
    """`latents [B, h, w, c] → their images`, each device's own.

    Raises:
      ValueError: the world has no decoder within a program.
    """
    if world.decoder is None:
        raise ValueError("decoding: the world has no decoder that programs can hold")
    decode = world.decoder.make(decoding, mesh)

    @jax.jit
    def draw(params: Any, latents: Array) -> Seen:
        return see(decode(params, latents))

    @functools.cache
    def params() -> Any:
        assert world.decoder is not None
        return spread(world.decoder.params(), mesh)

    return lambda latents: draw(params(), latents)


class Scoring:
    """Scores rollouts of a world's tasks by the rewards that these name, and compares them within their groups.

    `names`: of all rewards, in the order of `Credit.values`. Each process scores its own images, all have all scores.
    What its `journal` has of the same images of the same step is not asked again; `identity`: of the rewards' settings.
    """

    def __init__(
        self,
        world: World,
        mesh: Mesh,
        comparison: Comparison,
        decoding: Decoding,
        most_failed: float,
        journal: Journal,
        identity: str,
    ) -> None:
        self._world, self._mesh, self._comparison = world, mesh, comparison
        self._pictures = make_pictures(world, mesh, decoding)
        self._journal, self._identity, self._idle = journal, identity, 0
        self._shown: _Group | None = None
        self.names = reward_names(world.tasks)
        rewards = {name: world.rewards[name] for name in self.names}
        self._pool = Pool(rewards, most_failed=most_failed, outstanding=2 * len(world.tasks), limit=LIMIT_S)

    def begin(self, step: int, latents: Array, drawn: Sequence[Drawn]) -> Pending:
        """Decode a step's rollout, and begin to score it; waits until the latents are there.

        Raises:
          ValueError: an image is not finite; names its prompt.
        """
        mine = rows_of(batch_sharding(self._mesh), len(drawn))
        images = self._pictures(latents)  # on every process's devices, before any waits for another

        def submit() -> Pending:
            pixels, tickets = held_rows(images.pixels), []
            own = [drawn[int(row)] for row in mine]
            refuse_broken(held_rows(images.finite), _named(own))
            for task, rows in _by_task(own).items():
                tickets.append((rows, self._submit(step, task, pixels[rows], [own[i] for i in rows])))
            return Pending(step, drawn, pixels, tickets)

        return together("images to score", submit)

    def _submit(self, step: int, task: str, pixels: UInt8[np.ndarray, "n h w 3"], own: Sequence[Drawn]) -> Ticket:
        prompts, metadata = [each.prompt for each in own], [each.metadata for each in own]
        of = fingerprint(self._identity, pixels, prompts, metadata)
        return self._pool.submit(
            pixels, prompts, metadata, self._names_of(task),
            known=self._journal.find(step, of), keep=partial(self._journal.add, step, of),
        )  # fmt: skip

    def _names_of(self, task: str) -> tuple[str, ...]:
        """Of a task's rewards."""
        return tuple(self._world.tasks[task].rewards)

    def let_go(self, pending: Pending) -> None:
        """Nobody will learn of that rollout."""
        for _, ticket in pending.tickets:
            ticket.give_up()

    def finish(self, pending: Pending) -> tuple[Credit, dict[str, float]]:
        """Wait for the scores, and compare; how the images look, see `looks.metrics`.

        Raises:
          TooManyFailures: of any process, on all; see `Pool`.
        """
        drawn = pending.drawn

        def wait() -> dict[str, np.ndarray]:
            seen, own = look(pending.pixels), len(pending.pixels)
            values, extra = np.full((own, len(self.names)), np.nan), np.full(own, np.nan)
            for rows, scores in self._collected(pending):
                extra[rows] = extra_text_of(scores, len(rows))
                for name, each in scores.items():
                    values[rows, self.names.index(name)] = each.values
            return {**seen, EXTRA_TEXT: extra, _VALUES: values}

        seen = self._gathered(together("scores", wait), len(drawn))
        credit = self._credit(drawn, seen.pop(_VALUES))
        measured = self._measured(pending.step, drawn, pending.pixels, credit, seen)
        return put_replicated(credit, replicated(self._mesh)), measured

    def finish_within(self, step: int, drawn: Sequence[Drawn], credit: Credit, images: Seen) -> dict[str, float]:
        """The second half of the same for a rollout that a program has scored: its failures are counted, its images
        looked at. Waits for that program; of several processes also for whatever their devices were given after it.

        Raises:
          ValueError: an image is not finite; names its prompt.
          TooManyFailures: as `finish`.
        """
        mine = rows_of(batch_sharding(self._mesh), len(drawn))
        credit, pixels, finite = fetch(credit), held_rows(images.pixels), held_rows(images.finite)

        def wait() -> dict[str, np.ndarray]:
            own = [drawn[int(row)] for row in mine]
            refuse_broken(finite, _named(own))
            for task, rows in _by_task(own).items():
                values = {name: credit.values[self.names.index(name), mine[rows]] for name in self._names_of(task)}
                self._pool.count({name: _scores(each) for name, each in values.items()})
            return {**look(pixels), EXTRA_TEXT: np.full(len(mine), np.nan)}  # what is traced does not tell what it read

        seen = self._gathered(together("scores", wait), len(drawn))
        return self._measured(step, drawn, pixels, credit, seen)

    def _gathered(self, own: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        return dict(gather_rows(own, batch_sharding(self._mesh), size))

    def _measured(
        self,
        step: int,
        drawn: Sequence[Drawn],
        pixels: UInt8[np.ndarray, "n h w 3"],
        credit: Credit,
        seen: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        """How a scored rollout looks; `pixels`: this process's, `seen`: of the whole batch."""
        self._tell_of_nothing(step, bool((credit.valid & ~credit.flat).any()))
        self._shown = self._first_group(drawn, pixels, credit)
        return metrics(seen, np.array([each.group for each in drawn]))

    def _tell_of_nothing(self, step: int, learns: bool) -> None:
        """Once, where rewards tell no image from another for long."""
        self._idle = 0 if learns else self._idle + 1
        if self._idle == IDLE:
            warn(
                f"step {step + 1}: nothing was learnt in {IDLE} steps: all images of a prompt have the same reward, or "
                "none. See reward/, failed/ and flat_share in the metrics, and the picture of rollouts"
            )

    def picture(self) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """Of the rollout scored last, this process's first group; nothing before there is one."""
        return {"rollouts": draw_group(*self._shown)} if self._shown else {}

    def _first_group(self, drawn: Sequence[Drawn], pixels: UInt8[np.ndarray, "n h w 3"], credit: Credit) -> _Group:
        mine = rows_of(batch_sharding(self._mesh), len(drawn))
        first = drawn[int(mine[0])]
        chosen = np.array([i for i, row in enumerate(mine) if drawn[int(row)].group == first.group])
        asked, values = credit.asked[:, mine[chosen]].T, credit.values[:, mine[chosen]].T
        labels = [self._label(*each) for each in zip(asked, values, strict=True)]
        rank = np.where(credit.valid, credit.advantage, -np.inf)[mine[chosen]]
        return _Group(first.prompt, pixels[chosen], rank, labels)

    def _label(self, asked: Bool[np.ndarray, " r"], values: Float[np.ndarray, " r"]) -> str:
        said = zip(self.names, asked, values, strict=True)
        return ", ".join(f"{name} {'failed' if np.isnan(v) else format(v, '.3f')}" for name, there, v in said if there)

    def _collected(self, pending: Pending) -> list[tuple[np.ndarray, Mapping[str, Scores]]]:
        """By rows the scores of this process's images, once all are there."""
        try:
            return [(rows, ticket.result()) for rows, ticket in pending.tickets]
        except TooManyFailures:
            self._journal.reject(pending.step)
            raise

    def _credit(self, drawn: Sequence[Drawn], values: Float[np.ndarray, "b r"]) -> Credit:
        weights = self._weights(drawn)
        found = {name: _scores(values[:, k]) for k, name in enumerate(self.names)}
        settings, groups = self._comparison, np.array([each.group for each in drawn])
        normalise = cast(Normalise, settings.normalise)
        advantages = combine(found, weights, groups, normalise, settings.clip)
        return Credit(
            advantage=advantages.values.astype(np.float32),
            values=values.T.astype(np.float32),
            asked=self._asked(drawn),
            valid=advantages.valid,
            flat=advantages.flat,
            task=task_numbers(self._world.tasks, drawn),
        )

    def _weights(self, drawn: Sequence[Drawn]) -> Mapping[str, Float[np.ndarray, " b"]]:
        """Of each reward its weight for each sample: 0 where the sample's task does not name it."""
        tasks = self._world.tasks
        return {name: np.array([tasks[each.task].rewards.get(name, 0.0) for each in drawn]) for name in self.names}

    def _asked(self, drawn: Sequence[Drawn]) -> Bool[np.ndarray, "r b"]:
        tasks = self._world.tasks
        return np.array([[name in tasks[each.task].rewards for each in drawn] for name in self.names])

    def close(self) -> None:
        """Give up what is not scored yet."""
        self._pool.close()


def _by_task(own: Sequence[Drawn]) -> dict[str, Int[np.ndarray, " k"]]:
    """Which of these rows each task has."""
    tasks = dict.fromkeys(each.task for each in own)
    return {task: np.array([i for i, each in enumerate(own) if each.task == task]) for task in tasks}


def _named(drawn: Sequence[Drawn]) -> list[str]:
    return [f"prompt {each.prompt!r}" for each in drawn]


def _scores(values: Float[np.ndarray, " b"]) -> Scores:
    failed = np.isnan(values)
    return Scores(values, failed, tuple({"error": "no score"} if each else {} for each in failed))
