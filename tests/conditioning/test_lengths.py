"""Prompts that encoders cut: counted for each encoder, and told where they become one and the same."""

import zlib
from collections.abc import Sequence

import numpy as np

from fopd_jax.conditioning.encoder import Tokenize
from fopd_jax.conditioning.lengths import Reader, review

END, PADDING = 1, 0
COUNTING = "a photo of a very long red cube number " * 4


def words(length: int) -> Tokenize:
    """A word is a token; an end mark, which stays when the prompt is cut; padding."""

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        codes = [[zlib.crc32(word.encode()) % 1000 + 2 for word in prompt.split()] for prompt in prompts]
        rows = [[*row[: length - 1], END] for row in codes]
        return np.asarray([row + [PADDING] * (length - len(row)) for row in rows], np.int32)

    return tokenize


def unused(length: int) -> Tokenize:
    raise AssertionError("a tokenizer was loaded")


def test_short_prompts_load_no_tokenizer():
    assert review([Reader("clip", 77, unused), Reader("t5", 128, unused)], ["", "a cat", "x" * 60]) == []
    assert review([], ["x" * 1000]) == []


def test_a_prompt_is_cut_beyond_its_encoders_length_and_no_sooner():
    readers = [Reader("clip", 20, words), Reader("t5", 30, words)]
    for count, cut in ((19, []), (20, ["clip"]), (29, ["clip"]), (30, ["clip", "t5"]), (90, ["clip", "t5"])):
        lines = review(readers, [" ".join(f"w{i}" for i in range(count)), "short"])
        assert len(lines) == len(cut)
        for line, reader in zip(lines, [each for each in readers if each.name in cut], strict=True):
            assert line.startswith(
                f"1 of 2 prompts are longer than the {reader.length} tokens that {reader.name} reads; "
            )


def test_encoders_that_cut_alike_share_a_line():
    readers = [Reader("one", 20, words), Reader("two", 20, words), Reader("t5", 64, words)]
    (line,) = review(readers, [COUNTING])
    assert "the 20 tokens that one and two read; what follows is not seen there; the first: 'a photo of a" in line
    assert len(line) < 250


def test_prompts_that_differ_only_beyond_all_encoders_are_told():
    prompts = [COUNTING + "ONE", COUNTING + "TWO", COUNTING + "TWO", "a cat"]
    *_, same = review([Reader("clip", 20, words), Reader("t5", 30, words)], prompts)
    assert same.startswith(
        "2 prompts differ only where no encoder reads on: to the network they are 1, such as 'a photo"
    )
    assert "ONE' and " in same
    assert same.endswith("TWO'")
    lines = review([Reader("clip", 20, words), Reader("t5", 64, words)], prompts)  # T5 tells them apart
    assert len(lines) == 1
