"""Stage `opd`: one student distilled on-policy from many teachers, evaluated beside all of them."""

import itertools
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from fopd_jax.config.identity import Config
from fopd_jax.evaluation.report import Model, write_report
from fopd_jax.evaluation.suite import evaluate, means
from fopd_jax.interop.files.converted import load_table
from fopd_jax.interop.files.safetensors import save_adapter, save_tree
from fopd_jax.interop.lora.peft import write_peft
from fopd_jax.interop.sd3.convert import byte_bar, write_diffusers
from fopd_jax.parallel.distributed import fetch, is_main, put_replicated, rows_of
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.loop import Experiment, Progress
from fopd_jax.stages import teachers
from fopd_jax.stages.pipeline import boxed_variables, weight_path
from fopd_jax.stages.setup import make_setup, null_conditioning, print_overview
from fopd_jax.steps.opd.step import Batch, Frozen, Metrics
from fopd_jax.steps.opd.update import make_spec, make_update
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.worlds.prompt_stream import PromptStream


class OPD:
    """The stage: `experiment` for the loop, `finish` for results, pictures and the exported student."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        cache = Path(config.conditioning_cache) if config.get("conditioning_cache") else None
        self.setup = setup = make_setup(config, cache)
        self.pipeline = pipeline = setup.pipeline
        if config.final_samples < 1:
            raise ValueError(f"final_samples: found {config.final_samples}, expected at least 1")
        if config.export not in ("ema", "raw"):
            raise ValueError(f"export: found {config.export!r}, expected 'ema' or 'raw'")
        latent_shape = pipeline.world.latent_shape
        boxed, spec = boxed_variables(pipeline.model, latent_shape), make_spec(config, latent_shape)
        self.update = make_update(config, pipeline.model, boxed, spec, setup.optimizer, pipeline.mesh)
        sharding = batch_sharding(pipeline.mesh)
        prompts = PromptStream(pipeline.world, config, rows_of(sharding, config.batch_size))
        found = teachers.sources(config)
        teachers.check_start(config, found)
        if config.whole_teachers:
            teachers.check_networks(pipeline, found)
            teach = partial(teachers.teach_by_networks, config, pipeline, found)
        else:
            teach = partial(
                teachers.teach_by_adapters, config, pipeline, teachers.load_adapters(config, pipeline, found)
            )
        # Prompts before the base: text encoders and network need not be in memory together.
        pipeline.world.prepare(itertools.chain(setup.eval_set.prompts(), prompts.upto(config.steps)))
        self.teaching = teach()
        self.frozen = Frozen(self.teaching.variables, self.teaching.bank, null_conditioning(pipeline))
        self.experiment = Experiment(
            state=self.first_state(),
            step=self.step,
            batch=prompts.batch,
            batch_size=config.batch_size,
            sharding=sharding,
            evaluate=self.evaluate,
            draw=lambda state: setup.draw(self.model(state.ema)),
            describe=prompts.describe,
        )

    def first_state(self) -> TrainState:
        """The state of step 0, born in its shards."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.update.state)
        optimizer, seed = self.setup.optimizer, self.config.seed
        start = put_replicated(self.teaching.start, places.trained)
        return jax.jit(lambda start: init_state(start, optimizer, seed), out_shardings=places)(start)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update on a batch that lies on the devices."""
        conditioning = self.pipeline.world.embed(batch.conditioning)
        return self.update.step(self.frozen, state, Batch(conditioning, batch.route))

    def describe(self) -> None:
        """Print what trains and what does not."""
        start = self.teaching.start
        print_overview("student", start if self.config.trained == "params" else start.weights, self.frozen)

    def model(self, trained: Tree) -> Model:
        """The student with these weights, to sample from."""
        return Model("student", *self.update.student.policy(self.frozen.variables, trained))

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged student on the periodic evaluation's pairs."""
        setup, world, model = self.setup, self.pipeline.world, self.model(state.ema)
        return means(evaluate(setup.sampler, world, setup.eval_set, model.variables, model.adapter, progress))

    def finish(self, state: TrainState) -> None:
        """Export the student (averaged weights, or raw on request) and report it beside base, teachers and merge."""
        student = state.trained if self.config.export == "raw" else state.ema
        exported = fetch(student)
        if is_main() and self.config.trained == "params":
            self.export_network(exported)
        elif is_main():
            self.export_adapter(exported)
        models = [*self.teaching.models(), self.model(student)]
        write_report(self.workdir, self.config, self.setup.sampler, self.pipeline.world, models, steps=int(state.step))

    def export_adapter(self, student: Tree) -> None:
        """`student.safetensors`; of a published network also a PEFT folder, `student_peft`."""
        save_adapter(self.workdir / "student.safetensors", student, {"preset": self.config.model.preset})
        if self.pipeline.manifest is not None:
            exported = self.workdir / "student_peft"
            shutil.rmtree(exported, ignore_errors=True)  # of an earlier, shorter run
            write_peft(exported, student, self.pipeline.model.config)

    def export_network(self, student: Tree) -> None:
        """`student.safetensors`; a published network as diffusers' folder `student_diffusers/transformer` instead."""
        if self.pipeline.manifest is None:
            variables = {"params": student, "constants": fetch(self.frozen.variables["constants"])}
            save_tree(self.workdir / "student.safetensors", variables, {"preset": self.config.model.preset})
            return
        folder = self.workdir / "student_diffusers"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        table = load_table(weight_path(self.config.model.path))
        dtype = jnp.dtype(self.config.model.dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), student)
        write_diffusers(folder / "transformer", self.pipeline.manifest, params, table, progress=byte_bar)
