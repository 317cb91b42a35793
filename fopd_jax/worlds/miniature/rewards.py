"""The miniature's readers as rewards: of the text that an image shows, the objects it holds, and how clean it looks."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from fopd_jax.rewards.ocr import ocr_reward, quoted_target
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect
from fopd_jax.worlds.miniature.scores import find_objects, quality_score, read_text, scene_of, share_right

Pixels = UInt8[np.ndarray, "n 24 24 3"]
Result = tuple[float, Metadata]
T = TypeVar("T")


def make_rewards() -> dict[str, Reward]:
    """`text`, `composition`, `composition_strict` and `quality`, in [0, 1]; they fail on other tasks' prompts alone."""
    return {
        "text": Reward("text", _text, (0.0, 1.0), "host", check=_check_text),
        "composition": Reward("composition", _composition, (0.0, 1.0), "host", check=_check_scenes),
        "composition_strict": Reward("composition_strict", _strict, (0.0, 1.0), "host", check=_check_scenes),
        "quality": Reward("quality", _quality, (0.0, 1.0), "host"),
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
