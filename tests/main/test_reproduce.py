"""`fopd_jax.reproduce` tells its plan, trains what is missing, and writes tables."""

import json
from pathlib import Path

import pytest

from fopd_jax import reproduce
from fopd_jax.studies import tables
from fopd_jax.studies.students import Student
from fopd_jax.studies.tables import Table

SMALL = {"run.steps": 1, "batch_size": 4, "eval.final_samples": 4, "eval.batch_size": 4, "sampler.num_steps": 2,
         "eval.num_steps": 2}  # fmt: skip


def test_the_plan_counts_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main([f"--workdir={tmp_path / 'new'}", "--plan", "--table", "noisy_teacher", "--seeds=2"])
    told = capsys.readouterr().out
    assert told == "8 jobs for noisy_teacher\n  run: 0 of 7 done\n  preparation: 0 of 1 done\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0"], "error: --seeds: found 0, expected a number from 1 to 64"),
        (["--workers=65"], "error: --workers: found 65"),
        (["--table", "none"], "error: argument --table: invalid choice: 'none'"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        reproduce.main([f"--workdir={tmp_path}", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_a_table_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"plain": Student(), "rewritten": Student(fields={"objective.mar_beta": 0.0})}
    monkeypatch.setitem(tables.BUDGET, "eval.final_samples", 4)
    small = Table("Small", rows, budget=SMALL)
    monkeypatch.setattr(reproduce, "TABLES", {"small": small})
    monkeypatch.setattr(reproduce, "BUDGET", {**tables.BUDGET, **SMALL})
    reproduce.main([f"--workdir={tmp_path}", "--seeds=2", "--workers=1"])
    kept = json.loads((tmp_path / "tables.json").read_text())["tables"]["small"]["rows"]
    assert [*kept] == [*reproduce.OTHERS, *rows]
    assert [*kept["plain"]["scores"]] == ["0", "1"]
    before = (tmp_path / "tables.md").read_bytes()
    reproduce.main([f"--workdir={tmp_path}", "--seeds=2", "--workers=1"])
    assert (tmp_path / "tables.md").read_bytes() == before
