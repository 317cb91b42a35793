"""The client's requests, against servers that do what they should not."""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fopd_jax.rewards.served import remote
from fopd_jax.rewards.served.transport import Pace, Transport
from tests.rewards.served.misbehaving import Behaviour, Misbehaving, cut, hang_up, misbehaving, reply, results, right
from tests.rewards.served.serving import TOKEN, closed_port, images, until

QUICK = Pace(timeout=0.3, retries=3, in_flight=4, pause=0.001, longest_pause=0.002)
AT_ONCE = Pace(timeout=30.0, retries=0, in_flight=4)


@pytest.fixture
def bad() -> Iterator[Misbehaving]:
    with misbehaving() as server:
        yield server


@contextlib.contextmanager
def client(*urls: str, pace: Pace = QUICK, **how: Any) -> Iterator[remote.Client]:
    """Without looking first whether anybody is there."""
    made = Transport(urls, TOKEN, pace, **how)
    try:
        yield remote.Client("toy", made)
    finally:
        made.close()


def score(client: remote.Client, count: int = 1) -> Any:
    return client.score(images(count), ["a cat"] * count, [{}] * count)


FAULTS: dict[str, tuple[Behaviour, str]] = {
    "hangs up": (hang_up, "disconnected"),
    "cut": (cut, "closed"),
    "500": (reply(500, b"out of memory"), "status 500: out of memory"),
    "503": (reply(503), "status 503"),
    "401": (reply(401), "status 401"),
    "404": (reply(404), "status 404"),
    "redirect": (reply(307, Location="http://127.0.0.1:1/"), "status 307"),
    "empty": (reply(body=b""), "found no JSON"),
    "garbage": (reply(body=bytes(range(256))), "found no UTF-8"),
    "html": (reply(body=b"<html>ok</html>"), "found no JSON"),
    "nan": (reply(body=results("NaN")), "found NaN"),
    "large": (reply(body=results("1e999")), "found 1e999"),
    "digits": (reply(body=results("1" + "0" * 400)), "expected a number"),
    "text": (reply(body=results('"0.5"')), "expected a number"),
    "true": (reply(body=results("true")), "expected a number"),
    "none": (reply(body=results()), "found 0 entries"),
    "two": (reply(body=results("1", "2")), "found 2 entries"),
    "null": (reply(body=b'{"results": [null]}'), "expected an object"),
    "value alone": (reply(body=b'{"results": [{"value": 1}]}'), "misses details"),
    "both": (reply(body=b'{"results": [{"value": 1, "details": {}, "error": "a"}]}'), "found 'error'"),
    "deep": (reply(body=b"[" * 10_000), "too deep"),
    "compressed": (reply(body=results("1"), Content_Encoding="gzip"), "encoded"),
    "huge": (reply(body=bytes(2**20)), "more than 100000 bytes"),
    "no http": (lambda handler, _: (handler.wfile.write(b"hello\r\n\r\n"), hang_up(handler, _))[0], "illegal"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_for_a_while_is_survived(fault: str, bad: Misbehaving):
    bad.script = [FAULTS[fault][0]] * 2
    with client(bad.url, pace=dataclasses.replace(QUICK, timeout=30.0, most_bytes=10**5)) as made:
        assert score(made).values.tolist() == [0.5]
    assert len(bad.asked) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_for_good_fails_every_image_with_server_and_reason(fault: str, bad: Misbehaving):
    bad.usual, reason = FAULTS[fault]
    with client(bad.url, pace=dataclasses.replace(AT_ONCE, most_bytes=10**5)) as made:
        said = score(made).details[0]["error"]
        assert score(made, 20).failed.all()
    assert said.startswith(f"no server answered: {bad.url}: ")
    assert reason in said


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_silence_and_single_bytes_end_in_time(how: str, bad: Misbehaving):
    bad.script = [getattr(bad, how)] * 2
    with client(bad.url) as made:
        assert score(made).values.tolist() == [0.5]
    bad.usual = getattr(bad, how)
    with client(bad.url, pace=dataclasses.replace(QUICK, timeout=0.05, retries=0)) as made:
        assert score(made).details[0]["error"] == f"no server answered: {bad.url}: no answer within 0.05 s"


def test_a_server_that_is_down_hands_over_to_another(bad: Misbehaving):
    dead = f"http://127.0.0.1:{closed_port()}"
    with client(dead, bad.url, pace=AT_ONCE) as made:
        for _ in range(5):
            assert not score(made, 40).failed.any()


def test_all_servers_down_name_all_of_them():
    dead = [f"http://127.0.0.1:{closed_port()}" for _ in range(2)]
    with client(*dead) as made:
        said = score(made).details[0]["error"]
    for url in dead:
        assert f"{url}: Connection refused (3 times); " in said
        assert f"{url}: left alone after failures: Connection refused" in said


def test_what_is_wrong_with_the_request_is_not_tried_again(bad: Misbehaving):
    bad.usual = reply(400, b'{"error": "images[0]: found no PNG"}')
    with client(bad.url) as made:
        assert "status 400: " in score(made).details[0]["error"]
    assert len(bad.asked) == 1


def test_a_busy_server_is_asked_again_when_it_says(bad: Misbehaving):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    bad.script = [
        reply(429, Retry_After=after) for after in ("7", "999999", "0", "-1", "soon", "Wed, 21 Oct 2026 07:28:00 GMT")
    ]
    with client(bad.url, pace=AT_ONCE, sleep=sleep) as made:
        assert score(made).values.tolist() == [0.5]
    assert waits == [7, 30, 0.1, 1, 1, 1]


def test_a_server_that_stays_busy_is_given_up(bad: Misbehaving):
    times = iter(range(0, 1000, 20))
    bad.usual = reply(429)

    async def sleep(_: float) -> None:
        pass

    with client(bad.url, pace=AT_ONCE, sleep=sleep, clock=lambda: float(next(times))) as made:
        assert "too busy (status 429)" in score(made).details[0]["error"]


def test_pauses_grow_and_vary(bad: Misbehaving):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    bad.usual = reply(500)
    with client(bad.url, pace=Pace(30.0, 8, 1, pause=1.0, longest_pause=16.0), sleep=sleep) as made:
        score(made)
    for wait, longest in zip(waits, [1, 2, 4, 8, 16, 16, 16, 16], strict=True):
        assert longest / 2 <= wait <= longest


def test_a_server_that_fails_again_and_again_is_left_alone_then_probed(bad: Misbehaving):
    now = [0.0]
    bad.usual = reply(500)
    with client(bad.url, pace=AT_ONCE, clock=lambda: now[0]) as made:
        for _ in range(3):
            score(made)
        assert "left alone after failures: status 500" in score(made).details[0]["error"]
        assert len(bad.asked) == 3
        now[0] = 1.0  # a probe, which fails: twice as long
        assert score(made).failed[0]
        assert len(bad.asked) == 4
        now[0] = 2.9
        assert "left alone" in score(made).details[0]["error"]
        now[0], bad.usual = 3.0, right
        assert score(made, 100).values.tolist() == [0.5] * 100  # one probes, the others wait for it
        assert len(bad.asked) == 4 + 7


def test_only_one_request_probes(bad: Misbehaving):
    now = [0.0]
    bad.usual = reply(500)
    with client(bad.url, pace=AT_ONCE, clock=lambda: now[0]) as made:
        for _ in range(3):
            score(made)
        now[0] = 1.0
        assert score(made, 64).failed.all()  # four requests
    assert len(bad.asked) == 4


def test_a_replica_that_is_well_again_gets_its_share_while_others_do(bad: Misbehaving, capsys: pytest.CaptureFixture):
    now = [0.0]
    bad.usual = reply(500)
    with misbehaving() as good, client(bad.url, good.url, pace=AT_ONCE, clock=lambda: now[0]) as made:
        for _ in range(5):
            assert not score(made).failed[0]
        assert len(bad.asked) == 3
        now[0], bad.usual = 1.0, bad.hang
        assert not score(made).failed[0]  # nobody waits for the probe
        until(lambda: len(bad.asked) == 4)
        bad.over.set()
        until(lambda: made._transport._replicas[0].probe is None)
        now[0], bad.usual = 10.0, right
        until(lambda: (not score(made, 64).failed.any()) and len(bad.asked) > 6)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"rewards: {bad.url} is left alone for a while: status 500: {{}}",
        f"rewards: {bad.url} answers again",
    ]


def test_the_token_is_in_no_log_and_no_message(bad: Misbehaving, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    bad.usual = reply(500, f"Authorization: Bearer {TOKEN}".encode(), X_Echo=TOKEN[:3])
    with client(bad.url) as made:
        assert "Bearer [token]" in (said := str(score(made).details))
    assert bad.asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in said + caplog.text
    assert TOKEN not in repr(made) + repr(made._transport)


def test_proxies_of_the_environment_are_not_asked(bad: Misbehaving, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    with client(bad.url, pace=AT_ONCE) as made:
        assert not score(made).failed[0]


def test_closing_ends_what_waits(bad: Misbehaving):
    bad.usual = bad.hang
    before = threading.active_count()
    made = Transport([bad.url], TOKEN, AT_ONCE)
    raised: list[str] = []

    def wait() -> None:
        try:
            score(remote.Client("toy", made))
        except BaseException as error:
            raised.append(type(error).__name__)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: len(bad.asked) == 1)
    made.close()
    made.close()
    thread.join(30)
    assert raised == ["CancelledError"]
    with pytest.raises(RuntimeError, match="closed"):
        score(remote.Client("toy", made))
    bad.over.set()
    until(lambda: threading.active_count() <= before)
