"""What a run trains and tests on, described: figures of sets, of pairs of sets and of the schedule, and the program."""

import json
from pathlib import Path

import pytest

from fopd_jax.config.help import describe_program
from fopd_jax.interop.scorers.words import make_tokenizer, read_merges
from fopd_jax.tasks.describe import WORDS, Measure, as_text, overlaps, profile, schedule
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.sampling import Curriculum, Shares
from fopd_jax.tasks.sources import read_set
from tests.interop.scorers.test_words import open_clip_words
from tests.shared_data import shared
from tests.tasks.program import ROOT, run

GENEVAL = ("geneval/evaluation_metadata.jsonl", "flow_grpo/geneval/test_metadata.jsonl")


@pytest.fixture(scope="module")
def clip() -> Measure:
    """Lengths by OpenAI's own vocabulary, where it is there."""
    tokenizer = make_tokenizer(read_merges(open_clip_words(), 49408))
    return Measure("CLIP tokens", lambda texts: [len(each.ids) for each in tokenizer.encode_batch(list(texts))], 77)


def test_the_profile_of_a_set():
    texts = ('a "b" c', 'a "b" and "c"', "the cat's 'b' “c”", "ein Haus für Zoë, am See", "a cat", "a cat")
    metadata = tuple({"tag": tag} for tag in ("x", "x", "y", "z", "x", "x"))
    found = profile(PromptSet(texts, metadata, "CSV", ("CR LF line ends",)), WORDS)
    assert (found.prompts, found.distinct, found.not_ascii) == (6, 5, 2)
    assert (found.quoted, found.several, found.single, found.curly) == (1, 1, 1, 1)
    assert found.tags == {"x": 4, "y": 1, "z": 1}
    assert (found.longest, found.longest_prompt, found.cut) == (6, texts[3], None)
    assert found.examples == texts[:3]
    cut = profile(PromptSet(texts), Measure("letters", lambda prompts: [len(prompt) for prompt in prompts], 8))
    assert (cut.longest, cut.cut, cut.tags) == (24, 3, {})


def test_overlaps_are_told_exactly_and_up_to_case_and_spaces():
    sets = {"a.prompts": ("a cat", "A  Dog", "x"), "a.test": ("a dog", "a cat", "a cat"), "b.test": ("z",)}
    found = overlaps({name: PromptSet(texts) for name, texts in sets.items()})
    assert [(each.first, each.second, each.exact, each.up_to_case, each.example) for each in found] == [
        ("a.prompts", "a.test", 1, 2, "a cat")
    ]


def test_the_schedule_is_that_of_the_stream():
    curriculum = Curriculum(((0, Shares((3.0, 1.0, 0.0))),))
    turns = schedule({"a": 100, "b": 20, "c": 5}, curriculum, draws=8, steps=50)
    assert [(each.share, each.a_step) for each in turns] == [(0.75, 6.0), (0.25, 2.0), (0.0, 0.0)]
    assert [each.steps_an_epoch for each in turns] == [100 / 6, 10.0, None]
    assert [each.epochs for each in turns] == [3.0, 5.0, 0.0]


def test_the_schedule_by_turns_counts_whole_batches():
    curriculum = Curriculum(((0, Shares((3.0, 1.0))),), 2)
    turns = schedule({"a": 100, "b": 20}, curriculum, draws=8, steps=6)
    assert [(each.a_step, each.epochs) for each in turns] == [(6.0, 8 * 4 / 100), (2.0, 8 * 2 / 20)]


def test_a_schedule_of_changing_weights_has_a_row_for_each_stretch():
    curriculum = Curriculum(((0, Shares((3.0, 1.0))), (10, Shares((0.0, 1.0))), (90, Shares((1.0, 1.0)))))
    turns = schedule({"a": 100, "b": 20}, curriculum, draws=8, steps=50)
    assert [(each.task, each.start, each.stop, each.share, each.epochs) for each in turns] == [
        ("a", 0, 10, 0.75, 0.6), ("b", 0, 10, 0.25, 1.0), ("a", 10, 50, 0.0, 0.0), ("b", 10, 50, 1.0, 16.0)
    ]  # fmt: skip
    text = as_text({}, [], turns, WORDS, 50)
    assert [line.split()[:5] for line in text.split("\n")[-2:]] == [
        ["10", "to", "50", "a", "0.0%"],
        ["10", "to", "50", "b", "100.0%"],
    ]


def test_the_text_has_a_row_for_each_set():
    sets = {"a.prompts": PromptSet(("a cat", "a dog")), "a.test": PromptSet(("x" * 300,))}
    text = as_text({name: profile(each, WORDS) for name, each in sets.items()}, overlaps(sets), [], WORDS, 5)
    head, first, second = text.split("\n")[:3]
    columns = "set        prompts  distinct  repeats  longest (words)  not ASCII"
    assert head == f"{columns}  1 quoted  2+ quoted  single quotes  curly"
    assert first.split() == ["a.prompts", "2", "2", "0", "2", "0", "0", "0", "0", "0"]
    assert len(head) == len(first) == len(second)
    assert "no two sets share a prompt" in text
    assert max(map(len, text.split("\n"))) < 130


def test_the_miniature_is_described(tmp_path: Path):
    done = run("describe", f"--config={ROOT}/configs/miniature.py", "--json=out.json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.split("\n")]
    assert ["composition.prompts", "968", "968", "0", "7", "0", "0", "0", "0", "0"] in rows
    assert ["text.test", "256", "256", "0", "2", "0", "256", "0", "0", "0"] in rows
    assert ["composition", "50.0%", "32", "30.25", "3.967"] in rows
    assert "miniature's own" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sets"]["text.prompts"]["prompts"] == 744
    assert [turn["task"] for turn in found["schedule"]] == ["composition", "text"]


def test_a_published_list_has_the_figures_that_are_known_of_it():
    """Tags in their order, rows that repeat, quotes as the text reward sees them: a string in every OCR prompt."""
    official, test = (read_set(str(shared(name)), "f") for name in GENEVAL)
    found = profile(test, WORDS)
    assert (found.prompts, found.distinct, found.not_ascii) == (2212, 553, 0)
    tags = [("color_attr", 400), ("position", 400), ("two_object", 396), ("colors", 376), ("counting", 320)]
    assert list(found.tags.items()) == [*tags, ("single_object", 320)]
    assert [(each.exact, each.up_to_case) for each in overlaps({"a": official, "b": test})] == [(553, 553)]
    figures = {
        name: profile(read_set(str(shared(name)), "f"), WORDS)
        for name in (
            "flow_grpo/ocr/test.txt", "longtext_bench/text_prompts_zh.jsonl", "longtext_bench/text_prompts.jsonl",
            "oneig_text/text_content.csv", "drawbench/DrawBench.csv", "geneval_long/evaluation_metadata_long.jsonl",
            "parti_prompts/PartiPrompts.tsv", "pickscore_sfw_clean/train.txt",
        )
    }  # fmt: skip
    ocr, chinese, long, oneig, drawbench, *others = figures.values()
    assert (ocr.quoted, ocr.several, ocr.not_ascii, ocr.longest) == (1018, 0, 39, 56)
    assert (chinese.curly, long.several, oneig.quoted, oneig.several) == (160, 153, 67, 126)
    assert (drawbench.quoted, drawbench.several, drawbench.single, drawbench.tags["Text"]) == (0, 0, 21, 21)
    assert [each.curly for each in others][:2] == [137, 12]


@pytest.mark.parametrize(
    ("name", "longest", "cut"),
    [
        ("flow_grpo/ocr/test.txt", 72, 0),
        ("flow_grpo/geneval/test_metadata.jsonl", 14, 0),
        ("geneval_long/evaluation_metadata_long.jsonl", 163, 553),
        ("parti_prompts/PartiPrompts.tsv", 84, 1),
        ("drawbench/DrawBench.csv", 99, 2),
        ("dpg_bench/prompts.jsonl", 180, 640),
        ("unigenbench/test_prompts_en_long.csv.gz", 179, 600),
        ("longtext_bench/text_prompts.jsonl", 283, 160),
        ("oneig_text/text_content.csv", 361, 58),
        ("image_reward/benchmark-prompts.json", 64, 0),
    ],
)
def test_lengths_are_those_counted_by_clips_own_words(clip: Measure, name: str, longest: int, cut: int):
    found = profile(read_set(str(shared(name)), "f"), clip)
    assert (found.longest, found.cut) == (longest, cut)


@pytest.mark.slow
def test_published_lists_are_described_in_clip_tokens(tmp_path: Path, converted: Path):
    """GenEval's test file beside the official one, DrawBench beside its own copy; lengths by the folder's tokenizer."""
    names = {
        "geneval": GENEVAL,
        "draw": ("flow_opd/drawbench/train.txt", "drawbench/DrawBench.csv"),
    }
    flags = [
        f"--config.tasks.{name}.{field}={shared(file)}"
        for name, files in names.items()
        for field, file in zip(("prompts", "test"), files, strict=True)
    ]
    (tmp_path / "c.py").write_text(
        "from fopd_jax.config.schema import OPD, Model, RoutedTask\n"
        f"def get_config():\n    return OPD('c', model=Model(path={str(converted)!r}),"
        " tasks={'geneval': RoutedTask(), 'draw': RoutedTask()})\n"
    )
    done = run("describe", "--config=c.py", *flags, "--json=out.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1  # 1,659 rows of the test file repeat an earlier one
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["unit"] == "CLIP tokens"
    assert found["sets"]["geneval.test"]["tags"]["counting"] == 320
    assert found["sets"]["draw.test"]["tags"]["Text"] == 21
    counts = {name: each["prompts"] for name, each in found["sets"].items()}
    assert counts == {"geneval.prompts": 553, "geneval.test": 2212, "draw.prompts": 1, "draw.test": 200}
    shared_by = {(each["first"], each["second"]): each["exact"] for each in found["overlaps"]}
    assert shared_by == {("geneval.prompts", "geneval.test"): 553, ("draw.prompts", "draw.test"): 1}
    assert "tags: color_attr 400, position 400, two_object 396, colors 376" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=c.py"],
            "error: found '--config=c.py', expected one of describe, build, then flags; --help says more",
        ),
        (["describe", "--config=c.py"], "error: tasks.x.prompts: cannot read 'none.txt'"),
        (["describe", "--config=c.py", "--json=none/out.json"], "error: --json: none is no folder"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "c.py").write_text(
        "from fopd_jax.config.schema import OPD, RoutedTask\n"
        "def get_config():\n    return OPD('c', tasks={'x': RoutedTask('t', 'none.txt', 'none.txt')})\n"
    )
    done = run(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(message)


def test_help_tells_both_commands_and_their_flags():
    text = describe_program(ROOT / "fopd_jax" / "tasks" / "__main__.py")
    assert text.startswith("`python -m fopd_jax.tasks describe --config=")
    for line in ("--json ", "--data-dir=data ", "--config ", "tasks.NAME.prompts="):
        assert f"\n  {line}" in text
