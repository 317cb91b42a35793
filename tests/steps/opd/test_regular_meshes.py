"""What regularises does not depend on the mesh: four simulated devices compute what one does, within 1e-5.

This file is also the program that they run, of one form of the update.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fopd_jax.config.schema import EMA, LogitNormal, MeshShape, Offline
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Bound
from fopd_jax.steps.opd.step import make_step
from fopd_jax.steps.state import init_state
from tests.quick import environment
from tests.steps.opd.network import (
    BANK,
    CLIPPED,
    SHAPE,
    STUDENT,
    adapter,
    frozen_of,
    make_batch,
    make_spec,
    make_velocity,
    normal,
    prompts,
)

MESHES = {"one": (1, 1, 1), "four": (2, 2, 1)}
FORMS: dict[str, dict[str, Any]] = {"fused": {}, "replay": {"updates_per_rollout": 2, "minibatches": 1}}
PROMPTS, ROWS = 4, 8


def outcome(form: str, lengths: tuple[int, int, int]) -> dict[str, Any]:
    """Two steps, whose scalars and weights are the same wherever they are computed."""
    spec = make_spec(
        CLIPPED, anchor_moves="slow", anchor_decay=0.5, bound=Bound(0.02, 0.3, (1e-3, 10.0)), **FORMS[form],
        offline=Offline(weight=0.7, batch_size=ROWS, levels=LogitNormal()),
    )  # fmt: skip
    mesh = make_mesh(MeshShape(*lengths), jax.devices()[: np.prod(lengths)])
    pieces = Pieces(spec, make_velocity(), groups=GradientGroups(mesh, ("data", "fsdp"), PartitionSpec()))
    optimizer, split, everywhere = optax.sgd(0.1), batch_sharding(mesh), replicated(mesh)
    state = dataclasses.replace(init_state(STUDENT, optimizer, 5, beta=0.3), old=adapter(60))
    rows = {"x0": normal(50, ROWS, *SHAPE), "conditioning": prompts(51, ROWS)}
    batch = dataclasses.replace(make_batch(PROMPTS), offline=rows)
    state, frozen = jax.device_put((state, frozen_of(BANK)), everywhere)
    step, batch = make_step(pieces, optimizer, EMA(), everywhere), jax.device_put(batch, split)
    seen = {}
    for _ in range(2):
        state, metrics = step(frozen, state, jax.tree.map(jnp.asarray, batch))
        seen = {name: float(value) for name, value in metrics.items() if not name.startswith("samples/")}
    moved = jax.tree.map(lambda new, old: np.asarray(new - old).ravel(), state.trained, STUDENT)
    return seen | {"beta": float(state.beta), "moved": np.concatenate(jax.tree.leaves(moved)).tolist()}


def found(form: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, form], env=environment(4), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["replay", pytest.param("fused", marks=pytest.mark.slow)])
def test_four_devices_compute_what_one_does(form: str) -> None:
    one, four = map(found(form).get, MESHES)
    assert one is not None
    assert four is not None
    assert one.keys() == four.keys()
    for name, value in one.items():
        tolerance = 1e-5 * float(np.linalg.norm(value)) + 1e-7
        assert np.linalg.norm(np.asarray(four[name]) - np.asarray(value)) <= tolerance, name
    assert one["offline_loss"] > 0
    assert one["mar_beta"] != pytest.approx(0.3)


if __name__ == "__main__":
    print(json.dumps({mesh: outcome(sys.argv[1], lengths) for mesh, lengths in MESHES.items()}))
