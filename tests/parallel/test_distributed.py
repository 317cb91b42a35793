"""Several processes on this host compute what one does, and none waits for another one without saying so."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.schema import MeshShape
from fopd_jax.parallel import distributed
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_sharding
from tests.parallel import distributed_program
from tests.parallel.distributed_program import CURVE, FIRST, LAYOUTS, SAMPLES, UPDATES, Found
from tests.parallel.processes import finish, free_port, start


def _run(folder: Path, *counts: int) -> dict[int, list[Found]]:
    """Run the program on eight devices, once for each of these numbers of processes; what every process found."""
    programs = []
    for count in counts:
        port = str(free_port())
        arguments = [
            [distributed_program.__file__, str(folder), str(count), str(process), port] for process in range(count)
        ]
        programs += [start(each, 8 // count) for each in arguments]
    finish(programs)

    def read(count: int, process: int) -> Found:
        path = folder / f"{count}_{process}"
        with np.load(path / "gradient.npz") as leaves:
            gradient = np.concatenate([leaves[name].ravel() for name in sorted(leaves)])
        return json.loads((path / "found.json").read_text()) | {"gradient": gradient}

    return {count: [read(count, process) for process in range(count)] for count in counts}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    return _run(tmp_path_factory.mktemp("processes"), 1, 2)


def _check_the_same(one: Found, many: list[Found]) -> None:
    for found in many:
        distance = np.linalg.norm(found["gradient"] - one["gradient"]) / np.linalg.norm(one["gradient"])
        losses, expected = np.array(found["losses"]), np.array(one["losses"])
        worst = np.abs(losses / expected - 1).max()
        print(f"gradient {distance:.1e}, first loss {losses[0] / expected[0] - 1:.1e}, curve {worst:.1e}")
        assert found["devices"] == [8, 8 // len(many)]
        assert distance <= FIRST
        assert losses[0] == pytest.approx(expected[0], rel=FIRST)
        assert worst <= CURVE
        assert len(set(losses)) == UPDATES  # it trained
        np.testing.assert_array_equal(found["gradient"], many[0]["gradient"])
        assert found["losses"] == many[0]["losses"]


def test_two_processes_compute_what_one_does(one_and_two: dict[int, list[Found]]):
    _check_the_same(one_and_two[1][0], one_and_two[2])


def test_evaluation_is_shared_and_everybody_has_the_result(one_and_two: dict[int, list[Found]]):
    [one], two = one_and_two[1], one_and_two[2]
    assert len(one["scores"]) == SAMPLES
    for found in two:
        np.testing.assert_allclose(found["images"], one["images"], rtol=0, atol=1e-5)
        scores = [np.array(each["scores"], float) for each in (found, one)]  # None where they failed
        np.testing.assert_allclose(*scores, rtol=0, atol=0.05)  # of bytes: a pixel may be rounded to another one
        assert np.flatnonzero(np.isnan(scores[0])).tolist() == list(range(2, SAMPLES, 3))
        assert found["told"] == one["told"] == [f"mean: 4 of {SAMPLES} failed: ValueError: it is the third"]
        assert (found["scores"], found["images"]) == (two[0]["scores"], two[0]["images"])
        assert found["encoded"] == one["encoded"] // 2
    kept = [score for score in two[0]["scores"] if score is not None]
    assert any(float(np.float32(score)) != score for score in kept)  # nothing was rounded on the way


def test_processes_hold_the_rows_of_their_devices(one_and_two: dict[int, list[Found]]):
    """That what is put comes back is asserted where it is put."""
    everything, first, second = list(range(16)), list(range(8)), list(range(8, 16))
    alternating = [list(range(4)) + first[4:], second], [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]
    expected = [[first, second], [everything] * 2, alternating[1], [everything] * 2]
    assert [[found["rows"][i] for found in one_and_two[2]] for i in range(len(LAYOUTS))] == expected


def test_a_barrier_waits_for_all_and_names_who_is_missing(one_and_two: dict[int, list[Found]]):
    first, last = one_and_two[2]
    assert first["waited"] >= 0.4
    assert last["missing"] == ""
    name = re.escape(f"process 1 ({socket.gethostname()})")
    assert re.fullmatch(f"TimeoutError: barrier 'not all': {name}.* not there within 1 s", first["missing"])


def test_what_stops_one_process_stops_all(one_and_two: dict[int, list[Found]]):
    first, last = one_and_two[2]
    assert first["gave_up"] == "ValueError: workdir: no good"
    assert last["gave_up"] == f"ValueError: process 0 ({socket.gethostname()}): workdir: no good"


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path: Path):
    found = _run(tmp_path, 1, 4)
    _check_the_same(found[1][0], found[4])
    for each in found[4][:-1]:
        assert "process 3" in each["missing"]
    assert all("workdir: no good" in each["gave_up"] for each in found[4])


# ---- the whole program

SMALL = (
    "steps=3", "batch_size=8", "checkpoint_every=2", "eval_every=2", "eval.tasks=('text',)", "eval.samples=8",
    "eval.batch_size=8", "eval.num_steps=2", "final_samples=12", "sampler.num_steps=3",
)  # fmt: skip


def _main(workdir: Path, count: int, *more: str) -> list[subprocess.Popen[str]]:
    """The main job, shortened, in `count` processes that have two devices between them."""
    config = Path(__file__).parents[2] / "configs" / "miniature.py"
    arguments = ["-m", "fopd_jax.main", f"--config={config}", f"--workdir={workdir}"]
    arguments += [f"--config.{setting}" for setting in (*SMALL, *more)]
    port = free_port()
    return [
        start(
            [*arguments, f"--coordinator=localhost:{port}", f"--num-processes={count}", f"--process-id={i}"], 2 // count
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_the_main_job_in_two_processes_gives_what_it_gives_in_one(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(_main(one, 1))
    said = finish(_main(two, 2))
    assert "goodput" in said[0]  # the summary
    assert "goodput" not in said[1]
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    for name, scores in expected.pop("models").items():
        assert found["models"][name] == pytest.approx(scores, abs=1e-3)
    found.pop("models")
    assert found == expected
    assert (two / "table.txt").read_text().split()[:2] == (one / "table.txt").read_text().split()[:2]
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    losses = []
    for folder in (one, two):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
        assert len(list((folder / "tensorboard").iterdir())) == 1
    np.testing.assert_allclose(losses[1], losses[0], rtol=CURVE)
    assert len(losses[0]) == 3


@pytest.mark.slow
def test_a_bad_workdir_stops_all_processes_with_one_line(tmp_path: Path):
    (tmp_path / "something.txt").write_text("no run's folder")
    programs = _main(tmp_path, 2)
    said = [program.communicate(timeout=300)[0] for program in programs]
    assert [program.returncode for program in programs] == [2, 2]
    assert said[0].count("error:") == 1
    assert f"error: {tmp_path} exists and is no run's folder" in said[0]
    assert not any("Traceback" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["something.txt"]


# ---- starting


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1234", None, None), "--num-processes, --process-id: missing; --coordinator, --num-processes and"),
        ((None, None, 0), "--coordinator, --num-processes: missing"),
        (("host", 2, 0), "--coordinator: found 'host', expected host:port of process 0"),
        (("host:0", 2, 0), "--coordinator: found 'host:0'"),
        (("host:1", 2, 2), "--num-processes, --process-id: found 2, 2, expected at least 1, and 0 to one less than it"),
        (("host:1", 0, 0), "--num-processes, --process-id: found 0, 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(given: tuple[Any, Any, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        distributed.initialize(*given)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="distributed: found 'on', expected one of"):
        distributed.initialize(mode="on")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")}
STARTERS = (
    "SLURM",
    "OMPI",
    "PMI",
    "KUBERNETES",
    "TPU",
    "JAX_COORD",
    "JAX_NUM_P",
    "JAX_PROC",
    "JAX_L",
    "JAX_PLAT",
    "CUDA",
)


def _join(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    roll_call: Callable[..., Any] | None = None,
    **arguments: Any,
) -> list[Any]:
    """What `initialize` does in an environment, without doing it."""
    for name in [name for name in os.environ if name.startswith(STARTERS)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done: list[Any] = []
    listed = roll_call or (lambda *call: done.append(call) or ("node03", "node04"))
    monkeypatch.setattr(distributed, "roll_call", listed)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *call, **options: done.append((call, options)))
    monkeypatch.setattr(distributed, "_hosts", [])
    distributed.initialize(timeout_s=9.0, **arguments)
    return done


def test_a_process_on_its_own_joins_nobody(monkeypatch: pytest.MonkeyPatch):
    assert _join(monkeypatch, {}) == []
    assert _join(monkeypatch, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == []
    assert _join(monkeypatch, SLURM | {"SLURM_NTASKS": "2"}, mode="off") == []


def test_slurm_is_detected(monkeypatch: pytest.MonkeyPatch):
    called, joined = _join(monkeypatch, SLURM | {"SLURM_NTASKS": "2"})
    assert called[1:] == (2, 1, 9)
    assert called[0].startswith("node03:")
    assert joined[0] == called[:3]
    assert joined[1] == {
        "local_device_ids": (0,), "cluster_detection_method": "deactivate", "initialization_timeout": 9,
        "shutdown_timeout_seconds": distributed.SHUTDOWN_TIMEOUT_S,
    }  # fmt: skip
    assert distributed.name_of(1) == "process 1 (node04)"


def test_a_cluster_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"SLURM_NTASKS: found 'two', expected a whole number; --distributed=off"):
        _join(monkeypatch, SLURM | {"SLURM_NTASKS": "two"})
    with pytest.raises(ValueError, match=r"found a cluster, but not its members .* or --distributed=off"):
        _join(monkeypatch, {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;nothing"})


def test_a_lone_process_of_an_allocation_runs_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert _join(monkeypatch, SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == []
    assert "found Slurm: in a shell inside job 7 of 4 tasks (SLURM_NTASKS), runs alone" in capsys.readouterr().err


def test_who_waits_in_vain_is_told_what_was_detected(monkeypatch: pytest.MonkeyPatch):
    def nobody(*_: Any) -> None:
        raise TimeoutError("not started within 9 s: process 0")

    told = r"not started .*Slurm: process 1 of 2 in job 7 .*--distributed=off runs this"
    with pytest.raises(TimeoutError, match=told):
        _join(monkeypatch, SLURM | {"SLURM_NTASKS": "2"}, nobody)


def test_variables_of_jax_name_the_members_and_the_devices(monkeypatch: pytest.MonkeyPatch):
    named = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    called, _ = _join(monkeypatch, SLURM | {"SLURM_NTASKS": "8"} | named)
    assert called[:3] == ("a:1", 2, 1)
    _, joined = _join(monkeypatch, SLURM | {"SLURM_NTASKS": "2", "JAX_LOCAL_DEVICE_IDS": "2,3"})
    assert joined[1]["local_device_ids"] == (2, 3)


def test_a_lone_process_takes_the_devices_that_are_named(monkeypatch: pytest.MonkeyPatch):
    updated: list[tuple[str, str]] = []
    monkeypatch.setattr(jax.config, "update", lambda *pair: updated.append(pair))
    assert _join(monkeypatch, {"JAX_LOCAL_DEVICE_IDS": "1,2"}) == []
    assert updated == [("jax_cuda_visible_devices", "1,2"), ("jax_rocm_visible_devices", "1,2")]


# ---- one process


def test_one_process_moves_arrays_as_they_are():
    mesh = make_mesh(MeshShape())
    sharding, rows = batch_sharding(mesh), {"x": np.arange(6.0, dtype=np.float32)}
    np.testing.assert_array_equal(distributed.rows_of(sharding, 6), np.arange(6))
    batch = distributed.put_batch(rows, sharding, 6)
    assert batch["x"].sharding == sharding
    np.testing.assert_array_equal(distributed.fetch(batch)["x"], rows["x"])
    assert distributed.gather_rows(rows, sharding, 6) is rows
    assert distributed.local_mesh(mesh) is mesh
    distributed.barrier("nobody to wait for")


def test_a_batch_with_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="batch: found 5 rows, expected 6, this process's of 6"):
        distributed.put_batch(np.zeros((5, 2)), batch_sharding(make_mesh(MeshShape())), 6)
