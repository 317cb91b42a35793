"""What a run will do, once its input is known to be right and before anything long begins.

A plan is made without encoding a prompt, compiling a program or loading a base; `check_plan` then refuses what would
fail later: names of metrics, folders that cannot be written, disks without room.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fopd_jax.config.learning import Reinforced
from fopd_jax.config.schema import Config, Run
from fopd_jax.files import check_writable
from fopd_jax.parallel.distributed import barrier, is_main, warn
from fopd_jax.performance.flops import Update
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.resources import room_for
from fopd_jax.stages.rewards import check_prompts
from fopd_jax.stages.setup import Setup
from fopd_jax.stages.trained import Trained
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.prompts import check_overlaps
from fopd_jax.worlds.embedded import EMBEDDED
from fopd_jax.worlds.world import World

FEWEST_PROMPTS, FEWEST_IMAGES = 16, 16
"""Of a step of reinforcement learning: Flow-GRPO's own config for 4 GPUs; its issue 182 reports 8 of 8 on one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """`drawn()`: the prompts that training will ask for, each once; `metrics`: names of what an update returns.

    `held()`: what the devices hold all through training, as shapes with shardings; `cost()`: an update's FLOPs.
    `told`: lines of the stage's own, subject and text.
    """

    setup: Setup
    trained: Trained
    drawn: Callable[[], Iterable[str]]
    metrics: Sequence[str]
    held: Callable[[], Mapping[str, Tree]]
    cost: Callable[[], Update]
    told: Sequence[tuple[str, str]] = dataclasses.field(default=(), kw_only=True)

    def prompts(self) -> Iterator[str]:
        """All that the run will encode: evaluation's, then training's."""
        return itertools.chain(self.setup.eval_set.prompts(), self.drawn())

    def prepare(self) -> None:
        """Tell the world of them, which may take long."""
        self.setup.pipeline.world.prepare(self.prompts())


def check_plan(plan: Plan, config: Config, workdir: Path) -> None:
    """Refuse what would fail in the middle of the run, and tell what makes it less than it seems. Writes nothing.

    Raises:
      ValueError: names the field or folder.
    """
    run, world = config.run, plan.setup.pipeline.world
    if unknown := sorted(run.alarms.keys() - set(plan.metrics)):
        raise ValueError(f"run.alarms: no metric {unknown[0]!r}, expected some of {', '.join(sorted(plan.metrics))}")
    check_best(run, plan.setup)
    check_prompts(plan.setup.eval_set.tasks, world.rewards)
    if is_main():
        room_for(check_writable(workdir, "--workdir"), plan.trained.state)
    barrier("the workdir can be written")
    check_overlaps(world.tasks)
    for line in few_images(config):
        warn(line)
    for line in world.review(_known(world)) if is_main() else ():
        warn(f"prompts: {line}")


def few_images(config: Config) -> Iterator[str]:
    """What is known of batches that are smaller than any that was published for networks of this size."""
    if not isinstance(config, Reinforced) or config.model.preset in EMBEDDED:
        return
    prompts, images = config.batch_size // config.images_per_prompt, config.images_per_prompt
    if prompts < FEWEST_PROMPTS or images < FEWEST_IMAGES:
        yield (
            f"batch_size, images_per_prompt: found {prompts} prompts of {images} images a step; on Stable Diffusion "
            f"3.5 8 of 8 are reported to collapse into noise, and {FEWEST_PROMPTS} of {FEWEST_IMAGES} are the fewest "
            "that were published to train"
        )


def check_best(run: Run, setup: Setup) -> None:
    """Refuse a best checkpoint by a score that no evaluation will give.

    Raises:
      ValueError: nothing is evaluated, or not by that name; names the field and the scores there are.
    """
    if not run.keep_best:
        return
    if run.eval_every == 0:
        raise ValueError(f"run.keep_best: found {run.keep_best!r}, which needs evaluations, but run.eval_every is 0")
    known = setup.eval_set.skills()
    if run.keep_best.partition(":")[2] not in known:
        there = f"expected max: or min: one of {', '.join(known)}" if known else "but nothing scores the tasks"
        raise ValueError(f"run.keep_best: found {run.keep_best!r}, {there}")


def trained_parts(state: TrainState) -> dict[str, Tree]:
    """A state's arrays, as `Plan.held` names them."""
    parts = {"trained": state.trained, "optimizer": state.opt_state, "average": state.ema}
    return parts if state.old is None else {**parts, "old copy": state.old}


def _known(world: World) -> Iterator[str]:
    """Every prompt of every task."""
    for task in world.tasks.values():
        yield from task.train
        yield from task.test
