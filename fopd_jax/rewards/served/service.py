"""The server of rewards as an ASGI application, see `wire.py` for what is said.

    GET  /health    whether it is up; the one path without a token
    GET  /rewards   what is served
    GET  /metrics   Prometheus' text
    POST /check     whether prompts can be scored: {"problem": "…"}, empty where they can
    POST /score     images, prompts and metadata to results

Whoever sends what is wrong gets a 4xx with `{"error": …}`, an image that cannot be scored fails alone, and the server
goes on. Who does not know the token is answered 401 before anything of a request's body is read.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fopd_jax.exits import shorten
from fopd_jax.rewards.reward import Reward
from fopd_jax.rewards.served import wire
from fopd_jax.rewards.served.batching import Batcher, Full
from fopd_jax.rewards.served.prometheus import Meters

PROTOCOL = 1
BODY_SECONDS = 60.0
"""For a request's body to arrive."""
BODIES_AT_ONCE = 8
"""Bodies of the largest size that are held at a time."""
RETRY_AFTER_S = 1
_BUSY = {"Retry-After": str(RETRY_AFTER_S)}
_JSON = "application/json"


@dataclasses.dataclass(frozen=True)
class Served:
    """A reward, and what tells clients whether it is the one they mean: its kind and options."""

    reward: Reward
    kind: str
    options: Mapping[str, Any]


class Service:
    """What is behind the paths. `room`: pixels that may wait or be scored at a time, a reward."""

    def __init__(self, rewards: Mapping[str, Served], token: str, limits: wire.Limits, room: int = 2**27) -> None:
        self._rewards, self._token, self._limits = rewards, token, limits
        self._meters = Meters(rewards)
        self._batchers = {name: Batcher(each.reward, self._meters.scored, room) for name, each in rewards.items()}
        self._held = 0  # bytes of bodies that are being read, or may be

    def app(self) -> ASGIApp:
        """The application."""
        routes = [
            Route("/health", self._health),
            Route("/rewards", self._list),
            Route("/metrics", self._metrics),
            Route("/check", self._check, methods=["POST"]),
            Route("/score", self._score, methods=["POST"]),
        ]
        paths = {route.path for route in routes}
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _refuse})
        app.router.redirect_slashes = False
        return Gate(app, self._token, paths, self._meters)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run()) for batcher in self._batchers.values()]
        yield
        for task in tasks:
            task.cancel()
        for batcher in self._batchers.values():
            batcher.close()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _list(self, _: Request) -> Response:
        served = {
            name: {"kind": each.kind, "options": wire.as_json(each.options), "limits": list(each.reward.limits)}
            for name, each in self._rewards.items()
        }
        return JSONResponse({"protocol": PROTOCOL, "rewards": served, "limits": dataclasses.asdict(self._limits)})

    async def _metrics(self, _: Request) -> Response:
        queued = {name: batcher.queued for name, batcher in self._batchers.items()}
        return PlainTextResponse(self._meters.text(queued), media_type="text/plain; version=0.0.4")

    async def _check(self, request: Request) -> Response:
        asked = await self._read(request, images=False)
        check = self._rewards[asked.reward].reward.check
        problem = ""
        try:
            await asyncio.to_thread(check, asked.prompts, asked.metadata)
        except Exception as error:  # the reward may be anybody's code
            problem = shorten(str(error)) or type(error).__name__
        return Response(wire.encode_problem(problem), media_type=_JSON)

    async def _score(self, request: Request) -> Response:
        asked = await self._read(request, images=True)
        began = time.monotonic()
        try:
            results = self._batchers[asked.reward].submit(asked)
        except Full as full:
            raise HTTPException(429, "too many images wait, ask again later", _BUSY) from full
        answer = asyncio.gather(*results)
        gone = asyncio.ensure_future(request.receive())  # after the body comes nothing but the end of the connection
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()  # nobody waits: what is still in the queue is not scored
            await asyncio.wait({answer})
            return Response(status_code=400)
        gone.cancel()
        self._meters.answered(asked.reward, time.monotonic() - began)
        return Response(wire.encode_answer(answer.result()), media_type=_JSON)

    async def _read(self, request: Request, *, images: bool) -> wire.Request:
        """What a request asks for; raises HTTPException for whatever is wrong with it."""
        size = self._size(request)
        if self._held + size > BODIES_AT_ONCE * self._limits.body_bytes:
            raise HTTPException(429, "too many requests are being read, ask again later", _BUSY)
        self._held += size
        try:
            body = await _read_body(request, self._limits.body_bytes)
            asked = await asyncio.to_thread(wire.decode_request, body, self._limits, images=images)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self._held -= size
        if asked.reward not in self._rewards:
            raise HTTPException(404, f"reward: found {wire.shown(asked.reward)}, expected {', '.join(self._rewards)}")
        return asked

    def _size(self, request: Request) -> int:
        """Bytes that a request's body may have, by its headers."""
        headers = request.headers
        if headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
            raise HTTPException(415, f"content-type: expected {_JSON}")
        if headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "content-encoding: expected none")
        declared = headers.get("content-length")
        size = self._limits.body_bytes if declared is None else int(declared)  # the HTTP parser refuses what is none
        if size > self._limits.body_bytes:
            raise HTTPException(413, _too_large(self._limits.body_bytes))
        return size


async def _read_body(request: Request, most: int) -> bytes:
    """The body, as long as it is no larger and arrives in time."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise HTTPException(413, _too_large(most))
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the body ended early") from error
    return b"".join(parts)


def _too_large(most: int) -> str:
    return f"expected a body of at most {most} bytes"


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class Gate:
    """Lets in who knows the token, and counts every answer."""

    def __init__(self, app: ASGIApp, token: str, paths: set[str], meters: Meters) -> None:
        self._app, self._paths, self._meters = app, paths, meters
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._meters.requests[path, message["status"]] += 1
            await send(message)

        if path == "/health" or self._knows(scope):
            await self._app(scope, receive, counted)
        else:
            answer = JSONResponse({"error": "expected the bearer token"}, 401, {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, counted)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
