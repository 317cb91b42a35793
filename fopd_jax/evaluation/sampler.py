"""Images from any policy, each a function of its prompt, its key and the sampler's settings alone."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.flow.schedule import make_levels
from fopd_jax.flow.solver import Solver, solve, trace
from fopd_jax.flow.transition import standard_normal
from fopd_jax.parallel.agreement import together
from fopd_jax.parallel.distributed import gather_rows, held_rows, put_replicated, rows_of
from fopd_jax.parallel.sharding import activation_rules, batch_sharding, batch_ways, filled
from fopd_jax.policy.velocity import Tree, Velocity, guided_velocity
from fopd_jax.worlds.world import World, embed_alone, embed_prompts

Request = tuple[str, int]  # prompt, seed


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One jitted program for all policies: `draw(variables, adapter, conditioning, null, keys [B]) → latents`.

    `guided`: whether it leads away from the prompt `negative`, `null` being None otherwise. `mesh`: batches are split
    over it, so that each process encodes and decodes the rows of its own devices alone.
    """

    draw: Callable[..., Any]
    guided: bool
    mesh: Mesh
    negative: str = ""

    def __call__(
        self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array
    ) -> Float[np.ndarray, "b height width 3"]:
        """Images in [-1, 1] on every process, each from its prompt and key alone."""
        images = self.held(world, variables, adapter, prompts, keys)
        return gather_rows(images, batch_sharding(self.mesh), len(prompts))

    def held(
        self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array
    ) -> Float[np.ndarray, "n height width 3"]:
        """Of the same images those that this process's devices make, in the order of `rows`."""
        return world.decode(held_rows(self.latents(world, variables, adapter, prompts, keys)))

    def latents(self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array) -> Any:
        """Their latents, what `draw` returns: split over the mesh."""
        conditioning = together("prompts of an evaluation", lambda: embed_prompts(world, prompts, self.mesh))
        null = embed_alone(world, self.negative, self.mesh) if self.guided else None
        keys = put_replicated(keys, batch_sharding(self.mesh))
        return self.draw(variables, adapter, conditioning, null, keys)

    def rows(self, batch_size: int) -> Int[np.ndarray, " n"]:
        """The rows of a batch that this process makes."""
        return rows_of(batch_sharding(self.mesh), batch_size)


def make_sampler(
    velocity: Velocity,
    solver: Solver,
    sigmas: np.ndarray,
    guidance: float,
    latent_shape: tuple[int, ...],
    mesh: Mesh,
    *,
    traced: bool = False,
) -> Sampler:
    """A sampler of one schedule, solver and guidance scale; a scale of 1 does without the negative prompt.

    `traced`: `draw` returns, beside the latents, what `flow.solver.trace` does, its axes `[B, T, …]`.
    """

    def sample(variables: Tree, adapter: Tree, conditioning: Conditioning, null: Conditioning | None, keys: Array):
        def policy(x: Array, sigma: Array) -> Array:
            return guided_velocity(velocity, variables, adapter, x, sigma, conditioning, null, guidance)

        noise = standard_normal(keys, latent_shape)
        steps = jax.vmap(lambda t: jax.vmap(lambda key: jax.random.fold_in(key, t))(keys))(jnp.arange(len(sigmas) - 1))
        with activation_rules(mesh):
            if not traced:
                return solve(solver, policy, make_levels(sigmas), noise, steps)
            latents, seen = trace(solver, policy, make_levels(sigmas), noise, steps)
            return latents, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), seen)

    return Sampler(jax.jit(sample, out_shardings=batch_sharding(mesh)), guidance != 1, mesh)


def generate(
    sampler: Sampler, world: World, variables: Tree, adapter: Tree, requests: Sequence[Request], batch_size: int
) -> Iterator[tuple[Request, np.ndarray]]:
    """Images in [-1, 1], in the order of the requests, some `batch_size` at once: what the mesh divides.

    No batch is larger than all of them; the last one is filled up, its surplus dropped.

    Raises:
      ValueError: an image is not finite; names its request, before any image of its batch is given out.
    """
    batch_size = filled(min(batch_size, len(requests)), batch_ways(sampler.mesh))
    for start in range(0, len(requests), batch_size):
        batch = list(requests[start : start + batch_size])
        whole = batch + [batch[-1]] * (batch_size - len(batch))
        keys = jax.vmap(jax.random.key)(jnp.asarray([seed for _, seed in whole], jnp.uint32))
        images = sampler(world, variables, adapter, [prompt for prompt, _ in whole], keys)
        check_finite(images[: len(batch)], [f"prompt {prompt!r}, seed {seed}" for prompt, seed in batch])
        yield from zip(batch, images, strict=False)


def check_finite(images: Float[np.ndarray, "n h w 3"], names: Sequence[str]) -> None:
    """Refuse images that hold NaN or infinities, which as bytes would be black or white.

    Raises:
      ValueError: there are some; names the first one and says how many.
    """
    refuse_broken(np.array([np.isfinite(image).all() for image in images], bool), names)


def refuse_broken(finite: Bool[np.ndarray, " n"], names: Sequence[str]) -> None:
    """The same, where it is known of each image whether all of it is finite."""
    broken = [name for name, whole in zip(names, finite, strict=True) if not whole]
    if broken:
        raise ValueError(f"images: {len(broken)} of {len(names)} are not finite, the first of {broken[0]}")
