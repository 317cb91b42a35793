"""A socket and uvicorn behind it, with an end to every wait for a client."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 30
"""For the next request on a connection."""
HEADERS_S = 10.0
"""For a request's headers to arrive, give or take as much."""
STOP_S = 30
"""For requests that run when the server is told to stop."""
CONNECTIONS = 256
_HEADER_BYTES = 2**14


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that is taken, and refuses connections until the server listens on it; port 0 is any free one.

    Raises:
      ValueError: the host is none of this machine's, or the port is taken; names the flags.
    """
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except OSError as error:
        if made is not None:
            made.close()
        raise ValueError(f"--host={host} --port={port}: {error.strerror}") from error


class _Protocol(H11Protocol):
    """Closes connections whose headers do not arrive: uvicorn itself waits for them for ever."""

    _seen: object = None
    _ticks: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._ticks = self.loop.call_later(HEADERS_S, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ticks is not None:
            self._ticks.cancel()
        super().connection_lost(exc)

    def _tick(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen and self.timeout_keep_alive_task is None:
            self.transport.close()
        else:
            self._seen = self.cycle
            self._ticks = self.loop.call_later(HEADERS_S, self._tick)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def make_server(app: ASGIApp, ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """What serves an application by `run(sockets=[…])`; `ready` is called once it listens.

    SIGTERM and Ctrl-C let requests that run end, refuse new ones, and end the process by that signal.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    return _Server(config, ready)
