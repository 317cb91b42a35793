"""Teachers' images as captioned latents: from the sets that `fopd_jax.demonstrate` makes, without an encoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.demonstrations import Demonstrations, is_set
from fopd_jax.worlds.foreseen import foresee
from fopd_jax.worlds.world import Encode, check_shares

CLEAN, VELOCITY = "data", "velocity"


def are_demonstrated(tasks: Mapping[str, Pairs]) -> bool:
    """Whether a config's tasks are sets of teachers' images.

    Raises:
      ValueError: some are and others are not; names one of each.
    """
    sets = {name: bool(pairs.images) and is_set(Path(pairs.images)) for name, pairs in tasks.items()}
    if any(sets.values()) and not all(sets.values()):
        other = next(name for name, found in sets.items() if not found)
        raise ValueError(
            f"tasks.{other}.images: found {tasks[other].images!r}, expected a set of demonstrations as the others"
        )
    return any(sets.values())


class DemonstratedLatents:
    """See `worlds.world.CaptionedLatents`. Row i of batch number `step` is a function of (seed, step, i) alone.

    With target 'velocity' a row is a state `x` at one of its trajectory's levels `sigma`, all alike, with the teacher's
    velocity `v` there; its caption is the prompt in any case, since the velocity is under it.

    Raises:
      ValueError: no task has a share, a set is none of the world's latents, has no trajectories where they are wanted,
        or is to be made worse; names the field.
    """

    def __init__(
        self,
        tasks: Mapping[str, Pairs],
        encode: Encode,
        latent_shape: tuple[int, int, int],
        *,
        batch_size: int,
        empty_caption: float,
        seed: int,
        target: str,
    ) -> None:
        check_shares(tasks)
        if target == VELOCITY and empty_caption:
            raise ValueError(
                f"empty_caption: found {empty_caption}, expected 0: a teacher's velocity is under its own prompt"
            )
        self._sets = {name: Demonstrations(Path(p.images), name, f"tasks.{name}.images") for name, p in tasks.items()}
        for name, pairs in tasks.items():
            _check(name, pairs, self._sets[name], latent_shape, target)
        self._encode, self._target, self._seed = encode, target, seed
        self._batch_size, self._empty = batch_size, empty_caption
        shares = np.asarray([pairs.share for pairs in tasks.values()])
        self._names, self._shares = list(tasks), shares / shares.sum()

    def batch(self, step: int, rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """`{"x0": [n, h, w, c] float32, "conditioning": …}`, or `x`, `v` and `sigma [n]` in place of `x0`."""
        drawn = [self._draw(step, int(row)) for row in rows]
        found = self._read([(name, number) for name, number, _, _ in drawn])
        prompts = ["" if empty else row["prompt"] for row, (_, _, _, empty) in zip(found, drawn, strict=True)]
        if self._target == CLEAN:
            arrays = {"x0": np.stack([row["latents"].astype(np.float32) for row in found])}
        else:
            places = [int(level * len(row["sigmas"])) for row, (_, _, level, _) in zip(found, drawn, strict=True)]
            pick: Callable[[str], np.ndarray] = lambda name: np.stack(  # noqa: E731
                [row[name][t].astype(np.float32) for row, t in zip(found, places, strict=True)]
            )
            arrays = {"x": pick("states"), "v": pick("velocities"), "sigma": pick("sigmas")}
        return arrays | {"conditioning": self._encode(prompts)}

    def of_others(self, base: str) -> Iterator[str]:
        """Of sets that another base's teachers drew, in words: their latents may be another autoencoder's."""
        for name, found in self._sets.items():
            drawn = found.claim["identity"].get("base", "")
            if drawn and base and drawn != base:
                yield f"tasks.{name}.images: {found.folder} was drawn by teachers of another base than model.path"

    def upto(self, steps: int) -> Iterator[str]:
        """The distinct prompts of the first `steps` batches, see `foresee`."""
        every = [prompt for name in self._names for prompt in self._sets[name].prompts]
        asked = ["", *every] if self._empty else every
        return foresee(self._prompts, steps, asked)

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task and prompt of some rows of a batch."""
        drawn = [self._draw(step, row) for row in rows]
        return [f"{name}: {self._sets[name].prompts[number]!r}" for name, number, _, _ in drawn]

    def _prompts(self, step: int) -> list[str]:
        drawn = [self._draw(step, row) for row in range(self._batch_size)]
        return ["" if empty else self._sets[name].prompts[number] for name, number, _, empty in drawn]

    def _draw(self, step: int, row: int) -> tuple[str, int, float, bool]:
        """Task, row of its set, where among the levels in [0, 1), and whether the caption is empty."""
        rng = np.random.default_rng((self._seed, step, row))
        name = self._names[int(rng.choice(len(self._names), p=self._shares))]
        return name, int(rng.integers(len(self._sets[name]))), float(rng.random()), bool(rng.random() < self._empty)

    def _read(self, places: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Rows of several sets, each set asked once."""
        found: dict[int, dict[str, Any]] = {}
        for name in self._names:
            mine = [k for k, (task, _) in enumerate(places) if task == name]
            found |= dict(zip(mine, self._sets[name].rows([places[k][1] for k in mine]), strict=True)) if mine else {}
        return [found[k] for k in range(len(places))]


def _check(name: str, pairs: Pairs, found: Demonstrations, latents: tuple[int, int, int], target: str) -> None:
    for field in ("wrong_caption", "degraded"):
        if value := getattr(pairs, field):
            raise ValueError(f"tasks.{name}.{field}: found {value}, expected 0: demonstrations stay as they are")
    if found.layout.latents != latents:
        raise ValueError(
            f"tasks.{name}.images: {found.folder} holds latents of shape {found.layout.latents}, expected {latents}"
        )
    if target == VELOCITY and not found.layout.levels:
        raise ValueError(
            f"target: found 'velocity', but {found.folder} holds no trajectories: fopd_jax.demonstrate --trajectories"
        )
