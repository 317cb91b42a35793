"""Sections `model` and `run` → network, world and base weights: what sampling and every stage of training share.

`model.path` is a converted folder (tools/convert_sd35_weights.py), a file of this project's own, or empty for random
weights of `model.preset`. Text encoders and autoencoder of a converted folder are loaded when they are first needed;
the encoders are dropped as soon as their prompts are encoded.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.adapters.lora import Adapter, check_like
from fopd_jax.config.schema import Model, Run
from fopd_jax.interop.files.converted import CUSTOM, Manifest, load_sharded, load_table, read_manifest
from fopd_jax.interop.files.safetensors import check_preset, is_own_file, load_adapter, load_tree
from fopd_jax.interop.lora.peft import read_lora
from fopd_jax.models.attention import AUTO, AttentionImpl, resolve_attention
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import AnyMesh, check_width, parameter_shardings, replicated
from fopd_jax.policy.velocity import Tree, Velocity, make_velocity
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.folder import FolderWorld
from fopd_jax.worlds.miniature.world import make_world as make_miniature_world
from fopd_jax.worlds.world import World

PACKAGED = "packaged:"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A network on a mesh and the world around it; `manifest` is that of the converted folder, if it comes from one."""

    mesh: Mesh
    preset: str
    model: MMDiT
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
    if not path.exists():
        raise ValueError(f"model.path: {path}: no such file or folder")
    manifest = read_manifest(path) if model.path and path.is_dir() else None
    network = _network(model.preset, path, manifest)
    check_width(network.width, mesh)
    attention = choose_attention(run.attention, model.dtype, network, mesh)
    mmdit = MMDiT(network, attention, jnp.dtype(model.dtype), remat=run.remat)
    if manifest is not None:
        world = FolderWorld(path, manifest, tasks(), model=model, encoding=run.encoding, mesh=mesh).world()
    elif model.preset == "miniature":
        world = make_miniature_world()
    else:
        raise ValueError(f"model.path: found {model.path!r}; preset {model.preset!r} needs a converted folder")
    return Pipeline(mesh, model.preset, mmdit, make_velocity(mmdit), world, manifest)


def choose_attention(name: str, dtype: str, network: MMDiTConfig, mesh: AnyMesh) -> AttentionImpl:
    """The attention of `run.attention` on the devices of a mesh, which need not be this process's; tells of `auto`.

    Raises:
      ValueError: it does not exist, or cannot run there.
    """
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    found = resolve_attention(name, dtype, network.head_dim, platform)
    if name == AUTO and jax.process_index() == 0:
        on = f"{platform}, {dtype}, head dimension {network.head_dim}"
        print(f"attention: auto → {found} ({on})", file=sys.stderr, flush=True)
    return found


def _network(preset: str, path: Path, manifest: Manifest | None, field: str = "model.path") -> MMDiTConfig:
    if manifest is None:
        if preset not in PRESETS:
            raise ValueError(f"model.preset: found {preset!r}, expected one of {tuple(PRESETS)}")
        return PRESETS[preset]
    if "transformer" not in manifest.components:
        raise ValueError(f"{field}: {path} holds no transformer, only {', '.join(manifest.components)}")
    if manifest.preset != preset:
        expected = f"{manifest.preset!r}, which is what {path} holds"
        if preset not in PRESETS and preset != CUSTOM:
            expected = f"one of {(*PRESETS, CUSTOM)}; {path} holds {manifest.preset!r}"
        raise ValueError(f"model.preset: found {preset!r}, expected {expected}")
    return manifest.transformer


def weight_path(name: str) -> Path:
    """A file or folder, or `packaged:NAME` for a file inside the package."""
    if name.startswith(PACKAGED):
        return Path(str(resources.files("fopd_jax.worlds.miniature") / "assets" / name.removeprefix(PACKAGED)))
    return Path(name)


# ---- base weights


def boxed_variables(model: MMDiT, latent_shape: tuple[int, int, int]) -> Tree:
    """Shapes of `params` and `constants`, parameters boxed with their logical axes, without computing anything."""
    c = model.config
    inputs = jnp.zeros((1, *latent_shape)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim)), jnp.zeros((1, c.pooled_dim))
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def init_variables(model: MMDiT, latent_shape: tuple[int, int, int], seed: int) -> Tree:
    """Random weights and the position table for one latent shape."""
    c = model.config
    inputs = jnp.zeros((1, *latent_shape)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim)), jnp.zeros((1, c.pooled_dim))
    return nn.unbox(model.init(jax.random.key(seed), *inputs))


def load_base(model: Model, pipeline: Pipeline, seed: int = 0, dtype: str | None = None) -> Tree:
    """The base's variables, every parameter in `dtype` (default `model.dtype`) and born in the shards of the mesh.

    `seed`: of random weights, where `model.path` is empty.

    Raises:
      ValueError: as `load_network`.
    """
    stored = jnp.dtype(dtype or model.dtype)
    if model.path:
        return load_network(model.path, pipeline, stored)
    latent_shape = pipeline.world.latent_shape
    shardings = parameter_shardings(pipeline.mesh, boxed_variables(pipeline.model, latent_shape))

    def init() -> Tree:
        return _cast(init_variables(pipeline.model, latent_shape, seed), stored)

    return jax.jit(init, out_shardings=shardings)()


def load_network(source: str, pipeline: Pipeline, dtype: Any) -> Tree:
    """Variables of a whole network like the pipeline's: a converted folder, or a file of this project's own.

    Raises:
      ValueError: a file is missing or damaged, of another preset or shape; names it.
    """
    path, latent_shape = weight_path(source), pipeline.world.latent_shape
    boxed = boxed_variables(pipeline.model, latent_shape)
    if pipeline.manifest is None:
        variables, metadata = load_tree(path)
        check_preset(path, metadata, pipeline.preset)
        check_like(str(path), variables, f"preset {pipeline.preset}", nn.unbox(boxed))
        return put_replicated(_cast(variables, dtype), parameter_shardings(pipeline.mesh, boxed))
    params = load_sharded(path, "transformer", boxed["params"], dtype, pipeline.mesh)
    side, patch = pipeline.model.config.table_size, pipeline.model.config.patch_size
    table = load_table(path, (side, latent_shape[0] // patch, latent_shape[1] // patch))
    constants = {"pos_embed": put_replicated(table.astype(np.float32), replicated(pipeline.mesh))}
    return {"params": params, "constants": constants}


def check_network(field: str, source: str, pipeline: Pipeline) -> None:
    """Refuse, before anything is loaded, what `load_network` could not load.

    Raises:
      ValueError: there is no such file or folder, or it holds another network; names field and file.
    """
    path = weight_path(source)
    if not path.exists():
        raise ValueError(f"{field}: {path}: no such file or folder")
    if pipeline.manifest is not None:
        _network(pipeline.preset, path, read_manifest(path), field)


def _cast(variables: Tree, dtype: Any) -> Tree:
    """Parameters in another dtype; constants stay in float32."""
    return {**variables, "params": jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])}


def load_policy(source: str, pipeline: Pipeline) -> Adapter:
    """An adapter from a file of this project's, a PEFT folder, or diffusers' or ComfyUI's LoRA file.

    Raises:
      ValueError: it is missing, damaged, or made for another network; names the file.
    """
    path = weight_path(source)
    if is_own_file(path):
        adapter, metadata = load_adapter(path)
        check_preset(path, metadata, pipeline.preset)
        return adapter
    return read_lora(path, pipeline.model.config)
