"""The formula against XLA's own count, on a shallow network whose layers are unrolled; and against published figures.

XLA counts norms, softmax and the rest as well: at SD3.5-Medium's width that is half a percent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.record import Tokens
from fopd_jax.backbones.sd3.flops import forward_flops, pass_flops
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.performance.flops import Schedule, update_flops

MEDIUM = PRESETS["sd35_medium"]
SHALLOW = dataclasses.replace(MEDIUM, depth=3, dual_layers=1)
LATENT, TEXT = (64, 64, 16), 205
TOKENS = Tokens(1024, TEXT)
TOLERANCE = 0.01


def _arguments(lora: LoRAConfig | None) -> tuple[Any, Any]:
    """Variables and adapter as shapes."""
    variables = nn.unbox(boxed_variables(MMDiT(SHALLOW, scan_layers=False), LATENT))
    if lora is None:
        return variables, {}
    return variables, jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), variables["params"], lora, TARGETS)
    ).weights


def _counted(remat: Any, lora: LoRAConfig | None, wrap: Callable[[Callable[..., jax.Array]], Any]) -> float:
    """XLA's count for one sample of what `wrap` makes of `(params, adapter, …) → sum of v`; nothing is compiled."""
    model = MMDiT(SHALLOW, scan_layers=False, remat=remat)
    variables, adapter = _arguments(lora)

    def total(params: Any, adapter: Any, constants: Any, *inputs: jax.Array) -> jax.Array:
        v: Any = model.apply({"params": params, "constants": constants, "adapter": adapter}, *inputs)
        return v.sum()

    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (LATENT, (), (TEXT, 4096), (2048,))]
    lowered = jax.jit(wrap(total)).lower(variables["params"], adapter, variables["constants"], *inputs)
    cost: Any = lowered.cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize(
    "lora", [None, LoRAConfig(), LoRAConfig(rank=256, targets=("attn", "attn2", "mlp"))], ids=["base", "attn", "all"]
)
def test_a_forward(lora: LoRAConfig | None):
    assert forward_flops(SHALLOW, TOKENS, lora) == pytest.approx(_counted("none", lora, lambda f: f), rel=TOLERANCE)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("lora", [LoRAConfig(), None], ids=["adapter", "network"])
def test_a_gradient_and_what_is_recomputed_for_it(lora: LoRAConfig | None, remat: Any):
    what = 0 if lora is None else 1
    found = _counted(remat, lora, lambda f: jax.value_and_grad(f, argnums=what))
    each = pass_flops(SHALLOW, TOKENS, lora, remat)
    assert each.forward + each.backward + each.recomputed == pytest.approx(found, rel=TOLERANCE)
    assert (each.recomputed > 0) == (remat != "none")


@pytest.mark.parametrize("remat", ["attention", "dots"])
@pytest.mark.parametrize(
    ("lora", "constant"),
    [(LoRAConfig(), 1), (LoRAConfig(targets=("attn", "attn2")), 0), (None, 0)],
    ids=["attn", "both", "network"],
)
def test_what_is_recomputed_where_attentions_are_kept(lora: LoRAConfig | None, constant: int, remat: Any):
    """XLA's attention makes its scores again, half of its products; a flash kernel, which is what counts, does not.

    `constant`: image attentions before which nothing trains, whose scores nobody needs.
    """
    what = 0 if lora is None else 1
    found = _counted(remat, lora, lambda f: jax.value_and_grad(f, argnums=what))
    each = pass_flops(SHALLOW, TOKENS, lora, remat)
    joint, dual = 2 * SHALLOW.width * (TOKENS.image + TOKENS.text) ** 2, 2 * SHALLOW.width * TOKENS.image**2
    scores = (SHALLOW.depth - 1) * joint + (SHALLOW.dual_layers - constant) * dual
    assert each.forward + each.backward + each.recomputed == pytest.approx(found - scores, rel=TOLERANCE)
    assert (each.recomputed > 0) == (remat == "attention")


def test_a_gradient_of_adapters_everywhere():
    lora = LoRAConfig(rank=64, targets=("attn", "attn2", "mlp"))
    each = pass_flops(SHALLOW, TOKENS, lora, "none")
    found = _counted("none", lora, lambda f: jax.value_and_grad(f, argnums=1))
    assert each.forward + each.backward == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize(("image", "expected"), [(1024, 2.22e12), (4096, 10.9e12)])
def test_published_figures_of_sd35_medium(image: int, expected: float):
    assert forward_flops(MEDIUM, Tokens(image, 77 + 128)) == pytest.approx(expected, rel=TOLERANCE)


def test_a_routed_adapter_is_one_percent_of_a_forward():
    share = forward_flops(MEDIUM, TOKENS, LoRAConfig()) / forward_flops(MEDIUM, TOKENS) - 1
    assert share == pytest.approx(0.0104, rel=0.01)


def test_an_update_is_the_sum_of_its_phases():
    """T = 10 with guidance: each of 9 trained steps asks teacher and anchor, and differentiates the student."""
    each, schedule = pass_flops(MEDIUM, TOKENS, LoRAConfig(), "full"), Schedule(4, 9, True, True, 2)
    found = update_flops(each, each.forward, schedule)
    assert found.teachers == 4 * 9 * 4 * each.forward
    assert (found.rollout, found.forward, found.backward) == (0, 4 * 9 * 2 * each.forward, 4 * 9 * 2 * each.backward)
    assert found.model == found.teachers + found.forward + found.backward
    assert found.hardware == found.model + 4 * 9 * 2 * each.recomputed


def test_cheaper_updates_leave_out_what_they_say():
    """Trained on 3 of 9 timesteps after 6 sampled ones; an anchor asked of every third sample."""
    each = pass_flops(MEDIUM, TOKENS, LoRAConfig(), "none")
    late = update_flops(each, each.forward, Schedule(4, 3, True, False, 2, only_sampled=6))
    assert (late.rollout, late.forward) == (4 * 6 * 2 * each.forward, 4 * 3 * 2 * each.forward)
    third = update_flops(each, each.forward, Schedule(3, 9, True, False, 1 + 1 / 3))
    assert third.teachers == pytest.approx(9 * (3 + 1) * each.forward)


def test_a_replayed_update_rolls_out_first():
    each = pass_flops(MEDIUM, TOKENS, LoRAConfig(), "none")
    fused = update_flops(each, each.forward, Schedule(4, 9, False, False, 1))
    replayed = update_flops(each, each.forward, Schedule(4, 9, False, False, 1, 2, 2))
    assert replayed.model == pytest.approx(fused.model + fused.forward)
    assert replayed.teachers == fused.teachers
