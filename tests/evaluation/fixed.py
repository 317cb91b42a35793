"""Fixed states of the tests' small network: a world of two tasks, of which one has images.

As a program it prints the numbers of all simulated devices: `python -m tests.evaluation.fixed DATA FSDP`.
"""

import dataclasses
import json
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import MeshShape
from fopd_jax.evaluation.fixed_states import Fixed, mean_gaps
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import replicated
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World
from tests.steps.opd.network import (
    BANK,
    CONTEXT,
    DIRECT,
    POOLED,
    SHAPE,
    STUDENT,
    TEACHERS,
    frozen_of,
    make_pieces,
    make_spec,
)

COUNT, SEED, PICTURED = 3, 11, frozenset({"counting"})
PIECES = make_pieces(make_spec(DIRECT))


def encode(prompts: Sequence[str]) -> Conditioning:
    """Each prompt's own numbers."""
    draws = [np.random.default_rng(zlib.crc32(each.encode())) for each in prompts]
    rows = [draw.standard_normal((4 * CONTEXT + POOLED), dtype=np.float32) for draw in draws]
    found = np.stack(rows)
    return Conditioning(found[:, : 4 * CONTEXT].reshape(-1, 4, CONTEXT), found[:, 4 * CONTEXT :])


@dataclasses.dataclass(frozen=True)
class Images:
    """Image i of a batch is noise of its number."""

    name: str
    seed: int

    def batch(self, step: int, rows: Any) -> dict[str, Any]:
        images = [np.random.default_rng((self.seed, step, int(row))).standard_normal(SHAPE) for row in rows]
        return {"x0": np.stack(images), "conditioning": encode([f"{self.name} image {row}" for row in rows])}


def make_world() -> World:
    tasks = {name: Task(name, (), tuple(f"{name} {i}" for i in range(7))) for name in TEACHERS}
    pairs: Any = lambda tasks, size, empty, seed: Images(next(iter(tasks)), seed)  # noqa: E731
    return World(SHAPE, tasks, encode, np.asarray, embed=partial(jax.tree.map, jax.numpy.asarray), pairs=pairs)


def make_fixed(mesh: Mesh | None = None) -> Fixed:
    mesh = mesh or make_mesh(MeshShape(), jax.devices()[:1])
    return Fixed(PIECES, make_world(), mesh, (*TEACHERS, "anchor"), COUNT, SEED, PICTURED)


def placed(mesh: Mesh) -> tuple[Frozen, Any]:
    """The frozen part and the student, on every device."""
    return put_replicated((frozen_of(BANK), STUDENT), replicated(mesh))


def numbers(fixed: Fixed) -> dict[str, Any]:
    """All that a run would know of them."""
    frozen, student = placed(fixed.mesh)
    states, seen = fixed.survey(frozen)
    gaps = np.asarray(fixed.student()(frozen, student, states), np.float64)[:, : 2 * COUNT].reshape(-1, 2, COUNT)
    means = mean_gaps(fixed.tasks, fixed.pictured, np.asarray(states.sigma), np.asarray(states.image), gaps)
    survey = {field.name: getattr(seen, field.name).tolist() for field in dataclasses.fields(seen)}
    return {"means": means, "survey": survey}


if __name__ == "__main__":
    shape = MeshShape(*(int(each) for each in sys.argv[1:]))
    print(json.dumps(numbers(make_fixed(make_mesh(shape, jax.devices())))))
