"""Tokenizers as a pipeline's folder holds them, and whether one is its encoder's.

A tokenizer of another encoder, or without its words, gives ids that the encoder reads as something else, and nothing
fails: hence the comparison with the encoder's `config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fopd_jax.models.clip import LEGACY_EOS_TOKEN_ID

_PADDING = 256  # rows of an embedding beyond the vocabulary, for even shapes or tokens to come; T5-XXL has 28
_PANGRAM = "the quick brown fox jumps over the lazy dog"
_ENGLISH = f"{_PANGRAM}, {_PANGRAM.upper()}. 0123456789"  # every letter that a prompt is written with


def open_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """The transformers tokenizer of a local folder, made sure to fit the encoder of `config` (its `config.json`).

    Raises:
      ValueError: the folder holds no tokenizer, or another encoder's; names it, what was found and what would be right.
    """
    from transformers import AutoTokenizer  # imports much, which the miniature does without

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids = tokenizer.get_vocab().values()
        words = tokenizer(_ENGLISH, add_special_tokens=False, verbose=False)["input_ids"]  # may be over its length
    except Exception as error:  # the libraries below have their own kinds, and plain ones of every sort
        raise ValueError(f"{folder}: no tokenizer that can be read ({' '.join(str(error).split())[:200]})") from error
    if fault := _misfit(tokenizer, max(ids, default=-1), words, config):
        raise ValueError(f"{folder}: not the tokenizer of its text encoder: {fault}")
    return tokenizer


def _misfit(tokenizer: Any, largest: int, words: list[int], config: Mapping[str, Any]) -> str | None:
    """Why a tokenizer, of ids up to `largest` and with `words` for an English sentence, is not an encoder's."""
    rows = config["vocab_size"]
    if not rows - _PADDING <= largest + 1 <= rows:
        return f"found a vocabulary of {largest + 1} ids, expected vocab_size = {rows} or somewhat less"
    if unknown := words.count(tokenizer.unk_token_id):
        return f"found {unknown} of {len(words)} tokens of an English sentence unknown to it, expected none"
    if tokenizer.pad_token_id is None:
        return "found no pad_token"
    if config["model_type"] == "t5":
        expected = {"eos_token_id": config.get("eos_token_id", 1), "pad_token_id": config.get("pad_token_id", 0)}
    else:  # published towers' configs tell other ids of padding and beginning than their tokenizers have
        legacy = config["eos_token_id"] == LEGACY_EOS_TOKEN_ID
        expected = {"eos_token_id": rows - 1 if legacy else config["eos_token_id"]}
    for field, right in expected.items():
        if (found := getattr(tokenizer, field)) != right:
            return f"found {field} {found}, expected {right}"
    return None
