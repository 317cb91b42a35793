"""`python -m fopd_jax.main --config=configs/miniature.py [--workdir=DIR] [--config.field=value …]`."""

import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from PIL import Image

from fopd_jax.config import Config
from fopd_jax.evaluation.report import SAMPLES_FILE
from fopd_jax.flags import CONFIG, parse_flags
from fopd_jax.training import loop, workdir
from fopd_jax.training.checkpoints import Checkpoints, newest_step
from fopd_jax.training.flow_matching import FlowMatching
from fopd_jax.training.metrics import MetricWriter
from fopd_jax.training.opd import OPD

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and results go; default runs/<config.name>."
)

STAGES = {"flow_matching": FlowMatching, "opd": OPD}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs each save at length
    config = CONFIG.value
    folder = Path(_WORKDIR.value or f"runs/{config.name}")
    began = time.monotonic()
    try:
        stage = prepare(config, folder)
    except ValueError as error:  # bad input is one line, not a traceback
        sys.exit(f"error: {error}")
    stage.describe()
    ready = time.monotonic()
    checkpoints = Checkpoints(folder, config.keep_checkpoints)
    writer = MetricWriter(folder, checkpoints.latest_step() or 0)
    try:
        state = loop.run(stage.experiment, stage.setup.cadence, checkpoints, writer)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    finally:
        checkpoints.close()
    trained = time.monotonic()
    stage.finish(state)
    with Image.open(folder / SAMPLES_FILE) as samples:
        writer.write_images(int(state.step), {"samples": np.asarray(samples)})
    writer.close()
    seconds = {"setup": ready - began, "train": trained - ready, "report": time.monotonic() - trained}
    workdir.write_json(folder / "timing.json", {f"{name}_seconds": round(value, 2) for name, value in seconds.items()})


def prepare(config: Config, folder: Path) -> FlowMatching | OPD:
    """Check everything and build the stage, then claim the workdir; nothing is written before all is well.

    Raises:
      ValueError: names the field, file or key that is wrong.
    """
    if config.stage not in STAGES:
        raise ValueError(f"stage: found {config.stage!r}, expected one of {tuple(STAGES)}")
    workdir.check(folder, config)
    stage = STAGES[config.stage](config, folder)
    if config.steps < newest_step(folder):
        raise ValueError(f"steps: found {config.steps}, but {folder} is already at step {newest_step(folder)}")
    workdir.claim(folder, config)
    return stage


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
