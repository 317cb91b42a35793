"""From a rollout's latents to each sample's credit, on the host: decoded, scored in the background, compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from fopd_jax.config.learning import Comparison
from fopd_jax.evaluation.sampler import check_finite
from fopd_jax.parallel.agreement import together
from fopd_jax.parallel.distributed import gather_rows, held_rows, put_replicated, rows_of
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.rewards.combine import Normalise, combine
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.pool import Pool, Ticket
from fopd_jax.rewards.reward import Scores
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.worlds.prompt_stream import Drawn
from fopd_jax.worlds.world import World


@dataclasses.dataclass(frozen=True)
class Pending:
    """A rollout that is being scored: whose rows `drawn` are, and tickets with this process's rows of the batch."""

    drawn: Sequence[Drawn]
    tickets: Sequence[tuple[np.ndarray, Ticket]]


class Scoring:
    """Scores rollouts of a world's tasks by the rewards that these name, and compares them within their groups.

    `names`: of all rewards, in the order of `Credit.values`. Each process scores its own images, all have all scores.
    """

    def __init__(self, world: World, mesh: Mesh, comparison: Comparison, most_failed: float) -> None:
        self._world, self._mesh, self._comparison = world, mesh, comparison
        self.names = tuple(dict.fromkeys(name for task in world.tasks.values() for name in task.rewards))
        rewards = {name: world.rewards[name] for name in self.names}
        self._pool = Pool(rewards, most_failed=most_failed, outstanding=2 * len(world.tasks))

    def begin(self, latents: Array, drawn: Sequence[Drawn]) -> Pending:
        """Decode, and begin to score; waits until the latents are there.

        Raises:
          ValueError: an image is not finite; names its prompt.
        """
        mine = rows_of(batch_sharding(self._mesh), len(drawn))

        def submit() -> Pending:
            images = self._world.decode(held_rows(latents))
            own = [drawn[int(row)] for row in mine]
            check_finite(images, [f"prompt {each.prompt!r}" for each in own])
            pixels, tickets = to_pixels(images), []
            for task in dict.fromkeys(each.task for each in own):
                rows = np.array([i for i, each in enumerate(own) if each.task == task])
                prompts, metadata = [own[i].prompt for i in rows], [own[i].metadata for i in rows]
                names = tuple(self._world.tasks[task].rewards)
                tickets.append((rows, self._pool.submit(pixels[rows], prompts, metadata, names)))
            return Pending(drawn, tickets)

        return together("images to score", submit)

    def finish(self, pending: Pending) -> Credit:
        """Wait for the scores, and compare.

        Raises:
          TooManyFailures: of any process, on all; see `Pool`.
        """
        drawn, sharding = pending.drawn, batch_sharding(self._mesh)
        own = len(rows_of(sharding, len(drawn)))

        def wait() -> Float[np.ndarray, "n r"]:
            values = np.full((own, len(self.names)), np.nan)
            for rows, ticket in pending.tickets:
                for name, scores in ticket.result().items():
                    values[rows, self.names.index(name)] = scores.values
            return values

        values = gather_rows(together("scores", wait), sharding, len(drawn))
        return put_replicated(self._credit(drawn, values), replicated(self._mesh))

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


def _scores(values: Float[np.ndarray, " b"]) -> Scores:
    failed = np.isnan(values)
    return Scores(values, failed, tuple({"error": "no score"} if each else {} for each in failed))
