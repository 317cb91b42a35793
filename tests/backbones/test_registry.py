"""Families by preset, by module and by published class; what a second one may bring, and what it may not."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from fopd_jax.backbones import registry
from fopd_jax.backbones.registry import family_of, family_of_class, find_preset, preset_names, register
from fopd_jax.backbones.sd3.record import SD3
from fopd_jax.interop.files.converted import TRANSFORMERS, Converted, Manifest
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.parallel import sharding
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import RULES, add_rules, parameter_shardings
from tests.backbones.rope_family import PRESET, ROPE, RopeDiT, install

MESH = AbstractMesh((1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def second() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield


def test_stable_diffusion_3_is_found_by_preset_module_and_class():
    for name, shape in PRESETS.items():
        assert find_preset(name) == (SD3, shape)
    assert family_of(MMDiT(PRESETS["miniature"])) is family_of(MMDiT) is SD3
    assert family_of_class("SD3Transformer2DModel") is SD3


@pytest.mark.usefixtures("second")
def test_a_registered_family_is_found_beside_it():
    assert find_preset(PRESET)[0] is family_of(RopeDiT) is ROPE
    assert find_preset("miniature")[0] is family_of(MMDiT) is SD3
    assert preset_names() == (*PRESETS, PRESET)


def test_what_is_unknown_is_named_with_what_is_known():
    with pytest.raises(ValueError, match=r"model\.preset: found 'sd4', expected one of .*'sd35_medium'"):
        find_preset("sd4")
    with pytest.raises(ValueError, match=r"found a network Dense, expected one of the families sd3$"):
        family_of(nn.Dense(1))
    with pytest.raises(ValueError, match="found a transformer 'FluxTransformer2DModel', expected one of SD3Transf"):
        family_of_class("FluxTransformer2DModel")


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(
    ("changes", "taken"),
    [({"presets": {}}, "rope"), ({"name": "other"}, PRESET), ({"name": "other", "presets": PRESETS}, "miniature")],
)
def test_names_are_nobody_elses(changes: dict[str, Any], taken: str):
    before = dict(registry._FAMILIES)
    with pytest.raises(ValueError, match=rf"{taken}.* known already, expected names of its own"):
        register(dataclasses.replace(ROPE, **changes))
    assert before == registry._FAMILIES


# ---- published classes


def test_every_class_that_is_converted_has_a_family():
    for name in TRANSFORMERS:
        family = family_of_class(name)
        assert TRANSFORMERS[name].presets is family.presets


def test_a_manifests_transformer_is_of_its_class():
    fields: dict[str, Any] = {"dtype": "float32", "tensors": 1, "parameters": 1, "source": {}, "files": {}}
    manifest = Manifest("custom", {"transformer": Converted({"_class_name": "FluxTransformer2DModel"}, **fields)})
    message = "_class_name: found 'FluxTransformer2DModel', expected one of SD3Transformer2DModel"
    for read in (lambda: manifest.class_name, lambda: manifest.transformer, lambda: manifest.component("transformer")):
        with pytest.raises(ValueError, match=message):
            read()


# ---- rules


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_known", dict(RULES))


def _boxed(*axes: str | None) -> Any:
    return {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 4), np.float32), axes)}


@pytest.mark.usefixtures("rules")
def test_a_familys_own_axes_are_split_by_its_rules():
    with pytest.raises(ValueError, match=r"logical axes: found \['gated'\], expected some of \('layers', 'embed'"):
        parameter_shardings(MESH, _boxed("embed", "gated"))
    add_rules((("gated", "tensor"), ("embed", "fsdp")))
    assert parameter_shardings(MESH, _boxed("embed", "gated"))["kernel"].spec == P("fsdp", "tensor")


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("embed", "tensor"), "'embed': found mesh axis 'tensor', but it is 'fsdp' already"),
        (("expert", "experts"), "'expert': found mesh axis 'experts', expected None or one of"),
    ],
)
def test_a_rule_means_one_thing_and_a_mesh_axis_that_there_is(rule: tuple[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        add_rules((("gated", "tensor"), rule))
    assert "gated" not in sharding._known
