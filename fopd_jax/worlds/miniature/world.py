"""The miniature as a `World`: 24x24 RGB pixels as latents, one-hot tokens as text encoder, no decoder."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.miniature import prompts as language
from fopd_jax.worlds.miniature.pairs import Renderings
from fopd_jax.worlds.miniature.scores import composition_score, quality_score, text_score
from fopd_jax.worlds.world import World

SIDE = 24


def encode(prompts: Sequence[str]) -> Conditioning:
    """Context: one-hot word and one-hot position per token `[n, 8, 24 + 8]`; pooled: word counts `[n, 24]`.

    The network's own context embedding turns these into a learned word and position embedding.
    """
    tokens = language.tokenize(prompts)
    words = np.eye(len(language.VOCABULARY), dtype=np.float32)[tokens]
    positions = np.broadcast_to(
        np.eye(language.MAX_TOKENS, dtype=np.float32), (len(prompts), *(language.MAX_TOKENS,) * 2)
    )
    counts = words.sum(1)
    counts[:, 0] = 0  # padding
    return Conditioning(np.concatenate([words, positions], axis=-1), counts)


def _score_sign(images: Float[np.ndarray, "n h w 3"], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"text": text_score(images, prompts), "quality": quality_score(images)}


def _score_scene(images: Float[np.ndarray, "n h w 3"], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    strict, continuous = composition_score(images, prompts)
    return {"composition": continuous, "composition_strict": strict, "quality": quality_score(images)}


def check(prompts: Iterable[str]) -> None:
    """Refuse, before anything is drawn, what is no prompt of this world.

    Raises:
      ValueError: as `tokenize`.
    """
    language.tokenize(sorted(set(prompts)))


def make_world() -> World:
    """Text and composition; both also measure quality, which every image has."""
    scores = {"text": _score_sign, "composition": _score_scene}
    tasks = {
        name: Task(name, language.prompts(name, "train"), language.prompts(name, "test"), score)
        for name, score in scores.items()
    }
    pairs = partial(Renderings, tasks, encode)
    return World((SIDE, SIDE, 3), tasks, encode, lambda latents: latents, check, pairs=pairs)
