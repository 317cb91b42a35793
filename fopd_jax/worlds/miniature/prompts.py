"""The prompts of the miniature world: their grammar, their splits and their tokens.

Two tasks. "text" asks for three characters, `sign "K7B"`; "composition" asks for one or two groups of coloured
shapes, `two red squares` or `two red squares and one blue circle`.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from fopd_jax.tasks.sampling import chance

TASKS = ("text", "composition")
SPLITS = ("train", "test")
GLYPHS = ("A", "B", "C", "J", "K", "P", "Y", "Z", "4", "7")  # the ten that differ most in a 3x5 font, shifts included
COUNTS = ("one", "two", "three")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle", "triangle")
SIGN_LENGTH = 3
TEST_PROMPTS = 256

PADDING = "<pad>"
VOCABULARY: tuple[str, ...] = (PADDING, "sign", '"', "and", *COUNTS, *COLOURS, *SHAPES, *GLYPHS)
MAX_TOKENS = 8

_SPLIT_SEED = 20250601
_SIGNS = ('"{}" sign', '"{}"', 'one sign "{}"', 'one "{}" sign')
_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Of a phrase's count, colour and shape: all but the grammar's own."""
_TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
_SINGULAR = {shape + "s": shape for shape in SHAPES}
_SIGN = re.compile(f'sign "([{"".join(GLYPHS)}]{{{SIGN_LENGTH}}})"')
_PHRASE = re.compile(f"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s?)")


@dataclasses.dataclass(frozen=True)
class Sign:
    """A text prompt: the three characters to draw."""

    text: str

    def __str__(self) -> str:
        return f'sign "{self.text}"'


@dataclasses.dataclass(frozen=True)
class Phrase:
    """`count` (1 to 3) objects of one colour and one shape."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """A composition prompt: one phrase, or two of different kinds, the first one above the other."""

    phrases: tuple[Phrase, ...]

    def __str__(self) -> str:
        return " and ".join(map(str, self.phrases))


@functools.cache
def all_prompts(task: str) -> tuple[str, ...]:
    """Every prompt of a task in a fixed order: 1000 of "text", 36 + 1188 of "composition".

    Raises:
      ValueError: unknown task.
    """
    _require("task", task, TASKS)
    return _all_signs() if task == "text" else _all_scenes()


@functools.cache
def prompts(task: str, split: str) -> tuple[str, ...]:
    """The prompts of "train" or of "test": 256 held out, the same in every process, sharing no prompt with train.

    Raises:
      ValueError: unknown task or split.
    """
    _require("split", split, SPLITS)
    everything = all_prompts(task)
    test = frozenset(random.Random(_SPLIT_SEED).sample(range(len(everything)), TEST_PROMPTS))
    return tuple(prompt for index, prompt in enumerate(everything) if (index in test) == (split == "test"))


@functools.cache
def parse(prompt: str) -> Sign | Scene:
    """What a prompt asks for.

    Raises:
      ValueError: the text is not a prompt of either task; the message shows the forms that are.
    """
    sign = _SIGN.fullmatch(prompt)
    if sign:
        return Sign(sign[1])
    phrases = tuple(_parse_phrase(text, prompt) for text in prompt.split(" and "))
    if len(phrases) > 2 or len({phrase.kind for phrase in phrases}) < len(phrases):
        raise _unparsable(prompt, "a scene has one phrase, or two that differ in colour or shape")
    return Scene(phrases)


def task_of(prompt: str) -> str:
    """The task a prompt belongs to, "text" or "composition".

    Raises:
      ValueError: the text is not a prompt of either task.
    """
    return "text" if isinstance(parse(prompt), Sign) else "composition"


def tokenize(prompts: Sequence[str]) -> Int32[np.ndarray, "n tokens"]:
    """Token ids [N, MAX_TOKENS], one token a word, and one a character within quotes; padded with 0 at the end.

    Singular and plural are one token; the null prompt "" is all padding.

    Raises:
      ValueError: a word or a character outside `VOCABULARY`, or a prompt longer than MAX_TOKENS tokens.
    """
    ids = np.zeros((len(prompts), MAX_TOKENS), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        words = _words(prompt)
        row[: len(words)] = [_TOKEN_IDS[word] for word in words]
    return ids


def paraphrase(prompt: str, seed: int) -> str:
    """The same request in an order of words that this grammar does not have, a function of both.

    Network and tokens take it: all of its words are in `VOCABULARY`, and it has no more than MAX_TOKENS of them.
    Phrases stay in their order, which says what is above. `parse` refuses it: scores go by the prompt it stands for.
    What is no prompt of the grammar stays as it is.
    """
    try:
        asked, draw = parse(prompt), chance(seed, "paraphrase", prompt)
    except ValueError:
        return prompt
    if isinstance(asked, Sign):
        return _one(_SIGNS, draw).format(asked.text)
    order = _one(_ORDERS, draw)
    return " and ".join(" ".join(str(phrase).split()[place] for place in order) for phrase in asked.phrases)


def _one(choices: Sequence[Any], draw: float) -> Any:
    return choices[int(draw * len(choices))]


def _require(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(valid)}")


def _all_signs() -> tuple[str, ...]:
    return tuple(str(Sign("".join(glyphs))) for glyphs in itertools.product(GLYPHS, repeat=SIGN_LENGTH))


def _all_scenes() -> tuple[str, ...]:
    phrases = [Phrase(*parts) for parts in itertools.product(range(1, len(COUNTS) + 1), COLOURS, SHAPES)]
    single = [Scene((phrase,)) for phrase in phrases]
    double = [Scene(pair) for pair in itertools.product(phrases, repeat=2) if pair[0].kind != pair[1].kind]
    return tuple(map(str, single + double))


def _parse_phrase(text: str, prompt: str) -> Phrase:
    match = _PHRASE.fullmatch(text)
    if match is None:
        raise _unparsable(prompt, f"cannot read {text!r}")
    phrase = Phrase(COUNTS.index(match[1]) + 1, match[2], match[3])
    if str(phrase) != text:
        raise _unparsable(prompt, f"{text!r} should be {str(phrase)!r}")
    return phrase


def _unparsable(prompt: str, problem: str) -> ValueError:
    return ValueError(
        f"prompt {prompt!r}: {problem}. "
        f"Write 'sign \"K7B\"' with {SIGN_LENGTH} characters of {''.join(GLYPHS)}, or 'two red squares', or "
        f"'two red squares and one blue circle' with {'/'.join(COUNTS)}, {'/'.join(COLOURS)} and {'/'.join(SHAPES)}."
    )


def _words(prompt: str) -> list[str]:
    """A prompt's tokens as entries of `VOCABULARY`, unpadded."""
    words = []
    for word in prompt.split():
        words += list(word) if word.startswith('"') else [_SINGULAR.get(word, word)]
    unknown = [word for word in words if word not in _TOKEN_IDS or word == PADDING]
    if unknown:
        raise ValueError(f"unknown word {unknown[0]!r} in prompt {prompt!r}: known are {' '.join(VOCABULARY[1:])}")
    if len(words) > MAX_TOKENS:
        raise ValueError(f"prompt {prompt!r} has {len(words)} tokens, more than {MAX_TOKENS}")
    return words
