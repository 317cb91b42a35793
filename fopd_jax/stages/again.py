"""What a run does at its end, done again for any checkpoint that its folder holds, into another folder."""

import contextlib
from pathlib import Path

from fopd_jax.config.identity import config_hash, identity
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.config.stages import StageConfig
from fopd_jax.files import check_writable
from fopd_jax.parallel.distributed import barrier, is_main
from fopd_jax.running import inputs, records, workdir
from fopd_jax.running.checkpoints import read_kept
from fopd_jax.stages.cards import settled
from fopd_jax.stages.files import input_files
from fopd_jax.stages.pipeline import make_pipeline
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.stored import export_stored, find_step

EVALUATIONS = "evaluations"


def evaluate(
    config: StageConfig, folder: Path, step: int | None, out: Path | None, *, weights_only: bool = False
) -> Path:
    """Check everything, then export what a run in `folder` trained, and report it; returns where it was written.

    `config`: the run's, but for how it is evaluated; `step`: None is the newest; `out`: None is a folder in the run's,
    named by step and config. With `weights_only` nothing is reported, and neither teachers nor prompts are needed.

    Raises:
      ValueError: names the flag, field or file that is wrong, before anything is written.
      FloatingPointError: a weight, score or image is not finite.
      OSError: `out` cannot be written.
    """
    config = settled(config)
    workdir.check_evaluates(folder, identity(config))
    step = find_step(folder, step)
    out = out or folder / EVALUATIONS / f"step_{step}_{config_hash(config)}"
    check_out(out)
    # It trains nothing, so that prompts to train on are not encoded.
    idle = resolve(override(config, {"run.steps": 0, "run.eval_every": 0, "run.keep_best": "", "run.profile": None}))
    about = {"of": {"workdir": str(folder), "step": step}}
    if weights_only:
        pipeline = make_pipeline(idle.model, idle.run, dict)
        make_folder(out)
        with records.keeping(out, flatten(config), about):
            export_stored(idle, pipeline, folder, step, out, find_stage(idle).origin)
        return out
    # Rewards may be others than the run's.
    inputs.check(folder, {field: path for field, path in input_files(idle).items() if not field.startswith("rewards.")})
    stage = find_stage(idle).make(idle, out, folder)
    with contextlib.closing(stage):
        state = read_kept(folder, step, stage.state)
        make_folder(out)
        with records.keeping(out, flatten(config), about):
            stage.finish(state)
    return out


def check_out(out: Path) -> None:
    """Refuse to write among what something else has made.

    Raises:
      ValueError: `out` cannot be written, or holds other things than an evaluation; begins with `--out`.
    """
    if is_main():
        check_writable(out, "--out")
        others = out.exists() and any(out.iterdir()) and not (out / RECORD_FILE).is_file()
        if others or (out / workdir.CONFIG_FILE).exists():
            raise ValueError(f"--out: {out} holds what no evaluation has made; name another")
    barrier("the folder can be written")


def make_folder(out: Path) -> None:
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    barrier("the folder is there")
