"""`fopd_jax.reproduce` tells its plan, trains what is missing, and writes tables."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from fopd_jax import reproduce
from fopd_jax.studies.students import Student
from fopd_jax.studies.tables import MINIATURE, Table

SMALL = {"run.steps": 1, "batch_size": 4, "eval.final_samples": 4, "eval.batch_size": 4, "sampler.num_steps": 2,
         "eval.num_steps": 2}  # fmt: skip


def test_the_plan_counts_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main([f"--workdir={tmp_path / 'new'}", "--plan", "--table", "noisy_teacher", "--seeds=2"])
    told = capsys.readouterr().out
    assert (
        told == "8 jobs for noisy_teacher\n  run: 0 of 6 done\n  evaluation: 0 of 1 done\n  preparation: 0 of 1 done\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0"], "error: --seeds: found 0, expected a number from 1 to 64"),
        (["--utilisation=0"], "error: --utilisation: found 0, expected a share of 1, above 0"),
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


def test_what_draws_is_asked_for_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit) as ended:
        reproduce.main([f"--workdir={tmp_path / 'new'}", "--table", "noise", "efficiency"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --table efficiency: needs matplotlib: pip install 'fopd_jax[plots]'\n"
    assert not (tmp_path / "new").exists()


def test_the_true_size_is_planned_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main([f"--workdir={tmp_path}", "--scale=sd35m", "--table", "noisy_teacher", "--utilisation=0.5"])
    head, row, whole, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["table", "students", "PFLOP"]
    assert row.split()[:2] == ["noisy_teacher", "3"]
    assert whole.split()[1:] == row.split()[1:]
    lines = (tmp_path / "commands.sh").read_text().splitlines()
    assert len(lines) == 5
    assert lines[2] == f"python tools/noisy_adapter.py --src=teachers/ocr --dst={tmp_path}/noisy.safetensors --scale=4"
    assert [path.name for path in tmp_path.iterdir()] == ["commands.sh"]


@pytest.mark.slow
def test_a_table_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"plain": Student(), "free": Student(fields={"objective.mar_beta": 0.0})}
    scale = dataclasses.replace(MINIATURE, budget={**MINIATURE.budget, **SMALL})
    monkeypatch.setattr(reproduce, "MINIATURE", scale)
    monkeypatch.setitem(reproduce.SCALES, "miniature", scale)
    monkeypatch.setattr(reproduce, "tables", lambda _: {"recipes": Table("Small", rows)})
    words = [f"--workdir={tmp_path}", "--seeds=2", "--workers=1", "--table", "recipes"]
    reproduce.main(words)
    kept = json.loads((tmp_path / "tables.json").read_text())["tables"]["recipes"]["rows"]
    assert {*kept} == {*reproduce.OTHERS, *rows}
    assert [*kept["plain"]["scores"]] == ["0", "1"]
    before = (tmp_path / "tables.md").read_bytes()
    told = [line.split(" | ")[0].removeprefix("| ") for line in before.decode().splitlines()[4:]]
    assert told == [*reproduce.OTHERS, *rows]
    reproduce.main(words)
    assert (tmp_path / "tables.md").read_bytes() == before
