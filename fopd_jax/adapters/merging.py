"""Teachers merged into one start for the student, and how much of the merge its rank keeps.

What is merged are updates ΔW = scale·a·b, weighted: `weights` that sum to 1 average, others scale (task arithmetic,
Ilharco et al. 2022, arXiv 2212.04089). Sums of products stay factors; `ties` and `dare` choose among single elements,
so they see every ΔW whole, one layer of a scanned stack at a time. Both are also for whole networks' differences.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fopd_jax.adapters.lora import Adapter, Layer, Tree, map_layers, product
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.config.teaching import DENSE_MERGES, MERGES

Energies = Mapping[str, tuple[Array, Array]]
"""By layer `(kept, all)`: the squared norm of the merged update that the student's rank holds, and all of it."""
_LARGEST = 0x7F800000  # the bits of infinity


@dataclasses.dataclass(frozen=True)
class Kept:
    """Share of the merged updates' squared norm that is left at the student's rank: overall, and of the worst layer."""

    overall: float
    worst: float
    layer: str


# ---- the ways


def merge(
    method: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    config: LoRAConfig,
    density: float = 0.2,
    seed: int = 0,
) -> Adapter:
    """Merge teachers into a start for the student, see `merge_measured`."""
    return merge_measured(method, adapters, weights, config, density, seed)[0]


def merge_measured(
    method: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    config: LoRAConfig,
    density: float = 0.2,
    seed: int = 0,
) -> tuple[Adapter, Energies]:
    """The merge, and where it was cut to `config.rank` how much of it that keeps.

    `svd`: the exact sum, cut; `concatenate`: the exact sum at the sum of the ranks; `factors`: a and b averaged apart,
    at the teachers' own rank; `ties` and `dare`: see there, at `density`, cut. `seed`: of what `dare` drops.

    Raises:
      ValueError: unknown method, or a rank that the layers cannot have.
    """
    check_merge(method)
    if method == "svd":
        return truncate_measured(concatenate(adapters, weights), config)
    if method in DENSE_MERGES:
        return _merge_dense(method, adapters, weights, config, density, seed)
    return (concatenate if method == "concatenate" else average_factors)(adapters, weights), {}


def check_merge(method: str) -> None:
    """Raises ValueError where there is no such way to merge."""
    if method not in MERGES:
        raise ValueError(f"cold_start.merge: found {method!r}, expected one of {MERGES}")


def kept_energy(energies: Energies) -> Kept | None:
    """In numbers; None where nothing was cut, or nothing is there."""
    shares: dict[str, float] = {}
    kept = whole = 0.0
    for path, (held, of_all) in energies.items():
        held, of_all = (np.asarray(each, np.float64) for each in (held, of_all))
        kept, whole = kept + held.sum(), whole + of_all.sum()
        for index in np.argwhere(of_all > 0):
            place = "".join(f"[{i}]" for i in index)
            shares[f"{path}{place}"] = float(held[tuple(index)] / of_all[tuple(index)])
    if not shares:
        return None
    layer = min(shares, key=shares.__getitem__)
    return Kept(float(kept / whole), shares[layer], layer)


# ---- sums of products


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Exact weighted sum of the products, Σ w·ΔW, at the sum of the ranks."""
    scale = adapters[0].scale

    def join(*layers: Layer) -> dict[str, Array]:
        factors = [w * each.scale / scale for w, each in zip(weights, adapters, strict=True)]
        a = jnp.concatenate([layer["a"] for layer in layers], axis=-1)
        b = jnp.concatenate([f * layer["b"] for f, layer in zip(factors, layers, strict=True)], axis=-2)
        return {"a": a, "b": b}

    return Adapter(map_layers(join, *(each.weights for each in adapters)), scale)


def truncate(adapter: Adapter, config: LoRAConfig) -> Adapter:
    """See `truncate_measured`."""
    return truncate_measured(adapter, config)[0]


def truncate_measured(adapter: Adapter, config: LoRAConfig) -> tuple[Adapter, Energies]:
    """Best rank-R approximation of an adapter (Eckart-Young), without forming ΔW: two QR and one small SVD a layer.

    Both factors carry the square root of the singular values, so neither starts tiny.

    Raises:
      ValueError: the target rank exceeds what the adapter's layers can have.
    """

    def shrink(layer: Layer) -> tuple[dict[str, Array], tuple[Array, Array]]:
        check_rank(config.rank, min(layer["a"].shape[-2:] + layer["b"].shape[-1:]))
        qa, ra = jnp.linalg.qr(layer["a"])
        qb, rb = jnp.linalg.qr(jnp.swapaxes(layer["b"], -1, -2))
        core = product((adapter.scale / config.scale) * ra, jnp.swapaxes(rb, -1, -2))
        u, s, vt = jnp.linalg.svd(core, full_matrices=False)
        root = jnp.sqrt(s[..., : config.rank])
        a = product(qa, u[..., : config.rank]) * jnp.expand_dims(root, -2)
        b = product(jnp.expand_dims(root, -1) * vt[..., : config.rank, :], jnp.swapaxes(qb, -1, -2))
        squares = jnp.square(config.scale * s)
        return {"a": a, "b": b}, (squares[..., : config.rank].sum(-1), squares.sum(-1))

    found = {path: shrink(layer) for path, layer in _layers(adapter.weights).items()}
    return _joined({path: layer for path, (layer, _) in found.items()}, config.scale), {
        "/".join(path): energy for path, (_, energy) in found.items()
    }


def check_rank(wanted: int, available: int) -> None:
    """Raises ValueError where merged layers cannot have a rank."""
    if wanted > available:
        raise ValueError(f"adapter.rank: found {wanted}, but the merged layers have rank {available} at most")


def average_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Average a and b apart, as the method's authors do. It is not the average of the products; for comparison only.

    Scales that differ from the first's are multiplied into b.
    """
    scale = adapters[0].scale

    def mean(*leaves: Array | np.ndarray) -> Array:
        return jnp.stack([w * leaf for w, leaf in zip(weights, leaves, strict=True)]).sum(0)

    scaled = [
        map_layers(lambda layer, f=each.scale / scale: {**layer, "b": f * layer["b"]}, each.weights)
        for each in adapters
    ]
    return Adapter(jax.tree.map(mean, *scaled), scale)


# ---- element by element


def trim(delta: Float[Array, "*shape"], density: float) -> Float[Array, "*shape"]:
    """The largest of a layer's elements by magnitude, a share `density` of them, at least one; zero elsewhere."""
    count = max(int(density * delta.size), 1)
    bits = _bits(delta)
    return jnp.where(bits >= _least_kept(bits, count), delta, jnp.zeros_like(delta))


def ties(deltas: Float[Array, "k *shape"], weights: Float[Array, " k"], density: float) -> Float[Array, "*shape"]:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim each, elect each element's sign by summed mass, and average
    those of that sign alone, by their weights, times the sum of all weights.
    """
    trimmed = jnp.stack([trim(each, density) for each in deltas])
    spread = jnp.reshape(weights, (-1, *(1,) * (deltas.ndim - 1)))
    mass = spread * trimmed
    elected = jnp.where(mass.sum(0, keepdims=True) >= 0, 1.0, -1.0)
    agree = jnp.sign(mass) == elected
    size = jnp.where(agree, jnp.abs(spread), 0.0).sum(0)
    total = jnp.where(agree, mass, 0.0).sum(0)
    return jnp.abs(weights).sum() * total / jnp.where(size > 0, size, 1.0)


def dare(
    key: PRNGKeyArray, deltas: Float[Array, "k *shape"], weights: Float[Array, " k"], density: float
) -> Float[Array, "*shape"]:
    """DARE (Yu et al. 2023, arXiv 2311.03099): each update's elements are dropped with probability 1 - `density`, what
    is left counts 1 / `density`, then the weighted sum, of which the expectation is that of whole updates.
    """
    stays = jax.random.bernoulli(key, density, deltas.shape)
    return jnp.tensordot(weights, jnp.where(stays, deltas / density, 0.0), 1, precision=jax.lax.Precision.HIGHEST)


def combine(
    method: str, key: PRNGKeyArray, deltas: Float[Array, "k *shape"], weights: Float[Array, " k"], density: float
) -> Float[Array, "*shape"]:
    """`ties` or `dare`."""
    return ties(deltas, weights, density) if method == "ties" else dare(key, deltas, weights, density)


def layer_key(seed: int, path: str) -> PRNGKeyArray:
    """Of what is dropped in a layer, or in a stack of them."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def _bits(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Whole numbers in the order of magnitudes: that of the bits of floats that are not negative."""
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _least_kept(bits: Int[Array, "*shape"], count: int) -> Int[Array, ""]:
    """The `count`-th largest, by 31 halvings of all there are: exact, and unlike a sort it leaves shards where they
    are.
    """

    def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low + 1) // 2
        enough = (bits >= middle).sum() >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    return jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(_LARGEST)))[0]


def _merge_dense(
    method: str, adapters: Sequence[Adapter], weights: Sequence[float], config: LoRAConfig, density: float, seed: int
) -> tuple[Adapter, Energies]:
    layers = [_layers(each.weights) for each in adapters]
    scales = jnp.asarray([each.scale for each in adapters], jnp.float32)
    merged: dict[tuple[str, ...], Layer] = {}
    energies: dict[str, tuple[Array, Array]] = {}
    for path in layers[0]:
        found = [each[path] for each in layers]
        check_rank(config.rank, min(found[0]["a"].shape[-2], found[0]["b"].shape[-1]))
        key = layer_key(seed, "/".join(path))
        numbers = jnp.asarray(weights, jnp.float32), scales, jnp.float32(config.scale)
        merged[path], energies["/".join(path)] = _merge_layer(method, density, config.rank, key, found, *numbers)
    return _joined(merged, config.scale), energies


@partial(jax.jit, static_argnums=(0, 1, 2))
def _merge_layer(
    method: str,
    density: float,
    rank: int,
    key: PRNGKeyArray,
    layers: list[Layer],
    weights: Float[Array, " k"],
    scales: Float[Array, " k"],
    scale: Float[Array, ""],
) -> tuple[Layer, tuple[Array, Array]]:
    """One layer `[D, R]`, or a stack of them `[L, D, R]` one after the other; energies are `[]` or `[L]`."""

    def one(inputs: tuple[PRNGKeyArray, list[Layer]]) -> tuple[Layer, tuple[Array, Array]]:
        own_key, own = inputs
        dense = jnp.stack([s * product(layer["a"], layer["b"]) for s, layer in zip(scales, own, strict=True)])
        return _cut(combine(method, own_key, dense, weights, density), rank, scale)

    if layers[0]["a"].ndim == 2:
        return one((key, layers))
    lead = layers[0]["a"].shape[:-2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), layers)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(flat[0]["a"].shape[0]))
    found = jax.lax.map(one, (keys, flat))
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found)


def _cut(
    matrix: Float[Array, "i o"], rank: int, scale: Float[Array, ""]
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """The best rank-R approximation of ΔW as factors that both carry the root of the singular values, and energies.

    The leading right singular vectors are those of the Gram matrix, which takes half the time of an SVD; within what
    they span the approximation is the best, so that their rounding costs it in second order alone.
    """
    flipped = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if flipped else matrix
    _, vectors = jnp.linalg.eigh(product(tall.T, tall))
    within = vectors[:, ::-1][:, :rank]
    u, s, vt = jnp.linalg.svd(product(tall, within), full_matrices=False)
    left, right = u, product(vt, within.T)
    root = jnp.sqrt(s / scale)
    before, after = (right.T, left.T) if flipped else (left, right)
    factors = {"a": before * root[None], "b": root[:, None] * after}
    return factors, (jnp.square(s).sum(), jnp.square(matrix).sum())


# ---- trees


def _layers(weights: Tree) -> dict[tuple[str, ...], Any]:
    """Layers by module path."""
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(weights)
    return {path[:-1]: {"a": leaf, "b": leaves[*path[:-1], "b"]} for path, leaf in leaves.items() if path[-1] == "a"}


def _joined(layers: Mapping[tuple[str, ...], Layer], scale: float) -> Adapter:
    return Adapter(traverse_util.unflatten_dict(dict(layers)), scale)
