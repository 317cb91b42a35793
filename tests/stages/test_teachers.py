"""What a run starts from: banks of adapters or of whole networks, and the student's first weights."""

import dataclasses
import gc
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import Adapter, delta, effective, init_adapter, is_zero
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.evaluation.report import Model
from fopd_jax.interop.files.safetensors import load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.stages.opd import OPD
from fopd_jax.stages.pipeline import load_base, load_policy
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.stages.teachers import as_asked
from fopd_jax.steps.opd.targets import ask
from tests.configs import load, pipeline, prepare

SIDE, WEIGHTS = (24, 24, 3), {"composition": 0.25, "text": 0.5, "quality": 0.25}  # in the order of the bank
NAMES = ("base", *WEIGHTS)


def _network(seed: int) -> Any:
    """Random variables of the miniature, adaLN gates included."""
    boxed = boxed_variables(MMDiT(PRESETS["miniature"]), SIDE)
    leaves, structure = jax.tree.flatten(nn.unbox(boxed))
    rng = np.random.default_rng(seed)
    tree = jax.tree.unflatten(structure, [0.05 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    return tree | {"constants": {"pos_embed": np.zeros((6, 6, 128), np.float32)}}


def _adapter(seed: int, params: Any) -> Adapter:
    shapes = jax.eval_shape(lambda: init_adapter(jax.random.key(0), params, LoRAConfig(2, 4.0), TARGETS))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four whole networks, and adapters of the last three's names."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(NAMES):
        tree = _network(seed)
        save_tree(folder / f"{name}.network", tree, {"preset": "miniature"})
        save_adapter(folder / f"{name}.adapter", _adapter(seed, tree["params"]), {"preset": "miniature"})
    return folder


def _config(weights: Path, kind: str, trained: str, **changes: Any) -> Any:
    config = load()
    assign(config,
        {
            "model.path": f"{weights}/base.network", "trained": trained, "whole_teachers": kind == "network",
            "tasks.text.teacher": f"{weights}/text.{kind}", "anchor.adapter": f"{weights}/quality.{kind}",
            "tasks.composition.teacher": f"{weights}/composition.{kind}", "cold_start.merge": "concatenate",
            "cold_start.weights": dict(WEIGHTS), "adapter.rank": 6, "adapter.alpha": 12.0,
            "batch_size": 4, "eval.batch_size": 4, "eval.samples": 4,
        }
        | changes
    )  # fmt: skip
    return config


def _params(weights: Path, name: str) -> dict[str, np.ndarray]:
    tree, _ = load_tree(weights / f"{name}.network")
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree["params"], sep="/").items()}


def _stage(config: Any, tmp_path: Path) -> OPD:
    stage = prepare(config, tmp_path / "run")
    assert isinstance(stage, OPD)
    return stage


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def test_a_network_starts_from_the_base_with_the_adapters_merged_in(weights: Path, tmp_path: Path):
    stage = _stage(_config(weights, "adapter", "params"), tmp_path)
    base = _params(weights, "base")
    params, updates = load_tree(weights / "base.network")[0]["params"], {}
    for name, share in WEIGHTS.items():
        for path, update in _flat(delta(_adapter(NAMES.index(name), params))).items():
            updates[f"{path}/kernel"] = updates.get(f"{path}/kernel", 0) + share * np.asarray(update)
    for path, leaf in _flat(stage.start().trained).items():
        np.testing.assert_allclose(leaf, base[path] + updates.get(path, 0), rtol=0, atol=2e-6, err_msg=path)
    assert updates.keys() < base.keys()
    assert len(updates) == 8 + 8 + 7  # joint attention of both stacks and of the last block
    assert [model.name for model in stage.teaching.models()] == [
        "base", "teacher/composition", "teacher/text", "teacher/quality", "merge",
    ]  # fmt: skip


def test_a_network_starts_from_the_average_of_networks(weights: Path, tmp_path: Path):
    stage = _stage(_config(weights, "network", "params"), tmp_path)
    parts = {name: _params(weights, name) for name in NAMES}
    for path, leaf in _flat(stage.start().trained).items():
        expected = sum(share * parts[name][path] for name, share in WEIGHTS.items())
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-7, err_msg=path)
    for path, leaf in _flat(stage.frozen.bank).items():
        np.testing.assert_array_equal(leaf, np.stack([parts[name][path] for name in NAMES[1:]]), err_msg=path)


def test_teachers_are_reported_under_their_own_scales_where_that_is_asked_for():
    """Those that need no other have none; base and student stay; of one scale they share a sampler, at all settings."""
    config = load()
    scales = {"tasks.text.guidance": 2.0, "anchor.guidance": 2.0, "tasks.composition.guidance": 1.0}
    assign(config, scales | {"eval.num_steps": 2, "eval.also_steps": (1,), "eval.also_guidance": (3.0,)})
    made, names = pipeline(config), ("base", "teacher/composition", "teacher/text", "teacher/quality", "merge")
    models = [Model(name, {}, {}) for name in names]
    assert as_asked(resolve(config), made, models) == models
    assign(config, {"eval.teacher_guidance": "own"})
    found = dict(zip(names, as_asked(resolve(config), made, models), strict=True))
    assert {name for name, each in found.items() if each.guidance} == {"teacher/text", "teacher/quality"}
    text, quality = found["teacher/text"], found["teacher/quality"]
    assert (text.guidance, text.sampler) == (2.0, quality.sampler)
    assert text.others.keys() == {"guidance 3", "steps 1", "steps 1, guidance 3"}
    assert text.others["guidance 3"] is text.sampler
    assert text.sampler is not None
    assert text.sampler.guided
    variables, adapter = load_base(config.model, made), effective(load_policy(config.tasks["text"].teacher, made))
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    usual, twice = (
        eval_sampler(dataclasses.replace(config.eval, num_steps=1, guidance=scale), config.model.shift, made)
        for scale in (1.0, 2.0)
    )
    drawn = [
        each(made.world, variables, adapter, ['sign "ABC"'], keys) for each in (text.others["steps 1"], twice, usual)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-2


@pytest.mark.parametrize("kind", ["adapter", "network"])
def test_without_a_cold_start_the_base_is_the_start(kind: str, weights: Path, tmp_path: Path):
    stage = _stage(_config(weights, kind, "params", **{"cold_start.method": "none", "anchor.adapter": ""}), tmp_path)
    base = _params(weights, "base")
    for path, leaf in _flat(stage.start().trained).items():
        np.testing.assert_array_equal(leaf, base[path], err_msg=path)
    assert "merge" not in [model.name for model in stage.teaching.models()]
    if kind == "network":  # the base is the anchor
        for path, leaf in _flat(stage.frozen.bank).items():
            np.testing.assert_array_equal(leaf[-1], base[path], err_msg=path)


def test_networks_teach_as_routed(weights: Path, tmp_path: Path):
    """Targets equal each network's own velocity, sample by sample."""
    stage = _stage(_config(weights, "network", "params"), tmp_path)
    pieces, rng = stage.update.pieces, np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, *SIDE)), jnp.float32)
    batch = jax.tree.map(jnp.asarray, stage.prompts.batch(0))
    level = jax.tree.map(lambda leaf: leaf[1], pieces.spec.levels(0, 2))
    found = jax.jit(partial(ask, pieces))(stage.frozen, batch, x, level)
    velocity = jax.jit(make_velocity(MMDiT(PRESETS["miniature"])))
    by_name = {
        name: velocity(load_tree(weights / f"{name}.network")[0], {}, x, level.sigma, batch.conditioning)
        for name in NAMES[1:]
    }
    expected = jnp.stack([by_name[NAMES[1 + int(k)]][i] for i, k in enumerate(batch.route)])
    np.testing.assert_allclose(found.teacher, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.anchor, by_name["quality"], rtol=0, atol=1e-5)
    assert isinstance(batch.conditioning, Conditioning)
    assert float(jnp.abs(by_name["text"] - by_name["composition"]).max()) > 1e-2


@pytest.mark.parametrize(
    ("kind", "trained", "changes", "message"),
    [
        ("network", "adapter", {}, "cold_start.method: found 'merge', expected 'none': whole networks have no adapter"),
        ("network", "params", {"anchor.adapter": "nowhere"}, "anchor.adapter: nowhere: no such file"),
        ("network", "params", {"tasks.text.teacher": "nowhere"}, "tasks.text.teacher: nowhere: no such file"),
        ("adapter", "everything", {}, "trained: found 'everything', expected one of"),
        ("adapter", "params", {"reduce_once": ("fsdp",)}, r"reduce_once: found \('fsdp',\), expected one of"),
        ("adapter", "adapter", {"adapter.alpha": 18.0}, "adapter.alpha: found 18, a scale of 3, but .* expected 12"),
        ("adapter", "params", {"cold_start.merge": "mean"}, "cold_start.merge: found 'mean', expected one of"),
    ],
)
def test_what_does_not_go_together_is_named(
    kind: str, trained: str, changes: dict[str, Any], message: str, weights: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        prepare(_config(weights, kind, trained, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what stays on the devices


def _live_bytes() -> int:
    gc.collect()
    return sum(leaf.nbytes for leaf in jax.live_arrays())


@pytest.mark.parametrize(("kind", "trained"), [("adapter", "adapter"), ("adapter", "params"), ("network", "params")])
def test_beside_the_state_nothing_of_the_start_stays(kind: str, trained: str, weights: Path, tmp_path: Path):
    stage = _stage(_config(weights, kind, trained), tmp_path)
    before = _live_bytes()
    state = stage.start()
    assert _live_bytes() - before == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("rank", [6, 4])
def test_a_run_resumes_into_the_shapes_of_its_start(rank: int, weights: Path, tmp_path: Path):
    """Merged at the sum of the ranks, whatever the config's is."""
    stage = _stage(
        _config(weights, "adapter", "adapter", **{"adapter.rank": rank, "adapter.alpha": 2.0 * rank}), tmp_path
    )
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), stage.state)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), stage.start())


def test_an_update_is_zero_where_a_factor_of_every_layer_is():
    one, zero = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    assert is_zero(Adapter({"x": {"a": one, "b": zero}, "y": {"a": zero, "b": one}}, 1.0))
    assert not is_zero(Adapter({"x": {"a": one, "b": zero}, "y": {"a": one, "b": one}}, 1.0))
