"""What resident text encoders cost: FLOPs by arithmetic, and their program as shapes, to be compiled for any machine.

Counted as in `flops`: matrix products alone, two FLOPs a multiply-add.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.conditioning.converted import apply_of, boxed_params
from fopd_jax.conditioning.encoder import TextEncoder, TextEncoders, TokenIds
from fopd_jax.conditioning.resident import make_encode
from fopd_jax.models.clip import CLIP_G, CLIP_L, CLIPText, CLIPTextConfig
from fopd_jax.models.t5 import T5_XXL, T5Config, T5Encoder
from fopd_jax.parallel.mesh import fold_data
from fopd_jax.parallel.sharding import batch_sharding, parameter_shardings
from fopd_jax.performance.flops import Update
from fopd_jax.performance.program import Program

CLIP_TOWERS = (CLIP_L, CLIP_G)  # of every published Stable Diffusion 3 and 3.5
ENCODE = "encode prompts"


def clip_flops(config: CLIPTextConfig, length: int) -> float:
    """One text of `length` tokens through a tower. The causal mask saves nothing: all pairs are computed."""
    dense = 2.0 * length * (4 * config.width**2 + 2 * config.width * config.mlp_dim)
    attention = 4.0 * length**2 * config.width
    return config.depth * (dense + attention) + 2.0 * config.width * config.projection_dim


def t5_flops(config: T5Config, length: int) -> float:
    """One text of `length` tokens through T5's encoder."""
    inner = config.num_heads * config.head_dim
    dense = 2.0 * length * config.width * (4 * inner + 3 * config.mlp_dim)
    return config.depth * (dense + 4.0 * length**2 * inner)


def encode_flops(t5_length: int) -> float:
    """One prompt through the published encoders."""
    return sum(clip_flops(config, config.max_length) for config in CLIP_TOWERS) + t5_flops(T5_XXL, t5_length)


def encode_program(mesh: Mesh, batch_size: int, t5_length: int, context_dim: int, dtype: str = "bfloat16") -> Program:
    """The program of `ResidentPrompts.embed` for a batch on `mesh`, with the published encoders; no weight is read.

    Its first argument stays in memory beside a training step, its temporaries do not.
    """
    kind = jnp.dtype(dtype)
    clip = [_abstract(CLIPText(config, dtype=kind), kind, mesh) for config in CLIP_TOWERS]
    encoders = TextEncoders(clip, _abstract(T5Encoder(T5_XXL, dtype=kind), kind, mesh), t5_length, context_dim)
    lengths = [*(config.max_length for config in CLIP_TOWERS), t5_length]
    places = batch_sharding(mesh)
    ids = [jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=places) for length in lengths]
    arguments = encoders.params, TokenIds(tuple(ids))
    flops = Update(
        teachers=0.0, rollout=0.0, forward=batch_size * encode_flops(t5_length), backward=0.0, recomputed=0.0
    )
    return Program(ENCODE, make_encode(encoders, mesh), arguments, flops)


def _abstract(network: CLIPText | T5Encoder, dtype: np.dtype, mesh: Mesh) -> TextEncoder:
    """A text encoder whose parameters are shapes, in the places where `ConvertedText.load` puts them."""
    boxed = boxed_params(network)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        nn.unbox(boxed),
        parameter_shardings(fold_data(mesh), boxed),
    )
    return TextEncoder(apply_of(network), params, _no_tokenizer)


def _no_tokenizer(prompts: object) -> np.ndarray:
    raise NotImplementedError("encoders that are shapes alone encode nothing")
