"""Rewards of one's own: any function `(images, prompts, metadata) → values`, named by its import path.

    def brightness(images, prompts, metadata):  # uint8 [n, h, w, 3], RGB
        return images.mean((1, 2, 3)) / 255

    --config.tasks.text.rewards.bright=1 --config.rewards.bright.kind=my_rewards:brightness

It returns `Scores`, or one number an image, NaN for one that it cannot score. The module must be importable where the
program runs: the working directory is.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.exits import spell_error
from fopd_jax.rewards.reward import Metadata, Reward, Scores, all_failed, collect


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """The function `settings.kind` as a reward without limits, on the host.

    Raises:
      ValueError: it cannot be imported, or is none; or there are options or weights, which a function does not take.
    """
    field, path = f"rewards.{name}", settings.kind
    for option in settings.options:
        raise ValueError(
            f"{field}.options.{option}: found an option, expected none: {path} is called with images alone"
        )
    if settings.weights:
        raise ValueError(f"{field}.weights: found {settings.weights!r}, expected '': {path} reads its own")
    function = import_function(f"{field}.kind", path)

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        try:
            found = function(images, prompts, metadata)
        except Exception as error:  # whatever a user's own code may raise is a failure of these images
            return all_failed(len(images), f"{path}: {spell_error(error)}")
        scores = found if isinstance(found, Scores) else _as_scores(f"{field}.kind: {path}", found)
        if len(scores) != len(images):
            raise ValueError(f"{field}.kind: {path} returned {len(scores)} values for {len(images)} images")
        return scores

    return Reward(name, score, (None, None), "host")


def import_function(field: str, path: str) -> Callable[..., Any]:
    """What `package.module:function` names; ValueError, naming the field, where that is none."""
    module, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # at import, too, anything may go wrong
        raise ValueError(f"{field}: cannot import {path} ({spell_error(error)})") from error
    if not callable(function):
        raise ValueError(f"{field}: {path} is of type {type(function).__name__}, expected a function")
    return function


def _as_scores(place: str, found: Any) -> Scores:
    try:
        values = np.asarray(found, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} returned {type(found).__name__}, expected Scores or one number an image") from error
    if values.ndim != 1:
        raise ValueError(f"{place} returned an array of shape {values.shape}, expected one number an image")
    return collect([(float(value), {}) for value in values])
