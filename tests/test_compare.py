"""The command that compares kept evaluations: tables of one folder or of several, and mistakes in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax import compare
from tests.evaluation.cells import SETTINGS, cell_of, keep, random
from tests.quick import ROOT, environment
from tests.tools.caller import Caller

BASE, STUDENT = (cell_of(name, "text", {"text": random(k, 4, 2)}) for k, name in enumerate(("base", "student")))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs' evaluations, which have their base in common."""
    other = dataclasses.replace(cell_of("student", "text", {"text": random(9, 4, 2)}), about={"from": "two"})
    for name, student in (("one", STUDENT), ("two", other)):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, [BASE, student])
    return tmp_path / "one", tmp_path / "two"


def test_one_folder_has_its_tables_in_itself(folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]):
    compare.main([str(folders[0]), "--against=base"])
    said = capfd.readouterr().out
    assert "| base minus | text |" in said
    assert said.endswith(f"see {folders[0]}\n")
    assert json.loads((folders[0] / "results.json").read_text())["against"] == "base"


def test_models_of_several_folders_are_compared(folders: tuple[Path, Path], tmp_path: Path):
    compare.main([*map(str, folders), "--against=two/student", f"--out={tmp_path / 'all' / 'tables'}"])
    found = json.loads((tmp_path / "all" / "tables" / "results.json").read_text())
    assert [value["model"] for value in found["values"]] == ["base", "one/student", "two/student"]
    assert {lead["model"] for lead in found["differences"]} == {"base", "one/student"}
    assert not list(folders[0].glob("results.*"))


def test_mistakes_are_one_line(folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    caller, (one, two) = Caller(compare, capfd, tmp_path), folders
    caller.fails([], "the following arguments are required: OUT")
    caller.fails([one, two], "--out: missing, expected a folder for the tables of 2 evaluations")
    caller.fails([one, "--against=x"], "against: found 'x', expected one of base, student")
    caller.fails([one, "--allow-unequal=cfg"], "--allow-unequal: found 'cfg', expected some of prompts, samples")
    caller.fails([tmp_path / "none"], "none: found no evaluation, expected MODEL/SUITE/SETTING")
    caller.fails(["gs://x"], "OUT: found 'gs://x', expected a path on this machine")
    caller.fails([one, f"--out={one / 'base/text/steps_40/records.jsonl'}"], r"--out: .*records\.jsonl is no folder")
    caller.fails([one, "--agains=base"], "unrecognized arguments: --agains=base")


def test_unequal_guidance_is_refused_unless_it_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    keep(tmp_path, [BASE, dataclasses.replace(STUDENT, settings=dataclasses.replace(SETTINGS, guidance=1.0))])
    Caller(compare, capfd, tmp_path).fails([tmp_path], r"guidance: found 4\.5 and 1, .*--allow-unequal=guidance$")
    compare.main([str(tmp_path), "--allow-unequal=guidance,seed"])
    assert "compared though unequal in: guidance, seed" in capfd.readouterr().out


def test_help_says_what_there_is():
    command = [sys.executable, "-m", "fopd_jax.compare", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    for word in ("OUT [OUT ...]", "--against", "--allow-unequal", "rewritten", "FOLDER/NAME"):
        assert word in done.stdout
