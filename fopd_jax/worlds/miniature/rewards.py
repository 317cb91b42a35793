"""The miniature's readers as rewards: of the text that an image shows, the objects it holds, and how clean it looks."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from fopd_jax.rewards.ocr import normalise, ocr_reward, quoted_target
from fopd_jax.rewards.reward import Metadata, Reward, Scores, Traced, Tree, collect
from fopd_jax.worlds.miniature import traced
from fopd_jax.worlds.miniature.prompts import COLOURS, GLYPHS, MAX_TOKENS, SHAPES
from fopd_jax.worlds.miniature.scores import find_objects, quality_score, read_text, scene_of, share_right

Pixels = UInt8[np.ndarray, "n 24 24 3"]
Result = tuple[float, Metadata]
T = TypeVar("T")


def make_rewards() -> dict[str, Reward]:
    """`text`, `composition`, `composition_strict` and `quality`, in [0, 1]; they fail on other tasks' prompts alone."""
    limits = (0.0, 1.0)
    scenes = {
        name: Traced(prepare_scenes, functools.partial(_score_scenes, strict))
        for name, strict in (("composition", False), ("composition_strict", True))
    }
    return {
        "text": Reward("text", _text, limits, "host", check=_check_text, traced=Traced(prepare_targets, _score_text)),
        **{
            name: Reward(name, score, limits, "host", check=_check_scenes, traced=scenes[name])
            for name, score in (("composition", _composition), ("composition_strict", _strict))
        },
        "quality": Reward("quality", _quality, limits, "host", traced=Traced(lambda *_: {}, _score_quality)),
    }


def _unit(images: Pixels) -> Float[np.ndarray, "n 24 24 3"]:
    """Bytes as images in [-1, 1]."""
    return (images.astype(np.float32) - 127.5) / 127.5


def _text(images: Pixels, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """What is read, against the quoted text."""
    return _each(read_text(_unit(images)), prompts, lambda text, prompt: (ocr_reward(text, prompt), {"read": text}))


def _composition(images: Pixels, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """The share of objects that are right."""

    def compare(objects: Counter[tuple[str, str]], prompt: str) -> Result:
        return share_right(objects, scene_of(prompt)), {"found": _named(objects)}

    return _each(_objects(images.tobytes()), prompts, compare)


def _strict(images: Pixels, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """Whether all of them are."""
    scores = _composition(images, prompts, metadata)
    return Scores(np.where(scores.failed, np.nan, scores.values == 1.0), scores.failed, scores.details)


def _quality(images: Pixels, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    return collect([(float(value), {}) for value in quality_score(_unit(images))])


def _each(found: Sequence[T], prompts: Sequence[str], compare: Callable[[T, str], Result]) -> Scores:
    """Of each image what is found in it against its prompt; a prompt that cannot be scored fails alone."""
    results: list[Result | Exception] = []
    for each, prompt in zip(found, prompts, strict=True):
        try:
            results.append(compare(each, prompt))
        except ValueError as error:
            results.append(error)
    return collect(results)


@functools.lru_cache(maxsize=1)
def _objects(data: bytes) -> tuple[Counter[tuple[str, str]], ...]:
    """The objects of the last images that were asked about: two rewards look for them one after the other."""
    return tuple(find_objects(_unit(np.frombuffer(data, np.uint8).reshape(-1, 24, 24, 3))))


def _named(objects: Counter[tuple[str, str]]) -> dict[str, int]:
    return {" ".join(kind): count for kind, count in sorted(objects.items())}


def _check_text(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    for prompt in prompts:
        quoted_target(prompt)


def _check_scenes(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    for prompt in prompts:
        scene_of(prompt)


# ---- within a program


Rows = dict[str, Int32[np.ndarray, "n ..."]]
_PLACES = {glyph.lower(): place for place, glyph in enumerate(GLYPHS)}


def prepare_targets(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Rows:
    """The quoted texts as places in `GLYPHS` `[n, 8]`, and how long they are.

    A length of 0, which is no score, has what quotes nothing, or more than a prompt of this world can.
    """
    rows: Rows = {
        "target": np.full((len(prompts), MAX_TOKENS), -2, np.int32),
        "length": np.zeros(len(prompts), np.int32),
    }
    for i, prompt in enumerate(prompts):
        try:
            target = normalise(quoted_target(prompt))
        except ValueError:
            continue
        if len(target) <= MAX_TOKENS:
            rows["target"][i, : len(target)] = [_PLACES.get(each, -2) for each in target]
            rows["length"][i] = len(target)
    return rows


def prepare_scenes(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Rows:
    """Kind and number of each phrase's objects `[n, 2]`; numbers of 0, which are no score, of what is no scene."""
    rows: Rows = {name: np.zeros((len(prompts), 2), np.int32) for name in ("kinds", "counts")}
    for i, prompt in enumerate(prompts):
        try:
            phrases = scene_of(prompt).phrases
        except ValueError:
            continue
        for j, phrase in enumerate(phrases):
            rows["kinds"][i, j] = COLOURS.index(phrase.colour) * len(SHAPES) + SHAPES.index(phrase.shape)
            rows["counts"][i, j] = phrase.count
    return rows


def _score_text(params: Tree, images: UInt8[Array, "b 24 24 3"], rows: Tree) -> Float[Array, " b"]:
    return jax.vmap(lambda image, target, length: traced.rate_text(traced.read_text(image), target, length))(
        images, rows["target"], rows["length"]
    )


def _score_scenes(strict: bool, params: Tree, images: UInt8[Array, "b 24 24 3"], rows: Tree) -> Float[Array, " b"]:
    def score(image: Array, kinds: Array, counts: Array) -> Array:
        share, right = traced.share_right(traced.find_objects(image), kinds, counts)
        return jnp.where(jnp.isnan(share), jnp.nan, right.astype(jnp.float32)) if strict else share

    return jax.vmap(score)(images, rows["kinds"], rows["counts"])


def _score_quality(params: Tree, images: UInt8[Array, "b 24 24 3"], rows: Tree) -> Float[Array, " b"]:
    return jax.vmap(traced.quality)(images)
