"""The merged kernel, run by XLA on the CPU, against plain attention of the same projections, forward and gradients.

Tolerances on ‖a - b‖/‖b‖. In float32: 1e-5, sums of some hundred numbers in another order.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from fopd_jax.models.kernels.merged_attention import Stream, merged_attention

FLOAT32 = 1e-5
INTERPRETED = functools.partial(pl.pallas_call, interpret=True)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pl, "pallas_call", INTERPRETED)
    with jax.default_matmul_precision("default"):  # the kernel says itself what it means
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of one call: the arrays' lengths, and how many tokens of each are real."""

    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    dtype: Any = jnp.float32
    gain: float | None = 1.0  # of the norms' scales; None: no qk-norm
    asking: int = 2
    batch: int = 1

    def streams(self) -> tuple[Stream, ...]:
        rng = np.random.default_rng(0)

        def stream(i: int, length: int) -> Stream:
            q, k, v = (
                jnp.asarray(rng.standard_normal((self.batch, length, self.heads * self.head_dim)), self.dtype)
                for _ in range(3)
            )
            asked = q if i < self.asking else None
            if self.gain is None:
                return Stream(asked, k, v)
            scales = (jnp.asarray(self.gain * rng.uniform(0.6, 1.4, self.head_dim), jnp.float32) for _ in range(2))
            return Stream(asked, k, v, *scales)

        return tuple(stream(i, length) for i, length in enumerate(self.lengths))


def _plain(streams: tuple[Stream, ...], head_dim: int, tokens: tuple[int, ...]) -> tuple[Any, ...]:
    """What the network does without a kernel: normalise, round, join, softmax in float32."""

    def heads(x: Any, count: int, scale: Any = None) -> Any:
        x = x[:, :count].reshape(x.shape[0], count, -1, head_dim)
        if scale is None:
            return x
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * scale[None, None, None]
        return y.astype(x.dtype)

    k = jnp.concatenate([heads(s.k, n, s.k_scale) for s, n in zip(streams, tokens, strict=True)], 1)
    v = jnp.concatenate([heads(s.v, n) for s, n in zip(streams, tokens, strict=True)], 1)
    outs = []
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        for s, n in zip(streams, tokens, strict=True):
            if s.q is not None:
                out = jax.nn.dot_product_attention(heads(s.q, n, s.q_scale), k, v)
                outs.append(out.reshape(s.k.shape[0], n, -1))
    return tuple(outs)


def _merged(streams: tuple[Stream, ...], head_dim: int, tokens: tuple[int, ...]) -> tuple[Any, ...]:
    outs = merged_attention(streams, head_dim, tokens, "kept")
    return tuple(out[:, :n] for out, n in zip(outs, tokens, strict=False))


def _outcome(function: Any, case: Case) -> tuple[Any, Any]:
    """Outputs, and the gradients of all operands for random cotangents."""

    @jax.jit
    def both(streams: Any) -> Any:
        outs, pull = jax.vjp(lambda streams: function(streams, case.head_dim, case.tokens), streams)
        rng = np.random.default_rng(1)
        cotangents = tuple(jnp.asarray(rng.standard_normal(out.shape), out.dtype) for out in outs)
        return outs, pull(cotangents)[0]

    return both(case.streams())


def _errors(found: Any, expected: Any) -> dict[str, float]:
    def error(a: Any, b: Any) -> float:
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    paths = jax.tree_util.tree_leaves_with_path(jax.tree.map(error, found, expected))
    return {jax.tree_util.keystr(path): value for path, value in paths}


CASES = {
    "a group that is not whole, padded text": Case(6, 32, (36, 32), (36, 21)),
    "blocks, text that is only read": Case(2, 64, (600, 13), (600, 13), asking=1),
    "no qk-norm, image alone": Case(2, 64, (36,), (36,), gain=None, asking=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_plain_attention(case: Case):
    (outs, gradients), (expected, theirs) = (_outcome(function, case) for function in (_merged, _plain))
    for name, error in (_errors(outs, expected) | _errors(gradients, theirs)).items():
        assert error <= FLOAT32, name
