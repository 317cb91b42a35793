import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.exits import Unreachable
from fopd_jax.rewards.reward import Reward
from fopd_jax.rewards.served import remote
from tests.rewards.served.misbehaving import Behaviour, Misbehaving, hang_up, misbehaving, reply
from tests.rewards.served.serving import TOKEN, Toy, closed_port, images, serving, until


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", TOKEN)


@pytest.fixture
def bad() -> Iterator[Misbehaving]:
    with misbehaving() as server:
        yield server


@contextlib.contextmanager
def making(*urls: str, name: str = "toy", server: dict[str, Any] | None = None, **settings: Any) -> Iterator[Reward]:
    made = remote.make(name, RewardConfig(**settings), Server(urls=urls, **(server or {})))
    try:
        yield made
    finally:
        made.close()


# ---- with servers that are well


def test_values_details_and_failures_come_as_the_server_gives_them():
    shown, prompts = images(40, 16), [f"prompt {i}" for i in range(39)] + ["fail"]
    toy, other = Toy(), Toy()
    with serving(toy) as one, serving(other) as two, making(one, two, kind="remote") as reward:
        scores = reward.score(shown, prompts, [{}] * 40)
    assert (reward.runs, reward.limits, reward.name) == ("remote", (0, 1), "toy")
    np.testing.assert_array_equal(scores.values[:39], shown.mean((1, 2, 3))[:39] / 255)
    assert [each["prompt"] for each in scores.details[:39]] == prompts[:39]
    assert scores.failed.tolist() == [False] * 39 + [True]
    assert scores.details[39] == {"error": "ValueError: too dark"}
    assert toy.images + other.images == 40
    assert min(toy.images, other.images) > 0


def test_no_images_are_no_request():
    with serving(Toy()) as url, making(url, kind="remote") as reward:
        assert len(reward.score(np.zeros((0, 8, 8, 3), np.uint8), [], [])) == 0


def test_prompts_are_checked_by_the_server():
    with serving(Toy()) as url, making(url, kind="remote") as reward:
        reward.check(["a"] * 600, [{}] * 600)
        with pytest.raises(ValueError, match="'never' can never be scored"):
            reward.check(["a"] * 599 + ["never"], [{}] * 600)


def test_many_threads_may_score_at_a_time():
    with serving(Toy()) as url, making(url, kind="remote") as reward:
        found: dict[int, float] = {}

        def one(seed: int) -> None:
            found[seed] = reward.score(images(1, seed=seed), ["a"], [{}]).values[0]

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {seed: images(1, seed=seed).mean() / 255 for seed in range(20)}


def test_metadata_that_json_cannot_hold_are_failures():
    with serving(Toy()) as url, making(url, kind="remote") as reward:
        scores = reward.score(images(1), ["a"], [{"where": Path("a")}])
        assert "JSON cannot hold" in scores.details[0]["error"]


# ---- made


def test_a_kind_of_its_own_is_the_servers_with_the_same_options():
    with serving(Toy("text"), kind="ocr", options={"substring": False}) as url:
        with making(url, name="text", kind="ocr", options={"substring": False}, divide_by=2.0) as reward:
            assert reward.score(images(1), ["a"], [{}]).values[0] == images(1).mean() / 255  # undivided
        with making(url, name="other", kind="remote", options={"reward": "text"}) as reward:
            assert not reward.score(images(1), ["a"], [{}]).failed[0]
        for settings, said in (
            ({"kind": "geneval"}, "rewards.text.kind: found 'geneval', but the server serves 'ocr'"),
            ({"kind": "ocr"}, "rewards.text.options: found {}, but the server serves {'substring': False}"),
        ):
            with pytest.raises(ValueError) as error, making(url, name="text", **settings):
                pass
            assert said in str(error.value)


def test_files_may_lie_elsewhere_at_the_server():
    theirs = {"clip": "/there/clip.safetensors", "value": "official"}
    with serving(Toy("geneval"), kind="geneval", options=theirs) as url:
        for ours in ({"value": "official"}, {"clip": "here.safetensors", "value": "official"}):
            with making(url, name="geneval", options=ours) as reward:
                assert not reward.score(images(1), ["a"], [{}]).failed[0]
        said = r"rewards\.geneval\.options: found \{\}, but the server serves \{'value'"
        with pytest.raises(ValueError, match=said), making(url, name="geneval", options={"clip": "a"}):
            pass


@pytest.mark.parametrize("where", ["env", "file"])
def test_the_token_is_read_from_the_file_or_the_environment(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "token"
    if where == "file":
        file.write_text(TOKEN + "\n")
        monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", "another-token-than-the-servers")
    server = {"token_file": str(file) if where == "file" else ""}
    with serving(Toy()) as url, making(url, kind="remote", server=server) as reward:
        assert not reward.score(images(1), ["a"], [{}]).failed[0]


def test_a_replica_that_is_not_there_at_the_start_is_told(capsys: pytest.CaptureFixture):
    dead = f"http://127.0.0.1:{closed_port()}"
    with serving(Toy()) as url, making(dead, url, kind="remote") as reward:
        assert not score_all(reward, 4).failed.any()
    assert f"goes on without {dead}: Connection refused" in capsys.readouterr().err


def score_all(reward: Reward, count: int) -> Any:
    return reward.score(images(count), ["a"] * count, [{}] * count)


def refused(*urls: str, **how: Any) -> str:
    with pytest.raises(ValueError) as error, making(*urls, kind="remote", **how):
        pass
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_servers_that_are_not_there_are_refused_by_name_and_may_be_there_at_the_next_try():
    one, two = (f"http://127.0.0.1:{closed_port()}" for _ in range(2))
    with pytest.raises(Unreachable), making(one, two, kind="remote"):
        pass
    said = refused(one, two)
    assert said.startswith("run.servers.toy.urls: no server serves 'toy': ")
    assert f"{one}: Connection refused; {two}: Connection refused" in said


def test_what_a_server_does_not_serve_is_refused_by_name():
    with serving(Toy("ocr")) as url:
        assert f"{url}: its answer is none: serves ocr, not 'toy'" in refused(url)


def test_a_wrong_token_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", wrong := "another-token-than-the-servers")
    with serving(Toy()) as url:
        said = refused(url)
    assert f"{url}: status 401: " in said
    assert wrong not in said


def test_servers_that_differ_are_refused():
    with serving(Toy(), kind="a") as one, serving(Toy(), kind="b") as two:
        assert "serve different rewards as 'toy'" in refused(one, two)


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (reply(500), "status 500"),
        (reply(302, Location="http://127.0.0.1:1/"), "status 302"),
        (reply(body=b"<html>"), "found no JSON"),
        (reply(body=b"[]"), "this is no server of fopd_jax.rewards.serve"),
        (reply(body=b'{"rewards": {"toy": {}}}'), "expected kind, options and two limits"),
        (reply(body=b'{"rewards": {"toy": {"kind": "a", "options": {}, "limits": [0, "b"]}}}'), "expected a number"),
        (reply(401, f"who are you, {TOKEN}?".encode()), "who are you, [token]?"),
        (hang_up, "disconnected"),
    ],
)
def test_a_strange_server_is_refused_with_its_reason(offer: Behaviour, reason: str, bad: Misbehaving):
    bad.offer = offer
    assert f"{bad.url}: " in (said := refused(bad.url))
    assert reason in said
    assert bad.gets == ["/rewards"]


def test_a_silent_server_is_refused_in_seconds(bad: Misbehaving, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "SURVEY_S", 0.05)
    bad.offer = bad.hang
    assert "no answer within 0.05 s" in refused(bad.url)


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ((), "found none"),
        (("127.0.0.1:18085",), "expected an address such as http://127.0.0.1:18085"),
        (("ftp://a",), "expected an address"),
        (("http://",), "expected an address"),
        (("http://a:99999",), "expected an address"),
        (("http://user:secret@a:99999",), "the token's place is token_file"),
        (("http://a?b=c",), "expected an address"),
        (("http://a b",), "expected an address"),
        (("http://a:1", "http://a:1"), "names a server twice"),
        (("http://user:secret@a",), "the token's place is token_file"),
    ],
)
def test_what_is_no_address_is_refused(urls: tuple[str, ...], said: str):
    found = refused(*urls)
    assert found.startswith("run.servers.toy.urls: ")
    assert said in found
    assert "secret" not in found


@pytest.mark.parametrize("content", [None, "", "short", "two words in this file", "unprintable\x00in this file"])
def test_a_token_file_without_a_token_is_refused(content: str | None, tmp_path: Path):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    said = refused("http://127.0.0.1:1", server={"token_file": str(file)})
    assert said.startswith(f"run.servers.toy.token_file: {file}: ")


def test_no_token_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FOPD_JAX_REWARD_TOKEN")
    assert "found none, expected the servers' token" in refused("http://127.0.0.1:1")


# ---- a server of its own that is killed


def start(port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.rewards.served.serving", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving toy on http://127.0.0.1:{port}\n"
    return process


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], subprocess.Popen]]:
    made: list[subprocess.Popen] = []
    try:
        yield lambda port: made.append(start(port)) or made[-1]
    finally:
        for process in made:
            process.kill()
            process.communicate()


def test_a_server_that_is_killed_and_starts_again_is_found_again():
    port = closed_port()
    with stopping() as starting:
        first = starting(port)
        with making(f"http://127.0.0.1:{port}", kind="remote", server={"retries": 1}) as reward:
            assert not score_all(reward, 20).failed.any()
            first.kill()
            first.wait()
            assert "Connection refused" in score_all(reward, 20).details[0]["error"]
            second = starting(port)
            until(lambda: not score_all(reward, 20).failed.any())
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == -signal.SIGTERM
