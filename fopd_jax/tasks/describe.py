"""What a run trains and tests on, in figures and in words: counts, tags, overlaps, lengths, quotes, the schedule."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fopd_jax.console import align
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.prompts import plain
from fopd_jax.tasks.sampling import Curriculum

_SHOWN, _EXAMPLES, _TAGS = 100, 3, 40
_QUOTED, _SINGLE, _CURLY = re.compile(r'"[^"]*"'), re.compile(r"(?<!\w)'[^']+'(?!\w)"), re.compile("[“”„‟‘’‚‛«»]")
_TAG_COLUMNS = ("tag", "Category", "category", "task_type")


@dataclasses.dataclass(frozen=True)
class Measure:
    """How prompts' lengths are counted: `unit` names it; beyond `limit`, where there is one, an encoder cuts."""

    unit: str
    lengths: Callable[[Sequence[str]], list[int]]
    limit: int | None = None


WORDS = Measure("words", lambda prompts: [len(prompt.split()) for prompt in prompts])


@dataclasses.dataclass(frozen=True)
class Profile:
    """One set. `tags`: rows by the first column of tags that it has; `longest`: the length in the measure's unit.

    `quoted`: prompts with exactly one string in straight double quotes, `several`: with more; `single`: with one in
    straight single quotes; `curly`: with curly marks, apostrophes among them. The double-quote rule of text rewards
    sees neither of the latter.
    """

    form: str
    quirks: tuple[str, ...]
    prompts: int
    distinct: int
    tags: dict[str, int]
    longest: int
    longest_prompt: str
    cut: int | None
    not_ascii: int
    quoted: int
    several: int
    single: int
    curly: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two sets that share prompts: `exact` distinct texts, and up to case and spaces."""

    first: str
    second: str
    exact: int
    up_to_case: int
    example: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """How often a task's prompts come, from step `start` to `stop`: its share, draws a step and epochs in them."""

    task: str
    start: int
    stop: int
    share: float
    a_step: float
    steps_an_epoch: float | None
    epochs: float


def profile(prompts: PromptSet, measure: Measure) -> Profile:
    """The figures of one set."""
    lengths = measure.lengths(prompts.texts)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    quoted = Counter(min(len(_QUOTED.findall(text)), 2) for text in prompts.texts)
    distinct = list(dict.fromkeys(prompts.texts))
    return Profile(
        prompts.form, prompts.quirks, len(prompts), len(distinct), _tags(prompts), lengths[longest],
        prompts.texts[longest], None if measure.limit is None else sum(each > measure.limit for each in lengths),
        sum(not text.isascii() for text in prompts.texts), quoted[1], quoted[2],
        sum(_SINGLE.search(text) is not None for text in prompts.texts),
        sum(_CURLY.search(text) is not None for text in prompts.texts), tuple(distinct[:_EXAMPLES]),
    )  # fmt: skip


def _tags(prompts: PromptSet) -> dict[str, int]:
    for column in _TAG_COLUMNS:
        values = [each[column] for each in prompts.beside() if isinstance(each.get(column), str)]
        if values:
            return dict(sorted(Counter(values).items(), key=lambda each: (-each[1], each[0])))
    return {}


def overlaps(sets: Mapping[str, PromptSet]) -> list[Overlap]:
    """All pairs of sets that share a prompt."""
    texts = {name: dict.fromkeys(prompts.texts) for name, prompts in sets.items()}
    plains = {name: {plain(text): text for text in own} for name, own in texts.items()}
    found = []
    for first, second in itertools.combinations(sets, 2):
        both = [text for text in texts[first] if text in texts[second]]
        alike = [text for each, text in plains[first].items() if each in plains[second]]
        if alike:
            found.append(Overlap(first, second, len(both), len(alike), (both or alike)[0]))
    return found


def schedule(sizes: Mapping[str, int], curriculum: Curriculum, draws: int, steps: int) -> list[Turn]:
    """When each task's prompts come, of `draws` a step in so many steps, for each stretch of equal weights."""
    turns = []
    for start, stop, shares in curriculum.within(steps) if steps else [(0, 0, curriculum.stretches[0][1])]:
        counts, total = curriculum.divided(shares, stop - start, draws).tolist(), sum(shares.weights)
        for (task, size), weight, count in zip(sizes.items(), shares.weights, counts, strict=True):
            a_step = draws * weight / total
            each = size / a_step if a_step else None
            turns.append(Turn(task, start, stop, weight / total, a_step, each, count / size))
    return turns


# ---- in words


def as_text(
    sets: Mapping[str, Profile], shared: Sequence[Overlap], turns: Sequence[Turn], measure: Measure, steps: int
) -> str:
    """All of it, a table a subject."""
    lengths = [f"longest ({measure.unit})", *([] if measure.limit is None else [f"beyond {measure.limit}"])]
    quotes = ["1 quoted", "2+ quoted", "single quotes", "curly"]
    head = ["set", "prompts", "distinct", "repeats", *lengths, "not ASCII", *quotes]
    rows = [
        [name, each.prompts, each.distinct, each.prompts - each.distinct, each.longest,
         *([] if each.cut is None else [each.cut]), each.not_ascii, each.quoted, each.several, each.single,
         each.curly]
        for name, each in sets.items()
    ]  # fmt: skip
    parts = [_table(head, rows), *(_about(name, each) for name, each in sets.items())]
    heads = ["shared by", "and", "exactly", "up to case and spaces", "such as"]
    both = [[each.first, each.second, each.exact, each.up_to_case, _short(each.example)] for each in shared]
    parts.append(_table(heads, both) if both else "no two sets share a prompt")
    if turns:
        heads = ["task", "share", "draws a step", "steps an epoch"]
        if all((each.start, each.stop) == (0, steps) for each in turns):
            parts.append(_table([*heads, f"epochs in {steps} steps"], [_turn(each) for each in turns]))
        else:
            rows = [[f"{each.start} to {each.stop}", *_turn(each)] for each in turns]
            parts.append(_table(["steps", *heads, "epochs in them"], rows))
    return "\n\n".join(parts)


def _about(name: str, found: Profile) -> str:
    lines = [f"{name}: {'; '.join((found.form, *found.quirks))}"]
    if found.tags:
        shown = [f"{tag} {count}" for tag, count in itertools.islice(found.tags.items(), _TAGS)]
        more = [f"and {len(found.tags) - _TAGS} more"] if len(found.tags) > _TAGS else []
        lines.append(f"  tags: {', '.join(shown + more)}")
    lines += [f"  {_short(example)}" for example in found.examples]
    return "\n".join([*lines, f"  longest: {_short(found.longest_prompt)}"])


def _turn(turn: Turn) -> list[Any]:
    an_epoch = "-" if turn.steps_an_epoch is None else _number(turn.steps_an_epoch)
    return [turn.task, f"{turn.share:.1%}", _number(turn.a_step), an_epoch, _number(turn.epochs)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 30]}…{text[-29:]}")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of equal width; numbers, and what stands above them, to the right."""
    rows = list(rows)
    words = [list(head), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    return align(words, {k for k in range(len(head)) if all(isinstance(row[k], int) for row in rows)})
