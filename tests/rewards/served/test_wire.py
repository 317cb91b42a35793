import dataclasses
import json
import random

import numpy as np
import pytest

from fopd_jax.rewards.reward import Scores, collect
from fopd_jax.rewards.served import wire
from fopd_jax.rewards.served.png import decode_png, encode_png
from tests.rewards.served.serving import images

LIMITS = wire.Limits()


def test_a_request_comes_back_as_it_was():
    shown, prompts = images(3, 9), ["a", 'quoted "Ü" \n 中', "\U0001f600"]
    metadata = [{}, {"include": [{"class": "dog", "count": 2}]}, {"a": [1.5, None, True, "x"]}]
    found = wire.decode_request(wire.encode_request("toy", shown, prompts, metadata), LIMITS)
    assert (found.reward, list(found.prompts), list(found.metadata)) == ("toy", prompts, metadata)
    np.testing.assert_array_equal(np.stack(found.images), shown)


def test_a_question_about_prompts_has_no_images():
    body = wire.encode_request("toy", None, ["a"], [{}])
    assert wire.decode_request(body, LIMITS, images=False).images == ()
    with pytest.raises(ValueError, match="request: misses images"):
        wire.decode_request(body, LIMITS)
    with pytest.raises(ValueError, match="request: found 'images', expected only reward, prompts, metadata"):
        wire.decode_request(wire.encode_request("toy", images(1), ["a"], [{}]), LIMITS, images=False)


def test_scores_come_back_as_they_were():
    scores = collect([(0.25, {"read": "a"}), ValueError("too dark"), (-1e-300, {}), (1 / 3, {"boxes": [[0, 1]]})])
    found = wire.decode_answer(wire.encode_answer(wire.encode_results(scores)), 4)
    np.testing.assert_array_equal(found.values, scores.values)
    assert found.details == scores.details


@pytest.mark.parametrize("details", [{"a": np.ones(2)}, {"a": float("nan")}, {"a": {1, 2}}, {"a": object()}])
def test_details_that_json_cannot_hold_are_a_failure(details: dict):
    scores = Scores(np.ones(2), np.zeros(2, bool), (details, {}))
    found = wire.decode_answer(wire.encode_answer(wire.encode_results(scores)), 2)
    assert found.failed.tolist() == [True, False]
    assert "not what JSON can hold" in found.details[0]["error"]


def test_metadata_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="metadata: found what JSON cannot hold"):
        wire.encode_request("toy", None, ["a"], [{"a": float("inf")}])


def test_limits_are_kept():
    body = wire.encode_request("toy", images(2), ["a", "bc"], [{}, {}])
    for field, value, said in (
        ("items", 1, "prompts: found 2 entries, expected from 1 to 1"),
        ("body_bytes", 100, "expected at most 100"),
        ("image_bytes", 100, "images[0]: expected at most 100 bytes"),
        ("image_pixels", 63, "images[0]: found a PNG of 8x8 pixels, expected from 1 to 63 in all"),
        ("pixels", 127, "images: found 128 pixels in all, expected at most 127"),
        ("prompt_characters", 1, "prompts[1]: expected at most 1 characters"),
    ):
        with pytest.raises(ValueError) as error:
            wire.decode_request(body, dataclasses.replace(LIMITS, **{field: value}))
        assert said in str(error.value)


@pytest.mark.parametrize("depth", [wire.MOST_DEPTH, wire.MOST_DEPTH + 1, 10_000])
def test_depth_has_a_limit(depth: int):
    body = b'{"a":' * (depth - 1) + b"[]" + b"}" * (depth - 1)
    if depth <= wire.MOST_DEPTH:
        assert wire.parse_json(body)
    else:
        with pytest.raises(ValueError, match="too deep"):
            wire.parse_json(body)


@pytest.mark.parametrize("problem", ["", "prompt 'a' has no quotes"])
def test_a_problem_comes_back(problem: str):
    assert wire.decode_problem(wire.encode_problem(problem)) == problem


@pytest.mark.parametrize("body", [{}, {"problem": None}, {"problem": "", "more": 1}, []])
def test_what_is_no_problem_is_refused(body: object):
    with pytest.raises(ValueError):
        wire.decode_problem(json.dumps(body).encode())


def mutated(good: bytes, draw: random.Random) -> bytes:
    """One of: a byte changed, some taken out, some put in."""
    at, length = draw.randrange(len(good)), draw.randrange(1, 9)
    match draw.randrange(3):
        case 0:
            return good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :]
        case 1:
            return good[:at] + good[at + length :]
        case _:
            return good[:at] + draw.randbytes(length) + good[at:]


@pytest.mark.parametrize("what", ["request", "answer", "png"])
def test_whatever_arrives_is_read_or_a_value_error(what: str):
    """No other exception, which a server would answer with 500 and a client with a traceback."""
    request = wire.encode_request("toy", images(1), ["é"], [{"a": 1.5}])
    answer = '{"value": 1.5, "details": {"a": [1]}}'
    good, read = {
        "request": (request, lambda body: wire.decode_request(body, LIMITS)),
        "answer": (wire.encode_answer([answer]), lambda body: wire.decode_answer(body, 1)),
        "png": (encode_png(images(1)[0]), lambda body: decode_png(body, 2**20)),
    }[what]
    draw, refused = random.Random(0), 0
    for _ in range(1000):
        try:
            read(mutated(good, draw))
        except ValueError:
            refused += 1
    assert refused > 500
