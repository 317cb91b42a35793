"""Batches as the devices get them: one, or several of their own sizes at once."""

from contextlib import closing

import jax
import numpy as np
import pytest

from fopd_jax.config.schema import MeshShape
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.running.feed import Feed

SHARDING = batch_sharding(make_mesh(MeshShape(), jax.devices()[:1]))


def _rows(step: int, size: int) -> dict[str, np.ndarray]:
    return {"x": np.full((size, 2), step, np.float32)}


def test_a_batch_is_put_on_the_devices():
    with closing(Feed(lambda step: _rows(step, 3), SHARDING, 3, 5)) as feed:
        batch = feed(2)
        assert isinstance(batch["x"], jax.Array)
        jax.tree.map(np.testing.assert_array_equal, batch, _rows(2, 3))
        jax.tree.map(np.testing.assert_array_equal, feed.whole(3), _rows(3, 3))


def test_several_batches_have_each_a_size():
    with closing(Feed(lambda step: (_rows(step, 3), _rows(-step, 5)), SHARDING, (3, 5), 5)) as feed:
        one, two = feed(2)
        assert (one["x"].shape, two["x"].shape) == ((3, 2), (5, 2))
        assert isinstance(two["x"], jax.Array)
        jax.tree.map(np.testing.assert_array_equal, feed.whole(1), (_rows(1, 3), _rows(-1, 5)))
    with (
        closing(Feed(lambda step: (_rows(step, 3), _rows(step, 5)), SHARDING, (3, 4), 5)) as feed,
        pytest.raises(ValueError, match="batch: found 5 rows, expected 4"),
    ):
        feed(0)
