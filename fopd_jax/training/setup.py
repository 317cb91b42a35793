"""What every stage builds from a config before its own step: world, network, base weights, optimizer, evaluation."""

import dataclasses
from importlib import resources
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from fopd_jax.adapters import LoRAConfig, check_like
from fopd_jax.conditioning import Conditioning
from fopd_jax.config import Config
from fopd_jax.evaluation.suite import EvalSet, Sampler, make_sampler
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.interop.safetensors import check_preset, load_tree
from fopd_jax.miniature.world import make_world
from fopd_jax.models.attention import check_attention_impl
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.policy import Tree, Velocity, make_velocity
from fopd_jax.tasks.task import World, select_tasks
from fopd_jax.training.loop import Cadence
from fopd_jax.training.state import EMA, make_optimizer

WORLDS = {"miniature": make_world}
DTYPES = ("float32", "bfloat16")
PACKAGED = "packaged:"


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that do not depend on the stage."""

    world: World
    model: MMDiT
    velocity: Velocity
    sampler: Sampler
    eval_set: EvalSet
    optimizer: optax.GradientTransformation
    ema: EMA
    cadence: Cadence


def make_setup(config: Config) -> Setup:
    """Check the shared fields and build from them.

    Raises:
      ValueError: a field is out of range or names something that does not exist; before anything is compiled.
    """
    cadence = Cadence(config.steps, config.log_every, config.checkpoint_every, config.eval_every)
    if config.keep_checkpoints < 1:
        raise ValueError(f"keep_checkpoints: found {config.keep_checkpoints}, expected at least 1")
    world, model = _make_world(config.preset), make_model(config)
    velocity = make_velocity(model)
    evaluation, opt = config.eval, config.optimizer
    if evaluation.samples < 1 or evaluation.batch_size < 1:
        raise ValueError(
            f"eval.samples, eval.batch_size: found {evaluation.samples}, {evaluation.batch_size}, expected ≥ 1"
        )
    null = null_conditioning(world) if evaluation.guidance != 1 else None
    sigmas = flow_match_sigmas(evaluation.num_steps, config.shift)
    sampler = make_sampler(velocity, sigmas, null, evaluation.guidance, world.latent_shape)
    return Setup(
        world=world,
        model=model,
        velocity=velocity,
        sampler=sampler,
        eval_set=EvalSet(
            select_tasks(world, evaluation.tasks), evaluation.samples, evaluation.batch_size, evaluation.seed
        ),
        optimizer=make_optimizer(opt.learning_rate, opt.warmup, tuple(opt.betas), opt.weight_decay, opt.clip_norm),
        ema=EMA(config.ema.decay, config.ema.every),
        cadence=cadence,
    )


def _make_world(preset: str) -> World:
    if preset not in WORLDS:
        raise ValueError(f"preset: found {preset!r}; training is available for {tuple(WORLDS)}")
    return WORLDS[preset]()


def make_model(config: Config) -> MMDiT:
    check_attention_impl(config.attention)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: found {config.dtype!r}, expected one of {DTYPES}")
    return MMDiT(PRESETS[config.preset], config.attention, jnp.dtype(config.dtype))


def null_conditioning(world: World) -> Conditioning:
    """The empty prompt, one row."""
    return jax.tree.map(jnp.asarray, world.encode([""]))


def abstract_variables(model: MMDiT, latent_shape: tuple[int, int, int]) -> Tree:
    """Shapes of `params` and `constants`, without computing anything."""
    return jax.eval_shape(lambda: init_variables(model, latent_shape, 0))


def init_variables(model: MMDiT, latent_shape: tuple[int, int, int], seed: int) -> Tree:
    """Random weights and the position table for one latent shape."""
    c = model.config
    inputs = jnp.zeros((1, *latent_shape)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim)), jnp.zeros((1, c.pooled_dim))
    return nn.unbox(model.init(jax.random.key(seed), *inputs))


def weight_path(name: str) -> Path:
    """A file, or `packaged:NAME` for one inside the package."""
    if name.startswith(PACKAGED):
        return Path(str(resources.files("fopd_jax.miniature") / "assets" / name.removeprefix(PACKAGED)))
    return Path(name)


def load_base(config: Config, setup: Setup) -> Tree:
    """The frozen base named by `config.base`.

    Raises:
      ValueError: the file is missing or damaged, of another preset, or misses a tensor; names the file.
    """
    path = weight_path(config.base)
    variables, metadata = load_tree(path)
    check_preset(path, metadata, config.preset)
    check_like(
        str(path), variables, f"preset {config.preset}", abstract_variables(setup.model, setup.world.latent_shape)
    )
    return jax.tree.map(jnp.asarray, variables)


def lora_config(config: Config) -> LoRAConfig:
    return LoRAConfig(config.adapter.rank, config.adapter.alpha, tuple(config.adapter.targets))


def print_overview(title: str, trained: Tree, frozen: Tree) -> None:
    """What trains, parameter by parameter, and how much is frozen."""
    count = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    print(f"{title}\n{parameter_overview.get_parameter_overview(trained, include_stats=False)}\nfrozen: {count:,}")
