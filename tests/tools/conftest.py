"""The command line of `tools/convert_sd35_weights.py`."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.tools.caller import Caller


@pytest.fixture
def call(load_script: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Caller:
    return Caller(load_script("tools/convert_sd35_weights.py"), capfd, tmp_path)
