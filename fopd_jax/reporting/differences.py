"""Where the configs of runs differ, field by field."""

from collections.abc import Sequence
from typing import Any

from fopd_jax.reporting.reading import distinct
from fopd_jax.reporting.workdirs import Run


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every field of any run's config with the runs' values as text, those that differ first; null: has no such field.

    A folder without a record (`run.json`) tells only what is no default there: its other fields count as unknown.
    """
    told = [run for run in runs if run.config]
    whole = {run.name for run in told if "config" in run.start}
    rows = []
    for field in distinct(name for run in told for name in run.config):
        values = {run.name: _text(run.config[field]) if field in run.config else None for run in told}
        known = {value for name, value in values.items() if value is not None or name in whole}
        rows.append({"field": field, "values": values, "differs": len(known) > 1})
    return sorted(rows, key=lambda row: (not row["differs"], row["field"]))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "(empty)"
