"""Suites: which prompts, how many images of each, what scores them and how its own scorer wants the files.

Sizes are the published ones. Prompts of GenEval are generated (`tasks.geneval`); those of the others are files that
somebody has. Worlds with tasks of their own have a suite for each of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fopd_jax.evaluation import columns
from fopd_jax.rewards.registry import KINDS
from fopd_jax.rewards.reward import Metadata
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.sources import file_of, read_set
from fopd_jax.tasks.task import Task

MOST_SAMPLES = 100
"""Images of one prompt: their names have two digits."""
_PREFERENCES = (
    "pickscore", "hpsv2", "hpsv3", "imagereward", "clipscore", "aesthetic", "deqa", "unifiedreward", "qwenvl",
)  # fmt: skip
_TAGS = ("tag", "category", "challenge", "atom_count")
"""Of what stands beside prompts that which groups them in tables."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A suite as it was published: `prompts`, `samples` of each, the `layout` of its scorer (`evaluation.layouts`).

    `kinds`: of rewards that score it, by kind or name. `merged`: in its lists equal rows are samples of one prompt.
    `source`: where its prompts are from unless others are given; `also`: the suite that it else shares them with.
    """

    prompts: int
    samples: int
    kinds: tuple[str, ...]
    layout: str = "plain"
    merged: bool = False
    source: str = ""
    also: str = ""


COMPBENCH: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {how.category: how.asked for how in columns.COMPBENCH.values()}
)
"""T2I-CompBench's categories, 300 prompts each, and what its columns are made of. UniDet is served, or is not there."""
COMPLEX: Mapping[str, tuple[str, ...]] = columns.COMPBENCH["complex_3in1"].scores
"""Kinds of complex prompts, by the lists `complex_val_KIND.txt`, and what the 3-in-1 score is a mean of."""
SUITES: Mapping[str, Published] = MappingProxyType({
    "geneval": Published(553, 4, ("geneval",), "geneval", merged=True, source="geneval:test"),
    "ocr": Published(1018, 1, ("ocr",)),
    "pickscore": Published(2048, 1, ("pickscore",)),
    "deqa": Published(2048, 1, ("deqa",), also="pickscore"),
    "t2icompbench": Published(300 * len(COMPBENCH), 10, (), "compbench"),
    "drawbench": Published(200, 5, _PREFERENCES, merged=True),
    "dpg": Published(1065, 4, ("dpg", "unifiedreward"), "dpg"),
    "geneval2": Published(800, 1, ("geneval2",)),
})  # fmt: skip
"""GenEval 2310.11513; OCR and PickScore as Flow-GRPO tests them; T2I-CompBench 2307.06350; DrawBench as DiffusionNFT
does, 5 images a prompt; DPG-Bench 2403.05135; GenEval 2 2512.16853. On which prompts DeQA was measured is not known.
"""
_KNOWN = {kind for each in (*(suite.kinds for suite in SUITES.values()), *COMPBENCH.values()) for kind in each}
OWN_SAMPLES = 4
"""Images of a prompt of a world's own task."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a suite. `place`: in the whole list, or that of its category, which official names are made of."""

    id: str
    place: int
    text: str
    metadata: Metadata
    tags: Mapping[str, Any]
    kinds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Suite:
    """`name`, `layout` and `samples` of each of its `prompts`, in their order."""

    name: str
    layout: str
    samples: int
    prompts: tuple[Prompt, ...]

    @property
    def images(self) -> int:
        """How many it asks for."""
        return len(self.prompts) * self.samples

    def rows(self) -> list[tuple[Prompt, int]]:
        """Every image's prompt and sample, prompt by prompt."""
        return [(prompt, sample) for prompt in self.prompts for sample in range(self.samples)]

    def digest(self) -> str:
        """One hash of all prompts, with their ids and what stands beside them."""
        rows = [[each.id, each.text, dict(each.metadata)] for each in self.prompts]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ---- reading


def read_suite(name: str, data: Mapping[str, str], tasks: Mapping[str, Task]) -> Suite:
    """A suite by its name: a published one, or a task's.

    `data`: sources of prompts by suite, as `tasks.sources` has them; of T2I-CompBench a folder of `CATEGORY_val.txt`.
    `tasks`: with their held-out prompts and the rewards that score them.

    Raises:
      ValueError: there is no such suite, or no prompts of it are at hand; names what to pass. Or as `read_set`.
    """
    if name not in SUITES:
        return _of_task(name, data, tasks)
    published = SUITES[name]
    field = f"--suite-data {name}"
    source = next((data[each] for each in (name, published.also) if each in data), published.source)
    if published.layout == "compbench" and source:
        return Suite(name, published.layout, published.samples, _compbench(source, field))
    if source:
        found = read_set(source, field, "test")
    elif there := [tasks[each] for each in (name, published.also) if each in tasks]:
        found = PromptSet(there[0].test, there[0].beside("test"))
    else:
        raise ValueError(f"--suites {name}: no prompts at hand; expected --suite-data={name}={_wanted(name)}")
    rows = list(zip(found.texts, found.beside(), strict=True))
    rows = _merged(rows) if published.merged else rows
    ids = [_own_id(place, metadata, published.layout) for place, (_, metadata) in enumerate(rows)]
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise ValueError(f"{field}: {source}: two prompts are called {twice!r}, expected different names")
    prompts = (
        Prompt(ids[place], place, text, metadata, _tags(metadata), published.kinds)
        for place, (text, metadata) in enumerate(rows)
    )
    return Suite(name, published.layout, published.samples, tuple(prompts))


def _of_task(name: str, data: Mapping[str, str], tasks: Mapping[str, Task]) -> Suite:
    if name not in tasks:
        raise ValueError(f"--suites: found {name!r}, expected some of {', '.join(dict.fromkeys((*tasks, *SUITES)))}")
    task = tasks[name]
    texts, beside = task.test, task.beside("test")
    if name in data:
        found = read_set(data[name], f"--suite-data {name}", "test")
        texts, beside = found.texts, tuple(found.beside())
    prompts = (
        Prompt(str(place), place, text, metadata, _tags(metadata), task.scored)
        for place, (text, metadata) in enumerate(zip(texts, beside, strict=True))
    )
    return Suite(name, "plain", OWN_SAMPLES, tuple(prompts))


def _wanted(name: str) -> str:
    if name == "t2icompbench":
        return f"FOLDER of {', '.join(f'{each}_val.txt' for each in COMPBENCH)}"
    return f"FILE of its {SUITES[name].prompts} prompts, or tasks.{name}.test in the config"


def _compbench(source: str, field: str) -> tuple[Prompt, ...]:
    folder = file_of(source, field)
    if folder is None or not folder.is_dir():
        raise ValueError(f"{field}: {source} is no folder; expected {_wanted('t2icompbench')}")
    prompts = []
    for category, kinds in COMPBENCH.items():
        found = read_set(str(_list_of(folder, category, field)), field)
        told = _complex_kinds(folder, field) if category == "complex" else {}
        for place, (text, metadata) in enumerate(zip(found.texts, found.beside(), strict=True)):
            tags = {"category": category, **({"tag": told[text]} if text in told else {}), **_tags(metadata)}
            asked = COMPLEX.get(str(tags.get("tag")), kinds) if category == "complex" else kinds
            prompts.append(Prompt(f"{category}/{place}", place, text, metadata, tags, asked))
    return tuple(prompts)


def _complex_kinds(folder: Path, field: str) -> dict[str, str]:
    """The kind of each complex prompt, as far as lists say it."""
    lists = {kind: folder / f"complex_val_{kind}.txt" for kind in COMPLEX}
    there = {kind: path for kind, path in lists.items() if path.is_file()}
    return {text: kind for kind, path in there.items() for text in read_set(str(path), field).texts}


def _list_of(folder: Path, category: str, field: str) -> Path:
    """Lines of prompts, or records that hold more beside each, such as BLIP's `questions`."""
    names = [f"{category}_val.jsonl", f"{category}_val.txt"]
    there = [folder / name for name in names if (folder / name).is_file()]
    if not there:
        raise ValueError(f"{field}: {folder} holds no {names[1]}; expected {_wanted('t2icompbench')}")
    return there[0]


def _merged(rows: Sequence[tuple[str, Metadata]]) -> list[tuple[str, Metadata]]:
    """Rows without what an earlier one says, too."""
    kept = {json.dumps([text, dict(metadata)], sort_keys=True): (text, metadata) for text, metadata in reversed(rows)}
    return list(kept.values())[::-1]


def _own_id(place: int, metadata: Metadata, layout: str) -> str:
    """Of DPG-Bench the name of the prompt's file, else its place."""
    return Path(str(metadata["file"])).stem if layout == "dpg" and "file" in metadata else str(place)


def _tags(metadata: Metadata) -> dict[str, Any]:
    found = {name.lower(): value for name, value in metadata.items()}
    return {name: found[name] for name in _TAGS if isinstance(found.get(name), str | int)}


# ---- what is made of it


def chosen(suite: Suite, most: int | None, samples: int | None) -> Suite:
    """So many of its prompts, spread evenly over it, and images of each; None: all, as published.

    An image is the same one as in the whole suite.

    Raises:
      ValueError: that are more images of a prompt than names are made for.
    """
    if samples is not None and not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"--samples: found {samples}, expected 1 to {MOST_SAMPLES}")
    count = len(suite.prompts)
    places = range(count) if most is None or most >= count else [i * count // most for i in range(most)]
    prompts = tuple(suite.prompts[place] for place in places)
    return dataclasses.replace(suite, prompts=prompts, samples=samples or suite.samples)


def difference(suite: Suite) -> str:
    """In what sizes it is another one than the published; empty where it is that, or there is none."""
    published = SUITES.get(suite.name)
    if published is None or (len(suite.prompts), suite.samples) == (published.prompts, published.samples):
        return ""
    return f"{len(suite.prompts)} × {suite.samples}, published {published.prompts} × {published.samples}"


def scored_by(prompt: Prompt, given: Mapping[str, str]) -> tuple[str, ...]:
    """Which of the given rewards score a prompt, `given`: their kinds by name.

    Rewards of kinds that no suite knows, such as functions of one's own, score all prompts.
    """

    def scores(name: str, kind: str) -> bool:
        anywhere = name not in _KNOWN and (":" in kind or (kind in KINDS and kind not in _KNOWN))
        return name in prompt.kinds or kind in prompt.kinds or anywhere

    return tuple(name for name, kind in given.items() if scores(name, kind))
