"""Fields in which configs differ come first."""

from pathlib import Path

from fopd_jax.reporting.differences import differences
from fopd_jax.reporting.workdirs import read_run
from tests.reporting import made


def test_what_differs_stands_first(tmp_path: Path):
    runs = [read_run(name, made.make_run(tmp_path / name, name)) for name in ("opd", "opd-direct", "grpo-mix")]
    rows = differences(runs)
    differing = {row["field"] for row in rows if row["differs"]}
    expected = {"batch_size", "name", "objective.mar_beta", "objective.name", "optimizer.learning_rate", "stage"}
    assert differing == expected
    assert [row["differs"] for row in rows] == sorted((row["differs"] for row in rows), reverse=True)
    values = {row["field"]: row["values"] for row in rows}
    assert values["objective.name"] == {"opd": "clipped", "opd-direct": "direct", "grpo-mix": None}
    assert values["tasks"]["opd"] == "composition, text"


def test_a_folder_without_a_record_says_nothing_of_defaults(tmp_path: Path):
    runs = [read_run(name, made.make_run(tmp_path / name, name)) for name in ("opd", "opd-direct")]
    (runs[1].folder / "run.json").unlink()
    rows = {row["field"]: row for row in differences([runs[0], read_run("opd-direct", runs[1].folder)])}
    assert not rows["run.steps"]["differs"]
    assert rows["objective.name"]["differs"]
