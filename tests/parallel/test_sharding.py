"""Which parameter lives where, pinned."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import (
    RULES,
    bank_shardings,
    batch_sharding,
    check_batch,
    parameter_shardings,
    replicated,
    stacked_shardings,
)

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip


def _mesh(data: int, fsdp: int, tensor: int) -> Any:
    """A mesh without devices, which is enough to say where arrays would live."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def _specs(config: MMDiTConfig, latent: tuple[int, int, int], mesh: Any) -> dict[str, P]:
    shardings = parameter_shardings(mesh, boxed_variables(MMDiT(config), latent))
    return {path: sharding.spec for path, sharding in flatten_dict(shardings, sep="/").items()}


# ---- the table

UP = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}  # into heads or hidden features
DOWN = {"kernel": P("tensor", "fsdp"), "bias": P("fsdp")}  # out of them
IN = {"kernel": P(None, "fsdp"), "bias": P("fsdp")}  # from something that is no width of the network
OUT = {"kernel": P("fsdp", None), "bias": P(None)}
NORM = {"scale": P(None)}

ENDS = {
    "patch_embed": IN, "context_embed": IN, "proj_out": OUT, "norm_out/linear": UP,
    "time_embed/linear_1": IN, "time_embed/linear_2": OUT, "pooled_embed/linear_1": IN, "pooled_embed/linear_2": OUT,
}  # fmt: skip
LAST_BLOCK = {
    "norm1/linear": UP, "norm1_context/linear": UP, "ff/up": UP, "ff/down": DOWN,
    "attn/to_q": UP, "attn/to_k": UP, "attn/to_v": UP, "attn/to_out": DOWN,
    "attn/add_q_proj": UP, "attn/add_k_proj": UP, "attn/add_v_proj": UP,
    "attn/norm_q": NORM, "attn/norm_k": NORM, "attn/norm_added_q": NORM, "attn/norm_added_k": NORM,
}  # fmt: skip
BLOCK = LAST_BLOCK | {"attn/to_add_out": DOWN, "ff_context/up": UP, "ff_context/down": DOWN}
DUAL_BLOCK = BLOCK | {
    "attn2/to_q": UP, "attn2/to_k": UP, "attn2/to_v": UP, "attn2/to_out": DOWN,
    "attn2/norm_q": NORM, "attn2/norm_k": NORM,
}  # fmt: skip


def _stack(name: str, modules: dict[str, dict[str, P]]) -> dict[str, dict[str, P]]:
    """A scanned stack: every device holds every layer of its part."""
    return {f"{name}/{path}": {leaf: P(None, *spec) for leaf, spec in each.items()} for path, each in modules.items()}


def test_every_parameter_of_sd35_medium_has_its_place():
    modules = (
        ENDS
        | {f"last_block/{path}": each for path, each in LAST_BLOCK.items()}
        | _stack("blocks", BLOCK)
        | _stack("dual_blocks", DUAL_BLOCK)
    )
    expected = {f"params/{path}/{leaf}": spec for path, each in modules.items() for leaf, spec in each.items()}
    found = _specs(PRESETS["sd35_medium"], (64, 64, 16), _mesh(2, 2, 2))
    assert found == expected | {"constants/pos_embed": P()}


def test_most_of_the_network_is_split_by_every_axis():
    """What a device holds of SD3.5-Medium: a quarter, but for embedders, biases and norms."""
    boxed = boxed_variables(MMDiT(PRESETS["sd35_medium"]), (64, 64, 16))
    shapes, shardings = nn.unbox(boxed)["params"], parameter_shardings(_mesh(1, 2, 2), boxed)["params"]
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    parts = jax.tree.map(lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))), shapes, shardings)
    assert whole / 4 <= sum(jax.tree.leaves(parts)) < 1.02 * whole / 4


@pytest.mark.parametrize("lengths", [(2, 3, 1), (1, 1, 3), (1, 7, 5)])
def test_a_dimension_that_its_axis_does_not_divide_stays_whole(lengths: tuple[int, int, int]):
    """Widths 16, 48, 64, … by 3: 48 and 96 are split, 16 and 64 stay whole; by 5 and 7 nothing is split."""
    mesh = _mesh(*lengths)
    boxed = boxed_variables(MMDiT(TINY), (4, 4, 3))
    shapes = flatten_dict(nn.unbox(boxed), sep="/")
    wanted = _specs(TINY, (4, 4, 3), _mesh(1, 1, 1))
    kept = 0
    for path, spec in _specs(TINY, (4, 4, 3), mesh).items():
        for size, axis, wish in zip(shapes[path].shape, (*spec, *(None,) * 9), (*wanted[path], *(None,) * 9)):  # noqa: B905
            assert axis == (wish if wish is None or size % mesh.shape[wish] == 0 else None)
            kept += axis is not None
    assert kept or 5 in lengths


def test_rules_name_axes_of_the_mesh_and_the_logical_axes_of_the_network():
    assert {axis for _, axis in RULES} <= {*AXES, None}
    specs = nn.get_partition_spec(boxed_variables(MMDiT(TINY), (4, 4, 3)))
    named = {name for spec in jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)) for name in spec}
    assert named - {None} <= dict(RULES).keys()


@pytest.mark.parametrize("size", [4, 8, 128])
def test_a_batch_is_split_over_data_and_fsdp(size: int):
    mesh = _mesh(2, 2, 2)
    check_batch("batch_size", size, mesh)
    assert batch_sharding(mesh).shard_shape((size, 5)) == (size // 4, 5)
    assert replicated(mesh).shard_shape((size, 5)) == (size, 5)


@pytest.mark.parametrize("size", [-4, 0, 1, 6])
def test_a_batch_that_cannot_be_split_evenly_is_refused(size: int):
    with pytest.raises(ValueError, match=rf"batch_size: found {size}, expected a multiple of 4 \(mesh axes data x"):
        check_batch("batch_size", size, _mesh(2, 2, 2))


# ---- banks of adapters and stacks of networks


def test_a_bank_is_split_as_the_kernels_that_it_adapts():
    mesh, boxed = _mesh(2, 2, 2), boxed_variables(MMDiT(TINY), (4, 4, 3))["params"]
    adapter = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), nn.unbox(boxed), LoRAConfig(2, 4.0), TARGETS).weights
    )
    bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[:-2], 3, *leaf.shape[-2:]), leaf.dtype), adapter)
    found = {path: place.spec for path, place in flatten_dict(bank_shardings(mesh, boxed, bank), sep="/").items()}
    for path in ("attn/to_q", "attn/to_v", "attn/add_k_proj"):
        assert found[f"blocks/{path}/a"] == P(None, None, "fsdp", None)
        assert found[f"blocks/{path}/b"] == P(None, None, None, "tensor")
        assert found[f"last_block/{path}/a"] == P(None, "fsdp", None)
    assert found["blocks/attn/to_out/a"] == P(None, None, "tensor", None)
    assert found["blocks/attn/to_out/b"] == P(None, None, None, "fsdp")
    assert found.keys() == flatten_dict(bank, sep="/").keys()


def test_a_stack_of_networks_is_split_as_each_of_them():
    mesh, boxed = _mesh(2, 2, 2), boxed_variables(MMDiT(TINY), (4, 4, 3))["params"]
    one, stacked = (flatten_dict(f(mesh, boxed), sep="/") for f in (parameter_shardings, stacked_shardings))
    assert {path: P(None, *place.spec) for path, place in one.items()} == {k: v.spec for k, v in stacked.items()}
