"""Sections `model` and `run` → network, world and base weights: what sampling and every stage of training share.

`model.path` is a converted folder (tools/convert_sd35_weights.py), a file of this project's own, or empty for random
weights of `model.preset`. Text encoders and autoencoder of a converted folder are loaded when they are first needed;
the encoders are dropped as soon as their prompts are encoded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.backbones.record import Backbone, Shape
from fopd_jax.backbones.registry import family_of_class, find_preset, preset_names
from fopd_jax.backbones.weights import (
    boxed_variables,
    load_any_adapter,
    load_converted,
    load_file,
    random_network,
    read_file,
)
from fopd_jax.config.rules import within
from fopd_jax.config.schema import Model, Run
from fopd_jax.console import note
from fopd_jax.exits import CONVERTER, GUIDE, naming
from fopd_jax.interop.files.converted import CUSTOM, Manifest, read_manifest
from fopd_jax.models.attention import AUTO, AttentionImpl, resolve_attention
from fopd_jax.models.kernels.choice import KernelImpl, resolve_kernels
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import AnyMesh, check_width
from fopd_jax.policy.velocity import Tree, Velocity, make_velocity
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.embedded import EMBEDDED
from fopd_jax.worlds.folder import FolderWorld
from fopd_jax.worlds.world import World

PACKAGED = "packaged:"
MOST_FACTOR = 1e15
"""What an adapter's factors must stay below, for products of two to be finite in float32."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A network on a mesh and the world around it; `manifest` is that of the converted folder, if it comes from one."""

    mesh: Mesh
    preset: str
    family: Backbone
    model: Any  # a Linen module of one of the families; its `config` is the shape
    velocity: Velocity
    world: World
    manifest: Manifest | None


def make_pipeline(model: Model, run: Run, tasks: Callable[[], Mapping[str, Task]]) -> Pipeline:
    """Build network and world; loads no weights. `tasks`: of worlds that have none of their own.

    Raises:
      ValueError: a field names something that does not exist, or does not fit the machine; before anything is compiled.
    """
    mesh = make_mesh(run.mesh)
    path = weight_path(model.path)
    _check_there(model.path, model.preset, "model.path: ")
    manifest = manifest_of("model.path", path) if model.path and path.is_dir() else None
    family, shape = find_network(model.preset, path, manifest)
    check_width(shape.width, mesh)
    module = build_network(family, shape, run, model.dtype, run.remat, mesh)
    if manifest is not None:
        world = FolderWorld(path, manifest, tasks(), model=model, encoding=run.encoding, mesh=mesh).world()
    elif model.preset in EMBEDDED:
        world = EMBEDDED[model.preset]()
        if model.size not in (own := world.latent_shape[:2], Model().size):
            raise ValueError(
                f"model.resolution: found {model.resolution}, expected {own}: {model.preset} has that size"
            )
    else:
        raise ValueError(f"model.path: found {model.path!r}; preset {model.preset!r} needs a converted folder")
    return Pipeline(mesh, model.preset, family, module, make_velocity(module), world, manifest)


def build_network(family: Backbone, shape: Shape, run: Run, dtype: str, remat: str, mesh: AnyMesh) -> nn.Module:
    """A network of a family, with the implementations that `run` names on the devices of a mesh.

    Raises:
      ValueError: one does not exist, or cannot run there; names the field.
    """
    attention = choose_attention(run.attention, dtype, shape.head_dim, mesh)
    kernels = choose_kernels(run.kernels, family, shape.width, mesh)
    return family.build(shape, attention, jnp.dtype(dtype), remat, kernels)


def choose_attention(name: str, dtype: str, head_dim: int, mesh: AnyMesh) -> AttentionImpl:
    """The attention of `run.attention` on the devices of a mesh, which need not be this process's; tells of `auto`.

    Raises:
      ValueError: it does not exist, or cannot run there.
    """
    platform = platform_of(mesh)
    with within("run"):
        found = resolve_attention(name, dtype, head_dim, platform)
    if name == AUTO and jax.process_index() == 0:
        on = f"{platform}, {dtype}, head dimension {head_dim}"
        note(f"attention: auto → {found} ({on})")
    return found


def choose_kernels(name: str, family: Backbone, width: int, mesh: AnyMesh) -> KernelImpl:
    """The kernels of `run.kernels` on the devices of a mesh, which need not be this process's.

    Raises:
      ValueError: they do not exist, or cannot run there, or networks of the family have none but XLA's.
    """
    with within("run"):
        found = resolve_kernels(name, width, platform_of(mesh))
        if found == "pallas" and not family.kernels:
            if name != AUTO:
                raise ValueError(f"kernels: found {name!r}, which networks of the family {family.name!r} do not have")
            found = "xla"
    if name == AUTO and found != "xla" and jax.process_index() == 0:
        note(f"kernels: auto → {found} ({platform_of(mesh)}, width {width})")
    return found


def platform_of(mesh: AnyMesh) -> str:
    """What a mesh's devices are."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def find_network(
    preset: str, path: Path, manifest: Manifest | None, section: str = "model", field: str = ""
) -> tuple[Backbone, Shape]:
    """Family and shape of the network that a section names by `preset` and `path`; `field`: where it is not its path.

    Raises:
      ValueError: there is no such preset, or the folder holds none or another one; names the field.
    """
    field = field or f"{section}.path"
    if manifest is None:
        if preset not in preset_names():
            raise ValueError(f"{section}.preset: found {preset!r}, expected one of {preset_names()}")
        return find_preset(preset)
    if "transformer" not in manifest.components:
        raise ValueError(f"{field}: {path} holds no transformer, only {', '.join(manifest.components)}")
    if manifest.preset != preset:
        expected = f"{manifest.preset!r}, which is what {path} holds"
        if preset not in (*preset_names(), CUSTOM):
            expected = f"one of {(*preset_names(), CUSTOM)}; {path} holds {manifest.preset!r}"
        raise ValueError(f"{section}.preset: found {preset!r}, expected {expected}")
    with naming(f"{field}: {path}"):
        return family_of_class(manifest.class_name), manifest.transformer


def manifest_of(field: str, folder: Path) -> Manifest:
    """The manifest of a converted folder; what is wrong with it is laid to a field."""
    with naming(field):
        return read_manifest(folder)


def weight_path(name: str) -> Path:
    """A file or folder, or `packaged:NAME` for a file inside the package."""
    if name.startswith(PACKAGED):
        return Path(str(resources.files("fopd_jax.worlds.miniature") / "assets" / name.removeprefix(PACKAGED)))
    return Path(name)


# ---- weights


def load_base(model: Model, pipeline: Pipeline, seed: int = 0, dtype: str | None = None) -> Tree:
    """The base's variables, every parameter in `dtype` (default `model.dtype`) and born in the shards of the mesh.

    `seed`: of random weights, where `model.path` is empty.

    Raises:
      ValueError: as `load_network`.
    """
    stored = jnp.dtype(dtype or model.dtype)
    if model.path:
        return load_network(model.path, pipeline, stored)
    return random_network(pipeline.model, pipeline.world.latent_shape, seed, stored, pipeline.mesh)


def check_base(model: Model, pipeline: Pipeline, field: str = "model.path") -> None:
    """Refuse a file that `load_base` would refuse, before anything long; of converted folders the manifest is read.

    Raises:
      ValueError: it is damaged, of another preset or shape; names field and file.
    """
    if model.path and pipeline.manifest is None:
        try:
            read_file(
                weight_path(model.path), pipeline.preset, boxed_variables(pipeline.model, pipeline.world.latent_shape)
            )
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error


def load_network(source: str, pipeline: Pipeline, dtype: Any) -> Tree:
    """Variables of a whole network like the pipeline's: a converted folder, or a file of this project's own.

    Raises:
      ValueError: a file is missing or damaged, of another preset or shape; names it.
    """
    path, place = weight_path(source), (pipeline.model, pipeline.world.latent_shape, dtype, pipeline.mesh)
    return load_file(path, pipeline.preset, *place) if pipeline.manifest is None else load_converted(path, *place)


def check_network(field: str, source: str, pipeline: Pipeline) -> None:
    """Refuse, before anything is loaded, what `load_network` could not load.

    Raises:
      ValueError: there is no such file or folder, or it holds another network; names field and file.
    """
    path = weight_path(source)
    _check_there(source, pipeline.preset, f"{field}: ")
    if pipeline.manifest is not None:
        find_network(pipeline.preset, path, manifest_of(field, path), field=field)


def load_policy(source: str, pipeline: Pipeline) -> Adapter:
    """An adapter from a file of this project's, a PEFT folder, or diffusers' or ComfyUI's LoRA file.

    Raises:
      ValueError: it is missing, damaged, or made for another network; names the file.
    """
    _check_there(source, pipeline.preset, adapter=True)
    adapter = load_any_adapter(weight_path(source), pipeline.preset, pipeline.model)
    with np.errstate(over="ignore"):
        largest = max(float(np.abs(leaf).max(initial=0)) for leaf in jax.tree.leaves(effective(adapter)))
    if not largest < MOST_FACTOR:
        raise ValueError(
            f"{weight_path(source)}: its factors reach {largest:g} at scale {adapter.scale:g}, expected less than "
            f"{MOST_FACTOR:g}: the update would not be finite"
        )
    return adapter


def _check_there(source: str, preset: str, field: str = "", *, adapter: bool = False) -> None:
    """Raises ValueError where weights are not there; says what makes them."""
    if (path := weight_path(source)).exists():
        return
    if preset in EMBEDDED:
        maker = f"configs/miniature_{'teacher' if adapter else 'pretrain'}.py makes one"
    else:
        maker = f"{'' if adapter else f'{CONVERTER} makes one; '}{GUIDE} says where to get it"
    maker += "; a student's stands in its run's folder, once the run has ended" * adapter
    raise ValueError(f"{field}{source if source.startswith(PACKAGED) else path}: no such file or folder; {maker}")
