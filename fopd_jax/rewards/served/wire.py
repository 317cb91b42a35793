"""What rewards and their servers say to each other: JSON, images in it as PNG in base64. Nothing is ever unpickled.

    request   {"reward": NAME, "images": [PNG, …], "prompts": […], "metadata": [{…}, …]}
    answer    {"results": [{"value": NUMBER, "details": {…}} or {"error": "…"}, …]}

A question about prompts alone (`/check`) is a request without images. Numbers are finite on the wire: NaN, infinities
and numbers too large for a float are refused, as is every other thing that is not written here.
"""

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from jaxtyping import UInt8

from fopd_jax.exits import shorten
from fopd_jax.rewards.reward import Metadata, Scores
from fopd_jax.rewards.served.png import decode_png, encode_png, png_size

MOST_DEPTH = 32
"""Of JSON inside JSON."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request: images (or prompts without images), bytes in all and an image, pixels in all and an image."""

    items: int = 256
    body_bytes: int = 64 * 2**20
    image_bytes: int = 16 * 2**20
    image_pixels: int = 2048**2
    pixels: int = 16 * 2048**2
    prompt_characters: int = 20_000


@dataclasses.dataclass(frozen=True)
class Request:
    """Images to score, or none: prompts to check."""

    reward: str
    images: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    prompts: tuple[str, ...]
    metadata: tuple[Metadata, ...]


# ---- requests


def encode_request(
    reward: str,
    images: UInt8[np.ndarray, "n h w 3"] | None,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> bytes:
    """A request's body; without images a question about prompts.

    Raises:
      ValueError: metadata are no JSON.
    """
    body: dict[str, Any] = {"reward": reward, "prompts": list(prompts), "metadata": [dict(each) for each in metadata]}
    if images is not None:
        body["images"] = [base64.b64encode(encode_png(image)).decode() for image in images]
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata: found what JSON cannot hold: {error}") from error


def decode_request(body: bytes, limits: Limits, *, images: bool = True) -> Request:
    """A request as it was meant, or none of it; `images`: whether it must have some, or must not.

    Raises:
      ValueError: anything in it is wrong; names the field, what was found and what would be right.
    """
    known = ("reward", "prompts", "metadata", *(("images",) if images else ()))
    if len(body) > limits.body_bytes:
        raise ValueError(f"request: found {len(body)} bytes, expected at most {limits.body_bytes}")
    message = _object("request", parse_json(body), known)
    reward = _typed("reward", message["reward"], str)
    prompts = _list("prompts", message["prompts"], str, limits.items)
    if long := [i for i, prompt in enumerate(prompts) if len(prompt) > limits.prompt_characters]:
        raise ValueError(f"prompts[{long[0]}]: expected at most {limits.prompt_characters} characters")
    metadata = _list("metadata", message["metadata"], dict, limits.items)
    encoded = _list("images", message["images"], str, limits.items) if images else ()
    counts = {"prompts": len(prompts), "metadata": len(metadata), **({"images": len(encoded)} if images else {})}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"request: found {found}, expected as many of each")
    return Request(reward, _decode_images(encoded, limits), prompts, metadata)


def _decode_images(encoded: Sequence[str], limits: Limits) -> tuple[np.ndarray, ...]:
    """All of them, once it is known that their pixels have room."""
    files, pixels = [], 0
    for i, text in enumerate(encoded):
        try:
            if len(text) > limits.image_bytes * 4 / 3 + 4:
                raise ValueError(f"expected at most {limits.image_bytes} bytes")
            files.append(base64.b64decode(text, validate=True))
            pixels += math.prod(png_size(files[-1], limits.image_pixels))
        except binascii.Error as error:
            raise ValueError(f"images[{i}]: found no base64: {error}") from error
        except ValueError as error:
            raise ValueError(f"images[{i}]: {error}") from error
    if pixels > limits.pixels:
        raise ValueError(f"images: found {pixels} pixels in all, expected at most {limits.pixels}")
    images = []
    for i, file in enumerate(files):
        try:
            images.append(decode_png(file, limits.image_pixels))
        except ValueError as error:
            raise ValueError(f"images[{i}]: {error}") from error
    return tuple(images)


# ---- answers


def encode_result(value: float, failed: bool, details: Metadata) -> str:
    """One image's part of an answer; what JSON cannot hold is a failure, too."""
    if failed:
        return _encode_failure(str(details.get("error")))
    try:
        return json.dumps({"value": float(value), "details": dict(details)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return _encode_failure(f"value or details are not what JSON can hold: {error}")


def _encode_failure(reason: str) -> str:
    return json.dumps({"error": shorten(reason)})


def encode_results(scores: Scores) -> list[str]:
    """The parts of an answer, one an image."""
    each = zip(scores.values, scores.failed, scores.details, strict=True)
    return [encode_result(float(value), bool(failed), details) for value, failed, details in each]


def encode_answer(results: Sequence[str]) -> bytes:
    """An answer's body, of its parts."""
    return f'{{"results": [{", ".join(results)}]}}'.encode()


def decode_answer(body: bytes, count: int) -> Scores:
    """The scores of so many images.

    Raises:
      ValueError: it is no answer about so many; names what is wrong.
    """
    results = _object("answer", parse_json(body), ("results",))["results"]
    results = _list("results", results, dict, count)
    if len(results) != count:
        raise ValueError(f"results: found {len(results)}, expected {count}")
    values, details = np.full(count, np.nan), []
    for i, result in enumerate(results):
        if set(result) == {"error"}:
            reason = _typed(f"results[{i}].error", result["error"], str)
            details.append({"error": reason or "a failure without a reason"})
            continue
        _object(f"results[{i}]", result, ("value", "details"))
        values[i] = read_number(f"results[{i}].value", result["value"])
        details.append(_typed(f"results[{i}].details", result["details"], dict))
    return Scores(values, np.isnan(values), tuple(details))


def encode_problem(problem: str) -> bytes:
    """An answer about prompts: why they cannot be scored, or nothing."""
    return json.dumps({"problem": problem}).encode()


def decode_problem(body: bytes) -> str:
    """What it says.

    Raises:
      ValueError: it is no such answer.
    """
    return _typed("problem", _object("answer", parse_json(body), ("problem",))["problem"], str)


def read_number(field: str, value: Any) -> float:
    """A finite number.

    Raises:
      ValueError: it is none; names the field.
    """
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise ValueError(f"{field}: found {shown(value)}, expected a number")


# ---- strict JSON


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they look on the other side: tuples as lists, what JSON cannot hold as text."""
    return json.loads(json.dumps(dict(options), default=str))


def parse_json(body: bytes) -> Any:
    """JSON in UTF-8 as its standard has it: no NaN, no name twice, no lone surrogates, not deeper than `MOST_DEPTH`.

    Raises:
      ValueError: it is none of that kind.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"found no UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"found no JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(f"found JSON that is too deep, expected at most {MOST_DEPTH} levels") from error
    _check_depth(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}, expected a finite number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"found {text[:40]}, expected a number that is finite as a float")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("found a name twice in one object")
    return made


def _check_depth(value: Any, depth: int = 1) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("found a text with half a character (a lone surrogate)") from error
    if isinstance(value, dict | list):
        if depth > MOST_DEPTH:
            raise ValueError(f"found JSON that is too deep, expected at most {MOST_DEPTH} levels")
        for each in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _check_depth(each, depth + 1)


# ---- types of what was parsed


def _object(field: str, value: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """An object of just these names."""
    if missing := set(names) - set(_typed(field, value, dict)):
        raise ValueError(f"{field}: misses {', '.join(sorted(missing))}")
    if unknown := set(value) - set(names):
        raise ValueError(f"{field}: found {shown(min(unknown))}, expected only {', '.join(names)}")
    return value


def _list(field: str, value: Any, kind: type, most: int) -> tuple[Any, ...]:
    """A list of one to `most` entries of one kind."""
    if not 1 <= len(_typed(field, value, list)) <= most:
        raise ValueError(f"{field}: found {len(value)} entries, expected from 1 to {most}")
    return tuple(_typed(f"{field}[{i}]", each, kind) for i, each in enumerate(value))


def _typed(field: str, value: Any, kind: type) -> Any:
    words = {str: "a text", dict: "an object", list: "a list"}
    if type(value) is not kind:
        raise ValueError(f"{field}: found {shown(value)}, expected {words[kind]}")
    return value


def shown(value: Any) -> str:
    """A value for a message: the beginning of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
