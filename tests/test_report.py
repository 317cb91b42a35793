"""The program: flags, messages, statuses; and a run's real files."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fopd_jax import report
from tests.reporting import made
from tests.reporting.test_page import Page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made.make_run(tmp_path / "opd", "opd")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        report.main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_file_is_written_and_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (run / "metrics.jsonl").write_text("{}\nbroken\n", encoding="utf-8")
    out = tmp_path / "page.html"
    report.main(["--runs", f"mine={run}", "--out", str(out), "--title", "Tea & <b>"])
    page = Page(out.read_text(encoding="utf-8"))
    assert page.json("data")["runs"][0]["name"] == "mine"
    assert page.all("h1")[0][1] == "Tea & <b>"
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 0.")
    assert f"note: {run / 'metrics.jsonl'}: 1 damaged of 2 lines, left out: line 2" in said.err
    assert page.json("data")["problems"] == [line.removeprefix("note: ") for line in said.err.splitlines()]


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    own = "--runs", str(run)
    assert "--runs: missing" in refused(capsys)
    assert f"--runs: {tmp_path / 'empty'} is no run's folder" in refused(capsys, "--runs", str(tmp_path / "empty"))
    assert "--runs: nowhere is no folder" in refused(capsys, "--runs", "nowhere")
    assert "--runs: found 'gs://b/x', expected a path on this machine" in refused(capsys, "--runs", "gs://b/x")
    assert "holds no finished evaluation" in refused(capsys, *own, "--evaluations", str(tmp_path / "empty"))
    assert "--out: " in refused(capsys, *own, "--out", str(tmp_path / "missing" / "a.html"))
    assert "--gallery-rows: found 0, expected 1 to 5000" in refused(capsys, *own, "--gallery-rows", "0")
    assert "--megabytes: found nan" in refused(capsys, *own, "--megabytes", "nan")
    assert "--port: found 70000" in refused(capsys, *own, "--serve", "--port", "70000")
    assert "--help" in refused(capsys, "--run", str(run))


def test_help_is_there_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "fopd_jax.report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m fopd_jax.report --runs DIR")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "PIL", "jinja2"}


def test_it_serves_until_it_is_interrupted(run: Path):
    command = [sys.executable, "-m", "fopd_jax.report", "--runs", str(run), "--serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        address = program.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}/data.json", timeout=30) as answer:
            assert b'"opd"' in answer.read()
        os.kill(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=30)
    assert (program.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.slow
def test_a_real_run_is_read_without_a_note(tmp_path: Path):
    folder = tmp_path / "smoke"
    command = [sys.executable, "-m", "fopd_jax.main", "--config=configs/miniature.py:smoke", f"--workdir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    began = time.monotonic()
    report.main(["--runs", str(folder), "--out", str(tmp_path / "page.html")])
    assert time.monotonic() - began < 10
    data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).json("data")
    (shown,) = data["runs"]
    assert data["problems"] == []
    assert (shown["stage"], shown["status"]) == ("opd", "finished")
    assert shown["step"] == shown["steps"] > 0
    assert {"samples"} <= set(shown["pictures"])
    assert set(shown["gaps"]) == {"composition", "text"}
    assert shown["final"]["text"] > 0
    assert "base" in data["tables"][0]["rows"][0]["leads"]
    assert "card: algorithm" in shown["about"]
