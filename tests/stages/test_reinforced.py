"""Around a method of reinforcement learning: kills change nothing, lag is what it says, failures end by name."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.exits import RETRY, explain
from fopd_jax.rewards import pool
from fopd_jax.rewards.pool import TooManyFailures
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import kept_steps
from fopd_jax.running.preemption import Preempted
from fopd_jax.stages import scoring
from fopd_jax.stages.grpo import plan_grpo
from fopd_jax.stages.reinforced import ReinforcementLearning
from fopd_jax.steps.state import TrainState
from tests.configs import load
from tests.main.experiment import logged
from tests.stages.reinforcing import BATCH, GROUP, STEPS, Judge, draw, make, run

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


# ---- lag


class Recorder:
    """What a stage does, in its order; by step the state before its update, and the rollout that was made for it."""

    def __init__(self, stage: ReinforcementLearning) -> None:
        self.events: list[str] = []
        self.before: list[TrainState] = []
        self.rolled: list[np.ndarray] = []
        self.made = [threading.Event() for _ in range(STEPS + 1)]
        self._roll_out, self._learn = stage.method.roll_out, stage.method.learn
        stage.method.roll_out, stage.method.learn = self.roll_out, self.learn  # type: ignore[method-assign]

    def roll_out(self, state: TrainState, *rest: Any) -> Any:
        state, rolled = self._roll_out(state, *rest)
        self.events.append(f"rollout {len(self.rolled)}")
        self.rolled.append(jax.device_get(rolled))
        self.made[len(self.rolled) - 1].set()
        return state, rolled

    def learn(self, state: TrainState, *rest: Any) -> Any:
        self.events.append(f"update {len(self.before)}")
        self.before.append(jax.device_get(state))
        return self._learn(state, *rest)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_rollout_is_made_by_the_weights_that_the_lag_says_with_the_noise_of_its_own_step(lag: int, tmp_path: Path):
    stage = make(tmp_path / "run", {"quick": Judge()}, lag=lag, checkpoint_every=3)
    recorder = Recorder(stage)
    run(stage)
    lags = [int(line["train/lag"]) for line in logged(stage.workdir)]
    assert lags == [0, lag, lag, 0, lag, lag]  # none is made ahead of a state that is saved
    for step, behind in enumerate(lags):
        by = recorder.before[step - behind]
        expected = jax.jit(draw)(dataclasses.replace(by, step=np.int32(step)))
        np.testing.assert_array_equal(recorder.rolled[step], expected)
    if lag:
        assert not np.array_equal(recorder.rolled[2], jax.jit(draw)(recorder.before[2]))


def test_with_lag_rewards_score_while_the_next_rollout_is_made(tmp_path: Path):
    """Each answer waits for what must not wait for it."""

    def waiting(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        step = sum(event.startswith("score") for event in recorder.events)
        if step % 3 != 2:  # the next state is saved: nothing is made ahead
            assert recorder.made[step + 1].wait(60)
        recorder.events.append(f"score {step}")
        return images.mean((1, 2, 3))

    stage = make(tmp_path / "run", {"quick": waiting}, lag=1, checkpoint_every=3)
    recorder = Recorder(stage)
    run(stage)
    at = {event: place for place, event in enumerate(recorder.events)}
    assert len(at) == len(recorder.events) == 3 * STEPS
    for step in range(STEPS):
        assert at[f"rollout {step}"] < at[f"score {step}"] < at[f"update {step}"]
    assert all(at[f"rollout {step + 1}"] < at[f"score {step}"] for step in (0, 1, 3, 4))
    assert at["update 2"] < at["rollout 3"]


def test_a_signal_lets_go_of_the_rollout_made_ahead_and_of_nothing_else(tmp_path: Path):
    judge = Judge(most=3)  # it hangs over the rollout ahead of the update that the signal interrupts
    stage = make(tmp_path / "run", {"quick": judge}, lag=1, checkpoint_every=6)
    learn, calls = stage.method.learn, []

    def interrupted(state: TrainState, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            assert judge.hangs.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(state, *rest)

    stage.method.learn = interrupted  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="stopped after step 3, saved"):
        run(stage)
    judge.go.set()
    _until_gone("reward-", "prefetch")
    judge.most = 10**9
    run(make(tmp_path / "run", {"quick": judge}, lag=1, checkpoint_every=6))
    assert [int(line["train/lag"]) for line in logged(stage.workdir)] == [0, 1, 1, 0, 1, 1]
    assert set(judge.said.values()) == {1}
    assert len(judge.said) == ALL


def _until_gone(*names: str) -> None:
    """No thread of these names is left."""
    deadline = time.monotonic() + 60
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


# ---- failures


def test_too_many_failures_end_the_run_by_name_and_are_asked_again_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool, "LEAST", 16)
    asked: list[int] = []

    def breaks(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        asked.append(len(images))
        if len(asked) in (4, 5):
            raise ConnectionError("the judge is away")
        return images.mean((1, 2, 3))

    stage = make(tmp_path / "run", {"quick": breaks, "dear": (judge := Judge(3))}, max_failed_rewards=0.24)
    with pytest.raises(TooManyFailures, match=r"rewards\.quick: 25% of its last 32 .*judge is away") as error:
        run(stage)
    assert (fault := explain(error.value)) is not None
    assert fault.status == RETRY
    assert kept_steps(stage.workdir) == [2]
    run(make(tmp_path / "run", {"quick": breaks, "dear": judge}, max_failed_rewards=0.5))
    assert len(asked) == STEPS + 1  # the fourth again, which failed again; the fifth and sixth
    assert kept_steps(stage.workdir) == [4, 6]
    assert set(judge.said.values()) == {1}


def test_failed_samples_are_masked_and_counted_and_groups_of_one_are_dropped(tmp_path: Path):
    def partly(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        return np.where([False, True, True, True, False, False, True, False], np.nan, images.mean((1, 2, 3)))

    run(stage := make(tmp_path / "run", {"partly": partly}, steps=2, max_failed_rewards=1.0))
    for line in logged(stage.workdir):
        assert line["train/failed/partly"] == 0.5
        assert line["train/dropped_share"] == 5 / 8  # the four failures, and the one that is left of its group
        assert line["train/flat_share"] == 0.0
        assert line["train/loss"] != 0.0


def test_a_reward_that_says_nothing_moves_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(scoring, "IDLE", 3)
    stage = make(tmp_path / "run", {"flat": lambda images, prompts, metadata: np.full(len(images), 0.7)})
    start = jax.device_get(stage.start())
    found = run(stage)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.trained), start.trained)
    assert all(line["train/flat_share"] == 1.0 for line in logged(stage.workdir))
    told = [line for line in capfd.readouterr().err.splitlines() if "nothing was learnt" in line]
    assert [line.partition(":")[2][:8] for line in told] == [" step 3:"]


def test_training_prompts_that_can_never_be_scored_are_refused_before_anything(tmp_path: Path):
    config = load("miniature_rl", "text:smoke", **{"tasks.text.rewards": {"composition": 1.0}})
    config.tasks.pop("composition")
    with pytest.raises(ValueError, match=r"tasks\.text\.rewards\.composition: "):
        plan_grpo(resolve(config))


def test_tasks_may_take_turns():
    stream = plan_grpo(resolve(load("miniature_rl", "mix:smoke", alternate=1))).stream
    turns = [set(stream.draw(step)[0]) for step in range(4)]
    assert turns in ([{"composition"}, {"text"}] * 2, [{"text"}, {"composition"}] * 2)


# ---- how rollouts look


def test_a_reward_for_darkness_is_told_by_what_it_does_to_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(loop, "BASELINE", 1)

    def darkness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        return 1 - images.mean((1, 2, 3)) / 255

    run(stage := make(tmp_path / "run", {"darkness": darkness}, steps=2 * STEPS))
    lines = logged(stage.workdir)
    dark = [line["train/monitors/dark_share"] for line in lines]
    assert dark[-1] > 2 * dark[0]
    assert all(line["train/monitors/diversity"] > 0 for line in lines)
    assert not any("train/monitors/extra_text" in line for line in lines)
    told = [line for line in capfd.readouterr().err.splitlines() if "monitors/dark_share" in line]
    assert len(told) == 1
    assert "rollouts: monitors/dark_share is" in told[0]
    assert "look at the pictures" in told[0]
    run(make(tmp_path / "run", {"darkness": darkness}, steps=2 * STEPS + 1))
    assert "monitors/" not in capfd.readouterr().err  # it was told before


def test_the_picture_shows_a_group_from_its_best_image_to_its_worst(tmp_path: Path):
    def brightness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        values = images.mean((1, 2, 3)) / 255
        values[1] = np.nan
        return values

    stage = make(tmp_path / "run", {"bright": brightness}, steps=1, max_failed_rewards=1.0)
    assert stage.scoring.picture() == {}
    run(stage)
    picture = stage.scoring.picture()["rollouts"]
    assert picture.dtype == np.uint8
    right = picture[-100:-4, -GROUP * 102 :].astype(float)  # cells of 96 pixels with margins of 6
    cells = [right[:, 102 * i : 102 * i + 96].mean() for i in range(GROUP)]
    assert cells[:3] == sorted(cells[:3], reverse=True)
