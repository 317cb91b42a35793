"""`python -m fopd_jax.evaluate --workdir=DIR [--step=N] [--out=FOLDER] [--weights-only] [--config.eval.field=value …]`.

Does again what a run does at its end, for any checkpoint that its folder holds: exports what trained and reports it
beside base and teachers. The config is the run's own; another evaluation's settings may differ
(`--config.eval.num_steps=28 --config.eval.final_samples=64 --config.tasks.ocr.rewards.ocr=1`). It writes into a folder
of its own, by default `DIR/evaluations/step_N_HASH`, HASH being the config's: what the run itself left stays as it is.

`--weights-only` exports and evaluates nothing; teachers and prompts need not be there.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

from absl import app, flags, logging

from fopd_jax.config.flags import membership, parse_flags, read_config, read_workdir
from fopd_jax.console import say, speaks
from fopd_jax.evaluation.report import TABLE_FILE
from fopd_jax.exits import explained
from fopd_jax.files import local_path
from fopd_jax.parallel.distributed import failing_together, initialize
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.stages.again import evaluate
from fopd_jax.stages.stored import find_step

_STEP = flags.DEFINE_integer("step", None, "Which of its checkpoints; default the newest.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Folder for what is written; default DIR/evaluations/step_N_HASH.")
_WEIGHTS_ONLY = flags.DEFINE_bool("weights-only", False, "Export the weights, and evaluate nothing.")


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        if (given := read_workdir()) is None:
            raise ValueError("--workdir: missing, expected a run's folder")
        folder = local_path("--workdir", given)
        out = None if _OUT.value is None else local_path("--out", _OUT.value)
        initialize(*membership())
        with failing_together(), keeping(config.run.compiled, folder):
            step = find_step(folder, _STEP.value)
            written = evaluate(config, folder, step, out, weights_only=_WEIGHTS_ONLY.value)
        if (written / TABLE_FILE).exists():
            say((written / TABLE_FILE).read_text(encoding="utf-8").rstrip())
        say(f"step {step} of {folder}: see {written}")


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
