"""Stage `flow_matching`: pretrain a whole network, or fine-tune a teacher's adapter, on captioned images."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.config import schema as settings
from fopd_jax.evaluation.report import SAMPLES_FILE, Model, draw_samples
from fopd_jax.evaluation.score import evaluate, means
from fopd_jax.interop.files.safetensors import save_adapter, save_tree
from fopd_jax.parallel.distributed import fetch, is_main, put_replicated, rows_of
from fopd_jax.parallel.sharding import batch_sharding, check_batch, replicated
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.feed import Feed
from fopd_jax.running.stage import Metrics, Progress
from fopd_jax.stages.pipeline import load_base
from fopd_jax.stages.setup import make_setup, print_overview
from fopd_jax.steps.flow_matching import make_flow_matching_step
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.steps.student import ADAPTER, network
from fopd_jax.worlds.miniature.pairs import check_shares, make_pairs
from fopd_jax.worlds.world import select_tasks


class FlowMatching:
    """The stage, see `running.stage.Stage`. Images are the miniature's."""

    def __init__(self, config: settings.FlowMatching, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        if config.model.preset != "miniature":
            raise ValueError(
                f"model.preset: found {config.model.preset!r}; stage flow_matching has images for 'miniature'"
            )
        setup = make_setup(config, dict)
        pipeline = setup.pipeline
        select_tasks(pipeline.world, tuple(config.tasks))
        check_shares(config.tasks)
        check_batch("batch_size", config.batch_size, pipeline.mesh)
        full = config.trained == "params"
        variables = load_base(
            config.model, pipeline, config.seed, "float32" if full else None
        )  # what trains is never rounded
        trained = (
            variables["params"]
            if full
            else init_adapter(jax.random.key(config.seed), variables["params"], config.adapter, pipeline.family.targets)
        )
        frozen = {"constants": variables["constants"]} if full else variables
        student = network(config.model.dtype) if full else ADAPTER
        everywhere, sharding = replicated(pipeline.mesh), batch_sharding(pipeline.mesh)
        rows = rows_of(sharding, config.batch_size)
        step = make_flow_matching_step(
            pipeline.velocity, student, config.levels, setup.optimizer, config.ema, pipeline.mesh, everywhere
        )

        def batch(step: int) -> Tree:
            whole = make_pairs(pipeline.world, config.tasks, config.batch_size, config.empty_caption, config.seed, step)
            return jax.tree.map(lambda leaf: leaf[rows], whole)

        self.setup, self.frozen, self.full, self.student, self.step = setup, frozen, full, student, step
        self.first = put_replicated(init_state(trained, setup.optimizer, config.seed), everywhere)
        self.feed = Feed(batch, sharding, config.batch_size, config.run.steps)
        self.outputs = {
            "base.safetensors" if full else "adapter.safetensors": "the averaged weights",
            SAMPLES_FILE: "what they draw",
        }

    def start(self) -> TrainState:
        """The state of step 0."""
        return self.first

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """One jitted program."""
        batch = self.feed(step)
        conditioning = self.setup.pipeline.world.embed(batch["conditioning"])
        return self.step(self.frozen, state, {**batch, "conditioning": conditioning})

    def drain(self) -> None:
        """Nothing is ever in flight but the update itself."""

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        self.feed.close()

    def batch(self, step: int) -> Tree:
        """The whole batch, on every process."""
        return self.feed.whole(step)

    def explain(self, step: int, rows: Sequence[int]) -> list[str]:
        """No words for them."""
        return [""] * len(rows)

    def model(self, trained: Tree) -> Model:
        """What trains, to sample from."""
        return Model(self.config.name, *self.student.policy(self.frozen, trained))

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged weights on the periodic evaluation's pairs."""
        setup, model = self.setup, self.model(state.ema)
        return means(evaluate(setup.sampler, setup.pipeline.world, setup.eval_set, *model.policy, progress))

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged weights draw."""
        return self.setup.draw(self.model(state.ema))

    def describe(self) -> None:
        """Print what trains and what does not."""
        trained = self.first.trained
        print_overview(self.config.name, trained if self.full else trained.weights, self.frozen)

    def finish(self, state: TrainState) -> None:
        """Write the averaged weights to `base.safetensors` or `adapter.safetensors`, and what they draw."""
        trained, frozen = fetch((state.ema, self.frozen if self.full else None))
        if is_main():
            metadata = {"preset": self.config.model.preset}
            if self.full:
                save_tree(self.workdir / "base.safetensors", {"params": trained, **frozen}, metadata)
            else:
                save_adapter(self.workdir / "adapter.safetensors", trained, metadata)
        setup, model = self.setup, self.model(state.ema)
        draw_samples(self.workdir / SAMPLES_FILE, setup.sampler, setup.pipeline.world, setup.eval_set, [model])
