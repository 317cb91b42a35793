"""A step of Flow-GRPO as one program: what the host's passes make, resumed to the bit, watched one step later.

As a program, on four devices: `python -m tests.stages.test_one_program FOLDER`.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.rewards import pool
from fopd_jax.rewards.pool import TooManyFailures
from fopd_jax.running.checkpoints import kept_steps
from fopd_jax.stages.grpo import GRPO
from fopd_jax.stages.reinforced import ReinforcementLearning
from fopd_jax.stages.traced_scoring import TracedScoring
from fopd_jax.steps.state import TrainState
from tests.configs import load
from tests.main.experiment import logged
from tests.quick import ROOT, environment
from tests.stages.reinforcing import BATCH, Judge, _learn, draw, make, run

STEPS = 3
MESHES = {1: {}, 4: {"run.mesh.data": 2, "run.mesh.fsdp": 2}}


def mixed(workdir: Path, one: bool, steps: int = STEPS, **changes: Any) -> GRPO:
    """Two tasks that share a reward, held to the base, two updates a rollout."""
    config = load("miniature_rl", "mix:smoke", **{
        "run.one_program": one, "run.steps": steps, "run.eval_every": 0, "run.checkpoint_every": 1,
        "batch_size": 16, "images_per_prompt": 4, "updates_per_rollout": 2, "minibatches": 2,
        "objective.kl_beta": 0.1, "optimizer.warmup": 0, **changes,
    })  # fmt: skip
    config.tasks = load("miniature_rl", "mix").tasks
    workdir.mkdir(parents=True, exist_ok=True)
    return GRPO(resolve(config), workdir)


def moved(start: Any, state: TrainState) -> np.ndarray:
    change = jax.tree.map(lambda new, old: (new - old).ravel(), jax.device_get(state.trained), start)
    return np.concatenate(jax.tree.leaves(change))


@jax.numpy_dtype_promotion("standard")  # which optax's AdamW asks for
def compare(folder: Path, mesh: dict[str, int]) -> TrainState:
    """Both forms, three steps from the same start; the final state of one program."""
    one, host = mixed(folder / "one", True, **mesh), mixed(folder / "host", False, **mesh)
    start = jax.device_get(host.start().trained)
    assert one.one is not None
    assert host.one is None
    state = run(one)
    found, expected = moved(start, state), moved(start, run(host))
    assert np.linalg.norm(expected) > 0
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"adapters differ by {distance:.2e} of the distance moved")
    assert distance <= 1e-2  # Adam makes a whole step of a gradient that is rounding; without it see steps/grpo
    assert one.one._step._cache_size() == 1  # type: ignore[attr-defined]
    lines, others = logged(one.workdir), logged(host.workdir)
    assert len(lines) == len(others) == STEPS
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        assert {"train/task_reward/text", "train/reward/quality/composition", "train/monitors/diversity"} < line.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    np.testing.assert_array_equal(one.scoring.picture()["rollouts"], host.scoring.picture()["rollouts"])
    return state


@pytest.mark.slow
def test_it_is_the_hosts_step_and_resumes_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture):
    state = compare(tmp_path, MESHES[1])
    said = capsys.readouterr().out
    assert said.count("a step: one program") == said.count("a step: passes") == 1
    with jax.numpy_dtype_promotion("standard"):
        run(mixed(tmp_path / "parts", True, steps=2))
        resumed = run(mixed(tmp_path / "parts", True))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(state))
    assert logged(tmp_path / "parts") == logged(tmp_path / "one")


@pytest.mark.slow
def test_so_on_four_devices(tmp_path: Path):
    command = [sys.executable, "-m", "tests.stages.test_one_program", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == 4


# ---- without a network


def little(nothing_at: int = -1, broken_at: int = -1) -> Any:
    """The step of `reinforcing`, at one of whose numbers the reward fails for all, or an image is not finite."""

    def one(scoring: TracedScoring) -> Any:
        @jax.jit
        def step(base: Any, scorers: Any, state: TrainState, conditioning: Any, asked: Any) -> Any:
            x = draw(state)
            x = x.at[5].multiply(jnp.where(state.step == broken_at, jnp.nan, 1.0))
            failing = {
                name: dataclasses.replace(
                    each, score=lambda *of, score=each.score: jnp.where(state.step == nothing_at, jnp.nan, score(*of))
                )
                for name, each in scoring.rewards.items()
            }
            credit, seen = dataclasses.replace(scoring, rewards=failing).credit(scorers, x, asked)
            after, metrics = _learn(state, jnp.nan_to_num(x), credit, tuple(scoring.rewards))
            return after, metrics, credit, seen

        return step

    return one


def stage(workdir: Path, **kinds: int) -> ReinforcementLearning:
    return make(workdir, {"text": None}, little(**kinds))


def test_the_host_sees_each_step_when_its_metrics_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = stage(tmp_path / "run")
    assert whole.one is not None
    events, advance, look = [], whole.advance, whole.one._look
    monkeypatch.setattr(whole, "advance", lambda state, i: (events.append(f"update {i}"), advance(state, i))[1])
    monkeypatch.setattr(whole.one, "_look", lambda i, *rest: (events.append(f"look {i}"), look(i, *rest))[1])
    run(whole)
    assert events[:4] == ["update 0", "update 1", "look 0", "look 1"]  # the state after two is saved
    assert events[4:8] == ["update 2", "update 3", "look 2", "look 3"]
    assert all(line["train/monitors/edge_density"] > 0 and line["train/lag"] == 0 for line in logged(whole.workdir))


def test_an_image_that_is_not_finite_ends_the_run_by_its_prompt(tmp_path: Path):
    broken = stage(tmp_path / "run", broken_at=2)
    prompt = broken.prompts.drawn(2)[5].prompt
    with pytest.raises(ValueError, match=f"images: 1 of {BATCH} are not finite, the first of prompt '{prompt}'"):
        run(broken)
    assert kept_steps(broken.workdir) == [2]


def test_too_many_failures_end_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "LEAST", 16)
    failing = stage(tmp_path / "run", nothing_at=2)
    with pytest.raises(TooManyFailures, match=r"rewards\.text: 33% of its last 24 scores failed .*; at most 20% may"):
        run(failing)
    assert kept_steps(failing.workdir) == [2]


@pytest.mark.parametrize("why", ["not asked for", "lag", "a reward of one's own"])
def test_else_the_host_drives_the_passes(why: str, tmp_path: Path):
    rewards = {"text": None, **({"quick": Judge()} if why == "a reward of one's own" else {})}
    changes = {"lag": {"lag": 1}, "not asked for": {"one_program": False}}.get(why, {})
    assert make(tmp_path / "run", rewards, little(), **changes).one is None


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    compare(Path(sys.argv[1]), MESHES[4])
    print(jax.device_count())
