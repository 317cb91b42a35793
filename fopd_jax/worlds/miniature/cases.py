"""Pairs of the miniature's pictures whose order its rewards must know."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from fopd_jax.rewards.cases import Case
from fopd_jax.worlds.miniature.render import SIZE, degrade, render


def cases_of(reward: str) -> list[Case]:
    """The cases of one of the world's own rewards."""
    return _FAMILIES[reward]()


def pictures_of(prompts: Sequence[str]) -> list[Case]:
    """Pictures of two or more prompts, each beside the next one's, for rewards of which nothing more is known."""
    nexts = [*prompts[1:], prompts[0]]
    return [Case("", _drawn(prompt), _drawn(other), prompt) for prompt, other in zip(prompts, nexts, strict=True)]


def _drawn(prompt: str) -> UInt8[np.ndarray, "24 24 3"]:
    return _bytes(render(prompt, np.random.default_rng(0)))


def _bytes(image: np.ndarray) -> UInt8[np.ndarray, "24 24 3"]:
    return np.clip(image * 127.5 + 128, 0, 255).astype(np.uint8)


def _texts() -> list[Case]:
    right, close, blank = 'sign "K7B"', 'sign "K7C"', np.zeros((SIZE, SIZE, 3), np.uint8)
    return [
        Case("the right text > one wrong glyph", _drawn(right), _drawn(close), right),
        Case("one wrong glyph > no text", _drawn(close), blank, right),
    ]


def _scenes() -> list[Case]:
    prompt = "two red squares and one red circle"
    return [
        Case("all objects > one missing", _drawn(prompt), _drawn("one red square and one red circle"), prompt),
        Case("all objects > other colours", _drawn(prompt), _drawn("two blue squares and one red circle"), prompt),
    ]


def _flaws() -> list[Case]:
    prompt = "three blue circles"
    clean = render(prompt, np.random.default_rng(0))
    return [Case("clean > degraded", _bytes(clean), _bytes(degrade(clean, np.random.default_rng(1))), prompt)]


_FAMILIES: Mapping[str, Callable[[], list[Case]]] = {
    "text": _texts, "composition": _scenes, "composition_strict": _scenes, "quality": _flaws,
}  # fmt: skip
