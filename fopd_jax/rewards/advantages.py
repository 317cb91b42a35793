"""`rewards.combine` within a jitted program: scores of several rewards, failures among them, to advantages.

Group sums are masked sums over the whole batch, of which a group has few: scattered additions have no order on GPUs,
and a resumed run is to have the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fopd_jax.parallel.sharding import AnyMesh, replicated
from fopd_jax.rewards.combine import EPSILON, FEWEST, Normalise

Values = Float[Array, " b"]
Counted = Bool[Array, " b"]
Members = Bool[Array, "g b"]


class TracedAdvantages(NamedTuple):
    """As `combine.Advantages`: `values` count where `valid`, are 0 elsewhere and where `flat`, and never NaN."""

    values: Values
    valid: Counted
    flat: Counted
    dropped: Int[Array, ""]
    flat_share: Float[Array, ""]


def advantages(
    values: Float[Array, "r b"],
    weights: Float[Array, " r"] | Float[Array, "r b"],
    groups: Int[Array, " b"],
    count: int,
    normalise: Normalise = "global",
    clip: float = 5.0,
    mesh: AnyMesh | None = None,
) -> TracedAdvantages:
    """Advantages of samples, limited to ±`clip`, in float32. `values`: of each reward, NaN where it failed.

    `weights`: of each reward, or of each reward for each sample; finite, not all 0. `groups`: 0 … `count` - 1, of which
    some may have no samples, or -1 of a sample that takes no part. With a `mesh` every device computes the whole, so
    that no way of splitting the batch changes a bit.
    """
    weights = jnp.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, values.shape)
    if mesh is not None and mesh.size > 1:
        whole = replicated(mesh)
        values, weights, groups = (jax.lax.with_sharding_constraint(each, whole) for each in (values, weights, groups))
    members = groups[None] == jnp.arange(count)[:, None]
    needed = weights != 0
    usable = ~(needed & ~jnp.isfinite(values)).any(axis=0)
    sizes = _sums(usable, members)
    kept = sizes >= FEWEST
    valid = usable & _of_samples(kept, members)
    terms = jnp.where(valid[None] & needed, values, 0.0)
    compare = _each if normalise == "each" else _sum
    found = compare(terms, weights, valid, members, normalise)
    lively = _sums(found != 0, members) > 0
    present = members.any(axis=1)
    return TracedAdvantages(
        values=jnp.clip(found, -clip, clip),
        valid=valid,
        flat=valid & ~_of_samples(lively, members),
        dropped=(present & ~kept).sum(),
        flat_share=(kept & ~lively).sum(dtype=jnp.float32) / jnp.maximum(kept.sum(dtype=jnp.float32), 1),
    )


def _sum(
    terms: Float[Array, "r b"], weights: Float[Array, "r b"], valid: Counted, members: Members, normalise: Normalise
) -> Values:
    """The weighted sum first, then the comparison."""
    total = (weights * terms).sum(axis=0)
    distance = _distance(total, valid, members)
    if normalise == "group":
        return distance / (_deviation(distance, valid, members) + EPSILON)
    alike = (weights[:, :, None] == weights[:, None, :]).all(axis=0)  # samples that the same rewards score alike
    return distance / (_spreads(total, alike & valid[None]) + EPSILON)


def _each(
    terms: Float[Array, "r b"], weights: Float[Array, "r b"], valid: Counted, members: Members, normalise: Normalise
) -> Values:
    """Each reward's comparison first, then the weighted sum."""
    total = jnp.zeros_like(terms[0])
    for values, weight in zip(terms, weights, strict=True):
        counted = valid & (weight != 0)
        distance = _distance(values, counted, members)
        total += weight * distance / (_deviation(distance, counted, members) + EPSILON)
    return total / (_spreads(total, valid[None])[0] + EPSILON)


def _distance(values: Values, counted: Counted, members: Members) -> Values:
    """To the mean of the group's counted samples; exactly 0 where they are equal, and of what does not count.

    The group's least value is taken off first: of 20.1 and 20.2 more digits stay than in a mean of numbers about 20.
    """
    mine = members & counted[None]
    low = jnp.where(mine, values[None], jnp.inf).min(axis=1)
    high = jnp.where(mine, values[None], -jnp.inf).max(axis=1)
    above = jnp.where(counted, values - _of_samples(jnp.where(low < high, low, 0.0), members), 0.0)
    means = _sums(above, mine) / jnp.maximum(_sums(counted, mine), 1)
    return jnp.where(counted & _of_samples(low < high, members), above - _of_samples(means, members), 0.0)


def _deviation(distance: Values, counted: Counted, members: Members) -> Values:
    """Of each sample's group: the standard deviation of its counted samples."""
    sizes = jnp.maximum(_sums(counted, members), 1)
    return _of_samples(jnp.sqrt(_sums(jnp.square(distance), members) / sizes), members)


def _spreads(values: Values, counted: Bool[Array, "k b"]) -> Float[Array, " k"]:
    """The standard deviation over the counted samples of the batch, 0 of none."""
    size = jnp.maximum(counted.sum(axis=1, dtype=jnp.float32), 1)
    distance = values[None] - (jnp.where(counted, values[None], 0.0).sum(axis=1) / size)[:, None]
    return jnp.sqrt(jnp.where(counted, jnp.square(distance), 0.0).sum(axis=1) / size)


def _sums(values: Any, members: Members) -> Float[Array, " g"]:
    """Over the samples of each group."""
    return jnp.where(members, values.astype(jnp.float32)[None], 0.0).sum(axis=1)


def _of_samples(of_groups: Any, members: Members) -> Any:
    """Of each sample what its group has; False or 0 of a sample in no group."""
    zero = jnp.zeros((), of_groups.dtype)
    return jnp.where(members, of_groups[:, None], zero).sum(axis=0).astype(of_groups.dtype)
