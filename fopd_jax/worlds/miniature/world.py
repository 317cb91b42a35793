"""The miniature as a `World`: 24x24 RGB pixels as latents, one-hot tokens as text encoder, no decoder."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.decoder import pixels_as_latents
from fopd_jax.worlds.miniature import prompts as language
from fopd_jax.worlds.miniature.pairs import Renderings
from fopd_jax.worlds.miniature.rewards import make_rewards
from fopd_jax.worlds.world import World

SIDE = 24
MEASURED = {"text": ("text", "quality"), "composition": ("composition", "composition_strict", "quality")}


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


def check(prompts: Iterable[str]) -> None:
    """Refuse, before anything is drawn, what is no prompt of this world.

    Raises:
      ValueError: as `tokenize`.
    """
    language.tokenize(sorted(set(prompts)))


def make_world() -> World:
    """Text and composition; both also measure quality, which every image has."""
    tasks = {
        name: Task(name, language.prompts(name, "train"), language.prompts(name, "test"), measured)
        for name, measured in MEASURED.items()
    }
    pairs = partial(Renderings, tasks, encode)
    return World(
        (SIDE, SIDE, 3), tasks, encode, lambda latents: latents, check, pairs=pairs, rewards=make_rewards(),
        decoder=pixels_as_latents(), paraphrase=language.paraphrase,
    )  # fmt: skip
