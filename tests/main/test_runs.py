"""The program from flags to results, on random weights: outputs, kills, extensions, names of earlier versions."""

import itertools
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from fopd_jax import main
from fopd_jax.config.identity import identity
from fopd_jax.config.load import load_config
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.recorded import RECORD_FILE, read_starts
from fopd_jax.config.schema import RewardConfig
from fopd_jax.files import write_json
from fopd_jax.interop.files.converted import weights_hash
from fopd_jax.interop.files.safetensors import load_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.running import inputs
from fopd_jax.running.checkpoints import newest_step
from fopd_jax.running.stage import ASIDE
from fopd_jax.stages import setup
from fopd_jax.stages.again import evaluate
from tests.configs import load, prepare
from tests.main import earlier
from tests.main.experiment import (
    CLOCKED,
    OUTPUTS,
    RANK,
    STEPS,
    TIMEOUT,
    Program,
    assert_same_outcome,
    command,
    experts,
    logged,
    snapshot,
    tiny_overrides,
    wait_for,
)


@pytest.fixture(scope="module")
def whole(program: Program) -> Path:
    """The workdir of a run that nothing interrupted."""
    return program.run("whole")


# ---- a whole run


def test_a_run_leaves_weights_metrics_results_and_pictures(whole: Path, program: Program):
    files = {path.name for path in whole.iterdir()}
    assert files == OUTPUTS | {"checkpoints", "tensorboard"}  # and no temporary file
    assert [line["step"] for line in logged(whole) if "train/loss" in line] == list(range(1, STEPS + 1))
    evaluations = [line for line in logged(whole) if "train/loss" not in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all(0 <= line["eval/monitors/dark_share"] <= 1 for line in evaluations)
    assert json.loads((whole / "config.json").read_text())["batch_size"] == 4
    assert json.loads((whole / "timing.json").read_text()).keys() == {
        "setup_seconds", "train_seconds", "report_seconds",
    }  # fmt: skip
    with Image.open(whole / "samples.png") as picture:
        assert picture.format == "PNG"
    assert newest_step(whole) == STEPS
    events = b"".join(path.read_bytes() for path in (whole / "tensorboard").iterdir())
    assert events.count(b"\x89PNG") == 5  # samples and health of two evaluations, and the report
    assert events.count(b"final/samples") == events.count(b"final/table") == 1
    assert (whole / "table.txt").read_bytes().rstrip() in events


def test_the_metrics_hold_the_learning_rate_and_beside_them_time_and_memory(whole: Path):
    rates = [line["train/learning_rate"] for line in logged(whole) if "train/loss" in line]
    np.testing.assert_allclose(rates, [5e-3, 1e-2, 1e-2, 1e-2])  # warmed up over two updates
    *lines, last = logged(whole, "performance.jsonl")
    scored = [line for line in lines if "eval/rewards/text/latency" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert all(line["eval/rewards/text/failed"] == 0 for line in scored)
    lines = [line for line in lines if line not in scored]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["memory/host_peak_gib"] > 0 for line in lines)
    first, *later = ("time/step_seconds" in line for line in lines)
    assert not first  # it waited for its program
    assert all(later)
    assert all(line["time/samples_per_second"] == 4 / line["time/step_seconds"] for line in lines[1:])
    assert {"goodput/step", "goodput/compile"} < last.keys()


def test_the_console_tells_the_run_from_its_header_to_what_comes_next(whole: Path, program: Program):
    told, progress = ((program.folder / f"whole.{stream}").read_text() for stream in ("out", "err"))
    said = [line for line in told.splitlines() if not line.startswith(" ")]
    begins = (
        "run ", f"workdir    *{whole}, from the beginning", "devices    *1 of kind 'cpu' in 1 process, mesh data 1 x",
        "trains    *an adapter of rank 4, .*, from the teachers' merge", "compiling the update",
        "compiled the update in ", "step 2: evaluating", r"step 2: .*text 0\.\d{4}.* \(\d+\.\d s",
        "step 4: evaluating", "step 4: the report", "done: 4 updates", "student ", f"in {whole}:", "next:", "goodput ",
    )  # fmt: skip
    places = [next((i for i, line in enumerate(said) if re.match(begin, line)), -1) for begin in begins]
    assert -1 not in places, told
    assert places == sorted(places)
    assert (whole / "table.txt").read_text() in told
    assert f"--adapter={whole}/student.safetensors" in told
    steps = re.findall(r"^step (\d)/4 loss \S+( samples/s \S+ ETA \d\d:\d\d)?$", progress, re.M)
    assert [step for step, _ in steps][:: len(steps) - 1] == ["1", "4"]
    assert not steps[0][1]
    assert steps[-1][1]
    assert "%|" not in progress  # no bar


def test_the_results_compare_base_teachers_merge_and_student(whole: Path):
    results = json.loads((whole / "results.json").read_text())
    teachers = [f"teacher/{name}" for name in experts()]
    assert set(results["models"]) == {"base", "merge", "student", *teachers}
    assert (results["steps"], results["seed"]) == (STEPS, 3)
    assert results["samples"]["quality"] == 12  # both tasks
    assert all(np.isfinite(value) for scores in results["models"].values() for value in scores.values())


def test_the_student_has_moved_from_the_merge_and_loads_as_an_adapter(whole: Path, config: Any, tmp_path: Path):
    student, metadata = load_adapter(whole / "student.safetensors")
    start = prepare(config, tmp_path / "run").teaching.start()
    assert metadata["preset"] == "miniature"
    assert student.scale == start.scale
    card = read_card(whole / "student.safetensors")
    assert card is not None
    assert (card.algorithm, card.guidance, card.train_steps, card.updates, card.rank) == ("opd", 1.0, 3, STEPS, RANK)
    assert card.base == weights_hash(Path(str(config.model.path)))
    assert card.config_hash == json.loads((whole / "results.json").read_text())["config_hash"]
    *_, measured = (line for line in logged(whole) if any(name.startswith("eval/") for name in line))
    scores = {name.removeprefix("eval/"): value for name, value in measured.items() if name != "step"}
    assert card.scores == {name: value for name, value in scores.items() if not name.startswith(("monitors/", *ASIDE))}
    assert card.scored_at == measured["step"] == STEPS
    before, after = (flatten_dict(tree, sep="/") for tree in (start.weights, student.weights))
    assert before.keys() == after.keys()
    still = {path for path in before if np.abs(before[path] - after[path]).max() < 1e-4}
    # The last block reads the text's keys and values only, so nothing depends on its queries.
    assert still == {"last_block/attn/add_q_proj/a", "last_block/attn/add_q_proj/b"}


# ---- the version before

EQUAL = {  # by its names, with values that change no number
    "model.remat": "none", "model.attention": "xla", "mesh.fsdp": 1, "shift": 3.0, "reduce_once": ("data", "fsdp"),
    "watchdog_seconds": 900.0, "max_skipped_steps": 1, "keep_best": "", "alarms.ratio": (0.5, 2.0),
}  # fmt: skip


def test_a_workdir_of_the_version_before_is_continued(program: Program, whole: Path):
    """Its checkpoints bear the hash of all of its fields; finished and extended by the
    folder alone it ends as a workdir of today.
    """
    since = {"objective.mar_beta": 0.02}  # what the experiment has changed since
    fields, folder = earlier.tiny_identity(program.overrides | since), program.folder / "continued"
    earlier.write(folder, fields)
    config = (folder / "config.json").read_bytes()
    alone = [sys.executable, "-m", "fopd_jax.main", f"--workdir={folder}", f"--config.run.steps={STEPS}"]
    for steps, line in ((2, program.command("continued", {"steps": 2})), (STEPS, alone)):
        program.finish("continued", line)
        (about,) = (folder / "checkpoints" / str(steps)).glob("about/*.json")
        assert json.loads(about.read_text())["config_hash"] == earlier.hash_of(fields)
        assert json.loads((folder / "results.json").read_text())["steps"] == steps
    first, second = read_starts(folder / RECORD_FILE)
    assert (first["from_step"], first["at_step"], second["from_step"], second["at_step"]) == (0, 2, 2, STEPS)
    assert first["status"] == second["status"] == "finished"
    assert second["command"] == [sys.executable, *alone[1:]]
    assert second["config"] == first["config"] | {"run.steps": STEPS}
    assert (folder / "config.json").read_bytes() == config
    assert_same_outcome(folder, whole, apart=frozenset({"config.json"}))


# ---- kills and extensions


def test_a_killed_run_ends_like_one_that_nothing_interrupted(program: Program, whole: Path):
    """Also where it is continued by a command line of the version before."""
    assert program.kill("killed", lambda workdir: len(logged(workdir)) >= 2)
    assert not (program.folder / "killed" / "results.json").exists()
    overrides = earlier.renamed(program.overrides) | EQUAL
    assert "steps" in overrides
    assert_same_outcome(program.finish("killed", command(program.folder / "killed", overrides)), whole)


@pytest.mark.slow
def test_kills_in_every_phase_change_nothing(program: Program, whole: Path):
    """While a checkpoint is being written, between steps, in the report, and at times that nobody chose."""
    phases: list[Callable[[Path], bool]] = [
        lambda workdir: (workdir / "config.json").exists(),
        lambda workdir: any((workdir / "checkpoints").glob("*tmp*")),
        lambda workdir: newest_step(workdir) >= 2,
        lambda workdir: any(line["step"] == STEPS for line in logged(workdir)),
        lambda workdir: (workdir / "student.safetensors").exists(),
        lambda workdir: (workdir / "results.json").exists(),
    ]
    for phase in phases:
        assert program.kill("phases", phase)
    assert_same_outcome(program.run("phases"), whole)
    rng = np.random.default_rng(0)
    for _ in range(3):
        until = time.monotonic() + rng.uniform(3, 20)
        program.kill("random", lambda _, until=until: time.monotonic() > until)
    assert_same_outcome(program.run("random"), whole)


def test_a_run_told_to_stop_saves_in_time(program: Program):
    """30 s is what clouds give; the second signal is the one that impatient job managers send."""
    workdir = program.folder / "stopped"
    with program.start("stopped", steps=10_000, eval_every=0, checkpoint_every=1000) as process:
        assert wait_for([process], lambda: len(logged(workdir)) >= 2)
        process.terminate()
        began = time.monotonic()
        time.sleep(0.1)
        process.terminate()
        assert process.wait(TIMEOUT) in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter if it has already saved
        seconds = time.monotonic() - began
    assert newest_step(workdir) == max(line["step"] for line in logged(workdir)) > 0
    assert seconds < 30, seconds


LONG = {"steps": 40, "eval_every": 10}


def _moment(rng: np.random.Generator, newest: int) -> Callable[[Path], bool]:
    """When to kill: while a checkpoint is being written, some time after the next one, or at any time at all."""
    kind, delay, later = rng.integers(3), rng.uniform(0, 2), time.monotonic() + rng.uniform(0, 20)
    seen: list[float] = []

    def after_a_save(workdir: Path) -> bool:
        if not seen and (newest_step(workdir) > newest or (workdir / "results.json").exists()):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + delay

    def in_a_save(workdir: Path) -> bool:
        return any((workdir / "checkpoints").glob("*tmp*"))

    return [in_a_save, after_a_save, lambda workdir: time.monotonic() > later][kind]


def _kill_often(kills: int, workdir: Path, kill: Callable[[Callable[[Path], bool]], bool]) -> None:
    """As many kills of one run; a run that ends in between is started again, as any other."""
    rng, done, newest = np.random.default_rng(0), 0, 0
    while done < kills:
        done += kill(_moment(rng, newest))
        assert newest_step(workdir) >= newest  # no checkpoint is ever lost
        newest = newest_step(workdir)


@pytest.mark.slow
def test_thirty_random_kills_change_nothing(program: Program):
    expected = program.run("uninterrupted", **LONG)
    _kill_often(30, program.folder / "thirty", lambda when: program.kill("thirty", when, **LONG))
    assert_same_outcome(program.run("thirty", **LONG), expected)


@pytest.mark.slow
def test_ten_kills_of_one_of_two_processes_change_nothing(program: Program):
    def to_the_end(name: str) -> Path:
        assert [process.wait(TIMEOUT) for process in program.start_two(name, **LONG)] == [0, 0]
        return program.folder / name

    expected, victims = to_the_end("pair"), itertools.cycle((1, 0))
    _kill_often(10, program.folder / "ten", lambda when: program.kill_one_of_two("ten", when, next(victims), **LONG))
    assert_same_outcome(to_the_end("ten"), expected)


def test_a_kept_checkpoint_is_evaluated_with_other_settings_and_exported(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Alone by the run's folder, in which what the run left stays as it was."""
    closed: list[set[str]] = []
    monkeypatch.setattr(setup, "close_all", lambda rewards: closed.append(set(rewards)))
    before, recorded = snapshot(whole), resolve(load_config(whole / RECORD_FILE))
    changes = {
        "eval.final_samples": 2, "tasks.text.rewards": {"text": 2.0, "dark": 0.5},
        "rewards": {"dark": RewardConfig(kind="tests.main.own_reward:darkness", divide_by=2.0)},
    }  # fmt: skip
    evaluate(resolve(override(recorded, changes)), whole, 3, tmp_path / "other")
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    assert (results["steps"], results["samples"]["text"]) == (3, 2)
    found = results["models"]["student"]
    assert found.keys() == {"text", "quality", "dark", "reward/text", "composition", "composition_strict"}
    assert found["reward/text"] == pytest.approx(2 * found["text"] + found["dark"] / 2, abs=2e-6)
    assert 0 < found["dark"] < 0.5
    assert closed == [{"text", "composition", "composition_strict", "quality", "dark"}]
    assert results["models"].keys() == json.loads((whole / "results.json").read_text())["models"].keys()
    (start,) = read_starts(tmp_path / "other" / RECORD_FILE)
    assert (start["status"], start["of"]) == ("finished", {"workdir": str(whole), "step": 3})
    students = [(tmp_path / "other" / "student.safetensors").read_bytes()]
    for step in (3, None):  # None: the newest
        evaluate(recorded, whole, step, tmp_path / f"weights{step}", weights_only=True)
        assert {path.name for path in (tmp_path / f"weights{step}").iterdir()} == {
            RECORD_FILE, "README.md", "student.safetensors",
        }  # fmt: skip
        students.append((tmp_path / f"weights{step}" / "student.safetensors").read_bytes())
    assert students[0] == students[1] != students[2] == (whole / "student.safetensors").read_bytes()
    assert snapshot(whole) == before


@pytest.mark.slow
def test_the_newest_checkpoint_evaluated_anew_gives_what_the_run_gave(whole: Path, tmp_path: Path):
    evaluate(resolve(load_config(whole / RECORD_FILE)), whole, None, tmp_path / "same")
    for name in ("README.md", "results.json", "table.txt", "samples.png", "student.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "step", "out", "expected"),
    [
        ({}, 1, "out", f"--step: found 1, expected one that WHOLE holds: 3, {STEPS}"),
        ({"seed": 4}, None, "out", "WHOLE belongs to another config; only the fields of `run` and `eval` and rewards"),
        ({}, None, "mine", "--out: TMP/mine holds what no evaluation has made; name another"),
    ],
)
def test_what_cannot_be_evaluated_is_told(
    whole: Path, tmp_path: Path, changes: dict[str, Any], step: int | None, out: str, expected: str
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    config = resolve(override(load_config(whole / RECORD_FILE), changes))
    expected = expected.replace("WHOLE", str(whole)).replace("TMP", str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(expected)):
        evaluate(config, whole, step, tmp_path / out)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_continued_with_other_weights_under_the_same_name(program: Program, whole: Path, tmp_path: Path):
    """Neither continued nor evaluated nor, if it is the base, drawn."""
    weights = Path(shutil.copytree(Path(program.overrides["model.path"]).parent, tmp_path / "weights"))
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    config = resolve(override(load(), tiny_overrides(weights)))
    (folder / "config.json").unlink()
    (folder / "inputs.json").unlink()
    write_json(folder / "config.json", identity(config))
    inputs.keep(folder, main.check_run(config, folder))
    for field, name in (("model.path", "base"), ("tasks.text.teacher", "text"), ("anchor.adapter", "quality")):
        path = weights / f"{name}.safetensors"
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        for act in (
            lambda: main.check_run(config, folder),
            lambda: evaluate(config, folder, None, tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match=rf"^{field}: {path} holds other content than the run in {folder} "):
                act()
        path.write_bytes(kept)
    main.check_run(config, folder)


@pytest.mark.slow
def test_a_finished_run_repeats_only_its_report(program: Program, whole: Path):
    before = {name: (whole / name).read_bytes() for name in OUTPUTS - CLOCKED}
    program.run("whole")
    assert {name: (whole / name).read_bytes() for name in before} == before
