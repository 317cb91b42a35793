"""States that do not depend on the student: how far it is from its teachers there, and they are from one another.

On its own rollouts a student's gap falls also because it goes where it agrees. Fixed states (GFD-OPD, arXiv 2609.39692)
do not move: along each task's teacher's own trajectory, the ODE's, for held-out prompts; and noised images, where the
world has some. All of them are functions of the seed, prompts and teachers. They are surveyed once, by every teacher,
the anchor and the base; after that the student alone is asked about them.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fopd_jax.config.schema import Pairs
from fopd_jax.evaluation.score import noise_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.opd import divergence
from fopd_jax.parallel.distributed import fetch, put_batch, put_replicated, rows_of
from fopd_jax.parallel.sharding import BATCH_AXES, activation_rules, batch_sharding, batch_ways, filled, replicated
from fopd_jax.policy.guidance import guided
from fopd_jax.policy.panel import Panel, Questions
from fopd_jax.policy.velocity import Tree, branches
from fopd_jax.steps.opd.pieces import Pieces, student_says
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import panel_of
from fopd_jax.worlds.world import World

DATA_LEVELS = (0.25, 0.5, 0.75)
"""Noise levels of images."""
PERTURBATION = 0.1
"""δ of the probe: the states' own dimensions have a deviation of about 1."""
GROUPS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.1)}
"""Noise levels that are averaged together, `low <= sigma < high`."""


@struct.dataclass
class Rows:
    """What states are made of `[B, …]`: held-out prompts with their teacher's bank entry and three noises a row; images
    and their captions, zeros where there are none.
    """

    conditioning: Any
    captions: Any
    x0: Any
    route: Any
    keys: Any


@struct.dataclass
class States:
    """Fixed states `x [L, B, h, w, c]` at `sigma [L]`, and what each one's own teacher says there; `image [L]`: whether
    they are noised images, which are of other prompts.
    """

    x: Any
    sigma: Any
    image: Any
    target: Any
    conditioning: Any
    captions: Any


@struct.dataclass
class Survey:
    """Mean squares and products a state, of V voices: the teachers, and the anchor where there is one.

    `between [L, B, V, V]`: of the differences of velocities; `updates [L, B, V, V]`: products of what voices add to the
    base, each under its own guidance; `base [L, B, V]`: the base's. `moved` and `base_moved [L, B, V]`: of the
    differences that a perturbation of the state makes.
    """

    between: Any
    updates: Any
    base: Any
    moved: Any
    base_moved: Any


@dataclasses.dataclass(frozen=True)
class Fixed:
    """States of `count` prompts a task, on the devices of `mesh`, and the programs that ask about them.

    `voices`: names of the bank's first entries, in its order; `seed`: of noises and images. `pictured`: the tasks that
    the world has images of.
    """

    pieces: Pieces
    world: World
    mesh: Mesh
    voices: tuple[str, ...]
    count: int
    seed: int
    pictured: frozenset[str] = frozenset()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.pieces.spec.teachers

    @property
    def size(self) -> int:
        """Rows of a batch: those of all tasks, filled up to what the mesh divides."""
        return filled(len(self.tasks) * self.count, batch_ways(self.mesh))

    def prompts(self) -> list[str]:
        """Held-out ones, task by task."""
        return [prompt for name in self.tasks for prompt in held_out(self.world, name, self.count)]

    def survey(self, frozen: Frozen) -> tuple[States, Survey]:
        """Make the states and ask everybody about them; the survey is on the host, of the real rows alone."""
        rows, batch = self._rows(), NamedSharding(self.mesh, P(None, BATCH_AXES))
        everywhere = replicated(self.mesh)
        states = States(batch, everywhere, everywhere, batch, batch_sharding(self.mesh), batch_sharding(self.mesh))
        whole = Survey(*(everywhere,) * len(dataclasses.fields(Survey)))
        levels = DATA_LEVELS if self.pictured else ()
        make = partial(_survey, self.pieces, self.mesh, len(self.voices), levels)
        made, seen = jax.jit(make, out_shardings=(states, whole))(frozen, rows)
        real = len(self.tasks) * self.count
        return made, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[:, :real], fetch(seen))

    def student(self) -> "StudentGaps":
        """The jitted program of the student's distance."""
        asked = partial(_student_gaps, self.pieces, self.mesh)
        return jax.jit(asked, out_shardings=replicated(self.mesh))

    def _rows(self) -> Rows:
        """On the devices; each process encodes its own rows."""
        sharding, real = batch_sharding(self.mesh), len(self.tasks) * self.count
        places = np.arange(self.size) % real  # surplus rows repeat the first ones
        mine, prompts = places[rows_of(sharding, self.size)], self.prompts()
        encoded = self.world.encode([prompts[place] for place in mine])
        x0, captions = self._images(mine, encoded)
        keys = jnp.concatenate([noise_keys(self.seed, f"fixed/{name}", np.arange(self.count)) for name in self.tasks])
        placed = put_batch((encoded, captions, x0), sharding, self.size)
        embedded = self.world.embed(placed[0]), self.world.embed(placed[1])
        route: Any = (places // self.count).astype(np.int32)
        route, keys = put_replicated((route, keys[places]), sharding)
        return Rows(*embedded, placed[2], route, keys)

    def _images(self, mine: Int[np.ndarray, " n"], encoded: Tree) -> tuple[Float[np.ndarray, "n h w c"], Tree]:
        """Images and captions of this process's rows; where a task has none, zeros and the prompts."""
        x0, captions = np.zeros((len(mine), *self.world.latent_shape), np.float32), jax.tree.map(np.array, encoded)
        for k, name in enumerate(self.tasks):
            if name not in self.pictured:
                continue
            assert self.world.pairs is not None
            pairs = self.world.pairs({name: Pairs()}, self.count, 0.0, self.seed)
            rows = np.flatnonzero(mine // self.count == k)
            if len(rows):
                found = pairs.batch(0, mine[rows] % self.count)
                x0[rows] = found["x0"]
                captions = jax.tree.map(partial(_replaced, rows), captions, found["conditioning"])
        return x0, captions


StudentGaps = Any
"""`(frozen, trained, states) → mean squares [L, B]` of the difference to each state's own teacher."""


def held_out(world: World, task: str, count: int) -> list[str]:
    """So many test prompts, spread evenly over them so that all kinds are there; in turn, where there are fewer."""
    found = world.tasks[task].test or world.tasks[task].train
    return [found[i * len(found) // count if count <= len(found) else i % len(found)] for i in range(count)]


def _replaced(rows: Int[np.ndarray, " n"], leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
    leaf[rows] = new
    return leaf


# ---- programs


def _survey(
    pieces: Pieces, mesh: Mesh, voices: int, levels: Sequence[float], frozen: Frozen, rows: Rows
) -> tuple[States, Survey]:
    """Down each row's own teacher's trajectory, then at its noised image."""
    spec = pieces.spec
    noise, other, shake = (_noise(rows.keys, k, spec.latent_shape) for k in range(3))
    sigmas = np.asarray(spec.sigmas, np.float32)
    steps = len(sigmas) - 2  # the last one is never trained
    sigma = jnp.asarray([*sigmas[:steps], *levels], jnp.float32)
    after = jnp.asarray([*sigmas[1 : steps + 1], *levels], jnp.float32)
    image = jnp.arange(len(sigma)) >= steps

    def visit(x: Array, step: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Survey]]:
        here, there, is_image = step
        x = jnp.where(is_image, (1 - here) * rows.x0 + here * other, x)
        conditioning = jax.tree.map(lambda a, b: jnp.where(is_image, b, a), rows.conditioning, rows.captions)

        ask = partial(_everybody, pieces, frozen, voices, sigma=here, conditioning=conditioning)
        v, base = jax.lax.map(ask, jnp.stack([x, x + PERTURBATION * shake]))  # [2, V, B, h, w, c] each, of one program
        own = jnp.take_along_axis(v[0], rows.route[None, :, None, None, None], axis=0)[0]
        return x + own * (there - here), (x, own, _measured(v, base))

    with activation_rules(mesh), jax.named_scope("fixed_states"):
        _, (x, target, seen) = jax.lax.scan(visit, noise, (sigma, after, image))
    return States(x, sigma, image, target, rows.conditioning, rows.captions), seen


def _everybody(
    pieces: Pieces, frozen: Frozen, voices: int, x: Array, sigma: Array, conditioning: Any
) -> tuple[Float[Array, "v b h w c"], Float[Array, "v b h w c"]]:
    """What each voice says, as training compares it, and the base under the same guidance."""
    spec, scales, panel = pieces.spec, pieces.spec.teacher_guidance, _panel(pieces, frozen, voices)

    def ask(entries: Sequence[Any], *, known: bool) -> list[Array]:
        rows = ((k, jnp.full((x.shape[0], 1), k, jnp.int32)) for k in entries)
        of_all = [Questions(row, branches=spec.apart, entry=k if known else None) for k, row in rows]
        return [each.velocity for each in panel.ask(x, sigma, conditioning, of_all)]

    if spec.whole_teachers:  # goes through its networks one by one
        v = jnp.stack(ask(range(voices), known=True))
    elif spec.grouped:  # each of its own network's forward
        v = jnp.stack([ask([entry], known=True)[0] for entry in range(voices)])
    else:  # one by one, too: no more rows at once than there are states
        v = jax.lax.map(lambda entry: ask([entry], known=False)[0], jnp.arange(voices))
    if any(scale != 1 for scale in scales) or spec.apart:
        text, null = branches(pieces.velocity, frozen.variables, {}, x, sigma, conditioning, frozen.null)
        base = [text if spec.apart else guided(text, null, scale) for scale in scales[:voices]]
    else:
        base = [pieces.velocity(frozen.variables, {}, x, sigma, conditioning)] * voices
    return v.astype(jnp.float32), jnp.stack(base).astype(jnp.float32)


def _panel(pieces: Pieces, frozen: Frozen, voices: int) -> Panel:
    """Who answers in training, the anchor where it is a voice, whatever its weight; as often as they are asked."""
    spec = pieces.spec
    objective = dataclasses.replace(spec.objective, mar_beta=float(voices > len(spec.teachers)))
    spec = dataclasses.replace(spec, objective=objective, anchor_moves="none", slots=None)
    return panel_of(dataclasses.replace(pieces, spec=spec), frozen)


def _measured(v: Float[Array, "a v b h w c"], base: Float[Array, "a v b h w c"]) -> Survey:
    """Of a state and of the one beside it."""
    updates = v[0] - base[0]

    def square(difference: Array) -> Array:
        return jnp.moveaxis(jnp.square(difference).mean((-3, -2, -1)), -1, 0)

    products = jnp.einsum("v b h w c, u b h w c -> b v u", updates, updates, precision="highest")
    return Survey(
        between=square(v[0][:, None] - v[0][None]),
        updates=products / math.prod(v.shape[-3:]),
        base=square(base[0]),
        moved=square(v[1] - v[0]), base_moved=square(base[1] - base[0]),
    )  # fmt: skip


def _student_gaps(pieces: Pieces, mesh: Mesh, frozen: Frozen, trained: Tree, states: States) -> Float[Array, "l b"]:
    parameters = pieces.student.compute(trained)

    def visit(_: Any, at: tuple[Array, Array, Array, Array]) -> tuple[Any, Array]:
        x, sigma, image, target = at
        conditioning = jax.tree.map(lambda a, b: jnp.where(image, b, a), states.conditioning, states.captions)
        _, own = student_says(pieces, frozen, parameters, conditioning, x, sigma)
        return None, divergence(own.velocity, target, jnp.ones(()))

    with activation_rules(mesh), jax.named_scope("fixed_states"):
        return jax.lax.scan(visit, None, (states.x, states.sigma, states.image, states.target))[1]


def _noise(keys: Array, number: int, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    return standard_normal(jax.vmap(lambda key: jax.random.fold_in(key, number))(keys), shape)


# ---- means by task


def mean_gaps(
    tasks: Sequence[str], pictured: frozenset[str], sigma: np.ndarray, image: np.ndarray, gaps: np.ndarray
) -> dict[str, float]:
    """`fixed/TASK/teacher` and `fixed/TASK/data`, and each also by `GROUPS` of noise levels; `gaps [L, tasks, n]`."""
    found: dict[str, float] = {}
    for k, name in enumerate(tasks):
        for kind, chosen in (("teacher", ~image), ("data", image)):
            if kind == "data" and name not in pictured:
                continue
            found[f"fixed/{name}/{kind}"] = float(gaps[chosen, k].mean())
            for label, (low, high) in GROUPS.items():
                inside = chosen & (low <= sigma) & (sigma < high)
                if inside.any():
                    found[f"fixed/{name}/{kind}/{label}"] = float(gaps[inside, k].mean())
    return found
