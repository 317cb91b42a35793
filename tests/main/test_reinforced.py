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

STEPS, BATCH, KILLS = 8, 8, 6
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


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing_and_no_rollout_is_scored_twice(tmp_path: Path):
    straight, killed = _program(tmp_path / "straight"), _program(tmp_path / "killed")
    whole = straight.run("run")
    rng, workdir = np.random.default_rng(0), killed.folder / "run"
    for _ in range(KILLS):
        goal = len(_judged(killed.folder)) + int(rng.integers(1, 3 * BATCH))
        delay = rng.uniform(0.05, 0.6)  # what a judge says is on the disk a moment after it was said

        def reached(_: Path, goal: int = goal, delay: float = delay) -> bool:
            return len(_judged(killed.folder)) >= goal and time.sleep(delay) is None

        if not killed.kill("run", reached):
            break
        assert newest_step(workdir) < STEPS
    killed.run("run")
    for name in ("adapter.safetensors", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    assert _judged(killed.folder).keys() == _judged(straight.folder).keys()
    assert set(_judged(killed.folder).values()) == {1}
