"""`python -m fopd_jax.evaluate --workdir=DIR [--step=N] [--out=FOLDER] [--weights-only] [--config.eval.field=value …]`.

Does again what a run does at its end, for any checkpoint that its folder holds: exports what trained and reports it
beside base and teachers. The config is the run's own; another evaluation's settings may differ
(`--config.eval.num_steps=28 --config.eval.final_samples=64`). It writes into a folder of its own, by default
`DIR/evaluations/step_N_HASH`, HASH being the config's: what the run itself left stays as it is.

`--weights-only` exports and evaluates nothing; teachers and prompts need not be there.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import contextlib
import sys
from pathlib import Path

from absl import app, flags, logging

from fopd_jax.config.flags import membership, parse_flags, read_config
from fopd_jax.config.identity import config_hash, identity
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.config.schema import OPD, FlowMatching
from fopd_jax.exits import explained
from fopd_jax.files import check_writable, local_path
from fopd_jax.parallel.distributed import barrier, failing_together, initialize, is_main, speaks
from fopd_jax.running import inputs, records, workdir
from fopd_jax.running.checkpoints import read_kept
from fopd_jax.stages.files import input_files
from fopd_jax.stages.pipeline import make_pipeline
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.stored import export_stored, find_step

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_STEP = flags.DEFINE_integer("step", None, "Which of its checkpoints; default the newest.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Folder for what is written; default DIR/evaluations/step_N_HASH.")
_WEIGHTS_ONLY = flags.DEFINE_bool("weights-only", False, "Export the weights, and evaluate nothing.")

EVALUATIONS = "evaluations"


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        if not _WORKDIR.value:
            raise ValueError("--workdir: missing, expected a run's folder")
        folder = local_path("--workdir", _WORKDIR.value)
        out = None if _OUT.value is None else local_path("--out", _OUT.value)
        initialize(*membership())
        with failing_together():
            run(config, folder, _STEP.value, out, weights_only=_WEIGHTS_ONLY.value)


def run(
    config: OPD | FlowMatching, folder: Path, step: int | None, out: Path | None, *, weights_only: bool = False
) -> None:
    """Check everything, then export, and evaluate.

    Raises:
      ValueError: names the flag, field or file that is wrong, before anything is written.
      FloatingPointError: a weight, score or image is not finite.
      OSError: `out` cannot be written.
    """
    workdir.check_evaluates(folder, identity(config))
    step = find_step(folder, step)
    out = out or folder / EVALUATIONS / f"step_{step}_{config_hash(config)}"
    check_out(out, folder)
    # It trains nothing, so that prompts to train on are not encoded.
    idle = resolve(override(config, {"run.steps": 0, "run.eval_every": 0, "run.keep_best": "", "run.profile": None}))
    about = {"of": {"workdir": str(folder), "step": step}}
    if weights_only:
        pipeline = make_pipeline(idle.model, idle.run, dict)
        _make(out)
        with records.keeping(out, flatten(config), about):
            export_stored(idle, pipeline, folder, step, out)
    else:
        inputs.check(folder, input_files(idle))
        stage = find_stage(idle).make(idle, out)
        with contextlib.closing(stage):
            state = read_kept(folder, step, stage.state)
            _make(out)
            with records.keeping(out, flatten(config), about):
                stage.finish(state)
    if is_main():
        print(f"step {step} of {folder}: written to {out}", file=sys.stderr)


def check_out(out: Path, folder: Path) -> None:
    """Refuse to write among what another program has made.

    Raises:
      ValueError: `out` cannot be written, or holds other things than an evaluation; begins with `--out`.
    """
    if is_main():
        check_writable(out, "--out")
        others = out.exists() and any(out.iterdir()) and not (out / RECORD_FILE).is_file()
        if others or (out / workdir.CONFIG_FILE).exists():
            raise ValueError(f"--out: {out} holds what no evaluation has made; name another")
    barrier("the folder can be written")


def _make(out: Path) -> None:
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    barrier("the folder is there")


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
