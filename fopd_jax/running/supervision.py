"""All that watches over a run, built from its config."""

import dataclasses
from pathlib import Path

import jax

from fopd_jax.config.identity import Config
from fopd_jax.parallel.distributed import is_main
from fopd_jax.running import goodput
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.guards import Alarms, Guard, make_alarms, make_guard
from fopd_jax.running.preemption import Preemption
from fopd_jax.running.resources import Space
from fopd_jax.running.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Supervision:
    """By default: stops at the first bad update and on signals, keeps no files, has no alarms and no watchdog.

    `workdir`: the run's, to look up what it has logged.
    """

    guard: Guard = dataclasses.field(default_factory=Guard)
    alarms: Alarms = dataclasses.field(default_factory=Alarms)
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)
    preemption: Preemption = dataclasses.field(default_factory=Preemption)
    space: Space = dataclasses.field(default_factory=Space)
    workdir: Path | None = None


def make_supervision(config: Config, workdir: Path) -> Supervision:
    """What the config's `max_skipped_steps`, `alarms`, `watchdog_seconds` and `watchdog_abort` describe.

    Raises:
      ValueError: one of them is out of range; names the field.
    """
    if config.watchdog_seconds < 0:
        raise ValueError(f"watchdog_seconds: found {config.watchdog_seconds}, expected at least 0 (0: none)")
    return Supervision(
        guard=make_guard(config, workdir),
        alarms=make_alarms(config),
        goodput=Goodput(workdir / goodput.FILE if is_main() else None),
        watchdog=Watchdog(workdir, config.watchdog_seconds, config.watchdog_abort, jax.process_index()),
        space=Space(workdir),
        workdir=workdir,
    )
