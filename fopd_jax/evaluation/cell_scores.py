"""Scores of a cell's images, kept prompt by prompt until all are there: what was killed goes on, what failed is asked
again, and what is there is asked of nobody twice.

    CELL/scores/12.json       what rewards have said of the images of the suite's prompt 12; gone once the cell is whole
    CELL/records.jsonl        the same of all of them, see `evaluation.records`

A score that failed is in neither's `scores`, but in `failed` with its reason. A later call asks for it again.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from fopd_jax.console import Progress
from fopd_jax.evaluation.generate import Sheet
from fopd_jax.evaluation.layouts import image_name, read_image
from fopd_jax.evaluation.records import DIVERSITY, SETTINGS_FILE, Cell, Record, read_cell, write_cell
from fopd_jax.evaluation.suites import Prompt, Suite, scored_by
from fopd_jax.files import write_json
from fopd_jax.parallel.agreement import share, together
from fopd_jax.parallel.distributed import barrier, is_main, warn
from fopd_jax.reading import parse_json, read_regular
from fopd_jax.rewards.geneval.rule import VALUES
from fopd_jax.rewards.monitors import pixel_features
from fopd_jax.rewards.pool import Pool, Ticket
from fopd_jax.rewards.reward import Scores

FOLDER = "scores"
Identities = Mapping[str, Mapping[str, Any]]
"""Of each reward what its scores depend on: scores of another are asked for again."""


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who scores: the `pool` of rewards, their kinds by name, and what each one is."""

    pool: Pool
    kinds: Mapping[str, str]
    identities: Identities

    def wanted(self, suite: Suite, prompt: Prompt) -> tuple[str, ...]:
        """Names of the scores that an image of a prompt is to have; those that rewards add are not among them."""
        return (*scored_by(prompt, self.kinds), *((DIVERSITY,) if suite.samples > 1 else ()))

    def of(self, suite: Suite) -> "Judges":
        """The same with the identities of those alone that score some of a suite."""
        names = {name for prompt in suite.prompts for name in scored_by(prompt, self.kinds)}
        kept = {name: each for name, each in self.identities.items() if name in names}
        return dataclasses.replace(self, identities=kept)


@dataclasses.dataclass
class Found:
    """What is known of one image."""

    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def forget(self, names: Iterable[str]) -> None:
        """As if nobody had been asked."""
        for name in names:
            self.failed.pop(name, None)
            for each in [each for each in self.scores if each == name or each.startswith(f"{name}/")]:
                del self.scores[each]


Known = dict[tuple[str, int], Found]


def lacking(sheet: Sheet, judges: Judges) -> int:
    """How many images have scores to come, failures to be asked again among them."""
    judges = judges.of(sheet.suite)
    known = _read(sheet, judges)
    return sum(bool(_names(judges, sheet.suite, prompt, known[prompt.id, s])) for prompt, s in sheet.suite.rows())


def score(sheet: Sheet, judges: Judges, at_once: int, progress: Progress) -> Cell:
    """Ask for all scores of a cell that are not there, and write it; all processes do, each for its own prompts.

    `at_once`: images that a process gives to rewards at once, at least those of one prompt.

    Raises:
      TooManyFailures: as `Pool`; what was scored until then is kept.
      ValueError: an image, or what was kept of scores, is damaged; names the file.
    """
    judges = judges.of(sheet.suite)
    known = _read(sheet, judges)
    counts = {
        place: sum(bool(_names(judges, sheet.suite, prompt, known[prompt.id, s])) for s in range(sheet.suite.samples))
        for place, prompt in enumerate(sheet.suite.prompts)
    }
    todo = json.loads(share("prompts to score", json.dumps([place for place, n in counts.items() if n]))[0])
    if todo and is_main():
        (sheet.folder / FOLDER).mkdir(exist_ok=True)
    barrier("the folder of scores is there")
    count, each = jax.process_count(), max(1, at_once // sheet.suite.samples)
    rounds = [todo[start : start + each * count] for start in range(0, len(todo), each * count)]
    waiting: collections.deque[_Batch] = collections.deque()

    def settle(batch: _Batch) -> None:
        together("scores of a batch", lambda: _settle(sheet, known, batch))
        progress(sum(counts[place] for place in batch.round))

    for places in rounds:
        mine = places[jax.process_index() :: count]
        waiting.append(together("images to score", lambda a=places, b=mine: _begin(sheet, judges, known, a, b)))
        if len(waiting) > 1:
            settle(waiting.popleft())
    for batch in waiting:
        settle(batch)
    barrier("the scores of a cell are there")
    return _written(sheet, judges)


# ---- what is known


def _read(sheet: Sheet, judges: Judges) -> Known:
    """Of every image what was said before, by rewards as they are now."""
    known: Known = {(prompt.id, sample): Found() for prompt, sample in sheet.suite.rows()}
    if (sheet.folder / SETTINGS_FILE).is_file():
        cell = read_cell(sheet.folder)
        for record in cell.records:
            if (record.prompt_id, record.sample) in known:
                known[record.prompt_id, record.sample] = Found(dict(record.scores), dict(record.failed))
        _forget(known.values(), cell.about.get("rewards", {}), judges.identities)
    for place, prompt in enumerate(sheet.suite.prompts):
        if (path := _part(sheet, place)).is_file():
            entries, identities = _read_part(path, sheet.suite.samples)
            _forget(entries, identities, judges.identities)
            known |= {(prompt.id, sample): entry for sample, entry in enumerate(entries)}
    return known


def _part(sheet: Sheet, place: int) -> Path:
    return sheet.folder / FOLDER / f"{place}.json"


def _read_part(path: Path, samples: int) -> tuple[list[Found], Identities]:
    try:
        found = parse_json(read_regular(path))
        entries, identities = [Found(**each) for each in found["images"]], found["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and its images are scored again") from error
    if len(entries) != samples:
        raise ValueError(f"{path}: found scores of {len(entries)} images, expected {samples}; remove it")
    return entries, identities


def _forget(found: Iterable[Found], then: Identities, now: Identities) -> None:
    """Take back what another reward of the same name has said; of rewards that are not asked now it stands."""
    other = [name for name, identity in now.items() if name in then and then[name] != identity]
    for each in found:
        each.forget(other)


def _names(judges: Judges, suite: Suite, prompt: Prompt, found: Found) -> tuple[str, ...]:
    """The scores that an image lacks."""
    return tuple(name for name in judges.wanted(suite, prompt) if name not in found.scores)


# ---- asking


class _Batch(NamedTuple):
    """Prompts whose images are being scored, by place, in a `round` of all processes and by this one (`mine`); tickets
    with the rows that each is of; and diversities.
    """

    round: Sequence[int]
    mine: Sequence[int]
    tickets: Sequence[tuple[Ticket, Sequence[tuple[Prompt, int]]]]
    diversities: Mapping[tuple[str, int], float]
    identities: Identities


def _begin(sheet: Sheet, judges: Judges, known: Known, places: Sequence[int], mine: Sequence[int]) -> _Batch:
    """Give this process's images of some prompts to the rewards that have not scored them."""
    suite, groups = sheet.suite, collections.defaultdict(list)  # by what is asked, and the size of pictures
    diversities: dict[tuple[str, int], float] = {}
    pixels: dict[tuple[str, int], UInt8[np.ndarray, "h w 3"]] = {}
    for place in mine:
        prompt = suite.prompts[place]
        for sample in range(suite.samples):
            names = _names(judges, suite, prompt, known[prompt.id, sample])
            asked = tuple(name for name in names if name != DIVERSITY)
            if asked:
                image = read_image(sheet.folder / image_name(suite, prompt, sample))
                pixels[prompt.id, sample] = image
                groups[asked, image.shape].append((prompt, sample))
            if DIVERSITY in names and not sample:
                diversities |= _diversities(sheet, prompt)
    tickets = []
    for (names, _), rows in groups.items():
        images = np.stack([pixels[prompt.id, sample] for prompt, sample in rows])
        texts, beside = [prompt.text for prompt, _ in rows], [prompt.metadata for prompt, _ in rows]
        tickets.append((judges.pool.submit(images, texts, beside, names), rows))
    return _Batch(places, mine, tickets, diversities, judges.identities)


def _diversities(sheet: Sheet, prompt: Prompt) -> dict[tuple[str, int], float]:
    suite = sheet.suite
    names = [image_name(suite, prompt, sample) for sample in range(suite.samples)]
    small = [pixel_features(read_image(sheet.folder / name)[None]) for name in names]  # of any sizes
    features = np.concatenate(small).astype(np.float64)
    return {(prompt.id, sample): value for sample, value in enumerate(_mean_distances(features).tolist())}


def _mean_distances(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Of each row to the others."""
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return apart.sum(1) / (len(features) - 1)


def _settle(sheet: Sheet, known: Known, batch: _Batch) -> None:
    """Keep what was said of a batch, whether or not that is the last one that may fail."""
    problem: Exception | None = None
    for ticket, rows in batch.tickets:
        try:
            found = ticket.result()
        except Exception as error:  # too many failures: the scores are there
            problem, found = error, ticket.result()
        for name, scores in found.items():
            for row, (prompt, sample) in enumerate(rows):
                _note(known[prompt.id, sample], name, scores, row)
    for key, value in batch.diversities.items():
        known[key].scores[DIVERSITY] = value
    for place in batch.mine:
        prompt = sheet.suite.prompts[place]
        images = [dataclasses.asdict(known[prompt.id, sample]) for sample in range(sheet.suite.samples)]
        write_json(_part(sheet, place), {"rewards": batch.identities, "images": images})
    if problem is not None:
        raise problem


def _note(found: Found, name: str, scores: Scores, row: int) -> None:
    """GenEval's reward says four values of an image; the others stand beside the one that is rewarded."""
    found.forget([name])
    about = scores.details[row]
    if scores.failed[row]:
        found.failed[name] = str(about["error"])
        return
    found.scores[name] = float(scores.values[row])
    if set(VALUES) <= about.keys():
        found.scores |= {f"{name}/{value}": float(about[value]) for value in VALUES}


# ---- the whole


def _written(sheet: Sheet, judges: Judges) -> Cell:
    """The cell, which process 0 writes where anything about it is new."""
    known = _read(sheet, judges)
    records = tuple(
        Record(
            prompt.id, sample, prompt.text, image_name(sheet.suite, prompt, sample),
            *_sorted(known[prompt.id, sample]), dict(prompt.tags),
        )
        for prompt, sample in sheet.suite.rows()
    )  # fmt: skip
    kept = read_cell(sheet.folder) if (sheet.folder / SETTINGS_FILE).is_file() else None
    earlier = kept.about.get("rewards", {}) if kept else {}
    identities = {name: dict(each) for name, each in sorted({**earlier, **judges.identities}.items())}
    about = {**sheet.about, "layout": sheet.suite.layout, "prompts_sha256": sheet.suite.digest(), "rewards": identities}
    cell = Cell(sheet.model, sheet.suite.name, sheet.setting, sheet.settings, records, about)
    barrier("all have read the scores")
    if is_main() and kept != cell:
        write_cell(sheet.folder, cell)
    if is_main():
        shutil.rmtree(sheet.folder / FOLDER, ignore_errors=True)
    _tell(sheet, records)
    return cell


def _sorted(found: Found) -> tuple[dict[str, float], dict[str, str]]:
    """In an order that does not depend on when they were said."""
    return dict(sorted(found.scores.items())), dict(sorted(found.failed.items()))


def _tell(sheet: Sheet, records: Sequence[Record]) -> None:
    """A line for each reward that failed."""
    reasons = collections.defaultdict(list)
    for record in records:
        for name, reason in record.failed.items():
            reasons[name].append(reason)
    for name, each in reasons.items():
        first = collections.Counter(each).most_common(1)[0][0]
        lost = f"{len(each)} of {len(records)} scores failed, most often: {first}"
        warn(f"{sheet.named}: {name}: {lost}; the same command asks again")
