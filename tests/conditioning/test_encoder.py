"""From prompts to the network's two text inputs: how encodings are joined, and how prompts are batched."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.conditioning.encoder import PromptEncoder, TextEncoder, TextEncoders, join
from fopd_jax.config.schema import MeshShape
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_sharding

CLIP_LENGTH, T5_LENGTH, CONTEXT = 3, 4, 12
WIDTHS, POOLED = (2, 5), (2, 3)


# ---- joining


def _states(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _towers(dtype: Any = jnp.float32) -> list[tuple[jax.Array, jax.Array]]:
    return [
        (_states(k, 2, CLIP_LENGTH, width, dtype=dtype), _states(k + 9, 2, pooled, dtype=dtype))
        for k, (width, pooled) in enumerate(zip(WIDTHS, POOLED, strict=True))
    ]


def test_towers_stand_side_by_side_padded_to_t5s_width_and_t5_follows():
    towers, t5 = _towers(), _states(5, 2, T5_LENGTH, CONTEXT)
    found = join(towers, t5, T5_LENGTH, CONTEXT)
    assert found.context.shape == (2, CLIP_LENGTH + T5_LENGTH, CONTEXT)
    np.testing.assert_array_equal(found.context[:, :CLIP_LENGTH, :2], towers[0][0])
    np.testing.assert_array_equal(found.context[:, :CLIP_LENGTH, 2:7], towers[1][0])
    np.testing.assert_array_equal(found.context[:, :CLIP_LENGTH, 7:], np.zeros((2, CLIP_LENGTH, 5)))
    np.testing.assert_array_equal(found.context[:, CLIP_LENGTH:], t5)
    np.testing.assert_array_equal(found.pooled, np.concatenate([towers[0][1], towers[1][1]], axis=-1))


def test_without_t5_its_positions_are_zeros():
    towers = _towers()
    found, full = (join(towers, t5, T5_LENGTH, CONTEXT) for t5 in (None, _states(5, 2, T5_LENGTH, CONTEXT)))
    assert found.context.shape == full.context.shape
    np.testing.assert_array_equal(found.context[:, :CLIP_LENGTH], full.context[:, :CLIP_LENGTH])
    assert not found.context[:, CLIP_LENGTH:].any()
    np.testing.assert_array_equal(found.pooled, full.pooled)


@pytest.mark.parametrize("with_t5", [True, False])
def test_the_towers_dtype_is_kept(with_t5: bool):
    t5 = _states(5, 2, T5_LENGTH, CONTEXT) if with_t5 else None
    found = join(_towers(jnp.bfloat16), t5, T5_LENGTH, CONTEXT)
    assert found.context.dtype == found.pooled.dtype == jnp.bfloat16


# ---- batching


class Fake:
    """Text networks that encode a prompt's letters, and remember what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.traces = 0

    def tokenize(self, length: int) -> Any:
        def tokenize(prompts: Sequence[str]) -> np.ndarray:
            self.asked.append(list(prompts))
            rows = [[ord(letter) for letter in prompt.ljust(length)[:length]] for prompt in prompts]
            return np.asarray(rows, np.int32)

        return tokenize

    def clip(self, width: int, pooled: int) -> TextEncoder:
        def apply(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            self.traces += 1
            states = params["scale"] * ids.astype(jnp.float32)
            return jnp.repeat(states[:, :, None], width, axis=2), jnp.repeat(states[:, -1:], pooled, axis=1)

        return TextEncoder(apply, {"scale": jnp.float32(width)}, self.tokenize(CLIP_LENGTH))

    def t5(self) -> TextEncoder:
        def apply(params: Any, ids: jax.Array) -> jax.Array:
            return jnp.repeat(-ids.astype(jnp.float32)[:, :, None], CONTEXT, axis=2)

        return TextEncoder(apply, {}, self.tokenize(T5_LENGTH))

    def encoder(self, batch_size: int, *, with_t5: bool = True, sharding: Any = None) -> PromptEncoder:
        clip = [self.clip(width, pooled) for width, pooled in zip(WIDTHS, POOLED, strict=True)]
        encoders = TextEncoders(clip, self.t5() if with_t5 else None, T5_LENGTH, CONTEXT)
        return PromptEncoder(encoders, batch_size, sharding)


def _expected(prompt: str, with_t5: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """One prompt's encoding by the fake networks, written out."""
    ids = [ord(letter) for letter in prompt.ljust(T5_LENGTH)[:T5_LENGTH]]
    rows = [[2.0 * i] * 2 + [5.0 * i] * 5 + [0.0] * 5 for i in ids[:CLIP_LENGTH]]
    rows += [[-float(i) if with_t5 else 0.0] * CONTEXT for i in ids]
    last = float(ids[CLIP_LENGTH - 1])
    return np.array(rows), np.array([2 * last] * 2 + [5 * last] * 3)


PROMPTS = ["abcd", "", "x", "zz", "abcd"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_prompts_keep_their_order_whatever_the_batch(batch_size: int):
    found = Fake().encoder(batch_size)(PROMPTS)
    assert isinstance(found.context, np.ndarray)
    assert len(found.context) == len(found.pooled) == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        context, pooled = _expected(prompt)
        np.testing.assert_array_equal(found.context[row], context)
        np.testing.assert_array_equal(found.pooled[row], pooled)


def test_without_t5_nothing_else_changes():
    found = Fake().encoder(2, with_t5=False)(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        context, pooled = _expected(prompt, with_t5=False)
        np.testing.assert_array_equal(found.context[row], context)
        np.testing.assert_array_equal(found.pooled[row], pooled)


def test_a_short_batch_is_filled_up_and_one_program_serves_all():
    fake = Fake()
    encoder = fake.encoder(4)
    encoder(PROMPTS)
    encoder(["q"])
    batches = [[*PROMPTS[:4]], [PROMPTS[4], "", "", ""], ["q", "", "", ""]]
    assert fake.asked == [batch for batch in batches for _ in range(3)]  # two towers and T5
    assert fake.traces == 2  # one for each tower


def test_batches_are_put_where_they_belong():
    sharding = batch_sharding(make_mesh(MeshShape()))
    found = Fake().encoder(2, sharding=sharding)(PROMPTS)
    np.testing.assert_array_equal(found.context[2], _expected("x")[0])
