"""The rendered JobSet against the schemas of JobSet and of Kubernetes, and what a restart rests on."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fopd_jax.exits import BAD_INPUT

KUBERNETES = ("1.30", "1.34")  # versions of GKE's clusters, old and new
SCHEMA = json.loads(Path(__file__).with_name("jobset_v1alpha2.schema.json").read_text())
IMAGE = "--image=europe-docker.pkg.dev/project/images/fopd:1"
VARIANTS = {
    "tpu": ("--shared=gs://bucket",),
    "tpu, 4 slices, spot": (
        "--shared=pvc:claim", "--topology=4x4x4", "--node-type=tpu-v5p-slice", "--slices=4", "--spot=1",
    ),
    "gpu": ("--shared=pvc:claim", "--accelerator=gpu", "--hosts=4"),
    "gpu, bucket, spot": ("--shared=gs://bucket", "--accelerator=gpu", "--hosts=2", "--spot=1"),
}  # fmt: skip


def render(shell, *flags: str) -> dict[str, Any]:
    return yaml.safe_load(shell.run("gke.sh", "render", IMAGE, *flags).stdout)


def job(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def check(jobset: dict[str, Any]) -> None:
    jsonschema.validate(jobset, SCHEMA)
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job(jobset)}
    for version in KUBERNETES:
        kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_follows_the_schemas(shell, flags) -> None:
    jobset = render(shell, *flags)
    check(jobset)
    assert "${" not in json.dumps(jobset)


def test_schemas_notice_mistakes(shell) -> None:
    jobset = render(shell, *VARIANTS["tpu"])
    for place, mistake in (
        (lambda it: it["spec"]["failurePolicy"], {"maxRestart": 3}),
        (lambda it: it["spec"]["failurePolicy"]["rules"][0], {"action": "Restart"}),
        (lambda it: job(it), {"backofLimit": 0}),
        (lambda it: job(it)["podFailurePolicy"]["rules"][0], {"onPodConditions": "DisruptionTarget"}),
        (lambda it: job(it)["template"]["spec"], {"terminationGracePeriod": 60}),
        (lambda it: job(it)["template"]["spec"]["containers"][0], {"command": "python"}),
    ):
        wrong = copy.deepcopy(jobset)
        place(wrong).update(mistake)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(wrong)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_survives_preemption(shell, flags) -> None:
    jobset = render(shell, *flags)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    _, rule = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert job(jobset)["backoffLimit"] == 0
    failure, _ = job(jobset)["podFailurePolicy"]["rules"]
    assert failure["action"] == "FailJob"
    assert failure["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = job(jobset)["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert pod["containers"][0]["command"][0] == "python"  # a shell would keep SIGTERM to itself


def test_bad_input_is_not_tried_again(shell) -> None:
    """Both rules fail the Job for the same reason: JobSet, from 0.10 on, tells them apart by the message's index."""
    jobset = render(shell, *VARIANTS["tpu"])
    rule, _ = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    _, failure = job(jobset)["podFailurePolicy"]["rules"]
    name = job(jobset)["template"]["spec"]["containers"][0]["name"]
    assert failure["onExitCodes"] == {"containerName": name, "operator": "In", "values": [BAD_INPUT]}
    (pattern,) = rule["onJobFailureMessagePatterns"]
    told = "Container train for pod default/fopd-slice-0-0 failed with exit code 2 matching FailJob rule at index {}"
    assert re.search(pattern, told.format(1))
    assert not re.search(pattern, told.format(0))


def test_tpu_slices(shell) -> None:
    jobset = render(shell, *VARIANTS["tpu, 4 slices, spot"])
    pod = job(jobset)["template"]["spec"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 4
    assert job(jobset)["parallelism"] == job(jobset)["completions"] == 64 // 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert "--distributed=auto" in pod["containers"][0]["command"]
    environment = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert environment["LIBTPU_INIT_ARGS"].startswith("--xla")


def test_gpu_hosts_are_told_of_one_another(shell) -> None:
    jobset = render(shell, *VARIANTS["gpu"], "--name=mine")
    pod = job(jobset)["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert "--coordinator=mine-slice-0-0.mine:8476" in command
    assert "--num-processes=4" in command
    assert "--process-id=$(HOST_INDEX)" in command
    assert pod["containers"][0]["env"][0]["name"] == "HOST_INDEX"  # Kubernetes replaces only what comes before
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert job(jobset)["parallelism"] == 4


def test_all_hosts_mount_the_shared_folder_they_work_in(shell) -> None:
    pod = job(render(shell, *VARIANTS["gpu"], "--mount=/data"))["template"]["spec"]
    assert pod["volumes"][0] == {"name": "shared", "persistentVolumeClaim": {"claimName": "claim"}}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "shared", "mountPath": "/data"}
    assert pod["containers"][0]["workingDir"] == "/data"
    bucket = job(render(shell, *VARIANTS["tpu"]))["template"]
    assert bucket["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert bucket["spec"]["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"


@pytest.mark.parametrize("word", ['a "quoted" \\ & word', "${MOUNT} ${VOLUME}", "$(HOST_INDEX)"])
def test_arguments_stay_whole(shell, word) -> None:
    word = f"--config.name={word}"
    jobset = yaml.safe_load(shell.run("gke.sh", "render", IMAGE, *VARIANTS["gpu"], "--", word).stdout)
    check(jobset)
    assert job(jobset)["template"]["spec"]["containers"][0]["command"][-1] == word


def test_run_hands_the_jobset_to_kubectl(shell, tmp_path) -> None:
    shell.stub("kubectl", f'tail -n +1 >"{tmp_path}/applied.yaml"')
    shell.run("gke.sh", "run", IMAGE, *VARIANTS["gpu"], "--namespace=team")
    assert shell.calls() == ["kubectl --namespace=team apply --filename=-"]
    check(yaml.safe_load((tmp_path / "applied.yaml").read_text()))


def test_a_failing_kubectl_fails_the_launcher(shell) -> None:
    shell.stub("kubectl", "exit 7")
    shell.run("gke.sh", "run", IMAGE, *VARIANTS["gpu"], status=7)
