"""`python -m fopd_jax.main --config=configs/miniature.py [--workdir=DIR] [--check] [--config.field=value …]`.

The same command continues a run that ended early; so does `--workdir=DIR` without --config, by the config that the
folder holds. After SIGTERM or Ctrl-C, which save first, the exit status is 143 or 130. On several hosts the same
command runs on each: clusters are detected, or named by --coordinator, --num-processes and --process-id.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import contextlib
import os
import signal
import sys
import time
import traceback
from logging import ERROR, LogRecord
from pathlib import Path
from typing import NoReturn

import numpy as np
from absl import app, flags, logging
from PIL import Image

from fopd_jax.config.flags import config_source, describe_config, membership, parse_flags, read_config, read_workdir
from fopd_jax.config.identity import config_hash, identity
from fopd_jax.config.parse import flatten
from fopd_jax.config.schema import Config
from fopd_jax.console import say, speaks
from fopd_jax.evaluation.report import SAMPLES_FILE, TABLE_FILE
from fopd_jax.exits import RETRY, explain, leave
from fopd_jax.files import local_path, write_json
from fopd_jax.parallel import distributed
from fopd_jax.performance import kept_programs
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.running import inputs, lock, loop, profile, records, tracking, workdir
from fopd_jax.running.checkpoints import Checkpoints, newest_step
from fopd_jax.running.display import describe_end, spell_scores
from fopd_jax.running.metrics import EVALUATION, MetricWriter, logged
from fopd_jax.running.preemption import Preempted, leave_at_once
from fopd_jax.running.stage import Stage
from fopd_jax.running.supervision import Supervision, make_supervision
from fopd_jax.stages.cards import settled
from fopd_jax.stages.check import describe_plan
from fopd_jax.stages.files import input_files
from fopd_jax.stages.plan import check_plan
from fopd_jax.stages.registry import find_stage
from fopd_jax.steps.state import TrainState

_PRINT_CONFIG = flags.DEFINE_bool(
    "print-config", False, "Print every field with its value, where that comes from and what it means, and stop."
)

_CHECK = flags.DEFINE_bool(
    "check", False, "Check all that a run would be refused for, say what it would do, and stop; nothing is written."
)


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs each save at length
        logging.get_absl_logger().addFilter(_is_no_advice)
    try:
        config = read_config()
        if _PRINT_CONFIG.value:
            print(describe_config(config))
            return
        distributed.initialize(*membership())
        leave_at_once()  # after JAX's runtime, which takes SIGTERM
        given = read_workdir()
        folder = local_path("--workdir", f"runs/{config.name}" if given is None else given)
        check(config, folder) if _CHECK.value else run(config, folder)
    except Preempted as stop:
        _leave(str(stop), stop.status)
    except KeyboardInterrupt:
        _leave("interrupted; what was saved before is intact, and the same command continues", 128 + signal.SIGINT)
    except Exception as error:
        fault = explain(error)
        if fault is not None and isinstance(error, ValueError | FloatingPointError):  # every process meets these
            _leave(*fault)
        if fault is None and distributed.is_alone():
            raise
        _abandon(*(fault or (traceback.format_exc(), RETRY)))


def _is_no_advice(record: LogRecord) -> bool:
    """Orbax also warns of every save that the one before has not ended yet; saves that fail are told by the loop."""
    return record.levelno >= ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _leave(message: str, status: int) -> NoReturn:
    """Exit together with the other processes, of which one tells why."""
    leave(message if speaks() else "", status)


def _abandon(message: str, status: int) -> NoReturn:
    """Exit at once: the others may be waiting for this process, and would notice no sooner than it is gone."""
    if distributed.is_alone():
        leave(message, status)
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def run(config: Config, folder: Path) -> None:
    """The stage from its beginning, or from its newest checkpoint, to its report.

    Raises:
      ValueError: bad input, here or on another process.
      TimeoutError: another process is missing.
      Preempted, FloatingPointError, OSError: as `loop.run`.
    """
    began = time.monotonic()
    with distributed.failing_together():
        config = settled(config)
        watch = make_supervision(config.run, folder, {"seed": config.seed, "config_hash": config_hash(config)})
        with watch.goodput, keeping(config.run.compiled, folder), contextlib.ExitStack() as held:
            stage = prepare(config, folder)
            held.enter_context(lock.holding(folder))
            held.enter_context(records.keeping(folder, flatten(config)))
            distributed.barrier("the stage is ready")
            ready = time.monotonic()
            state, writer = train(config, folder, stage, watch)
            trained = time.monotonic()
            with watch.goodput.measure("eval"):
                report(folder, stage, state, writer)
            watch.goodput.mark(int(state.step))
            shares = {f"goodput/{name}": share for name, share in watch.goodput.shares().items()}
            writer.write_scalars(int(state.step), {}, shares)
    writer.close()
    if distributed.is_main():
        tell_end(folder, stage, int(state.step), watch)
        seconds = {"setup": ready - began, "train": trained - ready, "report": time.monotonic() - trained}
        rounded = {f"{name}_seconds": round(value, 2) for name, value in seconds.items()}
        write_json(folder / "timing.json", rounded)


def train(config: Config, folder: Path, stage: Stage, watch: Supervision) -> tuple[TrainState, MetricWriter]:
    """The loop, on the workdir's checkpoints; they are whole when this returns or raises."""
    if distributed.is_main():
        stage.describe()
    settings, claimed = config.run, workdir.claimed_hash(folder)
    with contextlib.ExitStack() as at_end:
        checkpoints = Checkpoints(folder, settings.keep_checkpoints, keep_best=settings.keep_best, config_hash=claimed)
        at_end.callback(checkpoints.close)
        resumed = checkpoints.latest_step() or 0
        tracker = tracking.start(settings.wandb, config.name, flatten(config), folder)
        writer = MetricWriter(folder, resumed, tracker)
        try:
            return loop.run(stage, settings, checkpoints, writer, watch), writer
        except BaseException as error:
            at_end.callback(writer.close, getattr(error, "status", 1))
            raise


def report(folder: Path, stage: Stage, state: TrainState, writer: MetricWriter) -> None:
    """What the stage leaves at its end."""
    say(f"step {int(state.step)}: the report")
    stage.finish(state)
    if not distributed.is_main():
        return
    with Image.open(folder / SAMPLES_FILE) as samples:
        writer.write_images(int(state.step), {"final/samples": np.asarray(samples)})
    if TABLE_FILE in stage.outputs:
        writer.write_texts(int(state.step), {"final/table": (folder / TABLE_FILE).read_text(encoding="utf-8")})


def tell_end(folder: Path, stage: Stage, step: int, watch: Supervision) -> None:
    """The last lines of a run: scores, what is where, what to do next."""
    if TABLE_FILE in stage.outputs:
        scores = (folder / TABLE_FILE).read_text(encoding="utf-8").rstrip()
    else:
        scores = spell_scores(logged(folder, step, EVALUATION))
    outputs = {**stage.outputs, "metrics.jsonl, tensorboard/": "training curves"}
    say(describe_end(folder, f"done: {step} updates", scores, outputs, stage.advise(config_source())))
    say(watch.goodput.summary())


def prepare(config: Config, folder: Path) -> Stage:
    """Check everything and build the stage, then claim the workdir; nothing is written before all is well.

    Raises:
      ValueError: names the field, file or key that is wrong, or the run that holds the workdir.
    """
    found = check_run(config, folder)
    lock.check(folder)  # building takes minutes
    stage = find_stage(config).make(config, folder)
    workdir.claim(folder, identity(config))
    inputs.keep(folder, found)
    return stage


def check(config: Config, folder: Path) -> None:
    """Check everything that `prepare` would, and print what the run would do; writes nothing.

    Raises:
      ValueError: as `prepare`.
    """
    with distributed.failing_together():
        config = settled(config)
        check_run(config, folder)
        plan = find_stage(config).plan(config)
        with contextlib.closing(plan.setup):
            check_plan(plan, config, folder)
            text = describe_plan(plan, config, folder)
        if distributed.is_main():
            print(text)


def check_run(config: Config, folder: Path) -> inputs.Noted:
    """What is known of a run without its stage; returns what its input files hold.

    Raises:
      ValueError: names the field, file or folder that is wrong.
    """
    tracking.check(config.run.wandb)
    kept_programs.check(config.run.compiled)
    profile.check(config.run, folder, newest_step(folder))
    workdir.check(folder, identity(config))
    if config.run.steps < newest_step(folder):
        raise ValueError(f"run.steps: found {config.run.steps}, but {folder} is already at step {newest_step(folder)}")
    return inputs.check(folder, input_files(config), begun=workdir.has_saved(folder))


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
