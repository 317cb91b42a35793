"""Scaled dot-product attention with a named implementation.

- `xla`: plain matrix products; the scores of all heads stand in memory. Runs everywhere.
- `cudnn`: NVIDIA's flash attention; half precision only.
- `splash`: JAX's own flash attention for TPUs (Pallas), run on each device's own rows and heads.
- `merged`: our own for TPUs (Pallas), on projections as they are, with qk-norm inside; mapped over devices alike.

A flash kernel's backward needs its output and one float32 a query, but no scores. `save_attention` is the
rematerialisation policy that keeps exactly these, so that no attention kernel runs a second time.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fopd_jax.models.kernels import merged_attention as merged
from fopd_jax.models.kernels.rows import dividing

AttentionImpl = Literal["xla", "cudnn", "splash", "merged"]
AUTO = "auto"
ATTENTION_OUTPUT = "attention"  # what `checkpoint_name` calls it
_PLATFORMS = {"cudnn": "gpu", "splash": "tpu", "merged": "tpu"}
_CUDNN_DTYPES = ("bfloat16", "float16")
_CUDNN_FORWARD = "dot_product_attention_fwd"  # begins the names of the primitives that JAX has for it
_TILE, _MAX_BLOCK, _MAX_WHOLE = 128, 1024, 2048  # a TPU register's lanes; what fits into 16 MiB of VMEM
AXES = ("batch", None, "heads", None)  # logical axes of queries, keys and values


# ---- the choice


def resolve_attention(name: str, dtype: Any, head_dim: int, platform: str | None = None) -> AttentionImpl:
    """The implementation that a config's `model.attention` names; `auto` is the fastest that can run.

    `platform`: of the devices that the program is for (default: those of the default backend).

    Raises:
      ValueError: there is no such implementation, or it cannot run there. There is no silent fallback.
    """
    if name not in (AUTO, *get_args(AttentionImpl)):
        raise ValueError(f"attention: found {name!r}, expected one of {(AUTO, *get_args(AttentionImpl))}")
    fastest_first: tuple[AttentionImpl, ...] = ("cudnn", "merged", "splash", "xla")
    wanted: list[AttentionImpl] = [impl for impl in fastest_first if name in (AUTO, impl)]
    refusals = [_refusal(impl, jnp.dtype(dtype).name, head_dim, platform or jax.default_backend()) for impl in wanted]
    if all(refusals):
        raise ValueError(f"attention: {name!r} {refusals[0]}; use 'xla' or 'auto'")
    return wanted[refusals.index("")]


def _refusal(impl: AttentionImpl, dtype: str, head_dim: int, platform: str) -> str:
    """Why an implementation cannot run, or nothing."""
    if _PLATFORMS.get(impl, platform) != platform:
        return f"needs a {_PLATFORMS[impl].upper()}, but the backend is {platform!r}"
    if impl == "cudnn" and dtype not in _CUDNN_DTYPES:
        return f"computes in {' or '.join(_CUDNN_DTYPES)}, but the network's dtype is {dtype}"
    if impl == "cudnn" and (head_dim > 128 or head_dim % 8):
        return f"needs a head dimension of at most 128 and a multiple of 8, but the network's is {head_dim}"
    return merged.refusal(head_dim, dtype) if impl == "merged" else ""


# ---- attention


def attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"], impl: AttentionImpl
) -> Float[Array, "b t n h"]:
    """softmax(q·kᵀ/√h)·v over all positions, softmax in float32. SD3 masks nothing: padded text is attended."""
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32 inside
        if impl == "splash":
            return splash_attention(q, k, v)
        if impl == "cudnn":
            return cudnn_attention(q, k, v)
        if impl == "merged":
            (out,) = merged_attention((merged.Stream(*map(_merge_heads, (q, k, v))),), q.shape[3])
            return out.reshape(q.shape)
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v, implementation="xla"), ATTENTION_OUTPUT)


def _merge_heads(x: Float[Array, "b t n h"]) -> Float[Array, "b t d"]:
    return x.reshape(*x.shape[:2], -1)


def save_attention(primitive: Any, *args: Any, **params: Any) -> Any:
    """Rematerialisation policy: keep attentions' outputs, and what else a flash kernel's backward reads of them."""
    if primitive.name.startswith(_CUDNN_FORWARD):  # its float32 a query has no name, so all its outputs are kept
        return True
    return _save_named(primitive, *args, **params)


_save_named = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)


def _on_each_device(local: Callable[..., Array], *operands: Float[Array, "b _ n h"]) -> Float[Array, "b t n h"]:
    """A kernel on each device's own rows and heads of the ambient mesh; its result is placed as the first operand is.

    Which mesh axes hold them is what Linen's logical rules say of `batch` and `heads`. A dimension that its axes do not
    divide is whole on every device, as parameters are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*operands)
    specs = tuple(P(*_placed(mesh, x.shape)) for x in operands)
    # Every axis is manual: kernels are opaque to the partitioner, whatever the specs leave unsaid.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)


def _placed(mesh: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The mesh axes of each dimension of queries with that shape."""
    wished: Any = nn.spmd.logical_to_mesh_axes(AXES)
    return tuple(dividing(mesh, axes, size) for axes, size in zip(wished, shape, strict=True))


# ---- cuDNN


def cudnn_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"], keys: int | None = None
) -> Float[Array, "b t n h"]:
    """cuDNN's flash attention over the first `keys` positions (None: all), on each device's own rows and heads."""
    return _on_each_device(functools.partial(_cudnn_local, keys=keys or k.shape[1]), q, k, v)


def _cudnn_local(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"], keys: int
) -> Float[Array, "b t n h"]:
    """JAX refuses the gradient at odd lengths (1024 image and 205 text tokens, say): it takes the empty array that
    stands for "no bias" for a bias. Such lengths get one more row, masked as a key or dropped as a query.
    """
    queries = q.shape[1]
    q, k, v = map(_even, (q, k, v))
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with jax.numpy_dtype_promotion("standard"):
        if (queries, keys) == (q.shape[1], k.shape[1]):
            return attend(q, k, v)
        zeros = 0 * q[:, 0, 0, 0].astype(jnp.int32)  # made of q, so that `vmap` maps both or neither
        return attend(q, k, v, query_seq_lengths=zeros + queries, key_value_seq_lengths=zeros + keys)[:, :queries]


def _even(x: Float[Array, "b t n h"]) -> Float[Array, "b u n h"]:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) if x.shape[1] % 2 else x


# ---- splash


def splash_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b t n h"], v: Float[Array, "b t n h"]
) -> Float[Array, "b t n h"]:
    """Flash attention of as many queries as keys, on each device's own rows and heads of the ambient mesh."""
    return _on_each_device(_splash_local, q, k, v)


def _splash_local(
    q: Float[Array, "b t n h"], k: Float[Array, "b t n h"], v: Float[Array, "b t n h"]
) -> Float[Array, "b t n h"]:
    length, heads, head_dim = q.shape[1:]
    padded, _ = splash_blocks(length)
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # the kernel does not scale; exact for H = 64
    padding = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding).transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(_splash_kernel(heads, length))(q, k, v)
    return out.transpose(0, 2, 1, 3)[:, :length]


def splash_blocks(length: int) -> tuple[int, int]:
    """Length of a padded sequence, and of the equal blocks that it is cut into: as few as fit, with little padding."""
    tiles = -(-length // _TILE)
    count = -(-tiles * _TILE // _MAX_BLOCK)
    block = -(-tiles // count) * _TILE
    return count * block, block


def _splash_kernel(heads: int, length: int) -> Callable[..., Any]:
    """The kernel `[N, T, H]³ → [N, T, H]` for padded sequences; padded keys are masked in the blocks that hold any.

    The fused backward computes dq, dk and dv in five matrix products a block, where two kernels would take seven.
    """
    padded, block = splash_blocks(length)
    whole = padded if padded <= _MAX_WHOLE else block  # with all keys in one block, dq needs no sum over blocks
    mask = splash.FullMask((padded, padded)) if padded == length else _real_keys(padded, length)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block,
        block_q_dkv=block, block_kv_dkv=whole, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads), block_sizes=sizes, residual_checkpoint_name=ATTENTION_OUTPUT
        )


@functools.cache
def _real_keys(padded: int, length: int) -> splash.NumpyMask:
    return splash.NumpyMask(np.broadcast_to(np.arange(padded) < length, (padded, padded)))


# ---- merged


def merged_attention(
    streams: tuple[merged.Stream, ...], head_dim: int, tokens: tuple[int, ...] | None = None
) -> tuple[Float[Array, "b t d"], ...]:
    """The kernel of `kernels.merged_attention`, on each device's own rows and heads of the ambient mesh.

    `tokens`: how many are real of each stream; None for all. Heads are whole on a device, as with `splash_attention`.
    """
    rows, width = streams[0].k.shape[0], streams[0].k.shape[2]
    tokens = tokens or tuple(stream.k.shape[1] for stream in streams)
    local = functools.partial(merged.merged_attention, head_dim=head_dim, tokens=tokens, residuals=ATTENTION_OUTPUT)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(streams)
    batch, _, heads, _ = _placed(mesh, (rows, 1, width // head_dim, head_dim))
    spec = P(batch, None, heads)
    specs = jax.tree.map(lambda x: spec if x.ndim == 3 else P(), streams)  # every device has the norms' scales
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=spec, check_vma=False)(streams)
