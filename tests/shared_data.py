"""Public prompt lists and small networks that may lie in a folder beside the checkout; nothing of them is committed."""

from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    """A file or folder among them; the test is skipped, by name, where it is absent."""
    path = _FOLDER / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data, which is not here")
    return path
