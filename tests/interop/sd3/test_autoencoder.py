"""The autoencoder's name table against diffusers' own state dict, both directions, and what is refused."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from fopd_jax.interop.files.tables import from_tensors, to_tensors
from fopd_jax.interop.sd3.autoencoder import autoencoder_component
from fopd_jax.models.autoencoder import SD3_VAE, AutoencoderConfig

# The fields of SD3.5's `vae/config.json`; it may lack `mid_block_add_attention`, which diffusers has by default.
PUBLISHED = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.3", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
SMALL = PUBLISHED | {"block_out_channels": [4, 8, 12, 12], "norm_num_groups": 2, "latent_channels": 3}
UNEVEN = SMALL | {  # no power of two, no two widths alike
    "block_out_channels": [6, 12, 9], "norm_num_groups": 3, "layers_per_block": 1, "shift_factor": 0,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip
CASES = {"small": SMALL, "uneven": UNEVEN}
QUERY = "decoder.mid_block.attentions.0.to_q.weight"


def torch_model(fields: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(**{name: value for name, value in fields.items() if not name.startswith("_")})


@functools.cache
def torch_shapes(case: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in torch_model(CASES[case]).state_dict().items()}


def random_tensors(case: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in torch_shapes(case).items()}


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_published_config() -> None:
    component = autoencoder_component(PUBLISHED)
    assert component.config == SD3_VAE
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in torch_model(PUBLISHED).state_dict().items()}
    assert component.tensor_shapes() == expected
    assert sum(np.prod(shape, dtype=int) for shape in component.shapes.values()) == 83_819_683


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_diffusers(case: str) -> None:
    assert autoencoder_component(CASES[case]).tensor_shapes() == torch_shapes(case)


def test_config_of_another_network() -> None:
    assert autoencoder_component(UNEVEN).config == AutoencoderConfig(
        channels=(6, 12, 9),
        layers_per_block=1,
        latent_channels=3,
        image_channels=3,
        groups=3,
        scaling_factor=1.5305,
        shift_factor=0.0,
    )


def test_config_of_a_model_in_memory() -> None:
    """diffusers holds tuples where its file holds lists, all fields, and no class name."""
    fields = dict(torch_model(SMALL).config) | {"block_out_channels": tuple(SMALL["block_out_channels"])}
    assert autoencoder_component(fields).config == autoencoder_component(SMALL).config


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_every_tensor(case: str, dtype: Any) -> None:
    component = autoencoder_component(CASES[case])
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(case).items()}
    params = from_tensors(component, tensors)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    back = to_tensors(component, params)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)
        assert back[name].dtype == tensors[name].dtype
        assert back[name].flags.c_contiguous


def test_written_tensors_load_into_diffusers() -> None:
    component = autoencoder_component(SMALL)
    tensors = to_tensors(component, from_tensors(component, random_tensors("small")))
    model = torch_model(SMALL)
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)


def test_layouts() -> None:
    tensors = random_tensors("small")
    params = from_tensors(autoencoder_component(SMALL), tensors)
    kernel = params["encoder"]["down_blocks_1"]["resnets_0"]["conv1"]["kernel"]  # [rows, columns, in, out]
    assert kernel[2, 0, 3, 7] == tensors["encoder.down_blocks.1.resnets.0.conv1.weight"][7, 3, 2, 0]
    attention = params["decoder"]["mid_block"]["attention"]
    np.testing.assert_array_equal(attention["to_q"]["kernel"].T, tensors[QUERY])


def test_older_attention_names_are_refused() -> None:
    tensors = random_tensors("small")
    tensors["decoder.mid_block.attentions.0.query.weight"] = tensors.pop(QUERY)
    message = f"tensor {QUERY!r}: missing, expected shape (12, 12)"
    with pytest.raises(ValueError, match=exactly(message)):
        from_tensors(autoencoder_component(SMALL), tensors)


REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("_class_name", "AutoencoderTiny", "'AutoencoderKL'"),
    ("act_fn", "gelu", "'silu'"),
    ("use_quant_conv", True, "False"),
    ("use_post_quant_conv", True, "False"),
    ("mid_block_add_attention", False, "True"),
    ("latents_mean", [0.0] * 3, "None"),
    ("latents_std", [1.0] * 3, "None"),
    ("down_block_types", ["DownEncoderBlock2D"] * 3, repr(["DownEncoderBlock2D"] * 4)),
    ("up_block_types", ["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"], repr(["UpDecoderBlock2D"] * 4)),
    ("out_channels", 4, "3"),
    ("in_channels", 0, "a positive integer"),
    ("layers_per_block", 1.5, "a positive integer"),
    ("latent_channels", True, "a positive integer"),
    ("norm_num_groups", "2", "a positive integer"),
    ("block_out_channels", [4, 8, 13, 12], "positive multiples of norm_num_groups=2"),
    ("block_out_channels", [], "positive multiples of norm_num_groups=2"),
    ("block_out_channels", 4, "positive multiples of norm_num_groups=2"),
    ("scaling_factor", 0, "a positive number"),
    ("scaling_factor", "1.5305", "a number"),
    ("shift_factor", None, "a number"),
)


@pytest.mark.parametrize(("field", "found", "right"), REFUSED)
def test_refused_configs(field: str, found: Any, right: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"autoencoder config {field}: found {found!r}, expected {right}")):
        autoencoder_component(SMALL | {field: found})


OPTIONAL = {"_class_name", "_diffusers_version", "force_upcast", "latents_mean", "latents_std", "sample_size"}


@pytest.mark.parametrize("field", sorted(SMALL.keys() - OPTIONAL))
def test_missing_fields(field: str) -> None:
    fields = {name: value for name, value in SMALL.items() if name != field}
    with pytest.raises(ValueError, match=f"^autoencoder config {field}: found nothing, expected "):
        autoencoder_component(fields)


def test_fields_that_do_not_matter_may_be_missing() -> None:
    fields = {name: value for name, value in SMALL.items() if name not in OPTIONAL}
    assert autoencoder_component(fields).config == autoencoder_component(SMALL).config
