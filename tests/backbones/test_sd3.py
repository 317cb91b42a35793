"""The record of Stable Diffusion 3: what is its own, against published figures and the encoders' lengths."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import adapter_shapes
from fopd_jax.backbones.record import Tokens
from fopd_jax.backbones.sd3.record import SD3
from fopd_jax.backbones.weights import boxed_variables, example_inputs
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.models.clip import CLIP_G, CLIP_L
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.models.t5 import T5_XXL

MEDIUM, LATENT = PRESETS["sd35_medium"], (64, 64, 16)


def test_512_pixels_are_64_latents_a_side_and_1024_tokens():
    assert SD3.latent_shape(MEDIUM, (512, 512)) == LATENT
    assert SD3.tokens(MEDIUM, LATENT, 205) == Tokens(1024, 205)


def test_a_high_image_has_as_many_tokens_as_a_wide_one():
    high, wide = SD3.latent_shape(MEDIUM, (768, 512)), SD3.latent_shape(MEDIUM, (512, 768))
    assert (high, wide) == ((96, 64, 16), (64, 96, 16))
    assert SD3.tokens(MEDIUM, high, 205) == SD3.tokens(MEDIUM, wide, 205) == Tokens(1536, 205)


@pytest.mark.parametrize(
    ("size", "found"), [((520, 520), "520"), ((512, 520), "height 512, width 520"), ((6160, 512), "height 6160, ")]
)
def test_what_patches_do_not_fill_or_the_table_does_not_reach_is_refused(size: tuple[int, int], found: str):
    with pytest.raises(ValueError, match=rf"^model\.resolution: found {found}.*multiple of 16, at most 6144$"):
        SD3.latent_shape(MEDIUM, size)


def test_a_prompts_encoding_is_both_towers_tokens_then_t5s_and_the_towers_joined():
    context, pooled = SD3.encoded(MEDIUM, 128)
    assert context == (77 + 128, T5_XXL.width) == (CLIP_L.max_length + 128, 4096)
    assert pooled == (CLIP_L.projection_dim + CLIP_G.projection_dim,) == (2048,)


def test_the_network_is_fed_a_thousandfold_sigma():
    text = Conditioning(jnp.ones((2, 3, 4)), jnp.ones((2, 5)))
    x = jnp.zeros((2, 4, 4, 16))
    for sigma, expected in ((jnp.float32(0.25), [250, 250]), (jnp.asarray([0.5, 1.0]), [500, 1000])):
        found = SD3.inputs(x, sigma, text)
        np.testing.assert_array_equal(found[1], np.asarray(expected, np.float32))
        assert (found[0], found[2], found[3]) == (x, text.context, text.pooled)


def test_the_authors_adapter_has_191_modules_and_18_8_million_parameters():
    boxed = boxed_variables(MMDiT(MEDIUM), LATENT)
    adapter = adapter_shapes(LoRAConfig(), nn.unbox(boxed)["params"], SD3.targets).weights
    stacked = {path: leaf for path, leaf in flatten_dict(adapter).items() if path[-1] == "a"}
    assert sum(int(np.prod(leaf.shape[:-2])) for leaf in stacked.values()) == 191
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter)) == pytest.approx(18.8e6, rel=0.005)


@pytest.mark.parametrize(("side", "expected"), [(64, 2.22e12), (128, 10.9e12)])
def test_a_forward_costs_what_was_published(side: int, expected: float):
    tokens = SD3.tokens(MEDIUM, (side, side, 16), 205)
    assert SD3.flops(MEDIUM, tokens, None, "none").forward == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_built_and_takes_its_example_inputs(preset: str):
    module = SD3.build(PRESETS[preset], "xla", jnp.bfloat16, "full", "xla")
    expected = (PRESETS[preset], "xla", jnp.bfloat16, "full", "xla")
    assert (module.config, module.impl, module.dtype, module.remat, module.kernels) == expected
    side = 4 * module.config.patch_size
    latent = (side, side, module.config.channels)
    v = jax.eval_shape(
        lambda *inputs: module.init_with_output(jax.random.key(0), *inputs)[0], *example_inputs(module, latent)
    )
    assert (v.shape, v.dtype) == ((1, *latent), jnp.float32)
