"""GenEval's records: what an image of a prompt has to show, by classes, counts, colours and places."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fopd_jax.exits import naming
from fopd_jax.rewards.geneval.detections import CLASSES

TAGS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
_INCLUDE, _EXCLUDE = ("class", "count", "color", "position"), ("class", "count")


@dataclasses.dataclass(frozen=True)
class Item:
    """`count` objects of a class, perhaps of a colour, perhaps `relation` each object of item `target`, an earlier one.

    Of an excluded item `count` is the number from which on there are too many.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt's requirements."""

    tag: str
    include: tuple[Item, ...]
    exclude: tuple[Item, ...] = ()


def read_record(prompt: str, metadata: Mapping[str, Any]) -> Record:
    """The record that stands beside a prompt as GenEval's JSON: tag, include, perhaps exclude.

    Other keys beside these three are left to others. Keys within an item are not: they would ask for something.

    Raises:
      ValueError: it is none that GenEval's rule can judge; names prompt, tag and key.
    """
    tag = metadata.get("tag")
    with naming(f"GenEval prompt {prompt!r}, tag {tag!r}"):
        if tag not in TAGS:
            raise ValueError(f"tag: expected one of {', '.join(TAGS)}")
        include = tuple(_item(f"include[{i}]", each, i) for i, each in enumerate(_items("include", metadata)))
        exclude = tuple(_item(f"exclude[{i}]", each, None) for i, each in enumerate(_items("exclude", metadata)))
        if not include:
            raise ValueError("include: found no items, expected at least one")
        return Record(tag, include, exclude)


def _items(key: str, metadata: Mapping[str, Any]) -> list[Any]:
    items = metadata.get(key, [])
    if not isinstance(items, list | tuple):
        raise ValueError(f"{key}: found {items!r}, expected a list of items")
    return list(items)


def _item(key: str, item: Any, place: int | None) -> Item:
    """`place`: its place among the included ones; None of an excluded one."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{key}: found {item!r}, expected an object with class and count")
    known = _EXCLUDE if place is None else _INCLUDE
    if unknown := [name for name in item if name not in known]:
        raise ValueError(f"{key}.{unknown[0]}: no such key in GenEval, expected some of {', '.join(known)}")
    name, count, colour = item.get("class"), item.get("count"), item.get("color")
    if name not in CLASSES:
        raise ValueError(f"{key}.class: found {name!r}, expected one of COCO's 80 as GenEval spells them")
    if type(count) is not int or count < 1:
        raise ValueError(f"{key}.count: found {count!r}, expected a whole number, at least 1")
    if "color" in item and colour not in COLOURS:
        raise ValueError(f"{key}.color: found {colour!r}, expected one of {', '.join(COLOURS)}")
    if place is None or "position" not in item:
        return Item(name, count, colour)
    return Item(name, count, colour, *_position(f"{key}.position", item["position"], place))


def _position(key: str, position: Any, place: int) -> tuple[str, int]:
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{key}: found {position!r}, expected [one of {', '.join(RELATIONS)}; the target's place]")
    relation, target = position
    if type(target) is not int or not 0 <= target < place:
        raise ValueError(f"{key}: found target {target!r}, expected the place of an item before include[{place}]")
    return relation, target
