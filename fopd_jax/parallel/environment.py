"""What a process's environment says about the others: whether there are any, and which devices are its own.

JAX finds coordinator and numbers (`distributed.initialize`), but gives a process of Slurm or Open MPI the one GPU of
its local number, whatever it sees, and takes a shell inside an allocation for one of its tasks.
"""

import dataclasses
import re
from collections.abc import Mapping

Environment = Mapping[str, str]
IDS = "JAX_LOCAL_DEVICE_IDS"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPEN_MPI = ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_OTHERS = (("MPI", "PMI_SIZE", "PMI_RANK"), ("torchrun", "WORLD_SIZE", "RANK"))
"""Starters that tell how many processes there are, but not what JAX needs to join them."""
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_OFF = "--distributed=off runs this process alone"


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """`look`: whether JAX shall find the other processes. `devices`: of the visible ones those to use; None: all.

    `told`: what was detected, in a line; empty where there is nothing to tell.
    """

    look: bool
    devices: tuple[int, ...] | None = None
    told: str = ""


@dataclasses.dataclass(frozen=True)
class _Node:
    """The processes of one node: this one's number among them, how many they are, and the GPUs given to all of them."""

    process: int
    count: int | None
    gpus: int | None
    own_gpus: bool = False  # whether some were asked for each process


def surroundings(environment: Environment) -> Surroundings:
    """What to do in an environment.

    Raises:
      ValueError: it tells of several processes that cannot be joined, or whose devices cannot be told apart; names the
        variables.
    """
    chosen = chosen_devices(environment)
    if "OMPI_MCA_orte_hnp_uri" in environment:  # before Slurm: it may have been started inside an allocation
        size, rank = (_number(environment, name) for name in _OPEN_MPI[1:])
        local, here = (_number(environment, f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("RANK", "SIZE"))
        node = _Node(local, here, None)
        return _joined(f"Open MPI: process {rank} of {size} (OMPI_COMM_WORLD_SIZE)", environment, chosen, size, node)
    _refuse_others(environment, _OPEN_MPI)
    if all(name in environment for name in _SLURM):
        return _slurm(environment, chosen)
    on_tpu = any(name in environment for name in _TPU)
    if not on_tpu:
        _refuse_others(environment, *_OTHERS)
    if (tasks := environment.get("SLURM_NTASKS", "1")) != "1" and "SLURM_JOB_ID" in environment:
        told = f"Slurm: inside job {environment['SLURM_JOB_ID']} of {tasks} tasks, but not started by srun: runs alone"
        return Surroundings(False, chosen, told + _limits(chosen))
    alone = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" not in environment and not on_tpu
    return Surroundings(not alone, chosen, _limits(chosen).removeprefix("; "))


def _refuse_others(environment: Environment, *starters: tuple[str, str, str]) -> None:
    for starter, size, rank in starters:
        if size in environment and rank in environment and (count := _number(environment, size)) > 1:
            raise ValueError(
                f"found {starter} ({size}={count}), but not the address of process 0; give --coordinator, "
                f"--num-processes and --process-id; {_OFF}"
            )


def _slurm(environment: Environment, chosen: tuple[int, ...] | None) -> Surroundings:
    job, tasks = environment["SLURM_JOB_ID"], _number(environment, "SLURM_NTASKS")
    started = _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else tasks
    if started == 1:
        shell = f"Slurm: in a shell inside job {job} of {tasks} tasks (SLURM_NTASKS), runs alone; srun starts all"
        return Surroundings(False, chosen, ((shell if tasks > 1 else "") + _limits(chosen)).removeprefix("; "))
    gpus = _number(environment, "SLURM_GPUS_ON_NODE") if "SLURM_GPUS_ON_NODE" in environment else None
    own = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    node = _Node(_number(environment, "SLURM_LOCALID"), _tasks_here(environment, started), gpus, own)
    told = f"Slurm: process {_number(environment, 'SLURM_PROCID')} of {tasks} in job {job} (SLURM_NTASKS)"
    return _joined(told, environment, chosen, tasks, node)


def _joined(
    told: str, environment: Environment, chosen: tuple[int, ...] | None, count: int, node: _Node
) -> Surroundings:
    if count == 1:
        return Surroundings(False, chosen, _limits(chosen).removeprefix("; "))
    if chosen is not None:
        return Surroundings(True, chosen, f"{told}{_limits(chosen)}; {_OFF}")
    devices, why = _share(environment, node)
    return Surroundings(True, devices, f"{told}; {why}; {_OFF}")


def _share(environment: Environment, node: _Node) -> tuple[tuple[int, ...] | None, str]:
    """Of the GPUs that a process sees those that are its own, and why; where each sees only its own, all of them."""
    visible = _visible(environment)
    if environment.get("JAX_PLATFORMS", "").startswith(("cpu", "tpu")) or visible == 0 or node.count == 1:
        return None, "uses all devices that it sees"
    if visible == 1 or (visible and node.gpus and visible < node.gpus):
        return None, f"uses all {visible} GPUs that it sees, of {node.gpus or 'those'} on the node"
    if node.own_gpus and (visible is None or not node.gpus):
        return None, "uses all devices that it sees: Slurm was asked for some a task"
    total = visible or node.gpus
    if total is None or node.count is None:  # one process a GPU is what JAX expects
        return (node.process,), f"uses GPU {node.process} of its node, by its local number"
    if total % node.count:
        raise ValueError(
            f"found {total} GPUs on this node for {node.count} processes, expected a number of processes that divides "
            f"them; or say which are this one's in {IDS}"
        )
    each = total // node.count
    mine = tuple(range(node.process * each, (node.process + 1) * each))
    return mine, f"uses {', '.join(map(str, mine))} of {total} GPUs, its share among {node.count} processes of the node"


def coordinates(environment: Environment) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and number of this one, where JAX's own variables say all three."""
    if any(not environment.get(name) for name in _JAX):
        return None
    return environment[_JAX[0]], _number(environment, _JAX[1]), _number(environment, _JAX[2])


def chosen_devices(environment: Environment) -> tuple[int, ...] | None:
    """The devices that the user names."""
    if not (text := environment.get(IDS, "").strip()):
        return None
    if not re.fullmatch(r"\d+( *, *\d+)*", text):
        raise ValueError(f"{IDS}: found {text!r}, expected numbers of devices, as 0,1")
    return tuple(int(number) for number in text.split(","))


def _limits(chosen: tuple[int, ...] | None) -> str:
    return "" if chosen is None else f"; uses devices {','.join(map(str, chosen))} alone ({IDS})"


def _visible(environment: Environment) -> int | None:
    """GPUs that the process sees; None: all there are."""
    for name in _VISIBLE:
        if name in environment:
            names = [each.strip() for each in environment[name].split(",")]
            # What comes after an invalid name is not seen.
            return next((i for i, each in enumerate(names) if each in ("", "-1", "NoDevFiles")), len(names))
    return None


def _tasks_here(environment: Environment, tasks: int) -> int | None:
    """Of a step's tasks those on this node: `8(x2),4` are 8, 8 and 4."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if text and (groups := re.findall(r"(\d+)(?:\(x(\d+)\))?", text)):
        each = [int(count) for count, times in groups for _ in range(int(times or 1))]
        node = int(environment.get("SLURM_NODEID", "0"))
        return each[node] if node < len(each) else each[-1]
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")
    return tasks // int(nodes) if nodes and nodes.isdecimal() and tasks % int(nodes) == 0 else None


def _number(environment: Environment, name: str) -> int:
    if not (text := environment.get(name, "")).isdecimal():
        raise ValueError(f"{name}: found {text!r}, expected a whole number; {_OFF}")
    return int(text)
