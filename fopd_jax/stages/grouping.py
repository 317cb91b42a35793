"""Which of several networks each task's samples ask, and what follows: slots, the places of draws, FLOPs by network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fopd_jax.backbones.registry import family_of, find_preset
from fopd_jax.config.schema import OPD, RoutedTask
from fopd_jax.config.stages import taught
from fopd_jax.parallel.sharding import AnyMesh, batch_ways
from fopd_jax.policy.groups import GroupedPanel, Slots
from fopd_jax.policy.panel import Questions
from fopd_jax.stages.coordinates import skills
from fopd_jax.stages.routing import asked
from fopd_jax.stages.teachers import asks_base
from fopd_jax.steps.opd.spec import OPDSpec
from fopd_jax.steps.opd.targets import members_of
from fopd_jax.tasks.sampling import Curriculum
from fopd_jax.worlds.placement import Placement, Split, most_a_block, placement_of


def own_adapters(config: OPD) -> tuple[bool, ...]:
    """Of the entries that are on the student's base, in their order, which are adapters on it."""
    own = (task for task in map(config.tasks.__getitem__, taught(config)) if not task.network)
    found = [bool(task.teacher) for task in own]
    if config.objective.mar_beta > 0 and not config.anchor.network:
        found.append(bool(config.anchor.adapter))
    return (*found, *([False] * asks_base(config)))


def split_of(config: OPD, spec: OPDSpec, mesh: AnyMesh) -> Split:
    """How a batch is split; raises ValueError where it is not."""
    return Split(config.batch_size, config.images_per_prompt, batch_ways(mesh), spec.parts)


def asked_by(config: OPD, spec: OPDSpec) -> Int[np.ndarray, "tasks groups"]:
    """How many questions a sample of each task asks the groups of entries that `policy.groups` asks together.

    Where the task does not say it, the most that any may ask: a classifier or coordinates may send a prompt to anyone.
    """
    groups = [set(group) for each in members_of(spec) for group in each.groups]
    found = np.zeros((len(config.tasks), len(groups)), np.int64)
    anyone = config.routing.method == "classifier" or bool(skills(config))
    for row, (name, task) in zip(found, config.tasks.items(), strict=True):
        entries = set(range(len(spec.teachers))) if anyone else _entries(spec, name, task)
        most = asked(config) if config.routing.method == "classifier" else len(entries)
        row += [min(len(entries & group), most) for group in groups]
        if spec.table.base is not None and (spec.asks_base or any(spec.extrapolation[entry] for entry in entries)):
            row += [spec.table.base in group for group in groups]
    return np.broadcast_to(found.max(0), found.shape).copy() if config.routing.wrong else found


def _entries(spec: OPDSpec, name: str, task: RoutedTask) -> set[int]:
    """Of the teachers of a task's prompts."""
    weighed = {**task.mix, **{each: w for each, w in task.noisy_mix.items() if w}} or {name: 1.0}
    return {spec.teachers.index(each) for each, weight in weighed.items() if weight and each in spec.teachers}


def slots_of(config: OPD, spec: OPDSpec, mesh: AnyMesh) -> Slots | None:
    """Of several networks, for a batch that is split evenly."""
    rows = batch_ways(mesh) * spec.parts
    if not spec.grouped or config.batch_size % rows or config.batch_size % config.images_per_prompt:
        return None
    split = split_of(config, spec, mesh)
    curriculum = Curriculum.of(list(config.tasks.values()), config.alternate)
    most = curriculum.most(config.batch_size // config.images_per_prompt)
    return Slots(split.samples, most_a_block(split, asked_by(config, spec), most.tolist()))


def placement(config: OPD, spec: OPDSpec, mesh: AnyMesh) -> Placement | None:
    """Where draws go for those slots to suffice."""
    return None if spec.slots is None else placement_of(split_of(config, spec, mesh), asked_by(config, spec))


def check_slots(config: OPD, spec: OPDSpec, mesh: AnyMesh, tasks: Sequence[str]) -> None:
    """Hold a step's draws, by task, to the slots that were counted for them; a plan does so before anything is loaded.

    Raises:
      ValueError: a device is asked for more, which no placement should do.
    """
    if spec.slots is None:
        return
    split, asks, names = split_of(config, spec, mesh), asked_by(config, spec), list(config.tasks)
    found = np.zeros((split.ways * split.parts, asks.shape[1]), np.int64)
    numbers = np.asarray([names.index(task) for task in tasks])
    np.add.at(found, split.blocks(), asks[numbers][:, None])
    if (found > spec.slots.questions).any():
        most = tuple(found.max(0).tolist())
        raise ValueError(f"tasks: a device is asked {most} questions, but has slots for {spec.slots.questions}")


def asked_flops(
    config: OPD, spec: OPDSpec, text_tokens: int, model: Any, others: Mapping[str, Any]
) -> dict[str, float]:
    """FLOPs of what one timestep asks of each network, '' being the student's base: of slots, filled or not."""
    slots = spec.slots
    ways = 1 if slots is None else config.batch_size // (slots.samples * spec.parts)
    size = config.batch_size // spec.parts
    questions = (len(spec.teachers) if skills(config) else asked(config)) + (spec.table.base is not None)
    targets = [Questions(np.zeros((size, questions), np.int32))]
    if spec.table.anchor is not None:
        anchor = np.zeros((size // spec.anchor_every, 1), np.int32)
        targets.append(Questions(anchor, every=spec.anchor_every, entry=spec.table.anchor))
    panel = GroupedPanel(members_of(spec), spec.table, None, ways, slots)
    rows = panel.rows(targets, size, apart=spec.apart)
    found = {}
    for name, count in zip(spec.members, rows, strict=True):
        family, shape = find_preset(config.networks[name].preset) if name in config.networks else (None, None)
        module = others.get(name, model)
        if name in others or family is None:
            family, shape = family_of(module), module.config
        tokens = family.tokens(shape, spec.latent_shape, text_tokens)
        adapted = _adapted(config, name)
        flops = family.flops(shape, tokens, config.adapter if adapted else None, "none")
        found[name] = float(count * ways * spec.parts) * flops.forward
    return found


def _adapted(config: OPD, name: str) -> bool:
    """Whether some of a network's entries are adapters on it."""
    if not name:
        return not config.whole_teachers and any(own_adapters(config))
    files = [task.teacher for task in config.tasks.values() if task.network == name]
    return any(files) or (config.anchor.network == name and bool(config.anchor.adapter))
