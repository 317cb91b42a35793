"""Where in the space of skills each training prompt stands, and what a student is taught there (CapField-OPD).

At coordinates c the target is v_base + Σ_k c_k·(v_k - v_base): the base at 0, a teacher at e_k, all their gains at
(1, …, 1), beyond them above. As questions to a panel it is a mix: c_k of each teacher, and 1 - Σ_k c_k of the base.
What teachers gain in common adds up at (1, …, 1), too; so a prompt that stands at several skills together may have its
own teacher alone ('routed'), where CapField-OPD has one that was trained on all.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from fopd_jax.config.teaching import Coordinates
from fopd_jax.worlds.prompt_stream import Mix

_STREAM = 0xC00D  # beside seed and step, so that prompts are drawn apart


@dataclasses.dataclass(frozen=True)
class DrawnCoordinates:
    """Coordinates as a function of seed, step and the draw's number in it; see `config.teaching.Coordinates`.

    `skills`: the tasks in the bank's order; `base`: the base's entry there.
    """

    skills: tuple[str, ...]
    settings: Coordinates
    seed: int
    base: int

    def __call__(
        self, step: int, numbers: Int[np.ndarray, " n"], tasks: Sequence[str]
    ) -> tuple[Float[np.ndarray, "n k"], Mix]:
        """Of some draws of a step, whose tasks are given: where they stand, and who teaches them there."""
        skills = len(self.skills)
        # Filled row by row: a row does not depend on how many there are.
        uniform = np.random.default_rng((self.seed, step, _STREAM)).random((numbers.max() + 1, 2 * skills + 4))
        own = np.eye(skills)[[self.skills.index(task) for task in tasks]]
        coordinates, taught = stand(self.settings, own, uniform[numbers])
        weights = np.concatenate([taught, 1 - taught.sum(1, keepdims=True)], axis=1).astype(np.float32)
        bank = np.broadcast_to(np.asarray([*range(skills), self.base], np.int32), weights.shape)
        return coordinates.astype(np.float32), Mix(bank, np.repeat(weights[:, None], 2, axis=1))


def stand(
    settings: Coordinates, own: Float[np.ndarray, "n k"], uniform: Float[np.ndarray, "n u"]
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Coordinates, and the teachers' weights there; `own`: e_k of each row's task, `uniform`: 2·K + 4 numbers a row."""
    skills = own.shape[1]
    kind, scale, count = uniform[:, :3].T[..., None]
    rank = (uniform[:, 3 : 3 + skills] - own).argsort(1).argsort(1)  # one's own is the first
    together = np.where(rank < 2 + np.floor(count * (skills - 1)), 1.0, 0.0)
    gaps = -np.log1p(-uniform[:, 3 + skills :])  # K + 1 exponentials, by their sum: uniform on the simplex
    between = gaps[:, :skills] / gaps.sum(1, keepdims=True)
    ends = np.cumsum([settings.alone, settings.joint, settings.base])
    alone, joint, nothing = (kind < end for end in ends)
    factor = 2 - settings.high + (2 * settings.high - 2) * scale
    coordinates = factor * np.select([alone, joint, nothing], [own, together, np.zeros_like(own)], between)
    routed = joint & (settings.joint_target == "routed")
    return coordinates, np.where(routed, factor * own, coordinates)
