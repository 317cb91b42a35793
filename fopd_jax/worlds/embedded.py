"""The worlds that come with the program, by the preset whose world they are."""

from collections.abc import Callable

from fopd_jax.worlds.miniature.world import make_world
from fopd_jax.worlds.world import World

EMBEDDED: dict[str, Callable[[], World]] = {"miniature": make_world, "miniature_large": make_world}
