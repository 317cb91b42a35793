"""Packages that only some rewards need."""

import importlib.util


def need(field: str, extra: str, *packages: str) -> None:
    """Raises ValueError, naming the field and the extra that brings it, for a package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{field}: needs {package}: pip install 'fopd_jax[{extra}]'")
