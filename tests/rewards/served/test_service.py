import dataclasses
import json
import pickle
import random
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.rewards.served import listening, service, wire
from tests.rewards.served.malformed import bodies
from tests.rewards.served.serving import (
    HEADERS,
    LIMITS,
    TOKEN,
    Toy,
    get,
    good_body,
    images,
    post,
    raw,
    served,
    serving,
    until,
)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def url(toy: Toy) -> Iterator[str]:
    with serving(toy) as url:
        yield url


def still_scores(url: str) -> bool:
    answer = post(url, good_body())
    return answer.status_code == 200 and wire.decode_answer(answer.content, 1).values[0] == images(1).mean() / 255


TOLD = Path(tempfile.gettempdir()) / f"unpickled-{uuid.uuid4().hex}"
BODIES = dict(bodies(TOLD))
UNKNOWN = ("unknown_reward", "reward_empty")


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_a_4xx_and_the_server_goes_on(name: str, url: str, toy: Toy):
    before = toy.images
    answer = post(url, BODIES[name])
    assert answer.status_code == (404 if name in UNKNOWN else 400)
    assert answer.json()["error"]
    assert toy.images == before
    assert not TOLD.exists()
    assert still_scores(url)


def test_unpickled_it_would_have_been_told():
    """The payload of the test above works."""
    pickle.loads(BODIES["body_pickled"])
    TOLD.rmdir()


# ---- whole requests


def head(url: str, line: str = "POST /score HTTP/1.1", **headers: object) -> bytes:
    """A request's head; a header of None is left out."""
    all_of_them = {"host": url.removeprefix("http://"), **HEADERS, **headers}
    lines = [f"{name}: {value}" for name, value in all_of_them.items() if value is not None]
    return "\r\n".join([line, *lines, "", ""]).encode()


GOOD = good_body()
TOKENS: dict[str, dict[str, object]] = {
    "none": {"Authorization": None},
    "empty": {"Authorization": ""},
    "scheme_alone": {"Authorization": "Bearer"},
    "wrong": {"Authorization": "Bearer wrong-token-of-these-tests"},
    "longer": {"Authorization": f"Bearer {TOKEN}x"},
    "shorter": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "bare": {"Authorization": TOKEN},
    "basic": {"Authorization": f"Basic {TOKEN}"},
    "scheme_in_capitals": {"Authorization": f"BEARER {TOKEN}"},
    "twice": {"Authorization": f"Bearer {TOKEN}", "authorization": f"Bearer {TOKEN}"},
    "elsewhere": {"Authorization": None, "X-Token": TOKEN, "Cookie": f"token={TOKEN}"},
}
LENGTH = {"Content-Length": len(GOOD)}
CHUNKED = {"Transfer-Encoding": "chunked"}
WRONG: dict[str, tuple[int, str, dict[str, object], bytes]] = {
    "get_score": (405, "GET /score HTTP/1.1", {}, b""),
    "put_score": (405, "PUT /score HTTP/1.1", LENGTH, GOOD),
    "delete_score": (405, "DELETE /score HTTP/1.1", {}, b""),
    "post_rewards": (405, "POST /rewards HTTP/1.1", LENGTH, GOOD),
    "post_health": (405, "POST /health HTTP/1.1", LENGTH, GOOD),
    "another_path": (404, "POST /scores HTTP/1.1", LENGTH, GOOD),
    "path_with_slash": (404, "POST /score/ HTTP/1.1", LENGTH, GOOD),
    "path_above": (404, "POST /../score HTTP/1.1", LENGTH, GOOD),
    "root": (404, "GET / HTTP/1.1", {}, b""),
    "type_none": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Type": None}, GOOD),
    "type_pickle": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Type": "application/octet-stream"}, GOOD),
    "type_form": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Type": "multipart/form-data"}, GOOD),
    "type_text": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Type": "text/json"}, GOOD),
    "deflated": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Encoding": "deflate"}, GOOD),
    "gzipped": (415, "POST /score HTTP/1.1", LENGTH | {"Content-Encoding": "gzip"}, GOOD),
    "oversized_by_word": (413, "POST /score HTTP/1.1", {"Content-Length": 2**20 + 1}, b""),
    "petabytes_by_word": (413, "POST /score HTTP/1.1", {"Content-Length": 10**15}, b"{"),
    "oversized_in_chunks": (413, "POST /score HTTP/1.1", CHUNKED, (b"10000\r\n" + bytes(2**16) + b"\r\n") * 17),
    "chunk_of_no_size": (400, "POST /score HTTP/1.1", CHUNKED, b"zz\r\n"),
    "length_of_no_number": (400, "POST /score HTTP/1.1", {"Content-Length": "many"}, GOOD),
    "length_negative": (400, "POST /score HTTP/1.1", {"Content-Length": -1}, GOOD),
    "two_lengths": (400, "POST /score HTTP/1.1", LENGTH | {"content-length": 3}, GOOD),
    "another_protocol": (400, "POST /score GOPHER/1.1", LENGTH, GOOD),
    "no_http": (400, "score these images please", {}, b""),
    "long_header": (400, "POST /score HTTP/1.1", {"X-Long": "a" * 20_000}, b""),
    "upgrade": (404, "GET /chat HTTP/1.1", {"Connection": "upgrade", "Upgrade": "websocket"}, b""),
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("path", ["POST /score", "POST /check", "GET /rewards", "GET /metrics", "GET /", "GET /docs"])
def test_nothing_is_done_without_the_token(path: str, name: str, url: str, toy: Toy):
    before = toy.images
    assert raw(url, head(url, f"{path} HTTP/1.1", **LENGTH | TOKENS[name]) + GOOD) == 401
    assert toy.images == before


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_request_is_a_4xx_and_the_server_goes_on(name: str, url: str, toy: Toy):
    status, line, headers, body = WRONG[name]
    before = toy.images
    assert raw(url, head(url, line, **headers) + body) == status
    assert toy.images == before
    assert still_scores(url)


def test_bytes_that_are_no_http_are_a_4xx(url: str):
    draw = random.Random(1)
    for _ in range(20):
        assert 400 <= raw(url, draw.randbytes(200) + b"\r\n\r\n") < 500
    assert still_scores(url)


# ---- clients that do not end


def test_a_body_that_does_not_arrive_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.05)
    assert raw(url, head(url, **LENGTH) + GOOD[:50]) == 408
    assert still_scores(url)


@pytest.mark.parametrize("sent", [b"", b"POST /sc", b"POST /score HTTP/1.1\r\nhost: a\r\n"])
def test_headers_that_do_not_arrive_are_given_up(sent: bytes, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listening, "HEADERS_S", 0.05)
    assert raw(url, sent) == 0
    assert still_scores(url)


def test_what_nobody_waits_for_is_not_scored():
    """A client that is gone while its images are in the queue, behind a batch that is being scored."""
    toy, go, began = Toy(), threading.Event(), threading.Event()

    def score(images, prompts, metadata):
        if "slow" in prompts:
            began.set()
            assert go.wait(30)
        return Toy.score(toy, images, prompts, metadata)

    toy.reward = dataclasses.replace(toy.reward, score=score)
    with serving(toy) as url:
        slow = threading.Thread(target=post, args=(url, good_body(prompt="slow")))
        slow.start()
        assert began.wait(30)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head(url, **LENGTH) + GOOD)
            until(lambda: queued(url) == 2)
        until(lambda: 'path="/score",status="400"' in get(url, "/metrics").text)
        go.set()
        slow.join()
        assert still_scores(url)
    assert toy.images == 2


def queued(url: str) -> int:
    return int(get(url, "/metrics").text.partition('queued_images{reward="toy"} ')[2].split("\n")[0])


# ---- what is scored


def test_values_are_exact_and_details_are_kept(url: str):
    shown = images(5, seed=1)
    answer = post(url, wire.encode_request("toy", shown, list("abcde"), [{}] * 5))
    scores = wire.decode_answer(answer.content, 5)
    np.testing.assert_array_equal(scores.values, shown.mean((1, 2, 3)) / 255)
    assert [each["prompt"] for each in scores.details] == list("abcde")


def test_images_of_several_sizes_in_one_request(url: str):
    one, other = json.loads(good_body(size=8)), json.loads(good_body(size=12))
    both = {name: one[name] + other[name] for name in ("images", "prompts", "metadata")} | {"reward": "toy"}
    scores = wire.decode_answer(post(url, json.dumps(both).encode()).content, 2)
    np.testing.assert_array_equal(scores.values, [images(1, size).mean() / 255 for size in (8, 12)])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("fail", "ValueError: too dark"),
        ("nan", "the value is nan"),
        ("never", "can never be scored"),
        ("strange", "not what JSON can hold"),
    ],
)
def test_an_image_fails_alone(prompt: str, reason: str, url: str):
    answer = post(url, wire.encode_request("toy", images(3), ["a", prompt, "b"], [{}] * 3))
    scores = wire.decode_answer(answer.content, 3)
    assert scores.failed.tolist() == [False, True, False]
    assert reason in scores.details[1]["error"]


@pytest.mark.parametrize("prompt", ["raise", "exit", "list"])
def test_a_reward_that_raises_fails_its_batch_and_the_server_goes_on(prompt: str, url: str):
    scores = wire.decode_answer(post(url, good_body(2, prompt)).content, 2)
    assert scores.failed.all()
    assert "the reward raised" in scores.details[0]["error"]
    assert still_scores(url)


def test_requests_side_by_side_are_scored_together():
    toy, go = Toy(), threading.Event()

    def score(images, prompts, metadata):
        assert go.wait(30)
        return Toy.score(toy, images, prompts, metadata)

    toy.reward = dataclasses.replace(toy.reward, score=score)
    with serving(toy) as url, ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(post, url, good_body(3)) for _ in range(10)]
        until(lambda: queued(url) == 30)
        go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 10
    assert sum(toy.batches) == 30
    assert len(toy.batches) <= 4  # the first requests, then 32 images at a time


def test_a_full_queue_is_429_and_says_when_to_come_again():
    toy, go = Toy(), threading.Event()

    def score(images, prompts, metadata):
        assert go.wait(30)
        return Toy.score(toy, images, prompts, metadata)

    toy.reward = dataclasses.replace(toy.reward, score=score)
    small = service.Service({"toy": served(toy)}, TOKEN, LIMITS, room=100)
    with serving(service=small) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, good_body())
        until(lambda: queued(url) == 1)
        refused = post(url, good_body())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        go.set()
        assert first.result().status_code == 200
        assert still_scores(url)


def test_too_many_bodies_at_a_time_are_429(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "BODIES_AT_ONCE", 0)
    assert post(url, good_body()).status_code == 429
    monkeypatch.undo()
    assert still_scores(url)


def test_what_is_being_scored_is_answered_before_the_server_ends():
    toy, go, began = Toy(), threading.Event(), threading.Event()

    def score(images, prompts, metadata):
        began.set()
        assert go.wait(30)
        return Toy.score(toy, images, prompts, metadata)

    toy.reward = dataclasses.replace(toy.reward, score=score)
    with ThreadPoolExecutor(1) as pool:
        with serving(toy) as url:
            answer = pool.submit(post, url, good_body())
            assert began.wait(30)
            threading.Timer(0.3, go.set).start()  # by then it is ending
        assert answer.result().status_code == 200


def test_check_says_what_can_never_be_scored(url: str):
    for prompts, problem in ((["a", "b"], ""), (["a", "never"], "prompt 'never' can never be scored")):
        answer = post(url, wire.encode_request("toy", None, prompts, [{}, {}]), "/check")
        assert wire.decode_problem(answer.content) == problem
    assert post(url, good_body(), "/check").status_code == 400


def test_health_needs_no_token(url: str):
    assert get(url, "/health", {}).json() == {"status": "ok"}


def test_rewards_are_listed_with_kind_options_and_limits():
    with serving(Toy(), Toy("other"), kind="ocr", options={"penalty": 0.5}) as url:
        said = get(url, "/rewards").json()
    each = {"kind": "ocr", "options": {"penalty": 0.5}, "limits": [0, 1]}
    assert said["rewards"] == {"toy": each, "other": each}
    assert said["limits"]["items"] == 256


def test_metrics_count_what_was_answered():
    with serving(Toy('with "quotes"')) as url:
        post(url, wire.encode_request('with "quotes"', images(3), ["a", "fail", "b"], [{}] * 3))
        post(url, b"no")
        get(url, "/health", {})
        lines = get(url, "/metrics").text.splitlines()
    label, name = 'reward="with \\"quotes\\""', "fopd_jax_reward"
    for line in (
        f'{name}_requests_total{{path="/score",status="200"}} 1',
        f'{name}_requests_total{{path="/score",status="400"}} 1',
        f"{name}_images_total{{{label}}} 3",
        f"{name}_failures_total{{{label}}} 1",
        f"{name}_batches_total{{{label}}} 1",
        f"{name}_queued_images{{{label}}} 0",
        f'{name}_latency_seconds_bucket{{{label},le="+Inf"}} 1',
        f"{name}_latency_seconds_count{{{label}}} 1",
    ):
        assert line in lines


def test_rewards_are_closed_when_the_server_ends():
    toy = Toy()
    with serving(toy):
        assert not toy.closed
    assert toy.closed
