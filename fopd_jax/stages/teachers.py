"""Who teaches, adapters on the base or whole networks: the routed teachers and the anchor; and the student's start."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.coordinates import skills_of
from fopd_jax.adapters.lora import (
    Adapter,
    adapter_shapes,
    conform,
    delta,
    effective,
    is_zero,
    rank_of,
    stack_bank,
)
from fopd_jax.adapters.lora import zeros_like as no_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import OPD, Config
from fopd_jax.config.sizes import describe_size
from fopd_jax.config.stages import taught
from fopd_jax.evaluation.report import Model
from fopd_jax.parallel.distributed import put_replicated, warn
from fopd_jax.parallel.sharding import bank_shardings, replicated, stacked_shardings
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.cards import check_card, read_source, size_of
from fopd_jax.stages.cold_start import (
    Tell,
    adapter_start,
    make_start,
    merge_networks,
    start_weights,
    title,
    untold,
)
from fopd_jax.stages.coordinates import fitted, skills
from fopd_jax.stages.pipeline import Pipeline, check_network, load_base, load_network, load_policy
from fopd_jax.stages.setup import Setup, samplers_at

TEACHER = "teacher/"
"""What the report's names of teachers begin with."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where teachers come from, by name: the tasks in order, then the anchor if it has weights; `anchor`: its name.

    `networks`: of those that are on another network than the student's base. One that is such a network has no weights
    of its own here.
    """

    names: dict[str, str]
    anchor: str | None
    networks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, network: str) -> "Sources":
        """Those on one network, '' being the student's base."""
        names = {name: source for name, source in self.names.items() if self.networks.get(name, "") == network}
        return Sources(names, self.anchor if self.anchor in names else None)

    def field(self, name: str) -> str:
        return "anchor.adapter" if name == self.anchor else f"tasks.{name}.teacher"


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What a run starts from.

    `variables`: the base; `bank`: teachers by task in the config's order, then the anchor. What is not there while
    training is made anew when it is asked for: `start(tell)`, of what trains, where `tell` hears how much of a merge it
    keeps, and `models()`, everybody but the student, to report. `networks`: of teachers beside the base, see `Frozen`.
    """

    variables: Tree
    bank: Tree
    start: Callable[..., Tree]
    models: Callable[[], list[Model]]
    networks: Tree = dataclasses.field(default_factory=dict)


def sources(config: OPD) -> Sources:
    """Raises ValueError where the anchor has a teacher's name but other weights."""
    tasks = {name: config.tasks[name] for name in taught(config)}
    names = {name: task.teacher for name, task in tasks.items() if task.teacher or not task.network}
    networks = {name: task.network for name, task in tasks.items() if task.network}
    weights, name = config.anchor.adapter, config.anchor.name
    if not weights and not config.anchor.network:
        return Sources(names, None, networks)
    if name in tasks and (names.get(name, ""), networks.get(name, "")) != (weights, config.anchor.network):
        raise ValueError(f"anchor.name: found {name!r}, which is a task with another teacher")
    anchor = None if name in tasks else name
    networks |= {name: config.anchor.network} if config.anchor.network else {}
    return Sources(names | ({name: weights} if weights else {}), anchor, networks)


def check_start(config: OPD, found: Sources) -> None:
    """Refuse a start that cannot be made.

    Raises:
      ValueError: weights for a teacher that is not there, or an adapter to start from networks.
    """
    start = config.cold_start
    if start.method != "merge":
        return
    own = found.of("").names
    if found.networks and not own:
        raise ValueError("cold_start.method: found 'merge', expected 'none': no teacher is on the student's base")
    unknown = set(start.weights) - set(own)
    if unknown:
        raise ValueError(f"cold_start.weights: found {sorted(unknown)}, expected some of {tuple(own)}")
    if config.whole_teachers and config.trained == "adapter":
        raise ValueError("cold_start.method: found 'merge', expected 'none': whole networks have no adapter to merge")


# ---- adapters on the base


def check_cards(config: OPD, setup: Setup, found: Sources) -> dict[str, AdapterCard]:
    """What the teachers' files say of themselves, by name; what they are used for otherwise is told.

    Raises:
      ValueError: a teacher is of another base, or its card is damaged; names the field and the file.
    """
    cards = {name: read_source(found.field(name), source) for name, source in found.names.items()}
    for name, card in cards.items():
        field, source = found.field(name), found.names[name]
        check_card(field, source, card, setup.pipeline, setup.base)
        for line in _deviations(config, name, card or AdapterCard(), size_of(config, setup.pipeline)):
            warn(f"{field}: {source} {line}")
    return {name: card for name, card in cards.items() if card is not None}


def _deviations(config: OPD, name: str, card: AdapterCard, size: tuple[int, int]) -> Iterator[str]:
    """What a run does otherwise than a teacher's card says, in words."""
    scales = {f"tasks.{name}": config.tasks[name].guidance} if name in config.tasks else {}
    asked = config.objective.mar_beta > 0 and config.anchor.moves == "none"
    if name == config.anchor.name and config.anchor.adapter and asked:
        scales["anchor"] = config.anchor.guidance
    for field, scale in scales.items():
        if card.guidance is not None and scale is not None and scale != card.guidance:
            yield f"is for guidance {card.guidance:g}, but {field}.guidance is {scale:g}"
    if card.resolution is not None and card.resolution != size:
        trained, used = (describe_size(each) for each in (card.resolution, size))
        yield f"was trained at {trained} pixels, but model.resolution is {used}"


def load_adapters(
    config: OPD, pipeline: Pipeline, found: Sources, cards: Mapping[str, AdapterCard]
) -> dict[str, Adapter]:
    """Every teacher's adapter by name, all on the student's layers and at the largest rank.

    Raises:
      ValueError: a file is missing, damaged, of another preset, or adapts a layer that `config.adapter` does not; names
        the field, the file and the first layer that differs.
    """
    adapters = {}
    for name, source in found.names.items():
        try:
            adapters[name] = load_policy(source, pipeline)
        except ValueError as error:
            raise ValueError(f"{found.field(name)}: {error}") from error
        if skills_of(adapters[name]):
            raise ValueError(
                f"{found.field(name)}: {source}: has capability coordinates, expected an adapter without: "
                "teachers are asked about none"
            )
        said, scale = cards.get(name, AdapterCard()).scale, adapters[name].scale
        if said is not None and not math.isclose(said, scale, rel_tol=1e-3):
            warn(f"{found.field(name)}: {source} says that its scale is {said:g}, but holds {scale:g}")
        if is_zero(adapters[name]):
            warn(f"{found.field(name)}: {source}: its update is zero: it teaches what the base does")
    titles = {f"{found.field(name)} ({source})": adapters[name] for name, source in found.names.items()}
    return dict(zip(adapters, conform_all(config, pipeline, titles), strict=True))


def conform_all(config: Config, pipeline: Pipeline, adapters: Mapping[str, Adapter]) -> list[Adapter]:
    """Adapters on the student's layers and at the largest rank of theirs.

    Raises:
      ValueError: one adapts a layer that `config.adapter` does not, or is of another shape; names it and the layer.
    """
    rank = max((rank_of(adapter) for adapter in adapters.values()), default=config.adapter.rank)
    layers = adapter_shapes(config.adapter, _shapes(pipeline)["params"], pipeline.family.targets).weights
    return [conform(name, adapter, layers, rank) for name, adapter in adapters.items()]


def start_shapes(config: OPD, pipeline: Pipeline, adapters: dict[str, Adapter]) -> Adapter:
    """The student's initial adapter as shapes: merged ones may have another rank than `config.adapter`.

    Raises:
      ValueError: as `truncate`, or it is trained at another scale than `config.adapter` has.
    """
    start, lora = jax.eval_shape(lambda: make_start(config, adapters, pipeline)[0]), config.adapter
    merge = config.cold_start.merge
    if config.trained == "adapter" and start.scale != lora.scale:
        raise ValueError(
            f"adapter.alpha: found {lora.alpha:g}, a scale of {lora.scale:g}, but cold_start.merge {merge!r} keeps "
            f"the teachers' scale {start.scale:g}: expected {start.scale * lora.rank:g}"
        )
    return jax.eval_shape(partial(fitted, config, model=pipeline.model), start)


def teach_by_adapters(
    config: OPD, pipeline: Pipeline, adapters: dict[str, Adapter], bank: Callable[[], Tree] | None = None
) -> Teaching:
    """Load the base and put the adapters beside it; `bank`: makes another one than of all tasks and the anchor."""
    anchor = adapters[config.anchor.name] if config.anchor.adapter and not config.anchor.network else None
    begin = partial(adapter_start, config, adapters, pipeline)
    if bank is None:
        tasks = {name: adapters[name] for name in taught(config)}
        bank = partial(make_bank, config, pipeline, tasks, anchor, base=asks_base(config))
    bank = bank()
    variables = load_base(config.model, pipeline, config.seed)

    def start(tell: Tell = untold) -> Tree:
        adapter = fitted(config, begin(tell), pipeline.model)
        return adapter if config.trained == "adapter" else _add_to_base(config, pipeline, adapter)

    def models() -> list[Model]:
        """The base is an adapter, too, so that every model is sampled by one program."""
        base = effective(no_adapter(next(iter(adapters.values()), None) or begin(untold)))
        found = {"base": base} | {f"{TEACHER}{name}": effective(adapter) for name, adapter in adapters.items()}
        if name := title(config):
            found[name] = effective(begin(untold))
        return as_asked(config, pipeline, [Model(name, variables, adapter) for name, adapter in found.items()])

    return Teaching(variables, bank, start, models)


def as_asked(config: OPD, pipeline: Pipeline, models: Sequence[Model]) -> list[Model]:
    """The same to report; where `eval.teacher_guidance` is 'own', teachers have samplers of the scales that they are
    asked under, where that is not `eval.guidance`.
    """
    if config.eval.teacher_guidance == "same":
        return list(models)
    samplers = cache(partial(samplers_at, config.eval, config.model.shift, pipeline))

    def own(model: Model) -> Model:
        name = model.name.removeprefix(TEACHER)
        scale = config.tasks.get(name, config.anchor).guidance
        if name == model.name or scale is None or scale == config.eval.guidance:
            return model
        sampler, others = samplers(scale)
        return dataclasses.replace(model, sampler=sampler, others=others, guidance=scale)

    return [own(model) for model in models]


def asks_base(config: OPD) -> bool:
    """Whether the base is asked beside teachers and anchor."""
    return bool(skills(config)) or any(config.tasks[name].extrapolation for name in taught(config))


def make_bank(
    config: Config, pipeline: Pipeline, teachers: Mapping[str, Adapter], anchor: Adapter | None, *, base: bool = False
) -> Tree:
    """Teachers in their order, then the anchor (None: the base), and the base where it is asked.

    In `model.dtype`, split as the base's kernels are.
    """
    nothing = no_adapter(next(iter(teachers.values())))
    bank = {**teachers, "anchor/": anchor or nothing} | ({"base/": nothing} if base else {})
    dtype, boxed = jnp.dtype(config.model.dtype), _boxed(pipeline)
    stacked = jax.tree.map(lambda leaf: leaf.astype(dtype), stack_bank(bank))
    return put_replicated(stacked, bank_shardings(pipeline.mesh, boxed["params"], stacked))


def _add_to_base(config: OPD, pipeline: Pipeline, adapter: Adapter) -> Tree:
    """The base's parameters in float32 with an adapter's update in them, in their shards."""
    params = load_base(config.model, pipeline, config.seed, "float32")["params"]
    places = jax.tree.map(lambda leaf: leaf.sharding, params)

    @partial(jax.jit, donate_argnums=0, out_shardings=places)
    def add(params: Tree, adapter: Adapter) -> Tree:
        kernels: dict[tuple[str, ...], Any] = flatten_dict(params)
        for path, update in flatten_dict(delta(adapter)).items():
            kernels[*path, "kernel"] = kernels[*path, "kernel"] + update
        return unflatten_dict(kernels)

    return add(params, put_replicated(adapter, replicated(pipeline.mesh)))


# ---- whole networks


def check_networks(pipeline: Pipeline, found: Sources) -> None:
    """Refuse teachers that are not there or are of another network, before anything is loaded."""
    for name, source in found.names.items():
        check_network(found.field(name), source, pipeline)


def teach_by_networks(config: OPD, pipeline: Pipeline, found: Sources) -> Teaching:
    """Load base and teachers, each straight into its shards; all of them stay there, split like the student."""
    dtype, boxed = jnp.dtype(config.model.dtype), _boxed(pipeline)
    variables = load_base(config.model, pipeline, config.seed)
    networks = {name: load_network(source, pipeline, dtype)["params"] for name, source in found.names.items()}
    anchor = networks.get(config.anchor.name, variables["params"]) if config.anchor.adapter else variables["params"]
    stack = jax.jit(
        lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),
        out_shardings=stacked_shardings(pipeline.mesh, boxed["params"]),
    )
    bank = stack(*(networks[name] for name in taught(config)), anchor)
    del networks, anchor

    def average() -> Tree:
        weights = start_weights(config)
        rows = [list(found.names).index(name) for name in weights]
        chosen = dict(zip(rows, weights.values(), strict=True))
        return merge_networks(config, pipeline, variables["params"], bank, chosen)

    def start(tell: Tell = untold) -> Tree:
        if config.cold_start.method == "merge":
            tell(None)
            return average()
        if config.trained == "params" and config.cold_start.method == "none":
            return load_base(config.model, pipeline, config.seed, "float32")["params"]
        adapter = adapter_start(config, {}, pipeline, tell)
        return adapter if config.trained == "adapter" else _add_to_base(config, pipeline, adapter)

    def models() -> list[Model]:
        """The bank holds the named networks in their order, the anchor last."""
        params = {"base": variables["params"]}
        for k, name in enumerate(found.names):
            params[f"{TEACHER}{name}"] = jax.tree.map(lambda leaf, k=k: leaf[k], bank)
        if config.cold_start.method == "merge":
            params["merge"] = jax.tree.map(lambda leaf: leaf.astype(dtype), average())
        networks = [Model(name, {**variables, "params": each}, {}) for name, each in params.items()]
        networks = as_asked(config, pipeline, networks)
        if config.cold_start.method != "adapter":
            return networks
        return [*networks, Model(title(config), variables, effective(adapter_start(config, {}, pipeline, untold)))]

    return Teaching(variables, bank, start, models)


def _boxed(pipeline: Pipeline) -> Tree:
    return boxed_variables(pipeline.model, pipeline.world.latent_shape)


def _shapes(pipeline: Pipeline) -> Tree:
    return nn.unbox(_boxed(pipeline))
