"""What a run's workdir holds of what trained: any kept checkpoint, to sample from, to evaluate or to export."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import Config
from fopd_jax.config.stages import StageConfig
from fopd_jax.models.coordinates import LAYER
from fopd_jax.policy.velocity import Tree
from fopd_jax.running import inputs
from fopd_jax.running.checkpoints import kept_steps, read_kept, seal_of, stored_shape
from fopd_jax.stages.cards import Origin, base_hash, make_card
from fopd_jax.stages.export import export, export_name, exported_weights
from fopd_jax.stages.files import input_files
from fopd_jax.stages.model_card import write_model_card
from fopd_jax.stages.pipeline import Pipeline, load_base
from fopd_jax.stages.trained import make_trained
from fopd_jax.steps.state import make_optimizer
from fopd_jax.steps.student import Student


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint's weights, those that are exported; `student` reads them, `about` says where they are from."""

    step: int
    weights: Tree
    student: Student
    about: dict[str, Any]


def find_step(workdir: Path, step: int | None) -> int:
    """A kept step, by default the newest.

    Raises:
      ValueError: there is none, or not that one; names those there are.
    """
    kept = kept_steps(workdir)
    if not kept:
        raise ValueError(f"--workdir: {workdir} holds no checkpoint")
    if step is not None and step not in kept:
        raise ValueError(f"--step: found {step}, expected one that {workdir} holds: {', '.join(map(str, kept))}")
    return kept[-1] if step is None else step


def load_stored(config: StageConfig, pipeline: Pipeline, workdir: Path, step: int) -> Stored:
    """What a workdir's checkpoint holds for a pipeline; needs neither teachers nor prompts.

    Raises:
      ValueError: the base is another one than the run's, or the checkpoint is damaged or of other shapes; names it.
    """
    inputs.check(workdir, {name: path for name, path in input_files(config).items() if name == "model.path"})
    boxed = boxed_variables(pipeline.model, pipeline.world.latent_shape)
    sized = _sized(config, workdir, step)
    trained = make_trained(sized, pipeline.model, boxed, make_optimizer(config.optimizer), pipeline.mesh)
    state = read_kept(workdir, step, trained.state)
    about = {"source": f"{workdir}, step {step}", "sha256": seal_of(workdir, step)}
    return Stored(step, exported_weights(config, state), trained.student, about)


def _sized(config: StageConfig, workdir: Path, step: int) -> Config:
    """The config with the rank that the checkpoint's adapter has, at the same scale: merges may have another one."""
    shape = stored_shape(workdir, step, "/a", (f"/{LAYER}/a",)) if config.trained == "adapter" else None
    if shape is None:
        return config
    return resolve(override(config, {"adapter.rank": shape[-1], "adapter.alpha": config.adapter.scale * shape[-1]}))


def export_stored(
    config: StageConfig, pipeline: Pipeline, workdir: Path, step: int, out: Path, origin: Callable[[Any], Origin]
) -> None:
    """Write what a run's end would have written of a checkpoint's weights; `origin`: what its stage says of them.

    Raises:
      ValueError: as `load_stored`.
      FloatingPointError: a weight is not finite; nothing is written.
    """
    stored = load_stored(config, pipeline, workdir, step)
    whole = config.trained == "params"
    constants = load_base(config.model, pipeline, config.seed)["constants"] if whole else {}
    card = make_card(config, pipeline, base_hash(config.model), origin, step, workdir)
    card = export(out, export_name(config), stored.weights, constants, pipeline, config.model, card)
    write_model_card(out, workdir, config, pipeline, card)
