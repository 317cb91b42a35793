"""Several processes as one program, on JAX's own distributed runtime.

Every process runs the same program on its own devices. Arrays over all devices are made of what each process holds
(`put_batch`, `put_replicated`) and come back whole (`fetch`). What is no array, such as waiting and giving up, goes
through the runtime's key-value store.
"""

import contextlib
import dataclasses
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` detects with; there is no public form
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, Sharding
from jaxtyping import Int

from fopd_jax.console import note
from fopd_jax.parallel.environment import chosen_devices, coordinates, surroundings
from fopd_jax.parallel.mesh import AXES, visible_devices
from fopd_jax.parallel.rollcall import roll_call
from fopd_jax.parallel.sharding import replicated

Tree = Any
MODES = ("auto", "off")
START_TIMEOUT_S = 300.0
BARRIER_TIMEOUT_S = 600.0
SHUTDOWN_TIMEOUT_S = 60  # a process that ends waits for the others, which may hang
_LONGEST_POLL_S = 0.5
_STORE = "fopd_jax"
_hosts: list[str] = []  # by process, once `initialize` has found more than this one
_barriers = itertools.count()  # all processes pass the same barriers in the same order


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process among all: `coordinator` is `host:port` of process 0; `devices` limits the local ones, if given."""

    coordinator: str
    count: int
    process: int
    devices: tuple[int, ...] | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    mode: str = "auto",
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Join the other processes; before anything touches a device. A process on its own has nothing to do.

    The three values come from flags, or with `mode` "auto" from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or from TPU metadata, Slurm, Open MPI or Kubernetes as JAX detects them; "off" never looks.
    Process 0 says in a line what was detected. JAX_LOCAL_DEVICE_IDS names the local devices to use.

    Raises:
      ValueError: flags are given by half or out of range, or a detected cluster cannot be used; names the flags.
      ValueError, OSError: as `visible_devices`.
      TimeoutError: not all processes have started in time; names the missing ones.
    """
    if mode not in MODES:
        raise ValueError(f"distributed: found {mode!r}, expected one of {MODES}")
    member, told = _from_flags(coordinator, num_processes, process_id), ""
    if member is None and mode == "auto":
        member, told = _detect(timeout_s)
    if member is not None and member.count > 1:
        _join(member, told, timeout_s)
    elif chosen := chosen_devices(os.environ):  # JAX itself reads the variable only where processes join
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", ",".join(map(str, chosen)))
    visible_devices()  # here a machine that lacks them is told of once for all


def _join(member: Membership, told: str, timeout_s: float) -> None:
    try:
        hosts = roll_call(member.coordinator, member.count, member.process, timeout_s)
    except TimeoutError as error:
        raise TimeoutError(f"{error} ({told})" if told else str(error)) from error
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        member.coordinator,
        member.count,
        member.process,
        local_device_ids=member.devices,
        cluster_detection_method="deactivate",  # it is decided here
        initialization_timeout=int(timeout_s),
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    _hosts[:] = hosts


def _from_flags(coordinator: str | None, count: int | None, process: int | None) -> Membership | None:
    flags = {"coordinator": coordinator, "num-processes": count, "process-id": process}
    lacking = [f"--{name}" for name, value in flags.items() if value is None]
    if coordinator is None or count is None or process is None:
        if len(lacking) == len(flags):
            return None
        raise ValueError(f"{', '.join(lacking)}: missing; --coordinator, --num-processes and --process-id go together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator: found {coordinator!r}, expected host:port of process 0")
    if count < 1 or not 0 <= process < count:
        raise ValueError(
            f"--num-processes, --process-id: found {count}, {process}, expected at least 1, and 0 to one less than it"
        )
    return Membership(coordinator, count, process)


def _detect(timeout_s: float) -> tuple[Membership | None, str]:
    """Who this process is by the environment, None where it is alone; and what was detected, which process 0 prints."""
    if (named := coordinates(os.environ)) is not None:
        return _from_flags(*named), "by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    around = surroundings(os.environ)
    member = _found_by_jax(around.devices, timeout_s) if around.look else None
    if around.told and (member is None or member.process == 0):
        note(f"found {around.told}")
    return member, around.told


def _found_by_jax(devices: tuple[int, ...] | None, timeout_s: float) -> Membership | None:
    """What JAX finds in the environment; None where it finds no cluster."""
    unset = None, None, None, (), None  # of devices, which are decided here
    try:
        coordinator, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(*unset, int(timeout_s))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"found a cluster, but not its members ({error}); give --coordinator, --num-processes and "
                         "--process-id, or --distributed=off for one process") from error  # fmt: skip
    if coordinator is None or count is None or process is None:
        return None
    return Membership(coordinator, count, process, devices)


# ---- who


def is_main() -> bool:
    """Whether this is process 0, which alone writes metrics, results and pictures."""
    return jax.process_index() == 0


def warn(message: str) -> None:
    """A line on stderr, by process 0 alone."""
    if is_main():
        note(f"warning: {message}")


def is_alone() -> bool:
    """Whether no other process has been joined; asks no device, so that it also answers where there is none."""
    return global_state.num_processes in (None, 1)


def name_of(process: int) -> str:
    """`process 1 (host-b)`."""
    return f"process {process} ({_hosts[process] if _hosts else socket.gethostname()})"


# ---- waiting for each other


def barrier(name: str, timeout_s: float = BARRIER_TIMEOUT_S) -> None:
    """Wait until every process is here.

    Raises:
      TimeoutError: some are not within `timeout_s`; names barrier, processes and hosts.
      ValueError: another process has given up (`failing_together`); says which, and why.
    """
    if jax.process_count() == 1:
        return
    client: Any = global_state.client
    index, sequence = jax.process_index(), next(_barriers)
    here, deadline, pause = f"{_STORE}/barrier/{sequence}/", time.monotonic() + timeout_s, 0.01
    client.key_value_set(f"{here}{index}", name)
    while missing := _missing(places := said_under(here), name):
        for process, reason in said_under(f"{_STORE}/gave_up/").items():
            raise ValueError(f"{name_of(process)}: {reason}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"barrier {name!r}: {_names(missing, places)} not there within {timeout_s:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_S)
    if sequence:  # all have left the one before
        client.key_value_delete(f"{_STORE}/barrier/{sequence - 1}/{index}")


def said_under(folder: str) -> dict[int, str]:
    """What the runtime's key-value store holds under `folder/`, by process, after which the keys are named."""
    client: Any = global_state.client
    return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(folder)}


def _missing(places: Mapping[int, str], name: str) -> list[int]:
    """Who is not at this barrier: nowhere yet, or at another one."""
    return [process for process in range(jax.process_count()) if places.get(process) != name]


def _names(processes: Sequence[int], places: Mapping[int, str]) -> str:
    elsewhere = {process: f", which is at barrier {place!r}," for process, place in places.items()}
    return ", ".join(name_of(process) + elsewhere.get(process, "") for process in processes)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A ValueError in this block on one process is also raised on the others, at their next `barrier`."""
    try:
        yield
    except ValueError as error:
        if jax.process_count() > 1:
            client: Any = global_state.client
            client.key_value_set(f"{_STORE}/gave_up/{jax.process_index()}", str(error), allow_overwrite=True)
        raise


# ---- arrays over all devices


def rows_of(sharding: Sharding, batch_size: int) -> Int[np.ndarray, " n"]:
    """Rows of a global batch that this process's devices hold, ascending, whatever the mesh's layout."""
    shards = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in shards]))


def put_batch(rows: Tree, sharding: Sharding, batch_size: int) -> Tree:
    """Global arrays `[batch_size, …]` from this process's rows of them, in the order of `rows_of`.

    Raises:
      ValueError: a leaf has another number of rows.
    """
    mine = rows_of(sharding, batch_size)
    for leaf in jax.tree.leaves(rows):
        if leaf.shape[0] != len(mine):
            raise ValueError(f"batch: found {leaf.shape[0]} rows, expected {len(mine)}, this process's of {batch_size}")
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return leaf[(slice(*np.searchsorted(mine, (start, stop))), *index[1:])]

        return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(put, rows)


def put_replicated(tree: Tree, sharding: Tree) -> Tree:
    """Global arrays from a tree that every process holds whole, split as `sharding` says (one, or a tree of them).

    Unlike `jax.device_put` it does not compare what the processes hold. Leaves that are global already only move.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any, sharding: Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(sharding, tree))


def spread(tree: Tree, mesh: Mesh) -> Tree:
    """Global arrays, whole on every device of `mesh`, from arrays that are whole on each of this process's devices.

    Those share their memory, whatever mesh they were made on, so that no weights lie there twice; other leaves are put
    there.
    """
    sharding = replicated(mesh)

    def share(leaf: Any) -> jax.Array:
        whole = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
        parts = {shard.device: shard.data for shard in leaf.addressable_shards} if whole else {}
        if not parts.keys() >= set(mesh.local_devices):
            return put_replicated(leaf, sharding)
        own = [parts[device] for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, own)

    return jax.tree.map(share, tree)


def fetch(tree: Tree) -> Tree:
    """Arrays as numpy, whole, on every process; all must call it with the same tree.

    One leaf at a time: a device holds no more than one whole leaf besides its own parts.
    """
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def held_rows(batch: jax.Array) -> np.ndarray:
    """This process's rows of a batch that is split along its leading axis alone, in the order of `rows_of`."""
    if jax.process_count() == 1:
        return np.asarray(batch)
    parts = {shard.index[0].start or 0: shard.data for shard in batch.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def gather_rows(rows: Tree, sharding: Sharding, batch_size: int) -> Tree:
    """Whole batches as numpy on every process from each one's rows, in the order of `rows_of`; to the bit."""
    if jax.process_count() == 1:
        return rows

    def gather(leaf: np.ndarray) -> np.ndarray:
        octets = np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8)  # on devices float64 would be rounded
        whole = fetch(put_batch(octets, sharding, batch_size))
        return whole.view(leaf.dtype).reshape(batch_size, *leaf.shape[1:])

    return jax.tree.map(gather, rows)


def largest(value: int) -> int:
    """The largest of all processes' values, on every process; all must call it."""
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def total(value: int) -> int:
    """The sum of all processes' values, on every process; all must call it."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(value))))


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh for what each process computes by itself: its devices along `fsdp`; `mesh` itself if it is alone."""
    if jax.process_count() == 1:
        return mesh
    devices = np.array(jax.local_devices()).reshape(1, -1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
