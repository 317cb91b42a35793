"""Compilations for machines that need not be there, each a process of its own whose figures stay."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Fields = dict[str, Any]


def run(name: str, arguments: Sequence[str], work: Path, flags: str = "") -> bool:
    """`fopd_jax.compile_for`, unless its figures are there; whether they are now. What it prints goes to a log.

    `flags`: XLA's, beside those of the environment.
    """
    done = work / f"{name}.json"
    if done.exists():
        return True
    command = [sys.executable, "-m", "fopd_jax.compile_for", *arguments, f"--json={done}"]
    environment = os.environ | ({"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()} if flags else {})
    began = time.monotonic()
    with (work / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    print(f"{name}: {time.monotonic() - began:.0f} s{'' if done.exists() else f'; failed, see {log.name}'}", flush=True)
    return done.exists()


def keep(file: str, names: Iterable[str], work: Path) -> dict[str, Fields]:
    """What there is of the named jobs, new figures over those that `file` below `RESULTS` had; written there."""
    kept = RESULTS / file
    known = json.loads(kept.read_text()) if kept.exists() else {}
    found = {name: work / f"{name}.json" for name in names}
    results = {
        name: json.loads(path.read_text()) if path.exists() else known[name]
        for name, path in found.items()
        if path.exists() or name in known
    }
    write_text(kept, json.dumps(results, indent=2) + "\n")
    return results


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table, its head and the rule below it among them."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
