"""Kernels run on each device's own rows of a mesh, inside the groups of `GradientGroups`, as on one device.

Tolerance on ‖a - b‖/‖b‖ against the plain form on one device: 1e-5, float32 sums in another order.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.config.schema import MeshShape
from fopd_jax.models.kernels.adapted import adapted_products
from fopd_jax.models.kernels.choice import KernelImpl
from fopd_jax.models.kernels.rows import split_over
from fopd_jax.models.norms import norm_modulate
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import activation_rules
from tests.models.kernels.interpretation import errors, interpreted
from tests.quick import environment

FLOAT32 = 1e-5
TOKENS, WIDTH, RANK = 20, 128, 4
GROUPS = {"one sum a device": ("data", "fsdp"), "one sum a row": ("data",), "one sum a timestep": ()}


def layer(factors: Any, rows: Any, kernels: KernelImpl) -> Any:
    """A norm, modulated, through two adapted products; x itself is read beside, as a residual."""
    x, shift, scale, matrix, bias = rows["x"], rows["shift"], rows["scale"], _matrix(0), jnp.ones(WIDTH)
    x, (normed,) = norm_modulate(x, [(shift, scale)], kernels, jnp.float32)
    if kernels == "pallas":
        out = adapted_products(
            normed,
            (matrix, matrix.T),
            (bias, bias),
            jnp.concatenate([a[None] for a, _ in factors], -1),
            tuple(b[None] for _, b in factors),
        )
    else:
        out = [
            normed @ w + bias[None, None] + normed @ a @ b
            for w, (a, b) in zip((matrix, matrix.T), factors, strict=True)
        ]
    return x + out[0] * out[1]


def _matrix(seed: int, *shape: int) -> Any:
    return jnp.asarray(0.1 * np.random.default_rng(seed).standard_normal(shape or (WIDTH, WIDTH)), jnp.float32)


def _grouped(once: tuple[str, ...]) -> dict[str, float]:
    """Errors on a mesh of eight devices against the plain form on one."""
    mesh = make_mesh(MeshShape(2, 2, 2))
    shapes = {"x": (8, TOKENS, WIDTH), "shift": (8, WIDTH), "scale": (8, WIDTH)}
    rows = {name: _matrix(i, *shape) for i, (name, shape) in enumerate(shapes.items(), 1)}
    factors = tuple((_matrix(5 + i, WIDTH, RANK), _matrix(7 + i, RANK, WIDTH)) for i in range(2))

    def differentiate(kernels: KernelImpl) -> Callable[[Any, Any], Any]:
        def loss(factors: Any, rows: Any) -> Any:
            out = layer(factors, rows, kernels)
            return jnp.sin(out).sum(), out

        return jax.grad(loss, has_aux=True)

    @jax.jit
    def found(factors: Any, rows: Any) -> Any:
        groups = GradientGroups(mesh, once, P())
        with activation_rules(mesh):
            sums, out = groups.gradient(differentiate("pallas"), factors, rows)
            return groups.total(sums), out

    expected = jax.jit(differentiate("xla"))(factors, rows)
    with interpreted():
        outcome = found(factors, jax.device_put(rows, NamedSharding(mesh, P(("data", "fsdp")))))

    return errors(outcome, expected)


def test_kernels_run_on_each_devices_own_rows():
    done = subprocess.run([sys.executable, __file__], env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert max(found.values()) <= FLOAT32, (case, found)


def test_what_is_split_is_told():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with activation_rules(mesh):
        assert not split_over("heads")
    assert not split_over(None)


if __name__ == "__main__":
    found = {case: _grouped(once) for case, once in GROUPS.items()}
    mesh = make_mesh(MeshShape(2, 2, 2))
    with activation_rules(mesh):
        assert split_over("heads")
        assert not split_over(None)
    print(json.dumps(found))
