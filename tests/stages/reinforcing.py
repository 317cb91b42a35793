"""A stage of reinforcement learning whose method is a few lines: what surrounds one, without compiling a network.

As a program, one of several processes: `python -m tests.stages.reinforcing FOLDER COUNT PROCESS PORT`.
"""

import contextlib
import dataclasses
import functools
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.config.identity import config_hash
from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.parse import resolve
from fopd_jax.config.schema import EMA, RewardConfig
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.parallel import distributed
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.rewards import pool
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.supervision import make_supervision
from fopd_jax.stages.grpo import origin, plan_grpo
from fopd_jax.stages.reinforced import ReinforcementLearning
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.steps.grpo.step import credit_metrics
from fopd_jax.steps.state import TrainState, advance
from tests.configs import load

BATCH, GROUP, STEPS = 8, 4, 6
SHAPE = (24, 24, 3)


class Judge:
    """Never says the same twice of an image, has nothing to say of a tenth of them, and counts what it has said.

    It answers `most` times and then hangs, until it is let `go`.
    """

    def __init__(self, seed: int = 0, most: int = 10**9) -> None:
        self.seed, self.most, self.answers = seed, most, 0
        self.said: Counter[bytes] = Counter()
        self.hangs, self.go = threading.Event(), threading.Event()

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]) -> np.ndarray:
        if self.answers == self.most:
            self.hangs.set()
            assert self.go.wait(60)
            raise RuntimeError("nobody waits for this")
        self.answers += 1
        return np.array([self._say(image.tobytes()) for image in images])

    def _say(self, image: bytes) -> float:
        self.said[image] += 1
        value = np.random.default_rng((self.seed, zlib.crc32(image), self.said[image])).random()
        return np.nan if value < 0.1 else value


def draw(state: TrainState) -> jax.Array:
    keys = sample_keys(state.rng(), 1, BATCH)[0]
    weight = jax.tree.leaves(state.trained)[1].mean()  # a factor B, which begins at 0
    return jnp.tanh(0.5 * standard_normal(keys, SHAPE) + jnp.tanh(weight))


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _learn(state: TrainState, x: jax.Array, credit: Credit, names: tuple[str, ...]) -> tuple[TrainState, Any]:
    moved = (credit.advantage * credit.counts * x.mean((1, 2, 3))).sum()
    trained = jax.tree.map(lambda leaf: leaf + 3.0 * moved, state.trained)
    state = advance(dataclasses.replace(state, trained=trained), EMA(0.9, 1))
    with jax.numpy_dtype_promotion("standard"):
        return state, {"loss": moved, "ratio": jnp.ones(()), **credit_metrics(names, credit)}


@functools.cache
def _compiled(rows: jax.sharding.Sharding) -> Callable[[TrainState], jax.Array]:
    return jax.jit(draw, out_shardings=rows)


class Little:
    """The method: images are noise about a weight, which moves to where the advantages are."""

    def __init__(self, names: tuple[str, ...], mesh: Mesh) -> None:
        self.names = names
        self._draw = _compiled(batch_sharding(mesh))

    def roll_out(self, state: TrainState, conditioning: Any) -> tuple[TrainState, jax.Array]:
        return state, self._draw(state)

    def latents(self, rolled: jax.Array) -> jax.Array:
        return rolled

    def learn(
        self, state: TrainState, rolled: jax.Array, conditioning: Any, credit: Credit
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return _learn(state, rolled, credit, self.names)


def make(
    workdir: Path, functions: Mapping[str, Callable[..., Any] | None], one: Any = None, **changes: Any
) -> ReinforcementLearning:
    """The stage on the miniature's text prompts, with rewards of one's own; None: what has that name anyway.

    `one`: see `ReinforcedPlan`.
    """
    config = load("miniature_rl", "text:smoke")
    config.tasks = {"text": RewardedTask(rewards=dict.fromkeys(functions, 1.0))}
    config.rewards = {name: RewardConfig(kind=f"{__name__}:{name}_") for name in functions if functions[name]}
    globals().update({f"{name}_": reward for name, reward in functions.items()})
    config.batch_size, config.images_per_prompt = BATCH, GROUP
    config.run.steps, config.run.checkpoint_every, config.run.eval_every = STEPS, 2, 0
    for name, value in changes.items():
        setattr(config.run if hasattr(config.run, name) else config, name, value)
    config = resolve(config)
    plan = plan_grpo(config)
    method = Little(tuple(functions), plan.setup.pipeline.mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    plan = dataclasses.replace(plan, method=lambda base: method, one=one)
    return ReinforcementLearning(config, workdir, plan, origin)


def run(stage: ReinforcementLearning) -> TrainState:
    """From the newest checkpoint to the end."""
    config = stage.config
    watch = make_supervision(config.run, stage.workdir, {})
    checkpoints = Checkpoints(stage.workdir, config.run.keep_checkpoints, config_hash=config_hash(config))
    with contextlib.closing(checkpoints):
        writer = MetricWriter(stage.workdir, checkpoints.latest_step() or 0)
        with contextlib.closing(writer), contextlib.closing(stage.setup):
            return loop.run(stage, config.run, checkpoints, writer, watch)


def partly(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]) -> np.ndarray:
    """Brightness, of which it knows nothing for rows 5 and 6 of the whole batch."""
    rows = jax.process_index() * len(images) + np.arange(len(images))
    return np.where((rows == 5) | (rows == 6), np.nan, images.mean((1, 2, 3)) / 255)


def breaks(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]) -> np.ndarray:
    """On process 1, at its second rollout, for all images."""
    if jax.process_index() == 1 and _asked["breaks"]:
        raise ConnectionError("the judge is away")
    _asked["breaks"] += 1
    return images.mean((1, 2, 3)) / 255


_asked: Counter[str] = Counter()


def program(folder: Path, count: int, process: int, port: int) -> None:
    """Two runs on all devices: one whose group of eight is spread over them, one whose reward breaks."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        distributed.initialize(f"localhost:{port}", count, process, timeout_s=120)
    state = run(make(folder / "whole", {"partly": partly}, images_per_prompt=BATCH, steps=2, max_failed_rewards=1.0))
    leaves = jax.tree.leaves(distributed.fetch(state.trained))
    if distributed.is_main():
        np.savez(folder / "trained.npz", *leaves)
    if count > 1:
        pool.LEAST = 4
        try:
            run(make(folder / "broken", {"breaks": breaks}, images_per_prompt=BATCH, steps=3))
        except RuntimeError as error:
            print(f"ended: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    program(Path(sys.argv[1]), *map(int, sys.argv[2:]))
