"""What a chip took for an update beside what the TPU compiler estimated for it.

    python benchmarks/beside_estimate.py MEASURED.json ESTIMATE.json

Both are files of `python -m fopd_jax.benchmark --json=…`, the second with `--estimate`, of the same config, teachers,
rematerialisation and images a chip. Utilisation is of the chip's nominal peak; the last column says by how much the
estimate, which knows no waits for DMA, is too good.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
# The estimate's phases, and those that are timed by ablation.
PHASES = {
    "rollout": ("rollout",),
    "student forward": ("rollout = student forward",),
    "backward": ("backward",),
    "teachers and anchor": ("teachers", "anchor"),
    "optimizer": ("optimizer and average",),
}
SAME = ("config", "teachers", "remat")


def check(measured: Fields, estimated: Fields) -> None:
    """Refuse to compare what is not the same update.

    Raises:
      ValueError: names the field that differs.
    """
    if "estimate" not in estimated or estimated.get("program") != "update":
        raise ValueError("estimate: found a file without one of an update, expected --estimate's")
    if not measured.get("update", {}).get("fits"):
        raise ValueError("measured: found no update that was timed")
    pairs = {name: (measured["update"][name], estimated[name]) for name in SAME}
    pairs["images a chip"] = measured["update"]["batch_size"] / measured["update"]["chips"], estimated["batch_size"]
    for name, (here, there) in pairs.items():
        if here != there:
            raise ValueError(f"{name}: found {here!r} measured and {there!r} estimated, expected the same")


def rows(measured: Fields, estimated: Fields) -> list[tuple[str, float, float]]:
    """Seconds measured and estimated, of the whole and of each phase that both know."""
    update, estimate = measured["update"], estimated["estimate"]
    timed = {row["phase"]: row["seconds"] for row in update.get("phases", ())}
    second = estimate["seconds"] / estimate["cycles"]  # of a cycle
    found = [("update", update["step"]["median"], estimate["seconds"])]
    for name, parts in PHASES.items():
        there = [timed[part] for part in parts if part in timed]
        if there and name in estimate["phases"]:
            found.append((name, sum(there), estimate["phases"][name]["cycles"] * second))
    return found


def describe(measured: Fields, estimated: Fields) -> str:
    check(measured, estimated)
    update, estimate = measured["update"], estimated["estimate"]
    lines = [
        f"{update['config']}, {estimated['batch_size']} images a chip, on {measured['device']['kind']}: MFU "
        f"{update['mfu']['datasheet']:.1%} measured, {estimate['mfu']:.1%} estimated (without waits for DMA)",
        f"{'':22}{'measured':>12}{'estimated':>12}{'times as long':>15}",
    ]
    for name, here, there in rows(measured, estimated):
        lines.append(f"{name:22}{here:>10.4g} s{there:>10.4g} s{here / there:>15.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("estimated", type=Path)
    given = parser.parse_args()
    try:
        print(describe(*(json.loads(path.read_text()) for path in (given.measured, given.estimated))))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
