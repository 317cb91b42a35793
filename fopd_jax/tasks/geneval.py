"""GenEval's prompts, generated from its grammar: the published test set row by row, and any number to train on.

Six kinds of prompts over COCO's 80 classes; the record beside each says what must be found in its image. Plurals and
articles are as naive as the published ones ("four toothbrushs"). Ghosh et al. 2023; the training mix is Flow-GRPO's.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fopd_jax.rewards.geneval.detections import CLASSES
from fopd_jax.rewards.geneval.records import COLOURS, RELATIONS

TRAIN_MIX: Mapping[str, int] = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
"""Shares of the tags among prompts to train on; `single_object` has none."""
ROWS: Mapping[str, int] = {"train": 50_000, "train_seen": 50_000, "test": 553}
"""The splits, and how many rows they have unless another number is asked for."""
MOST_ROWS = 1_000_000
UNSEEN = frozenset(
    (
        "car", "traffic light", "fire hydrant", "dog", "elephant", "umbrella", "frisbee", "skis", "baseball bat",
        "skateboard", "wine glass", "cup", "bowl", "apple", "bed", "toilet", "microwave", "book", "clock", "toothbrush",
    )
)  # fmt: skip
"""The 20 classes of Flow-GRPO's test of unseen objects (its `geneval_unseen_objects/test_metadata.jsonl`)."""

_THINGS = CLASSES[1:]  # what may have a colour: no persons
_COUNTS = {2: "two", 3: "three", 4: "four"}
_TEST_SEED, _TEST_DRAWS = 43, 100
_TEST_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the records as JSON lines, prompts included: the bytes of the published evaluation_metadata.jsonl."""

Record = dict[str, Any]
"""What stands beside a prompt: `tag`, `include` and, where counted, `exclude`."""
Row = tuple[str, Record]


def generate(split: str, count: int | None, seed: int) -> tuple[list[str], list[Record]]:
    """Prompts and their records. `test`: the 553 published ones whatever the seed, or `count` spread over them evenly.

    `train`: `count` rows (50,000), tags in the shares of `TRAIN_MIX`, shuffled; none is a test prompt. They are drawn
    with replacement, as Flow-GRPO's are (counting has but 160 prompts outside of the test set): equal texts are rows
    of their own. `train_seen`: the same without the classes `UNSEEN`.

    Raises:
      ValueError: another split, a count out of range, or a numpy whose random numbers are not those of the test set.
    """
    if split not in ROWS:
        raise ValueError(f"geneval: found split {split!r}, expected one of {', '.join(ROWS)}")
    most = ROWS[split] if split == "test" else MOST_ROWS
    count = ROWS[split] if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"geneval:{split}: found a count of {count}, expected 1 to {most}")
    if split == "test":
        rows = _published()
        rows = [rows[i * len(rows) // count] for i in range(count)]
    else:
        avoided = UNSEEN if split == "train_seen" else frozenset()
        rows = _train(count, np.random.default_rng(seed), avoided)
    return [prompt for prompt, _ in rows], [record for _, record in rows]


def _train(count: int, rng: np.random.Generator, avoided: frozenset[str]) -> list[Row]:
    held_out = {prompt for prompt, _ in _published()}
    rows: list[Row] = []
    for tag, share in _shares(count).items():
        while share > 0:
            prompt, record = _draw(tag, rng)
            if prompt not in held_out and not avoided.intersection(each["class"] for each in record["include"]):
                rows.append((prompt, record))
                share -= 1
    return [rows[i] for i in rng.permutation(count)]


def _shares(count: int) -> dict[str, int]:
    """Rows of each tag: the first tags of the mix take what its division leaves over."""
    total = sum(TRAIN_MIX.values())
    shares = {tag: count * parts // total for tag, parts in TRAIN_MIX.items()}
    for tag in list(shares)[: count - sum(shares.values())]:
        shares[tag] += 1
    return shares


# ---- the six kinds of prompts


def _single(a: str) -> Row:
    return f"a photo of {_article(a)}", {"tag": "single_object", "include": [{"class": a, "count": 1}]}


def _two(a: str, b: str) -> Row:
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return f"a photo of {_article(a)} and {_article(b)}", {"tag": "two_object", "include": include}


def _counting(a: str, count: int) -> Row:
    record = {
        "tag": "counting",
        "include": [{"class": a, "count": count}],
        "exclude": [{"class": a, "count": count + 1}],
    }
    return f"a photo of {_COUNTS[count]} {a}{'es' if a.endswith('s') else 's'}", record


def _colors(a: str, colour: str) -> Row:
    include = [{"class": a, "count": 1, "color": colour}]
    return f"a photo of {_article(colour)} {a}", {"tag": "colors", "include": include}


def _position(a: str, b: str, relation: str) -> Row:
    """The record begins with what the relation is to: its place there is 0."""
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return f"a photo of {_article(a)} {relation} {_article(b)}", {"tag": "position", "include": include}


def _color_attr(a: str, b: str, colour_a: str, colour_b: str) -> Row:
    include = [{"class": a, "count": 1, "color": colour_a}, {"class": b, "count": 1, "color": colour_b}]
    return (
        f"a photo of {_article(colour_a)} {a} and {_article(colour_b)} {b}",
        {"tag": "color_attr", "include": include},
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---- the published test set


def _published() -> list[Row]:
    """What 580 draws give in the published order, first 80 at once without replacement; repetitions left out."""
    rng = np.random.default_rng(_TEST_SEED)
    rows = [_single(CLASSES[i]) for i in rng.choice(len(CLASSES), len(CLASSES), replace=False)]
    for tag in ("two_object", "counting", "colors", "position", "color_attr"):
        rows += [_draw(tag, rng) for _ in range(_TEST_DRAWS)]
    unique = {json.dumps({**record, "prompt": prompt}): (prompt, record) for prompt, record in rows}
    found = hashlib.sha256("".join(f"{line}\n" for line in unique).encode()).hexdigest()
    if found != _TEST_SHA256:
        raise ValueError(
            f"geneval:test: numpy {np.__version__} draws other numbers than those of the published prompts; "
            "read GenEval's evaluation_metadata.jsonl by its path instead"
        )
    return list(unique.values())


def _draw(tag: str, rng: np.random.Generator) -> Row:
    """One row by the calls of the published generator: each call, and their order, decides what the next one gives."""
    match tag:
        case "two_object":
            return _two(*_two_of(CLASSES, rng))
        case "counting":
            name = CLASSES[rng.choice(len(CLASSES))]
            return _counting(name, int(rng.integers(2, 5)))
        case "colors":
            name = _THINGS[rng.choice(len(_THINGS))]
            return _colors(name, COLOURS[rng.choice(len(COLOURS))])
        case "position":
            a, b = _two_of(CLASSES, rng)
            return _position(a, b, RELATIONS[rng.choice(len(RELATIONS))])
        case _:
            return _color_attr(*_two_of(_THINGS, rng), *_two_of(COLOURS, rng))


def _two_of(names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.choice(len(names), size=2, replace=False)
    return names[int(a)], names[int(b)]
