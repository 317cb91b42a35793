"""What may be compared, by name; pairs by prompt and sample; sums of prompts against plain loops."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.evaluation.comparison import (
    CHOICES,
    Column,
    Part,
    by_image,
    check_choices,
    check_comparable,
    differences,
    gathered,
    paired,
    sums_of,
)
from fopd_jax.evaluation.records import Cell, Record
from fopd_jax.evaluation.statistics import estimate
from tests.evaluation.cells import SETTINGS, cell_of, random, shuffled

BASE, STUDENT = (cell_of(name, "ocr", {"ocr": random(k, 4, 2)}) for k, name in enumerate(("base", "student")))
OTHERS = {
    "sampler": "sde", "steps": 8, "guidance": 1.0, "noise_level": 0.7, "resolution": 1024, "shift": 1.5, "seed": 2,
    "rewritten": True,
}  # fmt: skip


def test_equal_cells_are_comparable_whatever_their_order():
    check_comparable(BASE, shuffled(STUDENT))
    assert differences(BASE, STUDENT) == {}


@pytest.mark.parametrize("name", dataclasses.asdict(SETTINGS))
def test_every_setting_that_is_unequal_is_named_with_both_values_unless_it_is_allowed(name: str):
    other = dataclasses.replace(STUDENT, settings=dataclasses.replace(SETTINGS, **{name: OTHERS[name]}))
    message = rf"base, ocr, steps 40 and student, ocr, steps 40 are not comparable: {name}: found (\S+) and (\S+), "
    with pytest.raises(ValueError, match=message + rf"expected equal ones, or --allow-unequal={name}$"):
        check_comparable(BASE, other)
    check_comparable(BASE, other, [name])
    with pytest.raises(ValueError, match=f"--allow-unequal={'samples'},{name}$"):
        check_comparable(BASE, other, ["samples"])


def test_all_that_is_unequal_is_told_at_once():
    settings = dataclasses.replace(SETTINGS, guidance=1.0, steps=8)
    with pytest.raises(ValueError, match=r"steps: found 40 and 8; guidance: found 4\.5 and 1, expected"):
        check_comparable(BASE, dataclasses.replace(STUDENT, settings=settings))


def test_other_prompts_and_samples_are_refused():
    fewer = dataclasses.replace(STUDENT, records=STUDENT.records[:6])
    with pytest.raises(ValueError, match="prompts: found 4 and 3 prompts, '3' being 'prompt 3' and none, expected"):
        check_comparable(BASE, fewer)
    reworded = dataclasses.replace(STUDENT.records[0], prompt="a cat")
    with pytest.raises(ValueError, match="'0' being 'prompt 0' and 'a cat', expected"):
        check_comparable(BASE, dataclasses.replace(STUDENT, records=(reworded, *STUDENT.records[2:])), ["samples"])
    single = dataclasses.replace(STUDENT, records=STUDENT.records[1:])
    with pytest.raises(ValueError, match="samples: found 2 and 1 of prompt '0', or of other numbers, expected"):
        check_comparable(BASE, single)
    renumbered = (dataclasses.replace(STUDENT.records[0], sample=7), *STUDENT.records[1:])
    with pytest.raises(ValueError, match="samples: found 2 and 2 of prompt '0', or of other numbers, expected"):
        check_comparable(BASE, dataclasses.replace(STUDENT, records=renumbered))
    check_comparable(BASE, fewer, ["prompts"])
    check_comparable(BASE, single, ["samples"])


def test_suites_are_never_mixed_and_choices_are_known():
    with pytest.raises(ValueError, match="found suites ocr and deqa, expected one"):
        check_comparable(BASE, dataclasses.replace(STUDENT, suite="deqa"), CHOICES)
    check_choices(CHOICES)
    with pytest.raises(ValueError, match=r"--allow-unequal: found 'cfg', expected some of prompts, samples, sampler, "):
        check_choices(["guidance", "cfg"], "--allow-unequal")


def test_images_are_there_once_and_scores_are_numbers():
    assert list(by_image(shuffled(BASE))) == list(by_image(BASE)) == sorted(by_image(BASE))
    with pytest.raises(ValueError, match="base, ocr, steps 40: sample 0 of prompt '0' is there twice"):
        by_image(dataclasses.replace(BASE, records=(BASE.records[0], *BASE.records)))
    wrong = dataclasses.replace(BASE.records[1], scores={"ocr": float("nan")})
    with pytest.raises(ValueError, match="base, ocr, steps 40: ocr of sample 1 of prompt '0': found nan"):
        by_image(dataclasses.replace(BASE, records=(BASE.records[0], wrong)))


# ---- several evaluations


def test_models_of_one_name_are_told_apart_by_their_folders_where_they_are_others():
    mine, theirs = BASE, dataclasses.replace(BASE, records=shuffled(STUDENT).records)
    same = shuffled(BASE)
    found = gathered({Path("x/one"): [mine, STUDENT], Path("y/two"): [theirs]})
    assert [cell.model for cell in found] == ["one/base", "student", "two/base"]
    assert [cell.model for cell in gathered({Path("one"): [mine], Path("two"): [same, STUDENT]})] == ["base", "student"]
    elsewhere = dataclasses.replace(STUDENT, model="base", suite="deqa")
    assert [cell.model for cell in gathered({Path("one"): [mine], Path("two"): [elsewhere]})] == ["base", "base"]
    alike = gathered({Path("x/run"): [mine], Path("y/run"): [theirs]})
    assert [cell.model for cell in alike] == ["x/run/base", "y/run/base"]


# ---- pairs


def column(*parts: Part) -> Column:
    return Column("x", {str(k): part for k, part in enumerate(parts)})


def test_pairs_are_of_images_that_both_have_a_score_of():
    one = column(Part({("s", "a", 0): 1.0, ("s", "a", 1): 0.5, ("s", "b", 0): 0.0}, {("s", "b", 1): "no text"}))
    other = column(Part({("s", "b", 1): 0.9, ("s", "b", 0): 0.25, ("s", "a", 0): 0.5}, {("s", "a", 1): "server gone"}))
    found = paired(one, other)
    assert found is not None
    assert found.parts["0"].values == {("s", "a", 0): 0.5, ("s", "b", 0): -0.25}
    assert found.parts["0"].failed == {("s", "a", 1): "server gone", ("s", "b", 1): "no text"}
    assert (found.count, found.failed) == (2, 2)


def test_what_is_in_one_alone_is_no_pair_and_other_parts_are_no_differences():
    one, other = column(Part({("s", "a", 0): 1.0, ("s", "a", 1): 1.0})), column(Part({("s", "a", 0): 0.0}))
    found = paired(one, other)
    assert found is not None
    assert (found.count, found.failed) == (1, 0)
    assert paired(one, column(*one.parts.values(), Part({}))) is None


def test_sums_are_a_plain_loop_s_in_any_order():
    rng = np.random.default_rng(0)
    values = {("s", str(p), s): float(rng.random()) for p in range(9) for s in range(3) if rng.random() < 0.8}
    first = {key: value for key, value in values.items() if int(key[1]) < 5}
    rest = {key: value for key, value in values.items() if key not in first}
    parts = [Part(first, weight=0.25), Part(rest, {("s", "8", 9): "lost"}, weight=0.75, by_prompt=True)]
    found = sums_of(column(*parts))
    assert found is not None
    prompts = [np.mean([v for k, v in rest.items() if k[1] == p]) for p in sorted({key[1] for key in rest})]
    assert estimate(found) == pytest.approx(0.25 * np.mean(list(first.values())) + 0.75 * np.mean(prompts))
    assert list(found.strata) == [0] * 5 + [1] * 4
    turned = [dataclasses.replace(part, values=dict(reversed(part.values.items()))) for part in parts]
    again = sums_of(column(*turned))
    assert again is not None
    for name in ("sums", "counts", "weights", "strata"):
        assert np.array_equal(getattr(found, name), getattr(again, name))


def test_of_no_values_there_are_no_sums():
    assert sums_of(column(Part({}, {("s", "a", 0): "lost"}))) is None


def test_a_cell_without_records_is_read():
    empty = Cell("a", "ocr", "", SETTINGS, ())
    assert by_image(empty) == {}
    assert "prompts" in differences(empty, Cell("b", "ocr", "", SETTINGS, (Record("0", 0, "x", "x.png"),)))
