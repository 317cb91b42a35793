"""What a run starts from: adapters and base weights that fit are taken as they are, others are named."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import delta, init_adapter
from fopd_jax.config.parse import assign, override
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from tests.configs import load, prepare
from tests.main.experiment import RANK, assert_refused, noisy, other_adapter


def _teach(config: Any, expert: str, path: str) -> str:
    """Give the first teacher or the anchor this file; returns the field."""
    field = "anchor.adapter" if expert == "anchor" else f"tasks.{next(iter(config.tasks))}.teacher"
    assign(config, {field: path})
    return field


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("expert", ["teacher", "anchor"])
@pytest.mark.parametrize(
    ("lora", "fragments"),
    [
        (LoRAConfig(RANK, 8.0, ("attn2",)), ("adapts dual_blocks/attn2/", "adapter.targets leaves that layer out")),
        (LoRAConfig(RANK, 8.0, ("attn", "mlp")), ("/ff/", "adapter.targets leaves that layer out")),
    ],
)
def test_an_adapter_of_a_layer_that_the_student_lacks_is_named_with_file_and_layer(
    config: Any, weights: Path, tmp_path: Path, expert: str, lora: LoRAConfig, fragments: tuple[str, ...]
):
    name = _teach(config, expert, other_adapter(tmp_path / "other.safetensors", weights, lora))
    assert_refused(config, tmp_path / "run", name, "other.safetensors", *fragments)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("expert", ["teacher", "anchor"])
def test_an_adapter_of_another_shape_is_named_with_file_and_layer(
    config: Any, weights: Path, tmp_path: Path, expert: str
):
    adapter, metadata = load_adapter(weights / "text.safetensors")
    layer = adapter.weights["last_block"]["attn"]["to_q"]
    layer["a"] = layer["a"][:-1]
    save_adapter(tmp_path / "other.safetensors", adapter, metadata)
    name = _teach(config, expert, f"{tmp_path}/other.safetensors")
    fragments = "last_block/attn/to_q/a", f"found shape (127, {RANK})", "expected (128,)"
    assert_refused(config, tmp_path / "run", name, "other.safetensors", *fragments)


@pytest.mark.usefixtures("no_compilation")
def test_teachers_of_other_ranks_and_fewer_layers_teach_what_they_taught(config: Any, weights: Path, tmp_path: Path):
    """The bank takes the largest rank and the student's layers; each teacher's update stays its own."""
    variables, _ = load_tree(weights / "base.safetensors")
    shapes = {"text": LoRAConfig(RANK - 1, 8.0), "composition": LoRAConfig(RANK + 2, 3.0, ("attn", "attn2"))}
    for seed, (name, lora) in enumerate(shapes.items()):
        adapter = noisy(seed, init_adapter(jax.random.key(seed), variables["params"], lora, TARGETS), 0.05)
        save_adapter(tmp_path / f"{name}.safetensors", adapter, {"preset": "miniature"})
        config.tasks[name].teacher = f"{tmp_path}/{name}.safetensors"
    config.adapter.targets = ("attn", "attn2", "mlp")
    stage = prepare(config, tmp_path / "run")
    bank = flatten_dict(stage.frozen.bank, sep="/")
    assert {leaf.shape[-1] for path, leaf in bank.items() if path.endswith("/a")} == {RANK + 2}
    trained = flatten_dict(stage.teaching.start().weights)
    assert {leaf.shape[-1] for path, leaf in trained.items() if path[-1] == "a"} == {RANK}
    # Nobody adapts the feed-forwards, and yet the student can.
    assert all(leaf.any() for path, leaf in trained.items() if path[-1] == "a")
    files = [tmp_path / "composition.safetensors", tmp_path / "text.safetensors", weights / "quality.safetensors"]
    for k, file in enumerate(files):  # the tasks' order, which is the alphabet's, then the anchor
        expected = flatten_dict(delta(load_adapter(file)[0]), sep="/")
        found = {
            path[:-2]: bank[path][..., k, :, :] @ bank[f"{path[:-1]}b"][..., k, :, :]
            for path in bank
            if path.endswith("/a")
        }
        assert expected.keys() < found.keys()
        for path, update in found.items():
            np.testing.assert_allclose(update, expected.get(path, np.zeros_like(update)), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("no_compilation")
def test_weights_of_another_preset_are_named(config: Any, weights: Path, tmp_path: Path):
    variables, _ = load_tree(weights / "base.safetensors")
    save_tree(tmp_path / "base.safetensors", variables, {"preset": "sd35_medium"})
    lora = LoRAConfig(RANK, 2.0 * RANK)
    adapter = other_adapter(tmp_path / "adapter.safetensors", weights, lora, "sd35_large")
    for field, path, preset in (
        ("model.path", f"{tmp_path}/base.safetensors", "sd35_medium"),
        ("tasks.text.teacher", adapter, "sd35_large"),
    ):
        assert_refused(override(config, {field: path}), tmp_path / "run", path, f"'{preset}'", "'miniature'")


@pytest.mark.usefixtures("no_compilation")
def test_base_weights_of_other_shapes_are_named_with_the_tensor(config: Any, weights: Path, tmp_path: Path):
    variables, metadata = load_tree(weights / "base.safetensors")
    variables["params"]["proj_out"]["bias"] = np.zeros(7, np.float32)
    path = tmp_path / "base.safetensors"
    save_tree(path, variables, metadata)
    config.model.path = str(path)
    assert_refused(config, tmp_path / "run", str(path), "params/proj_out/bias", "found (7,)", "expected (48,)")


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("field", ["model.path", "tasks.text.teacher", "anchor.adapter"])
def test_weights_that_are_missing_or_damaged_are_named(config: Any, weights: Path, tmp_path: Path, field: str):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((weights / "base.safetensors").read_bytes()[:5000])
    for path, problem in ((str(damaged), "damaged"), ("packaged:nothing.safetensors", "no such file")):
        assign(config, {field: path})
        assert_refused(config, tmp_path / "run", path.removeprefix("packaged:"), problem)


def _dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_only_what_is_frozen_is_rounded(config: Any, weights: Path, tmp_path: Path):
    """`model.dtype` is that of base and bank; what trains stays in float32, exactly as its file has it."""
    config.model.dtype = "bfloat16"
    stage = prepare(config, tmp_path / "student")
    assert _dtypes(stage.frozen.variables["params"]) == _dtypes(stage.frozen.bank) == {"bfloat16"}
    assert _dtypes(stage.start().trained) == _dtypes(stage.start().ema) == {"float32"}

    teacher = load("miniature_teacher", "text")
    path = f"{weights}/base.safetensors"
    assign(teacher, {"model.path": path, "model.dtype": "bfloat16"})
    stage = prepare(teacher, tmp_path / "adapter")
    assert _dtypes(stage.frozen["params"]) == {"bfloat16"}
    assert _dtypes(stage.start().trained) == {"float32"}

    whole = load("miniature_pretrain", "mediocre")
    assign(whole, {"model.path": path, "model.dtype": "bfloat16"})
    trained = prepare(whole, tmp_path / "whole").start().trained
    jax.tree.map(np.testing.assert_array_equal, trained, load_tree(weights / "base.safetensors")[0]["params"])
