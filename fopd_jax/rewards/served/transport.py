"""Requests to replicas of one server over HTTP, whatever the servers do: each answers, or is named with its reason.

A call goes in rounds: in each, the replicas are asked in turn, least busy first, until one gives an answer that can be
read; between rounds pauses grow. Every attempt has a time limit as a whole, so that neither silence nor single bytes
hold it up. All network state lives in one thread with an event loop; what is public here may be called from any.

Proxies of the environment are not used, redirects are not followed, and what servers say is never trusted: not its
size, not its form. No message holds the token.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

from fopd_jax.config.rules import URLS
from fopd_jax.console import note
from fopd_jax.exits import Unreachable
from fopd_jax.rewards.served.breaker import Breaker

T = TypeVar("T")
_FINAL = (400, 413, 415, 422)
"""Statuses that are about the request itself: no replica would say otherwise."""
_BUSY = 429
_SNIPPET = 300
"""Characters of a server's own words in a message."""


class Unanswered(Exception):
    """Why a call has no answer: every server that was asked, and what was wrong with it."""


class Silent(Unanswered):
    """It was a server that cannot be reached, or not in time, or that is too busy."""


class _Failed(Exception):
    """Why an attempt failed."""


class _Silent(_Failed):
    """The server said nothing."""


class _Busy(Exception):
    """Seconds after which to ask again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too busy (status {_BUSY})")
        self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class Call(Generic[T]):
    """One request, a POST of JSON: `body()` is made once, in a thread; `read` raises ValueError for a wrong answer."""

    path: str
    body: Callable[[], bytes]
    read: Callable[[bytes], T]


@dataclasses.dataclass(frozen=True)
class Pace:
    """`timeout`: seconds of an attempt. `retries`: rounds after the first. `in_flight`: calls at a time, a replica.

    Pauses grow from `pause` by doubling to `longest_pause`, less up to half of it by chance. Servers that are too busy
    are asked again for `timeout` seconds of a call, which are no rounds.
    """

    timeout: float
    retries: int
    in_flight: int
    pause: float = 0.5
    longest_pause: float = 30.0
    most_bytes: int = 16 * 2**20  # of an answer


@dataclasses.dataclass(eq=False)
class _Replica:
    url: str
    breaker: Breaker = dataclasses.field(default_factory=Breaker)
    outstanding: int = 0
    asked: int = 0
    reason: str = ""
    probe: asyncio.Event | None = None  # set when the probe that is under way has ended


class Transport:
    """`close` it in the end. `clock` and `sleep` are those of the event loop's thread."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        pace: Pace,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        import httpx  # a fifth of a second

        self._token, self._pace, self._clock, self._sleep = token, pace, clock, sleep
        self._replicas = [_Replica(url.rstrip("/")) for url in urls]
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=None,  # each attempt has one as a whole
            trust_env=False,
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=pace.in_flight * len(urls)),
        )
        self._errors = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)
        self._room = asyncio.Semaphore(pace.in_flight * len(urls))
        self._probes: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()

    def ask(self, calls: Sequence[Call[T]]) -> list[T | Unanswered]:
        """What came of each call, in their order; they run side by side."""

        async def all_of_them() -> list[T | Unanswered]:
            return await asyncio.gather(*map(self._call, calls))

        return self._run(all_of_them())

    def survey(self, path: str, read: Callable[[bytes], T], within: float) -> dict[str, T | Unanswered]:
        """What each replica says to a GET, asked once; seconds that it may take."""

        async def one(replica: _Replica) -> T | Unanswered:
            try:
                return await self._attempt(replica, path, None, read, min(within, self._pace.timeout))
            except (_Silent, _Busy) as silent:
                return Silent(str(silent))
            except _Failed as failed:
                return Unanswered(str(failed))
            except Unanswered as refused:
                return refused

        async def everyone() -> list[T | Unanswered]:
            return await asyncio.gather(*map(one, self._replicas))

        return dict(zip([replica.url for replica in self._replicas], self._run(everyone()), strict=True))

    def close(self) -> None:
        """End the thread; calls that wait raise CancelledError."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- in the event loop's thread

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise RuntimeError("the connection to the servers is closed")
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the thread that waits
            raise

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _call(self, call: Call[T]) -> T | Unanswered:
        async with self._room:  # also bounds how many bodies are held
            began, reasons = self._clock(), Counter[str]()
            try:
                body = await asyncio.to_thread(call.body)
            except ValueError as error:
                return Unanswered(str(error))
            rounds = 0
            while True:
                try:
                    return await self._round(call, body, reasons)
                except Unanswered as refused:
                    return refused
                except _Busy as busy:
                    if self._clock() - began < self._pace.timeout:
                        await self._sleep(busy.seconds)
                        continue
                except _Failed:
                    pass
                rounds += 1
                if rounds > self._pace.retries:
                    return Unanswered(_told(reasons))
                await self._sleep(self._back_off(rounds))

    def _back_off(self, rounds: int) -> float:
        longest = min(self._pace.pause * 2.0 ** min(rounds - 1, 60), self._pace.longest_pause)
        return longest * random.uniform(0.5, 1.0)

    async def _round(self, call: Call[T], body: bytes, reasons: Counter[str]) -> T:
        """An answer of any replica.

        Raises:
          _Busy: some are too busy, none answered otherwise.
          _Failed: all failed, or rest; `reasons` has got theirs.
          Unanswered: the request itself is refused.
        """
        self._probe_others(call, body)
        left, busy = list(self._replicas), []
        while left:
            replica = min(left, key=self._rank)
            left.remove(replica)
            try:
                return await self._try(replica, call, body)
            except _Busy as error:
                busy.append(error)
                reasons[f"{replica.url}: {error}"] += 1
            except _Failed as error:
                reasons[f"{replica.url}: {error}"] += 1
        raise min(busy, key=lambda each: each.seconds) if busy else _Failed

    def _rank(self, replica: _Replica) -> tuple[bool, bool, int, int]:
        """The least is asked first: healthy ones before those to probe, these before those being probed."""
        closed = replica.breaker.state(self._clock()) == "closed"
        return not closed, replica.probe is not None, replica.outstanding, replica.asked

    def _probe_others(self, call: Call[T], body: bytes) -> None:
        """Who has rested is asked the same beside the healthy ones, so that nobody waits for one that is still ill."""
        if any(replica.breaker.state(self._clock()) == "closed" for replica in self._replicas):
            for replica in self._replicas:
                if self._awaits_probe(replica):
                    task = asyncio.create_task(self._probe(replica, call, body))
                    self._probes.add(task)
                    task.add_done_callback(self._probes.discard)

    async def _probe(self, replica: _Replica, call: Call[T], body: bytes) -> None:
        if self._awaits_probe(replica):  # still, and nobody else does it
            with contextlib.suppress(_Busy, _Failed, Unanswered):
                await self._try(replica, call, body)

    def _awaits_probe(self, replica: _Replica) -> bool:
        return replica.probe is None and replica.breaker.state(self._clock()) == "half-open"

    async def _try(self, replica: _Replica, call: Call[T], body: bytes) -> T:
        """An attempt as the replica's breaker allows it: at once, as its probe, after another's probe, or none."""
        while replica.probe is not None:
            await replica.probe.wait()
        state = replica.breaker.state(self._clock())
        if state == "open":
            raise _Failed(f"left alone after failures: {replica.reason}")
        probe = asyncio.Event() if state == "half-open" else None
        replica.probe = probe
        try:
            answer = await self._attempt(replica, call.path, body, call.read, self._pace.timeout)
            self._succeeded(replica)
            return answer
        except (_Busy, Unanswered):  # it is well
            self._succeeded(replica)
            raise
        except _Failed as error:
            replica.reason = str(error)
            replica.breaker.fail(self._clock())
            if state == "closed" and replica.breaker.state(self._clock()) == "open":
                note(f"rewards: {replica.url} is left alone for a while: {replica.reason}")
            raise
        finally:
            if probe is not None:
                replica.probe = None
                probe.set()

    def _succeeded(self, replica: _Replica) -> None:
        if replica.breaker.state(self._clock()) != "closed":
            note(f"rewards: {replica.url} answers again")
        replica.breaker.succeed()

    async def _attempt(
        self, replica: _Replica, path: str, body: bytes | None, read: Callable[[bytes], T], within: float
    ) -> T:
        """One request, read."""
        replica.outstanding += 1
        replica.asked += 1
        try:
            async with asyncio.timeout(within):
                status, headers, answer = await self._exchange(replica.url + path, body)
        except TimeoutError as error:
            raise _Silent(f"no answer within {within:g} s") from error
        except self._errors as error:
            raise _Silent(self._words(_cause(error))) from error
        finally:
            replica.outstanding -= 1
        if status == _BUSY:
            raise _Busy(_retry_after(headers))
        if status in _FINAL:
            raise Unanswered(f"{replica.url}: status {status}: {self._words(answer)}")
        if status != 200:
            raise _Failed(f"status {status}: {self._words(answer)}".removesuffix(": "))
        try:
            return read(answer)
        except ValueError as error:
            raise _Failed(f"its answer is none: {self._words(str(error))}") from error

    async def _exchange(self, url: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer."""
        headers = {"Accept-Encoding": "identity"} | ({} if body is None else {"Content-Type": "application/json"})
        method = "GET" if body is None else "POST"
        async with self._client.stream(method, url, content=body, headers=headers) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _Failed("its answer is encoded, which was not asked for")
            parts, size = [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > self._pace.most_bytes:
                    raise _Failed(f"its answer has more than {self._pace.most_bytes} bytes")
            return response.status_code, response.headers, b"".join(parts)

    def _words(self, said: str | bytes) -> str:
        """A server's own words in one short line without the token."""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        if self._token:
            text = text.replace(self._token, "[token]")
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET]}…"


def none_of(found: Mapping[str, object], message: str) -> ValueError:
    """That no surveyed server does; while one is silent, the next try may go better."""
    silent = any(isinstance(said, Silent) for said in found.values())
    return (Unreachable if silent else ValueError)(message)


def check_urls(urls: Sequence[str], field: str) -> None:
    """Raises ValueError, naming the field, for what is no address of a server."""
    if not urls:
        raise ValueError(f"{field}: found none, expected at least one, such as http://127.0.0.1:18085")
    if len(set(urls)) != len(urls):
        raise ValueError(f"{field}: names a server twice")
    for url in urls:
        if "@" in url:
            raise ValueError(f"{field}: an address holds a name or a password; the token's place is token_file")
        if not URLS.holds((url,)) or not (url.isascii() and url.isprintable()):
            raise ValueError(f"{field}: found {url!r}, expected an address such as http://127.0.0.1:18085")


def _cause(error: BaseException) -> str:
    """What went wrong, in the system's words where libraries wrap them in their own."""
    told, below = str(error) or type(error).__name__, error
    while below is not None:
        if isinstance(below, ConnectionError) and below.errno:
            told = os.strerror(below.errno)
        elif isinstance(below, OSError) and below.strerror:
            told = below.strerror
        below = below.exceptions[0] if isinstance(below, BaseExceptionGroup) else below.__cause__ or below.__context__
    return told


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, within reason; a date counts as a second."""
    text = headers.get("retry-after", "")
    return min(max(float(text), 0.1), 30.0) if text.isascii() and text.isdigit() and len(text) < 9 else 1.0


def _told(reasons: Counter[str]) -> str:
    """Servers and reasons, in a line."""
    each = "; ".join(reason if count == 1 else f"{reason} ({count} times)" for reason, count in reasons.items())
    return f"no server answered: {each}"
