"""Every row of every table, at either scale, is a config that can be run, and another than its neighbours."""

from pathlib import Path

import pytest

from fopd_jax.config.load import load_config
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.studies.students import Student, fields_of
from fopd_jax.studies.tables import MINIATURE, NAMES, SD35M, SKILLS, Scale, Table, tables

ROOT = Path(__file__).parents[2]


def resolved(student: Student, table: Table, scale: Scale) -> str:
    path, _, variant = (student.config or scale.main).partition(":")
    budget = {**scale.budget, **table.budget} if student.budget is None else student.budget
    config = override(load_config(ROOT / "configs" / f"{path}.py", variant), budget)
    whole = flatten(resolve(override(config, fields_of(student, config))))
    return str(sorted((field, str(value)) for field, value in whole.items() if field != "name"))


@pytest.mark.parametrize("scale", [MINIATURE, SD35M], ids=["miniature", "sd35m"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_sound_and_apart(name: str, scale: Scale) -> None:
    table = tables(scale)[name]
    configs = [resolved(student, table, scale) for student in table.rows.values()]
    # what recipes name of SD3.5's settings is partly what its main config has anyway
    same = {"recipes": 1} if scale is SD35M else {}
    assert len(configs) - len(set(configs)) <= same.get(name, 0)


def test_recipes_are_all_there() -> None:
    files = {file.stem for file in (ROOT / "configs" / "recipes").glob("*.py")}
    configs = {student.config for student in tables(MINIATURE)["recipes"].rows.values()}
    assert {f"recipes/{file}:miniature" for file in files} == configs - {""}


def test_columns_are_made() -> None:
    for table in tables(MINIATURE).values():
        for column in table.columns:
            for student in table.rows.values():
                asked = {**table.budget, **student.fields}.get("eval.also_steps", ())
                assert column in student.scored or column.removeprefix("steps ") in map(str, asked)
    assert "text" in SKILLS
