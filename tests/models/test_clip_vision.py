"""CLIP's vision tower against transformers' `CLIPVisionModelWithProjection`: true structure, small widths, random
tensors. Tolerances on ‖a - b‖/‖b‖: float32 1e-4, bfloat16 as the text tower's."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec as P

from fopd_jax.interop.files.tables import from_tensors, to_tensors
from fopd_jax.interop.scorers.clip import vision_component
from fopd_jax.models.clip_vision import VIT_H_14, VIT_L_14, CLIPVision, CLIPVisionConfig
from tests.interop.scorers.clip_oracle import randomise, vision_config

L_LIKE = CLIPVisionConfig(
    width=48, depth=3, num_heads=3, mlp_dim=192, projection_dim=40, activation="quick_gelu", layer_norm_eps=1e-5,
    image_size=28, patch_size=7,
)  # fmt: skip
H_LIKE = dataclasses.replace(L_LIKE, width=80, num_heads=2, activation="gelu", projection_dim=96)
CASES = {"L": L_LIKE, "H": H_LIKE}


def pixels(config: CLIPVisionConfig) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, config.image_size, config.image_size, 3), np.float32)


def outputs(config: CLIPVisionConfig, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    oracle = randomise(transformers.CLIPVisionModelWithProjection(vision_config(config)))
    with torch.no_grad():
        expected = oracle(torch.tensor(pixels(config)).permute(0, 3, 1, 2)).image_embeds.numpy()
    tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    params = from_tensors(vision_component(config), tensors)
    found = jax.jit(CLIPVision(config, dtype).apply)({"params": params}, jnp.asarray(pixels(config), dtype))
    assert found.dtype == dtype
    return np.asarray(found, np.float32), expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.bfloat16, 4 * 2**-7)])
@pytest.mark.parametrize("case", CASES)
def test_tower_matches_transformers(case: str, dtype: Any, tolerance: float) -> None:
    found, expected = outputs(CASES[case], dtype)
    for row in range(len(found)):
        error = np.linalg.norm(found[row] - expected[row]) / np.linalg.norm(expected[row])
        print(f"{case}, {jnp.dtype(dtype).name}: {error:.1e}")
        assert error <= tolerance


def test_names_go_back() -> None:
    oracle = transformers.CLIPVisionModelWithProjection(vision_config(L_LIKE))
    tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    component = vision_component(L_LIKE)
    back = to_tensors(component, from_tensors(component, tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, name)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found images of \(28, 29\) pixels, expected 28 x 28"):
        jax.eval_shape(CLIPVision(L_LIKE).init, jax.random.key(0), jnp.zeros((1, 28, 29, 3)))


@pytest.mark.parametrize(("config", "expected"), [(VIT_L_14, 303_966_208), (VIT_H_14, 632_076_800)])
def test_preset_has_the_size_of_transformers_model(config: CLIPVisionConfig, expected: int) -> None:
    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(vision_config(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    shape = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.eval_shape(CLIPVision(config).init, jax.random.key(0), shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_logical_axes() -> None:
    variables = jax.eval_shape(CLIPVision(L_LIKE).init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    specs: dict[str, Any] = nn.get_partition_spec(variables)["params"]
    assert specs["class_embedding"] == P("embed")
    assert specs["patch_embedding"] == {"kernel": P(None, "embed")}
    assert specs["position_embedding"] == {"embedding": P(None, "embed")}
    assert specs["layers"]["mlp"]["fc1"]["kernel"] == P("layers", "embed", "mlp")
    assert specs["visual_projection"] == {"kernel": P("embed", None)}
