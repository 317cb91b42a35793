"""What the student starts from: the teachers' merge, an adapter that was trained before, or the base.

How much of a merge the student's rank keeps is told when the run begins, and stands in `cold_start.json`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from fopd_jax.adapters.lora import Adapter, adapter_shapes, conform, init_adapter, is_zero, map_layers, rank_of, revive
from fopd_jax.adapters.merging import (
    Energies,
    Kept,
    combine,
    kept_energy,
    layer_key,
    merge_measured,
    truncate_measured,
)
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.config.schema import OPD, LoRAConfig
from fopd_jax.config.stages import taught
from fopd_jax.config.teaching import DENSE_MERGES, ColdStart
from fopd_jax.console import say
from fopd_jax.exits import naming
from fopd_jax.files import write_json
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.parallel.sharding import parameter_shardings
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.cards import check_card, read_source
from fopd_jax.stages.pipeline import Pipeline, load_policy, weight_path
from fopd_jax.stages.setup import Setup

FIELD, START_FILE = "cold_start.adapter", "cold_start.json"
START = "start"
"""The field of stages of reinforcement learning."""
_LEFT = ("adapter.safetensors", "student.safetensors")  # by runs that train adapters
Tell = Callable[[Kept | None], None]


def start_weights(config: OPD) -> dict[str, float]:
    """Of the teachers (or the anchor) in the student's start; by default the routed ones count alike."""
    own = [name for name in taught(config) if not config.tasks[name].network]
    return config.cold_start.weights or dict.fromkeys(own, 1 / max(len(own), 1))


# ---- an adapter


def source_of(named: str) -> str:
    """The file or folder that a field means: of a run's folder the adapter that it left; '' for none."""
    folder = weight_path(named)
    if named and folder.is_dir() and (folder / RECORD_FILE).is_file():
        return next((str(folder / name) for name in _LEFT if (folder / name).is_file()), str(folder / _LEFT[0]))
    return named


def check_start(config: OPD, setup: Setup) -> None:
    """Refuse an adapter to start from that is of another base, or that nobody would start from.

    Raises:
      ValueError: names `cold_start.adapter` and the file.
    """
    start = config.cold_start
    if start.method != "adapter":
        if start.adapter:
            raise ValueError(f"{FIELD}: found {start.adapter!r}, but cold_start.method is {start.method!r}")
        return
    if not start.adapter:
        raise ValueError(f"{FIELD}: missing, which cold_start.method 'adapter' starts from")
    check_given(FIELD, start.adapter, config.adapter, setup)


def check_given(field: str, named: str, lora: LoRAConfig, setup: Setup) -> tuple[Adapter, Energies]:
    """`given_adapter`, but refuse an adapter of another base; one whose update is zero is told.

    Raises:
      ValueError: names field and file.
    """
    source = source_of(named)
    check_card(field, source, read_source(field, source), setup.pipeline, setup.base)
    given, energies = given_adapter(field, named, lora, setup.pipeline)
    if is_zero(given):
        warn(f"{field}: {source}: its update is zero: training starts as from the base")
    return given, energies


def given_adapter(field: str, named: str, lora: LoRAConfig, pipeline: Pipeline) -> tuple[Adapter, Energies]:
    """That of a field on the layers that train, at their rank and scale; of a larger rank what they hold of it.

    Raises:
      ValueError: it is missing, damaged, or adapts a layer that `lora` does not; names the field and file.
    """
    source = source_of(named)
    with naming(field):
        adapter = load_policy(source, pipeline)
        layers = adapter_shapes(lora, _shapes(pipeline)["params"], pipeline.family.targets).weights
        whole = conform(source, adapter, layers, max(rank_of(adapter), lora.rank))
    if rank_of(adapter) > lora.rank:
        return truncate_measured(whole, lora)
    ratio = whole.scale / lora.scale
    return Adapter(map_layers(lambda each: {**each, "b": ratio * each["b"]}, whole.weights), lora.scale), {}


# ---- adapters merged


def make_start(config: OPD, adapters: Mapping[str, Adapter], pipeline: Pipeline) -> tuple[Adapter, Energies]:
    """The student's initial adapter: the teachers' weighted merge, one that was trained before, or a fresh one."""
    start, lora, key = config.cold_start, config.adapter, jax.random.key(config.seed)
    if start.method == "none":
        return init_adapter(key, _shapes(pipeline)["params"], lora, pipeline.family.targets), {}
    if start.method == "adapter":
        given, energies = given_adapter(FIELD, start.adapter, lora, pipeline)
        return revive(key, given), energies
    weights = start_weights(config)
    chosen, shares = [adapters[name] for name in weights], list(weights.values())
    merged, energies = merge_measured(start.merge, chosen, shares, lora, start.density, config.seed)
    return revive(key, merged), energies


def title(config: OPD) -> str:
    """What a start is called in reports; '' where it is the base."""
    return {"merge": "merge", "adapter": "start"}.get(config.cold_start.method, "")


def describe_start(start: ColdStart) -> str:
    """The same in words."""
    if start.method == "adapter":
        return source_of(start.adapter)
    return f"the teachers' merge ({start.merge})" if start.method == "merge" else ""


def tell_start(config: OPD, workdir: Path, kept: Kept | None) -> None:
    """Say what the start keeps of what it was made of, and write it down; process 0 does."""
    start = config.cold_start
    if kept is not None:
        lost = f"the least in {kept.layer}: {kept.worst:.1%}"
        say(f"rank {config.adapter.rank} keeps {kept.overall:.1%} of the start's energy, {lost}")
    if is_main() and start.method != "none":
        found: dict[str, Any] = {"method": start.method, "rank": config.adapter.rank}
        found |= {"adapter": source_of(start.adapter)} if start.method == "adapter" else {"merge": start.merge}
        found |= {"weights": start_weights(config)} if start.method == "merge" else {}
        found |= {"density": start.density} if start.method == "merge" and start.merge in DENSE_MERGES else {}
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / START_FILE, found | {"kept": None if kept is None else dataclasses.asdict(kept)})


def adapter_start(config: OPD, adapters: Mapping[str, Adapter], pipeline: Pipeline, tell: Tell) -> Adapter:
    """The initial adapter, of which is told what it keeps."""
    adapter, energies = make_start(config, adapters, pipeline)
    tell(kept_energy(energies))
    return adapter


def untold(kept: Kept | None) -> None:
    """Of a start that is only to be reported."""


# ---- whole networks merged


def merge_networks(config: OPD, pipeline: Pipeline, base: Tree, bank: Tree, weights: Mapping[int, float]) -> Tree:
    """Base plus the merge of some networks' differences to it, by their rows in a bank, in float32 and in its shards.

    Weights that sum to 1 give the average, whatever the base is. `ties` and `dare` go tensor by tensor, and within a
    scanned stack layer by layer.
    """
    start, boxed = config.cold_start, boxed_variables(pipeline.model, pipeline.world.latent_shape)["params"]
    places = parameter_shardings(pipeline.mesh, boxed)
    if start.merge not in DENSE_MERGES:
        return jax.jit(partial(_weighted, weights), out_shardings=places)(bank, base)
    rows, shares = jnp.asarray(list(weights)), jnp.asarray(list(weights.values()), jnp.float32)
    names: dict[tuple[str, ...], Any] = flatten_dict(boxed)
    there: dict[tuple[str, ...], Any] = flatten_dict(places)
    bases, stacks = flatten_dict(base), flatten_dict(bank)

    def merged(path: tuple[str, ...]) -> Array:
        is_stack = getattr(names[path], "names", ())[:1] == ("layers",)
        make = _network_leaf(start.merge, start.density, is_stack, there[path])
        return make(layer_key(config.seed, "/".join(path)), bases[path], stacks[path], rows, shares)

    return unflatten_dict({path: merged(path) for path in names})


def _weighted(weights: Mapping[int, float], bank: Tree, base: Tree) -> Tree:
    rest = 1 - sum(weights.values())

    def average(stacked: jax.Array, own: jax.Array) -> jax.Array:
        parts = [w * stacked[row].astype(jnp.float32) for row, w in weights.items()]
        if abs(rest) > 1e-6:
            parts.append(rest * own.astype(jnp.float32))
        return jnp.stack(parts).sum(0)

    return jax.tree.map(average, bank, base)


@functools.cache
def _network_leaf(method: str, density: float, is_stack: bool, place: Any) -> Callable[..., Array]:
    def one(
        inputs: tuple[PRNGKeyArray, Float[Array, "*shape"], Float[Array, "k *shape"]], shares: Float[Array, " k"]
    ) -> Float[Array, "*shape"]:
        key, own, others = inputs
        return own + combine(method, key, others - own[None], shares, density)

    @partial(jax.jit, out_shardings=place)
    def leaf(key: PRNGKeyArray, own: Array, stacked: Array, rows: Array, shares: Array) -> Array:
        own, others = own.astype(jnp.float32), stacked[rows].astype(jnp.float32)
        if not is_stack:
            return one((key, own, others), shares)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(own.shape[0]))
        return jax.lax.map(partial(one, shares=shares), (keys, own, jnp.swapaxes(others, 0, 1)))

    return leaf


def _shapes(pipeline: Pipeline) -> Tree:
    return nn.unbox(boxed_variables(pipeline.model, pipeline.world.latent_shape))
