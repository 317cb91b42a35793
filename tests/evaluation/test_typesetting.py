"""Markdown and LaTeX, letter by letter; the best in bold."""

import re

import pytest

from fopd_jax.evaluation.typesetting import Entry, Grid, as_latex, as_markdown, with_best

GRID = Grid(
    "geneval, by tag", "2 prompts × 1 sample, 50% & more.", "model_a minus", ["two_object", "b|c"],
    [
        ("base_{1}", [Entry(0.5, 0.25, 0.75), None]),
        ("~x^", [Entry(0.625, best=True, failed=2), Entry(-0.0004, -12.5, 0.1, signed=True, p=0.0004)]),
    ],
    "geneval, by tag: differences",
)  # fmt: skip


def test_markdown_by_hand():
    assert as_markdown([GRID], ["a*b\nc"]) == (
        "## geneval, by tag\n\n"
        "| model\\_a minus | two\\_object | b\\|c |\n|---|---:|---:|\n"
        "| base\\_{1} | 0.500 [0.250, 0.750] |  |\n"
        "| ~x^ | **0.625\\*** | 0.000 [−12.50, +0.100] p < 0.001 |\n\n"
        "2 prompts × 1 sample, 50% & more.\n\n## Notes\n\n- a\\*b c\n"
    )


def test_latex_by_hand():
    assert as_latex([GRID]) == (
        "% needs \\usepackage{booktabs}\n\\begin{table}[t]\n\\centering\n"
        "\\caption{geneval, by tag. 2 prompts $\\times$ 1 sample, 50\\% \\& more.}\n"
        "\\label{tab:geneval-by-tag-differences}\n\\begin{tabular}{lrr}\n\\toprule\n"
        "model\\_a minus & two\\_object & b\\textbar{}c \\\\\n\\midrule\n"
        "base\\_\\{1\\} & 0.500 {\\scriptsize [0.250, 0.750]} &  \\\\\n"
        "\\textasciitilde{}x\\textasciicircum{} & \\textbf{0.625$^*$} & "
        "0.000 {\\scriptsize [$-$12.50, +0.100] $p < 0.001$} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_nothing_that_tex_would_run_is_left_of_a_name():
    name = "\\input{x} $y$ #1 50% a&b <c>"
    text = as_latex([Grid("t", name, name, [name], [(name, [None])], name)])
    for line in text.splitlines():
        if "input" in line and "label" not in line:
            assert "\\textbackslash{}input\\{x\\} \\$y\\$ \\#1 50\\% a\\&b \\textless{}c\\textgreater{}" in line
    assert re.search(r"\\label\{tab:[a-z0-9-]+\}", text)
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((0.1, 0.3, 0.2), [1]), ((0.30001, 0.29999, 0.2), [0, 1]), ((0.3,), []), ((0.3, None), []), ((None, None), []),
        ((-0.5, -0.25), [1]),
    ],
)  # fmt: skip
def test_the_best_are_the_largest_as_they_are_shown(values: tuple[float | None, ...], best: list[int]):
    marked = with_best([Entry(value) for value in values])
    assert [place for place, entry in enumerate(marked) if entry and entry.best] == best
    assert with_best([None, Entry(1.0), Entry(2.0)])[0] is None


def test_numbers_as_they_are_shown():
    assert [Entry(x).number for x in (None, 0.5, -0.00001, 9.9996, 21.643, -1.5)] == [
        "–", "0.500", "0.000", "10.000", "21.64", "−1.500",
    ]  # fmt: skip
    assert [Entry(x, signed=True).number for x in (0.25, -0.25)] == ["+0.250", "−0.250"]
    assert [Entry(1.0, p=p).sign for p in (None, 0.0001, 0.001, 0.25)] == ["", "p < 0.001", "p = 0.001", "p = 0.250"]
