"""Columns of suites against plain readings of their published rules and against numbers by hand."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest

from fopd_jax.evaluation.columns import average_of, columns_of
from fopd_jax.evaluation.comparison import Column, sums_of
from fopd_jax.evaluation.records import Cell, Record
from fopd_jax.evaluation.statistics import estimate, interval
from fopd_jax.rewards.geneval.detections import CLASSES, Detections
from fopd_jax.rewards.geneval.records import COLOURS, TAGS, read_record
from fopd_jax.rewards.geneval.rule import VALUES, geneval_score
from fopd_jax.rewards.geneval.summary import summary
from fopd_jax.tasks.geneval import generate
from tests.evaluation.cells import SETTINGS, cell_of, random, shuffled
from tests.evaluation.geneval_oracle import Thing, is_correct, overall


def numbers(cell: Cell) -> dict[str, float]:
    return {column.name: number(column) for column in columns_of(cell)}


def number(column: Column) -> float:
    found = sums_of(column)
    return math.nan if found is None else estimate(found)


# ---- GenEval


def scene(metadata: dict[str, Any], rng: np.random.Generator) -> list[Thing]:
    """Objects as they were asked for, more or less; scores are exact in any precision."""
    things = []
    for wanted in metadata["include"]:
        for _ in range(max(0, wanted["count"] + int(rng.choice([-1, 0, 0, 0, 0, 1])))):
            corner, side = rng.integers(0, 400, 2), rng.integers(8, 112, 2)
            box = tuple(float(x) for x in (*corner, *(corner + side)))
            colour = wanted.get("color", "red") if rng.random() < 0.6 else str(rng.choice(COLOURS))
            things.append(Thing(wanted["class"], box, float(rng.integers(16, 65)) / 64, colour))
    return things


def judged(metadata: dict[str, Any], things: list[Thing]) -> dict[str, Any]:
    """What the reward keeps of an image."""
    found = Detections(
        np.array([each.box for each in things], np.float32).reshape(-1, 4),
        np.array([each.score for each in things], np.float32),
        np.array([CLASSES.index(each.name) for each in things], int),
    )
    scores = geneval_score(read_record("", metadata), found, lambda _, places: [things[k].colour for k in places])
    return dataclasses.asdict(scores)


@functools.cache
def composed() -> tuple[list[dict[str, Any]], list[bool], list[dict[str, Any]]]:
    """The published prompts' records, four times; each image's verdict by the oracle, and its scores by the reward."""
    _, records = generate("test", None, 0)
    rng = np.random.default_rng(0)
    rows = [record for record in records for _ in range(4)]
    scenes = [scene(metadata, rng) for metadata in rows]
    verdicts = [is_correct(*each) for each in zip(rows, scenes, strict=True)]
    return rows, verdicts, [judged(*each) for each in zip(rows, scenes, strict=True)]


def geneval_cell() -> Cell:
    rows, _, scores = composed()
    records = [
        Record(
            str(k // 4), k % 4, "", "", {"geneval": 0.0, **{f"geneval/{v}": float(each[v]) for v in VALUES}},
            tags={"tag": row["tag"]},
        )
        for k, (row, each) in enumerate(zip(rows, scores, strict=True))
    ]  # fmt: skip
    return Cell("student", "geneval", "", SETTINGS, tuple(records))


def test_geneval_is_what_a_plain_reading_of_the_published_rule_says_of_2212_images():
    rows, verdicts, scores = composed()
    assert len(verdicts) == 2212
    assert 0.2 < np.mean(verdicts) < 0.8
    assert [each["official"] for each in scores] == verdicts
    found = numbers(geneval_cell())
    assert found["official tag mean"] == pytest.approx(
        overall([(r["tag"], v) for r, v in zip(rows, verdicts, strict=True)])
    )
    assert found["official image mean"] == pytest.approx(sum(verdicts) / len(verdicts))
    assert abs(found["official tag mean"] - found["official image mean"]) > 1e-3  # one is not the other


def test_all_of_geneval_s_means_are_the_reward_s_own_summary():
    rows, _, scores = composed()
    expected, found = summary(scores, rows), numbers(geneval_cell())
    for value in ("official", "exact", "continuous"):
        assert found[f"{value} tag mean"] == pytest.approx(expected[value]["tag_mean"])
        assert found[f"{value} image mean"] == pytest.approx(expected[value]["image_mean"])
    for tag in TAGS:
        assert found[f"official {tag}"] == pytest.approx(expected["official"]["tags"][tag])
    assert found["geneval/continuous_fixed"] == pytest.approx(expected["continuous_fixed"]["image_mean"])
    assert "geneval" not in found  # whichever of the others it is
    assert list(found)[:4] == ["official tag mean", "official image mean", "exact tag mean", "exact image mean"]


def test_tag_means_are_drawn_within_tags():
    """Where a tag's prompts are alike and tags are not, only a draw across tags would move the mean."""
    scores = np.repeat([[0.0], [1.0]], 5, axis=0).repeat(2, axis=1)
    cell = cell_of("a", "geneval", {"geneval/official": scores}, lambda prompt: {"tag": TAGS[prompt // 5]})
    columns = {column.name: column for column in columns_of(cell)}
    tags, images = (sums_of(columns[f"official {which} mean"]) for which in ("tag", "image"))
    assert tags is not None
    assert images is not None
    assert interval(tags) == (0.5, 0.5, 0.5)
    assert interval(images)[2] > 0.5
    assert columns["official tag mean"].note == "tag means are of single_object, two_object alone"


def test_an_image_that_no_detector_saw_has_none_of_geneval_s_scores():
    cell = geneval_cell()
    lost = dataclasses.replace(cell.records[0], scores={}, failed={"geneval": "server gone"})
    columns = columns_of(dataclasses.replace(cell, records=(lost, *cell.records[1:])))
    assert {column.name: column.failed for column in columns if column.failed} == {
        f"{value} {which} mean": 1 for value in ("official", "exact", "continuous") for which in ("tag", "image")
    } | {f"official {TAGS[0]}": 1, "geneval/continuous_fixed": 1}


def test_prompts_of_other_tags_are_named():
    cell = cell_of("a", "geneval", {"geneval/official": np.ones((2, 1))}, lambda prompt: {"tag": "size"})
    with pytest.raises(ValueError, match=r"a, geneval: prompt '0': found tag 'size', expected one of single_object"):
        columns_of(cell)


# ---- T2I-CompBench

KINDS = ("spatial", "action", "spatialaction")
PROMPTS, SAMPLES = 12, 3


def complex_cell(clip: float = 0.3) -> Cell:
    scores = {name: random(k, PROMPTS, SAMPLES) for k, name in enumerate(("blip_vqa", "unidet_2d"))}
    scores["clipscore"] = clip * random(2, PROMPTS, SAMPLES, 0.8, 1.2)
    return cell_of(
        "a", "t2icompbench", scores, lambda prompt: {"category": "complex", "tag": KINDS[prompt % len(KINDS)]}
    )


def published_3_in_1(cell: Cell) -> list[float]:
    """As its program joins three lists of answers: all in the order of prompts, so many lines each."""
    records = sorted(cell.records, key=lambda record: (int(record.prompt_id), record.sample))
    attribute, spatial, action = (
        [record.scores[name] for record in records] for name in ("blip_vqa", "unidet_2d", "clipscore")
    )
    total = []
    for line in range(PROMPTS * SAMPLES):
        match KINDS[line // SAMPLES % len(KINDS)]:
            case "spatial":
                total.append((spatial[line] + attribute[line]) * 0.5)
            case "action":
                total.append((action[line] + attribute[line]) * 0.5)
            case _:
                total.append((attribute[line] + spatial[line] + action[line]) / 3)
    return total


def test_complex_prompts_are_judged_as_published_whatever_the_order_of_lines():
    cell = complex_cell()
    (column,) = columns_of(cell)
    assert column.name == "complex_3in1"
    expected = published_3_in_1(cell)
    assert list(column.parts["all"].values.values()) == pytest.approx(
        [expected[int(prompt) * SAMPLES + sample] for _, prompt, sample in column.parts["all"].values]
    )
    assert number(column) == pytest.approx(np.mean(expected))
    for seed in range(3):
        (other,) = columns_of(shuffled(cell, seed))
        assert other == column
        assert list(other.parts["all"].values) == list(column.parts["all"].values)


def test_what_an_image_lacks_of_three_scores_makes_it_a_failure():
    cell = complex_cell()
    broken = dataclasses.replace(cell.records[0], scores={"blip_vqa": 1.0}, failed={"unidet_2d": "no noun"})
    (column,) = columns_of(dataclasses.replace(cell, records=(broken, *cell.records[1:])))
    assert (column.count, column.failed) == (PROMPTS * SAMPLES - 1, 1)


def test_scores_in_another_unit_or_kinds_that_nobody_told_are_not_averaged():
    (column,) = columns_of(complex_cell(clip=0.93))
    assert (dict(column.parts), column.note[:30]) == ({}, "no complex_3in1: clipscore is ")
    assert column.note.endswith("expected the cosine itself")
    untold = cell_of("a", "t2icompbench", {"blip_vqa": np.ones((1, 1))}, lambda _: {"category": "complex"})
    assert columns_of(untold)[0].note == (
        "no complex_3in1: prompt '0' has tag 'None', expected one of spatial, action, spatialaction"
    )


def test_categories_of_compbench_have_columns_of_their_own():
    cell = complex_cell()
    colours = cell_of("a", "t2icompbench", {"blip_vqa": random(5, 4, 2)}, lambda _: {"category": "color"})
    moved = [dataclasses.replace(record, prompt_id=f"color/{record.prompt_id}") for record in colours.records]
    found = numbers(dataclasses.replace(cell, records=(*moved, *cell.records)))
    assert list(found) == ["color", "complex_3in1"]
    assert found["color"] == pytest.approx(random(5, 4, 2).mean())


# ---- others


def test_dpg_and_diversity_are_means_of_prompts_means():
    values = np.array([[1.0, 1.0, 0.0], [0.5, np.nan, np.nan]])
    found = numbers(cell_of("a", "dpg", {"dpg": values, "diversity": values, "unifiedreward": values}))
    assert found["dpg"] == found["diversity"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert found["unifiedreward"] == pytest.approx(2.5 / 4)


def test_tasks_of_a_world_have_a_column_a_score_and_monitors_are_no_scores():
    names = ("quality", "composition_strict", "composition", "monitors/dark_share")
    columns = columns_of(cell_of("a", "composition", {name: random(k, 5, 2) for k, name in enumerate(names)}))
    assert [(column.name, column.table, column.ranked) for column in columns] == [
        ("composition", "", True), ("composition_strict", "", True), ("monitors/dark_share", "monitors", False),
        ("quality", "", True),
    ]  # fmt: skip
    assert number(columns[0]) == pytest.approx(random(2, 5, 2).mean())


# ---- the paper's average


def averaged_cells(**others: np.ndarray) -> list[Cell]:
    scores = {"ocr": random(1, 7, 1), "deqa": random(2, 8, 1, 3, 5), "pickscore": random(3, 8, 1, 20, 24), **others}
    geneval = cell_of("a", "geneval", {"geneval/official": random(0, 12, 2)}, lambda k: {"tag": TAGS[k // 2]})
    return [geneval, *(cell_of("a", name, {name: values}) for name, values in scores.items())]


def test_the_average_is_the_paper_s():
    """The base model's row: GenEval .63, OCR .59, DeQA 4.07, PickScore 21.64 are .717 on average."""
    cells = averaged_cells(ocr=np.full((2, 1), 0.59), deqa=np.full((2, 1), 4.07), pickscore=np.full((2, 1), 21.64))
    flat = {"geneval/official": np.full((12, 1), 0.63)}
    cells[0] = cell_of("a", "geneval", flat, lambda prompt: {"tag": TAGS[prompt // 2]})
    assert number(average_of(cells)) == pytest.approx(0.717, abs=5e-4)
    cells = averaged_cells()
    by_suite = {cell.suite: numbers(cell) for cell in cells}
    expected = (
        by_suite["geneval"]["official tag mean"] + by_suite["ocr"]["ocr"]
        + by_suite["deqa"]["deqa"] / 5 + by_suite["pickscore"]["pickscore"] / 26
    ) / 4  # fmt: skip
    assert number(average_of(cells)) == pytest.approx(expected)


def test_prompts_that_deqa_and_pickscore_share_are_drawn_for_both():
    """Their sum of what one gains and the other loses does not move then."""
    pickscore = random(3, 8, 1, 20, 24)
    shared = sums_of(average_of(averaged_cells(pickscore=pickscore, deqa=4 - (pickscore - 22) * 5 / 26)))
    apart = sums_of(average_of(averaged_cells(pickscore=pickscore, deqa=np.full((9, 1), 4.0))))
    assert shared is not None
    assert apart is not None
    assert (len(np.bincount(shared.strata)), len(np.bincount(apart.strata))) == (8, 9)
    deqa_and_pickscore = dataclasses.replace(
        shared, sums=shared.sums[:, -2:], counts=shared.counts[:, -2:], weights=shared.weights[-2:]
    )
    kept = deqa_and_pickscore.counts.sum(1) > 0
    only = dataclasses.replace(
        deqa_and_pickscore, sums=deqa_and_pickscore.sums[kept], counts=deqa_and_pickscore.counts[kept],
        strata=np.zeros(kept.sum(), int),
    )  # fmt: skip
    value, low, high = interval(only)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)


LOW = random(0, 4, 1)  # as if divided for training


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        (averaged_cells()[:2], "no average without deqa, pickscore"),
        (averaged_cells(pickscore=LOW), "no average: pickscore is 0.241 on average, expected the logit itself"),
        (averaged_cells(deqa=LOW), "no average: deqa is 0.241 on average, expected 1 to 5"),
        (averaged_cells(ocr=random(0, 4, 1))[1:], "no average without geneval"),
    ],
)
def test_why_there_is_no_average(cells: list[Cell], note: str):
    assert average_of(cells).note.startswith(note)
    assert not average_of(cells).parts


def test_geneval_s_reward_alone_is_not_what_the_average_is_made_of():
    cells = averaged_cells()
    cells[0] = cell_of("a", "geneval", {"geneval": np.ones((6, 1))}, lambda prompt: {"tag": TAGS[prompt]})
    assert average_of(cells).note == "no average: no geneval/official on geneval"
    assert numbers(cells[0]) == {"geneval": 1.0}


def test_suites_at_unequal_settings_have_no_average():
    cells = averaged_cells()
    cells[1] = dataclasses.replace(cells[1], settings=dataclasses.replace(SETTINGS, guidance=1.0))
    assert average_of(cells).note == "no average: guidance unequal on geneval and ocr"
