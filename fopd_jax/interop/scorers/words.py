"""CLIP's words: its byte pairs out of published files, and the tokenizer that they make.

A vocabulary follows from the list of merges alone (256 bytes, the same at a word's end, one word a merge, the two
marks), so the merges are all that a converted file keeps. OpenAI's own file lists more of them than the model has.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fopd_jax.exits import naming
from fopd_jax.interop.files.tensor_files import read_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_AT_END = "</w>"
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_FIXED = 2 * 256 + 2
_FILES = ("tokenizer.json", "merges.txt")


def vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Word → id. Bytes have printable letters of their own, as byte-level BPE writes them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    letters = [*map(chr, printable), *others]
    joined = ["".join(merge.split(" ")) for merge in merges]
    words = [*letters, *(letter + _AT_END for letter in letters), *joined, BEGIN, END]
    return {word: i for i, word in enumerate(words)}


def make_tokenizer(merges: Sequence[str]) -> Any:
    """The `tokenizers.Tokenizer` of transformers' CLIPTokenizer, which marks both ends; it neither cuts nor pads."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary(merges)
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    model = models.BPE(words, pairs, end_of_word_suffix=_AT_END, unk_token=END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, words[END]), (BEGIN, words[BEGIN]), False, False)
    return tokenizer


def read_merges(path: Path, vocab_size: int) -> list[str]:
    """The merges of a model of `vocab_size` words: a transformers folder or file, or `bpe_simple_vocab_16e6.txt.gz`.

    Raises:
      ValueError: there is no such file, it holds no byte pairs, too few, or gives words other ids than CLIP does; names
        the file.
    """
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"tokenizer: {path}: found none of {', '.join(_FILES)}")
        path = found[0]
    elif not path.is_file():
        raise ValueError(f"tokenizer: {path}: no such file")
    with naming(f"tokenizer: {path}"):
        merges, ids = _read(path)
        count = vocab_size - _FIXED
        if len(merges) < count or count < 0:
            raise ValueError(f"found {len(merges)} merges, expected at least the {count} of {vocab_size} words")
        merges = merges[:count]
        if wrong := [merge for merge in merges if len(merge.split(" ")) != 2]:
            raise ValueError(f"found {wrong[0]!r} among the merges, expected two parts")
        ours = vocabulary(merges)
        if ids is not None and (other := {(word, ids.get(word)) for word in ours if ids.get(word) != ours[word]}):
            word, found_id = min(other, key=lambda pair: ours[pair[0]])
            raise ValueError(f"found id {found_id} of {word!r}, expected {ours[word]}, as CLIP counts its words")
    return merges


def _read(path: Path) -> tuple[list[str], dict[str, int] | None]:
    """Merges, and the ids that a file states itself."""
    if path.suffix == ".json":
        model = read_json(path).get("model") or {}
        if not isinstance(model.get("merges"), list) or not isinstance(model.get("vocab"), dict):
            raise ValueError("found no model with merges and vocab, expected a byte-pair tokenizer's")
        return [each if isinstance(each, str) else " ".join(each) for each in model["merges"]], model["vocab"]
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"found no lines of UTF-8 ({error}), expected a merge a line") from error
    beside = path.with_name("vocab.json")
    ids = json.loads(beside.read_bytes()) if path.name == "merges.txt" and beside.is_file() else None
    lines = lines[1:] if "#version" in lines[0] else lines
    return [line for line in (each.rstrip("\r") for each in lines) if line], ids
