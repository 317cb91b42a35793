"""A server that does what it is told, request by request, right or wrong."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = BaseHTTPRequestHandler
Behaviour = Callable[[Handler, bytes], None]


def reply(status: int = 200, body: bytes = b"{}", **headers: str) -> Behaviour:
    def answer(handler: Handler, _: bytes) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def results(*values: str) -> bytes:
    return f'{{"results": [{", ".join(f"""{{"value": {value}, "details": {{}}}}""" for value in values)}]}}'.encode()


def right(handler: Handler, body: bytes) -> None:
    """One half for each image."""
    reply(body=results(*["0.5"] * len(json.loads(body)["images"])))(handler, body)


def hang_up(handler: Handler, _: bytes) -> None:
    handler.close_connection = True


def cut(handler: Handler, body: bytes) -> None:
    """Less than was announced."""
    reply(body=results("0.5"), Content_Length="1000")(handler, body)
    handler.close_connection = True


class Misbehaving:
    """`script`: what it does to the next POSTs, then it is right. `offer` answers GET; `asked` are the POSTs' heads."""

    def __init__(self) -> None:
        self.script: list[Behaviour] = []
        self.asked: list[Any] = []
        self.gets: list[str] = []
        self.usual: Behaviour = right
        self.offer: Behaviour = reply(
            body=json.dumps({"rewards": {"toy": {"kind": "toy", "options": {}, "limits": [0, 1]}}}).encode()
        )
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def hang(self, handler: Handler, _: bytes) -> None:
        """Say nothing until the test is over."""
        self.over.wait(60)
        handler.close_connection = True

    def drip(self, handler: Handler, _: bytes) -> None:
        """One byte after the other, for ever."""
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not self.over.wait(0.01):
                handler.wfile.write(b" ")
        handler.close_connection = True


@contextlib.contextmanager
def misbehaving() -> Iterator[Misbehaving]:
    told = Misbehaving()

    class _Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            told.gets.append(self.path)
            told.offer(self, b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with told.lock:
                told.asked.append((self.path, dict(self.headers), body))
                behaviour = told.script.pop(0) if told.script else told.usual
            behaviour(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    class _Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # more than a call has in flight: the usual 5 overflow where a test's machine is slow

    server = _Server(("127.0.0.1", 0), _Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield told
    finally:
        told.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
