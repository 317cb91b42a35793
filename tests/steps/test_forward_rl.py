"""A step on the forward process: gradients against PyTorch, who rolls out, what levels are drawn, parts that add up.

Tolerances on ‖a - b‖/‖b‖, float32: 1e-4 against PyTorch in float64, 1e-5 between two programs of the same gradient.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.learning import OldDecay, TrainedLevels
from fopd_jax.config.schema import EMA, Optimizer
from fopd_jax.flow.solver import DPM2
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.forward_rl import Noised
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.steps.forward_rl import (
    LEVELS,
    NOISE,
    Pieces,
    Programs,
    _noise_keys,
    _visits,
    draw_levels,
    make_programs,
    metric_names,
)
from fopd_jax.steps.state import TrainState, init_state, make_optimizer
from tests.steps.forward import (
    AWM,
    BATCH,
    CRD,
    LIMIT,
    NFT,
    OLD,
    RATE,
    SPEC,
    STEPS,
    learned,
    make_base,
    make_credit,
    make_inputs,
    make_pieces,
    make_state,
    moved,
    rolled,
)
from tests.steps.opd.network import SHAPE, STUDENT, check, normal, prompts, variables
from tests.steps.test_state import relaxed

OBJECTIVES = {"nft": NFT, "awm": AWM, "crd": CRD}
ADAM = relaxed(make_optimizer(Optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0)))
COUNTED = [0, 1, 6, 7]  # neither failed nor flat


# ---- against PyTorch


def drawn(pieces: Pieces, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Levels `[T, B]` and noise `[T, B, …]` of the first step: all that both sides share."""
    rng, rows = init_state(STUDENT, RATE, seed).rng(), jnp.arange(BATCH)
    levels = draw_levels(pieces.spec, jax.random.fold_in(rng, LEVELS), rows, jnp.int32(0))
    keys = [_noise_keys(jax.random.fold_in(rng, NOISE), rows, jnp.int32(t)) for t in range(pieces.spec.times)]
    return np.asarray(levels), np.stack([np.asarray(standard_normal(each, SHAPE)) for each in keys])


def tensors(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: torch.tensor(np.float64(leaf)), tree)


def torch_velocity(weights: Any, x: torch.Tensor, t: torch.Tensor, rows: Any) -> torch.Tensor:
    """The small network; `weights` None: without an adapter."""
    params = tensors(variables()["params"])
    tokens, (context, pooled) = x.flatten(1, 2), rows

    def dense(name: str, value: torch.Tensor) -> torch.Tensor:
        layer = params[name]
        out, added = value @ layer["kernel"] + layer["bias"], (weights or {}).get(name)
        return out if added is None else out + 0.5 * value @ added["a"] @ added["b"]

    prompt = dense("pooled", pooled) + dense("context", context.mean(1))
    hidden = dense("up", tokens) + (prompt + t[:, None])[:, None]
    return dense("down", torch.tanh(hidden)).reshape(x.shape)


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def torch_loss(name: str, v: Any, old: Any, ref: Any, x0: Any, e: Any, t: Any, a: Any) -> torch.Tensor:
    """One value a sample, of those that count; neighbours are a group."""
    tt, u, r, spec = t[:, None, None, None], e - x0, a / 2 + 0.5, OBJECTIVES[name]
    b, x_t = spec.beta, (1 - tt) * x0 + tt * e
    if name == "nft":
        ends = x_t - tt * (b * v + (1 - b) * old), x_t - tt * ((1 + b) * old - b * v)
        plus, minus = (mean((end - x0) ** 2) / mean((end - x0).abs()).detach() for end in ends)
        return LIMIT / b * (r * plus + (1 - r) * minus) + 0.1 * mean((v - ref) ** 2)
    if name == "awm":
        new, before = (t / 0.25 * (mean((each - u) ** 2) + 1e-10) ** 0.25 for each in (v, old))
        return -a * torch.exp(before - new) + 0.02 * mean((v - ref) ** 2) + mean((v - old) ** 2)
    q = [-mean((each - u) ** 2) / mean((each - u).abs()).detach() for each in (v, old)]
    q = q[0] - q[1]
    less = [(each.reshape(-1, 2) - each.reshape(-1, 2).mean(1, keepdim=True)).flatten() for each in (q, r)]
    return LIMIT / b * (b * less[0] - less[1]) ** 2 + (1e-4 + r * (0.1 - 1e-4)) * mean((v - ref) ** 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_pytorchs(name: str) -> None:
    """Through the network, at both levels of every latent that counts, base and old policy asked."""
    pieces = make_pieces(objective=OBJECTIVES[name])
    state, metrics = learned(pieces)
    latents, conditioning, credit = make_inputs()
    x0, rows, advantage = tensors((latents, tuple(jax.tree.leaves(conditioning)), credit.advantage))
    rows, empty = tuple(each[COUNTED] for each in rows), tensors(tuple(jax.tree.leaves(make_base().null)))
    trained, old = tensors(STUDENT.weights), tensors(OLD.weights)
    leaves = [leaf.requires_grad_() for leaf in jax.tree.leaves(trained)]
    losses = []
    for t, e in zip(*map(tensors, drawn(pieces)), strict=True):
        t, e, x = t[COUNTED], e[COUNTED], x0[COUNTED]
        x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e
        v, v_old, v_ref = (torch_velocity(each, x_t, t, rows) for each in (trained, old, None))
        if name == "crd":
            blank = torch_velocity(None, x_t, t, tuple(each.expand(4, *each.shape[1:]) for each in empty))
            v_ref = blank + 4.5 * (v_ref - blank)
        a = torch.clip(advantage[COUNTED] / LIMIT, -1, 1)
        losses.append(torch_loss(name, v, v_old.detach(), v_ref.detach(), x, e, t, a))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = jax.tree.unflatten(jax.tree.structure(STUDENT.weights), [-leaf.grad.numpy() for leaf in leaves])
    check(moved(state), gradient, 1e-4)
    check(metrics["loss"], loss.item(), 1e-4)
    assert metrics["weights/loss"] == len(COUNTED) * pieces.spec.times


# ---- the old policy


def test_the_old_policy_rolls_out() -> None:
    """Whatever becomes of the current one; and images come of seed, step and row alone."""
    pieces, state = make_pieces(), make_state()
    found = rolled(pieces, state)
    other = jax.tree.map(lambda leaf: leaf + 1.0, state.trained)
    np.testing.assert_array_equal(rolled(pieces, dataclasses.replace(state, trained=other)), found)
    assert np.abs(np.asarray(rolled(pieces, dataclasses.replace(state, old=other))) - found).max() > 0.1
    later = dataclasses.replace(state, step=state.step + 1)
    assert np.abs(np.asarray(rolled(pieces, later)) - found).max() > 0.1


def test_rollouts_do_not_depend_on_parts() -> None:
    whole, state = rolled(make_pieces(), make_state()), make_state()
    np.testing.assert_allclose(rolled(make_pieces(micro_batches=4), state), whole, rtol=1e-5, atol=1e-6)
    shared = np.asarray(rolled(make_pieces(shared_noise=True, solver=DPM2()), state))
    assert shared.shape == (BATCH, *SHAPE)


def test_without_a_copy_the_old_policy_is_the_current_one() -> None:
    """The same update as with a copy that is equal, at one forward less."""
    rows: list[int] = []
    alone, _ = learned(make_pieces(keeps_old=False, rows=rows))
    without = len(rows)
    state = dataclasses.replace(make_state(), old=jax.tree.map(jnp.copy, STUDENT))
    beside, metrics = learned(make_pieces(rows=rows), state)
    assert len(rows) - without == without + 1
    check(moved(alone), moved(beside))
    assert alone.old is None
    assert metrics["old_gap"] < 1e-10


def test_the_old_policy_follows_after_the_updates() -> None:
    pieces = make_pieces(old=OldDecay(start=0.25, slope=0.1, limit=0.9))
    state, metrics = learned(pieces)
    d = np.float32(0.35)  # after the first step
    assert metrics["old_decay"] == d
    expected = jax.tree.map(lambda old, new: d * old + (1 - d) * new, OLD, state.trained)
    check(state.old, expected, 1e-6)


# ---- levels and noise


def levels_of(count: int, **settings: Any) -> np.ndarray:
    """`[T, B]` of a large batch."""
    spec = dataclasses.replace(SPEC, levels=TrainedLevels(**settings))
    return np.asarray(jax.jit(lambda rows: draw_levels(spec, jax.random.key(3), rows, jnp.int32(0)))(jnp.arange(count)))


def test_all_levels_of_the_schedule_are_trained_once_each() -> None:
    """By default all but that of the last step, as DiffusionNFT does; in an order of each latent's own."""
    found = levels_of(64)
    assert found.shape == (STEPS - 1, 64)
    np.testing.assert_array_equal(np.sort(found, axis=0)[::-1], np.broadcast_to(SPEC.sigmas[:-2, None], found.shape))
    assert len({tuple(column) for column in found.T}) > 1
    some = levels_of(3000, times=1, within=(1, 3))
    assert set(some.ravel()) == set(SPEC.sigmas[1:3])
    assert abs((some == SPEC.sigmas[1]).mean() - 0.5) < 0.05


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_continuous_levels_have_their_distribution(distribution: str) -> None:
    """Undoing the shift: uniform numbers, one in each share; or logits of mean 0 and deviation 1."""
    found = levels_of(2000, times=4, distribution=distribution).astype(np.float64)
    s = found / (3 - 2 * found)
    if distribution == "uniform":
        assert (np.sort(np.floor(np.sort(s, axis=0) * 4 + 1e-4), axis=0) == np.arange(4)[:, None]).mean() > 0.98
        assert abs(s.mean() - 0.5) < 0.01
    else:
        logits = np.log(s / (1 - s))[(found > 0.0101) & (found < 1)]
        assert abs(logits.mean()) < 0.05
        assert abs(logits.std() - 1) < 0.05
    assert found.min() >= 0.01 - 1e-7
    assert found.max() <= 1


def test_neighbours_share_levels_where_they_are_compared() -> None:
    crd = dataclasses.replace(SPEC, objective=CRD)
    found = np.asarray(draw_levels(crd, jax.random.key(3), jnp.arange(BATCH), jnp.int32(0)))
    np.testing.assert_array_equal(found[:, ::2], found[:, 1::2])
    levels, noise = drawn(make_pieces(objective=CRD))
    assert len({tuple(each.ravel()) for row in noise for each in row}) == levels.size  # noise is each one's own


# ---- parts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up(name: str) -> None:
    whole, metrics = learned(make_pieces(objective=OBJECTIVES[name]))
    parts, found = learned(make_pieces(objective=OBJECTIVES[name], micro_batches=4))
    check(moved(parts), moved(whole), 1e-6)
    assert found.keys() == metrics.keys()
    for each in metrics:
        np.testing.assert_allclose(found[each], metrics[each], rtol=1e-5, atol=1e-7, err_msg=each)


def test_each_update_has_its_minibatch_and_noise_of_its_own() -> None:
    """A second pass over the same rows is not the first one again."""
    part, number, lands = map(np.asarray, _visits(dataclasses.replace(SPEC, updates_per_rollout=4, minibatches=2,
                                                                      micro_batches=2)))  # fmt: skip
    assert part.tolist() == [0, 2, 1, 3] * 2
    assert number.tolist() == [0] * 4 + [1] * 4
    assert lands.tolist() == [False, True] * 4
    first, second = (draw_levels(SPEC, jax.random.key(0), jnp.arange(BATCH), jnp.int32(k)) for k in range(2))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 0


def test_nothing_counts_nothing_moves() -> None:
    pieces, (latents, conditioning, credit) = make_pieces(), make_inputs()
    credit = dataclasses.replace(credit, flat=jnp.ones(BATCH, bool))
    programs = make_programs(pieces, RATE, EMA(0.5, every=1))
    state, metrics = programs.learn(make_base(), make_state(), latents, conditioning, credit)
    assert not any(leaf.any() for leaf in jax.tree.leaves(moved(state)))
    assert metrics["loss"] == metrics["skipped"] == 0
    assert metrics["flat_share"] == 1


# ---- programs


@functools.cache
def programs() -> tuple[Pieces, Programs]:
    """Two updates a rollout, so that Adam's state matters, and an old copy that lags."""
    pieces = make_pieces(old=OldDecay(start=0.5), updates_per_rollout=2, minibatches=2)
    return pieces, make_programs(pieces, ADAM, EMA(0.5, every=1))


def advanced(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step, its prompts those of its number."""
    conditioning = jax.tree.map(jnp.asarray, prompts(int(state.step), BATCH))
    latents = programs()[1].roll_out(make_base(), state, conditioning)
    return programs()[1].learn(make_base(), state, latents, conditioning, make_credit())


def test_two_programs_compiled_once_and_the_state_donated() -> None:
    state = init_state(STUDENT, ADAM, 5, keeps_old=True)
    for _ in range(3):
        before = state
        state, metrics = advanced(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.trained, before.old)))
    pieces, both = programs()
    assert both.roll_out._cache_size() == both.learn._cache_size() == 1  # type: ignore[attr-defined]
    assert int(state.step) == 3
    scalars = {name for name in metrics if not name.startswith(("weights/", "samples/"))}
    assert scalars == set(metric_names(pieces.spec))


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    """From a checkpoint that holds the old copy too."""
    state, _ = advanced(init_state(STUDENT, ADAM, 5, keeps_old=True))
    with contextlib.closing(Checkpoints(tmp_path, 1, config_hash="any")) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    (one, found), (other, expected) = advanced(restored), advanced(state)
    for a, b in zip(*(jax.tree.leaves(each) for each in ((one, found), (other, expected))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(jax.tree.leaves(one.old)[0]) - np.asarray(jax.tree.leaves(one.trained)[0])).max() > 0


REFUSED = {
    "levels.within": ({"levels": TrainedLevels(within=(1, 5))}, r"levels.within: found \(1, 5\), expected .* <= 4"),
    "minibatches": ({"minibatches": 2}, "minibatches: found 2, expected at most updates_per_rollout"),
    "micro_batches": ({"micro_batches": 3}, "run.micro_batches: found 3, expected a divisor of the 8 samples"),
    "groups": (
        {"micro_batches": 8, "objective": CRD},
        "objective.name: found 'crd', .* whose 4 groups are a multiple of 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_pieces(**fields)


def test_latents_are_noised_between_data_and_noise() -> None:
    x0, noise = jnp.asarray(normal(0, 2, *SHAPE)), jnp.asarray(normal(1, 2, *SHAPE))
    at = Noised(x0, noise, jnp.asarray([0.0, 1.0]), None)
    np.testing.assert_array_equal(at.state, np.stack([x0[0], noise[1]]))
