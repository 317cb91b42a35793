"""What is made of environments as starters leave them."""

from typing import Any

import pytest

from fopd_jax.parallel.environment import Surroundings, chosen_devices, coordinates, surroundings


def slurm(tasks: int, here: str, *, process: int = 0, local: int = 0, **more: str) -> dict[str, str]:
    """A task that srun has started."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": here, "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(local), "SLURM_NODEID": "0", **more,
    }  # fmt: skip


EIGHT: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
FOUND: dict[str, tuple[dict[str, str], bool, tuple[int, ...] | None, str]] = {
    "nothing": ({}, True, None, ""),
    "one TPU VM": ({"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_SKIP_MDS_QUERY": "1"}, True, None, ""),
    "GKE, TPUs": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1",
                   "JOB_COMPLETION_INDEX": "1"}, True, None, ""),
    "GKE, one TPU pod without a job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "localhost"},
                                       True, None, ""),
    "Kubernetes, an indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, None,
                                   ""),
    "Kubernetes, a notebook": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None, ""),
    "Slurm, a task a node": (slurm(2, "1(x2)", **EIGHT), True, None, "uses all devices that it sees"),
    "Slurm, a task a node, GPUs not managed": (slurm(2, "1(x2)"), True, None, "uses all devices that it sees"),
    "Slurm, a task a GPU, all visible": (slurm(16, "8(x2)", process=13, local=5, **EIGHT), True, (5,), "uses 5 of 8"),
    "Slurm, half the tasks": (slurm(4, "2(x2)", process=3, local=1, **EIGHT), True, (4, 5, 6, 7), "uses 4, 5, 6, 7 of"),
    "Slurm, unlike nodes": (slurm(6, "4,2", process=5, local=1, SLURM_NODEID="1", SLURM_GPUS_ON_NODE="4"), True,
                            (2, 3), "uses 2, 3 of 4 GPUs, its share among 2 processes"),
    "Slurm, --gpus-per-task=1": (slurm(16, "8(x2)", process=1, local=1, CUDA_VISIBLE_DEVICES="0",
                                       SLURM_GPUS_ON_NODE="8"), True, None, "uses all 1 GPUs that it sees, of 8"),
    "Slurm, --gpus-per-task=4": (slurm(4, "2(x2)", local=1, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b,GPU-c,GPU-d",
                                       SLURM_GPUS_ON_NODE="8"), True, None, "uses all 4 GPUs that it sees, of 8"),
    "Slurm, GPUs a task, hidden otherwise": (slurm(4, "2(x2)", local=1, SLURM_GPUS_PER_TASK="4"), True, None,
                                             "Slurm was asked for some a task"),
    "Slurm, GPUs not managed": (slurm(4, "2(x2)", local=1), True, (1,), "uses GPU 1 of its node"),
    "Slurm, CPU": (slurm(4, "2(x2)", local=1, JAX_PLATFORMS="cpu", **EIGHT), True, None, "uses all devices"),
    "Slurm, no GPU": (slurm(4, "2(x2)", local=1, CUDA_VISIBLE_DEVICES=""), True, None, "uses all devices"),
    "Slurm, devices named": (slurm(4, "2(x2)", local=1, JAX_LOCAL_DEVICE_IDS="2,3", **EIGHT), True, (2, 3),
                             "uses devices 2,3 alone (JAX_LOCAL_DEVICE_IDS)"),
    "Slurm, a lone task": (slurm(1, "1", **EIGHT), False, None, ""),
    "Slurm, a shell of salloc": (slurm(4, "1") | {"SLURM_STEP_NUM_TASKS": "1"}, False, None,
                                 "Slurm: in a shell inside job 7 of 4 tasks (SLURM_NTASKS), runs alone"),
    "Slurm, a batch script": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None,
                              "Slurm: inside job 7 of 4 tasks, but not started by srun: runs alone"),
    "Open MPI": (OPEN_MPI, True, (1,), "Open MPI: process 3 of 4"),
    "Open MPI, four GPUs": (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, True, (2, 3), "uses 2, 3 of 4 GPUs"),
    "Open MPI, inside an allocation": (OPEN_MPI | slurm(4, "1"), True, (1,), "Open MPI: process 3 of 4"),
    "Open MPI, one": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False, None, ""),
    "devices named": ({"JAX_LOCAL_DEVICE_IDS": "1"}, True, (1,), "uses devices 1 alone (JAX_LOCAL_DEVICE_IDS)"),
    "a rank of nobody's": ({"WORLD_SIZE": "4"}, True, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_an_environment_is_understood(name: str):
    environment, look, devices, told = FOUND[name]
    found = surroundings(environment)
    assert (found.look, found.devices) == (look, devices)
    assert told in found.told
    assert bool(told) == bool(found.told)
    assert "\n" not in found.told
    assert not found.told.startswith(";")
    assert ("--distributed=off" in found.told) == (look and name.startswith(("Slurm", "Open MPI")))


def test_every_process_of_a_node_has_its_own_devices():
    found = [surroundings(slurm(4, "4", process=i, local=i, **EIGHT)).devices for i in range(4)]
    assert found == [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (slurm(3, "3", **EIGHT), "found 8 GPUs on this node for 3 processes, expected a number of"),
        (slurm(2, "2") | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS: found 'two', expected a whole number; --dis"),
        ({"JAX_LOCAL_DEVICE_IDS": "0,x"}, "JAX_LOCAL_DEVICE_IDS: found '0,x', expected numbers of devices, as 0,1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, r"found Open MPI \(OMPI_COMM_WORLD_SIZE=4\), "),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"found MPI \(PMI_SIZE=2\), but not the address of process 0; give"),
        ({"WORLD_SIZE": "8", "RANK": "3"}, r"found torchrun \(WORLD_SIZE=8\), .*; --distributed=off runs this process"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        surroundings(environment)


def test_jax_own_variables_are_taken():
    named = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert coordinates(named) == ("a:1", 2, 1)
    assert coordinates({"JAX_COORDINATOR_ADDRESS": "a:1"}) is None
    assert chosen_devices({"JAX_LOCAL_DEVICE_IDS": "0, 3"}) == (0, 3)
    assert surroundings({}) == Surroundings(True)
