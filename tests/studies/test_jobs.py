"""Commands run once each, after what they need, side by side, and end when asked to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fopd_jax.exits import Outage
from fopd_jax.studies.jobs import FLAGS, LOGS, SECONDS, Job, plan, run_jobs

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
ADD = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text(pathlib.Path(sys.argv[2]).read_text() + 'b')"


def jobs_of(*jobs: Job) -> dict[str, Job]:
    return {job.name: job for job in jobs}


A = Job("a", ("-c", WRITE, "{work}/a", "a"), "a", kind="first")
B = Job("b", ("-c", ADD, "{work}/b", "{work}/a"), "b", ("a",), "second")
BROKEN = Job("broken", ("-c", "raise SystemExit('no luck')"), "never")
AFTER = Job("after", ("-c", WRITE, "{work}/after", ""), "after", ("broken",))


def test_each_runs_once_after_what_it_needs(tmp_path: Path) -> None:
    jobs = jobs_of(B, A)
    run_jobs(jobs, tmp_path, tmp_path, 2)
    assert (tmp_path / "b").read_text() == "ab"
    assert {*json.loads((tmp_path / SECONDS).read_text())} == {"first", "second"}
    (tmp_path / "a").write_text("other")
    run_jobs(jobs, tmp_path, tmp_path, 2)
    assert (tmp_path / "b").read_text() == "ab"
    assert plan(jobs, tmp_path) == "  second: 1 of 1 done\n  first: 1 of 1 done"


def test_a_failure_stops_what_needs_it_alone_and_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(BROKEN, AFTER, A, B)
    with pytest.raises(Outage, match=r"^failed: broken; see "):
        run_jobs(jobs, tmp_path, tmp_path, 1)
    assert (tmp_path / "b").exists()
    assert not (tmp_path / "after").exists()
    assert "broken: ended with status 1\nno luck" in capfd.readouterr().err
    mended = Job("broken", ("-c", WRITE, "{work}/never", ""), "never")
    run_jobs(jobs_of(mended, AFTER, A, B), tmp_path, tmp_path, 1)
    assert (tmp_path / "after").exists()


def test_a_command_that_leaves_no_file_has_failed(tmp_path: Path) -> None:
    with pytest.raises(Outage, match=r"^failed: idle"):
        run_jobs(jobs_of(Job("idle", ("-c", ""), "nothing")), tmp_path, tmp_path, 1)


@pytest.mark.parametrize(("given", "expected"), [(None, FLAGS), ("--xla_cpu_enable_fast_math=false", None)])
def test_commands_compile_fast_unless_the_user_says_how(
    given: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XLA_FLAGS") if given is None else monkeypatch.setenv("XLA_FLAGS", given)
    tell = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['XLA_FLAGS'])"
    run_jobs(jobs_of(Job("a", ("-c", tell, "{work}/a"), "a")), tmp_path, tmp_path, 1)
    assert (tmp_path / "a").read_text() == (expected or given)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_workers_share_the_cores(tmp_path: Path) -> None:
    cores = "import os, pathlib, sys, time; time.sleep(1); text = str(sorted(os.sched_getaffinity(0)))\n"
    cores += "pathlib.Path(sys.argv[1]).write_text(text)"
    jobs = jobs_of(*(Job(name, ("-c", cores, f"{{work}}/{name}"), name) for name in "ab"))
    run_jobs(jobs, tmp_path, tmp_path, 2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in "ab")
    mine = sorted(os.sched_getaffinity(0))
    assert sorted({*one, *two}) == mine
    assert len(one) + len(two) == max(len(mine), 2)


def test_commands_are_asked_to_end_with_it(tmp_path: Path) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "def end(*_): pathlib.Path(sys.argv[1] + '.saved').write_text(''); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path(sys.argv[1] + '.began').write_text(''); time.sleep(60)"
    )
    program = (
        "import sys; from pathlib import Path; from fopd_jax.studies.jobs import Job, run_jobs\n"
        "work = Path(sys.argv[1]); run_jobs({'a': Job('a', ('-c', sys.argv[2], '{work}/a'), 'a')}, work, work, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), child], stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "a.began").exists():
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert (tmp_path / "a.saved").exists()
    assert (tmp_path / LOGS / "a.log").exists()
