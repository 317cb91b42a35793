"""What judges' answers mean: numbers in their words, and expectations over the probabilities of their next word.

An answer that does not say is an error, never a low score.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.rewards.served.wire import parse_json, read_number, shown

LIKELIEST = 20
"""Tokens whose log-probabilities are asked for: the most that OpenAI's protocol has."""
QUALITIES: Mapping[str, int] = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
"""DeQA-Score's words (You et al. 2025, arXiv 2501.11561) and what they count."""
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer: its text, whether it was cut off, and the first token's likeliest candidates by log-probability."""

    text: str
    cut: bool
    first: Mapping[str, float]


def read_choice(body: bytes, *, probabilities: bool) -> Choice:
    """The answer in a chat completion, as OpenAI's protocol has it.

    Raises:
      ValueError: it is none, or lacks the probabilities that were asked for.
    """
    match parse_json(body):
        case {"choices": [{"message": {"content": str(text)}, **choice}]}:
            logprobs, finish = choice.get("logprobs"), choice.get("finish_reason")
        case _:
            raise ValueError("found no chat completion with one choice that is a text")
    if not probabilities:
        return Choice(text, finish == "length", {})
    match logprobs:
        case {"content": [{"top_logprobs": [_, *_] as candidates}, *_]}:
            return Choice(text, finish == "length", dict(map(_candidate, candidates)))
    raise ValueError("found no log-probabilities of the first token: does the server allow top_logprobs?")


def _candidate(entry: Any) -> tuple[str, float]:
    """Token and log-probability; rounding may bring it a little above 0."""
    if not isinstance(entry, dict) or not isinstance(token := entry.get("token"), str):
        raise ValueError(f"top_logprobs: found {shown(entry)}, expected a token")
    if (value := read_number("logprob", entry.get("logprob"))) > 0.01:
        raise ValueError(f"top_logprobs: found a log-probability of {value}")
    return token, min(value, 0.0)


def read_rating(choice: Choice, rule: re.Pattern[str], numbers: int, low: float, high: float) -> float:
    """The mean of the last so many numbers that a rule's one group finds, each from `low` to `high`.

    Raises:
      ValueError: there are fewer, one is out of range, or the text was cut off at one.
    """
    found = list(rule.finditer(choice.text))[-numbers:]
    if len(found) < numbers:
        raise ValueError(f"the judge's answer holds {len(found)} of {numbers} scores: {shown(choice.text)}")
    if choice.cut and found[-1].end() >= len(choice.text.rstrip()):
        raise ValueError(f"the judge's answer is cut off at its score: {shown(choice.text[-60:])}")
    values = [_number(match[1]) for match in found]
    if wrong := [value for value in values if not low <= value <= high]:
        raise ValueError(f"the judge's score is {wrong[0]:g}, expected from {low:g} to {high:g}")
    return sum(values) / numbers


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"the judge's score is no number: {shown(text)}") from error


def masses(first: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of words as first tokens: those of their spellings with capitals or a space before them, summed."""
    summed: dict[str, float] = {}
    for token, logprob in first.items():
        word = token.replace("▁", " ").replace("Ġ", " ").strip().casefold()
        summed[word] = summed.get(word, 0.0) + math.exp(logprob)
    return summed


def expected_quality(first: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The expectation of 5 to 1 under the softmax over the five words' tokens alone, and their probabilities.

    Raises:
      ValueError: none of them is among the likeliest.
    """
    found = masses(first)
    mass = {word: found.get(word, 0.0) for word in QUALITIES}
    if not (total := sum(mass.values())):
        raise ValueError(f"none of {', '.join(QUALITIES)} is likely, but {shown(' '.join(sorted(found)))}")
    probabilities = {word: value / total for word, value in mass.items()}
    return sum(QUALITIES[word] * value for word, value in probabilities.items()), probabilities


def answer_mass(first: Mapping[str, float], expected: str) -> float:
    """The probability of an answer as the first token, of a number that of its word and of its digits.

    Of what is not among the likeliest nothing is known but that it is no likelier than the last of them: that counts.
    """
    found, words = masses(first), spellings(expected)
    if words & found.keys():
        return min(1.0, sum(found.get(word, 0.0) for word in words))
    return math.exp(min(first.values()))


def spellings(answer: str) -> set[str]:
    """A one-word answer's forms in small letters."""
    word = answer.strip().casefold()
    if word in _NUMBERS:
        return {word, str(_NUMBERS.index(word))}
    if word.isascii() and word.isdigit() and int(word) < len(_NUMBERS):
        return {word, _NUMBERS[int(word)]}
    return {word}


def average(values: Sequence[float], mean: str) -> float:
    """Their "geometric" or "arithmetic" mean; values are not negative."""
    if mean == "arithmetic":
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
