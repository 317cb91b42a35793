"""Around a method of reinforcement learning: kills change nothing, lag is what it says, failures end by name."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.rewards import pool
from fopd_jax.running.checkpoints import kept_steps
from fopd_jax.stages.reinforced import ReinforcementLearning
from fopd_jax.steps.state import TrainState
from tests.stages.reinforcing import BATCH, STEPS, Judge, make, run

ALL = STEPS * BATCH


class Killed(BaseException):
    """Nothing is done from here on."""


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLOSING_S", 0.1)


def same(found: TrainState, expected: TrainState) -> None:
    """To the bit: weights, moments, average, step."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module", params=[0, 1], ids=lambda lag: f"lag{lag}")
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, TrainState]:
    """A lag, and a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    stage = make(folder, {"quick": Judge(1), "dear": Judge(2)}, lag=request.param)
    return request.param, folder, run(stage)


# ---- kills: step 3 is the second after a checkpoint


def before_scoring(stage: ReinforcementLearning, quick: Judge, dear: Judge) -> None:
    begin = stage.scoring.begin

    def killed(step: int, *rest: Any) -> Any:
        if step == 3:
            raise Killed
        return begin(step, *rest)

    stage.scoring.begin = killed  # type: ignore[method-assign]


def while_scoring(stage: ReinforcementLearning, quick: Judge, dear: Judge) -> None:
    """One judge has answered, the other is still at it."""
    finish, dear.most = stage.scoring.finish, 3

    def killed(pending: Any) -> Any:
        if pending.step == 3:
            assert dear.hangs.wait(60)
            while len(_lines(stage.workdir, 3)) < 1:
                time.sleep(0.01)
            raise Killed
        return finish(pending)

    stage.scoring.finish = killed  # type: ignore[method-assign]


def after_scoring(stage: ReinforcementLearning, quick: Judge, dear: Judge) -> None:
    learn, calls = stage.method.learn, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return learn(*arguments)

    stage.method.learn = killed  # type: ignore[method-assign]


def after_the_update(stage: ReinforcementLearning, quick: Judge, dear: Judge) -> None:
    """That of step 3, whose checkpoint is due."""
    drain, calls = stage.drain, []

    def killed() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        drain()

    stage.drain = killed  # type: ignore[method-assign]


def _lines(workdir: Path, step: int) -> list[bytes]:
    path = workdir / "scores" / f"{step}_0.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.mark.parametrize("kill", [before_scoring, while_scoring, after_scoring, after_the_update])
def test_killed_with_rewards_in_flight_nothing_is_scored_twice_and_nothing_changes(
    kill: Callable[..., None], straight: tuple[int, Path, TrainState], tmp_path: Path
):
    lag, whole, expected = straight
    quick, dear = Judge(1), Judge(2)
    killed = make(tmp_path / "run", {"quick": quick, "dear": dear}, lag=lag)
    kill(killed, quick, dear)
    with pytest.raises(Killed):
        run(killed)
    assert kept_steps(tmp_path / "run") == [2]
    dear.most = 10**9
    found = run(make(tmp_path / "run", {"quick": quick, "dear": dear}, lag=lag))
    dear.go.set()
    same(found, expected)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for judge in (quick, dear):
        assert len(judge.said) == ALL
        assert set(judge.said.values()) == {1}


def test_scores_are_kept_as_long_as_a_run_may_go_on_from_before_them(straight: tuple[int, Path, TrainState]):
    _, whole, _ = straight
    assert kept_steps(whole) == [4, 6]
    assert sorted(path.name for path in (whole / "scores").iterdir()) == [f"{i}_0.jsonl" for i in range(2, 6)]
    assert all(len(_lines(whole, step)) == 2 for step in range(2, 6))
