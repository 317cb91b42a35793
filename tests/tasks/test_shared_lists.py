"""Published prompt lists, as they are: rows, repeats, tags and what stands beside prompts, exactly as counted there."""

from collections import Counter
from typing import Any

import pytest

from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.reading import read_file
from tests.shared_data import shared

GENEVAL, LINES = "GenEval's metadata", "one prompt a line"
LISTS: dict[str, tuple[int, int, str]] = {  # file → rows, rows that repeat an earlier text, form
    "flow_grpo/ocr/test.txt": (1018, 0, LINES),
    "flow_grpo/geneval/test_metadata.jsonl": (2212, 1659, GENEVAL),
    "flow_grpo/geneval_unseen_objects/test_metadata.jsonl": (1024, 768, GENEVAL),
    "flow_opd/drawbench/test.txt": (1000, 800, LINES),
    "flow_opd/drawbench/train.txt": (1, 0, LINES),
    "flow_opd/T2I-CompBench/dataset_val/color_val.txt": (300, 5, LINES),
    "pickscore_sfw_clean/train.txt": (1800, 0, LINES),
    "pickscore_sfw_clean/test.txt": (200, 0, LINES),
    "geneval/evaluation_metadata.jsonl": (553, 0, GENEVAL),
    "geneval/generation_prompts.txt": (553, 0, LINES),
    "geneval/object_names.txt": (80, 0, LINES),
    "geneval_long/evaluation_metadata_long.jsonl": (553, 0, GENEVAL),
    "geneval_plus_plus/Geneval++.jsonl": (280, 0, GENEVAL),
    "geneval_plus_plus/Geneval++.txt": (280, 0, LINES),
    "geneval2/geneval2_data.jsonl": (800, 0, "JSON lines"),
    "t2i_r1/geneval_and_t2i_data_final.json.gz": (7223, 0, "JSON lines"),
    "parti_prompts/PartiPrompts.tsv": (1632, 0, "TSV"),
    "drawbench/DrawBench.csv": (200, 0, "CSV"),
    "hpsv2_subset/hps_v2_all.txt": (750, 0, LINES),
    "hpsv2_subset/hps_v2_all_eval.txt": (50, 0, LINES),
    "dpg_bench/prompts.jsonl": (1065, 0, "JSON lines"),
    "unigenbench/test_prompts_en.csv": (600, 0, "CSV"),
    "unigenbench/test_prompts_en_long.csv.gz": (600, 0, "CSV"),
    "unigenbench/train_prompt.txt.gz": (10000, 0, LINES),
    "longtext_bench/text_prompts.jsonl": (160, 0, "JSON lines"),
    "longtext_bench/text_prompts_zh.jsonl": (160, 0, "JSON lines"),
    "oneig_text/text_content.csv": (200, 0, "CSV"),
    "image_reward/benchmark-prompts.json": (100, 0, "a JSON list"),
}
COMPBENCH: dict[str, tuple[int, int]] = {  # T2I-CompBench's files → lines, repeats
    "3d_spatial": (1000, 0), "color": (860, 18), "complex": (1000, 0), "non_spatial": (1000, 0), "numeracy": (1000, 0),
    "shape": (1000, 15), "spatial": (1000, 2), "texture": (1000, 5),
    "3d_spatial_train": (700, 0), "color_train": (700, 21), "complex_train": (700, 0), "non_spatial_train": (700, 0),
    "numeracy_train": (700, 0), "shape_train": (700, 15), "spatial_train": (700, 0), "texture_train": (700, 5),
    **{f"{name}_val": (300, 0) for name in ("3d_spatial", "color", "complex", "non_spatial", "numeracy", "shape")},
    "spatial_val": (300, 0), "texture_val": (300, 0),
    "color_val_seen": (200, 0), "color_val_unseen": (100, 5), "shape_val_seen": (200, 0), "shape_val_unseen": (100, 0),
    "texture_val_seen": (200, 0), "texture_val_unseen": (100, 0),
    "complex_train_action": (504, 0), "complex_train_spatial": (130, 0), "complex_train_spatialaction": (66, 0),
    "complex_val_action": (212, 0), "complex_val_spatial": (58, 0), "complex_val_spatialaction": (30, 0),
}  # fmt: skip
LISTS |= {f"t2i_compbench/{name}.txt": (*counts, LINES) for name, counts in COMPBENCH.items()}


def _read(name: str) -> PromptSet:
    return read_file(shared(name), "tasks.x.prompts")


def _values(found: PromptSet, column: str) -> Counter[Any]:
    return Counter(each[column] for each in found.metadata)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_whole(name: str):
    found = _read(name)
    assert (len(found), found.repeats, found.form) == LISTS[name]
    assert bool(found.metadata) == (found.form != LINES)
    assert all(text == text.strip() and "\r" not in text for text in found.texts)


def test_pairs_of_words_are_refused_by_name():
    with pytest.raises(ValueError, match=r"new_objects\.txt looks like pairs of words .*'bottle - bottles'"):
        _read("t2i_compbench/new_objects.txt")


def test_blank_lines_and_edges_of_hpsv2_are_told(capsys: pytest.CaptureFixture[str]):
    found = _read("hpsv2_subset/hps_v2_all.txt")
    assert found.quirks == ("2 blank lines left out", "108 prompts had spaces at an edge")
    told = "750 prompts; 2 blank lines left out; 108 prompts had spaces at an edge\n"
    assert capsys.readouterr().err.endswith(told)


def test_geneval_has_its_six_tags_and_comes_four_times():
    """The test file is the official one, each row four times, in another order."""
    official, test = _read("geneval/evaluation_metadata.jsonl"), _read("flow_grpo/geneval/test_metadata.jsonl")
    tags = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert _values(official, "tag") == tags
    assert _values(test, "tag") == {tag: 4 * count for tag, count in tags.items()}
    assert Counter(test.texts) == dict.fromkeys(official.texts, 4)
    assert sum("exclude" in each for each in official.metadata) == 80
    counts = Counter(each["include"][0]["count"] for each in official.metadata if each["tag"] == "counting")
    assert counts == {2: 26, 3: 28, 4: 26}
    unseen = _read("flow_grpo/geneval_unseen_objects/test_metadata.jsonl")
    assert len(set(unseen.texts) & set(official.texts)) == 42
    plus = _read("geneval_plus_plus/Geneval++.jsonl")  # other tags are the reward's to refuse
    assert set(_values(plus, "tag").values()) == {40}
    assert len(set(_values(plus, "tag")) - set(tags)) == 5
    assert plus.texts == _read("geneval_plus_plus/Geneval++.txt").texts


def test_tables_keep_quotes_columns_and_structure():
    parti = _read("parti_prompts/PartiPrompts.tsv")
    assert (len(_values(parti, "Category")), len(_values(parti, "Challenge"))) == (12, 11)
    assert any(text.startswith('"G I G G L E" painted in') for text in parti.texts)
    drawbench = _read("drawbench/DrawBench.csv")
    assert _values(drawbench, "Category")["Text"] == 21
    assert _values(drawbench, "Category")["Gary Marcus et al. "] == 10
    unigen = _read("unigenbench/test_prompts_en.csv")
    primary = Counter(each["sub_dims_en"]["Primary Categories"] for each in unigen.metadata)
    assert primary == {
        "Art": 157, "Film & Story": 150, "Illustration": 113, "Design": 110, "Creative Divergence": 70
    }  # fmt: skip
    assert sum("Text Generation" in each["sub_dims_en"]["Testpoints"] for each in unigen.metadata) == 87
    oneig = _read("oneig_text/text_content.csv")
    assert oneig.metadata[0]["id"] == "000"
    assert all(isinstance(each["text_content"], list) for each in oneig.metadata)
    pairs = zip(oneig.texts, oneig.metadata, strict=True)
    verbatim = [all(text in prompt for text in each["text_content"]) for prompt, each in pairs]
    assert verbatim.count(False) == 5


def test_records_keep_what_stands_beside():
    types = {"spatial": 2195, "numeracy": 1172, "color": 879, "complex": 700, "non": 700, "texture": 695, "shape": 682}
    assert _values(_read("t2i_r1/geneval_and_t2i_data_final.json.gz"), "task_type") == {**types, "object": 200}
    two = _read("geneval2/geneval2_data.jsonl")
    assert _values(two, "atom_count") == dict.fromkeys(range(3, 11), 100)
    assert all(len(each["skills"]) == len(each["vqa_list"]) for each in two.metadata)
    assert set(_values(_read("longtext_bench/text_prompts.jsonl"), "category").values()) == {20}
    dpg = {each["file"] for each in _read("dpg_bench/prompts.jsonl").metadata}
    assert (len(dpg), "158.txt" in dpg, "159.txt" in dpg) == (1065, True, False)
    assert _read("image_reward/benchmark-prompts.json").metadata[0] == {"id": "005695-0057"}
