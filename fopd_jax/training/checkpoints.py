"""Orbax checkpoints of what trains, saved asynchronously and renamed into place when whole."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fopd_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, under `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Start saving; the arrays are copied before this returns, so the state may be donated."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_tree(state)))

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, onto the shapes, dtypes and shardings of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(state))
        restored: Any = self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(abstract))
        return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(restored))

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def newest_step(workdir: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one. Only looks: opening `Checkpoints` makes the folder."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _tree(state: TrainState) -> list[jax.Array]:
    return jax.tree.leaves(state)
