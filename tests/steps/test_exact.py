"""On policy the ratio of new to old density is exactly 1: rollout and update are passes of one compiled body.

With a rate of 0 every trained term of every update is on policy. OPD counts ratios that are not 1 as `clipped` where
the clip range is narrower than a unit in the last place, or all steps that move away are left out, GRPO as
`off_policy`. The network is Stable Diffusion 3's in little; on four simulated devices this file is run as a program.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.adapters.lora import adapter_shapes, stack_bank
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import GRPO, PolicyGradient, Rollouts
from fopd_jax.config.parse import override
from fopd_jax.config.schema import OPD, MeshShape, Objective
from fopd_jax.flow.rollout import rollout
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import bank_shardings, batch_sharding, parameter_shardings, replicated
from fopd_jax.stages import grpo_update, opd_update
from fopd_jax.stages.grpo import FlowGRPO
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.grpo.step import make_step
from fopd_jax.steps.opd.pieces import start, student_policy
from fopd_jax.steps.opd.replay import loss_and_gradient
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import init_state
from fopd_jax.steps.visits import Stored
from fopd_jax.worlds.prompt_stream import Batch
from tests.quick import environment

NETWORK = MMDiTConfig(
    depth=3, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT, STEPS = (4, 4, 3), 4
NARROW = 1e-12
STILL = optax.sgd(0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """`split`: updates a rollout, minibatches, parts of each; `form`: fused or replayed (OPD), host or one (GRPO)."""

    form: str
    dtype: str = "bfloat16"
    guidance: float = 4.5
    split: tuple[int, int, int] = (2, 2, 1)
    size: int = 12
    mesh: tuple[int, int, int] = (1, 1, 1)
    objective: str = "clip"


# ---- the two updates


def random(seed: int, shapes: Any, dtype: str = "float32") -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(0.3 * rng.normal(size=leaf.shape), dtype) for leaf in leaves])


def prompts(count: int, dtype: str) -> Conditioning:
    rng = np.random.default_rng(count)
    return Conditioning(*(jnp.asarray(rng.normal(size=(count, *shape)), dtype) for shape in ((4, 6), (8,))))


class Parts:
    """A network, its weights and prompts on the mesh of a case."""

    def __init__(self, case: Case) -> None:
        self.case, dtype = case, case.dtype
        self.mesh = make_mesh(MeshShape(*case.mesh), jax.devices()[: math.prod(case.mesh)])
        self.model = MMDiT(NETWORK, dtype=jnp.dtype(dtype))
        self.boxed = boxed_variables(self.model, LATENT)
        shapes = nn.unbox(self.boxed)
        self.adapter = adapter_shapes(self.config(OPD).adapter, shapes["params"], TARGETS)
        variables = {"params": random(9, shapes["params"], dtype), "constants": random(8, shapes["constants"])}
        self.variables = jax.device_put(variables, parameter_shardings(self.mesh, self.boxed))
        self.null = jax.device_put(prompts(1, dtype), replicated(self.mesh))
        self.conditioning = jax.device_put(prompts(case.size, dtype), batch_sharding(self.mesh))

    def config(self, kind: Any, **others: Any) -> Any:
        updates, minibatches, micro = self.case.split
        return override(kind(name="tiny"), {
            "batch_size": self.case.size, "model.dtype": self.case.dtype, "adapter.rank": 2, "adapter.alpha": 4.0,
            "guidance": self.case.guidance, "updates_per_rollout": updates, "minibatches": minibatches,
            "run.micro_batches": micro,
        } | others)  # fmt: skip

    def state(self, trained: Any, optimizer: Any) -> Any:
        places = jax.tree.map(lambda leaf: leaf.sharding, trained.state)
        return jax.device_put(init_state(random(5, self.adapter), optimizer, 0), places)


def opd(case: Case, optimizer: Any = STILL) -> tuple[Parts, Any, tuple[Any, Any, Any]]:
    """The update of distillation, and its arguments."""
    parts, scale = Parts(case), case.guidance
    spec = OPDSpec(
        Objective(clip=NARROW, mar_beta=0.05, surrogate=case.objective, divergence=0.0), SDE(0.7),
        flow_match_sigmas(STEPS), np.ones(STEPS, bool), LATENT,
        ("one", "two"), scale, (scale, scale, 1.0), *case.split,
    )  # fmt: skip
    update = opd_update.make_update(parts.config(OPD), parts.model, parts.boxed, spec, optimizer, parts.mesh)
    bank = stack_bank({str(k): random(k, parts.adapter, case.dtype) for k in range(3)})
    bank = jax.device_put(bank, bank_shardings(parts.mesh, parts.boxed["params"], bank))
    route = jax.device_put(np.arange(case.size, dtype=np.int32) % 2, batch_sharding(parts.mesh))
    state = parts.state(update.trained, optimizer)
    return parts, update, (Frozen(parts.variables, bank, parts.null), state, Batch(parts.conditioning, route))


def off_policy(case: Case, optimizer: Any = STILL) -> list[float]:
    """The share of ratios that are not exactly 1: of GRPO by update, of OPD over all of them."""
    if case.form in ("fused", "replayed"):
        _, update, arguments = opd(case, optimizer)
        assert update.pieces.spec.replays == (case.form == "replayed")
        metrics = update.step(*arguments)[1]
        assert float(metrics["grad_norm"]) > 0
        return [float(metrics["clipped"])]
    return _grpo(case, optimizer)


def _grpo(case: Case, optimizer: Any) -> list[float]:
    parts, size = Parts(case), case.size
    config = dataclasses.replace(
        parts.config(GRPO, images_per_prompt=3), rollouts=Rollouts(num_steps=STEPS),
        objective=PolicyGradient(case.objective, kl_beta=0.04),
    )  # fmt: skip
    spec = dataclasses.replace(grpo_update.make_spec(config, LATENT), rewards=("it",))
    update = grpo_update.make_update(config, parts.model, parts.boxed, spec, optimizer, parts.mesh)
    state, base = parts.state(update.trained, optimizer), Base(parts.variables, parts.null)
    credit = Credit(
        np.random.default_rng(0).normal(size=size).astype(np.float32), np.zeros((1, size), np.float32),
        np.ones((1, size), bool), np.arange(size) != 1, np.arange(size) == 2,
    )  # fmt: skip
    credit = put_replicated(credit, replicated(parts.mesh))
    if case.form == "one":
        places = update.trained.places, *[replicated(parts.mesh)] * 3
        step = make_step(update.pieces, optimizer, config.ema, lambda scorers, latents, prompts: (credit, ()), places)
        metrics = step(base, {}, state, parts.conditioning, {})[1]
        assert float(metrics["grad_norm"]) > 0
        return [float(metrics["off_policy"])]
    method, found = FlowGRPO(update, base, size), []
    state, rolled = method.roll_out(state, parts.conditioning)
    progress = (state, *rolled)
    for each in method._learning:
        progress, (totals, norm, _) = update.programs.go(base, progress, parts.conditioning, credit, each)
        found.append(float(totals["off_policy"].sum() / totals["weight"].sum()))
        assert float(norm) > 0 or not bool(each.lands)
    return found


# ---- one device


@pytest.fixture(autouse=True)
def as_runs_promote() -> Iterator[None]:
    """Tests refuse implicit promotion; a float32 adapter on a bfloat16 network asks for it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("form", ["replayed", "host"])
def test_every_ratio_is_one(form: str) -> None:
    assert set(off_policy(Case(form))) == {0.0}


def test_after_an_update_ratios_are_not_one() -> None:
    """Two updates on the whole batch: the first is on policy, the second off it everywhere."""
    first, second = off_policy(Case("host", split=(2, 1, 1)), optax.sgd(1e-2))
    assert first == 0
    assert second > 0.5


def test_two_programs_round_differently() -> None:
    """What the one body is for, and that the check can fail: a rollout by a program of its own, then the loss."""
    parts, update, (frozen, state, batch) = opd(Case("replayed"))
    pieces = update.pieces

    @jax.jit
    def drawn(frozen: Frozen, state: Any, batch: Batch) -> Stored:
        x, keys = start(pieces.spec, state, parts.case.size)
        policy = student_policy(pieces, frozen, state.trained, batch.conditioning)
        found = rollout(policy, pieces.spec.transition, pieces.spec.levels(0, STEPS - 1), x, keys)
        return Stored(found.latents[:-1], found.latents[1:], found.log_probs)

    stored = drawn(frozen, state, batch)
    loss = jax.jit(lambda frozen, state, batch, stored: loss_and_gradient(pieces, frozen, state.trained, batch, stored))
    totals = loss(frozen, state, batch, stored)[2]
    share = float(totals["clipped"].sum() / totals["weight"].sum())
    print(f"two programs: {share:.2f} of all ratios are not 1")
    assert share > 0


# ---- every form, on one device and on four


def combinations() -> list[Case]:
    """Each form in both precisions with and without guidance; and every split, batch and mesh in bfloat16."""
    forms = ("fused", "replayed", "host", "one")
    whole = (1, 1, 1)

    def split(form: str) -> tuple[int, int, int]:
        return whole if form == "fused" else (2, 2, 1)

    found = [Case(form, dtype, scale, split(form)) for form in forms for dtype in ("bfloat16", "float32")
             for scale in (1.0, 4.5)]  # fmt: skip
    splits = ((3, 3, 1), (1, 1, 2), (4, 2, 3))
    found += [Case(form, split=each) for form in forms[1:] for each in splits]
    meshes = ((2, 2, 1), (1, 2, 2), (2, 1, 2))
    found += [Case(form, split=split(form), size=24, mesh=mesh) for form in forms for mesh in meshes]
    found += [Case("replayed", split=(2, 1, 3), size=36, mesh=(2, 2, 1)), Case("host", split=(3, 3, 2), size=24)]
    found += [Case("replayed", size=24, mesh=(2, 2, 1), objective="dppo")]
    return found + [Case("host", objective=name, mesh=(2, 2, 1), size=8) for name in ("guard", "dppo")]


def run(cases: Sequence[int]) -> dict[str, Any]:
    """This file, run as a program on four simulated devices, as compilers are set by default."""
    command = [sys.executable, __file__, *map(str, cases)]
    surroundings = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_so_it_is_in_every_form_precision_split_and_mesh() -> None:
    found = run(range(len(combinations())))
    assert found == {
        repr(case): [0.0] * len(shares) for case, shares in zip(combinations(), found.values(), strict=True)
    }


if __name__ == "__main__":
    chosen = [combinations()[int(number)] for number in sys.argv[1:]]
    print(json.dumps({repr(case): off_policy(case) for case in chosen}))
