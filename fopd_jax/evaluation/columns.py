"""What the scores of a suite's images add up to: the columns that are published of it, and means of all the rest.

GenEval goes by three scores that can disagree badly: *official*, which allows objects too many, *exact*, and
*continuous*, Flow-GRPO's reward. Each is a mean over images or the mean of the six tags' means; the published number is
the official tag mean. T2I-CompBench's complex prompts are judged by several scorers whose published files are joined by
the order of their lines; here all scores of an image stand in its record, so that no order can mix them up.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fopd_jax.evaluation.comparison import Column, Key, Part, by_image, differences
from fopd_jax.evaluation.records import DIVERSITY, Cell, Record
from fopd_jax.rewards.geneval.records import TAGS
from fopd_jax.rewards.monitors import DIVERSITY as DIVERSITY_MONITOR
from fopd_jax.rewards.monitors import PREFIX

AVERAGE = "average"
"""The suite that the paper's average stands under, and its column."""
AVERAGED = ("geneval", "ocr", "deqa", "pickscore")
GENEVAL_SCORES = {name: f"geneval/{name}" for name in ("official", "exact", "continuous")}
"""What an image's record calls GenEval's three scores."""
BY_PROMPT = ("dpg", DIVERSITY, DIVERSITY_MONITOR)
"""Means of prompts' means: DPG-Bench's, and the diversity of an image among those of its prompt."""
UNRANKED = (DIVERSITY,)
"""Of these more is not better as such: noise is diverse, too. Nor is it of monitors."""
_UNITS = {
    "clipscore": (-1.0, 0.6, "the cosine itself"),
    "deqa": (1.0, 5.0, "1 to 5"),
    "pickscore": (5.0, 50.0, "the logit itself, about 20"),
}
"""Where a mean of these lies in the unit in which columns combine them: some rewards are divided for training."""


class _Combined(NamedTuple):
    """A column of T2I-CompBench: a category's images, of each the mean of the scores that its prompt's kind asks."""

    category: str
    scores: Mapping[str, tuple[str, ...]]

    @property
    def asked(self) -> tuple[str, ...]:
        """All of its scores."""
        return tuple(dict.fromkeys(score for scores in self.scores.values() for score in scores))


_ANY = ""
COMPBENCH: Mapping[str, _Combined] = {
    "color": _Combined("color", {_ANY: ("blip_vqa",)}),
    "shape": _Combined("shape", {_ANY: ("blip_vqa",)}),
    "texture": _Combined("texture", {_ANY: ("blip_vqa",)}),
    "2d_spatial": _Combined("spatial", {_ANY: ("unidet_2d",)}),
    "3d_spatial": _Combined("3d_spatial", {_ANY: ("unidet_3d",)}),
    "numeracy": _Combined("numeracy", {_ANY: ("unidet_numeracy",)}),
    "non_spatial": _Combined("non_spatial", {_ANY: ("clipscore",)}),
    "complex_3in1": _Combined(
        "complex",
        {
            "spatial": ("blip_vqa", "unidet_2d"),
            "action": ("blip_vqa", "clipscore"),
            "spatialaction": ("blip_vqa", "unidet_2d", "clipscore"),
        },
    ),
}
"""By their names; kinds of complex prompts are those of its lists, complex_val_KIND.txt, and an image's tag `tag`."""


def columns_of(cell: Cell) -> list[Column]:
    """Every number of a cell, in the order of its tables.

    Raises:
      ValueError: an image is there twice, or has no tag of its suite's; names the cell and the image.
    """
    records = by_image(cell)
    own = {"geneval": _geneval, "t2icompbench": _compbench}.get(cell.suite, _nothing)
    return [*(columns := own(cell, records)), *_means(cell, records, columns)]


def average_of(cells: Sequence[Cell]) -> Column:
    """The paper's average, of one model's cells at one setting: mean of GenEval (the official tag mean), OCR, DeQA / 5
    and PickScore / 26. Where it cannot be formed it has no parts, and a note that says why.
    """
    suites = {cell.suite: cell for cell in cells}
    if missing := [name for name in AVERAGED if name not in suites]:
        return Column(AVERAGE, {}, note=f"no average without {', '.join(missing)}")
    geneval, ocr, deqa, pickscore = (suites[name] for name in AVERAGED)
    for cell in (ocr, deqa, pickscore):
        if unequal := [name for name in differences(geneval, cell) if name not in ("prompts", "samples")]:
            return Column(AVERAGE, {}, note=f"no average: {', '.join(unequal)} unequal on geneval and {cell.suite}")
    whole = next((each for each in columns_of(geneval) if each.name == "official tag mean"), None)
    if whole is None:
        return Column(AVERAGE, {}, note=f"no average: no {GENEVAL_SCORES['official']} on geneval")
    shared = not {"prompts", "samples"} & differences(deqa, pickscore).keys()  # then a prompt is drawn for both
    parts = {f"geneval {name}": _scaled(part, 1 / 4) for name, part in whole.parts.items()}
    pools = ("ocr", "deqa", "deqa" if shared else "pickscore")
    for cell, unit, pool in zip((ocr, deqa, pickscore), (1, 5, 26), pools, strict=True):
        records, names = by_image(cell), (cell.suite,)
        if problem := _problem(records, names):
            return Column(AVERAGE, {}, note=f"no average: {problem}")
        parts[cell.suite] = _scaled(_part(pool, records, lambda _, names=names: names), 1 / (4 * unit))
    return Column(AVERAGE, parts, note=whole.note)


# ---- suites


def _geneval(cell: Cell, records: Mapping[tuple[str, int], Record]) -> list[Column]:
    """Tag and image means of the three scores, and the official one by tag."""
    tags = {key: record.tags.get("tag") for key, record in records.items()}
    for (prompt, _), tag in tags.items():
        if tag not in TAGS:
            raise ValueError(
                f"{cell.model}, geneval: prompt {prompt!r}: found tag {tag!r}, expected one of {', '.join(TAGS)}"
            )
    there = [tag for tag in TAGS if tag in tags.values()]
    note = "" if len(there) == len(TAGS) else f"tag means are of {', '.join(there)} alone"
    found, by_tag = [], []
    for name, score in GENEVAL_SCORES.items():
        whole = _part(cell.suite, records, lambda _, score=score: (score,))
        if not whole.values and not whole.failed:
            continue
        parts = {tag: _scaled(_kept(whole, tags, tag), 1 / len(there)) for tag in there}
        found += [Column(f"{name} tag mean", parts, note=note), Column(f"{name} image mean", {"all": whole})]
        if name == "official":
            by_tag = [Column(f"official {tag}", {tag: _kept(whole, tags, tag)}, "by tag") for tag in there]
    return [*found, *by_tag]


def _compbench(cell: Cell, records: Mapping[tuple[str, int], Record]) -> list[Column]:
    """One a category that is there."""
    found = []
    for name, how in COMPBENCH.items():
        own = {key: record for key, record in records.items() if record.tags.get("category") == how.category}
        if any({*how.asked} & {*record.scores, *record.failed} for record in own.values()):
            found.append(_combined(cell.suite, name, how, own))
    return found


def _combined(pool: str, name: str, how: _Combined, records: Mapping[tuple[str, int], Record]) -> Column:
    """A complex prompt's scores are averaged image by image. Without values, and with a note, where its kind is not
    told or a score is in another unit.
    """

    def kind(record: Record) -> str:
        return _ANY if _ANY in how.scores else str(record.tags.get("tag"))

    if wrong := next((record for record in records.values() if kind(record) not in how.scores), None):
        said = f"prompt {wrong.prompt_id!r} has tag {kind(wrong)!r}, expected one of {', '.join(how.scores)}"
        return Column(name, {}, note=f"no {name}: {said}")
    if problem := _problem(records, sorted(how.asked)):
        return Column(name, {}, note=f"no {name}: {problem}")
    return Column(name, {"all": _part(pool, records, lambda record: how.scores[kind(record)])})


def _problem(records: Mapping[tuple[str, int], Record], names: Sequence[str]) -> str:
    """Which of the scores is not there, or in another unit than the one that they are combined in."""
    for name in names:
        values = [record.scores[name] for record in records.values() if name in record.scores]
        if not values and not any(name in record.failed for record in records.values()):
            return f"no scores {name}"
        low, high, unit = _UNITS.get(name, (-math.inf, math.inf, ""))
        if values and not low <= (mean := math.fsum(values) / len(values)) <= high:
            return f"{name} is {mean:.3g} on average, expected {unit}"
    return ""


def _nothing(cell: Cell, records: Mapping[tuple[str, int], Record]) -> list[Column]:
    return []


def _means(cell: Cell, records: Mapping[tuple[str, int], Record], special: Sequence[Column]) -> list[Column]:
    """Of every score that no column is made of yet, over all images that it was asked of."""
    names = dict.fromkeys(name for record in records.values() for name in (*record.scores, *record.failed))
    told = {"geneval": {"geneval", *GENEVAL_SCORES.values()}, "t2icompbench": _asked()}.get(cell.suite, set())
    rest = sorted(name for name in names if not special or name not in told)
    return [
        Column(
            name,
            {"all": _part(cell.suite, records, lambda _, name=name: (name,), name in BY_PROMPT)},
            "monitors" if name.startswith(PREFIX) else "",
            ranked=not name.startswith(PREFIX) and name not in UNRANKED,
        )
        for name in rest
    ]


@functools.cache
def _asked() -> set[str]:
    return {name for how in COMPBENCH.values() for name in how.asked}


# ---- parts


def _part(
    pool: str,
    records: Mapping[tuple[str, int], Record],
    asked: Callable[[Record], tuple[str, ...]],
    by_prompt: bool = False,
) -> Part:
    """Of each image the mean of the scores that are asked of it; it failed if one of them did.

    What failed under a reward's name, such as `geneval`, has none of its scores either, such as `geneval/official`.
    """
    values: dict[Key, float] = {}
    failed: dict[Key, str] = {}
    for (prompt, sample), record in records.items():
        names, key = asked(record), (pool, prompt, sample)
        if wrong := [each for name in names for each in (name, name.partition("/")[0]) if each in record.failed]:
            failed[key] = record.failed[wrong[0]]
        elif all(name in record.scores for name in names):
            values[key] = sum(record.scores[name] for name in names) / len(names)
    return Part(values, failed, by_prompt=by_prompt)


def _kept(part: Part, tags: Mapping[tuple[str, int], str | None], tag: str) -> Part:
    """Of the images of one tag."""
    values = {key: value for key, value in part.values.items() if tags[key[1:]] == tag}
    return Part(values, {key: reason for key, reason in part.failed.items() if tags[key[1:]] == tag})


def _scaled(part: Part, weight: float) -> Part:
    return dataclasses.replace(part, weight=part.weight * weight)
