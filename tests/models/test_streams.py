"""Streams of tokens are attended as one sequence, whether they are joined or each asks on its own.

Tolerance: only the order of float32 sums may differ, 1e-5 of the norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.streams import Projected, attend

HEAD_DIM, HEADS = 8, 2
IMAGE, TEXT, PADDED = 9, 5, 16


@pytest.fixture
def plain_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's plain products where cuDNN's are asked for."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: plain(*args, **kwargs | {"implementation": "xla"})
    )


def _streams(text: int) -> list[Any]:
    """Queries, keys and values of image and text; what lies behind the real text is large, to be seen if it is read."""
    rng = np.random.default_rng(0)
    made = [rng.standard_normal((3, 2, length, HEADS * HEAD_DIM)) for length in (IMAGE, PADDED)]
    made[1][:, :, TEXT:] = 100.0
    return [jnp.asarray(each[:, :, :length], jnp.float32) for each, length in zip(made, (IMAGE, text), strict=True)]


def _outcome(impl: Any, text: int, read: int) -> Any:
    """Outputs of real tokens, and gradients of one number that all of them make."""

    def outputs(streams: list[Any]) -> Any:
        projected = tuple(Projected(*each, None, None) for each in streams)
        outs = attend(projected, HEAD_DIM, impl, read, (IMAGE, TEXT))
        return [out[:, :length] for out, length in zip(outs[:read], (IMAGE, TEXT), strict=False)]

    streams = _streams(text)
    gradients = jax.grad(lambda streams: sum(jnp.sin(out).sum() for out in outputs(streams)))(streams)
    return outputs(streams), gradients


@pytest.mark.usefixtures("plain_cudnn")
@pytest.mark.parametrize("read", [1, 2])
def test_streams_that_ask_apart_read_the_same(read: int):
    """Also with text that is padded; nothing of the padding is read, and it gets no gradient."""
    (outs, gradients), (found, found_gradients) = _outcome("xla", TEXT, read), _outcome("cudnn", PADDED, read)
    assert len(outs) == len(found) == read
    assert not np.any(found_gradients[1][:, :, TEXT:])
    real = [found_gradients[0], found_gradients[1][:, :, :TEXT]]
    for ours, theirs in zip([*found, *real], [*outs, *gradients], strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
