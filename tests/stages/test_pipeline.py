"""A config's `model` fields: what they build, what is refused, and in which dtype and place weights arrive."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.parse import assign
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.attention import resolve_attention
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig
from fopd_jax.stages import pipeline as module
from fopd_jax.stages.pipeline import choose_attention, load_base, load_policy, weight_path
from fopd_jax.worlds.miniature.world import make_world
from tests.configs import load
from tests.configs import pipeline as make

SHAPE = make_world().latent_shape
TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=4, channels=3,
    context_dim=32, pooled_dim=24, table_size=6, base_size=6,
)  # fmt: skip


@pytest.fixture
def config() -> Any:
    return load()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller network under the miniature's name: it is initialised in a moment."""
    monkeypatch.setitem(PRESETS, "miniature", TINY)


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


# ---- fields


def test_a_pipeline_holds_what_its_fields_say(config: Any):
    assign(config, {"model.dtype": "bfloat16", "run.remat": "dots"})
    pipeline = make(config)
    assert (pipeline.preset, pipeline.manifest) == ("miniature", None)
    assert pipeline.model == MMDiT(PRESETS["miniature"], "xla", jnp.dtype("bfloat16"), remat="dots")
    assert pipeline.mesh.size == jax.device_count()
    assert list(pipeline.world.tasks) == ["text", "composition"]


def test_the_automatic_attention_is_told(config: Any, capsys: pytest.CaptureFixture[str]):
    config.run.attention = "auto"
    expected = resolve_attention("auto", "float32", PRESETS["miniature"].head_dim)
    assert make(config).model.impl == expected
    assert f"attention: auto → {expected} ({jax.default_backend()}, float32, head dimension" in capsys.readouterr().err


def test_attention_is_chosen_for_the_meshs_devices_not_the_processs(config: Any):
    """A mesh of a machine that is not there: what its devices say counts."""
    mesh = mock.Mock(spec=Mesh, devices=np.array([mock.Mock(platform="tpu")]))
    assert choose_attention("auto", "bfloat16", 64, mesh) == "merged"


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model.attention": "flash"}, ("run.attention: found 'flash'", "'xla'")),
        ({"model.attention": "cudnn"}, ("'cudnn' needs a GPU", "use 'xla'")),
        ({"model.dtype": "float16"}, ("model.dtype: found 'float16'", "'bfloat16'")),
        ({"model.remat": "all"}, ("run.remat: found 'all'", "'full'")),
        ({"mesh.data": 0}, ("run.mesh.data: found 0",)),
        ({"mesh.fsdp": 3}, ("mesh: ", "'fsdp': 3", "does not fill")),
        ({"model.preset": "sd4"}, ("model.preset: found 'sd4'", "'sd35_medium'")),
        ({"model.preset": "custom"}, ("model.preset: found 'custom'", "'sd35_medium'")),
        ({"model.preset": "sd35_medium"}, ("model.path: found", "'sd35_medium' needs a converted folder")),
        (
            {"model.path": "packaged:nothing.safetensors"},
            ("model.path: ", "packaged:nothing.safetensors: no such file or folder"),
        ),
        ({"model.preset": "sd35_large", "model.path": ""}, ("model.path: found ''", "'sd35_large' needs a converted")),
    ],
)
def test_a_field_that_is_out_of_range_is_named(config: Any, changes: dict[str, Any], fragments: tuple[str, ...]):
    assign(config, changes)
    with pytest.raises(ValueError) as error:
        make(config)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_folder_that_was_not_converted_is_named(config: Any, tmp_path: Path):
    config.model.path = str(tmp_path)
    with pytest.raises(ValueError, match=r"no manifest\.json; expected a folder that .*convert_sd35_weights") as error:
        make(config)
    assert str(tmp_path) in str(error.value)


def test_a_pipeline_is_made_without_weights(config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load_file", None)
    make(config)


def test_packaged_files_lie_in_the_package_and_others_where_they_are():
    assert weight_path("packaged:base.safetensors").is_file()
    assert weight_path("packaged:base.safetensors").parent.name == "assets"
    assert weight_path("some/folder") == Path("some/folder")


# ---- base weights


def test_shapes_are_those_of_the_weights_and_boxes_name_every_parameters_axes():
    boxed = boxed_variables(MMDiT(PRESETS["miniature"]), SHAPE)
    packaged, _ = load_tree(weight_path("packaged:base.safetensors"))
    found = {path: leaf.shape for path, leaf in _flat(nn.unbox(boxed)).items()}
    assert found == {path: leaf.shape for path, leaf in _flat(packaged).items()}
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in _flat(boxed["params"]).values())


def test_a_base_arrives_as_its_file_has_it(config: Any):
    pipeline = make(config)
    packaged = _flat(load_tree(weight_path("packaged:base.safetensors"))[0])
    found = _flat(load_base(config.model, pipeline, config.seed))
    assert found.keys() == packaged.keys()
    for path, leaf in found.items():
        assert leaf.dtype == np.float32
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding.mesh == pipeline.mesh
        np.testing.assert_array_equal(leaf, packaged[path])


def _check_dtypes(found: dict[str, Any], exact: dict[str, Any], dtype: Any) -> None:
    """Parameters are rounded to `dtype`, constants are not."""
    assert found.keys() == exact.keys()
    for path, leaf in found.items():
        assert leaf.dtype == (dtype if path.startswith("params/") else np.float32)
        np.testing.assert_array_equal(leaf, jnp.asarray(exact[path]).astype(leaf.dtype))


def test_parameters_of_a_file_are_rounded_on_request_only(config: Any):
    config.model.dtype = "bfloat16"
    pipeline = make(config)
    packaged = _flat(load_tree(weight_path("packaged:base.safetensors"))[0])
    _check_dtypes(_flat(load_base(config.model, pipeline, config.seed)), packaged, jnp.bfloat16)
    _check_dtypes(_flat(load_base(config.model, pipeline, dtype="float32")), packaged, jnp.float32)


@pytest.mark.usefixtures("tiny")
def test_without_a_path_the_base_is_random_by_the_seed(config: Any):
    config.model.path = ""
    pipeline = make(config)
    found = _flat(load_base(config.model, pipeline, config.seed))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in found.values())
    kernel = "params/dual_blocks/ff/up/kernel"
    assert found[kernel].any()
    config.model.dtype = "bfloat16"
    _check_dtypes(_flat(load_base(config.model, make(config), config.seed)), found, jnp.bfloat16)
    config.seed = 1
    assert (_flat(load_base(config.model, pipeline, config.seed))[kernel] != found[kernel].astype(jnp.bfloat16)).any()


@pytest.mark.usefixtures("tiny")
def test_a_base_of_another_shape_or_preset_is_named(config: Any, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"assets/base\.safetensors does not match preset miniature at constants/pos_embed"
    ):
        load_base(config.model, make(config), config.seed)
    shapes = nn.unbox(boxed_variables(MMDiT(TINY), SHAPE))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    config.model.path = str(tmp_path / "other.safetensors")
    save_tree(tmp_path / "other.safetensors", zeros, {"preset": "sd35_medium"})
    with pytest.raises(ValueError, match=r"weights of preset 'sd35_medium', but model\.preset is 'miniature'"):
        load_base(config.model, make(config), config.seed)


# ---- adapters


def test_an_adapter_of_this_projects_is_read_as_it_was_written(config: Any):
    found = load_policy("packaged:teacher_text.safetensors", make(config))
    expected, _ = load_adapter(weight_path("packaged:teacher_text.safetensors"))
    assert found.scale == expected.scale
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_adapter_for_another_network_or_none_is_named(config: Any, tmp_path: Path):
    pipeline = make(config)
    adapter = init_adapter(
        jax.random.key(0), {"attn": {"to_q": {"kernel": np.zeros((4, 4))}}}, LoRAConfig(1, 1.0), TARGETS
    )
    save_adapter(tmp_path / "large.safetensors", adapter, {"preset": "sd35_large"})
    save_tree(tmp_path / "base.safetensors", {"x": np.zeros(1)}, {"preset": "miniature"})
    (tmp_path / "damaged.safetensors").write_bytes(os.urandom(100))
    for name, problem in (
        ("large", "weights of preset 'sd35_large', but model.preset is 'miniature'"),
        ("base", "holds no adapter"),
        ("damaged", "damaged"),
        ("missing", "no such file"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            load_policy(f"{tmp_path}/{name}.safetensors", pipeline)
        assert f"{tmp_path}/{name}.safetensors" in str(error.value)
        assert "\n" not in str(error.value)
