import json
import math
import re
from typing import Any

import numpy as np
import pytest

from fopd_jax.rewards.served.verdicts import (
    Choice,
    answer_mass,
    average,
    expected_quality,
    masses,
    read_choice,
    read_rating,
    spellings,
)

RULE = re.compile(r"Score:\s*(\d+(?:\.\d+)?)")


def completion(text: str = "yes", finish: str = "stop", candidates: Any = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if candidates is not None:
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in candidates.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    return json.dumps({"id": "a", "choices": [choice], "usage": {}}).encode()


def test_a_completion_is_read():
    assert read_choice(completion("Score: 4", "length"), probabilities=False) == Choice("Score: 4", True, {})
    found = read_choice(completion(candidates={"Yes": -0.25, " no": -2.0}), probabilities=True)
    assert found == Choice("yes", False, {"Yes": -0.25, " no": -2.0})


@pytest.mark.parametrize(
    ("body", "probabilities"),
    [
        (b"", False),
        (b"{}", False),
        (b'{"choices": []}', False),
        (b'{"choices": [{"message": {"content": null}}]}', False),
        (b'{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}', False),
        (b'{"error": {"message": "no such model"}}', False),
        (completion(), True),
        (completion(candidates={}), True),
        (completion(candidates={"a": "b"}), True),
        (completion(candidates={"a": 2.0}), True),
        (completion(candidates={"a": -1}).replace(b"-1", b"NaN"), True),
        (completion(candidates={"a": -1}).replace(b'"a", "logprob"', b'"a", "probability"'), True),
    ],
)
def test_what_is_no_completion_is_refused(body: bytes, probabilities: bool):
    with pytest.raises(ValueError):
        read_choice(body, probabilities=probabilities)


@pytest.mark.parametrize(
    ("text", "numbers", "value"),
    [
        ("Score: 4", 1, 4),
        ("Score: 4.5\n", 1, 4.5),
        ("I would say Score: 2, no, Score: 3.", 1, 3),
        ("Score: 1 Score: 2 Score: 4.5", 3, 2.5),
        ("Score: 5/5", 1, 5),
    ],
)
def test_a_rating_is_the_mean_of_the_last_scores(text: str, numbers: int, value: float):
    assert read_rating(Choice(text, False, {}), RULE, numbers, 1.0, 5.0) == value


@pytest.mark.parametrize(
    ("text", "cut", "said"),
    [
        ("", False, "holds 0 of 1 scores"),
        ("a fine picture", False, "holds 0 of 1 scores"),
        ("Score: five", False, "holds 0 of 1 scores"),
        ("Score: -4", False, "holds 0 of 1 scores"),
        ("Score: 0", False, "score is 0, expected from 1 to 5"),
        ("Score: 45", False, "score is 45"),
        ("Score: 4", True, "cut off at its score"),
        ("Score: 4", False, ""),
        ("Score: 4. And", True, ""),
    ],
)
def test_an_answer_that_does_not_say_is_an_error(text: str, cut: bool, said: str):
    choice = Choice(text, cut, {})
    if not said:
        assert read_rating(choice, RULE, 1, 1.0, 5.0) == 4
        return
    with pytest.raises(ValueError, match=said):
        read_rating(choice, RULE, 1, 1.0, 5.0)


def test_spellings_of_a_word_are_summed():
    logits = {"Yes": 2.0, " yes": 1.0, "YES": 0.5, "▁yes": 0.0, "Ġyes": -1.0, "no": 1.5, "yesterday": 0.3}
    total = math.log(sum(map(math.exp, logits.values())))
    found = masses({token: logit - total for token, logit in logits.items()})
    expected = sum(math.exp(logits[token]) for token in logits if token not in ("no", "yesterday")) / math.exp(total)
    np.testing.assert_allclose(found["yes"], expected, rtol=1e-12)


def test_expected_quality_is_the_softmax_over_the_five_words():
    """Closed form: the softmax over five logits, whatever else is in the vocabulary."""
    words, weights = ["excellent", "good", "fair", "poor", "bad"], np.array([5, 4, 3, 2, 1])
    logits = np.array([1.3, 2.1, 0.2, -1.0, -3.0])
    others = {"great": 2.5, " a": 0.1}
    total = math.log(np.exp(logits).sum() + sum(map(math.exp, others.values())))
    listed = dict(zip(words, (logits - total).tolist(), strict=True)) | {k: v - total for k, v in others.items()}
    value, probabilities = expected_quality(listed)
    softmax = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(value, softmax @ weights, rtol=1e-12)
    np.testing.assert_allclose(list(probabilities.values()), softmax, rtol=1e-12)


def test_the_quality_of_one_listed_word_is_its_own():
    assert expected_quality({" Poor": -7.0, "x": -0.1})[0] == 2


def test_no_listed_word_is_an_error():
    with pytest.raises(ValueError, match="none of excellent, good, fair, poor, bad is likely"):
        expected_quality({"great": -0.1})


@pytest.mark.parametrize(
    ("expected", "tokens"),
    [
        ("Yes", ["Yes", " yes", "YES"]),
        ("two", ["two", " Two", "2", " 2"]),
        ("2", ["two", "2"]),
        ("twelve", ["12", " Twelve"]),
        ("red", ["Red", " red"]),
    ],
)
def test_the_mass_of_an_answer_is_that_of_its_spellings(expected: str, tokens: list[str]):
    first = {token: math.log(0.1 * (i + 1)) for i, token in enumerate(tokens)} | {"no": math.log(0.05)}
    np.testing.assert_allclose(answer_mass(first, expected), sum(0.1 * (i + 1) for i in range(len(tokens))))


def test_what_is_not_listed_is_at_most_as_likely_as_the_last():
    np.testing.assert_allclose(answer_mass({"no": math.log(0.9), "maybe": math.log(0.01)}, "yes"), 0.01)


def test_a_mass_is_no_more_than_one():
    assert answer_mass({"yes": 0.0, "Yes": math.log(1e-3)}, "yes") == 1


def test_spellings_of_numbers():
    assert spellings(" Zero ") == {"zero", "0"}
    assert spellings("13") == {"13"}
    assert spellings("No") == {"no"}


def test_means():
    values = np.array([0.9, 0.5, 0.02])
    np.testing.assert_allclose(average(values.tolist(), "arithmetic"), values.mean())
    np.testing.assert_allclose(average(values.tolist(), "geometric"), values.prod() ** (1 / 3))
    assert average([0.0, 1.0], "geometric") == 0
