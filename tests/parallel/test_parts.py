"""Functions of many rows in parts of one size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.parts import in_chunks, in_parts, own_mesh


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 3), (6, 3), (2, 5)])
def test_parts_are_the_whole_and_compile_once(count: int, rows: int):
    traced = []

    @jax.jit
    def function(pair):
        traced.append(pair["a"].shape)
        return {"sum": pair["a"] + pair["b"].sum(-1), "b": 2 * pair["b"]}

    a, b = jnp.arange(float(count)), np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    found = in_parts(function, {"a": np.asarray(a), "b": b}, own_mesh(), rows)
    np.testing.assert_allclose(found["sum"], np.arange(count) + b.sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["b"], 2 * b)
    assert len(traced) == 1


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="found no rows"):
        in_parts(lambda rows: rows, np.zeros((0, 2)), own_mesh())


@pytest.mark.parametrize(("count", "rows", "largest"), [(1, 1, 1), (7, 3, 3), (6, 4, 3), (5, 8, 5), (4, 1, 1)])
def test_chunks_are_the_whole_and_none_is_larger(count: int, rows: int, largest: int):
    sizes = set()

    def function(pair):
        sizes.add(len(pair["b"]))
        return {"sum": pair["a"] + pair["b"].sum(-1), "b": 2 * pair["b"]}

    pair = {"a": jnp.arange(float(count)), "b": jax.random.normal(jax.random.key(0), (count, 4, 2)).sum(-1)}
    found = jax.jit(lambda pair: in_chunks(function, pair, own_mesh(), rows))(pair)
    np.testing.assert_allclose(found["sum"], pair["a"] + pair["b"].sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["b"], 2 * pair["b"])
    assert sizes == {largest}


def test_chunks_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"^in_chunks: found 6 rows, expected a multiple of 4, the mesh's parts"):
        in_chunks(lambda rows: rows, jnp.zeros((6, 2)), AbstractMesh((2, 2, 2), AXES))
