"""The name table against diffusers' own state dict, both directions, and what is refused."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from flax.traverse_util import flatten_dict

from fopd_jax.interop.sd3.diffusers import (
    config_from_diffusers,
    module_names,
    transformer_from_diffusers,
    transformer_to_diffusers,
)
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig, position_table

FULL = MMDiTConfig(
    depth=5, num_heads=2, head_dim=8, dual_layers=2, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=5, table_size=6, base_size=3,
)  # fmt: skip
CASES = {
    "dual and plain, qk-norm": FULL,
    "dual only, no qk-norm": dataclasses.replace(FULL, depth=3, qk_norm=False),
    "plain only, qk-norm": dataclasses.replace(FULL, depth=3, dual_layers=0),
}
FIELDS = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 6, "patch_size": 2, "in_channels": 3, "out_channels": 3,
    "num_layers": 5, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 6,
    "caption_projection_dim": 16, "pooled_projection_dim": 5, "pos_embed_max_size": 6,
    "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
}  # fmt: skip
MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
QUERY = "transformer_blocks.0.attn.to_q.weight"


@functools.cache
def model(config: MMDiTConfig) -> SD3Transformer2DModel:
    fields = FIELDS | {
        "num_layers": config.depth,
        "dual_attention_layers": tuple(range(config.dual_layers)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    del fields["_class_name"]
    return SD3Transformer2DModel(**fields)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def random_tensors(config: MMDiTConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_every_tensor(case: str, scan: bool) -> None:
    config = CASES[case]
    tensors = random_tensors(config)
    variables = transformer_from_diffusers(tensors, config, rows=4, columns=3, scan=scan)
    back = transformer_to_diffusers(variables, config, table=tensors["pos_embed.pos_embed"])
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)
        assert back[name].flags.c_contiguous
    model(config).load_state_dict({name: torch.tensor(tensor) for name, tensor in back.items()}, strict=True)


@pytest.mark.parametrize("scan", [True, False])
def test_written_variables_are_read_back(scan: bool) -> None:
    """A tree as the network initialises it, boxed; the table is the closed form, which diffusers builds too."""
    inputs = (jnp.zeros((1, 8, 6, 3)), jnp.zeros(1), jnp.zeros((1, 2, 6)), jnp.zeros((1, 5)))
    shapes = jax.eval_shape(MMDiT(FULL, scan_layers=scan).init, jax.random.key(0), *inputs)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, dtype=np.float32), shapes)
    variables["constants"]["pos_embed"] = position_table(FULL, 4, 3)
    tensors = transformer_to_diffusers(variables, FULL)
    arguments = {k: v for k, v in FIELDS.items() if k != "_class_name"}
    expected = SD3Transformer2DModel(**arguments).pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(tensors["pos_embed.pos_embed"], expected, rtol=0, atol=1e-6)
    back = transformer_from_diffusers(tensors, FULL, rows=4, columns=3, scan=scan)
    back["constants"]["pos_embed"] = variables["constants"]["pos_embed"]  # compared above, as a part of the whole
    jax.tree.map(np.testing.assert_array_equal, back, nn.unbox(variables))


def test_dtype_is_kept() -> None:
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in random_tensors(FULL).items()}
    variables = transformer_from_diffusers(tensors, FULL, rows=2, columns=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    back = transformer_to_diffusers(variables, FULL, table=tensors["pos_embed.pos_embed"])
    assert {tensor.dtype for tensor in back.values()} == {jnp.dtype(jnp.bfloat16)}


def test_layouts() -> None:
    tensors = random_tensors(FULL)
    params = transformer_from_diffusers(tensors, FULL, rows=2, columns=2, scan=False)["params"]
    np.testing.assert_array_equal(params["blocks_1"]["attn"]["to_q"]["kernel"].T, tensors[QUERY.replace("0", "3")])
    patch = tensors["pos_embed.proj.weight"]  # [D, c, p, q]
    kernel = params["patch_embed"]["kernel"].reshape(2, 2, 3, 16)  # [p, q, c, D]
    assert kernel[1, 0, 2, 7] == patch[7, 2, 1, 0]


def test_table_is_the_checkpoints_own_centre() -> None:
    tensors = random_tensors(FULL)
    crop = transformer_from_diffusers(tensors, FULL, rows=3, columns=2)["constants"]["pos_embed"]
    np.testing.assert_array_equal(crop, tensors["pos_embed.pos_embed"].reshape(6, 6, 16)[1:4, 2:4])
    with pytest.raises(ValueError, match="pos_embed holds 6x6 patches, but the input has 7x2"):
        transformer_from_diffusers(tensors, FULL, rows=7, columns=2)


@pytest.mark.parametrize("missing", [QUERY, "pos_embed.pos_embed", "transformer_blocks.1.attn2.norm_k.weight"])
def test_missing_tensor(missing: str) -> None:
    tensors = random_tensors(FULL)
    shape = tensors.pop(missing).shape
    with pytest.raises(ValueError, match=exactly(f"tensor {missing!r}: missing, expected shape {shape}")):
        transformer_from_diffusers(tensors, FULL, rows=2, columns=2)


def test_extra_tensor() -> None:
    tensors = random_tensors(FULL) | {"transformer_blocks.4.attn.to_add_out.bias": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=r"blocks\.4\.attn\.to_add_out\.bias': found shape \(16,\), expected no such"):
        transformer_from_diffusers(tensors, FULL, rows=2, columns=2)


@pytest.mark.parametrize("name", [QUERY, "pos_embed.proj.weight", "pos_embed.pos_embed", "proj_out.bias"])
def test_misshapen_tensor(name: str) -> None:
    tensors = random_tensors(FULL)
    shape = tensors[name].shape
    tensors[name] = tensors[name][..., :-1]
    message = f"tensor {name!r}: found shape {tensors[name].shape}, expected {shape}"
    with pytest.raises(ValueError, match=exactly(message)):
        transformer_from_diffusers(tensors, FULL, rows=2, columns=2)


def test_misshapen_and_missing_parameter() -> None:
    variables = transformer_from_diffusers(random_tensors(FULL), FULL, rows=2, columns=2)
    variables["params"]["proj_out"]["kernel"] = np.zeros((16, 11), np.float32)
    with pytest.raises(ValueError, match=r"'proj_out/kernel': found shape \(16, 11\), expected \(16, 12\)"):
        transformer_to_diffusers(variables, FULL)
    del variables["params"]["proj_out"]["kernel"]
    with pytest.raises(ValueError, match=r"'proj_out/kernel': missing, expected shape \(16, 12\)"):
        transformer_to_diffusers(variables, FULL)


def test_another_table_than_the_crops_is_refused() -> None:
    """Else a network whose checkpoint had its own table would silently be written as another one."""
    tensors = random_tensors(FULL)
    variables = transformer_from_diffusers(tensors, FULL, rows=2, columns=2)
    with pytest.raises(ValueError, match="pass the table of the checkpoint"):
        transformer_to_diffusers(variables, FULL)
    with pytest.raises(ValueError, match=r"'pos_embed.pos_embed': found shape \(1, 35, 16\), expected \(1, 36, 16\)"):
        transformer_to_diffusers(variables, FULL, table=tensors["pos_embed.pos_embed"][:, 1:])
    variables["constants"]["pos_embed"] = position_table(FULL, 2, 2).astype(jnp.bfloat16)
    transformer_to_diffusers(variables, FULL)  # one rounding of the crop is no other table


@pytest.mark.parametrize("case", CASES)
def test_module_names_are_diffusers_modules(case: str) -> None:
    config = CASES[case]
    owners = {name.rpartition(".")[0] for name, _ in model(config).named_parameters()}
    names = module_names(config)
    assert set(names.values()) == owners
    assert len(set(names.values())) == len(names)
    params = transformer_from_diffusers(random_tensors(config), config, rows=2, columns=2, scan=False)["params"]
    assert set(names) == {"/".join(path[:-1]) for path in flatten_dict(params)}


def test_module_names_of_medium() -> None:
    names = module_names(PRESETS["sd35_medium"])
    assert names["dual_blocks_12/attn2/to_out"] == "transformer_blocks.12.attn2.to_out.0"
    assert names["blocks_3/attn/to_q"] == "transformer_blocks.16.attn.to_q"
    assert names["last_block/norm1_context/linear"] == "transformer_blocks.23.norm1_context.linear"


def test_config() -> None:
    assert config_from_diffusers(FIELDS) == FULL
    assert config_from_diffusers(dict(model(FULL).config)) == FULL
    assert config_from_diffusers(MEDIUM) == PRESETS["sd35_medium"]
    large = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "dual_attention_layers": []}
    assert config_from_diffusers(MEDIUM | large | {"pos_embed_max_size": 192}) == PRESETS["sd35_large"]
    sd3 = {k: v for k, v in MEDIUM.items() if k not in ("qk_norm", "dual_attention_layers")}
    assert config_from_diffusers(sd3 | {"pos_embed_max_size": 192}) == PRESETS["sd3_medium"]
    assert config_from_diffusers(FIELDS | {"out_channels": None}) == FULL


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_class_name", "FluxTransformer2DModel", "found FluxTransformer2DModel, expected 'SD3Transformer2DModel'"),
        ("caption_projection_dim", 24, "found 24, expected 16"),
        ("out_channels", 6, "found 6, expected 3"),
        ("qk_norm", "layer_norm", "found 'layer_norm', expected None or 'rms_norm'"),
        ("dual_attention_layers", [1, 2], "found [1, 2], expected [0, 1]"),
        ("dual_attention_layers", [0, 1, 2, 3, 4], "found [0, 1, 2, 3, 4], expected [0, 1, 2, 3]"),
    ],
)
def test_config_that_is_no_mmdit(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"transformer config {field}: {message}")):
        config_from_diffusers(FIELDS | {field: value})


@pytest.mark.parametrize("field", ["sample_size", "num_layers", "pos_embed_max_size"])
def test_config_with_a_missing_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"transformer config {field}: found nothing, expected a value"):
        config_from_diffusers({k: v for k, v in FIELDS.items() if k != field})
