"""Suites at their published sizes, and who scores them; lists that somebody has are read from the shared data."""

from collections import Counter
from pathlib import Path

import pytest

from fopd_jax.evaluation.suites import (
    COMPBENCH,
    COMPLEX,
    SUITES,
    Prompt,
    Suite,
    chosen,
    difference,
    read_suite,
    scored_by,
)
from fopd_jax.tasks.task import Task
from tests.shared_data import shared

LISTS = {
    "ocr": "flow_grpo/ocr/test.txt",
    "drawbench": "drawbench/DrawBench.csv",
    "dpg": "dpg_bench/prompts.jsonl",
    "geneval2": "geneval2/geneval2_data.jsonl",
    "t2icompbench": "t2i_compbench",
}


def test_geneval_needs_no_file_and_has_the_published_order():
    suite = read_suite("geneval", {}, {})
    assert (len(suite.prompts), suite.samples, suite.images) == (553, 4, 2212)
    assert difference(suite) == ""
    assert [suite.prompts[0].id, suite.prompts[-1].place] == ["0", 552]
    assert suite.prompts[0].tags == {"tag": "single_object"}
    assert suite.prompts[0].metadata["include"][0]["count"] == 1


@pytest.mark.parametrize("name", LISTS)
def test_published_lists_have_their_sizes(name: str):
    suite = read_suite(name, {name: str(shared(LISTS[name]))}, {})
    assert difference(suite) == ""
    assert len(suite.prompts) == SUITES[name].prompts
    assert len({prompt.id for prompt in suite.prompts}) == len(suite.prompts)


def test_repeated_rows_are_samples_of_one_prompt():
    """Lists that hold each prompt as often as it has samples are the same prompts."""
    rows = read_suite("geneval", {"geneval": str(shared("flow_grpo/geneval/test_metadata.jsonl"))}, {})
    assert {each.text for each in rows.prompts} == {each.text for each in read_suite("geneval", {}, {}).prompts}
    assert len(rows.prompts) == 553
    drawn = read_suite("drawbench", {"drawbench": str(shared("flow_opd/drawbench/test.txt"))}, {})
    assert (len(drawn.prompts), drawn.samples) == (200, 5)


def test_compbench_keeps_equal_rows_apart_and_names_them_by_category():
    suite = read_suite("t2icompbench", {"t2icompbench": str(shared("t2i_compbench"))}, {})
    assert [suite.prompts[k * 300].id for k in range(8)] == [f"{name}/0" for name in COMPBENCH]
    assert suite.prompts[0].text == "a green bench and a blue bowl"  # without its file's CR
    for category, kinds in COMPBENCH.items():
        own = [prompt for prompt in suite.prompts if prompt.tags["category"] == category]
        assert {prompt.kinds for prompt in own} == (set(COMPLEX.values()) if category == "complex" else {kinds})
    found = Counter(prompt.tags["tag"] for prompt in suite.prompts if prompt.tags["category"] == "complex")
    assert found == {"spatial": 58, "action": 212, "spatialaction": 30}


def _task(name: str, *prompts: str) -> dict[str, Task]:
    return {name: Task(name, (), prompts, ("text",), rewards={"mine": 1.0})}


def test_prompts_come_from_a_source_or_a_task_of_that_name(tmp_path: Path):
    tasks = _task("pickscore", "a", "b")
    assert [each.text for each in read_suite("deqa", {}, tasks).prompts] == ["a", "b"]
    (tmp_path / "own.txt").write_text("c\n", encoding="utf-8")
    assert [each.text for each in read_suite("deqa", {"deqa": str(tmp_path / "own.txt")}, tasks).prompts] == ["c"]
    own = read_suite("signs", {}, _task("signs", "a", "a"))
    assert [(each.id, each.kinds) for each in own.prompts] == [("0", ("text", "mine")), ("1", ("text", "mine"))]
    assert difference(own) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ocr", "--suites ocr: no prompts at hand; expected --suite-data=ocr=FILE of its 1018 prompts, or tasks.ocr"),
        ("t2icompbench", "--suite-data=t2icompbench=FOLDER of color_val.txt, shape_val.txt"),
        ("genevl", "--suites: found 'genevl', expected some of signs, geneval, ocr"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read_suite(name, {}, _task("signs", "a"))


def test_compbench_says_which_list_is_missing(tmp_path: Path):
    (tmp_path / "color_val.txt").write_text("a red cup\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no shape_val\.txt"):
        read_suite("t2icompbench", {"t2icompbench": str(tmp_path)}, {})


def test_a_part_of_a_suite_is_spread_over_it_and_keeps_its_ids():
    suite = chosen(read_suite("geneval", {}, {}), 6, 2)
    assert [prompt.id for prompt in suite.prompts] == ["0", "92", "184", "276", "368", "460"]
    assert (suite.samples, suite.images) == (2, 12)
    assert difference(suite) == "6 × 2, published 553 × 4"
    with pytest.raises(ValueError, match="--samples: found 0, expected 1 to 100"):
        chosen(suite, None, 0)


def test_rewards_score_what_they_are_for_and_ones_own_score_all():
    prompt = Prompt("0", 0, "a", {}, {}, ("pickscore", "deqa"))
    given = {"pick": "pickscore", "deqa": "remote", "ocr": "ocr", "mine": "package.module:f", "far": "remote"}
    assert scored_by(prompt, given) == ("pick", "deqa", "mine", "far")
    assert Suite("a", "plain", 2, (prompt,)).rows() == [(prompt, 0), (prompt, 1)]
