"""Reinforcement on the forward process does not depend on the mesh: eight simulated devices compute what one does."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fopd_jax.config.schema import EMA
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.steps.forward_rl import make_programs
from tests.quick import environment
from tests.steps.forward import CRD, NFT, RATE, make_base, make_inputs, make_pieces, make_state

TOLERANCE = 1e-6
CASES: dict[str, tuple[tuple[int, int, int], tuple[str, ...], Any]] = {
    "nft 1": ((1, 1, 1), (), NFT),
    "nft 8": ((4, 2, 1), ("data", "fsdp"), NFT),
    "crd 1": ((1, 1, 1), (), CRD),
    "crd 8": ((4, 2, 1), ("data",), CRD),  # a group of two on a row of two devices
}


def _outcome(name: str) -> dict[str, Any]:
    """A rollout, and a step on given latents."""
    lengths, once, objective = CASES[name]
    devices = np.asarray(jax.devices()[: np.prod(lengths)]).reshape(lengths)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    pieces = make_pieces(GradientGroups(mesh, once, P()), objective=objective)
    split, everywhere = batch_sharding(mesh), replicated(mesh)
    programs = make_programs(pieces, RATE, EMA(0.5, every=1), everywhere, everywhere)
    base, state = jax.device_put((make_base(), make_state()), everywhere)
    latents, conditioning, credit = make_inputs()
    latents, conditioning = jax.device_put((latents, conditioning), split)
    rolled = programs.roll_out(base, state, conditioning)
    state, metrics = programs.learn(base, state, latents, conditioning, jax.device_put(credit, everywhere))
    flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves((state.trained, state.old))]
    return {
        "rolled": np.asarray(rolled).ravel().tolist(),
        "state": np.concatenate(flat).tolist(),
        "metrics": {each: float(value) for each, value in metrics.items() if value.ndim == 0},
        "split": rolled.sharding == split or len(jax.devices()) == 1,
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """This file, run as a program on eight simulated devices."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment(8), check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["nft", "crd"])
def test_eight_devices_compute_what_one_does(name: str, outcomes: dict[str, Any]) -> None:
    one, eight = outcomes[f"{name} 1"], outcomes[f"{name} 8"]
    for what in ("rolled", "state"):
        a, b = np.asarray(eight[what]), np.asarray(one[what])
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < TOLERANCE, what
    for each, value in one["metrics"].items():
        assert eight["metrics"][each] == pytest.approx(value, rel=1e-5, abs=1e-7), each


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8
    print(json.dumps({name: _outcome(name) for name in CASES}))
