"""Teachers that are other networks than the student's base, or adapters on them: loaded, asked, reported, refused."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import Adapter, effective, init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.parse import assign
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.interop.files.converted import Converted, Manifest
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.policy.groups import Slots
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.stages.networks import check_autoencoder, check_latents
from fopd_jax.stages.opd import OPD
from fopd_jax.steps.opd.targets import ask
from tests.configs import load, prepare

SIDE, SIZE = (24, 24, 3), 4
LARGE = "miniature_large"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large network with its gates open, and an adapter on it."""
    folder, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    shapes = nn.unbox(boxed_variables(MMDiT(PRESETS[LARGE]), SIDE))
    tree = jax.tree.map(lambda leaf: 0.05 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_tree(folder / "large", tree, {"preset": LARGE})
    like = jax.eval_shape(lambda: init_adapter(jax.random.key(0), shapes["params"], LoRAConfig(2, 4.0), TARGETS))
    tuned = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), like)
    save_adapter(folder / "tuned", tuned, {"preset": LARGE})
    return folder


def _config(weights: Path, **changes: Any) -> Any:
    """Text from the large network, the anchor from an adapter on it, composition from the packaged adapter."""
    config = load()
    config.networks = {"large": TeacherNetwork(LARGE, str(weights / "large"), "float32")}
    assign(config, {
        "tasks.text.teacher": "", "tasks.text.network": "large", "anchor.adapter": str(weights / "tuned"),
        "anchor.network": "large", "cold_start.method": "none", "cold_start.weights": {}, "batch_size": SIZE,
        "eval.samples": 4, "eval.batch_size": 4, "eval.final_samples": 4,
    } | changes)  # fmt: skip
    return config


def _stage(config: Any, folder: Path) -> OPD:
    stage = prepare(config, folder / "run")
    assert isinstance(stage, OPD)
    return stage


def test_everyone_says_what_their_own_network_says(weights: Path, tmp_path: Path) -> None:
    stage = _stage(_config(weights), tmp_path)
    pieces = stage.update.pieces
    assert pieces.spec.members == {"": (0,), "large": (1, 2)}
    assert pieces.spec.slots == Slots(SIZE, (2, 2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, *SIDE)), jnp.float32)
    batch = jax.tree.map(jnp.asarray, stage.prompts.batch(0))
    level = jax.tree.map(lambda leaf: leaf[1], pieces.spec.levels(0, 2))
    found = jax.jit(partial(ask, pieces))(stage.frozen, batch, x, level)
    large = jax.jit(make_velocity(MMDiT(PRESETS[LARGE])))
    tree, tuned = load_tree(weights / "large")[0], effective(_adapter(weights))
    text = large(tree, {}, x, level.sigma, batch.conditioning)
    own = jax.tree.map(lambda leaf: leaf[..., 0, :, :], stage.frozen.bank)
    composition = jax.jit(pieces.velocity)(stage.frozen.variables, own, x, level.sigma, batch.conditioning)
    expected = np.where(np.asarray(batch.route)[:, None, None, None] == 1, text, composition)
    np.testing.assert_allclose(found.teacher, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.anchor, large(tree, tuned, x, level.sigma, batch.conditioning), rtol=0, atol=1e-5)
    stage.close()


def _adapter(weights: Path) -> Adapter:
    return load_adapter(weights / "tuned")[0]


def test_teachers_are_reported_with_the_sampler_of_their_network(weights: Path, tmp_path: Path) -> None:
    stage = _stage(_config(weights, **{"eval.also_steps": (2,)}), tmp_path)
    models = stage.teaching.models()
    assert [model.name for model in models] == ["base", "teacher/composition", "teacher/text", "teacher/quality"]
    assert [model.sampler is not None for model in models] == [False, False, True, True]
    assert [sorted(model.others) for model in models[2:]] == [sorted(stage.setup.others)] * 2 == [["steps 2"]] * 2
    by_name = {model.name: model for model in models}
    assert by_name["teacher/text"].adapter == {}
    prompts, keys = ['sign "ABC"'] * 2, jax.vmap(jax.random.key)(jnp.arange(2))
    sampler = dataclasses.replace(by_name["teacher/text"]).sampler
    assert sampler is not None
    images = sampler(stage.pipeline.world, by_name["teacher/text"].variables, {}, prompts, keys)
    assert np.isfinite(images).all()
    assert images.shape == (2, *SIDE)
    stage.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks.text.network": "huge"}, r"tasks.text.network: found 'huge', expected one of \('', 'large'\)"),
        (
            {"tasks.text.network": "", "tasks.text.teacher": "packaged:teacher_text.safetensors", "anchor.network": "",
             "anchor.adapter": ""},
            "networks.large: found a network that no task names, and no anchor with a weight",
        ),
        ({"anchor.moves": "ema"}, "anchor.network: found 'large', expected '' with anchor.moves 'ema'"),
        ({"whole_teachers": True}, "networks: found some, expected none with whole_teachers"),
        ({"networks.large.path": "nowhere"}, "networks.large.path: nowhere: no such file"),
        ({"networks.large.preset": "miniature"}, "networks.large.path: .*large: .*miniature_large"),
        ({"networks.large.preset": "sd36"}, "networks.large.preset: found 'sd36', expected one of"),
        (
            {"networks.large.preset": "sd35_large", "networks.large.path": ""},
            "networks.large.preset: found 'sd35_large', whose latents are not those of 'miniature'",
        ),
        ({"anchor.adapter": "packaged:teacher_quality.safetensors"}, "anchor.adapter: .*'miniature'"),
        (
            {"cold_start.method": "merge", "cold_start.weights": {"text": 1.0}},
            r"cold_start.weights: found \['text'\], expected some of \('composition',\)",
        ),
        (
            {"cold_start.method": "merge", "tasks.composition.network": "large", "tasks.composition.teacher": ""},
            "cold_start.method: found 'merge', expected 'none': no teacher is on the student's base",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(
    changes: dict[str, Any], message: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(_config(weights, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_of_another_shape_are_another_space() -> None:
    for changes in ({"channels": 4}, {"table_size": 2}):
        module = MMDiT(dataclasses.replace(PRESETS[LARGE], **changes))
        with pytest.raises(
            ValueError, match=r"^networks.x.preset: has no latents of the student's shape \(24, 24, 3\)"
        ):
            check_latents("networks.x", module, SIDE)


def _manifest(digest: str, **changes: Any) -> Manifest:
    config = {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4,
        "in_channels": 3, "out_channels": 3, "norm_num_groups": 4, "scaling_factor": 1.5, "shift_factor": 0.06,
        "use_quant_conv": False, "use_post_quant_conv": False, "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    } | changes  # fmt: skip
    return Manifest("custom", {"vae": Converted(config, "float32", 1, 1, {"vae/a.safetensors": digest}, {})})


def test_another_autoencoder_is_another_latent_space(capsys: pytest.CaptureFixture[str]) -> None:
    check_autoencoder("networks.x", _manifest("a"), _manifest("a"))
    with pytest.raises(ValueError, match=r"^networks.x.path: its autoencoder has scaling_factor 1.25, expected 1.5 as"):
        check_autoencoder("networks.x", _manifest("a", scaling_factor=1.25), _manifest("a"))
    with pytest.raises(ValueError, match=r"^networks.x.path: its autoencoder has other weights than the student's"):
        check_autoencoder("networks.x", _manifest("b"), _manifest("a"))
    check_autoencoder("networks.x", Manifest("custom", {}), _manifest("a"))
    assert "does not hold its autoencoder" in "".join(capsys.readouterr())
