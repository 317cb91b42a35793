"""Ten stops by each signal at random moments, from first import to last file: nothing is lost, one line each."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.running.checkpoints import newest_step
from fopd_jax.running.preemption import SIGNALS
from tests.main.experiment import TIMEOUT, Program, assert_same_outcome, logged

STOPS, SPAN_S = 10, 20.0
LONG = {"steps": 20, "eval_every": 5, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def straight(program: Program) -> Path:
    return program.run("straight", **LONG)


def _told(lines: list[str], number: signal.Signals) -> list[str]:
    """What was said of a stop; the other lines are those of progress."""
    return [line for line in lines if line.startswith((f"{number.name}:", "interrupted", "warning", "error", "Trace"))]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_ten_stops_change_nothing(program: Program, straight: Path, number: signal.Signals):
    name, rng, stops = number.name.lower(), np.random.default_rng(number), 0
    workdir, errors, newest = program.folder / name, program.folder / f"{name}.err", 0
    while stops < STOPS:
        with program.start(name, **LONG) as process:
            time.sleep(rng.uniform(0, SPAN_S))
            process.send_signal(number)
            status = process.wait(TIMEOUT)
        said, done = errors.read_text(), newest_step(workdir)
        errors.unlink()
        told = _told(said.splitlines(), number)
        assert status in (0, 128 + number, -number), said
        if status == 128 + number:
            stops += 1
            assert len(told) == 1, said
        else:  # it had ended by itself, or had not begun: Python was still starting
            stops += status == -number
            assert told == [], said
        assert "Traceback" not in said
        assert done >= newest  # no checkpoint is ever lost
        assert done >= max((line["step"] for line in logged(workdir)), default=0)  # nor an update that was told
        newest = done
    assert_same_outcome(program.run(name, **LONG), straight)
