"""A stage of three numbers to run the loop on, and a recorder in place of checkpoints and metrics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.config.schema import EMA, Optimizer, Run
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.feed import Feed
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.stage import Progress
from fopd_jax.steps.state import TrainState, advance, apply_gradients, init_state, make_optimizer

OPTIMIZER = make_optimizer(Optimizer(0.1, 1, (0.9, 0.99), 0.0, 1.0))
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
Step = Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]]


@jax.jit
def move(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """Move the weights towards the batch plus this step's noise."""
    target = batch + jax.random.normal(state.rng(), batch.shape)
    loss, gradients = jax.value_and_grad(lambda w: jnp.square(w - target).mean())(state.trained)
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        state, norm = apply_gradients(state, gradients, OPTIMIZER)
    return advance(state, EMA(0.9, 1)), {"loss": loss, "norm": norm}


class Recorder(Checkpoints, MetricWriter):
    """Stands for both checkpoints and writer, and keeps one list of everything that happened."""

    def __init__(self, saved: TrainState | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.clocked: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, dict[str, np.ndarray]]] = []
        self.scores: dict[int, dict[str, float]] = {}
        self.saved = saved
        self.told = ""

    @property
    def trouble(self) -> str:
        return self.told

    def write_scalars(
        self, step: int, scalars: Mapping[str, float], clocked: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        kind = next(iter(scalars)).partition("/")[0]
        self.events.append((kind, step))
        self.scalars.append((step, dict(scalars)))
        self.clocked.append((step, dict(clocked)))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self.events.append(("images", step))
        self.images.append((step, dict(images)))

    def save(
        self,
        step: int,
        state: TrainState,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        assert int(state.step) == step
        self.events.append(("save", step))

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        self.scores[step] = dict(metrics)

    def wait(self) -> None:
        pass

    def latest_step(self) -> int | None:
        return None if self.saved is None else int(self.saved.step)

    def restore(self, state: TrainState) -> TrainState:
        assert self.saved is not None
        return self.saved

    def notes(self, step: int) -> dict[str, Any]:
        return {}


def rows(i: int) -> np.ndarray:
    return np.full(3, i, np.float32)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A stage of three numbers. `events` records its updates and what it is told to finish."""

    step: Step = move
    score: Callable[[TrainState, Progress], dict[str, float]] = lambda state, progress: {
        "score": float(state.ema.sum())
    }
    events: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    feed: Feed = dataclasses.field(default_factory=lambda: Feed(rows, SHARDING, 3, 16))

    @property
    def state(self) -> TrainState:
        return jax.eval_shape(self.start)

    @property
    def samples(self) -> int:
        return 3

    def start(self) -> TrainState:
        return init_state(jnp.zeros(3), OPTIMIZER, 0)

    def describe(self) -> None:
        pass

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Mapping[str, jax.Array]]:
        self.events.append(("step", step + 1))
        return self.step(state, self.feed(step))

    def drain(self) -> None:
        self.events.append(("drain", 0))

    def close(self) -> None:
        self.feed.close()

    def evaluate(self, state: TrainState, progress: Progress) -> Mapping[str, float]:
        return self.score(state, progress)

    def draw(self, state: TrainState) -> Mapping[str, np.ndarray]:
        return {"samples": np.full((2, 2, 3), int(state.step), np.uint8)}

    def batch(self, step: int) -> Any:
        return self.feed.whole(step)

    def explain(self, step: int, rows: Sequence[int]) -> Sequence[str]:
        return [f"row {row} of batch {step}" for row in rows]

    def finish(self, state: TrainState) -> None:
        pass

    def advise(self, source: str) -> Sequence[str]:
        return []


def cadence(steps: int, log_every: int, checkpoint_every: int, eval_every: int) -> Run:
    return Run(steps=steps, log_every=log_every, checkpoint_every=checkpoint_every, eval_every=eval_every)


def run(recorder: Recorder, settings: Run, step: Step = move) -> TrainState:
    return loop.run(Toy(step, events=recorder.events), settings, recorder, recorder)
