"""Rewards on several processes: the same update as on one, failures included; one that breaks ends all by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.processes import finish, free_port, start
from tests.stages.reinforcing import BATCH

PROGRAM = ["-m", "tests.stages.reinforcing"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with what one process of four devices did and what two of two did; what the latter said."""
    folder, port = tmp_path_factory.mktemp("runs"), str(free_port())
    for count in (1, 2):
        (folder / str(count)).mkdir()
    programs = [start([*PROGRAM, str(folder / "1"), "1", "0", port], 4)]
    programs += [start([*PROGRAM, str(folder / "2"), "2", str(process), port], 2) for process in range(2)]
    return folder, finish(programs)[1:]


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns_of_a_group_that_is_spread_over_them(runs: tuple[Path, list[str]]):
    one, two = (_lines(runs[0] / count) for count in "12")
    assert len(one) == len(two) == 2
    for found, expected in zip(two, one, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        assert expected["train/failed/partly"] == 2 / BATCH
        assert expected["train/loss"] != 0
    weights = [np.load(runs[0] / count / "trained.npz") for count in "12"]
    for name in weights[0].files:
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-6, atol=1e-6)


def test_each_process_keeps_the_scores_of_its_own_rows(runs: tuple[Path, list[str]]):
    names = sorted(path.name for path in (runs[0] / "2" / "whole" / "scores").iterdir())
    assert names == ["0_0.jsonl", "0_1.jsonl", "1_0.jsonl", "1_1.jsonl"]
    for name in names:
        line = json.loads((runs[0] / "2" / "whole" / "scores" / name).read_text())
        assert [value is None for value in line["values"]] == (
            [False, True, True, False] if "_1" in name else [False] * 4
        )


def test_a_reward_that_breaks_on_one_process_ends_both_by_name(runs: tuple[Path, list[str]]):
    first, second = runs[1]
    assert "ended: RuntimeError: process 1" in first
    assert "TooManyFailures: rewards.breaks: 50% of its last 8 scores failed" in first
    assert "ended: TooManyFailures: rewards.breaks: 50% of its last 8 scores failed" in second
