"""What goes wrong on one of two processes is told, is known to both, and holds neither up."""

import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.steps.state import init_state
from tests.parallel.processes import free_port, start
from tests.running import loop_program
from tests.running.loop_program import FULL, HANGS, LEFT_S, STOP_S
from tests.running.toy import OPTIMIZER


def _run(what: str, workdir: Path) -> tuple[list[int], list[list[str]], float]:
    """Statuses, what each process said, and seconds."""
    workdir.mkdir()
    port, began = free_port(), time.monotonic()
    programs = [start([loop_program.__file__, what, str(workdir), str(i), str(port)], 1) for i in range(2)]
    try:
        said = [program.communicate(timeout=120)[0].splitlines() for program in programs]
    finally:
        for program in programs:
            program.kill()
    return [program.returncode for program in programs], said, time.monotonic() - began


def test_a_full_disk_and_a_hanging_one_on_one_process(tmp_path: Path):
    """Its part of the save at step 2 fails, and an evaluation; from step 6 its writes hang, and a signal comes."""
    workdir = tmp_path / "run"
    statuses, said, seconds = _run("saves", workdir)
    print(f"{seconds:.1f} s", *said, sep="\n")
    assert statuses == [143, 143]
    full = [[line for line in lines if "No space left on device" in line] for lines in said]
    assert [len(lines) for lines in full] == [1, 1]
    assert re.search(f"warning: step {FULL}: no checkpoint saved: .*process 1 .*; trying again at the next", full[0][0])
    assert re.search(rf"warning: process 1 \(.*checkpoints/{FULL}: ", full[1][0])
    failed = [line for line in said[0] if "the evaluation failed" in line]
    assert len(failed) == 1
    assert "step 3: " in failed[0]
    assert "no such scorer" in failed[0]
    for lines in said:
        [last] = [line for line in lines if "SIGTERM: " in line]
        assert "has not ended within" in last
        assert "continues from the checkpoint before" in last
        assert "Traceback" not in "\n".join(lines)
    assert seconds < 60 + STOP_S
    checkpoints = Checkpoints(workdir, 1, config_hash="c0ffee")
    restored = checkpoints.restore(jax.eval_shape(lambda: init_state(jnp.zeros(3), OPTIMIZER, 0)))
    assert int(restored.step) == HANGS - 2
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_evaluation_that_fails_on_one_process_while_the_other_computes_ends_both(tmp_path: Path, failing: int):
    statuses, said, seconds = _run(str(failing), tmp_path / "run")
    print(f"{seconds:.1f} s", *said, sep="\n")
    assert statuses == [1, 1]
    for lines in said:
        [error] = [line for line in lines if "error: " in line]
        assert "error: the evaluation at step 3" in error
        assert "a broken host" in error
    assert seconds < 60 + LEFT_S
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
