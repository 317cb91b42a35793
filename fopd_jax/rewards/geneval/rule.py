"""GenEval's rule (Ghosh et al. 2023, arXiv 2310.11513), and the three other numbers that go by its name.

- official: what the published score is made of. *At least* as many objects as asked for; of those the most confident
  ones are judged. Only `exclude` (of the tag counting) sets a limit above.
- exact: every count exactly, `exclude` unheeded. Flow-GRPO's reward server calls it strict accuracy.
- continuous: Flow-GRPO's reward, the mean of partial credits, as its server computes it. An object too many costs as
  much as one too few, without end: three dogs for one are -1. Things in the wrong place get .75, not 2/3: the term that
  right places get is added to theirs, too.
- continuous_fixed: the same without these two oddities, in [0, 1]. A term each for the count (not below 0), the colour
  and the place of an item, and no others: it is 1 just where exact holds.

So official and continuous can disagree: two dogs left of a cat, one being asked for, are right officially
and .333.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from fopd_jax.rewards.geneval.boxes import keep_apart
from fopd_jax.rewards.geneval.detections import CLASSES, Detections
from fopd_jax.rewards.geneval.records import COLOURS, Item, Record

Colours = Callable[[str, Sequence[int]], Sequence[str]]
"""`(class, places of detections) → a colour each`; asked only of objects whose colour decides something."""
VALUES: tuple[str, ...] = ("official", "exact", "continuous", "continuous_fixed")
_SHRINK = 0.1
"""Of both boxes' sizes: within it a centre is beside another in no direction."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which detections count: above which score, how many of a class, overlapping less than what (1: however much)."""

    score: float = 0.3
    counting_score: float = 0.9
    most: int = 16
    overlap: float = 1.0


@dataclasses.dataclass(frozen=True)
class GenevalScores:
    """One image's four scores, what is wrong by the official and by the exact rule, how many of each class count."""

    official: bool
    exact: bool
    continuous: float
    continuous_fixed: float
    reason: str
    exact_reason: str
    found: dict[str, int]


def find_objects(tag: str, detections: Detections, limits: Limits = Limits()) -> dict[str, tuple[int, ...]]:
    """Of each class the places of the detections that count, best first.

    Raises:
      ValueError: a score or box is not finite, a box is none, or a label is none of COCO's 80.
    """
    if not (np.isfinite(detections.boxes).all() and np.isfinite(detections.scores).all()):
        raise ValueError("detections: found boxes or scores that are not finite")
    if (detections.boxes[:, 2:] < detections.boxes[:, :2]).any():
        raise ValueError("detections: found a box with its corners the wrong way round, expected (x0, y0, x1, y1)")
    if len(wrong := detections.labels[(detections.labels < 0) | (detections.labels >= len(CLASSES))]):
        raise ValueError(f"detections: found label {wrong[0]}, expected 0 to {len(CLASSES) - 1}")
    # In the scores' own dtype: a float32 score of .3 is not above it, though as float64 it would be.
    above = detections.scores > (limits.counting_score if tag == "counting" else limits.score)
    order = np.argsort(-detections.scores, kind="stable")
    order = order[above[order]]
    found = {}
    for label in np.unique(detections.labels[order]):
        best = order[detections.labels[order] == label][: limits.most]
        found[CLASSES[label]] = tuple(int(best[i]) for i in keep_apart(detections.boxes[best], limits.overlap))
    return found


def relations(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> set[str]:
    """Where box a lies from box b: none, one or two of GenEval's relations.

    The offset of the centres, shortened on each axis by a tenth of both sizes, must be more than half of its own
    unshortened length.
    """
    offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    sizes = np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2])
    shortened = np.maximum(np.abs(offset) - _SHRINK * sizes, 0) * np.sign(offset)
    if (np.abs(shortened) < 1e-3).all():
        return set()
    x, y = shortened / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def questions(record: Record, found: Mapping[str, Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    """Whose colours `geneval_score` will ask for, as the arguments of `Colours`: to have them in one go beforehand."""
    chosen = [(item, tuple(found.get(item.name, ())[: item.count])) for item in record.include if item.colour]
    return [(item.name, places) for item, places in chosen if len(places) == item.count]


def geneval_score(record: Record, detections: Detections, colours: Colours, limits: Limits = Limits()) -> GenevalScores:
    """What an image is worth in which `detections` were found.

    Raises:
      ValueError: as `find_objects`, or `colours` gives a colour that GenEval does not know, or too few.
    """
    found = find_objects(record.tag, detections, limits)
    votes = functools.cache(lambda name, places: _votes(colours, name, places))

    def judge(most_confident: bool) -> list[_Verdict]:
        verdicts: list[_Verdict] = []
        for item in record.include:
            objects = found.get(item.name, ())
            objects = objects[: item.count] if most_confident else objects
            verdicts.append(_judge(item, objects, verdicts, detections.boxes, votes))
        return verdicts

    official, exact = judge(most_confident=True), judge(most_confident=False)
    wrong = [each.reason for each in official if not each.right]
    wrong += [
        f"expected fewer than {item.count} {item.name}, found {len(found[item.name])}"
        for item in record.exclude
        if len(found.get(item.name, ())) >= item.count
    ]
    missed = [each.reason for each in exact if not each.right]
    return GenevalScores(
        official=not wrong,
        exact=not missed,
        continuous=_mean([term for each in exact for term in _terms_as_shipped(each)]),
        continuous_fixed=_mean([term for each in exact for term in _terms(each)]),
        reason="; ".join(wrong),
        exact_reason="; ".join(missed),
        found={name: len(places) for name, places in found.items()},
    )


class _Verdict(NamedTuple):
    """One item: its objects, of how many the colour is right (None: not looked at), where they are, what is wrong."""

    item: Item
    objects: Sequence[int]
    coloured: int | None
    place: Literal["unseen", "no target", "elsewhere", "right"]
    reason: str

    @property
    def right(self) -> bool:
        return not self.reason


def _judge(
    item: Item,
    objects: Sequence[int],
    earlier: Sequence[_Verdict],
    boxes: Float[np.ndarray, "n 4"],
    votes: Callable[[str, tuple[int, ...]], Sequence[str]],
) -> _Verdict:
    """What is asked for comes in this order, and ends with the first that fails: count, colour, place."""
    if len(objects) != item.count:
        return _Verdict(item, objects, None, "unseen", f"expected {item.count} {item.name}, found {len(objects)}")
    coloured = None
    if item.colour:
        seen = votes(item.name, tuple(objects))
        coloured = seen.count(item.colour)
        if coloured != item.count:
            reason = f"expected {item.count} {item.colour} {item.name}, found {', '.join(seen)}"
            return _Verdict(item, objects, coloured, "unseen", reason)
    if not item.relation:
        return _Verdict(item, objects, coloured, "unseen", "")
    target = earlier[item.target]
    if not target.right:
        reason = f"expected {item.name} {item.relation} {target.item.name}, which is not as it should be"
        return _Verdict(item, objects, coloured, "no target", reason)
    for a in objects:
        for b in target.objects:
            if item.relation not in (held := relations(boxes[a], boxes[b])):
                where = " and ".join(sorted(held)) or "in no direction of"
                reason = f"expected {item.name} {item.relation} {target.item.name}, found it {where} it"
                return _Verdict(item, objects, coloured, "elsewhere", reason)
    return _Verdict(item, objects, coloured, "right", "")


def _terms_as_shipped(verdict: _Verdict) -> list[float]:
    item, number = verdict.item, len(verdict.objects)
    terms = [1 - abs(item.count - number) / item.count]
    if number != item.count:
        return terms + [0.0] * bool(item.colour or item.relation)
    if verdict.coloured is not None:
        terms.append(verdict.coloured / item.count)
    return terms + {"unseen": [], "no target": [0.0], "elsewhere": [0.0, 1.0], "right": [1.0]}[verdict.place]


def _terms(verdict: _Verdict) -> list[float]:
    item = verdict.item
    terms = [max(0.0, 1 - abs(item.count - len(verdict.objects)) / item.count)]
    if item.colour:
        terms.append((verdict.coloured or 0) / item.count)
    if item.relation:
        terms.append(float(verdict.place == "right"))
    return terms


def _votes(colours: Colours, name: str, places: tuple[int, ...]) -> tuple[str, ...]:
    votes = tuple(colours(name, places))
    if len(votes) != len(places) or not set(votes) <= set(COLOURS):
        raise ValueError(f"colours of {len(places)} {name}: found {votes}, expected as many, of {', '.join(COLOURS)}")
    return votes


def _mean(terms: Sequence[float]) -> float:
    return sum(terms) / len(terms)
