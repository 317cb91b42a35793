"""The loop in one of two processes, in which things go wrong: `python loop_program.py WHAT WORKDIR PROCESS PORT`."""

if __name__ == "__main__":  # before the imports below, which touch devices
    import sys

    from fopd_jax.parallel import distributed

    distributed.initialize(f"localhost:{sys.argv[4]}", 2, int(sys.argv[3]), timeout_s=120)

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fopd_jax.config.schema import MeshShape, Run
from fopd_jax.parallel import distributed
from fopd_jax.parallel.agreement import together
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import replicated
from fopd_jax.running import loop, preemption, saving
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.stage import Progress
from fopd_jax.running.supervision import make_supervision
from fopd_jax.steps.state import TrainState, init_state
from tests.running.toy import OPTIMIZER, Toy, rows

STEPS, CHECKPOINT_EVERY, EVAL_EVERY, FULL, HANGS = 9, 2, 3, 2, 6
STOP_S, LEFT_S = 5.0, 3.0
"""What a run has to stop and to come out of an evaluation; a tenth of what it has outside of tests."""


class Shared(Toy):
    """The toy stage on the devices of both processes."""

    def start(self) -> TrainState:
        return distributed.put_replicated(init_state(jnp.zeros(3), OPTIMIZER, 0), replicated(make_mesh(MeshShape())))

    @property
    def state(self) -> TrainState:
        everywhere = replicated(make_mesh(MeshShape()))
        shapes = jax.eval_shape(lambda: init_state(jnp.zeros(3), OPTIMIZER, 0))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Mapping[str, jax.Array]]:
        if step == HANGS:  # its save hangs by now
            os.kill(os.getpid(), signal.SIGTERM)
        with jax.transfer_guard("allow"):
            batch = distributed.put_replicated(rows(step), replicated(make_mesh(MeshShape())))
        return self.step(state, batch)


def fail_on(process: int, what: str) -> float:
    if jax.process_index() == process:
        raise OSError(errno.ENOENT, what)
    return 1.0


def agreed_failure(state: TrainState, progress: Progress) -> dict[str, float]:
    """Between two computations, as what scores does."""
    return {"score": together("scores", lambda: fail_on(1, "no such scorer") if int(state.step) == 3 else 1.0)}


def failure_in_a_computation(process: int) -> Callable[[TrainState, Progress], dict[str, float]]:
    """That the other process has entered."""

    def score(state: TrainState, progress: Progress) -> dict[str, float]:
        fail_on(process, "a broken host")
        return {"score": float(distributed.total(1))}

    return score


def break_saves() -> None:
    """The disk is full once, and later hangs, in what process 1 writes."""

    def write_part(folder: Path, *rest: Any) -> None:
        step = int(folder.name.partition(".")[0])
        if jax.process_index() == 1 and step == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        if jax.process_index() == 1 and step == HANGS:
            threading.Event().wait()
        right(folder, *rest)

    right, saving.write_part = saving.write_part, write_part


def main(what: str, workdir: Path) -> None:
    preemption.leave_at_once()
    settings = Run(
        steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, eval_every=EVAL_EVERY, keep_checkpoints=1, stop_seconds=STOP_S
    )
    if what == "saves":
        break_saves()
    preemption.FAILURE_S = loop.FAILURE_S = LEFT_S
    score = agreed_failure if what == "saves" else failure_in_a_computation(int(what))
    checkpoints = Checkpoints(workdir, 1, config_hash="c0ffee")
    writer = MetricWriter(workdir, checkpoints.latest_step() or 0)
    watch = make_supervision(settings, workdir, {})
    try:
        loop.run(Shared(score=score), settings, checkpoints, writer, watch)
    except TimeoutError as error:  # as the main program does
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
