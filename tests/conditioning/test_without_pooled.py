"""Text by its tokens alone: encoders without towers, caches on disk and in memory, guidance."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.encoder import Conditioning, PromptEncoder, TextEncoder, TextEncoders, join
from fopd_jax.conditioning.kept import MemoryEncodings
from fopd_jax.policy.velocity import guided_velocity

PROMPTS = ("a", "b", "c")
CONTEXT = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)  # exact in bfloat16


def test_t5_alone_is_the_context():
    found = join((), jnp.asarray(CONTEXT), 4, 5)
    np.testing.assert_array_equal(found.context, CONTEXT)
    assert found.pooled is None
    with pytest.raises(ValueError, match="text encoders: found none, expected CLIP towers or T5"):
        join((), None, 4, 5)


def test_an_encoder_without_towers_encodes_batch_by_batch():
    def tokenize(prompts: Any) -> np.ndarray:
        return np.asarray([[len(prompt)] * 4 for prompt in prompts], np.int32)

    def apply(params: Any, ids: Any) -> Any:
        return (ids[..., None] * params[None, None]).astype(jnp.float32)

    t5 = TextEncoder(apply, jnp.arange(5), tokenize)
    found = PromptEncoder(TextEncoders((), t5, 4, 5), batch_size=2)(["x", "xx", "xxx"])
    np.testing.assert_array_equal(found.context[:, 0], np.outer([1, 2, 3], np.arange(5)))
    assert found.pooled is None


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_encodings_come_back_in_the_order_asked_for(kind: str, tmp_path: Path):
    kept = MemoryEncodings() if kind == "memory" else ConditioningCache(tmp_path, "t5", Conditioning((4, 5), None))
    kept.check_space(3)
    kept.write([(PROMPTS[:2], Conditioning(CONTEXT[:2], None)), (PROMPTS[2:], Conditioning(CONTEXT[2:], None))])
    found = kept.read(["c", "a"])
    np.testing.assert_array_equal(found.context.astype(np.float32), CONTEXT[[2, 0]])
    assert found.pooled is None


def test_a_cache_of_one_kind_is_none_of_the_other(tmp_path: Path):
    rounded = CONTEXT.astype(ml_dtypes.bfloat16)
    ConditioningCache(tmp_path, "t5", Conditioning((4, 5), None)).write([(PROMPTS, Conditioning(rounded, None))])
    assert ConditioningCache(tmp_path, "t5", Conditioning((4, 5), (2,))).missing(PROMPTS) == list(PROMPTS)
    assert ConditioningCache(tmp_path, "t5", Conditioning((4, 5), None)).missing(PROMPTS) == []


def test_guidance_shows_text_and_null_rows_in_one_forward():
    def velocity(variables: Any, adapter: Any, x: Any, sigma: Any, text: Conditioning, route: Any) -> jax.Array:
        assert text.pooled is None
        return jnp.broadcast_to(text.context[:, 0, 0].reshape(-1, 1, 1, 1), x.shape)

    text, null = Conditioning(jnp.asarray(CONTEXT), None), Conditioning(jnp.full((1, 4, 5), -1.0), None)
    v = guided_velocity(velocity, {}, {}, jnp.zeros((3, 2, 2, 1)), jnp.float32(0.5), text, null, 3.0)
    np.testing.assert_allclose(v[:, 0, 0, 0], -1 + 3 * (CONTEXT[:, 0, 0] + 1))
