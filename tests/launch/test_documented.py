"""Every command that README and docs give for many devices is one that launchers and program accept: on 32 of them."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_dry_run import commands
from tests.quick import environment

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/running-at-scale.md")
DEVICES = 32
PROGRAM = "fopd_jax.main"
Run = tuple[str, tuple[str, ...]]
"""A config's file and the fields that the command sets."""


def documented(page: str) -> list[list[str]]:
    """The words of every whole command in a page's shell blocks; those with a part left out (…) are none."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "…" not in line]


def launched() -> list[list[str]]:
    """Every documented start of a launcher."""
    words = [each for page in PAGES for each in documented(page)]
    starts = [each[each.index(script) :] for each in words for script in each[:4] if script.startswith("launch/")]
    return [each for each in starts if each[1:2] == ["run"] or each[0] in ("launch/local.sh", "launch/slurm.sbatch")]


def run_of(words: list[str]) -> Run:
    config = next(word.removeprefix("--config=") for word in words if word.startswith("--config="))
    return config[config.index("configs/") :], tuple(word for word in words if word.startswith("--config."))


@pytest.fixture
def runs(shell) -> list[Run]:
    """What every documented command makes the program run."""
    words = [each for page in PAGES for each in documented(page) if PROGRAM in each]
    found = [
        run_of(each) for each in words if any(word.startswith("--config=") for word in each)
    ]  # not a workdir alone
    for script, *flags in launched():
        place = flags.index("--") if "--" in flags else len(flags)
        printed = shell.run(Path(script).name, *flags[:place], "--dry-run", *flags[place:]).stdout
        words = [word for line in commands(printed) for word in line]
        words += [word for word in words if PROGRAM in word for word in shlex.split(word)]  # as XPK's --command
        words += [word for line in re.findall(r"command: (\[.*)", printed) for word in json.loads(line)]  # a JobSet's
        assert PROGRAM in words
        found.append(run_of(words[words.index(PROGRAM) :]))
    return list(dict.fromkeys(found))


def test_pages_give_commands_for_every_launcher():
    assert {words[0] for words in launched()} == {
        f"launch/{name}" for name in ("tpu_pod.sh", "gke.sh", "xpk.sh", "slurm.sbatch", "local.sh")
    }


def test_every_command_runs_on_many_devices(runs: list[Run], converted_pipeline: Path, tmp_path: Path):
    assert len(runs) >= 6
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(runs), str(converted_pipeline), str(tmp_path)],
        cwd=ROOT, env=environment(DEVICES), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(runs)} accepted"


def value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)


def accept(run: Run, folder: Path, scratch: Path) -> None:
    """All that a program checks before it compiles; SD3.5's networks are played by small ones."""
    from functools import partial

    import jax

    from fopd_jax.config.parse import current_name, override, resolve
    from fopd_jax.parallel.mesh import make_mesh
    from fopd_jax.parallel.sharding import batch_ways
    from fopd_jax.stages.registry import find_stage
    from fopd_jax.stages.setup import make_setup
    from fopd_jax.tasks.prompts import read_tasks
    from tests.configs import load

    file, flags = run
    pairs = [flag.removeprefix("--config.").split("=", 1) for flag in flags]
    config = override(resolve(load(Path(file).stem)), {current_name(name): value(text) for name, text in pairs})
    mesh = make_mesh(config.run.mesh)
    assert mesh.size == jax.device_count() == DEVICES
    find_stage(config).programs(config, mesh)
    prompts = {f"tasks.{name}.{split}": str(scratch / "prompts.txt") for name in config.tasks
               for split in ("prompts", "test")}  # fmt: skip
    small = {"model.path": str(folder), "model.preset": "custom", "model.resolution": 64, **prompts}
    if config.model.preset != "miniature":
        config = override(config, small | {"run.mesh.fsdp": 1, "run.mesh.data": -1})
    setup = make_setup(config, partial(read_tasks, config.tasks))
    assert setup.eval_set.made_at_once % batch_ways(setup.pipeline.mesh) == 0


def main(runs: list[Run], folder: Path, scratch: Path) -> None:
    (scratch / "prompts.txt").write_text("a photo of a cat\n")
    os.chdir(scratch)  # nothing is left in the repository
    for run in runs:
        accept(run, folder, scratch)
    print(f"{len(runs)} accepted")


if __name__ == "__main__":
    main([(file, tuple(flags)) for file, flags in json.loads(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]))
