"""Rewards that are scored by servers of `fopd_jax.rewards.serve`, or by any that say what `wire.py` says.

Kind `remote` is whatever a server has under the name, and so is `hpsv3`, a regression on a network of 7B; any other
kind whose name has a server is that kind, scored there, and refused where the server has another kind or other options.
A batch goes out in parts, side by side, over all replicas. What no server answered are failures with the servers' names
and reasons, never exceptions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.console import note
from fopd_jax.exits import need
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.registry import FILE_OPTIONS
from fopd_jax.rewards.reward import Metadata, Reward, Scores, all_failed
from fopd_jax.rewards.served import wire
from fopd_jax.rewards.served.bearer import VARIABLE, find_token
from fopd_jax.rewards.served.transport import Call, Pace, Transport, Unanswered, check_urls, none_of

SURVEY_S = 5.0
"""In which servers must show that they are there."""
IN_FLIGHT = 4
"""Requests at a time, a replica: the server batches across them."""
_SERVERS_OWN = ("remote", "hpsv3")
"""Kinds of which nothing is known here but what the server says."""
_IMAGES, _BYTES, _PROMPTS = 16, 32 * 2**20, 256
"""Of one request: images, their bytes as pixels, prompts to check."""


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """`reward`: its name at the server; empty: the same."""

    reward: str = ""


@dataclasses.dataclass(frozen=True)
class _Offer:
    """What a server says of a reward."""

    kind: str
    options: Mapping[str, Any]
    limits: tuple[float | None, float | None]


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """A reward at servers, at least one of which is there and serves it.

    Raises:
      ValueError: there is no address, no token, or no server that serves it (`Unreachable` where one is silent); names
        fields, servers and reasons.
    """
    field = f"run.servers.{name}"
    own = (settings.kind or name) in _SERVERS_OWN
    if own and settings.weights:
        raise ValueError(f"rewards.{name}.weights: found {settings.weights!r}, expected '': the server has its own")
    asked = read_options(RemoteOptions, settings.options if own else {}, f"rewards.{name}.options").reward or name
    need(field, "remote", "httpx")
    if server is None:
        raise ValueError(f"{field}.urls: found none, expected the servers of this reward")
    check_urls(server.urls, f"{field}.urls")
    if (token := find_token(server.token_file, f"{field}.token_file")) is None:
        raise ValueError(f"{field}.token_file: found none, expected the servers' token there, or in ${VARIABLE}")
    transport = Transport(server.urls, token, Pace(server.timeout, server.retries, IN_FLIGHT))
    try:
        offer = _find_offer(name, asked, transport, field)
        if not own:
            _check_same(name, settings, offer)
    except BaseException:
        transport.close()
        raise
    client = Client(asked, transport)
    return Reward(name, client.score, offer.limits, "remote", client.check, transport.close)


class Client:
    """One reward at the servers behind a transport."""

    def __init__(self, reward: str, transport: Transport) -> None:
        self._reward, self._transport = reward, transport

    def score(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Scores:
        """As `reward.Score`."""
        if not len(images):
            return all_failed(0, "")
        size = max(1, min(_IMAGES, _BYTES // max(1, images[0].nbytes)))
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        calls = [self._call(images[part], prompts[part], metadata[part]) for part in parts]
        counts = [len(images[part]) for part in parts]
        return _joined(
            [
                all_failed(count, str(answer)) if isinstance(answer, Unanswered) else answer
                for count, answer in zip(counts, self._transport.ask(calls), strict=True)
            ]
        )

    def _call(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Call[Scores]:
        return Call(
            "/score",
            lambda: wire.encode_request(self._reward, images, prompts, metadata),
            lambda body: wire.decode_answer(body, len(images)),
        )

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """As `reward.Check`: the server's word. Raises ValueError, too, where no server can be asked."""
        parts = [slice(start, start + _PROMPTS) for start in range(0, len(prompts), _PROMPTS)]

        def call(part: slice) -> Call[str]:
            body = lambda: wire.encode_request(self._reward, None, prompts[part], metadata[part])  # noqa: E731
            return Call("/check", body, wire.decode_problem)

        for answer in self._transport.ask([call(part) for part in parts]):
            if answer:
                raise ValueError(str(answer))


def _find_offer(name: str, asked: str, transport: Transport, field: str) -> _Offer:
    """What the first server says that serves the reward; the others are told of."""
    found = transport.survey("/rewards", lambda body: _read_offer(body, asked), SURVEY_S)
    offers = [offer for offer in found.values() if isinstance(offer, _Offer)]
    problems = "; ".join(f"{url}: {said}" for url, said in found.items() if isinstance(said, Unanswered))
    if not offers:
        raise none_of(found, f"{field}.urls: no server serves {asked!r}: {problems}")
    if problems:
        note(f"reward {name}: goes on without {problems}")
    if any(offer != offers[0] for offer in offers):
        raise ValueError(f"{field}.urls: its servers serve different rewards as {asked!r}: start all of them alike")
    return offers[0]


def _read_offer(body: bytes, asked: str) -> _Offer:
    """Raises ValueError where the reward is not served, or the answer is no list of rewards."""
    listed = wire.parse_json(body)
    served = listed.get("rewards") if isinstance(listed, dict) else None
    if not isinstance(served, dict):
        raise ValueError("found no list of rewards: this is no server of fopd_jax.rewards.serve")
    if not isinstance(offer := served.get(asked), dict):
        raise ValueError(f"serves {', '.join(served) or 'nothing'}, not {asked!r}")
    kind, options, limits = offer.get("kind"), offer.get("options"), offer.get("limits")
    if not isinstance(kind, str) or not isinstance(options, dict) or not isinstance(limits, list) or len(limits) != 2:
        raise ValueError(f"rewards.{asked}: expected kind, options and two limits")
    low, high = (None if each is None else wire.read_number("limits", each) for each in limits)
    return _Offer(kind, options, (low, high))


def _check_same(name: str, settings: RewardConfig, offer: _Offer) -> None:
    """The server was started with the same config, so far as it says what a value is; where its files lie does not."""
    kind = settings.kind or name
    options = [
        {option: value for option, value in each.items() if option != FILE_OPTIONS.get(kind)}
        for each in (wire.as_json(settings.options), offer.options)
    ]
    for what, ours, theirs in (("kind", kind, offer.kind), ("options", *options)):
        if ours != theirs:
            raise ValueError(f"rewards.{name}.{what}: found {ours!r}, but the server serves {theirs!r}: restart either")


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.failed for part in parts]),
        tuple(each for part in parts for each in part.details),
    )
