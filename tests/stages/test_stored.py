"""A workdir's checkpoints, read for what trained in them: whole networks, adapters of other ranks than the config's."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.interop.files.safetensors import load_adapter, load_tree
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.stages.pipeline import make_pipeline, weight_path
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.stored import export_stored, find_step
from fopd_jax.steps.state import init_state, make_optimizer
from tests.configs import load

BASE, TEACHER = "packaged:base.safetensors", "packaged:teacher_text.safetensors"


def _save(folder: Path, config: Any, last: Any, average: Any) -> None:
    """A checkpoint of step 3 with these weights."""
    state = init_state(jax.tree.map(jnp.asarray, last), make_optimizer(config.optimizer), 0)
    checkpoints = Checkpoints(folder, 1, config_hash="c0ffee")
    checkpoints.save(3, dataclasses.replace(state, step=jnp.int32(3), ema=jax.tree.map(jnp.asarray, average)))
    checkpoints.close()


def _export(config: Any, folder: Path, out: Path) -> list[Path]:
    out.mkdir()
    pipeline, origin = make_pipeline(config.model, config.run, dict), find_stage(config).origin
    export_stored(config, pipeline, folder, find_step(folder, None), out, origin)
    assert (out / "README.md").is_file()
    return list(out.glob("*.safetensors"))


def test_a_whole_network_is_exported_with_its_constants(tmp_path: Path):
    config = resolve(load("miniature_pretrain", "mediocre", **{"model.path": BASE}))
    base, _ = load_tree(weight_path(BASE))
    average = jax.tree.map(lambda leaf: 2 * leaf, base["params"])
    _save(tmp_path / "run", config, base["params"], average)
    (path,) = _export(config, tmp_path / "run", tmp_path / "out")
    assert path.name == "base.safetensors"
    jax.tree.map(np.testing.assert_array_equal, load_tree(path)[0], {"params": average, "constants": base["constants"]})


@pytest.mark.parametrize("export", ["ema", "raw"])
def test_an_adapter_of_another_rank_is_exported_at_its_scale(tmp_path: Path, export: str):
    """What a merge by concatenation gives; the average, or the last weights where the config says so."""
    teacher, _ = load_adapter(weight_path(TEACHER))
    changes = {"adapter.rank": 2 * teacher_rank(teacher), "adapter.alpha": 2 * teacher_rank(teacher) * teacher.scale}
    config = resolve(load(**changes, export=export))
    average = jax.tree.map(lambda leaf: 2 * leaf, teacher)
    _save(tmp_path / "run", config, teacher, average)
    (path,) = _export(config, tmp_path / "run", tmp_path / "out")
    assert path.name == "student.safetensors"
    found, _ = load_adapter(path)
    assert found.scale == teacher.scale
    jax.tree.map(np.testing.assert_array_equal, found.weights, (average if export == "ema" else teacher).weights)


def teacher_rank(adapter: Any) -> int:
    return jax.tree.leaves(adapter.weights["last_block"]["attn"]["to_q"]["a"])[0].shape[-1]


def test_steps_that_are_not_there_are_told(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^--workdir: .* holds no checkpoint"):
        find_step(tmp_path, None)
    for step in (20, 100):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "40.damaged").mkdir()
    assert (find_step(tmp_path, None), find_step(tmp_path, 20)) == (100, 20)
    with pytest.raises(ValueError, match=r"^--step: found 40, expected one that .* holds: 20, 100"):
        find_step(tmp_path, 40)
