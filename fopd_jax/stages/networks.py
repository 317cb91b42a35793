"""Networks of teachers beside the student's base: which there are, whether they fit, and where their weights go.

Such a network may be another preset or another family, if it lives in the same latent space and reads the same encoded
prompts. It has weights, adapters, precision and shards of its own; what it is asked, see `policy.groups`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fopd_jax.adapters.lora import Adapter, effective, stack_bank
from fopd_jax.adapters.lora import zeros_like as no_adapter
from fopd_jax.backbones.float8 import FLOAT8, to_float8
from fopd_jax.backbones.record import Backbone, LatentShape, Shape
from fopd_jax.backbones.weights import boxed_variables, example_inputs, random_network
from fopd_jax.config.rules import within
from fopd_jax.config.schema import OPD
from fopd_jax.config.stages import taught
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.evaluation.report import Model as Reported
from fopd_jax.interop.files.converted import Manifest
from fopd_jax.parallel.distributed import put_replicated, warn
from fopd_jax.parallel.sharding import AnyMesh, bank_shardings, check_width
from fopd_jax.policy.velocity import Tree, Velocity, make_velocity
from fopd_jax.stages.cards import base_hash
from fopd_jax.stages.pipeline import (
    Pipeline,
    build_network,
    check_base,
    find_network,
    load_network,
    manifest_of,
    weight_path,
)
from fopd_jax.stages.setup import Setup, eval_sampler, other_samplers
from fopd_jax.stages.teachers import (
    TEACHER,
    Sources,
    Teaching,
    as_asked,
    asks_base,
    check_cards,
    load_adapters,
    sources,
    teach_by_adapters,
)
from fopd_jax.worlds.embedded import EMBEDDED

AGAIN = "anchor/"
"""The anchor's name among teachers, where a task has its own."""


@dataclasses.dataclass(frozen=True)
class Other:
    """A network beside the base. `pipeline`: it in the student's world; `teachers`: those that are it (None), or are
    adapters on it, by name, in the panel's order.
    """

    name: str
    settings: TeacherNetwork
    pipeline: Pipeline
    teachers: Mapping[str, Adapter | None]


def answering(config: OPD) -> dict[str, str]:
    """The network of each teacher, by the tasks' names, and of the anchor under '' where it is asked.

    Raises:
      ValueError: a network is not there, or nobody is it or is on it; names the field.
    """
    named = {name: task.network for name, task in config.tasks.items()}
    fields = {f"tasks.{name}.network": network for name, network in named.items()}
    if config.objective.mar_beta > 0:
        named[""] = fields["anchor.network"] = config.anchor.network
    for field, network in fields.items():
        if network and network not in config.networks:
            raise ValueError(f"{field}: found {network!r}, expected one of {('', *config.networks)}")
    if config.anchor.network and config.anchor.moves != "none":
        moves = f"anchor.moves {config.anchor.moves!r}, which is the student as it was"
        raise ValueError(f"anchor.network: found {config.anchor.network!r}, expected '' with {moves}")
    if unused := sorted(set(config.networks) - set(named.values())):
        raise ValueError(f"networks.{unused[0]}: found a network that no task names, and no anchor with a weight")
    if config.whole_teachers and config.networks:
        raise ValueError("networks: found some, expected none with whole_teachers, which are like the student's base")
    return named


# ---- does it fit


def make_others(config: OPD, setup: Setup) -> dict[str, Other]:
    """The networks that teachers are or are on, with the adapters on them; checked before any network is loaded.

    Raises:
      ValueError: one is not there, lives in another latent space, or reads other prompts; or an adapter does not fit
        its network. Names the field.
    """
    answering(config)
    found = sources(config)
    return {name: _make_other(config, setup, found, name) for name in config.networks}


def _make_other(config: OPD, setup: Setup, found: Sources, name: str) -> Other:
    student, settings, field = setup.pipeline, config.networks[name], f"networks.{name}"
    own = dataclasses.replace(config.model, preset=settings.preset, path=settings.path)
    path = weight_path(settings.path)
    if settings.path and not path.exists():
        raise ValueError(f"{field}.path: {path}: no such file or folder")
    manifest = manifest_of(f"{field}.path", path) if settings.path and path.is_dir() else None
    if manifest is not None and student.manifest is not None:
        check_autoencoder(field, manifest, student.manifest)
    family, shape = find_network(settings.preset, path, manifest, field)
    known = student.family, student.model.config, student.preset, student.world.latent_shape
    module = fitting_module(field, settings, family, shape, config, student.mesh, known)
    pipeline = Pipeline(
        student.mesh, settings.preset, family, module, make_velocity(module), student.world, manifest
    )  # fmt: skip
    with within(field):
        check_base(own, pipeline, "path")
    adapted = found.of(name)
    cards = check_cards(config, dataclasses.replace(setup, pipeline=pipeline, base=base_hash(own)), adapted)
    adapters = load_adapters(config, pipeline, adapted, cards) if adapted.names else {}
    teachers = {each: adapters.get(each) for each, task in config.tasks.items() if task.network == name}
    if config.objective.mar_beta > 0 and config.anchor.network == name:
        anchor = config.anchor.name
        teachers[AGAIN if anchor in config.tasks else anchor] = adapters.get(anchor)
    return Other(name, settings, pipeline, teachers)


Known = tuple[Backbone, Shape, str, LatentShape]
"""Of the student: family, shape, preset, and the shape of one latent image."""


def fitting_module(
    field: str, settings: TeacherNetwork, family: Backbone, shape: Shape, config: OPD, mesh: AnyMesh, known: Known
) -> nn.Module:
    """The network of a teacher.

    Raises:
      ValueError: it lives in another latent space than the student, or reads other prompts; names what differs.
    """
    student, student_shape, student_preset, latent_shape = known
    if settings.dtype == FLOAT8 and not family.float8:
        raise ValueError(f"{field}.dtype: found {FLOAT8!r}, which networks of the family {family.name!r} do not read")
    check_width(shape.width, mesh)
    dtype = config.model.dtype if settings.dtype == FLOAT8 else settings.dtype
    module = build_network(family, shape, config.run, dtype, "none", mesh)
    if EMBEDDED.get(settings.preset) is not EMBEDDED.get(student_preset):
        raise ValueError(
            f"{field}.preset: found {settings.preset!r}, whose latents are not those of {student_preset!r}: "
            "teachers of another latent space cannot be asked about the student's states"
        )
    check_latents(field, module, latent_shape)
    texts = [each.encoded(own, config.model.t5_length) for each, own in ((family, shape), (student, student_shape))]
    for what, found, expected in zip(("context", "pooled text"), *texts, strict=True):
        if found != expected:
            raise ValueError(
                f"{field}.preset: {settings.preset!r} reads {what} of shape {found}, expected {expected} as the student"
            )
    return module


def check_latents(field: str, module: Any, latent_shape: LatentShape) -> None:
    """Raises ValueError where a network's velocities are not of the student's latents' shape; names the field."""

    def ask(variables: Tree) -> Any:
        return module.apply(variables, *example_inputs(module, latent_shape))

    whose = f"{field}.preset: has no latents of the student's shape {latent_shape}"
    try:
        found = jax.eval_shape(ask, nn.unbox(boxed_variables(module, latent_shape))).shape[1:]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{whose} ({str(error).splitlines()[0]})") from error
    if found != latent_shape:
        raise ValueError(f"{whose}, but of {found}: teachers of another latent space cannot be asked about its states")


def check_autoencoder(field: str, manifest: Manifest, student: Manifest) -> None:
    """Refuse a network that was made for another autoencoder; one whose folder does not hold its own is taken as it is.

    Raises:
      ValueError: they differ in what latents mean, or in their weights; names the field and what differs.
    """
    if "vae" not in manifest.components or "vae" not in student.components:
        warn(f"{field}.path: does not hold its autoencoder; it is taken to be the student's")
        return
    found, expected = (each.component("vae").config for each in (manifest, student))
    for name in ("latent_channels", "scaling_factor", "shift_factor", "downsampling"):
        if (theirs := getattr(found, name)) != (ours := getattr(expected, name)):
            raise ValueError(
                f"{field}.path: its autoencoder has {name} {theirs:g}, expected {ours:g} as the student's: it lives in "
                "another latent space"
            )
    if _weights_of(manifest) != _weights_of(student):
        raise ValueError(
            f"{field}.path: its autoencoder has other weights than the student's (SHA-256 of its files), so that it "
            "may live in another latent space; where it is the same one in other files, convert the transformer alone"
        )


def _weights_of(manifest: Manifest) -> list[str]:
    source = manifest.components["vae"].source
    return sorted(digest for name, digest in source.items() if name.endswith(".safetensors"))


# ---- weights


def load_other(config: OPD, other: Other) -> tuple[Tree, Tree]:
    """The network's variables, born in the shards of the mesh, and the bank of adapters on it."""
    pipeline, settings = other.pipeline, other.settings
    dtype = jnp.dtype("bfloat16" if settings.dtype == FLOAT8 else settings.dtype)
    if settings.path:
        variables = load_network(settings.path, pipeline, dtype)
    else:
        variables = random_network(pipeline.model, pipeline.world.latent_shape, config.seed, dtype, pipeline.mesh)
    variables = to_float8(variables) if settings.dtype == FLOAT8 else variables
    return variables, bank_of(pipeline, other.teachers, pipeline.model.dtype)


def bank_of(pipeline: Pipeline, teachers: Mapping[str, Adapter | None], dtype: Any) -> Tree:
    """Adapters in their order, None being the network as it is; {} where all are."""
    like = next((adapter for adapter in teachers.values() if adapter is not None), None)
    if like is None:
        return {}
    stacked = stack_bank({name: no_adapter(like) if each is None else each for name, each in teachers.items()})
    stacked = jax.tree.map(lambda leaf: leaf.astype(dtype), stacked)
    boxed = boxed_variables(pipeline.model, pipeline.world.latent_shape)
    return put_replicated(stacked, bank_shardings(pipeline.mesh, boxed["params"], stacked))


def voices(others: Mapping[str, Other]) -> dict[str, Velocity]:
    """Their velocities."""
    return {name: other.pipeline.velocity for name, other in others.items()}


def reported(config: OPD, other: Other, variables: Tree) -> list[Reported]:
    """The teachers that it is or that are on it, each with a sampler of its own network."""
    settings = config.eval, config.model.shift, other.pipeline
    own = eval_sampler(*settings), other_samplers(*settings)
    shown = {name: {} if adapter is None else effective(adapter) for name, adapter in other.teachers.items()}
    found = [Reported(f"{TEACHER}{name}", variables, shown[name], *own) for name in shown if name != AGAIN]
    return as_asked(config, other.pipeline, found)


def teach_by_others(
    config: OPD, pipeline: Pipeline, adapters: dict[str, Adapter], others: Mapping[str, Other]
) -> Teaching:
    """Load the base, the adapters on it, and the other networks with theirs, each straight into its shards."""
    own: dict[str, Adapter | None] = {name: adapters[name] for name in taught(config) if not config.tasks[name].network}
    if config.objective.mar_beta > 0 and not config.anchor.network:
        own[AGAIN] = adapters[config.anchor.name] if config.anchor.adapter else None
    if asks_base(config):
        own["base/"] = None
    bank = partial(bank_of, pipeline, own, jnp.dtype(config.model.dtype))
    teaching = teach_by_adapters(config, pipeline, adapters, bank)
    networks = {name: load_other(config, other) for name, other in others.items()}

    def models() -> list[Reported]:
        """Base and merge as ever, teachers in the tasks' order."""
        found = {model.name: model for model in teaching.models()}
        for name, other in others.items():
            found |= {model.name: model for model in reported(config, other, networks[name][0])}
        ordered = ["base", *(f"{TEACHER}{name}" for name in taught(config))]
        return [found[name] for name in (*ordered, *(name for name in found if name not in ordered))]

    return dataclasses.replace(teaching, models=models, networks=networks)
