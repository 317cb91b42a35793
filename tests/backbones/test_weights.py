"""Variables as shapes, at random and from files, with constants and pooled text and without."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter, init_adapter
from fopd_jax.backbones.weights import (
    boxed_variables,
    example_inputs,
    init_variables,
    load_any_adapter,
    load_converted,
    load_file,
    random_network,
)
from fopd_jax.config.schema import LoRAConfig, MeshShape
from fopd_jax.interop.files.safetensors import save_adapter, save_tree
from fopd_jax.interop.lora.peft import write_peft
from fopd_jax.interop.sd3.network import TARGETS as SD3_TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import parameter_shardings
from tests.backbones.rope_family import PRESET, PRESETS, TARGETS, RopeDiT, install

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT = (8, 8, 3)
NETWORKS = {"miniature": MMDiT(TINY), PRESET: RopeDiT(PRESETS[PRESET])}


@pytest.fixture(autouse=True)
def second() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


@pytest.fixture(params=NETWORKS)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, NETWORKS[request.param]


def _shapes(tree: Any) -> dict[str, Any]:
    return {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(tree), sep="/").items()}


def test_example_inputs_are_one_sample_of_what_the_family_reads():
    shapes = {name: [each.shape for each in example_inputs(module, LATENT)] for name, module in NETWORKS.items()}
    assert shapes["miniature"] == [(1, 8, 8, 3), (1,), (1, 78, 6), (1, 8)]
    assert shapes[PRESET] == [(1, 8, 8, 3), (1,), (1, 1, 10)]


def test_variables_have_both_collections_and_every_parameter_an_axis_name_with_a_rule(
    named: tuple[str, Any], mesh: Mesh
):
    name, module = named
    boxed = boxed_variables(module, (4, 4, 3))
    assert set(boxed) == {"params", "constants"}
    assert bool(boxed["constants"]) == (name == "miniature")
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in flatten_dict(boxed["params"]).values())
    assert _shapes(parameter_shardings_shape(mesh, boxed)) == _shapes(boxed)


def parameter_shardings_shape(mesh: Mesh, boxed: Any) -> Any:
    """The shapes again, each with the sharding that the rules give it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        parameter_shardings(mesh, boxed),
    )


def test_a_random_network_is_that_of_its_seed_in_its_dtype(mesh: Mesh):
    module = NETWORKS[PRESET]
    found = random_network(module, LATENT, 3, jnp.bfloat16, mesh)
    expected = jax.jit(lambda: init_variables(module, LATENT, 3))()
    for leaf, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == jnp.bfloat16
        # Two programs may round the same draws differently by a unit in the last place.
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact, rtol=2**-7, atol=1e-6)


def test_what_was_written_is_read(named: tuple[str, Any], mesh: Mesh, tmp_path: Path):
    name, module = named
    shapes = nn.unbox(boxed_variables(module, (4, 4, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_tree(tmp_path / "base.safetensors", variables, {"preset": name})
    found = load_file(tmp_path / "base.safetensors", name, module, (4, 4, 3), jnp.float32, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    with pytest.raises(ValueError, match=r"base\.safetensors: weights of preset"):
        load_file(tmp_path / "base.safetensors", "sd35_medium", module, (4, 4, 3), jnp.float32, mesh)


def test_another_familys_weights_are_named(mesh: Mesh, tmp_path: Path):
    shapes = nn.unbox(boxed_variables(NETWORKS["miniature"], (4, 4, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    save_tree(tmp_path / "base.safetensors", zeros, {"preset": PRESET})
    with pytest.raises(ValueError, match=rf"base\.safetensors does not match preset {PRESET} at "):
        load_file(tmp_path / "base.safetensors", PRESET, NETWORKS[PRESET], LATENT, jnp.float32, mesh)


def test_a_published_adapter_that_names_another_preset_is_refused(tmp_path: Path):
    """Its layers may have the same names and shapes: no tensor would tell."""
    module = NETWORKS["miniature"]
    params = nn.unbox(boxed_variables(module, LATENT))["params"]
    fresh = init_adapter(jax.random.key(0), params, LoRAConfig(2, 4.0), SD3_TARGETS)
    adapter = Adapter(jax.tree.map(np.ones_like, fresh.weights), fresh.scale)
    for preset in ("miniature", "sd3_medium"):
        write_peft(tmp_path / preset, adapter, module.config, AdapterCard(preset=preset))
    found = load_any_adapter(tmp_path / "miniature", "miniature", module)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    with pytest.raises(ValueError, match="sd3_medium: weights of preset 'sd3_medium', "):
        load_any_adapter(tmp_path / "sd3_medium", "miniature", module)


def test_a_family_without_published_files_reads_its_own_alone(mesh: Mesh, tmp_path: Path):
    module = NETWORKS[PRESET]
    params = nn.unbox(boxed_variables(module, LATENT))["params"]
    adapter = init_adapter(jax.random.key(0), params, LoRAConfig(2, 4.0, ("mlp",)), TARGETS)
    save_adapter(tmp_path / "own.safetensors", adapter, {"preset": PRESET})
    jax.tree.map(np.testing.assert_array_equal, load_any_adapter(tmp_path / "own.safetensors", PRESET, module), adapter)
    with pytest.raises(ValueError, match=r"peft: adapters of the family 'rope' are read from this project's own files"):
        load_any_adapter(tmp_path / "peft", PRESET, module)
    with pytest.raises(ValueError, match="networks of the family 'rope' are not kept in converted folders"):
        load_converted(tmp_path, module, LATENT, jnp.float32, mesh)
