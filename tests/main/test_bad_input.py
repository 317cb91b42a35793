"""Bad input, as a user meets it and in one process: one line that names it, and nothing written or compiled."""

import re
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.parse import assign
from fopd_jax.worlds.miniature.world import make_world
from tests.configs import FOLDER, prepare
from tests.main.experiment import Overrides, Program, assert_refused, command, one_error

# ---- on the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.nope=1"], "no such field: 'nope'"),
        (["--config.eval.sample=1", "--config.run.steps=1"], "no such field: 'sample', did you mean 'samples'?"),
        (["--config.run.steps=many"], "--config.run.steps=many: expected a whole number"),
        (["--config.run.steps=-1"], "run.steps: found -1, expected at least 0"),
        (["--workdir=gs://bucket/run"], "--workdir: found 'gs://bucket/run', expected a path on this machine"),
        (["--config.model.t5_length=0"], "model.t5_length: found 0, expected at least 1"),
    ],
)
def test_bad_flags_are_one_line(program: Program, flags: list[str], message: str, tmp_path: Path):
    assert message in one_error(program.call([*command(tmp_path / "run", {}), *flags]))
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there_is_one_line(program: Program, tmp_path: Path):
    missing = tmp_path / "missing.py"
    for overrides in ({}, {"run.steps": 1}):
        assert str(missing) in one_error(program.call(command(tmp_path / "run", overrides, missing)))
    assert not (tmp_path / "run").exists()


def test_an_unknown_variant_of_a_config_is_one_line(program: Program, tmp_path: Path):
    path = f"{FOLDER}/miniature_teacher.py:beauty"
    assert "found 'beauty', expected text or composition or quality" in one_error(
        program.call(command(tmp_path / "run", {}, path))
    )


def test_a_prompt_without_a_teacher_is_one_line(program: Program, tmp_path: Path):
    path = tmp_path / "incomplete.py"
    path.write_text(
        "import runpy\n\n\ndef get_config():\n"
        f"    c = runpy.run_path({str(FOLDER / 'miniature.py')!r})['get_config']()\n"
        "    c.tasks['composition'].teacher = ''\n    return c\n"
    )
    overrides = {name: value for name, value in program.overrides.items() if "composition" not in name}
    error = one_error(program.call(command(tmp_path / "run", overrides, path)))
    assert re.search(r"prompt '.*': its task 'composition' has no teacher; teachers: \('text',\)", error)
    assert not (tmp_path / "run").exists()


# ---- in one process

SCALARS: list[tuple[Overrides, tuple[str, ...]]] = [
    ({"stage": "grpo"}, ("stage: found 'grpo'", "'opd'")),
    ({"model.preset": "sd35_tiny"}, ("model.preset: found 'sd35_tiny'", "'miniature'")),
    ({"model.preset": "sd35_medium"}, ("model.path: found", "'sd35_medium' needs a converted folder")),
    ({"run.steps": -1}, ("run.steps: found -1",)),
    ({"run.log_every": 0}, ("run.log_every: found 0",)),
    ({"run.checkpoint_every": 0}, ("run.checkpoint_every: found 0",)),
    ({"run.eval_every": -1}, ("run.eval_every: found -1",)),
    ({"run.keep_checkpoints": 0}, ("run.keep_checkpoints: found 0",)),
    ({"batch_size": 0}, ("batch_size: found 0",)),
    ({"images_per_prompt": 3}, ("images_per_prompt: found 3", "batch_size 4")),
    ({"minibatches": 3}, ("minibatches: found 3", "batch_size 4")),
    ({"updates_per_rollout": 0}, ("updates_per_rollout: found 0",)),
    ({"sampler.num_steps": 1}, ("sampler.num_steps: found 1",)),
    ({"sampler.transition": "euler"}, ("sampler.transition: found 'euler'", "sde")),
    ({"sampler.transition": "ode", "objective.name": "clipped", "objective.weighting": "ode"}, ("'ode'",)),
    ({"objective.name": "ppo"}, ("objective.name: found 'ppo'",)),
    ({"adapter.rank": 0}, ("adapter.rank: found 0",)),
    ({"adapter.targets": ("attn3",)}, ("adapter.targets: found ('attn3',)", "'attn2'")),
    ({"tasks.text.weight": 0.0, "tasks.composition.weight": 0.0}, ("tasks", "[0.0, 0.0]")),
    ({"tasks.text.weight": -1.0}, ("tasks.text.weight: found -1.0",)),
    ({"eval.samples": 0}, ("eval.samples: found 0",)),
    ({"eval.batch_size": 0}, ("eval.batch_size: found 0",)),
    ({"eval.num_steps": 0}, ("eval.num_steps: found 0",)),
    ({"eval.tasks": ("text", "ocr")}, ("eval.tasks: found 'ocr'", "'composition'")),
    ({"eval.final_samples": 0}, ("eval.final_samples: found 0",)),
    ({"cold_start.method": "sft"}, ("cold_start.method: found 'sft'",)),
    ({"cold_start.merge": "mean"}, ("cold_start.merge: found 'mean'",)),
    ({"eval.transition": "euler"}, ("eval.transition: found 'euler'", "sde")),
    ({"eval.transition": "cps", "eval.noise_level": 1.5}, ("eval.noise_level: found 1.5", "'cps'")),
    ({"sampler.transition": "cps", "sampler.noise_level": 1.5}, ("sampler.noise_level: found 1.5", "'cps'")),
    ({"sampler.window": (1, 4)}, ("sampler.window: found (1, 4)", "stop <= 3")),
    ({"sampler.trained": (1, 3)}, ("sampler.trained: found (1, 3)", "<= 2")),
    ({"sampler.noise_level": 0.0, "objective.weighting": "kl"}, ("objective.weighting: found 'kl'", "noise level 0")),
    ({"objective.weighting": "uniform", "objective.reward": "log_ratio"}, ("objective.weighting: found 'uniform'",)),
    ({"run.attention": "flash"}, ("run.attention: found 'flash'", "'splash'")),
    ({"run.kernels": "triton"}, ("run.kernels: found 'triton'", "'pallas'")),
    ({"run.kernels": "pallas"}, ("run.kernels: 'pallas' needs a TPU",)),
    ({"model.dtype": "float33"}, ("model.dtype: found 'float33'",)),
    ({"run.remat": "some"}, ("run.remat: found 'some'", "'dots'")),
    ({"run.mesh.tensor": 3}, ("run.mesh: ", "'tensor': 3", "devices")),
    ({"anchor.name": "text"}, ("anchor.name: found 'text'", "another teacher")),
    ({"batch_size": True}, ("batch_size: found True, expected a whole number",)),
    ({"tasks.text.prompts": "train.txt"}, ("tasks.text.prompts: found 'train.txt', expected ''", "of its own")),
    ({"tasks.composition.test": "test.txt"}, ("tasks.composition.test: found 'test.txt', expected ''",)),
    ({"model.resolution": 100}, ("model.resolution: found 100, expected (24, 24)",)),
    ({"run.attention": "cudnn"}, ("run.attention: 'cudnn' needs a GPU",)),
    ({"run.compiled": "/proc/compiled"}, ("run.compiled: /proc cannot be written",)),
    ({"guidance": float("nan")}, ("guidance: found nan, expected a finite number",)),
]


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(("changes", "fragments"), SCALARS, ids=lambda value: str(value)[:60])
def test_values_out_of_range_are_named(config: Any, tmp_path: Path, changes: Overrides, fragments: tuple[str, ...]):
    assign(config, changes)
    assert_refused(config, tmp_path / "run", *fragments)


@pytest.mark.usefixtures("no_compilation")
def test_a_task_without_a_teacher_is_named_with_a_prompt(config: Any, tmp_path: Path):
    config.tasks["composition"].teacher = ""
    prompt = make_world().tasks["composition"].train[0]
    assert_refused(config, tmp_path / "run", repr(prompt), "'composition' has no teacher", "('text',)")


@pytest.mark.usefixtures("no_compilation")
def test_merge_weights_for_nobody_are_named(config: Any, tmp_path: Path):
    config.cold_start.weights["aesthetics"] = 0.5
    assert_refused(config, tmp_path / "run", "cold_start.weights", "aesthetics", "'composition'")


def test_every_mistake_is_named_at_once(config: Any, tmp_path: Path):
    assign(config, {"batch_size": 0, "eval.noise_level": -1.0})
    with pytest.raises(ValueError, match="found") as error:
        prepare(config, tmp_path / "run")
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == ["batch_size", "eval.noise_level"]
