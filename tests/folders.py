"""What stands in a folder, converted or any other."""

from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.interop.files.converted import abstract_params, load_params, read_manifest


def snapshot(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Everything below a folder, hidden or not: files with their time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def load(folder: Path, name: str, dtype: Any = np.float32) -> Any:
    """A converted component's parameters, whole."""
    return load_params(folder, name, abstract_params(read_manifest(folder).component(name), dtype))
