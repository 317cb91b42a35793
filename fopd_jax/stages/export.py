"""What a stage leaves of what it trained: files of this project's own, and those that others load."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.coordinates import WITHOUT, skills_of
from fopd_jax.adapters.lora import Adapter, rank_of
from fopd_jax.backbones.record import Files
from fopd_jax.config.schema import OPD, Config, Model
from fopd_jax.files import check_finite
from fopd_jax.interop.files.safetensors import save_adapter, save_tree
from fopd_jax.parallel.distributed import fetch, is_main, warn
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.pipeline import Pipeline, weight_path
from fopd_jax.steps.state import TrainState


def export_name(config: Config) -> str:
    """Under which name a run leaves what trained."""
    if isinstance(config, OPD):
        return "student"
    return "base" if config.trained == "params" else "adapter"


def exported_weights(config: Config, state: TrainState) -> Tree:
    """What of a state is exported, reported and drawn: the average, or the last weights on request."""
    return state.trained if isinstance(config, OPD) and config.export == "raw" else state.ema


def exports(name: str, what: str, whole: bool, pipeline: Pipeline, *, dials: bool = False) -> dict[str, str]:
    """What `export` writes under a name, and what each of it is; `dials`: of an adapter with coordinates."""
    if _published(pipeline) is None or dials:
        return {f"{name}.safetensors": what}
    if whole:
        return {f"{name}_diffusers": f"{what}, as diffusers' folder"}
    return {f"{name}.safetensors": what, f"{name}_peft": "the same for PEFT and diffusers"}


def advise(
    folder: Path, name: str, whole: bool, pipeline: Pipeline, source: str, dials: Sequence[str] = ()
) -> list[str]:
    """Commands that draw with what `export` wrote, or take it elsewhere; `source`: the config's file; `dials`: names of
    an adapter's coordinates.
    """
    sample = f"python -m fopd_jax.sample --config={source}"
    if not whole:
        draw = [f"{sample} --adapter={folder}/{name}.safetensors"]
        convert = f"python tools/convert_adapter.py --src {folder}/{name}.safetensors --dst FILE --to comfyui"
        if dials:
            return [*draw, f"{draw[0]} --dial={dials[0]}=1.25   # 1 each where nobody turns them"]
        return draw if _published(pipeline) is None else [*draw, convert]
    if _published(pipeline) is None:
        return [f"{sample} --config.model.path={folder}/{name}.safetensors"]
    return [
        f"python tools/convert_sd35_weights.py --src {folder}/{name}_diffusers --dst FOLDER",
        f"{sample} --config.model.path=FOLDER",
    ]


def advise_teacher(folder: Path, name: str, whole: bool, pipeline: Pipeline, source: str) -> list[str]:
    """The same of what may teach; an adapter can."""
    teaches = "in a config of stage `opd`, this teaches a task"
    as_teacher = [f"--config.tasks.TASK.teacher={folder}/{name}.safetensors   # {teaches}"]
    return [*advise(folder, name, whole, pipeline, source), *([] if whole else as_teacher)]


def export(
    folder: Path, name: str, trained: Tree, constants: Tree, pipeline: Pipeline, model: Model, card: AdapterCard
) -> AdapterCard:
    """Write a trained adapter, or a whole network's parameters; all processes call it, process 0 writes.

    `constants`: what the network reads beside its parameters. `card`: what an adapter's files say of it (`make_card`);
    a network's have none. Returns the card with the adapter's own rank and scale, as its files have it.

    Raises:
      FloatingPointError: a weight is not finite; nothing is written.
    """
    trained, constants = fetch((trained, constants))
    check_finite(name, {keystr(path): np.asarray(leaf) for path, leaf in tree_leaves_with_path(trained)})
    if isinstance(trained, Adapter):
        card = dataclasses.replace(card, rank=(rank := rank_of(trained)), alpha=float(trained.scale * rank))
    if not is_main():
        return card
    if isinstance(trained, Adapter):
        _write_adapter(folder, name, trained, pipeline, card)
    else:
        _write_network(folder, name, trained, constants, pipeline, model)
    return card


def _write_adapter(folder: Path, name: str, adapter: Adapter, pipeline: Pipeline, card: AdapterCard) -> None:
    """`NAME.safetensors`; of a published network also a PEFT folder, `NAME_peft`, which cannot hold coordinates."""
    save_adapter(folder / f"{name}.safetensors", adapter, {"preset": pipeline.preset}, card)
    if (files := _published(pipeline)) is not None:
        exported = folder / f"{name}_peft"
        shutil.rmtree(exported, ignore_errors=True)  # of an earlier, shorter run
        if skills_of(adapter):
            warn(f"{exported} is not written: {WITHOUT}")
            return
        files.write_adapter(exported, adapter, pipeline.model.config, card)


def _write_network(folder: Path, name: str, params: Tree, constants: Tree, pipeline: Pipeline, model: Model) -> None:
    """`NAME.safetensors`; a published network as diffusers' folder `NAME_diffusers/transformer` instead."""
    if (files := _published(pipeline)) is None:
        save_tree(
            folder / f"{name}.safetensors", {"params": params, "constants": constants}, {"preset": pipeline.preset}
        )
        return
    exported = folder / f"{name}_diffusers"
    shutil.rmtree(exported, ignore_errors=True)
    exported.mkdir()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(model.dtype)), params)
    files.write_network(exported / "transformer", weight_path(model.path), rounded)


def _published(pipeline: Pipeline) -> Files | None:
    """How others keep the network, if it came from them."""
    return pipeline.family.files if pipeline.manifest is not None else None
