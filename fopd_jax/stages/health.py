"""Section `health` of a distillation: fixed states, who says what there, and which teachers are not worth following."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from fopd_jax.config.schema import OPD
from fopd_jax.config.stages import taught
from fopd_jax.evaluation import teacher_health
from fopd_jax.evaluation.fixed_states import Fixed, States, StudentGaps, held_out, mean_gaps
from fopd_jax.evaluation.health_picture import draw_health
from fopd_jax.parallel.distributed import put_replicated, warn
from fopd_jax.parallel.sharding import replicated
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.pipeline import Pipeline
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.worlds.world import World

PICTURE = "health.png"


def surveys(config: OPD) -> bool:
    """Whether anything of a run needs fixed states.

    Raises:
      ValueError: teachers are to be weighed by states that there are none of.
    """
    health = config.health
    if not health.fixed_states and health.noisy == "weigh":
        raise ValueError("health.fixed_states: found 0, expected at least 1 where health.noisy is 'weigh'")
    return health.fixed_states > 0 and (config.run.eval_every > 0 or health.noisy != "off")


def asked_prompts(config: OPD, world: World) -> list[str]:
    """Prompts of fixed states, for worlds that have to prepare them."""
    count = config.health.fixed_states if surveys(config) else 0
    return [prompt for name in taught(config) for prompt in held_out(world, name, count)]


@dataclasses.dataclass
class HealthWatch:
    """What a run knows of its teachers from before its first step, and the student's distance at evaluations.

    `statistics`: of each voice; `named`: the voices outside of their bands, and how, in words. `last`: the gaps
    measured last `[L, tasks, n]`, to be drawn.
    """

    fixed: Fixed
    states: States
    sigma: np.ndarray
    image: np.ndarray
    disagreement: dict[str, float]
    statistics: dict[str, dict[str, float]]
    between: np.ndarray
    named: dict[str, str]
    student: StudentGaps
    last: np.ndarray | None = None

    def measure(self, frozen: Frozen, trained: Tree) -> dict[str, float]:
        """Metrics of these weights of the student, and those of the teachers, which stay as they are."""
        teachers = {
            f"teachers/{statistic}/{name}": value
            for name, known in self.statistics.items()
            for statistic, value in known.items()
        }
        return self.gaps(frozen, trained) | self.disagreement | teachers

    def gaps(self, frozen: Frozen, trained: Tree) -> dict[str, float]:
        """`fixed/TASK/…`: how far these weights of the student are from the teachers."""
        fixed = self.fixed
        found = np.asarray(self.student(frozen, trained, self.states), np.float64)
        self.last = found[:, : len(fixed.tasks) * fixed.count].reshape(len(found), len(fixed.tasks), fixed.count)
        return mean_gaps(fixed.tasks, fixed.pictured, self.sigma, self.image, self.last)

    def picture(self) -> Image.Image:
        """Of what was measured last."""
        assert self.last is not None
        own = ~self.image
        curves = {
            name: list(zip(self.sigma[own].tolist(), self.last[own, k].mean(-1).tolist(), strict=True))
            for k, name in enumerate(self.fixed.tasks)
        }
        return draw_health((*self.fixed.voices, teacher_health.BASE), self.between, curves)


def watch_health(config: OPD, pieces: Pieces, pipeline: Pipeline, frozen: Frozen) -> HealthWatch | None:
    """Survey the fixed states, where the config has some, and tell of teachers outside of their bands."""
    if not surveys(config):
        return None
    voices, fixed = voices_of(config), fixed_states(config, pieces, pipeline)
    states, seen = fixed.survey(frozen)
    sigma, image = np.asarray(states.sigma), np.asarray(states.image)
    route = np.repeat(np.arange(len(fixed.tasks)), fixed.count)
    pictured = np.asarray([name in fixed.pictured for name in fixed.tasks])
    counted = ~image[:, None] | pictured[route][None]
    anchor = voices.index(config.anchor.name) if config.anchor.name in voices else None
    found = teacher_health.statistics(seen, counted, anchor)
    statistics = {
        name: {kind: float(values[k]) for kind, values in found.items() if np.isfinite(values[k])}
        for k, name in enumerate(voices)
    }
    named = {} if config.health.noisy == "off" else _named(config, statistics)
    return HealthWatch(
        fixed, states, sigma, image, teacher_health.disagreement(seen, counted, voices), statistics,
        teacher_health.matrix(seen, counted), named, fixed.student(),
    )  # fmt: skip


def voices_of(config: OPD) -> tuple[str, ...]:
    """The tasks' teachers, and the anchor where it is another one; of several networks where it is asked."""
    anchor, names = config.anchor, taught(config)
    there = bool(anchor.network or anchor.adapter) and (config.objective.mar_beta > 0 or not config.networks)
    return (*names, anchor.name) if there and anchor.name not in names else names


def fixed_states(config: OPD, pieces: Pieces, pipeline: Pipeline) -> Fixed:
    """Those of a config; images are there in worlds that render their own, or beside a task's prompts."""
    world = pipeline.world
    rendered = world.pairs is not None and pipeline.manifest is None
    pictured = {name for name in taught(config) if rendered or (world.pairs is not None and world.tasks[name].images)}
    return Fixed(
        pieces, world, pipeline.mesh, voices_of(config), config.health.fixed_states, config.eval.seed,
        frozenset(pictured),
    )  # fmt: skip


def trust(config: OPD, watch: HealthWatch | None, pipeline: Pipeline) -> Any:
    """What each teacher's term counts `[K]`, on every device; None where teachers are not weighed."""
    if config.health.noisy != "weigh" or watch is None:
        return None
    counts = [config.health.weight if name in watch.named else 1.0 for name in taught(config)]
    return put_replicated(np.asarray(counts, np.float32), replicated(pipeline.mesh))


def _named(config: OPD, statistics: dict[str, dict[str, float]]) -> dict[str, str]:
    """Voices outside of a band, each told in a line."""
    named = {
        name: "; ".join(words.values())
        for name, known in statistics.items()
        if (words := teacher_health.outside(known, config.health.bands))
    }
    for name, words in named.items():
        field = f"tasks.{name}.teacher" if name in config.tasks else "anchor.adapter"
        weighs = config.health.noisy == "weigh" and name in config.tasks
        then = f"its part of the loss counts {config.health.weight:g}" if weighs else "it is followed like the others"
        warn(f"{field}: {name} may be noisy ({words}); {then} (health.noisy)")
    return named
