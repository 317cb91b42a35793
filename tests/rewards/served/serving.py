"""A server of toy rewards on a free port of this machine, in a thread or as a process of its own."""

import contextlib
import functools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect
from fopd_jax.rewards.served import wire
from fopd_jax.rewards.served.listening import bind, make_server
from fopd_jax.rewards.served.service import Served, Service

LIMITS = wire.Limits(body_bytes=2**20)
TOKEN = "a-token-of-these-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


class Toy:
    """Mean brightness in [0, 1]. Prompts ask for what else it can do: "fail", "raise", "exit", "nan", "never"."""

    def __init__(self, name: str = "toy") -> None:
        self.images, self.batches, self.closed = 0, [], False
        self.reward = Reward(name, self.score, (0.0, 1.0), "host", self.check, self.close)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        self.images += len(images)
        self.batches.append(len(images))
        if "raise" in prompts:
            raise ZeroDivisionError("of the toy")
        if "list" in prompts:
            return [0.5] * len(images)  # type: ignore[return-value]
        if "exit" in prompts:
            raise SystemExit(3)
        bad = {"fail": ValueError("too dark"), "nan": (float("nan"), {}), "strange": (0.5, {"array": np.ones(2)})}
        good = [(float(image.mean()) / 255, {"prompt": prompt}) for image, prompt in zip(images, prompts, strict=True)]
        return collect([bad.get(prompt, result) for prompt, result in zip(prompts, good, strict=True)])  # type: ignore[misc]

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        if "never" in prompts:
            raise ValueError("prompt 'never' can never be scored")

    def close(self) -> None:
        self.closed = True


def served(toy: Toy, kind: str = "toy", options: Mapping[str, Any] | None = None) -> Served:
    return Served(toy.reward, kind, options or {})


@contextlib.contextmanager
def serving(*toys: Toy, port: int = 0, service: Service | None = None, **how: Any) -> Iterator[str]:
    """The server's address; when the block ends, it has ended, too."""
    ready = threading.Event()
    service = service or Service({toy.reward.name: served(toy, **how) for toy in toys}, TOKEN, LIMITS)
    server, sock = make_server(service.app(), ready.set), bind("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def images(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def good_body(count: int = 1, prompt: str = "a cat", reward: str = "toy", size: int = 8) -> bytes:
    return wire.encode_request(reward, images(count, size), [prompt] * count, [{}] * count)


def post(url: str, body: bytes, path: str = "/score", **headers: str) -> httpx.Response:
    return _client().post(f"{url}{path}", content=body, headers=HEADERS | headers)


def get(url: str, path: str, headers: Mapping[str, str] = HEADERS) -> httpx.Response:
    return _client().get(f"{url}{path}", headers=headers)


@functools.cache
def _client() -> httpx.Client:
    return httpx.Client(trust_env=False, timeout=30, verify=False)  # making one takes longer than a request


def until(holds: Callable[[], bool]) -> None:
    """Wait for what comes soon."""
    late = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < late
        time.sleep(0.01)


def raw(url: str, sent: bytes) -> int:
    """The status that bytes are answered with, whatever they are; 0: the connection was closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        answer = b""
        while b"\r\n" not in answer and (part := connection.recv(4096)):
            answer += part
    return int(answer.split()[1]) if answer else 0


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":  # python -m tests.rewards.served.serving PORT
    from fopd_jax.config.schema import RewardConfig
    from fopd_jax.rewards.serve import serve

    serve({"toy": RewardConfig()}, {"toy": Toy().reward}, TOKEN, bind("127.0.0.1", int(sys.argv[1])))
