"""What a run does, in words: the lines that it starts with, and those of `--check`, which then stops."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax

from fopd_jax.adapters.lora import rank_of
from fopd_jax.config.identity import config_hash
from fopd_jax.config.learning import GRPO, ForwardRL, Reinforced, RewardedTask
from fopd_jax.config.schema import NOISELESS, OPD, Config
from fopd_jax.evaluation.settings import other_settings
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.performance.host import GIB
from fopd_jax.performance.weights import shard_bytes
from fopd_jax.running.checkpoints import newest_step
from fopd_jax.stages.cold_start import describe_start, source_of
from fopd_jax.stages.opd_update import scale_of
from fopd_jax.stages.plan import Plan
from fopd_jax.tasks.sampling import Curriculum

_BYTES = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def describe_plan(plan: Plan, config: Config, workdir: Path) -> str:
    """What a run of a plan would do, a subject a line."""
    rows = [
        *_what(plan, config, workdir),
        ("prompts", _prompts(plan)),
        *(_learning(config) if isinstance(config, Reinforced) else []),
        ("to encode", _encoding(plan)),
        ("updates", _updates(plan, config)),
        ("memory", _memory(plan)),
        ("evaluation", _evaluation(plan, config)),
    ]
    return "\n".join([_aligned(rows), "all is well: nothing was written"])


def describe_run(plan: Plan, config: Config, workdir: Path) -> str:
    """Of the same what a run starts with: what is known at once."""
    return _aligned([*_what(plan, config, workdir), ("updates", _updates(plan, config))])


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _what(plan: Plan, config: Config, workdir: Path) -> list[tuple[str, str]]:
    return [
        ("run", f"{config.name}, stage {config.stage}, config {config_hash(config)}"),
        ("workdir", f"{workdir}, {_where(config, workdir)}"),
        ("devices", _devices(plan)),
        ("network", _network(plan, config)),
        ("trains", _trains(plan, config)),
        *([("teachers", _teachers(config))] if isinstance(config, OPD) else []),
        *([("beside", told)] if (told := _beside(config)) else []),
        *plan.told,
        *([("curriculum", told)] if (told := _curriculum(config)) else []),
    ]


def _where(config: Config, workdir: Path) -> str:
    step = newest_step(workdir)
    if step == 0:
        return "from the beginning"
    return "finished already" if step >= config.run.steps else f"continues at step {step}"


def _devices(plan: Plan) -> str:
    mesh = plan.setup.pipeline.mesh
    kind = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {length}" for name, length in mesh.shape.items())
    processes = jax.process_count()
    return f"{mesh.size} of kind {kind!r} in {processes} process{'es' if processes > 1 else ''}, mesh {axes}"


def _network(plan: Plan, config: Config) -> str:
    pipeline, run = plan.setup.pipeline, config.run
    base = config.model.path or "random weights"
    return f"{pipeline.preset} from {base}, {config.model.dtype}, attention {pipeline.model.impl}, remat {run.remat}"


def _trains(plan: Plan, config: Config) -> str:
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.trained.state.trained))
    what = (
        "all of the network"
        if config.trained == "params"
        else f"an adapter of rank {rank_of(plan.trained.state.trained)}"
    )
    start = "the base" if config.model.path else "random weights"
    if isinstance(config, OPD):
        start = describe_start(config.cold_start) or start
    if isinstance(config, Reinforced):
        start = source_of(config.start) or start
    return f"{what}, {count:,} numbers, from {start}"


def _teachers(config: OPD) -> str:
    tasks = [
        f"{name} ← {_on(task.network, task.teacher)} (weight {task.weight:g}, guidance {scale_of(task.guidance):g})"
        if task.teacher or task.network
        else f"{name} ← whom the classifier finds (weight {task.weight:g})"
        for name, task in config.tasks.items()
    ]
    weights = _on(config.anchor.network, config.anchor.adapter) or "the base"
    anchor = f"{weights} (guidance {scale_of(config.anchor.guidance):g})"
    if config.anchor.moves != "none":
        anchor = f"the student's own average ({config.anchor.moves})"
    finer = config.sampler.teacher_steps
    way = [f"asked along {finer} steps of their own for one of the student's"] if finer > 1 else []
    return ", ".join([*tasks, f"anchor {config.anchor.name} ← {anchor}", *way])


def _beside(config: Config) -> str:
    """What is matched beside the teachers."""
    if not isinstance(config, OPD) or not config.offline.weight:
        return ""
    offline = config.offline
    return f"flow matching of {offline.batch_size} images of {', '.join(offline.tasks)} (weight {offline.weight:g})"


def _on(network: str, weights: str) -> str:
    """A teacher that is on another network than the base, or is it."""
    return f"{weights} on {network}" if network and weights else network or weights


def _curriculum(config: Config) -> str:
    """Turns, and the weights from each change of them on, where there are any."""
    if not isinstance(config, OPD | Reinforced):
        return ""
    names, (_, *later) = list(config.tasks), Curriculum.of(list(config.tasks.values())).stretches
    turns = [f"each step of one task, by turns of {config.alternate}"] if config.alternate else []
    stretches = (
        f"from step {start} on {', '.join(f'{n} {w:g}' for n, w in zip(names, shares.weights, strict=True))}"
        for start, shares in later
    )
    return "; ".join([*turns, *stretches])


def _prompts(plan: Plan) -> str:
    tasks = plan.setup.pipeline.world.tasks.values()
    return ", ".join(f"{task.name}: {len(task.train):,} to train on, {len(task.test):,} held out" for task in tasks)


def _learning(config: Reinforced) -> list[tuple[str, str]]:
    """By which rewards, from how many images, with which loss."""
    tasks = ", ".join(f"{name} (share {task.weight:g}) by {_sum(task)}" for name, task in config.tasks.items())
    ours, prompts = config.rollouts, config.batch_size // config.images_per_prompt
    noise = f" of noise {ours.noise_level:g}" if ours.transition not in NOISELESS else ""
    images = f"{prompts} prompts x {config.images_per_prompt} images = {config.batch_size:,} a step"
    how = f"{ours.num_steps} steps of {ours.transition}{noise}, {_guided(config.guidance)}"
    late = ", made while rewards score the one before" if config.lag else ""
    count, size = config.updates_per_rollout, config.batch_size // config.minibatches
    updates = f"{count} update{'s' if count > 1 else ''} a rollout of {size:,} images"
    return [("rewards", tasks), ("rollouts", f"{images}, {how}{late}"), ("learning", f"{updates}, {_loss(config)}")]


def _sum(task: RewardedTask) -> str:
    """A task's rewards: those with a weight, then those that are only looked at."""
    trained = [f"{weight:g} {name}" if weight != 1 else name for name, weight in task.rewards.items() if weight]
    watched = [name for name, weight in task.rewards.items() if not weight]
    return " + ".join(trained) + (f" (and {', '.join(watched)} logged)" if watched else "")


def _loss(config: Reinforced) -> str:
    """Which one, and on what of each image."""
    if not isinstance(config, GRPO | ForwardRL):
        return config.stage
    held = f"held to the base by {beta:g}" if (beta := config.objective.kl_beta) else "no reference"
    if isinstance(config, ForwardRL):
        levels = f"{config.levels.times or 'all'} noise levels of each ({config.levels.distribution})"
        return f"{config.objective.name} at {levels}, {held}"
    window, last = config.window, config.rollouts.num_steps - 1
    start, stop = window.within or (0, last + 1)
    size = min(window.size or stop - start, last - start)
    moves = {"none": f"from step {start} on", "slide": f"sliding within steps {start} to {min(stop, last) - 1}"}
    where = moves.get(window.moves, f"anywhere within steps {start} to {min(stop, last) - 1}")
    return f"{config.objective.name} at {size} of {last + 1} steps, {where}, {held}"


def _guided(scale: float) -> str:
    return "no guidance" if scale == 1 else f"guidance {scale:g}"


def _encoding(plan: Plan) -> str:
    prompts = list(dict.fromkeys(plan.prompts()))
    missing = plan.setup.pipeline.world.missing(prompts)
    return f"{len(missing):,} of the {len(prompts):,} prompts that the run asks for"


def _updates(plan: Plan, config: Config) -> str:
    cost, mesh = plan.cost(), plan.setup.pipeline.mesh
    samples = f"{config.batch_size} samples, {config.batch_size // batch_ways(mesh)} a device"
    each, whole = (_spell(cost.model * count, _FLOPS) for count in (1, config.run.steps))
    return f"{config.run.steps:,} of {samples}; {each} each, {whole} in all, by arithmetic"


def _memory(plan: Plan) -> str:
    held = {name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in plan.held().items()}
    parts = ", ".join(f"{name} {_spell(size, _BYTES)}" for name, size in held.items())
    total = _spell(sum(held.values()), _BYTES)
    return f"estimate: {total} a device are held ({parts}); activations come on top (see compile_for)"


def _evaluation(plan: Plan, config: Config) -> str:
    evaluation, every = config.eval, config.run.eval_every
    how = f"{evaluation.num_steps} steps of {evaluation.transition}, guidance {evaluation.guidance:g}"
    measured, skills = len(plan.setup.eval_set.scored()), ", ".join(plan.setup.eval_set.skills())
    scored = (
        f"{evaluation.samples} images of {measured} tasks by {skills}"
        if measured
        else "pictures alone, nothing scores the tasks"
    )
    others = " / ".join(other_settings(evaluation))
    also = f"; the report also at {others}" if others else ""
    also += "; its teachers under their own guidance" if evaluation.teacher_guidance == "own" else ""
    return (f"every {every} updates: {scored}; {how}" if every else f"none but the report; {how}") + also


def _spell(number: float | int, units: tuple[tuple[float | int, str], ...]) -> str:
    size, unit = next((each for each in units if number >= each[0]), units[-1])
    return f"{number / size:.3g} {unit}"
