"""The host's side of the guards: what is named, counted, kept and refused; alarms."""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import struct
from safetensors.numpy import load_file

from fopd_jax.running.guards import Alarms, Guard, bad_rows

NAN, INF = float("nan"), float("inf")
VALUES = {"loss": NAN, "grad_norm": INF, "ratio": 1.0, "skipped": 1.0}


@struct.dataclass
class Batch:
    route: np.ndarray
    inner: dict[str, np.ndarray]


BATCH = Batch(np.arange(4, dtype=np.int32), {"context": np.full((4, 2), 1.5, ml_dtypes.bfloat16)})
SAMPLES = {"samples/loss": np.array([0.5, NAN, 1.0, INF], np.float32)}


def _describe(i: int, rows: Sequence[int]) -> list[str]:
    return [f"prompt {row} of batch {i}" for row in rows]


def _skip(guard: Guard, step: int) -> None:
    guard.skip(step, VALUES, SAMPLES, lambda: BATCH, _describe)


def test_a_bad_update_names_step_metrics_and_samples_and_keeps_its_batch(tmp_path: Path):
    guard = Guard(tmp_path, 0, {"seed": 3, "config_hash": "ab"})
    with pytest.raises(FloatingPointError) as error:
        _skip(guard, 7)
    message = str(error.value)
    assert message.startswith(
        "step 7: loss is nan, grad_norm is inf; bad samples: 1 (prompt 1 of batch 6), 3 (prompt 3"
    )
    path = tmp_path / "nonfinite" / "step_7.safetensors"
    assert str(path) in message
    assert "the last checkpoint is intact" in message
    found = load_file(path)
    assert found.keys() == {"route", "inner/context"}
    assert (found["route"].dtype, found["inner/context"].dtype) == (np.int32, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["route"], BATCH.route)
    np.testing.assert_array_equal(found["inner/context"], BATCH.inner["context"])
    assert json.loads((path.with_suffix(".json")).read_text()) == {
        "step": 7, "seed": 3, "config_hash": "ab", "rows": [1, 3],
        "samples": ["prompt 1 of batch 6", "prompt 3 of batch 6"],
        "metrics": {"loss": "nan", "grad_norm": "inf", "ratio": 1.0, "skipped": 1.0},
    }  # fmt: skip
    assert {each.name for each in path.parent.iterdir()} == {"step_7.safetensors", "step_7.json"}


def test_as_many_are_skipped_as_allowed_over_all_restarts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    guard = Guard(tmp_path, 2)
    _skip(guard, 3)
    assert "warning: step 3: loss is nan" in capsys.readouterr().err
    _skip(guard, 5)
    again = Guard(tmp_path, 2)
    again.resume(4)  # step 5 was lost and is repeated
    _skip(again, 5)
    assert "(2 of at most 2)" in capsys.readouterr().err
    (tmp_path / "nonfinite" / "step_x.json").touch()  # somebody's own
    more = Guard(tmp_path, 2)
    more.resume(6)
    with pytest.raises(FloatingPointError, match=r"run\.max_skipped_steps is 2, this is number 3"):
        _skip(more, 8)


def test_without_a_culprit_or_words_for_it(tmp_path: Path):
    with pytest.raises(FloatingPointError, match="grad_norm is inf; bad samples: none alone"):
        Guard(tmp_path).skip(1, {"grad_norm": INF}, {"samples/loss": np.ones(3)}, lambda: BATCH, _describe)
    with pytest.raises(FloatingPointError, match="bad samples: 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        Guard().skip(1, VALUES, {"samples/loss": np.full(100, NAN)}, lambda: BATCH, None)


def test_a_batch_that_cannot_be_kept_does_not_hide_the_failure(tmp_path: Path):
    (tmp_path / "nonfinite").write_text("in the way")
    with pytest.raises(FloatingPointError, match="could not be kept"):
        _skip(Guard(tmp_path), 7)


def test_rows_are_bad_by_any_of_their_values():
    assert bad_rows(SAMPLES | {"samples/norm": np.array([NAN, 0, 0, 0])}) == [0, 1, 3]
    assert bad_rows({}) == []


def test_an_alarm_is_told_when_it_begins_and_shown_as_long_as_it_lasts(capsys: pytest.CaptureFixture[str]):
    alarms = Alarms({"ratio": (0.9, 1.1), "gap": (0.0, 5.0)})
    told = []
    for step, ratio in enumerate((1.0, 1.2, 1.3, 1.0, 0.5)):
        found = alarms.check(step, {"ratio": ratio, "gap": 5.0, "loss": NAN})
        assert found == {"alarms/ratio": float(ratio in (1.2, 1.3, 0.5)), "alarms/gap": 0.0}
        told.append(capsys.readouterr().err)
    assert told[1] == "warning: alarm: step 1: ratio is 1.2, outside of 0.9 … 1.1\n"
    assert told[4] == "warning: alarm: step 4: ratio is 0.5, outside of 0.9 … 1.1\n"
    assert told[0] == told[2] == told[3] == ""


def test_an_alarm_on_a_metric_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"run\.alarms: no metric 'ration', expected some of loss, ratio"):
        Alarms({"ration": (0.0, 1.0)}).check(1, {"ratio": 1.0, "loss": 2.0})
