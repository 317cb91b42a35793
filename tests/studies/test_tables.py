"""Every row of every table is a config that can be run, and another than its neighbours."""

from pathlib import Path

import pytest

from fopd_jax.config.load import load_config
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.studies.students import Student, fields_of
from fopd_jax.studies.tables import BUDGET, SKILLS, TABLES, Table

ROOT = Path(__file__).parents[2]


def resolved(student: Student, table: Table) -> dict[str, object]:
    path, _, variant = student.config.partition(":")
    config = load_config(ROOT / "configs" / f"{path}.py", variant)
    whole = flatten(resolve(override(config, {**BUDGET, **table.budget, **fields_of(student, tuple(config.tasks))})))
    return {field: value for field, value in whole.items() if field != "name"}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_sound_and_apart(name: str) -> None:
    table = TABLES[name]
    configs = [str(sorted(resolved(student, table).items(), key=str)) for student in table.rows.values()]
    assert len(set(configs)) == len(configs)


def test_recipes_are_all_there() -> None:
    files = {file.stem for file in (ROOT / "configs" / "recipes").glob("*.py")}
    assert {f"recipes/{file}:miniature" for file in files} == {
        student.config for student in TABLES["recipes"].rows.values() if student.config != "miniature"
    }


def test_columns_are_made() -> None:
    for table in TABLES.values():
        for column in table.columns:
            for student in table.rows.values():
                asked = student.fields.get("eval.also_steps", ())
                assert column in student.scored or column.removeprefix("steps ") in map(str, asked)
    assert "text" in SKILLS
