"""The OPD update on a two-layer network that reads adapters, routes and prompts as the real one does.

Tolerances on ‖a - b‖/‖b‖, float32: 1e-5 between two programs that compute the same gradient. Finite differences run in
float64, at 1e-6. `test_opd_torch.py` has the true network.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange

from fopd_jax.adapters.lora import Adapter, effective, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, Objective, Optimizer
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import CPS, ODE, SDE, Transition, standard_normal
from fopd_jax.models.mmdit import Dense
from fopd_jax.steps.opd.step import TERMS, Batch, Frozen, Level, OPDSpec, OPDStep, Stored, Targets
from fopd_jax.steps.state import TrainState, init_state, make_optimizer

TOLERANCE = 1e-5
STEPS, BATCH, SHAPE, WIDTH, RANK, CONTEXT, POOLED = 5, 3, (4, 4, 3), 16, 2, 6, 5  # 4 trained steps, unlike the batch
SIGMAS = flow_match_sigmas(STEPS)
TEACHERS = ("ocr", "counting")
GUIDED, PLAIN = (4.5, (4.5, 1.0, 2.0)), (1.0, (1.0, 1.0, 1.0))
ALWAYS, WINDOW = np.ones(STEPS, bool), noise_window(STEPS, 1, 3)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running here
DIRECT, CLIPPED = Objective("direct", mar_beta=0.3), Objective(mar_beta=0.3)


class Network(nn.Module):
    """A velocity of state, noise level and prompt; `up` and `down` may carry adapters."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, sigma: Any, conditioning: Conditioning, route: Any) -> Any:
        tokens = rearrange(x, "B h w c -> B (h w) c")
        prompt = Dense(WIDTH, dtype=self.dtype, name="pooled")(conditioning.pooled)
        prompt = prompt + Dense(WIDTH, dtype=self.dtype, name="context")(conditioning.context.mean(1))
        hidden = Dense(WIDTH, dtype=self.dtype, name="up")(tokens, route) + (prompt + sigma[:, None])[:, None]
        v = Dense(SHAPE[-1], dtype=self.dtype, name="down")(jnp.tanh(hidden), route)
        return rearrange(v, "B (h w) c -> B h w c", h=x.shape[1])


def make_velocity(dtype: Any = jnp.float32, rows: list[int] | None = None) -> Callable[..., Any]:
    """The package's contract for a velocity; appends the rows of every traced call to `rows`."""

    def velocity(variables: Any, adapter: Any, x: Any, sigma: Any, conditioning: Any, route: Any = None) -> Any:
        if rows is not None:
            rows.append(x.shape[0])
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        return Network(dtype).apply({**variables, "adapter": adapter}, x, sigma, conditioning, route)

    return velocity


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def prompts(seed: int, batch: int) -> Conditioning:
    return Conditioning(normal(seed, batch, 4, CONTEXT), normal(seed + 100, batch, POOLED))


def adapter(seed: int) -> Adapter:
    """Both factors non-zero; of an effect on the velocity comparable to the base's."""
    sizes = {"up": (SHAPE[-1], WIDTH), "down": (WIDTH, SHAPE[-1])}
    weights = {
        name: {"a": 0.5 * normal(seed + k, d_in, RANK), "b": 0.5 * normal(seed + k + 10, RANK, d_out)}
        for k, (name, (d_in, d_out)) in enumerate(sizes.items())
    }
    return jax.tree.map(jnp.asarray, Adapter(weights, 0.5))


STUDENT, BANK = adapter(0), {"ocr": adapter(20), "counting": adapter(40), "anchor": adapter(60)}


@functools.cache
def variables() -> Any:
    x, conditioning = jnp.zeros((1, *SHAPE)), jax.tree.map(jnp.asarray, prompts(0, 1))
    return nn.unbox(Network().init(jax.random.key(0), x, jnp.zeros(1), conditioning, None))


def frozen_of(bank: dict[str, Adapter]) -> Frozen:
    return Frozen(variables(), stack_bank(bank), jax.tree.map(jnp.asarray, prompts(7, 1)))


def make_batch(size: int = BATCH, seed: int = 1) -> Batch:
    """Numpy leaves, as the prompt stream's; both teachers occur."""
    return Batch(prompts(seed, size), np.arange(seed, seed + size) % len(TEACHERS))


def make_spec(
    objective: Objective,
    transition: Transition | None = None,
    guidance: tuple[float, tuple[float, ...]] = GUIDED,
    **fields: Any,
) -> OPDSpec:
    spec = OPDSpec(objective, transition or SDE(0.7), SIGMAS, ALWAYS, SHAPE, TEACHERS, *guidance)
    return dataclasses.replace(spec, **fields)


def make_step(spec: OPDSpec, rows: list[int] | None = None) -> OPDStep:
    return OPDStep(spec, make_velocity(rows=rows), optax.sgd(0.1), EMA())


def make_state(step: OPDStep, student: Adapter = STUDENT, seed: int = 5) -> TrainState:
    return init_state(student, step.optimizer, seed)


def quick(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK_COMPILE)


def relative_error(found: Any, expected: Any) -> float:
    a, b = (np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    error = relative_error(found, expected)
    print(f"relative error {error:.1e}")
    assert error <= tolerance


# ---- fused and replayed

COMBINATIONS = (
    *(("direct", "kl", w, SDE(0.7)) for w in ("kl", "kl_no_dt", "ode", "uniform")),
    *(("direct", "kl", w, kind) for w in ("ode", "uniform") for kind in (CPS(0.7), ODE())),
    *(("clipped", r, w, SDE(0.7)) for r in ("kl", "kl_detached") for w in ("kl", "kl_no_dt", "ode", "uniform")),
    *(("clipped", r, w, CPS(0.7)) for r in ("kl", "kl_detached") for w in ("ode", "uniform")),
    ("clipped", "log_ratio", "kl", SDE(0.7)),
)
# Every combination with one of the eight settings, every setting with two or three of each objective.
SETTINGS = tuple(itertools.product((ALWAYS, WINDOW), (GUIDED, PLAIN), (0.0, 0.3)))
CASES = {
    f"{name}-{reward}-{weighting}-{type(kind).__name__}-{setting % 8}": (
        Objective(name, reward, weighting, mar_beta=SETTINGS[setting % 8][2], window_only=bool(index % 2)),
        kind,
        *SETTINGS[setting % 8][:2],
    )
    for index, (name, reward, weighting, kind) in enumerate(COMBINATIONS)
    for setting in (3 * index, *((3 * index + 4,) if reward == "log_ratio" else ()))
}


@pytest.mark.parametrize("case", CASES)
def test_fused_and_replayed_gradients_agree(case: str) -> None:
    objective, transition, noisy, guidance = CASES[case]
    spec = make_spec(objective, transition, guidance, noisy=noisy)
    spec.check(BATCH)
    step = make_step(spec)
    frozen, state, batch = frozen_of(BANK), make_state(step), make_batch()

    @quick
    def both(frozen: Frozen, state: TrainState, batch: Batch) -> Any:
        stored = step.collect(frozen, state, batch)
        return step.fused_gradients(frozen, state, batch), step.replayed_gradients(frozen, state.trained, batch, stored)

    fused, replayed = both(frozen, state, batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(fused[0]))
    check(replayed[0], fused[0])
    for name in TERMS:
        assert fused[1][name].shape == (BATCH,)
        np.testing.assert_allclose(replayed[1][name], fused[1][name], rtol=TOLERANCE, atol=1e-6, err_msg=name)


def test_the_cases_cover_every_setting() -> None:
    for name in ("direct", "clipped"):
        used = {case.rpartition("-")[2] for case in CASES if case.startswith(name)}
        assert len(used) == len(SETTINGS)


# ---- the replayed loss is the one that is differentiated

OFF_POLICY = {
    "direct": (DIRECT, 0.05),
    "clipped, on policy": (dataclasses.replace(CLIPPED, clip=0.01), 0.0),
    "clipped, off policy": (dataclasses.replace(CLIPPED, clip=0.01), 0.05),
    "clipped, no weighting": (dataclasses.replace(CLIPPED, clip=0.01, weighting="uniform"), 0.05),
}


@pytest.mark.parametrize("case", OFF_POLICY)
def test_replayed_gradient_by_finite_differences(case: str) -> None:
    """Float64, central differences of step 1e-5, along four random directions and four single entries."""
    objective, distance = OFF_POLICY[case]
    spec = make_spec(objective)
    step = make_step(spec)
    stored = quick(step.collect)(frozen_of(BANK), make_state(step), make_batch())
    moved = jax.tree.map(lambda leaf: leaf + distance * normal(leaf.size, *leaf.shape), STUDENT)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = dataclasses.replace(spec, sigmas=np.float64(spec.sigmas))
        step = OPDStep(wide, make_velocity(jnp.float64), optax.sgd(0.1), EMA())
        frozen, batch, stored, moved = (widened(tree) for tree in (frozen_of(BANK), make_batch(), stored, moved))
        run = quick(lambda trained: step.replayed_gradients(frozen, trained, batch, stored))

        def loss(trained: Adapter) -> float:
            totals = run(trained)[1]
            return float(totals["loss"].sum() / totals["weight"].sum())

        gradient, totals = run(moved)
        print(f"{case}: share clipped {float(totals['clipped'].sum() / totals['weight'].sum()):.2f}")
        found, numeric = [], []
        for direction in directions(moved):
            up, down = (jax.tree.map(lambda leaf, d, h=h: leaf + h * d, moved, direction) for h in (1e-5, -1e-5))
            numeric.append((loss(up) - loss(down)) / 2e-5)
            found.append(inner(gradient, direction))
        check(np.array(found), np.array(numeric), 1e-6)
        np.testing.assert_allclose(found, numeric, rtol=1e-5, atol=1e-8)


def widened(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf if np.asarray(leaf).dtype.kind == "i" else jnp.asarray(np.float64(leaf)), tree
    )


def inner(left: Adapter, right: Adapter) -> float:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: float((a * b).sum()), left, right)))


def directions(like: Adapter) -> list[Adapter]:
    random = [
        jax.tree.map(lambda leaf, s=seed: np.float64(normal(s + leaf.size, *leaf.shape)), like) for seed in range(4)
    ]
    single = []
    for chosen in range(len(jax.tree.leaves(like))):
        leaves = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(like)]
        leaves[chosen][0, 1] = 1.0
        single.append(jax.tree.unflatten(jax.tree.structure(like), leaves))
    return random + single


# ---- one timestep's terms


def level(noisy: bool) -> Level:
    return Level(jnp.float32(0.7), jnp.float32(0.55), jnp.asarray(noisy))


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED, dataclasses.replace(CLIPPED, reward="log_ratio")])
def test_anchor_term_has_its_own_beta_and_no_ratio(objective: Objective) -> None:
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    step = make_step(make_spec(objective))
    log_prob = step.log_prob(x, v, x_next, level(True))
    arguments = x, x_next, log_prob, log_prob - jnp.log(jnp.float32(1.5)), level(True)
    without = step.terms(v, Targets(teacher, None), *arguments)
    found = step.terms(v, Targets(teacher, anchor), *arguments)
    w = float(0.15 / 2 * (1 / 0.7 + 0.7 / 2) ** 2 * 0.3 / 0.7)  # METHOD's closed form of the weight
    drift = w * np.mean((np.float64(v) - np.float64(anchor)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found["loss"] - without["loss"], 0.3 * drift, rtol=1e-5)
    np.testing.assert_allclose(found["anchor_gap"], drift, rtol=1e-5)
    np.testing.assert_array_equal(without["anchor_gap"], np.zeros(BATCH))


def test_terms_are_per_sample_and_count_only_trained_steps() -> None:
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    step = make_step(make_spec(CLIPPED))
    log_prob = step.log_prob(x, v, x_next, level(True))
    old = log_prob - jnp.asarray([0.3, 0.0, -0.3], jnp.float32)
    terms = step.terms(v, Targets(teacher, anchor), x, x_next, log_prob, old, level(True))
    assert set(terms) == set(TERMS)
    assert all(value.shape == (BATCH,) and value.dtype == jnp.float32 for value in terms.values())
    mse = np.mean((np.float64(v) - np.float64(teacher)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(terms["velocity_mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(terms["ratio"], np.exp([0.3, 0, -0.3]), rtol=1e-5)
    np.testing.assert_array_equal(terms["clipped"], [1, 0, 1])
    np.testing.assert_array_equal(terms["weight"], [1, 1, 1])
    # The reward is a penalty: above the range it pulls back with the true ratio, below it stops at the range's end.
    ratio = np.array([np.exp(0.3), 1, 1 - CLIPPED.clip])
    np.testing.assert_allclose(terms["loss"] - 0.3 * terms["anchor_gap"], ratio * terms["teacher_gap"], rtol=1e-5)
    quiet = step.terms(v, Targets(teacher, anchor), x, x_next, log_prob, old, level(False))
    assert not any(value.any() for value in quiet.values())


# ---- samples do not mix


@functools.cache
def fused(objective: Objective) -> Any:
    """The jitted gradients of one objective, compiled once for the tests below."""
    return quick(make_step(make_spec(objective)).fused_gradients)


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
@pytest.mark.parametrize("sample", range(BATCH))
def test_each_entry_of_the_totals_belongs_to_one_sample(objective: Objective, sample: int) -> None:
    state, batch = make_state(make_step(make_spec(objective))), make_batch()
    _, before = fused(objective)(frozen_of(BANK), state, batch)
    conditioning, route = jax.tree.map(np.copy, batch.conditioning), batch.route.copy()
    conditioning.context[sample] += 1
    route[sample] = 1 - route[sample]
    others = np.arange(BATCH) != sample
    for changed in (Batch(conditioning, batch.route), Batch(batch.conditioning, route)):
        _, after = fused(objective)(frozen_of(BANK), state, changed)
        for name in ("loss", "teacher_gap", "velocity_mse"):
            np.testing.assert_allclose(after[name][others], before[name][others], rtol=1e-6, err_msg=name)
            assert abs(after[name][sample] / before[name][sample] - 1) > 1e-2, name


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_gradient_is_the_mean_over_samples_alone(objective: Objective) -> None:
    """Each sample as a batch of one, under the noise it has in the batch."""

    @quick
    def alone(frozen: Frozen, state: TrainState, batch: Batch, i: jax.Array) -> Any:
        step = make_step(make_spec(objective))
        x, keys = step.start(state, batch)
        step.start = lambda *_: (x[i][None], keys[:, i][:, None])
        return step.fused_gradients(frozen, state, jax.tree.map(lambda leaf: leaf[i][None], batch))

    frozen, state = frozen_of(BANK), make_state(make_step(make_spec(objective)))
    batch = jax.tree.map(jnp.asarray, make_batch())
    gradients, totals = fused(objective)(frozen, state, batch)
    apart = [alone(frozen, state, batch, jnp.int32(i)) for i in range(BATCH)]
    check(jax.tree.map(lambda *leaves: sum(leaves) / BATCH, *(each[0] for each in apart)), gradients)
    for name in TERMS:
        np.testing.assert_allclose(
            np.concatenate([each[1][name] for each in apart]), totals[name], rtol=TOLERANCE, err_msg=name
        )


# ---- routing


def test_targets_are_each_samples_own_teacher_and_the_banks_last_entry() -> None:
    """Guided by hand, one unrouted forward per adapter: per-teacher scales, the anchor for everyone."""
    step, frozen, batch = make_step(make_spec(DIRECT)), frozen_of(BANK), jax.tree.map(jnp.asarray, make_batch())
    x, at = jnp.asarray(normal(3, BATCH, *SHAPE)), level(True)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), frozen.null)

    def by_hand(name: str, scale: float) -> np.ndarray:
        forward = functools.partial(make_velocity(), frozen.variables, effective(BANK[name]), x, at.sigma)
        text, null = (np.float64(forward(c)) for c in (batch.conditioning, empty))
        return null + scale * (text - null)

    ocr, counting, anchor = (by_hand(name, scale) for name, scale in zip(BANK, GUIDED[1], strict=True))
    found = step.targets(frozen, batch, x, at)
    chosen = np.where((np.asarray(batch.route) == 0)[:, None, None, None], ocr, counting)
    check(found.teacher, chosen, 1e-6)
    check(found.anchor, anchor, 1e-6)


@pytest.mark.parametrize("sample", range(BATCH))
def test_a_mixed_batch_is_each_sample_with_its_teacher_alone(sample: int) -> None:
    """A bank of one teacher and the anchor, all samples routed to it: the sample's totals are those of the mix."""
    batch = make_batch()
    k = int(batch.route[sample])
    _, totals = fused(CLIPPED)(frozen_of(BANK), make_state(make_step(make_spec(CLIPPED))), batch)
    step, alone = single_teacher(k)
    bank = {TEACHERS[k]: BANK[TEACHERS[k]], "anchor": BANK["anchor"]}
    _, found = alone(frozen_of(bank), make_state(step), Batch(batch.conditioning, np.zeros_like(batch.route)))
    for name in TERMS:
        np.testing.assert_allclose(found[name][sample], totals[name][sample], rtol=TOLERANCE, err_msg=name)


@functools.cache
def single_teacher(k: int) -> tuple[OPDStep, Any]:
    student, scales = GUIDED
    step = make_step(make_spec(CLIPPED, None, (student, (scales[k], scales[-1])), teachers=(TEACHERS[k],)))
    return step, quick(step.fused_gradients)


@pytest.mark.parametrize(
    ("beta", "guidance", "student", "teachers"),
    [  # rows per forward: doubled by the anchor, doubled by any scale other than 1
        (0.3, GUIDED, 2 * BATCH, 4 * BATCH),
        (0.0, GUIDED, 2 * BATCH, 2 * BATCH),
        (0.3, PLAIN, BATCH, 2 * BATCH),
        (0.0, PLAIN, BATCH, BATCH),
        (0.3, (1.0, GUIDED[1]), BATCH, 4 * BATCH),
        (0.3, (4.5, PLAIN[1]), 2 * BATCH, 2 * BATCH),
    ],
)
def test_forwards_hold_no_more_rows_than_needed(beta: float, guidance: Any, student: int, teachers: int) -> None:
    rows: list[int] = []
    step = make_step(make_spec(dataclasses.replace(DIRECT, mar_beta=beta), None, guidance), rows)
    x = jnp.zeros((BATCH, *SHAPE))
    batch = jax.tree.map(jnp.asarray, make_batch())
    found = jax.eval_shape(step.targets, frozen_of(BANK), batch, x, level(True))
    assert (found.anchor is None) == (beta == 0)
    assert found.teacher.shape == x.shape
    jax.eval_shape(step.student, frozen_of(BANK), STUDENT, batch.conditioning, x, level(True))
    assert rows == [teachers, student]


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_no_gradient_where_student_teachers_and_anchor_are_one(objective: Objective) -> None:
    """Up to rounding: below 1e-5 of the gradient of this student among its true teachers."""
    state, same = make_state(make_step(make_spec(objective))), (4.5, (4.5, 4.5, 4.5))
    run = quick(make_step(make_spec(objective, None, same)).fused_gradients)
    zero, _ = run(frozen_of(dict.fromkeys(BANK, STUDENT)), state, make_batch())
    usual, _ = run(frozen_of(BANK), state, make_batch())
    found, size = float(optax.tree.norm(zero)), float(optax.tree.norm(usual))
    print(f"gradient {found:.1e}, usually {size:.1e}")
    assert found <= 1e-5 * size


# ---- noise


def noise(state: TrainState, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    x, keys = make_step(make_spec(DIRECT)).start(state, make_batch(size))
    return np.asarray(x), np.asarray(jax.random.key_data(keys))


def test_noise_depends_on_seed_and_step_alone() -> None:
    state = make_state(make_step(make_spec(DIRECT)))
    x, keys = noise(state)
    assert x.shape == (BATCH, *SHAPE)
    assert keys.shape[:2] == (STEPS - 1, BATCH)
    assert len(np.unique(keys.reshape(-1, keys.shape[-1]), axis=0)) == (STEPS - 1) * BATCH
    other_history = init_state(adapter(80), optax.adam(1e-3), 5)
    for left, right in zip(noise(other_history), (x, keys), strict=True):
        np.testing.assert_array_equal(left, right)
    for other in (dataclasses.replace(state, step=jnp.int32(1)), make_state(make_step(make_spec(DIRECT)), seed=6)):
        other_x, other_keys = noise(other)
        assert (other_x != x).mean() > 0.99
        assert (other_keys != keys).any(-1).all()


def test_the_start_shares_no_noise_with_the_steps() -> None:
    step = make_step(make_spec(DIRECT))
    x, keys = step.start(make_state(step), make_batch())
    drawn = np.stack([x, *(standard_normal(each, SHAPE) for each in keys)]).reshape(-1, x[0].size)  # step and sample
    correlation = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(x[0].size)


def test_noise_of_a_sample_does_not_depend_on_the_batch_size() -> None:
    state = make_state(make_step(make_spec(DIRECT)))
    (x, keys), (more_x, more_keys) = noise(state), noise(state, 2 * BATCH)
    np.testing.assert_array_equal(more_x[:BATCH], x)
    np.testing.assert_array_equal(more_keys[:, :BATCH], keys)


# ---- minibatches


def indices(step_number: int, updates: int, minibatches: int, batch: int = 6) -> np.ndarray:
    step = make_step(make_spec(DIRECT, updates_per_rollout=updates, minibatches=minibatches))
    state = dataclasses.replace(make_state(step), step=jnp.int32(step_number))
    return np.asarray(step.minibatch_indices(state, batch))


@pytest.mark.parametrize("minibatches", [2, 3, 6])
def test_every_pass_is_a_new_permutation(minibatches: int) -> None:
    passes = indices(0, 4 * minibatches, minibatches).reshape(4, 6)
    np.testing.assert_array_equal(np.sort(passes), np.broadcast_to(np.arange(6), (4, 6)))
    assert len(np.unique(passes, axis=0)) == 4


def test_minibatches_are_a_function_of_the_step() -> None:
    np.testing.assert_array_equal(indices(3, 6, 3), indices(3, 6, 3))
    assert len({indices(n, 6, 3).tobytes() for n in range(5)}) == 5


def test_a_broken_off_pass_repeats_nothing() -> None:
    found = indices(0, 5, 3)  # one whole pass and two of three minibatches
    assert found.shape == (5, 2)
    assert len(set(found[3:].ravel())) == 4


def test_one_minibatch_is_the_batch_in_order() -> None:
    np.testing.assert_array_equal(indices(0, 3, 1), np.broadcast_to(np.arange(6), (3, 6)))


def test_replay_is_one_rollout_and_then_plain_updates() -> None:
    """Against a Python loop over its parts, at 1e-5 of the distance moved: two passes over two minibatches."""
    objective = dataclasses.replace(CLIPPED, clip=0.01)
    step = make_step(make_spec(objective, updates_per_rollout=4, minibatches=2))
    frozen, batch, state = frozen_of(BANK), jax.tree.map(jnp.asarray, make_batch(6)), make_state(step)
    stored: Stored = quick(step.collect)(frozen, state, batch)
    gradients_of = quick(step.replayed_gradients)
    student, visited, losses, ratios = state.trained, [], [], []
    for rows in np.asarray(step.minibatch_indices(state, 6)):
        part = jax.tree.map(lambda leaf, rows=rows: leaf[:, rows], stored)
        gradients, totals = gradients_of(frozen, student, jax.tree.map(lambda leaf, r=rows: leaf[r], batch), part)
        student = jax.tree.map(lambda x, g: x - 0.1 * g, student, gradients)
        visited.extend(rows)
        losses.append(float(totals["loss"].sum() / totals["weight"].sum()))
        ratios.append(float(totals["ratio"].sum() / totals["weight"].sum()))
    after, metrics = quick(step.replay)(frozen, state, batch)
    moved = [jax.tree.map(jnp.subtract, each, state.trained) for each in (after.trained, student)]
    check(*moved)
    assert sorted(visited) == sorted([*range(6), *range(6)])
    assert int(after.step) == 1
    np.testing.assert_allclose([metrics["loss"], metrics["ratio"]], [np.mean(losses), np.mean(ratios)], rtol=1e-5)
    assert abs(ratios[0] - 1) < 1e-5 < abs(ratios[-1] - 1)  # on policy at first, off it later


def test_one_pass_without_moving_sees_the_fused_batch() -> None:
    spec = make_spec(CLIPPED, updates_per_rollout=3, minibatches=3)
    step = OPDStep(spec, make_velocity(), optax.sgd(0.0), EMA())
    batch, state = make_batch(), make_state(step)
    _, metrics = quick(step.replay)(frozen_of(BANK), state, batch)
    _, totals = fused(CLIPPED)(frozen_of(BANK), state, batch)
    expected = step.metrics(totals, jnp.asarray(batch.route))
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_metrics_are_means_and_a_missing_task_reports_zero() -> None:
    totals = {name: jnp.asarray([1.0, 2.0, 6.0]) for name in TERMS} | {"weight": jnp.asarray([4.0, 4.0, 4.0])}
    metrics = make_step(make_spec(DIRECT)).metrics(totals, jnp.asarray([1, 1, 1]))
    assert float(metrics["loss"]) == 0.75
    assert float(metrics["teacher_gap/counting"]) == 0.75
    assert float(metrics["teacher_gap/ocr"]) == 0
    metrics = make_step(make_spec(DIRECT)).metrics(totals, jnp.asarray([0, 1, 0]))
    assert (float(metrics["teacher_gap/ocr"]), float(metrics["teacher_gap/counting"])) == (0.875, 0.5)


# ---- fewer forwards


def scaled_sum(trees: list[Any], weights: Any) -> Any:
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_an_anchor_asked_of_some_samples_is_unbiased(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over every pick is the gradient of asking it of all."""
    every, batch = 3, make_batch(6)
    step = make_step(make_spec(objective, anchor_every=every))
    state = make_state(step)
    parts = []
    for pick in range(every):
        monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high, pick=pick: jnp.full(shape, pick))
        run = quick(make_step(make_spec(objective, anchor_every=every)).fused_gradients)
        parts.append(run(frozen_of(BANK), state, batch)[0])
    monkeypatch.undo()
    whole = quick(make_step(make_spec(objective)).fused_gradients)(frozen_of(BANK), state, batch)[0]
    check(scaled_sum(parts, [1 / every] * every), whole)
    assert relative_error(parts[0], whole) > 1e-2
    drawn = quick(step.fused_gradients)(frozen_of(BANK), state, batch)[0]
    assert min(relative_error(drawn, part) for part in parts) > 1e-3  # picks differ from block to block


def test_the_anchor_sees_fewer_rows() -> None:
    rows: list[int] = []
    step = make_step(make_spec(DIRECT, guidance=PLAIN, anchor_every=3), rows)
    batch = jax.tree.map(jnp.asarray, make_batch(6))
    jax.eval_shape(step.targets, frozen_of(BANK), batch, jnp.zeros((6, *SHAPE)), level(True), jnp.zeros(2, jnp.int32))
    assert rows == [6 + 2]


@pytest.mark.parametrize("updates", [1, 2])
def test_training_some_timesteps_is_their_part_of_the_loss(updates: int) -> None:
    """T·∇L = Σ T_w·∇L_w over windows that split the timesteps."""
    windows, batch = ((0, 1), (1, 4)), make_batch()
    state = make_state(make_step(make_spec(DIRECT)))

    def gradient(**fields: Any) -> Any:
        step = make_step(make_spec(DIRECT, **fields))
        if updates == 1:
            return quick(step.fused_gradients)(frozen_of(BANK), state, batch)[0]
        stored = quick(step.collect)(frozen_of(BANK), state, batch)
        return quick(step.replayed_gradients)(frozen_of(BANK), state.trained, batch, stored)[0]

    parts = [gradient(trained=window) for window in windows]
    check(scaled_sum(parts, [1 / 4, 3 / 4]), gradient())
    assert relative_error(parts[0], parts[1]) > 1e-2


@pytest.mark.parametrize("weighting", ["kl", "ode", "uniform"])
def test_one_timestep_a_rollout_is_unbiased(weighting: str) -> None:
    """The mean over timesteps, by the probability with which each is drawn, is the gradient of all."""
    objective, batch = dataclasses.replace(DIRECT, weighting=weighting), make_batch()
    step = make_step(make_spec(objective, one_timestep=True))
    state, frozen = make_state(step), frozen_of(BANK)
    run = quick(step.picked_gradients)
    parts = [run(frozen, state, batch, jnp.full(BATCH, t)) for t in range(4)]
    shares, _ = step.shares
    assert shares.sum() == pytest.approx(1)
    whole = quick(make_step(make_spec(objective)).fused_gradients)(frozen, state, batch)[0]
    check(scaled_sum([gradient for gradient, _ in parts], shares), whole)
    mixed, totals = run(frozen, state, batch, jnp.asarray([3, 0, 2]))
    rows = [parts[t][1]["loss"][i] for i, t in enumerate((3, 0, 2))]
    np.testing.assert_allclose(totals["loss"], rows, rtol=1e-5)
    assert relative_error(mixed, parts[0][0]) > 1e-3


# ---- what is not finite does not land


@pytest.mark.parametrize(("updates", "minibatches"), [(1, 1), (2, 1)], ids=["fused", "replay"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_does_not_land(updates: int, minibatches: int, value: float) -> None:
    spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
    step = OPDStep(spec, make_velocity(), make_optimizer(Optimizer(1e-2, 1, (0.9, 0.999), 1e-4, 1.0)), EMA(0.5, 1))
    run, state = quick(step.fused if updates == 1 else step.replay), make_state(step)
    bad = make_batch(4)
    bad.conditioning.pooled[2] = value
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        after, metrics = run(frozen_of(BANK), state, bad)
        moved, landed = run(frozen_of(BANK), after, make_batch(4))
    assert (int(after.step), int(moved.step)) == (1, 2)
    for name in ("trained", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
        assert relative_error(getattr(moved, name), getattr(state, name)) > 1e-6
    assert (float(metrics["skipped"]), float(landed["skipped"])) == (1, 0)
    assert np.isfinite(metrics["samples/loss"]).tolist() == [True, True, False, True]
    assert np.isfinite(landed["samples/loss"]).all()


def test_losses_by_sample_average_to_the_loss() -> None:
    for updates, minibatches in ((1, 1), (3, 3)):
        spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
        step = OPDStep(spec, make_velocity(), optax.sgd(0.0), EMA())
        run = quick(step.fused if updates == 1 else step.replay)
        _, metrics = run(frozen_of(BANK), make_state(step), make_batch())
        assert metrics["samples/loss"].shape == (BATCH,)
        np.testing.assert_allclose(metrics["samples/loss"].mean(), metrics["loss"], rtol=1e-5)


# ---- compiled once


@pytest.mark.parametrize(("updates", "minibatches"), [(1, 1), (4, 2)], ids=["fused", "replay"])
def test_the_step_compiles_once(updates: int, minibatches: int) -> None:
    traced: list[int] = []
    spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
    spec.check(4)
    optimizer = make_optimizer(Optimizer(1e-3, 2, (0.9, 0.999), 1e-4, 1.0))
    step = OPDStep(spec, make_velocity(rows=traced), optimizer, EMA())
    run, frozen, state = step.make(), frozen_of(BANK), make_state(step)
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        state, _ = run(frozen, state, make_batch(4, seed=0))
        first = len(traced)
        for n, route in enumerate(([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]), start=1):
            state, metrics = run(frozen, state, Batch(prompts(n, 4), np.asarray(route)))
    assert run._cache_size() == 1
    assert len(traced) == first > 0
    assert int(state.step) == 4
    assert all(np.isfinite(value).all() for value in metrics.values())


# ---- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "num_steps": ({"sigmas": SIGMAS[-2:]}, "sampler.num_steps: found 1, expected at least 2: the last is not trained"),
    "updates_per_rollout": ({"updates_per_rollout": 0}, "updates_per_rollout: found 0, expected at least 1"),
    "minibatches": ({"minibatches": 4}, "minibatches: found 4, expected a divisor of batch_size 6"),
    "no minibatch": ({"minibatches": 0}, "minibatches: found 0, expected a divisor of batch_size 6"),
    "untrained minibatches": ({"minibatches": 2}, "minibatches: found 2, expected at most updates_per_rollout (1)"),
    "guidance": ({"teacher_guidance": (4.5, 1.0)}, "teacher_guidance: found 2 scales, expected 3"),
    "window": ({"noisy": noise_window(STEPS, 4, 5)}, "sampler.window: holds no trained step"),
    "direct in the window": (
        {"noisy": noise_window(STEPS, 4, 5), "objective": dataclasses.replace(DIRECT, window_only=True)},
        "sampler.window: holds no trained step",
    ),
    "timesteps": (
        {"trained": (2, 5)},
        "sampler.trained: found (2, 5), expected (start, stop) with 0 <=",
    ),
    "no timestep": ({"trained": (2, 2)}, "sampler.trained: found (2, 2)"),
    "anchor": ({"anchor_every": 0}, "anchor.every: found 0, expected at least 1"),
    "anchor of networks": (
        {"anchor_every": 2, "whole_teachers": True},
        "anchor.every: found 2, expected 1 where",
    ),
    "one timestep": (
        {"one_timestep": True},
        "one_timestep: found True, which needs objective.name 'direct'",
    ),
    "one timestep twice": (
        {"one_timestep": True, "objective": DIRECT, "updates_per_rollout": 2},
        "one_timestep: found True, expected False with several updates",
    ),
    "objective": ({"objective": Objective(clip=0.0)}, "objective.clip, reward_limit: found 0.0, 5.0, expected > 0"),
    "transition": ({"transition": ODE()}, "weighting: found 'kl', expected 'ode' or 'uniform': the ODE step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(make_spec(CLIPPED), **fields).check(6)


def test_accepted() -> None:
    make_spec(CLIPPED, updates_per_rollout=4, minibatches=3).check(6)
    make_spec(DIRECT, noisy=noise_window(STEPS, 4, 5)).check(6)  # trains the noiseless steps too
