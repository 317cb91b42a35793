"""Rewards behind servers: the same run to the bit as with rewards at home; a server that dies and returns ends none."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.schema import RewardConfig, Server
from tests.configs import FOLDER
from tests.main.experiment import logged
from tests.quick import environment
from tests.rewards.served.serving import TOKEN, Toy, closed_port, serving
from tests.stages.reinforcing import make, run


@pytest.fixture
def served(tmp_path: Path):
    """The address of a server of the miniature's own reward."""
    (tmp_path / "token").write_text(TOKEN)
    flags = ("--reward=text,quality", f"--config={FOLDER}/miniature_rl.py:text", "--port=0", "--token-file=token")
    command = [sys.executable, "-m", "fopd_jax.rewards.serve", *flags]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("serving text, quality on http://127.0.0.1:")
        yield said.split()[-1]
        server.send_signal(signal.SIGTERM)


def test_the_worlds_own_reward_behind_a_server_trains_the_same_to_the_bit(served: str, tmp_path: Path):
    servers = {"text": Server(urls=(served,), token_file=str(tmp_path / "token"))}
    found = run(make(tmp_path / "served", {"text": None}, servers=servers, steps=3))
    expected = run(make(tmp_path / "local", {"text": None}, steps=3))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("served", "local")]
    assert metrics[0] == metrics[1]


def test_a_server_that_dies_and_returns_fails_what_it_was_asked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", TOKEN)
    port, up = closed_port(), contextlib.ExitStack()
    up.enter_context(serving(Toy(), port=port))
    server = Server(urls=(f"http://127.0.0.1:{port}",), retries=0, timeout=5.0)
    rewards = {"toy": RewardConfig(kind="remote")}
    stage = make(tmp_path / "run", {"toy": None}, rewards=rewards, servers={"toy": server}, max_failed_rewards=1.0)
    learn, calls = stage.method.learn, []

    def mischief(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            up.close()
        if len(calls) == 3:
            up.enter_context(serving(Toy(), port=port))
            _until_answered(stage.pipeline.world.rewards["toy"])
        return learn(*arguments)

    stage.method.learn = mischief  # type: ignore[method-assign]
    with up:
        run(stage)
    assert [line["train/failed/toy"] for line in logged(stage.workdir)] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert [line["train/dropped_share"] for line in logged(stage.workdir)] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def _until_answered(reward: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return reward.check(["a"], [{}])
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
