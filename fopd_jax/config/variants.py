"""The same config in other sizes: to compile, to time, or to see it run in a minute."""

from dataclasses import replace

from fopd_jax.config.learning import GRPO, ForwardRL, NoiseWindow, Reinforced, RewardedTask
from fopd_jax.config.parse import AnyConfig, override, resolve, thaw
from fopd_jax.config.schema import OPD, FlowMatching, Pairs, RoutedTask
from fopd_jax.config.stages import is_mixed

SMOKE = "smoke"
_SKILLS = ("text", "composition")


def with_batch(config: AnyConfig, batch_size: int) -> AnyConfig:
    """The config at another batch size."""
    return resolve(override(config, {"batch_size": batch_size}))


def with_teachers(config: OPD, count: int) -> OPD:
    """The config with so many tasks, its own in turn, for a bank of any size."""
    changed: OPD = thaw(config)
    tasks = list(changed.tasks.values())
    changed.tasks = {f"task{k}": thaw(tasks[k % len(tasks)]) for k in range(count)}
    return resolve(changed)


def split_variant(variant: str, known: tuple[str, ...] = ()) -> tuple[str, bool]:
    """`CHOICE`, `smoke` or `CHOICE:smoke` → the choice (the first one by default) and whether to shrink.

    Raises:
      ValueError: it is something else; names it and what there is.
    """
    *choices, last = variant.split(":")
    choices = choices if last == SMOKE else [*choices, last]
    choice = choices[0] if choices and choices[0] else (known or ("",))[0]
    if len(choices) > 1 or choice not in (known or ("",)):
        raise ValueError(f"variant: found {variant!r}, expected {' or '.join((*known, SMOKE))}, or CHOICE:{SMOKE}")
    return choice, last == SMOKE


def smoke(config: AnyConfig) -> AnyConfig:
    """A config as small as it can be and still run through everything, in a minute on two cores, with no files.

    Recipe and stage stay; the network, its world and the teachers are the embedded miniature's.
    """
    config.name = f"{config.name}_smoke"
    config.model.preset, config.model.path, config.model.dtype = "miniature", "packaged:base.safetensors", "float32"
    config.batch_size = 8
    config.eval.samples = config.eval.batch_size = config.eval.final_samples = 8
    config.eval.num_steps, config.eval.tasks = 4, ()
    run = config.run
    run.steps, run.log_every, run.checkpoint_every, run.eval_every = 2, 1, 2, 2
    run.attention, run.remat, run.micro_batches = "xla", "none", 1
    config.rewards, run.servers = {}, {}
    if isinstance(config, OPD):
        _shrink_teaching(config)
    elif isinstance(config, Reinforced):
        _shrink_learning(config)
    elif isinstance(config, FlowMatching):
        config.target = "data"
        shrunk = {"images": "", "test": "", "rewards": {}}
        config.tasks = {name: replace(config.tasks.get(name, Pairs()), **shrunk) for name in _SKILLS}
    return config


def _shrink_teaching(config: OPD) -> None:
    """The packaged teachers in place of the config's, at as many sampler steps as it takes to train two of them."""
    beyond = next((task.extrapolation for task in config.tasks.values()), 0.0)
    config.tasks = {
        name: RoutedTask(teacher=f"packaged:teacher_{name}.safetensors", guidance=1.0, extrapolation=beyond)
        for name in _SKILLS
    }
    config.networks = {}
    packaged = {"name": "quality", "adapter": "packaged:teacher_quality.safetensors", "guidance": 1.0, "network": ""}
    config.anchor = replace(config.anchor, **packaged)
    if config.offline.weight:
        config.offline.batch_size = 8
        config.offline.tasks = {name: Pairs() for name in _SKILLS}
    if config.objective.match == "conditional":  # teachers without guidance leave none to fold in
        config.guidance = min(config.guidance, 1.0)
    config.cold_start.weights = {}
    sampler = config.sampler
    sampler.num_steps, config.images_per_prompt = 3, min(config.images_per_prompt, 4)
    sampler.window, sampler.trained = sampler.window and (0, 1), sampler.trained and (1, 2)
    config.health.fixed_states = min(config.health.fixed_states, 2)
    if is_mixed(config):
        config.images_per_prompt = 4
        for name, task in config.tasks.items():
            task.rewards = {name: 1.0}


def _shrink_learning(config: Reinforced) -> None:
    """The miniature's own rewards in place of the config's, at as few steps as it takes to train two of them."""
    config.tasks = {name: RewardedTask(rewards={name: 1.0}) for name in _SKILLS}
    config.images_per_prompt, config.rollouts.num_steps = 4, 3
    if isinstance(config, GRPO):
        config.window = NoiseWindow()
    elif isinstance(config, ForwardRL):
        config.levels.within, config.levels.times = None, min(config.levels.times, 2)
