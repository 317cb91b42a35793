"""The teachers' gap apart by timestep and task, at no forward more: what a mean over the rollout hides.

A term of a timestep is one more sum per sample, as all of `objectives.opd.TERMS` are, so that every form of the update
adds it up as it does those. The gap is the plain mean square of the velocities' difference: weights of the objective
are left out, so that timesteps can be compared. With as many counted at each, its mean over them is `velocity_mse`.
"""

import re

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.objectives.opd import TERMS, Totals
from fopd_jax.steps.opd.spec import OPDSpec

PREFIX = "gap/"
"""Of the metrics `gap/TASK/t00`; timesteps have their number in the sampler's schedule."""
_GAP, _COUNT = PREFIX, "counted/"
_PARTED = re.compile(f"{_GAP}(t[0-9]+)")


def timestep_name(t: int) -> str:
    return f"t{t:02d}"


def timesteps(spec: OPDSpec) -> tuple[str, ...]:
    """Names of those that the gap is measured at: the trained ones, or none."""
    return tuple(map(timestep_name, range(*spec.window))) if spec.gaps else ()


def term_names(spec: OPDSpec) -> tuple[str, ...]:
    """Of the terms that an update sums up."""
    return (*TERMS, *(f"{kind}{t}" for t in timesteps(spec) for kind in (_GAP, _COUNT)))


def parted(spec: OPDSpec, terms: Totals, slot: Int[Array, "*b"]) -> Totals:
    """A timestep's terms with the gap's beside them; `slot`: its place among the trained ones, one for all or each."""
    found = dict(terms)
    for k, t in enumerate(timesteps(spec)):
        here = (slot == k).astype(jnp.float32)
        found |= {f"{_GAP}{t}": terms["velocity_mse"] * here, f"{_COUNT}{t}": terms["weight"] * here}
    return found


def gap_names(spec: OPDSpec) -> tuple[str, ...]:
    """Of the metrics, weights apart."""
    return tuple(f"{PREFIX}{name}/{t}" for name in spec.teachers for t in timesteps(spec))


def gap_metrics(totals: Totals, route: Int[Array, " b"], teachers: tuple[str, ...]) -> dict[str, Float[Array, ""]]:
    """`gap/TASK/t00`, with the weight that a mean over several steps gives it: 0 where nothing was counted."""
    there = [match[1] for match in map(_PARTED.fullmatch, totals) if match]
    if not there:
        return {}
    mine = (route[None] == jnp.arange(len(teachers))[:, None]).astype(jnp.float32)

    def by_task(kind: str) -> Float[Array, "t k"]:  # of all at once: where samples are on many devices, one reduction
        return (jnp.stack([totals[f"{kind}{t}"] for t in there])[:, None] * mine[None]).sum(-1)

    counted = by_task(_COUNT)
    means = by_task(_GAP) / jnp.maximum(counted, 1)
    names = [(f"{PREFIX}{name}/{t}", i, k) for k, name in enumerate(teachers) for i, t in enumerate(there)]
    found = {name: means[i, k] for name, i, k in names}
    return found | {f"weights/{name}": counted[i, k] for name, i, k in names}
