"""Every launcher is clean shell, tells its parameters, refuses what it does not know, and dry runs run nothing."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")))
PROGRAM = ("-m", "fopd_jax.main")
ARGUMENTS = ("--", "--config.steps=3", "--config.name=a 'quoted' name")
GKE = ("--image=registry/fopd:1", "--shared=gs://bucket")
XPK = ("--cluster=c", "--zone=z", "--docker-image=registry/fopd:1", "--storage=disk")
TPU = ("--zone=z", "--shared=gs://bucket", "--project=p", "--spot=1", "--service-account=me@p")
RUNS = {  # the launcher's words for starting a run
    "gke.sh": ("run", *GKE),
    "slurm.sbatch": (),
    "tpu_pod.sh": ("run", *TPU),
    "tpu_worker.sh": ("start",),
    "xpk.sh": ("run", *XPK),
}
DRY_RUNS = [
    *((script, words) for script, words in RUNS.items()),
    *(("gke.sh", (verb, *GKE)) for verb in ("image", "status", "logs", "stop")),
    ("gke.sh", ("run", "--image=i", "--shared=pvc:claim", "--accelerator=gpu", "--hosts=4")),
    *(("tpu_pod.sh", (verb, *TPU)) for verb in ("logs", "status", "stop", "delete")),
    *(("tpu_worker.sh", (verb, "--shared=nfs.local:/export")) for verb in ("install", "follow", "state", "logs")),
    *(("xpk.sh", (verb, *XPK)) for verb in ("list", "stop")),
]


def commands(output: str) -> list[list[str]]:
    """The words of every command that a dry run has printed."""
    return [shlex.split(line.split("+ ", 1)[1]) for line in output.splitlines() if re.match(r"( *host )?\+ ", line)]


def test_shell_is_clean() -> None:
    assert {*RUNS, "common.sh"} <= set(SCRIPTS)
    shellcheck = shutil.which("shellcheck")
    assert shellcheck, "not installed: pip install -e '.[test]'"
    files = [f"launch/{name}" for name in SCRIPTS]
    done = subprocess.run([shellcheck, "-x", *files], cwd=LAUNCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "words"), DRY_RUNS, ids=lambda value: value if isinstance(value, str) else value[:1]
)
def test_dry_run_runs_nothing(shell, script, words) -> None:
    printed = shell.run(script, *words, "--dry-run", *ARGUMENTS).stdout
    assert commands(printed)
    assert shell.calls() == []


def test_stubs_would_notice(shell) -> None:
    shell.run("gke.sh", "status")
    assert shell.calls()[0] == "kubectl --namespace=default get jobset fopd"


@pytest.mark.parametrize("script", RUNS)
def test_program_gets_its_arguments_whole(shell, script) -> None:
    printed = shell.run(script, *RUNS[script], "--dry-run", *ARGUMENTS).stdout
    if script == "gke.sh":
        import yaml

        container = yaml.safe_load(printed.split("\n", 1)[1])["spec"]["replicatedJobs"][0]["template"]["spec"]
        program = container["template"]["spec"]["containers"][0]["command"]
    elif script == "xpk.sh":
        (created,) = (words for words in commands(printed) if words[:3] == ["xpk", "workload", "create"])
        (line,) = (word.removeprefix("--command=") for word in created if word.startswith("--command="))
        program = shlex.split(line)
    else:
        (program,) = (words for words in commands(printed) if PROGRAM[1] in words)
    start = program.index(PROGRAM[0])
    assert tuple(program[start : start + 2]) == PROGRAM
    assert program[start + 2].endswith("configs/sd35m_opd.py")
    assert "--workdir=runs/sd35m_opd" in program
    assert program[-2:] == list(ARGUMENTS[1:])


@pytest.mark.parametrize("script", [*RUNS, "local.sh"])
def test_help_names_every_parameter(shell, script) -> None:
    text = shell.run(script, "--help").stdout
    parameters = re.findall(r'^: "\$\{([A-Z_]+):=', (LAUNCH / script).read_text(), re.MULTILINE)
    assert parameters
    flags = [f"--{name.lower().replace('_', '-')}=" for name in parameters]
    assert all(re.search(rf"^  {flag}\S* {{2,}}\S", text, re.MULTILINE) for flag in [*flags, "--dry-run", "--help"])
    assert not re.search(r"[$][{({]|:=|shellcheck|SBATCH|^set ", text, re.MULTILINE)
    assert shell.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_pod.sh", ("run",), "--zone is needed"),
        ("tpu_pod.sh", ("run", "--zonee=z"), "no such flag: --zonee"),
        ("tpu_pod.sh", ("walk", "--zone=z"), "found 'walk', expected run, logs"),
        ("tpu_pod.sh", ("run", "--zone=z", "--dry-run", "--accelerator-type=v9-8"), "--runtime-version is needed"),
        ("tpu_worker.sh", ("install", "--dry-run", "--shared=bucket"), "--shared: found 'bucket', expected gs://"),
        ("gke.sh", ("render", "--image=i"), "--shared is needed"),
        ("gke.sh", ("render", "--image=i", "--shared=b"), "--shared: found 'b', expected gs://BUCKET or pvc:CLAIM"),
        ("gke.sh", ("render", *GKE, "--accelerator=npu"), "--accelerator: found 'npu', expected tpu or gpu"),
        ("gke.sh", ("render", *GKE, "--accelerator=gpu"), "--hosts is needed"),
        ("gke.sh", ("render", *GKE, "--topology=3x3"), "--topology: 3x3 has 9 chips"),
        ("gke.sh", ("render", *GKE, "--accelerator=gpu", "--hosts=2", "--slices=2"), "--slices: found 2, expected 1"),
        ("gke.sh", ("render", *GKE, "--xla-flags-file=none.txt"), "--xla-flags-file: cannot read 'none.txt'"),
        ("xpk.sh", ("run", "--cluster=c", "--zone=z"), "--docker-image is needed"),
        ("slurm.sbatch", ("steps=3",), "found 'steps=3', expected --name=value"),
        (
            "tpu_pod.sh",
            ("run", "--zone=z", "--", "batch_size=512"),
            "found 'batch_size=512' after --, expected a flag of",
        ),
        (
            "gke.sh",
            ("run", *GKE, "--", "--config.seed", "1", "2"),
            "found '2' after --, expected a flag of the program",
        ),
        ("slurm.sbatch", ("--max-restarts=few",), "--max-restarts: found 'few', expected a whole number"),
        ("slurm.sbatch", ("--memory-fraction=92",), "--memory-fraction: found '92', expected a share"),
        ("slurm.sbatch", ("--config=configs/none.py",), "--config: cannot read 'configs/none.py'"),
        ("slurm.sbatch", ("--workdir=gs://bucket/run",), "--workdir: found 'gs://bucket/run', expected a folder"),
        ("local.sh", ("--processes=0",), "--processes: found '0', expected a whole number from 1 on"),
        ("local.sh", ("--processes=999999999", "--dry-run"), "--processes: found 999999999, expected at most 1024"),
        ("local.sh", ("--gpus=2", "--simulated-devices=2"), "--gpus, --simulated-devices: found both, expected one"),
        ("local.sh", ("--port=99999",), "--port: found 99999, expected a port, at most 65535"),
        ("local.sh", ("--config=configs",), "--config: cannot read 'configs'"),
        ("local.sh", ("--workdir=a\nb",), "--workdir: found $'a\\nb', expected a folder"),
        ("local.sh", ("--python=/no/python",), "--python: found '/no/python', expected a program"),
        ("local.sh", (f"--logs={__file__}",), f"--logs: {__file__} is no folder"),
        ("slurm.sbatch", ("--config=configs",), "--config: cannot read 'configs'"),
        ("slurm.sbatch", ("--workdir=/mnt/a\nb",), "--workdir: found $'/mnt/a\\nb', expected a folder"),
        ("local.sh", ("--gpus=two",), "--gpus: found 'two', expected a whole number from 1 on"),
        ("local.sh", ("--port=http",), "--port: found 'http', expected a port"),
        ("local.sh", ("--processes=3", "--gpus=8"), "--gpus: found 8, expected a multiple of --processes (3)"),
        ("tpu_pod.sh", ("run", "--zone=z", "--shared=bucket"), "--shared: found 'bucket', expected gs://BUCKET or"),
        ("tpu_pod.sh", ("run", "--zone=z", "--spot=yes"), "--spot: found 'yes', expected 1 or nothing"),
        ("tpu_pod.sh", ("run", "--zone=z", "--tpu-name=My_Pod"), "--tpu-name: found 'My_Pod', expected at most 40"),
        ("tpu_pod.sh", ("run", "--zone=z", "--mount=shared"), "--mount: found 'shared', expected an absolute path"),
        ("tpu_pod.sh", ("run", "--zone=z", "--config=none.py"), "--config: cannot read 'none.py'"),
        ("tpu_pod.sh", ("run", "--zone=z", "--poll-seconds=1m"), "--poll-seconds: found '1m', expected a whole"),
        ("tpu_pod.sh", ("run", "--zone=z", "--grace-seconds=0"), "--grace-seconds: found '0', expected a whole"),
        ("tpu_pod.sh", ("run", "--zone=z", "--xla-flags-file=none.txt"), "--xla-flags-file: cannot read 'none.txt'"),
        ("tpu_pod.sh", ("run", "--zone=z", "--accelerator-type=v6e"), "--runtime-version is needed"),
        ("tpu_pod.sh", ("run", "--zone=z", "--accelerator-type=v6e-x"), "--accelerator-type: found 'v6e-x'"),
        ("gke.sh", ("run", *GKE, "--topology=16by16"), "--topology: found '16by16', expected chips a side"),
        ("gke.sh", ("run", *GKE, "--slices=a[0]"), "--slices: found 'a[0]', expected a whole number from 1 on"),
        ("gke.sh", ("run", *GKE, "--max-restarts=-1"), "--max-restarts: found '-1', expected a whole number"),
        ("gke.sh", ("run", *GKE, "--name=Fopd_1"), "--name: found 'Fopd_1', expected at most 40 of a-z"),
        ("xpk.sh", ("run", *XPK, "--priority=urgent"), "--priority: found 'urgent', expected very-low, low, medium"),
        ("xpk.sh", ("run", *XPK, "--num-slices=2.5"), "--num-slices: found '2.5', expected a whole number"),
        ("xpk.sh", ("run", *XPK, "--tpu-type=v6e"), "--tpu-type: found 'v6e', expected a kind and a number"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(shell, script, words, message) -> None:
    done = shell.run(script, *words, status=2)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert shell.calls() == []


def test_parameters_come_from_the_environment_and_flags_win(shell) -> None:
    variables = {"NAME": "theirs", "NAMESPACE": "theirs"}
    (words, _) = commands(shell.run("gke.sh", "status", "--name=mine", "--dry-run", variables=variables).stdout)
    assert words == ["kubectl", "--namespace=theirs", "get", "jobset", "mine"]


def test_no_secrets_in_files() -> None:
    secret = re.compile(r"(password|token|secret|api[_-]?key|private[_-]?key)\s*[:=]|BEGIN .*PRIVATE", re.IGNORECASE)
    files = [path for path in LAUNCH.rglob("*") if path.is_file()]
    assert not [
        f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if secret.search(line)
    ]
