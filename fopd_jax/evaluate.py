"""`python -m fopd_jax.evaluate --workdir=DIR [--step=N] [--out=FOLDER] [--weights-only] [--config.eval.field=value …]`.

Does again what a run does at its end, for any checkpoint that its folder holds: exports what trained and reports it
beside base and teachers. The config is the run's own; another evaluation's settings may differ
(`--config.eval.num_steps=28 --config.eval.final_samples=64 --config.tasks.ocr.rewards.ocr=1`). It writes into a folder
of its own, by default `DIR/evaluations/step_N_HASH`, HASH being the config's: what the run itself left stays as it is.

`--weights-only` exports and evaluates nothing; teachers and prompts need not be there.

    python -m fopd_jax.evaluate --config=FILE.py --models base ocr=teachers/ocr student=runs/x --suites geneval,ocr
        [--suite-data ocr=FILE … --also=own,rewritten --prompts=N --samples=N --against=NAME --out=FOLDER]

Evaluates any models side by side: a run's folder, an adapter in any format, a converted folder, `base`, or a folder of
images made elsewhere, on suites at their published sizes; in worlds with tasks of their own each of these is a suite.
The config names the base, the sampler (`eval`, with `eval.also_steps` and `eval.also_guidance`) and the rewards that
score (`--config.rewards.NAME…`); `--also=own` adds each model under the guidance that it says to be for, `rewritten`
the prompts in other words. Images stay, by `OUT/MODEL/SUITE/SETTING`, with a line of scores each in `records.jsonl`.
The same command goes on where it was stopped, and asks again for scores that failed. `results.md`, `.tex`, `.csv` and
`.json` hold the tables: intervals over prompts, and the lead of `--against`, by default the last model, over the others
(`fopd_jax.compare` makes them of several folders). Models that are unequal in prompts, seed, steps or guidance are
refused before anything is drawn, unless `--allow-unequal` names it.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

from absl import app, flags, logging

from fopd_jax.config.flags import membership, parse_flags, read_config, read_workdir, spread_values
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import say, speaks
from fopd_jax.evaluation.report import TABLE_FILE
from fopd_jax.evaluation.results import results_of
from fopd_jax.evaluation.tables import write_results
from fopd_jax.exits import explained
from fopd_jax.files import local_path
from fopd_jax.parallel.distributed import failing_together, initialize, is_main
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.stages.again import evaluate
from fopd_jax.stages.contestants import FIELD, named_sources
from fopd_jax.stages.evaluation import Wish, evaluate_models
from fopd_jax.stages.stored import find_step

_STEP = flags.DEFINE_integer("step", None, "Which of its checkpoints; default the newest.", lower_bound=0)
_OUT = flags.DEFINE_string(
    "out", None, "Folder for what is written; default DIR/evaluations/step_N_HASH, of models evaluations/NAME."
)
_WEIGHTS_ONLY = flags.DEFINE_bool("weights-only", False, "Export the weights, and evaluate nothing.")
_MODELS = flags.DEFINE_multi_string("models", [], "Models to evaluate side by side: NAME=SOURCE …; base is the base.")
_SUITES = flags.DEFINE_list("suites", [], "Of models: suites, separated by commas; default a world's own tasks.")
_DATA = flags.DEFINE_multi_string("suite-data", [], "Of models: prompts of a suite, SUITE=FILE …")
_ALSO = flags.DEFINE_list("also", [], "Of models: further settings; own: each one's own guidance, rewritten prompts.")
_PROMPTS = flags.DEFINE_integer("prompts", None, "Of models: so many prompts of each suite; default all.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Of models: images of each prompt; default as published.")
_AGAINST = flags.DEFINE_string("against", "", "Of models: the one whose leads are told; default the last.")
_UNEQUAL = flags.DEFINE_list("allow-unequal", [], "Of models: what may differ between them: guidance,seed,steps …")


def parse(argv: list[str]) -> list[str]:
    """`parse_flags`, with several values behind some flags."""
    return parse_flags(spread_values(argv, ("models", "suite-data")))


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        if _MODELS.value:
            compare(config)
            return
        if stray := [
            f"--{flag.name}" for flag in (_SUITES, _DATA, _ALSO, _PROMPTS, _SAMPLES, _AGAINST, _UNEQUAL) if flag.value
        ]:
            raise ValueError(f"{stray[0]}: found one without --models, whose it is")
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


def compare(config: StageConfig) -> None:
    """Evaluate several models side by side.

    Raises:
      ValueError: as `evaluate_models`; or a flag of the other use is given.
    """
    for flag in (_STEP, _WEIGHTS_ONLY):
        if flag.value:
            raise ValueError(f"--{flag.name}: found {flag.value} with --models, expected none")
    models, data = named_sources(_MODELS.value, FIELD), named_sources(_DATA.value, "--suite-data")
    wish = Wish(
        models, _SUITES.value, data, _ALSO.value, _PROMPTS.value, _SAMPLES.value, _AGAINST.value, _UNEQUAL.value
    )
    out = local_path("--out", f"evaluations/{config.name}" if _OUT.value is None else _OUT.value)
    initialize(*membership())
    with failing_together(), keeping(config.run.compiled, out):
        cells = evaluate_models(config, wish, out)
        if is_main():
            say(write_results(out, results_of(cells, wish.reference, wish.allow_unequal)).rstrip())
    count = sum(len(cell.records) for cell in cells)
    say(f"{count} images of {len(models)} models at {len({cell.setting for cell in cells})} settings: see {out}")


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse)
