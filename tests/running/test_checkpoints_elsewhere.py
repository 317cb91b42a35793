"""Checkpoints between meshes and processes, and under `kill -9`."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.steps.state import TrainState
from tests.quick import environment

COMMON = """
import json, os, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from fopd_jax.parallel.mesh import MeshShape, make_mesh
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.steps.state import TrainState

workdir = Path(sys.argv[1])
SPECS = {"kernel": P("fsdp", "tensor"), "stack": P(None, "tensor", "fsdp"), "bias": P()}
SHAPES = {"kernel": (16, 8), "stack": (3, 4, 8), "bias": (5,)}

def arrays(step):
    rng = np.random.default_rng(step)
    def tree():
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return TrainState(np.int32(step), np.uint32(2**32 - 1), tree(), (tree(), tree()), tree())

def shardings(mesh):
    specs = TrainState(P(), P(), SPECS, (SPECS, SPECS), SPECS)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))

def put(state, shardings):
    make = jax.make_array_from_callback
    return jax.tree.map(lambda leaf, where: make(leaf.shape, where, lambda index: leaf[index]), state, shardings)

def abstract(state, shardings):
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, shardings)

def check(found, step, shardings):
    for leaf, expected, sharding in zip(*map(jax.tree.leaves, (found, arrays(step), shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])

def open_checkpoints():
    return Checkpoints(workdir, keep=3, config_hash="c0ffee")
"""

MESHES = """
first = shardings(make_mesh(MeshShape(8, 1, 1)))
checkpoints = open_checkpoints()
checkpoints.save(1, put(arrays(1), first))
checkpoints.close()
for number, lengths in enumerate(((1, 4, 2), (2, 2, 2), (4, 2, 1)), start=1):
    checkpoints = open_checkpoints()
    where = shardings(make_mesh(MeshShape(*lengths)))
    restored = checkpoints.restore(abstract(arrays(0), where))
    check(restored, number, where)
    checkpoints.save(number + 1, put(arrays(number + 1), where))  # the next mesh reads what this one wrote
    checkpoints.close()
one = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[5]), arrays(0))
checkpoints = open_checkpoints()
check(checkpoints.restore(abstract(arrays(0), one)), 4, one)
checkpoints.close()
"""

PROCESSES = """
from jax.experimental import multihost_utils
from fopd_jax.parallel.agreement import share
from fopd_jax.parallel.distributed import barrier
from fopd_jax.running import integrity
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
read, right = [], integrity._entry
integrity._entry = lambda path: (read.append(str(path.relative_to(workdir))), right(path))[1]
where = shardings(make_mesh(MeshShape(1, 4, 2)))
checkpoints = open_checkpoints()
assert checkpoints.latest_step() is None
for step in (1, 2):
    checkpoints.save(step, put(arrays(step), where))
checkpoints.wait()
other = f"/ocdbt.process_{1 - jax.process_index()}/"
assert read and not any(other in name for name in read), "hashed what the other process wrote"
read.clear()
assert checkpoints.latest_step() == 2
everything = {str(path.relative_to(workdir)) for path in (workdir / "checkpoints/2").rglob("*") if path.is_file()}
verified = [json.loads(names) for names in share("what was verified", json.dumps(read))]
assert sorted(sum(verified, [])) == sorted(everything - {"checkpoints/2/manifest.json"}), verified
assert all(verified), "one process has read everything"
if jax.process_index() == 1:  # seen by the other one
    (workdir / "checkpoints/2/about/about.json").write_text("")
barrier("damage done")
check(checkpoints.restore(abstract(arrays(0), where)), 1, where)
checkpoints.save(2, put(arrays(2), where))
checkpoints.save(3, put(arrays(3), where))
checkpoints.wait()
if jax.process_index() == 0:
    for step in (1, 2, 3):
        (workdir / f"checkpoints/{step}").rename(workdir / f"checkpoints/_{step}")
    (workdir / "checkpoints/9").mkdir()
barrier("only a damaged one is left")
try:
    checkpoints.latest_step()
except ValueError as error:
    assert "checkpoints/9/manifest.json" in str(error), error
else:
    raise AssertionError("a damaged checkpoint was taken")
multihost_utils.sync_global_devices("both have refused")
checkpoints.close()
"""


def _start(script: str, *arguments: str, devices: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]


def _state(step: int) -> TrainState:
    """As the scripts make it."""
    namespace: dict = {}
    script = COMMON.replace("workdir = Path(sys.argv[1])", "")
    exec(script, namespace)
    return namespace["arrays"](step)


def _assert_holds(workdir: Path, step: int) -> None:
    """This process, of one device, reads what others wrote."""
    checkpoints = Checkpoints(workdir, keep=3, config_hash="c0ffee")
    restored = checkpoints.restore(jax.tree.map(jnp.asarray, _state(0)))
    checkpoints.close()
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(_state(step)), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_a_checkpoint_is_restored_onto_any_mesh(tmp_path: Path):
    """Saved on (8, 1, 1), restored and saved again on (1, 4, 2), (2, 2, 2) and (4, 2, 1), restored on one device."""
    _finish(_start(COMMON + MESHES, str(tmp_path), devices=8))
    _assert_holds(tmp_path, 4)


def test_two_processes_agree_on_what_is_intact_and_one_process_reads_it(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [_start(COMMON + PROCESSES, str(tmp_path), address, str(index), devices=4) for index in range(2)]
    for process in processes:
        _finish(process)
    assert (tmp_path / "checkpoints/2.damaged").is_dir()
    (tmp_path / "checkpoints/9").rmdir()
    for step in (1, 2, 3):
        (tmp_path / f"checkpoints/_{step}").rename(tmp_path / f"checkpoints/{step}")
    _assert_holds(tmp_path, 3)


# ---- kills

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.steps.state import TrainState

workdir, kills = Path(sys.argv[1]), int(sys.argv[2])
done, started = workdir / "done", workdir / "started"

def make(step):
    rng = np.random.default_rng(step)
    tree = lambda: {name: jnp.asarray(rng.random(50_000, np.float32)) for name in "abcd"}
    return TrainState(jnp.asarray(step, jnp.int32), jnp.asarray(0, jnp.uint32), tree(), (tree(), tree()), tree())

def restore(checkpoints):
    latest = checkpoints.latest_step()
    if latest is None:
        assert not done.exists(), f"lost all: {done.read_text()} was in place"
        return 0
    state = checkpoints.restore(make(0))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, make(latest))), strict=True))
    assert not done.exists() or latest >= int(done.read_text()), f"{done.read_text()} was in place, found {latest}"
    return latest

def life():
    checkpoints = Checkpoints(workdir, keep=1, config_hash="c0ffee")
    step = restore(checkpoints)
    while True:
        step += 1
        checkpoints.save(step, make(step))
        started.touch()
        if step % 2:
            checkpoints.wait()
            done.with_name("done.tmp").write_text(str(step))
            os.replace(done.with_name("done.tmp"), done)

workdir.mkdir(exist_ok=True)
interrupted, delays = 0, random.Random(0)
for kill in range(kills):
    child = os.fork()
    if child == 0:
        life()
    while not started.exists():  # a life that found something wrong has ended
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run after a kill failed"
        time.sleep(0.002)
    time.sleep(delays.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    started.unlink()
    interrupted += any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
assert interrupted, "no kill hit a save"
checkpoints = Checkpoints(workdir, keep=1, config_hash="c0ffee")
print("restored", restore(checkpoints), "interrupted", interrupted)
checkpoints.close()
"""


def test_no_kill_during_a_save_loses_a_checkpoint(tmp_path: Path):
    """One checkpoint is kept, so that its removal is under fire too; whatever was in place once never goes back."""
    _finish(_start(KILLED, str(tmp_path / "run"), "6", devices=1))
