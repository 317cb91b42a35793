"""Launchers in a world where every command that could do anything is a stub that writes down that it was called."""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
HARMLESS = ("bash", "dirname", "env", "grep", "id", "paste", "sed", "seq", "sleep", "tail", "tr")
STUBBED = (
    "apt-get", "curl", "docker", "gcloud", "gcsfuse", "git", "journalctl", "kubectl", "mount", "mountpoint", "pip",
    "python", "python3", "rm", "sbatch", "scancel", "scontrol", "scp", "squeue", "srun", "ssh", "sudo", "systemctl",
    "systemd-run", "uv", "xpk",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shell:
    """`commands` is the whole PATH; `log` has a line for each call of a stub: its name and its arguments."""

    commands: Path
    log: Path

    def stub(self, name: str, body: str = "") -> None:
        """A command that writes down its call and then does `body`."""
        path = self.commands / name
        path.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >>"{self.log}"\n{body}\n')
        path.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.commands), "HOME": str(self.commands), "TMPDIR": str(self.log.parent), **variables}

    def run(
        self, script: str, *arguments: str, status: int = 0, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The launcher's output; it must end with `status`."""
        command = [str(shutil.which("bash")), str(LAUNCH / script), *arguments]
        environment = self.environment(**(variables or {}))
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert done.returncode == status, done.stderr or done.stdout
        return done

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in HARMLESS:
        os.symlink(str(shutil.which(name)), commands / name)
    shell = Shell(commands, tmp_path / "calls.log")
    for name in STUBBED:
        shell.stub(name)
    return shell
