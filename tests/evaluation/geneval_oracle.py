"""A second reading of GenEval's published rule and of its published summary, in plain Python."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Thing(NamedTuple):
    """A detected object."""

    name: str
    box: tuple[float, float, float, float]
    score: float
    colour: str


def is_correct(metadata: Mapping[str, Any], things: Sequence[Thing]) -> bool:
    """Whether an image shows at least what its prompt asks for, and nothing that it excludes."""
    limit = 0.9 if metadata["tag"] == "counting" else 0.3
    objects: dict[str, list[Thing]] = {}
    for thing in sorted(things, key=lambda each: -each.score):
        if thing.score > limit and len(objects.get(thing.name, [])) < 16:
            objects.setdefault(thing.name, []).append(thing)
    correct = True
    groups: list[list[Thing] | None] = []
    for wanted in metadata["include"]:
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        fine = len(found) == wanted["count"]
        if fine and "color" in wanted:
            fine = sum(thing.colour == wanted["color"] for thing in found) >= wanted["count"]
        if fine and "position" in wanted:
            relation, target = wanted["position"]
            group = groups[target]
            fine = group is not None and all(relation in places(a.box, b.box) for a in found for b in group)
        groups.append(found if fine else None)
        correct = correct and fine
    return correct and all(len(objects.get(no["class"], [])) < no["count"] for no in metadata.get("exclude", []))


def places(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a is, seen from box b."""
    offset = [(a[k] + a[k + 2]) / 2 - (b[k] + b[k + 2]) / 2 for k in (0, 1)]
    reach = [0.1 * (a[k + 2] - a[k] + b[k + 2] - b[k]) for k in (0, 1)]
    x, y = (max(abs(o) - r, 0.0) * (1 if o > 0 else -1) for o, r in zip(offset, reach, strict=True))
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    held = {"left of": x / length < -0.5, "right of": x / length > 0.5}
    held |= {"above": y / length < -0.5, "below": y / length > 0.5}
    return {name for name, holds in held.items() if holds}


def overall(rows: Sequence[tuple[str, bool]]) -> float:
    """The published score of rows (tag, correct): the mean over tags of the share of correct images."""
    tags: dict[str, list[bool]] = {}
    for tag, correct in rows:
        tags.setdefault(tag, []).append(correct)
    return sum(sum(found) / len(found) for found in tags.values()) / len(tags)
