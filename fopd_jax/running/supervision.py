"""All that watches over a run, built from its config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fopd_jax.config.schema import Run
from fopd_jax.parallel.distributed import is_main
from fopd_jax.running import goodput
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.guards import Alarms, Guard
from fopd_jax.running.preemption import Preemption
from fopd_jax.running.profile import Profile
from fopd_jax.running.resources import Space
from fopd_jax.running.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Supervision:
    """By default: stops at the first bad update and on signals, keeps no files, has no alarms, watchdog or profile.

    `workdir`: the run's, to look up what it has logged.
    """

    guard: Guard = dataclasses.field(default_factory=Guard)
    alarms: Alarms = dataclasses.field(default_factory=Alarms)
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)
    preemption: Preemption = dataclasses.field(default_factory=Preemption)
    space: Space = dataclasses.field(default_factory=Space)
    profile: Profile = dataclasses.field(default_factory=Profile)
    workdir: Path | None = None


def make_supervision(run: Run, workdir: Path, origin: Mapping[str, Any]) -> Supervision:
    """All of it for one run; `origin`: what to write beside a batch whose update did not land."""
    return Supervision(
        guard=Guard(workdir, run.max_skipped_steps, origin),
        alarms=Alarms(run.alarms),
        goodput=Goodput(workdir / goodput.FILE if is_main() else None),
        watchdog=Watchdog(workdir, run.watchdog_seconds, run.watchdog_abort, jax.process_index()),
        preemption=Preemption(run.stop_seconds),
        space=Space(workdir),
        profile=Profile(workdir, run.profile),
        workdir=workdir,
    )
