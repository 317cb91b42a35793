"""The server: the page, its numbers with an ETag, its pictures; to this machine alone."""

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from fopd_jax.reporting.content import Sources
from fopd_jax.reporting.serving import Fresh, bind
from tests.reporting import made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made.make_run(tmp_path / "runs" / "sft", "sft")
    made.make_evaluation(tmp_path / "eval", prompts=2, side=8)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ThreadingHTTPServer]:
    fresh = Fresh(Sources((("", folder / "runs" / "sft"),), (folder / "eval",)), every=0.0)
    with bind(0, fresh) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def ask(server: ThreadingHTTPServer, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_its_numbers_and_its_pictures(server: ThreadingHTTPServer):
    answer, body = ask(server, "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    assert b"connect-src &#39;self&#39;" in body
    answer, body = ask(server, "/data.json")
    data = json.loads(body)
    assert data["runs"][0]["step"] == 30
    name = next(iter(data["galleries"][0]["rows"][0]["models"].values()))["image"]
    answer, body = ask(server, f"/pictures/{name}")
    assert answer.headers["Content-Type"] == "image/webp"
    assert body[8:12] == b"WEBP"
    for path in ("/pictures/none", "/pictures/../data.json", "/etc/passwd", "/favicon.ico"):
        assert ask(server, path)[0].status == 404


def test_new_lines_are_seen_and_old_ones_not_sent_again(server: ThreadingHTTPServer, folder: Path):
    answer, _ = ask(server, "/data.json")
    tag = answer.headers["ETag"]
    answer, body = ask(server, "/data.json", **{"If-None-Match": tag})
    assert (answer.status, body) == (304, b"")
    with (folder / "runs" / "sft" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 31, "train/loss": 0.5}\n')
    answer, body = ask(server, "/data.json", **{"If-None-Match": tag})
    assert answer.status == 200
    assert json.loads(body)["runs"][0]["step"] == 31


def test_a_folder_that_goes_away_ends_nothing(server: ThreadingHTTPServer, folder: Path):
    (folder / "runs" / "sft").rename(folder / "away")
    answer, body = ask(server, "/data.json")
    assert answer.status == 200
    assert json.loads(body)["runs"][0]["step"] == 0


def test_other_names_of_this_machine_are_refused(server: ThreadingHTTPServer):
    assert ask(server, "/data.json", Host="evil.example:80")[0].status == 403
    assert ask(server, "/data.json", Host="localhost:80")[0].status == 200


def test_a_taken_port_is_named(server: ThreadingHTTPServer):
    with pytest.raises(ValueError, match=rf"--port: {server.server_port} cannot be listened on"):
        bind(server.server_port, Fresh(Sources(())))


def test_folders_are_looked_at_no_more_often_than_asked_for(folder: Path):
    now = [0.0]
    fresh = Fresh(Sources((("", folder / "runs" / "sft"),)), every=5.0, clock=lambda: now[0])
    first = fresh.content()
    now[0] = 4.9
    assert fresh.content() is first
    now[0] = 5.0
    assert fresh.content() is not first
