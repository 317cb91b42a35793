"""Several processes on this host compute what one does, and none waits for another one without saying so.

The file is also the program that those processes run: `python test_distributed.py FOLDER COUNT PROCESS PORT`.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fopd_jax.adapters.lora import init_adapter, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, LoRAConfig, MeshShape, Objective
from fopd_jax.evaluation.suite import EvalSet, Sampler, evaluate, noise_keys
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE, standard_normal
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel import distributed
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import AXES, make_mesh
from fopd_jax.parallel.rollcall import roll_call
from fopd_jax.parallel.sharding import batch_sharding, parameter_shardings, replicated
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.stages.pipeline import boxed_variables
from fopd_jax.steps.opd.step import Batch, Frozen, OPDSpec, OPDStep
from fopd_jax.steps.state import init_state, make_optimizer
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, UPDATES, SAMPLES = (4, 4, 3), 8, 20, 13
FIRST, CURVE = 1e-5, 1e-3  # relative: loss and gradient (L2) of the first update; each loss of the curve
LAYOUTS = (  # lengths of the mesh's axes, and the axes in the order in which they run over the devices
    ((2, 2, 2), (0, 1, 2)),
    ((2, 2, 2), (2, 1, 0)),  # the two halves of each tensor-parallel pair in two processes
    ((2, 2, 2), (1, 0, 2)),  # rows that are not next to each other
    ((1, 1, 8), (0, 1, 2)),
)
Found = dict[str, Any]


# ---- what the processes do


def _random(seed: int, shapes: Any) -> Any:
    """A tree of these shapes; nothing is compiled to draw it."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _encode(prompts: Any) -> Conditioning:
    """Each prompt's own numbers, whatever others stand beside it."""
    rows = [np.random.default_rng(list(prompt.encode())).normal(size=27).astype(np.float32) for prompt in prompts]
    return Conditioning(np.stack([row[:20].reshape(4, 5) for row in rows]), np.stack([row[20:] for row in rows]))


def _train(mesh: Mesh, folder: Path) -> Found:
    """The first gradient of a tiny network's distillation (written to the folder) and the losses of 20 updates."""
    model, sharding, everywhere = MMDiT(TINY), batch_sharding(mesh), replicated(mesh)
    boxed = boxed_variables(model, LATENT)
    shapes = jax.eval_shape(lambda: init_adapter(jax.random.key(0), nn.unbox(boxed)["params"], LoRAConfig(2, 4.0)))
    bank = stack_bank({name: _random(seed, shapes) for seed, name in enumerate(("one", "two", "anchor"))})
    variables = jax.tree.map(distributed.put_replicated, _random(9, nn.unbox(boxed)), parameter_shardings(mesh, boxed))
    frozen = Frozen(variables, *distributed.put_replicated((bank, _encode([""])), everywhere))
    last_gradient = optax.trace(decay=0.0)  # its state holds what comes in
    optimizer = optax.chain(last_gradient, make_optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0))
    spec = OPDSpec(
        Objective(mar_beta=0.05), SDE(0.7), flow_match_sigmas(3), np.ones(3, bool), LATENT, ("one", "two"), 2.0,
        (2.0, 2.0, 2.0),
    )  # fmt: skip
    groups = GradientGroups(mesh, ("data", "fsdp"), P())
    step = OPDStep(spec, make_velocity(model), optimizer, EMA(), groups=groups).make(everywhere)
    state, losses = distributed.put_replicated(init_state(_random(5, shapes), optimizer, 0), everywhere), []
    rows = distributed.rows_of(sharding, BATCH)
    for index in range(UPDATES):
        mine = Batch(_encode([f"prompt {index} {row}" for row in rows]), rows.astype(np.int32) % 2)
        state, metrics = step(frozen, state, distributed.put_batch(mine, sharding, BATCH))
        losses.append(float(metrics["loss"]))
        if index == 0:
            np.savez(folder / "gradient.npz", *jax.tree.leaves(distributed.fetch(state.opt_state[0].trace)))
    return {"losses": losses, "devices": [jax.device_count(), jax.local_device_count()]}


def _score(images: np.ndarray, prompts: Any) -> dict[str, np.ndarray]:
    """In float64, which no device would keep."""
    return {"mean": images.mean((1, 2, 3), np.float64) + np.array([len(prompt) / 3 for prompt in prompts])}


def _evaluate(mesh: Mesh) -> Found:
    """Images and scores of a network that adds its prompt to its noise; how many prompts were encoded here."""
    encoded: list[str] = []

    def encode(prompts: Any) -> Conditioning:
        encoded.extend(prompts)
        return _encode(prompts)

    def draw(variables: Any, adapter: Any, conditioning: Conditioning, null: None, keys: jax.Array) -> jax.Array:
        return standard_normal(keys, LATENT) + variables * conditioning.pooled[:, :1, None, None]

    world = World(LATENT, {"task": Task("task", (), ("a", "bb", "ccc"), _score)}, encode, lambda latents: 2 * latents)
    sampler = Sampler(jax.jit(draw, out_shardings=batch_sharding(mesh)), guided=False, mesh=mesh)
    weight = distributed.put_replicated(np.float32(3), replicated(mesh))
    scores = evaluate(sampler, world, EvalSet(world.tasks, SAMPLES, BATCH, 0), weight, {})
    images = sampler(world, weight, {}, [f"prompt {row}" for row in range(BATCH)], noise_keys(0, "", np.arange(BATCH)))
    return {"scores": scores["mean"].tolist(), "images": images.tolist(), "encoded": len(encoded)}


def _move() -> list[list[int]]:
    """Put and fetch on meshes of all layouts; this process's rows of each."""
    whole = {"a": np.arange(48.0, dtype=np.float32).reshape(16, 3), "b": np.arange(16)}
    double, keys, rows = np.pi * whole["b"], jax.random.split(jax.random.key(3), 16), []
    for lengths, order in LAYOUTS:
        grid = np.array(jax.devices()).reshape([lengths[axis] for axis in order])
        mesh = Mesh(np.moveaxis(grid, range(3), order), AXES, axis_types=(AxisType.Auto,) * 3)
        sharding = batch_sharding(mesh)
        mine = distributed.rows_of(sharding, 16)
        batch = distributed.put_batch({name: leaf[mine] for name, leaf in whole.items()}, sharding, 16)
        jax.tree.map(np.testing.assert_array_equal, distributed.fetch(batch), whole)
        np.testing.assert_array_equal(distributed.held_rows(batch["a"]), whole["a"][mine])
        np.testing.assert_array_equal(distributed.gather_rows(double[mine], sharding, 16), double)
        rows.append(mine.tolist())
    split = jax.random.key_data(distributed.put_replicated(keys, sharding))
    np.testing.assert_array_equal(distributed.fetch(split), jax.random.key_data(keys))
    assert distributed.local_mesh(mesh).shape == {"data": 1, "fsdp": jax.local_device_count(), "tensor": 1}
    return rows


def _wait() -> Found:
    """Process 0 gives up while the others are at a barrier; before that, the last process is late for all barriers but
    one, to which it does not come."""
    is_last, began = jax.process_index() == jax.process_count() - 1, time.monotonic()
    if is_last:
        time.sleep(0.5)
    distributed.barrier("all", 60.0)
    distributed.barrier("all", 60.0)
    waited = time.monotonic() - began
    missing = "" if is_last else _failure(lambda: distributed.barrier("not all", 1.0))

    def prepare() -> None:
        with distributed.failing_together():
            if distributed.is_main():
                time.sleep(3.0)  # until none waits for the last process any more, on a busy machine, too
                raise ValueError("workdir: no good")
            distributed.barrier("prepared", 60.0)

    return {"waited": waited, "missing": missing, "gave_up": _failure(prepare)}


def _failure(act: Any) -> str:
    try:
        act()
    except (ValueError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _program(folder: Path, count: int, process: int, port: int) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        distributed.initialize(f"localhost:{port}", count, process, timeout_s=120)
    folder = folder / f"{count}_{process}"
    folder.mkdir()
    mesh = make_mesh(MeshShape(2, 2, 2))
    found = _train(mesh, folder) | _evaluate(mesh)
    if count > 1:
        found |= {"rows": _move()} | _wait()
    (folder / "found.json").write_text(json.dumps(found))


# ---- the tests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], devices: int) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # compiles fast
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _finish(programs: list[subprocess.Popen[str]]) -> list[str]:
    """What each said; all have to succeed."""
    try:
        said = [program.communicate(timeout=900)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    for program, text in zip(programs, said, strict=True):
        assert program.returncode == 0, text
    return said


def _run(folder: Path, *counts: int) -> dict[int, list[Found]]:
    """Run the program on eight devices, once for each of these numbers of processes; what every process found."""
    programs = []
    for count in counts:
        port = str(free_port())
        arguments = [[__file__, str(folder), str(count), str(process), port] for process in range(count)]
        programs += [start(each, 8 // count) for each in arguments]
    _finish(programs)

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
        np.testing.assert_allclose(found["scores"], one["scores"], rtol=0, atol=1e-5)
        assert (found["scores"], found["images"]) == (two[0]["scores"], two[0]["images"])
        assert found["encoded"] == one["encoded"] // 2
    assert any(float(np.float32(score)) != score for score in two[0]["scores"])  # nothing was rounded on the way


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
    _finish(_main(one, 1))
    said = _finish(_main(two, 2))
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
    assert [program.returncode for program in programs] == [1, 1]
    assert said[0].count("error:") == 1
    assert f"error: {tmp_path} exists and is no run's folder" in said[0]
    assert not any("Traceback" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["something.txt"]


# ---- starting


def _call(*calls: tuple[int, int], timeout_s: float = 20.0) -> list[Any]:
    """Results or errors of concurrent roll calls, given as (count, process)."""
    port = free_port()

    def call(numbers: tuple[int, int]) -> Any:
        try:
            return roll_call(f"localhost:{port}", *numbers, timeout_s)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def test_a_roll_call_tells_everybody_the_hosts():
    assert _call((3, 1), (3, 2), (3, 0)) == [(socket.gethostname(),) * 3] * 3


def test_a_roll_call_names_who_has_not_started():
    for error in _call((4, 0), (4, 2), timeout_s=1.0):
        assert isinstance(error, TimeoutError)
        host = socket.gethostname()
        assert str(error) == f"not started within 1 s: process 1, 3; there are: 0 ({host}), 2 ({host})"


def test_a_process_without_a_coordinator_says_so():
    [error] = _call((2, 1), timeout_s=0.5)
    assert isinstance(error, TimeoutError)
    assert re.search(r"process 1 \(.*\): the coordinator, process 0 at localhost:\d+, has not answered", str(error))


@pytest.mark.parametrize(
    ("calls", "message"),
    [(((3, 0), (3, 1), (3, 1)), "process-id: 1 was given twice"), (((3, 0), (2, 1)), "num-processes: process 1")],
)
def test_processes_that_do_not_agree_are_refused(calls: tuple[tuple[int, int], ...], message: str):
    for error in _call(*calls):
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_a_stranger_on_the_port_does_not_count():
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        main = threads.submit(roll_call, f"localhost:{port}", 2, 0, 20.0)
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    break
            except ConnectionRefusedError:
                time.sleep(0.02)
        assert roll_call(f"localhost:{port}", 2, 1, 20.0) == main.result() == (socket.gethostname(),) * 2


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


def _join(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], **arguments: Any) -> list[Any]:
    """What `initialize` does in an environment, without doing it."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_COORD"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done: list[Any] = []
    monkeypatch.setattr(distributed, "roll_call", lambda *call: done.append(call) or ("node03", "node04"))
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
    with pytest.raises(ValueError, match=r"found a cluster, but not its members .* or --distributed=off"):
        _join(monkeypatch, SLURM | {"SLURM_NTASKS": "two"})


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


if __name__ == "__main__":
    _program(Path(sys.argv[1]), *map(int, sys.argv[2:]))
