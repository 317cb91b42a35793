"""One forward as a program: what it takes and gives, and its arithmetic."""

import jax
import pytest

from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.stages.forward import forward_program
from tests.configs import load


@pytest.mark.parametrize("bank", [0, 3])
def test_shapes_and_flops_are_those_of_the_rows(bank: int):
    """An adapter's products count where rows have one; attention's share is that of the miniature's own shapes."""
    config = resolve(override(load(), {"batch_size": 4}))
    assert isinstance(config, OPD)
    program = forward_program(config, make_mesh(config.run.mesh, jax.devices()[:1]), bank)
    _, adapters, x, text, route = program.arguments
    out = jax.eval_shape(program.step, *program.arguments)
    assert out.shape == x.shape == (4, 24, 24, 3)
    assert (text.context.shape[0], route.shape) == (4, (4,))
    assert bool(jax.tree.leaves(adapters)) == bool(bank)
    assert all(leaf.shape[-3] == bank for leaf in jax.tree.leaves(adapters))
    base = forward_program(config, make_mesh(config.run.mesh, jax.devices()[:1])).flops.forward
    assert (program.flops.forward > base) == bool(bank)
    assert program.flops.model == program.flops.forward
    assert program.attention is not None
    assert 0 < program.attention.share < 0.5
    assert program.attention.width == 32
