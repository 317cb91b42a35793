"""CLIP's words against transformers' tokenizer, with a small vocabulary, and with OpenAI's where open_clip is there."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from fopd_jax.interop.scorers.words import make_tokenizer, read_merges, vocabulary
from tests.interop.scorers.clip_oracle import MERGES, VOCABULARY, write_words
from tests.shared_data import shared

TEXTS = [
    "a photo of the cat", "The CAT's  dog\n\tof   red", "", "  ", "it's we're I'd 'S", "1234 and 5!!?... (x)",
    "café CAFÉ e\u0301 naïve", "日本語 テスト 🙂🙃", "“curly” ‘quotes’ — dash", "E=mc² ½ O₂", "a\u00a0b\u200bc",
    "<|endoftext|> inside <|startoftext|>", "the" * 40, "İstanbul ẞ ǅ", "under_score #tag @you \\ back",
]  # fmt: skip


def open_clip_words() -> Path:
    """OpenAI's own list, as open_clip ships it; the test is skipped where it is not installed."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        pytest.skip("needs the list of byte pairs that open_clip_torch ships")
    return Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    write_words(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert theirs.get_vocab() == vocabulary(MERGES)
    ours = make_tokenizer(MERGES)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    theirs.save_pretrained(tmp_path / "json")
    assert read_merges(tmp_path / "json" / "tokenizer.json", VOCABULARY) == list(MERGES)


def test_a_real_vocabulary(tmp_path: Path) -> None:
    path = open_clip_words()
    merges = read_merges(path, 49408)
    words = vocabulary(merges)
    assert len(merges) == 48894
    assert len(words) == 49408
    assert (words["<|startoftext|>"], words["<|endoftext|>"], words["!"], words["cat</w>"]) == (49406, 49407, 0, 2368)
    write_words(tmp_path, tuple(merges))
    assert read_merges(tmp_path, 49408) == merges
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    prompts = shared("flow_grpo/ocr/test.txt").read_text(encoding="utf-8").split("\n")[:300]
    ours = make_tokenizer(merges)
    found = [encoding.ids for encoding in ours.encode_batch(TEXTS + prompts)]
    assert found == theirs(TEXTS + prompts)["input_ids"]


def test_open_clip_reads_the_same() -> None:
    """Its tokenizer mends mojibake and HTML first; of plain prompts the ids agree."""
    merges = read_merges(open_clip_words(), 49408)
    pytest.importorskip("ftfy")
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    file = importlib.util.spec_from_file_location("open_clip_tokenizer", Path(spec.origin).with_name("tokenizer.py"))
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)  # the package itself needs torchvision
    file.loader.exec_module(module)
    theirs, ours = module.SimpleTokenizer(), make_tokenizer(merges)
    plain = [text for text in TEXTS if text.isascii() and "<" not in text]
    prompts = shared("flow_grpo/ocr/test.txt").read_text(encoding="utf-8").split("\n")
    prompts = [prompt for prompt in prompts if prompt.isascii()]
    assert len(prompts) > 900
    for text in plain + prompts:
        assert ours.encode(text).ids[1:-1] == theirs.encode(text), text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nt h\n", "found 1 merges, expected at least the 16 of 530 words"),
        ("merges.txt", "#version: 0.2\n" + "t\n" * 16, "found 't' among the merges, expected two parts"),
        ("tokenizer.json", "{}", "found no model with merges and vocab"),
        ("tokenizer.json", "{", "damaged JSON"),
        ("words.gz", "t h", "found no lines of UTF-8"),
    ],
)
def test_damaged_words_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^tokenizer: {re.escape(str(path))}: .*{re.escape(message)}"):
        read_merges(path, VOCABULARY)


def test_other_ids_are_refused(tmp_path: Path) -> None:
    write_words(tmp_path)
    ids = vocabulary(MERGES) | {"cat</w>": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(ValueError, match=r"found id 7 of 'cat</w>', expected 515"):
        read_merges(tmp_path, VOCABULARY)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found none of tokenizer\.json, merges\.txt"):
        read_merges(tmp_path, VOCABULARY)
    with pytest.raises(ValueError, match="no such file"):
        read_merges(tmp_path / "words.gz", VOCABULARY)


def test_more_merges_than_the_model_has(tmp_path: Path) -> None:
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress(("\n".join(['"bpe.txt#version: 0.2', *MERGES, "x y", "y z"])).encode()))
    assert read_merges(path, VOCABULARY) == list(MERGES)
