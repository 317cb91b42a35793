"""The page by HTTP on this machine alone, for runs that go on: `/`, `/data.json` with an ETag, `/pictures/NAME`."""

import base64
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from fopd_jax.reporting.content import Content, Sources, gather
from fopd_jax.reporting.page import render, to_json

HOST = "127.0.0.1"
EVERY, LEAST = 5.0, 0.1
"""Seconds between two looks at the folders, and between two questions of a page, which are never fewer than `LEAST`."""


class Answer(NamedTuple):
    """What is sent for a path."""

    kind: str
    body: bytes
    tag: str = ""


class Fresh:
    """What the folders hold, read again when somebody asks and the last look is older than `every` seconds."""

    def __init__(self, sources: Sources, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._sources, self._every, self._clock = sources, every, clock
        self._lock = threading.Lock()
        self._content: Content | None = None
        self._looked = 0.0

    def content(self) -> Content:
        """The newest, by one thread at a time."""
        with self._lock:
            if self._content is None or self._clock() - self._looked >= self._every:
                self._content, self._looked = gather(self._sources), self._clock()
            return self._content

    def answer(self, path: str) -> Answer | None:
        """None: there is nothing of that name."""
        content = self.content()
        if path in ("/", "/index.html"):
            return Answer("text/html; charset=utf-8", render(content, max(self._every, LEAST)).encode())
        if path == "/data.json":
            body = to_json(content.data).encode()
            return Answer("application/json", body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        picture = content.pictures.get(path.removeprefix("/pictures/"))
        if picture is None:
            return None
        kind, _, data = picture.removeprefix("data:").partition(";base64,")
        return Answer(kind, base64.b64decode(data))


def bind(port: int, fresh: Fresh) -> ThreadingHTTPServer:
    """A server that listens; `port` 0 is any that is free.

    Raises:
      ValueError: the port is taken, or not allowed.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, fresh))
    except OSError as error:
        raise ValueError(f"--port: {port} cannot be listened on ({error.strerror}); choose another") from error
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, fresh: Fresh, *arguments: object) -> None:
        self._fresh = fresh
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if host not in (HOST, "localhost"):  # no other site's name leads here: a browser would let it read the answer
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        answer = self._fresh.answer(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif answer.tag and self.headers.get("If-None-Match") == answer.tag:
            self._send(HTTPStatus.NOT_MODIFIED, answer._replace(body=b""))
        else:
            self._send(HTTPStatus.OK, answer)

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        with contextlib.suppress(ConnectionError):  # a browser that has gone on needs no answer
            self._write(status, answer)

    def _write(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if answer.tag:
            self.send_header("ETag", answer.tag)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page that asks every few seconds is not worth a line."""
