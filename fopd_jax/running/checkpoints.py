"""Orbax checkpoints of what trains, saved beside training and renamed into place when whole, verified when read.

    checkpoints/<step>/   state/   about/about.json   manifest_<process>.json   manifest.json

Nothing that is restored depends on the mesh or the number of processes that wrote it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from fopd_jax.files import free_name, write_json
from fopd_jax.parallel.agreement import forget, share
from fopd_jax.parallel.distributed import barrier, is_main, warn
from fopd_jax.reading import is_taken, read_regular, real_path
from fopd_jax.running.guards import in_one_line
from fopd_jax.running.integrity import MANIFEST_FILE, find_damage, fingerprint
from fopd_jax.running.saving import ABOUT, ABOUT_FILE, IN_PLACE, STATE, Save, arrays_handler, patience
from fopd_jax.steps.state import TrainState

FOLDER = "checkpoints"
_SCORES = "scores.json"  # by metric and step
_STEP = re.compile(r"0|[1-9][0-9]*")  # as Python spells a number, so that a step has one name
_TEMPORARY = re.compile(r"\d+\..*tmp.*")  # what a kill has left of a save or a removal, of earlier versions' too


class Checkpoints:
    """The checkpoints of one run, under `workdir/checkpoints/<step>`. Every process calls every method.

    The newest `keep` stay, and with `keep_best` = `max:METRIC` or `min:METRIC` the best one by that metric too.

    Raises:
      ValueError: `keep` or `keep_best` is none of these.
    """

    def __init__(self, workdir: Path, keep: int, *, keep_best: str = "", config_hash: str) -> None:
        if keep < 1:
            raise ValueError(f"run.keep_checkpoints: found {keep}, expected at least 1")
        self._folder = real_path(workdir / FOLDER)
        self._config_hash = config_hash
        self._best = Best(keep_best)
        self._told: set[str] = set()  # damages that are in the log already
        self._verified: dict[int, Any] = {}  # step → its files' fingerprint when their hashes were found right
        self._keep, self._saves = keep, itertools.count()
        self._save: Save | None = None
        self._over = ""  # what all have told one another of the save before
        if is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_temporaries(self._folder)
        barrier("checkpoints opened")
        self._best.read(self._folder)

    def latest_step(self) -> int | None:
        """Step of the newest intact checkpoint. Damaged ones are named in the log and passed over.

        Every byte of it is read, the first time: each process reads its share.

        Raises:
          ValueError: there are checkpoints, and all are damaged; names what is wrong.
          TimeoutError: some processes do not ask; names them.
        """
        there = share("checkpoints there", json.dumps(sorted(_steps(self._folder), reverse=True)))[0]
        damages: list[str] = []
        for step in json.loads(there):
            damage = self._damage(step)
            if damage is None:
                self._tell(damages, step)
                return step
            damages.append(damage)
        if damages:
            raise ValueError(
                f"{self._folder}: no checkpoint is intact; restore one, or remove the folder to start again: "
                + "; ".join(damages)
            )
        return None

    def _tell(self, damages: Sequence[str], step: int) -> None:
        for each in (new for new in damages if new not in self._told):
            self._told.add(each)
            if is_main():
                logging.warning("damaged checkpoint, using step %d instead: %s", step, each)

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, on every process the same."""
        folder = self._folder / str(step)
        found = fingerprint(folder)
        damage = _verify(folder, sum(size for _, size, _ in found), self._verified.get(step) == found)
        if damage is None:
            self._verified[step] = found
        return damage

    def save(
        self,
        step: int,
        state: TrainState,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Start saving; the arrays are copied before this returns, so the state may be donated.

        A step that is there is not saved again. `notes`: JSON that belongs to the state.

        Raises:
          Exception: whatever stopped the save before this one, which left no checkpoint.
          OSError: process 0 cannot make the folder.
          TimeoutError: some processes do not save; names them.
        """
        self.wait()
        name = self._begin(step)
        if not name:
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._best.forget(step)  # of a damaged one at the same step
        about = {"step": step, "config_hash": self._config_hash, "metrics": {}, "leaves": _describe(state)}
        about |= {"notes": dict(notes or {})}
        kept = self._kept([*_steps(self._folder), step])
        self._save = Save(self._folder / name, self._folder / str(step), patience(size))
        self._save.start(jax.tree.leaves(state), about, lambda: self._remove_but(kept))

    def _begin(self, step: int) -> str:
        """Let process 0 make the folder; its name on every process, empty if the step is there already."""
        name, problem = "", ""
        if is_main() and step not in _steps(self._folder):
            name = f"{step}.tmp{next(self._saves)}"  # its own: what hangs in an earlier save does no harm to this one
            try:
                (self._folder / name / STATE).mkdir(parents=True)
            except OSError as error:
                problem = in_one_line(error)
        name, problem = json.loads(share("a save begins", json.dumps([name, problem]), patience(0))[0])
        forget(self._over)
        if problem:
            raise OSError(problem)
        return name

    def _kept(self, steps: Sequence[int]) -> set[int]:
        best = self._best.of(steps)
        return {*sorted(steps)[-self._keep :], *(() if best is None else (best,))}

    def _remove_but(self, kept: set[int]) -> None:
        """Remove the checkpoints that are not among these, each at once: its name goes first."""
        try:
            for step in set(_steps(self._folder)) - kept:
                gone = free_name(self._folder / f"{step}.old.tmp")
                (self._folder / str(step)).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        except OSError as error:
            warn(f"an old checkpoint stays: {in_one_line(error)}")

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note what an evaluation of a state found, which decides whether its checkpoint is kept as the best one.

        Beside the checkpoints, in a file of its own: what is in a checkpoint is sealed before its evaluation ends.
        """
        self._best.add(step, metrics)
        if is_main():
            self._best.write(self._folder)

    def restore(self, state: TrainState) -> TrainState:
        """The newest intact checkpoint, onto the shapes, dtypes and shardings of `state`: arrays, or shapes alone.

        Each device reads its own shard. Damaged checkpoints that are newer are renamed to `<step>.damaged`, so that
        the run can save at their steps again.

        Raises:
          ValueError: no checkpoint is there or intact, or it is another config's or of other shapes; names which.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self._folder}: no checkpoint")
        self._check(step, state)
        abstract = [_abstract(leaf) for leaf in jax.tree.leaves(state)]
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        restored: Any = arrays_handler().restore(epath.Path(self._folder / str(step) / STATE), args=args)
        self._set_aside_after(step)
        return jax.tree.unflatten(jax.tree.structure(state), restored)

    def notes(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step; nothing in checkpoints of earlier versions."""
        return _read_about(self._folder, step).get("notes", {})

    def _check(self, step: int, state: TrainState) -> None:
        about, folder = _read_about(self._folder, step), self._folder / str(step)
        if about["config_hash"] != self._config_hash:
            raise ValueError(
                f"{folder}: written under config {about['config_hash']}, this run's is {self._config_hash}; "
                "choose another workdir"
            )
        check_arrays(folder, about["leaves"], state)

    def _set_aside_after(self, step: int) -> None:
        """All that is newer than the newest intact checkpoint is damaged."""
        if is_main():
            for newer in (each for each in _steps(self._folder) if each > step):
                (self._folder / str(newer)).rename(free_name(self._folder / f"{newer}.damaged"))
        barrier("damaged checkpoints set aside")

    def wait(self) -> None:
        """Until the save under way, if any, is in place.

        Raises:
          Exception: whatever stopped it; it left no checkpoint.
        """
        save, self._save = self._save, None
        if save is not None:
            self._over = save.about(IN_PLACE)
            save.wait()

    def close(self) -> None:
        """Wait for saves under way."""
        self.wait()


class Best:
    """The checkpoint with the best value of one metric; none where `spec` is empty."""

    def __init__(self, spec: str) -> None:
        direction, _, self._name = spec.partition(":")
        if spec and (direction not in ("max", "min") or not self._name):
            raise ValueError(f"run.keep_best: found {spec!r}, expected 'max:METRIC', 'min:METRIC' or ''")
        self._sign = -1.0 if direction == "min" else 1.0
        self._scores: dict[int, float] = {}
        self._told = False

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the score of a checkpoint; one without metrics is never the best. A metric that is not there is told."""
        if not self._name or not metrics:
            return
        if self._name in metrics:
            self._note(step, float(metrics[self._name]))
        elif not self._told:
            self._told = True
            there = ", ".join(sorted(metrics))
            warn(f"run.keep_best: found no metric {self._name!r}, expected one of {there}; no checkpoint is the best")

    def _note(self, step: int, value: float) -> None:
        if math.isfinite(value):
            self._scores[step] = self._sign * value

    def forget(self, step: int) -> None:
        """A checkpoint that is written anew has no score yet."""
        self._scores.pop(step, None)

    def write(self, folder: Path) -> None:
        """Keep the scores of the checkpoints that are there; a full disk does not stop it."""
        values = {str(step): self._sign * self._scores[step] for step in _steps(folder) if step in self._scores}
        if self._name:
            with contextlib.suppress(OSError):
                write_json(folder / _SCORES, {self._name: values})

    def read(self, folder: Path) -> None:
        """Note the scores of the checkpoints that are there already; those that cannot be read have none."""
        for step in _steps(folder) if self._name else ():
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                self.add(step, _read_about(folder, step)["metrics"])  # where earlier versions kept them
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(read_regular(folder / _SCORES).decode())
            for step, value in found.get(self._name, {}).items():
                self._note(int(step), float(value))

    def of(self, steps: Sequence[int]) -> int | None:
        """The best of these; None if none has a score."""
        return max((step for step in steps if step in self._scores), key=self._scores.__getitem__, default=None)


def newest_step(workdir: Path) -> int:
    """Step of the newest checkpoint, 0 without one. Only looks: opening `Checkpoints` makes the folder."""
    return max((step for step in _steps(workdir / FOLDER) if (workdir / FOLDER / str(step)).is_dir()), default=0)


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if _STEP.fullmatch(path.name)]


def _remove_temporaries(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
            if is_taken(path) and not path.is_dir():  # a file of that name would stop the save
                path.unlink()


def _verify(folder: Path, size: int, verified: bool = False) -> str | None:
    """What is wrong with a checkpoint of `size` bytes, on every process the same; `verified`: here it is known already.

    Each process reads its share.
    """
    own = None if verified else find_damage(folder, jax.process_index(), jax.process_count())
    words = share(f"checkpoint {folder.name} verified", own or "", patience(size))
    if damage := next((word for word in words if word), None):
        return damage
    holds = _read_about(folder.parent, int(folder.name)).get("step")
    return None if str(holds) == folder.name else f"{folder}/: found step {holds} under this name"


def _describe(state: TrainState) -> list[list[Any]]:
    """`[path, shape, dtype]` of every array, in the order in which they are saved."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        [jax.tree_util.keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in paths
    ]


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_about(folder: Path, step: int) -> dict[str, Any]:
    return json.loads(read_regular(folder / str(step) / ABOUT / ABOUT_FILE).decode())


# ---- reading one without running on


def kept_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are there, the newest last."""
    return sorted(_steps(workdir / FOLDER))


def seal_of(workdir: Path, step: int) -> str:
    """One hash for all that a checkpoint holds: that of its manifest."""
    return hashlib.sha256(read_regular(workdir / FOLDER / str(step) / MANIFEST_FILE)).hexdigest()


def stored_shape(workdir: Path, step: int, ending: str, apart: tuple[str, ...] = ()) -> list[int] | None:
    """The shape of the first array whose path ends so, and not as those `apart`; None: there is none."""
    leaves = _read_about(workdir / FOLDER, step)["leaves"]
    return next((shape for name, shape, _ in leaves if name.endswith(ending) and not name.endswith(apart)), None)


def read_kept(workdir: Path, step: int, state: TrainState) -> TrainState:
    """A checkpoint onto the shapes, dtypes and shardings of `state`, without the optimizer; changes nothing there.

    All processes call it; together they read every byte once more, to verify it.

    Raises:
      ValueError: it is damaged, or of other shapes; names which.
    """
    folder = real_path(workdir / FOLDER)
    size = sum(size for _, size, _ in fingerprint(folder / str(step)))
    if damage := _verify(folder / str(step), size):
        raise ValueError(f"damaged checkpoint: {damage}")
    check_arrays(folder / str(step), _read_about(folder, step)["leaves"], state)
    wanted = dataclasses.replace(state, opt_state=jax.tree.map(lambda _: ocp.PLACEHOLDER, state.opt_state))
    abstract = [leaf if leaf is ocp.PLACEHOLDER else _abstract(leaf) for leaf in jax.tree.leaves(wanted)]
    args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    restored: Any = arrays_handler().restore(epath.Path(folder / str(step) / STATE), args=args)
    return dataclasses.replace(jax.tree.unflatten(jax.tree.structure(state), restored), opt_state=())


def check_arrays(folder: Path, leaves: Sequence[Sequence[Any]], state: TrainState) -> None:
    """Whether a checkpoint holds a state's arrays; `leaves`: as it describes them.

    Raises:
      ValueError: a path, shape or dtype differs; names the first.
    """
    there = {name: rest for name, *rest in leaves}
    here = {name: rest for name, *rest in _describe(state)}
    differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if differing:
        name, absent = differing[0], "no such array"
        raise ValueError(
            f"{folder}: {name}: found {there.get(name, absent)}, expected {here.get(name, absent)}; "
            f"{len(differing)} of {len(here)} arrays differ"
        )
