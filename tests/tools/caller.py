"""The command line of `tools/convert_sd35_weights.py`, called in this process."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.folders import snapshot


def messages(text: str) -> list[str]:
    """Lines of standard error, progress bars aside."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and "B/s]" not in line]


@dataclasses.dataclass
class Caller:
    """Runs the command line in this process and expects one line; `tmp_path` must be as it was before."""

    tool: ModuleType
    capfd: pytest.CaptureFixture[str]
    folder: Path

    def fails(self, arguments: Sequence[str | Path], message: str, status: int = 2) -> None:
        before = snapshot(self.folder)
        with pytest.raises(SystemExit) as stop:
            self.tool.main([str(argument) for argument in arguments])
        output, errors = self.capfd.readouterr()
        assert (stop.value.code, output) == (status, "")
        (line,) = messages(errors)
        assert re.search(f"^error: .*{message}", line), line
        assert "Traceback" not in line
        assert len(line) < 500
        assert snapshot(self.folder) == before

    def says(self, arguments: Sequence[str | Path], message: str) -> None:
        self.tool.main([str(argument) for argument in arguments])
        output, errors = self.capfd.readouterr()
        assert (output, messages(errors)) == (message + "\n", [])
