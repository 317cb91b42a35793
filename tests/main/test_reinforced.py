"""Reinforcement learning, killed outright at random moments: to the bit a run that nothing interrupted."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fopd_jax.running.checkpoints import newest_step
from tests.configs import FOLDER
from tests.main.experiment import Program, command
from tests.quick import environment

STEPS, BATCH, FEWEST_KILLS = 20, 8, 4
SETTINGS = {
    "run.steps": STEPS, "run.checkpoint_every": 3, "run.eval_every": 0, "batch_size": BATCH,
    "tasks.text.rewards.counted": 1.0, "rewards.counted.kind": "tests.main.counted_reward:counted",
}  # fmt: skip


class Reinforced(Program):
    """The smallest run of stage `grpo`, with a judge that counts beside the miniature's own rewards."""

    def command(self, name: str, settings: dict[str, Any]) -> list[str]:
        changes = {f"run.{field}": value for field, value in settings.items()}
        return command(self.folder / name, self.overrides | changes, f"{FOLDER}/miniature_rl.py:text:smoke")


def _program(folder: Path) -> Reinforced:
    folder.mkdir()
    return Reinforced(folder, environment(COUNTED=str(folder / "counted.txt")), SETTINGS)


def _judged(folder: Path) -> Counter[str]:
    path = folder / "counted.txt"
    return Counter(path.read_text().split() if path.exists() else [])


def _silence(folder: Path) -> float:
    """Seconds since the judge said anything."""
    return time.time() - (folder / "counted.txt").stat().st_mtime


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing_and_no_rollout_is_scored_twice(tmp_path: Path):
    straight, killed = _program(tmp_path / "straight"), _program(tmp_path / "killed")
    whole = straight.run("run")
    rng, workdir, kills = np.random.default_rng(0), killed.folder / "run", 0
    while newest_step(workdir) < STEPS:
        goal = len(_judged(killed.folder)) + int(rng.integers(1, 2 * BATCH))
        age = rng.uniform(0.1, 0.2)  # what a judge says is on the disk a moment after it was said

        def reached(_: Path, goal: int = goal, age: float = age) -> bool:
            """So long after a word of the judge, who needs 0.3 s for the next one: none is said and not kept.

            Never in the report, whose images are no rollouts and would be judged again.
            """
            due = len(_judged(killed.folder)) >= goal and newest_step(workdir) < STEPS
            return due and age <= _silence(killed.folder) < 0.25

        if not killed.kill("run", reached):
            break
        kills += 1
    else:
        killed.run("run")
    assert kills >= FEWEST_KILLS
    for name in ("adapter.safetensors", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    assert _judged(killed.folder).keys() == _judged(straight.folder).keys()
    assert set(_judged(killed.folder).values()) == {1}
