import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from fopd_jax.worlds.miniature.prompts import (
    COLOURS,
    COUNTS,
    GLYPHS,
    MAX_TOKENS,
    SHAPES,
    SIGN_LENGTH,
    SPLITS,
    TASKS,
    VOCABULARY,
    Phrase,
    Scene,
    Sign,
    all_prompts,
    paraphrase,
    parse,
    prompts,
    task_of,
    tokenize,
)


def _tokens(prompt: str) -> list[str]:
    return [VOCABULARY[i] for i in tokenize([prompt])[0] if i]


@pytest.mark.parametrize(("task", "count"), [("text", 1000), ("composition", 36 + 36 * 33)])
def test_splits_partition_the_prompts(task: str, count: int):
    train, test = prompts(task, "train"), prompts(task, "test")
    assert len(set(all_prompts(task))) == count
    assert len(test) == 256
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(all_prompts(task))


def test_train_holds_every_glyph_at_every_position_and_every_phrase():
    signs = [parse(prompt).text for prompt in prompts("text", "train")]
    assert {(i, glyph) for sign in signs for i, glyph in enumerate(sign)} == {
        (i, glyph) for i in range(SIGN_LENGTH) for glyph in GLYPHS
    }
    scenes = [parse(prompt).phrases for prompt in prompts("composition", "train")]
    assert {phrase for scene in scenes for phrase in scene} == {
        Phrase(count, colour, shape) for count in (1, 2, 3) for colour in COLOURS for shape in SHAPES
    }


def test_splits_do_not_depend_on_the_process():
    code = (
        "import zlib; from fopd_jax.worlds.miniature.prompts import prompts; "
        "print(zlib.crc32('|'.join(prompts('text', 'test')).encode()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) == zlib.crc32("|".join(prompts("text", "test")).encode())


@pytest.mark.parametrize(
    ("task", "split", "valid"), [("ocr", "test", TASKS), ("text", "valid", SPLITS), ("", "train", TASKS)]
)
def test_unknown_task_or_split_lists_the_valid_ones(task: str, split: str, valid: tuple[str, ...]):
    with pytest.raises(ValueError, match=", ".join(valid)):
        prompts(task, split)


def test_parse_by_hand():
    assert parse('sign "K7B"') == Sign("K7B")
    assert parse("one red square") == Scene((Phrase(1, "red", "square"),))
    assert parse("two red squares and one blue circle") == Scene(
        (Phrase(2, "red", "square"), Phrase(1, "blue", "circle"))
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_parses_back_to_itself(task: str):
    assert all(str(parse(prompt)) == prompt and task_of(prompt) == task for prompt in all_prompts(task))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "sign",
        'sign "K7"',
        'sign "K7BA"',
        'sign "QQQ"',
        'sign "K7B',
        "two red square",
        "one red squares",
        "four red squares",
        "two pink squares",
        "one red square and two red squares",
        "one red square and one red circle and one blue circle",
        "one red square and ",
    ],
)
def test_unparsable_prompts_are_named_with_what_would_be_right(prompt: str):
    with pytest.raises(ValueError, match="two red squares and one blue circle") as error:
        parse(prompt)
    assert repr(prompt) in str(error.value)


def test_parse_suggests_the_right_number():
    with pytest.raises(ValueError, match="'two red square' should be 'two red squares'"):
        parse("two red square")


def test_tokens_by_hand():
    assert _tokens('sign "K7B"') == ["sign", '"', "K", "7", "B", '"']
    assert _tokens("two red squares and one blue circle") == ["two", "red", "square", "and", "one", "blue", "circle"]
    assert _tokens("") == []


def test_tokenize_shape_padding_and_distinctness():
    everything = [*all_prompts("text"), *all_prompts("composition"), ""]
    ids = tokenize(everything)
    assert ids.shape == (len(everything), MAX_TOKENS)
    assert ids.dtype == np.int32
    assert not ids[-1].any()
    assert len(np.unique(ids, axis=0)) == len(everything)
    assert set(np.unique(ids)) == set(range(len(VOCABULARY)))
    assert tokenize([]).shape == (0, MAX_TOKENS)


def test_vocabulary_has_no_duplicates():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert set(COUNTS) | set(COLOURS) | set(SHAPES) | set(GLYPHS) < set(VOCABULARY)


@pytest.mark.parametrize(("prompt", "word"), [("two pink squares", "pink"), ('sign "Q"', "Q"), ("<pad>", "<pad>")])
def test_unknown_words_are_named(prompt: str, word: str):
    with pytest.raises(ValueError, match=f"unknown word '{word}'"):
        tokenize(["one red square", prompt])


def test_too_long_prompts_are_refused():
    with pytest.raises(ValueError, match="9 tokens"):
        tokenize(["and " * 9])


# ---- in other words


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_has_other_words_that_the_encoder_takes_and_the_grammar_does_not(task: str):
    """The same words but for `sign` and `one` of a text, the same characters, phrases in their order."""
    for prompt in all_prompts(task):
        other = paraphrase(prompt, 3)
        assert other == paraphrase(prompt, 3)
        assert (tokenize([other]) != 0).sum() <= MAX_TOKENS
        with pytest.raises(ValueError, match="prompt"):
            parse(other)
        if task == "text":
            assert re.findall('".*"', other) == re.findall('".*"', prompt)
        else:
            phrases = zip(other.split(" and "), prompt.split(" and "), strict=True)
            assert all(sorted(a.split()) == sorted(b.split()) for a, b in phrases)
    assert len({paraphrase(all_prompts(task)[-1], seed) for seed in range(60)}) == (4 if task == "text" else 5)


@pytest.mark.parametrize("prompt", ["", '"K7B" sign', "red two squares", "a photo of a cat"])
def test_what_the_grammar_does_not_have_stays(prompt: str):
    assert paraphrase(prompt, 0) == prompt
