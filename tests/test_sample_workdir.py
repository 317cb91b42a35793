"""Sampling what a run trained, by its folder alone."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.identity import identity
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_tree
from fopd_jax.running import inputs, records
from fopd_jax.running.checkpoints import Checkpoints, seal_of
from fopd_jax.running.workdir import claim
from fopd_jax.stages.files import input_files
from fopd_jax.steps.state import init_state, make_optimizer
from tests import test_sample
from tests.configs import load
from tests.test_sample import BATCH, PROMPTS, STEPS, _call, _flags, _pixels, _request, _said, _text

pytestmark = test_sample.pytestmark
small_network, weights, run, whole = (
    test_sample.small_network, test_sample.weights, test_sample.run, test_sample.whole,
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two checkpoints, whose averages are the random adapter, doubled in the second."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"model.path": f"{weights}/base.safetensors", "adapter.rank": 4, "adapter.alpha": 8.0}
    config = resolve(override(load(), changes))
    adapter, _ = load_adapter(weights / "adapter.safetensors")  # of rank 2, as a merge may be
    claim(folder, identity(config))
    inputs.keep(folder, inputs.check(folder, input_files(config)))
    with records.keeping(folder, flatten(config)):
        checkpoints = Checkpoints(folder, 2, config_hash="c0ffee")
        for step, factor in ((1, 1.0), (2, 2.0)):
            state = init_state(jax.tree.map(jnp.zeros_like, adapter), make_optimizer(config.optimizer), 0)
            average = jax.tree.map(lambda leaf, factor=factor: jnp.asarray(factor * leaf), adapter)
            checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step), ema=average))
        checkpoints.close()
    return folder


def test_what_a_run_trained_is_drawn_by_its_folder_alone(whole: list[Path], workdir: Path, tmp_path: Path):
    """At the step that is named, beside the base."""
    flags = [f"--workdir={workdir}", f"--out={tmp_path}/out", "--seed=5", "--images-per-prompt=2", *_flags(*PROMPTS)]
    flags += [f"--config.eval.batch_size={BATCH}", f"--config.eval.num_steps={STEPS}", "--config.eval.guidance=2"]
    _call(*flags, "--step=1", "--adapter=", config=None)
    for index, expected in enumerate(whole):
        found = tmp_path / "out" / f"0000{index}_student_step_1.png"
        assert _request(found) == _request(expected)
        np.testing.assert_array_equal(_pixels(found), _pixels(expected))
        about = json.loads(_text(found)["settings"])["adapter"]
        assert about == {"source": f"{workdir}, step 1", "sha256": seal_of(workdir, 1)}
        assert np.abs(_pixels(found) - _pixels(tmp_path / "out" / f"0000{index}_base.png")).max() > 2


def test_a_run_on_another_base_is_not_drawn(workdir: Path, weights: Path, tmp_path: Path):
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}/out", *_flags(PROMPTS[0])]
    assert _said(lambda: _call(*arguments, "--step=7", config=None)) == [
        f"error: --step: found 7, expected one that {workdir} holds: 1, 2"
    ]
    (line,) = _said(lambda: _call("--step=1"))
    assert line == "error: step: found 1, but no --workdir whose checkpoint it is"
    variables, metadata = load_tree(weights / "base.safetensors")
    variables["params"]["proj_out"]["bias"] += 1
    save_tree(tmp_path / "base.safetensors", variables, metadata)
    other = f"--config.model.path={tmp_path}/base.safetensors"
    (line,) = _said(lambda: _call(*arguments, other, config=None))
    assert line.startswith(
        f"error: model.path: {tmp_path}/base.safetensors holds other content than the run in {workdir}"
    )
    assert not (tmp_path / "out").exists()
