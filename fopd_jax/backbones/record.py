"""What a family of networks is to steps, loops and stages.

A second family is a second record (`registry.register`): its Linen module takes `(*inputs(x, sigma, conditioning),
route)` and returns the velocity in float32, reads an optional low-rank update a dense layer from the collection
`adapter` (see `models.dense.Dense`), and names the axes of its parameters in the vocabulary of
`parallel.sharding.RULES`, which all networks share, or in its own `rules`. What else it reads than parameters stands in
the collection `constants`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.parallel.sharding import Rules

Tree = Any
Shape = Any
"""A frozen dataclass of a family's own: what distinguishes its networks. It has `width` and `head_dim`."""
LatentShape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Lengths of a sample's image and of its text, in tokens."""

    image: int
    text: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """FLOPs of one sample through the network: forward, backward to what trains, what rematerialisation repeats."""

    forward: float
    backward: float
    recomputed: float


@dataclasses.dataclass(frozen=True)
class Files:
    """A family's weights and adapters as others keep them.

    `class_name`: of the network in diffusers, by which a converted folder's manifest tells the family.
    `read_adapter(path, shape)`; `write_adapter(folder, adapter, shape, card)`; `constants(folder, shape, latent
    shape)`: of a converted folder, what the network reads beside its parameters; `write_network(folder, converted
    folder, params)`.
    """

    class_name: str
    read_adapter: Callable[[Path, Shape], Adapter]
    write_adapter: Callable[[Path, Adapter, Shape, AdapterCard], None]
    constants: Callable[[Path, Shape, LatentShape], Tree]
    write_network: Callable[[Path, Path, Tree], None]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One family.

    `presets`: shapes by published name. `module`: its Linen class; `build(shape, attention, dtype, remat)` makes one,
    whose `config` is the shape and whose `impl` the attention. `inputs(x, sigma, conditioning)`: the module's
    positional inputs; x `[B, H, W, C]`, sigma 0-d or `[B]`. `latent_shape(shape, (height, width) in pixels)` and
    `encoded(shape, T5 tokens)`: the shapes of one latent image, and of one prompt's `context` and `pooled`, the latter
    None where the network has no such input; the former refuses a size that it cannot make. `targets`: groups of
    layers that adapters may act on, by the last two parts of their paths. `flops(shape, tokens, adapter or None,
    rematerialisation)`; `tokens(shape, latent shape, text tokens)`.
    `rules`: mesh axes of logical axes that the shared table lacks. `files`: None where nobody else keeps any.
    `coordinates(shape, tokens, adapter)`: FLOPs more of a sample's backward, where an adapter has a layer of that name
    (`models.coordinates`); None: the module does not read it.
    `float8`: its dense layers read the collection `scales` (see `backbones.float8`).
    """

    name: str
    presets: Mapping[str, Shape]
    module: type[nn.Module]
    build: Callable[[Shape, str, Any, str], nn.Module]
    inputs: Callable[[Any, Any, Any], tuple[Any, ...]]
    latent_shape: Callable[[Shape, tuple[int, int]], LatentShape]
    encoded: Callable[[Shape, int], tuple[tuple[int, int], tuple[int] | None]]
    targets: Mapping[str, tuple[str, ...]]
    flops: Callable[[Shape, Tokens, LoRAConfig | None, str], Pass]
    tokens: Callable[[Shape, LatentShape, int], Tokens]
    rules: Rules = ()
    files: Files | None = None
    coordinates: Callable[[Shape, Tokens, LoRAConfig], float] | None = None
    float8: bool = False
