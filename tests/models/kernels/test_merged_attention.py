"""The merged kernel, run by XLA on the CPU, against plain attention of the same projections, forward and gradients.

Tolerances on ‖a - b‖/‖b‖. In float32: 1e-5, sums of some hundred numbers in another order; scores of some hundred have
a rounding of 3e-5 each, and so have their exponentials: 1e-4. In bfloat16 the plain form rounds queries, keys, weights
and gradients to 2⁻⁹ on the way, the kernel as many at other places: against float32 it may be 1.2 times as far off.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.kernels import merged_backward, merged_forward
from fopd_jax.models.kernels.merged_attention import MOST_KEYS, Stream, merged_attention

FLOAT32, FLOAT32_LARGE, BFLOAT16 = 1e-5, 1e-4, 1.2


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
    for s, n in zip(streams, tokens, strict=True):
        if s.q is not None:
            out = jax.nn.dot_product_attention(heads(s.q, n, s.q_scale), k, v)
            outs.append(out.reshape(s.k.shape[0], n, -1))
    return tuple(outs)


def _merged(streams: tuple[Stream, ...], head_dim: int, tokens: tuple[int, ...]) -> tuple[Any, ...]:
    outs = merged_attention(streams, head_dim, tokens, "kept")
    return tuple(out[:, :n] for out, n in zip(outs, tokens, strict=False))


@functools.cache
def _differentiated(function: Any, head_dim: int, tokens: tuple[int, ...]) -> Any:
    """Outputs, and the gradients of all operands for random cotangents."""

    @jax.jit
    def both(streams: Any) -> Any:
        outs, pull = jax.vjp(lambda streams: function(streams, head_dim, tokens), streams)
        rng = np.random.default_rng(1)
        cotangents = tuple(jnp.asarray(rng.standard_normal(out.shape), out.dtype) for out in outs)
        return outs, pull(cotangents)[0]

    return both


def _outcome(function: Any, case: Case, streams: tuple[Stream, ...] | None = None) -> tuple[Any, Any]:
    return _differentiated(function, case.head_dim, case.tokens)(streams or case.streams())


def _errors(found: Any, expected: Any) -> dict[str, float]:
    def error(a: Any, b: Any) -> float:
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    paths = jax.tree_util.tree_leaves_with_path(jax.tree.map(error, found, expected))
    return {jax.tree_util.keystr(path): value for path, value in paths}


CASES = {
    "a group that is not whole, padded text": Case(6, 32, (36, 32), (36, 21)),
    "blocks, text that is only read": Case(2, 64, (300, 13), (300, 13), asking=1),
    "no qk-norm, image alone": Case(2, 64, (36,), (36,), gain=None, asking=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_plain_attention(case: Case, monkeypatch: pytest.MonkeyPatch):
    for kernel in (merged_forward, merged_backward):
        monkeypatch.setattr(kernel, "_SCORES", 0)  # as small blocks as there are, of 256 queries
    (outs, gradients), (expected, theirs) = (_outcome(function, case) for function in (_merged, _plain))
    for name, error in (_errors(outs, expected) | _errors(gradients, theirs)).items():
        assert error <= FLOAT32, name


def test_bfloat16_rounds_no_more_than_plain_attention():
    case = Case(2, 64, (100, 30), (100, 30), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes bfloat16 and float32, in its gradient, too
        exact = _outcome(_plain, case, jax.tree.map(lambda x: x.astype(jnp.float32), case.streams()))
        plain = _errors(_outcome(_plain, case), exact)
    for name, error in _errors(_outcome(_merged, case), exact).items():
        assert error <= BFLOAT16 * plain[name], name


@pytest.mark.parametrize("gain", [2.85, 6.0], ids=["at the bound", "beyond the bound"])
def test_scores_as_large_as_the_scales_allow(gain: float):
    """Queries and keys all along one line: scores are as far from 0 as they can be, some queries' all on one side.

    Half of the queries see nothing but the least score, the others the largest; the text's keys point the other way.
    """
    case = Case(2, 64, (36, 13), (36, 13), gain=gain)
    image, text = case.streams()
    ones, flat = jnp.ones_like(image.k), jnp.full(case.head_dim, gain, jnp.float32)
    sign = jnp.where(jnp.arange(36) % 2, 1.0, -1.0)[None, :, None]
    image = image._replace(q=ones * sign, k=ones, q_scale=flat, k_scale=flat)
    for opposite in (1.0, -1.0):
        other = text._replace(k=opposite * jnp.ones_like(text.k), q_scale=flat, k_scale=flat)
        (outs, gradients), (expected, theirs) = (
            _outcome(function, case, (image, other)) for function in (_merged, _plain)
        )
        pairs = {
            "image": (outs[0], expected[0]),
            "text": (outs[1], expected[1]),
            "dv": (gradients[0].v, theirs[0].v),
        }
        for name, (found, right) in pairs.items():
            assert _errors(found, right)[""] <= FLOAT32_LARGE, (name, opposite)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_more_tokens_than_fit_are_refused():
    x: Any = jax.ShapeDtypeStruct((1, MOST_KEYS + 1, 128), jnp.bfloat16)
    streams = (Stream(x, x, x),)
    with pytest.raises(ValueError, match=rf"^attention: 'merged' holds at most {MOST_KEYS} tokens, .*'splash'"):
        merged_attention(streams, 64, (MOST_KEYS + 1,), "kept")
