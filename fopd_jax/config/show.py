"""A whole config to read: every field with its value, where that comes from, its meaning and the authors' value."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from typing import Any

from fopd_jax.config.identity import default_of
from fopd_jax.config.parse import flatten
from fopd_jax.config.schema import Config
from fopd_jax.config.section import Section


def describe(config: Config, flags: Collection[str]) -> str:
    """One line a field: `a.b = value  [origin]  meaning; paper's value`. `flags`: what the command line set.

    Origin is `flag`, `file` where the config's file deviates from the schema's default, else `default`.
    """
    meanings = dict(documents(config))
    rows = []
    for name, value in flatten(config).items():
        set_here = any(f"{name}.".startswith(f"{flag}.") for flag in flags)  # itself, or the dict that it is in
        where = "flag" if set_here else "default" if _plain(value) == default_of(config.stage, name) else "file"
        rows.append((name, json.dumps(value), where, meanings.get(name, meanings.get(name.rpartition(".")[0], ""))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}} = {value:<{min(widths[1], 44)}}  {where:<{widths[2]}}  {meaning}".rstrip()
        for name, value, where, meaning in rows
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def documents(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Meanings by dotted field."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from documents(value, f"{path}.{name}")
    if not isinstance(node, Section):
        return
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        name = f"{path}.{field.name}" if path else field.name
        paper = field.metadata["paper"]
        yield name, field.metadata["doc"] + (f" {paper}" if paper else "")
        yield from documents(getattr(node, field.name), name)
