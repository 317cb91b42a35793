"""The table of all estimates that are kept, from their JSON.

    python benchmarks/estimates.py [FOLDER]

Each is a file `estimate_NAME.json` in FOLDER (benchmarks/results), made by

    python -m fopd_jax.benchmark --config=configs/sd35m_opd.py --teachers=4 --estimate --topology=v6e:2x2 \\
        --batch=4 --json=benchmarks/results/estimate_update_v6e.json

or, of one forward, with `--forward=base --batch=8`. What the compiler estimates is not measured.
"""

import json
import sys
from pathlib import Path
from typing import Any

from fopd_jax.performance.estimate import KINDS

RESULTS = Path(__file__).parent / "results"
Fields = dict[str, Any]


def table(found: list[Fields]) -> str:
    """Markdown, one row a program and phase; shares of cycles by kind."""
    head = ("program", "chip", "remat", "M cycles", "estimated MFU", "bound", *KINDS)
    rows = [head, ("---",) * len(head), *(row for fields in found for row in _rows(fields))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rows(fields: Fields) -> list[tuple[str, ...]]:
    estimate = fields["estimate"]
    name = f"{fields['program']}, {fields['batch_size']} {'rows' if 'forward' in fields['program'] else 'images'}"
    bound = estimate["bounds"]["compiled"]
    rows = [_row(f"**{name}**", fields, estimate, "" if bound is None else f"{bound:.0%}")]
    if fields["program"] == "update":
        rows += [_row(f"of it {phase}", fields, row, "") for phase, row in estimate["phases"].items()]
    return rows


def _row(name: str, fields: Fields, part: Fields, bound: str) -> tuple[str, ...]:
    mfu = "" if part["mfu"] is None else f"{part['mfu']:.1%}"
    shares = (f"{part['kinds'][kind] / part['cycles']:.0%}" for kind in KINDS)
    return name, fields["estimate"]["chip"], fields["remat"], f"{part['cycles'] / 1e6:.0f}", mfu, bound, *shares


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("estimate_*.json"))]
    print(table(found), end="")


if __name__ == "__main__":
    main()
