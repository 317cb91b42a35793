"""Variables of a network: as shapes, at random, or from files, each in its shards."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fopd_jax.adapters.lora import Adapter, check_like
from fopd_jax.backbones.record import LatentShape
from fopd_jax.backbones.registry import family_of
from fopd_jax.interop.files.converted import load_sharded
from fopd_jax.interop.files.safetensors import check_numbers, check_preset, is_own_file, load_adapter, load_tree
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.sharding import parameter_shardings, replicated

Tree = Any


def example_inputs(module: Any, latent_shape: LatentShape) -> tuple[Any, ...]:
    """Zeros to initialise a network with, one sample."""
    family = family_of(module)
    context, pooled = (None if shape is None else jnp.zeros((1, *shape)) for shape in family.encoded(module.config, 1))
    text = SimpleNamespace(context=context, pooled=pooled)  # by the names that `inputs` reads
    return family.inputs(jnp.zeros((1, *latent_shape)), jnp.zeros(()), text)


def boxed_variables(module: nn.Module, latent_shape: LatentShape) -> Tree:
    """Shapes of `params` and `constants`, parameters boxed with their logical axes, without computing anything."""
    return jax.tree.map(lambda leaf: leaf, _traced(module, tuple(latent_shape)))  # a tree of the caller's own


@functools.lru_cache(maxsize=8)
def _traced(module: nn.Module, latent_shape: LatentShape) -> Tree:
    """Tracing takes a second, and a start asks several times."""
    return _complete(jax.eval_shape(module.init, jax.random.key(0), *example_inputs(module, latent_shape)))


def init_variables(module: nn.Module, latent_shape: LatentShape, seed: int) -> Tree:
    """Random weights, and what else the network holds for one latent shape."""
    return nn.unbox(_complete(module.init(jax.random.key(seed), *example_inputs(module, latent_shape))))


def _complete(variables: Tree) -> Tree:
    """Both collections, whether or not a network has constants."""
    return {"params": variables["params"], "constants": variables.get("constants", {})}


def random_network(module: nn.Module, latent_shape: LatentShape, seed: int, dtype: Any, mesh: Mesh) -> Tree:
    """`init_variables`, parameters in `dtype` and born in the shards of the mesh."""
    shardings = parameter_shardings(mesh, boxed_variables(module, latent_shape))
    return jax.jit(lambda: cast(init_variables(module, latent_shape, seed), dtype), out_shardings=shardings)()


def load_file(path: Path, preset: str, module: nn.Module, latent_shape: LatentShape, dtype: Any, mesh: Mesh) -> Tree:
    """Variables from a file of this project's own.

    Raises:
      ValueError: as `read_file`.
    """
    boxed = boxed_variables(module, latent_shape)
    variables = read_file(path, preset, boxed)
    return put_replicated(cast(_complete(variables), dtype), parameter_shardings(mesh, boxed))


def read_file(path: Path, preset: str, boxed: Tree) -> Tree:
    """The same on the host, as they are; `boxed`: their shapes.

    Raises:
      ValueError: it is missing or damaged, of another preset or shape, or not finite; names it.
    """
    variables, metadata = load_tree(path)
    check_preset(path, metadata, preset)
    check_like(str(path), variables, f"preset {preset}", nn.unbox(boxed))
    check_numbers(path, variables)
    return variables


def load_converted(folder: Path, module: Any, latent_shape: LatentShape, dtype: Any, mesh: Mesh) -> Tree:
    """Variables from a converted folder, each shard read by the device that holds it.

    Raises:
      ValueError: a file is missing or damaged, or of another shape; names it.
    """
    family = family_of(module)
    if family.files is None:
        raise ValueError(f"{folder}: networks of the family {family.name!r} are not kept in converted folders")
    boxed = boxed_variables(module, latent_shape)
    params = load_sharded(folder, "transformer", boxed["params"], dtype, mesh)
    constants = family.files.constants(folder, module.config, latent_shape)
    return {"params": params, "constants": put_replicated(constants, replicated(mesh))}


def load_any_adapter(path: Path, preset: str, module: Any) -> Adapter:
    """An adapter from a file of this project's, or from one of the family's published forms.

    Raises:
      ValueError: it is missing, damaged, or made for another network; names the file.
    """
    if is_own_file(path):
        adapter, metadata = load_adapter(path)
        check_preset(path, metadata, preset)
        return adapter
    family = family_of(module)
    if family.files is None:
        raise ValueError(f"{path}: adapters of the family {family.name!r} are read from this project's own files alone")
    if (card := read_card(path)) is not None and card.preset:
        check_preset(path, {"preset": card.preset}, preset)
    return family.files.read_adapter(path, module.config)


def cast(variables: Tree, dtype: Any) -> Tree:
    """Parameters in another dtype; constants stay in float32."""
    return {**variables, "params": jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])}
