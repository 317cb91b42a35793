"""Updates whose teachers are several networks: what a step learns of them, and what a question without a slot does.

Against PyTorch as in `test_torch.py`, whose tolerances hold: a wider and deeper network without dual attention teaches
the samples of one task. The rest is on the two-layer network of `network.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fopd_jax.adapters.lora import stack_bank
from fopd_jax.config.schema import EMA, Objective
from fopd_jax.flow.schedule import sublevels
from fopd_jax.interop.sd3.diffusers import transformer_from_diffusers
from fopd_jax.models.mmdit import MMDiT
from fopd_jax.policy.groups import Slots
from fopd_jax.policy.velocity import make_velocity as bind
from fopd_jax.steps.opd.anchor import following
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import STACK, Frozen
from fopd_jax.steps.opd.step import make_step
from fopd_jax.steps.opd.targets import UNANSWERED, panel_of
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd import test_torch as pytorch
from tests.steps.opd.network import (
    BANK,
    CLIPPED,
    DIRECT,
    GUIDED,
    SGD,
    SIGMAS,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    prompts,
    quick,
    variables,
)

LARGE = dataclasses.replace(pytorch.CONFIG, depth=4, num_heads=3, dual_layers=0)


@functools.cache
def large_oracle() -> SD3Transformer2DModel:
    torch.manual_seed(1)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=LARGE.depth, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=6, caption_projection_dim=24, pooled_projection_dim=5,
        pos_embed_max_size=4, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            scale = 1.0 if tensor.ndim == 3 else 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            drawn = torch.tensor(pytorch.normal(500 + seed, *tensor.shape))
            tensor.copy_(scale * drawn + (1.0 if ".norm_" in name else 0.0))
    return model.double()


def large_variables() -> Any:
    state = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in large_oracle().state_dict().items()}
    return jax.tree.map(jnp.asarray, transformer_from_diffusers(state, LARGE, rows=4, columns=4))


def torch_teachers(frozen: Any, x: torch.Tensor, sigma: float, text: Any) -> list[torch.Tensor]:
    """Large in place of the second teacher."""
    own = {name: pytorch.torch_velocity(frozen[name], x, sigma, text, scale)
           for name, scale in zip(pytorch.BANK, pytorch.TEACHER_GUIDANCE, strict=True)}  # fmt: skip
    small = pytorch.oracle
    try:
        pytorch.oracle = large_oracle
        own["counting"] = pytorch.torch_velocity(
            dict(large_oracle().state_dict()), x, sigma, text, pytorch.TEACHER_GUIDANCE[1]
        )
    finally:
        pytorch.oracle = small
    each = list(own.values())
    return [torch.stack([each[k][i] for i, k in enumerate(pytorch.ROUTE)]).detach(), own["anchor"].detach()]


def test_loss_and_gradient_under_a_larger_teacher_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective("direct", mar_beta=0.5)
    frozen, state, batch = pytorch.our_inputs()
    bank = stack_bank({name: pytorch.adapter(pytorch.BANK[name]) for name in ("ocr", "anchor")})
    frozen = Frozen(frozen.variables, bank, frozen.null, networks={"large": (large_variables(), {})})
    pieces = pytorch.make_pieces(objective, pytorch.EVERYWHERE)
    spec = dataclasses.replace(pieces.spec, networks=("", "large", ""), slots=Slots(3, (1, 2)))
    spec.check(pytorch.BATCH)
    pieces = dataclasses.replace(pieces, spec=spec, voices={"large": bind(MMDiT(LARGE))})
    gradients, totals = jax.jit(functools.partial(fused_gradients, pieces))(frozen, state, batch)
    monkeypatch.setattr(pytorch, "torch_teachers", torch_teachers)
    visits = pytorch.torch_rollout(pytorch.EVERYWHERE, *pytorch.drawn_noise(pieces))
    loss, expected = pytorch.torch_loss_and_gradient(objective, visits, pytorch.adapter(1).weights)
    pytorch.check_loss("large", totals, loss)
    pytorch.check_gradient("large", gradients, expected)


# ---- on the small one

SIZE = 6


def grouped(objective: Objective, slots: Slots | None, **fields: Any) -> tuple[Pieces, Frozen]:
    """The second teacher is on a network of its own, which is like the base here."""
    spec = make_spec(objective, networks=("", "twin", ""), slots=slots, **fields)
    bank = {name: BANK[name] for name in ("ocr", "anchor")}
    twin = variables(), stack_bank({"counting": BANK["counting"]})
    pieces = dataclasses.replace(make_pieces(spec), voices={"twin": make_velocity()})
    return pieces, dataclasses.replace(frozen_of(bank), networks={"twin": twin})


@pytest.mark.parametrize(
    "objective", [DIRECT, pytest.param(CLIPPED, marks=pytest.mark.slow)], ids=["direct", "clipped"]
)
def test_a_twin_of_the_base_teaches_what_the_base_does(objective: Objective) -> None:
    batch, state = make_batch(SIZE), make_state()
    pieces, frozen = grouped(objective, Slots(SIZE, (3, 3)))
    found, totals = quick(fused_gradients, pieces)(frozen, state, batch)
    expected, same = quick(fused_gradients, make_pieces(make_spec(objective)))(frozen_of(BANK), state, batch)
    check(found, expected)
    check(totals, same)


@pytest.mark.parametrize(
    "fields",
    [{"between": sublevels(SIGMAS, 2, 3.0)}, {"anchor_moves": "ema"}, {"anchor_every": 3}, {"gaps": True}],
    ids=["finer steps", "a moving anchor", "an anchor seldom asked", "gaps"],
)
def test_a_twin_goes_with_the_other_ways_to_teach(fields: dict[str, Any]) -> None:
    batch, state = make_batch(SIZE), make_state()
    pieces, frozen = grouped(DIRECT, Slots(SIZE, (3, 3)), **fields)
    found, totals = quick(fused_gradients, pieces)(following(pieces, frozen, state), state, batch)
    plain = make_pieces(make_spec(DIRECT, **fields))
    expected, same = quick(fused_gradients, plain)(following(plain, frozen_of(BANK), state), state, batch)
    check(found, expected)
    check(totals, same)


@pytest.mark.parametrize("match", ["conditional", "branches"])
def test_a_twin_is_matched_by_branches(match: str) -> None:
    batch, state, objective = make_batch(SIZE), make_state(), dataclasses.replace(DIRECT, match=match)
    folded: dict[str, Any] = {"guidance": (1.0, GUIDED[1])}
    pieces, frozen = grouped(objective, Slots(SIZE, (3, 3)), **folded)
    found, _ = quick(fused_gradients, pieces)(frozen, state, batch)
    plain = make_pieces(make_spec(objective, **folded))
    check(found, quick(fused_gradients, plain)(frozen_of(BANK), state, batch)[0])


@pytest.mark.parametrize("fields", [{}, {"updates_per_rollout": 2, "minibatches": 2}], ids=["fused", "replayed"])
@pytest.mark.parametrize("share", [1, 2])
def test_a_question_without_a_slot_is_told_and_its_update_does_not_land(fields: dict[str, Any], share: int) -> None:
    """Both parts hold samples of one teacher alone, or of both: then a slot for one is missing."""
    parts = 2 if fields else 1
    route = np.array([0, 0, 1, 1, 0, 1] if share == 1 else [0, 0, 0, 0, 0, 1], np.int32)
    batch = Batch(prompts(1, SIZE), route)
    pieces, frozen = grouped(CLIPPED, Slots(SIZE // parts, (2, 2) if parts == 2 else (3, 3)), **fields)
    state = make_state()
    before = jax.tree.map(np.asarray, state)
    after, metrics = make_step(pieces, SGD, EMA(every=1))(frozen, state, batch)
    missing = {1: 0, 2: 2 if parts == 1 else 1 + 0}[share]
    assert int(metrics[UNANSWERED]) == missing
    assert bool(metrics["skipped"]) == (missing > 0)
    assert int(after.step) == 1
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.trained, before.trained)), strict=True)
    ]
    assert any(moved) == (missing == 0 or parts == 2)  # of two updates the one whose questions are answered lands
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.trained))


def test_without_other_networks_nothing_is_grouped() -> None:
    pieces = make_pieces(make_spec(DIRECT, networks=("", "", "")))
    assert not pieces.spec.grouped
    assert type(panel_of(pieces, frozen_of(BANK))).__name__ == "AdapterPanel"


def test_members_hold_the_entries_in_their_order() -> None:
    spec = make_spec(CLIPPED, networks=("b", "", "a"), extrapolation=(0.5, 0.0))
    assert spec.members == {"": (1, 3), "a": (2,), "b": (0,)}
    assert make_spec(dataclasses.replace(CLIPPED, mar_beta=0.0), networks=("b", "", "a")).members == {
        "": (1,),
        "b": (0,),
    }
    assert make_spec(CLIPPED, whole_teachers=True).members == {STACK: (0, 1, 2)}
    with pytest.raises(ValueError, match=r"^networks: found 1, expected 3 likewise$"):
        make_spec(CLIPPED, networks=("a",)).check(3)
