"""What is measured of an update, on a tiny network: rates, memory, phases, sweeps; and what must not happen in steps.

Exact: counts of compilations, bytes of banks and adapters. Times are never compared, but where one is made of others.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import FlowMatching, MeshShape
from fopd_jax.config.variants import with_batch, with_teachers
from fopd_jax.models.mmdit import PRESETS, MMDiTConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance import measure as module
from fopd_jax.performance import phases, sweeps
from fopd_jax.performance.compilation import Memory, memory_of
from fopd_jax.performance.compiling import cache_use, compile_twice, empty_cache
from fopd_jax.performance.measure import Options, measure, speed
from fopd_jax.performance.problem import Problem
from fopd_jax.performance.table import describe, describe_batches, describe_teachers
from fopd_jax.performance.timing import MatmulPeak, matmul_peak, summarise, time_calls
from fopd_jax.performance.topology import GIB, find_chip
from fopd_jax.performance.weights import held_bytes, random_arguments, shard_bytes
from fopd_jax.stages.problem import make_problem
from tests.configs import load

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=4, channels=3,
    context_dim=32, pooled_dim=24, table_size=6, base_size=6,
)  # fmt: skip
PEAK = MatmulPeak("float32", 8, 2e9, 1e9)


@pytest.fixture(autouse=True)
def tiny_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "miniature", TINY)
        with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
            yield


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


def tiny_config(**fields: Any) -> Any:
    config = load()
    assign(config, {"sampler.num_steps": 3, "adapter.rank": 2, "batch_size": 4} | fields)
    return resolve(config)


# ---- the whole of it


@pytest.fixture(scope="module")
def measured(mesh: Mesh) -> tuple[Problem, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "miniature", TINY)
        problem = make_problem(tiny_config(), mesh)
        with jax.numpy_dtype_promotion("standard"):
            return problem, measure(problem, PEAK, Options(steps=2, warmup=1, phases=True))


def test_rates_follow_from_the_median_step(measured: tuple[Problem, dict[str, Any]]):
    problem, fields = measured
    median = fields["step"]["median"]
    assert fields["fits"]
    assert fields["step"]["count"] == 2
    assert fields["samples_per_second"] == pytest.approx(4 / median)
    assert fields["mfu"]["matmul"] == pytest.approx(problem.flops.model / median / PEAK.flops_per_second)
    assert fields["mfu"]["datasheet"] is None
    assert fields["hfu"] == fields["mfu"]  # nothing is repeated
    assert fields["tokens"] == {"image": 36, "text": fields["tokens"]["text"]}


def test_compiled_twice_and_served_from_the_cache_once(measured: tuple[Problem, dict[str, Any]]):
    assert measured[1]["compile"]["cached"] is not None


def test_phases_add_up_to_the_step(measured: tuple[Problem, dict[str, Any]]):
    problem, fields = measured
    names = ["rollout = student forward", "teachers", "anchor", "backward", phases.UPDATE, "not attributed"]
    assert [each["phase"] for each in fields["phases"]] == names
    assert sum(each["seconds"] for each in fields["phases"]) == pytest.approx(fields["step"]["median"])
    assert sum(each["share"] for each in fields["phases"]) == pytest.approx(1)
    assert set(fields["programs"]) == {"rollout", "teachers", "anchor", "gradients", "update"}
    flops = [each["flops_per_second_per_chip"] * each["seconds"] for each in fields["phases"] if each["mfu"]]
    if len(flops) == 4:  # else a difference of tiny times is negative, and no rate
        assert sum(flops) == pytest.approx(problem.flops.model)


def test_memory_of_the_program_holds_what_is_held(measured: tuple[Problem, dict[str, Any]]):
    _, fields = measured
    assert fields["memory"]["total"] > fields["memory"]["arguments"] > fields["held_bytes"]["total"]
    assert fields["memory"]["peak"] is None  # a CPU does not count


def test_the_table_says_it_all(measured: tuple[Problem, dict[str, Any]]):
    text = describe(measured[1])
    for wanted in ("samples/s/chip", "MFU", "from the cache", "not attributed", "36 + ", "peak not counted here"):
        assert wanted in text


# ---- parts


def test_replay_has_phases_of_its_own():
    """Two updates on halves of a rollout: training is timed on one half and counts twice."""
    problem = make_problem(tiny_config(updates_per_rollout=2, minibatches=2), make_mesh(MeshShape(), jax.devices()[:1]))
    pieces = problem.update.pieces
    seconds = {"rollout": 1.0, "teachers": 3.0, "anchor": 4.0, "gradients": 6.0, "update": 0.5}
    found = phases.phases(
        pieces, {name: summarise([value]) for name, value in seconds.items()}, summarise([10.0]), problem.flops
    )
    assert [(each.name, each.seconds) for each in found] == [
        ("rollout", 1.0), ("teachers", 2.0), ("anchor", 1.0), ("student forward and backward", 4.0),
        (phases.UPDATE, 1.0), ("not attributed", 1.0),
    ]  # fmt: skip
    assert sum(each.flops for each in found) == problem.flops.model
    shapes = jax.eval_shape(_ablations(problem)["gradients"], *problem.update.arguments)
    assert shapes[1]["loss"].shape == (2,)


def _ablations(problem: Problem) -> dict[str, Any]:
    update = problem.update
    return phases.programs(update.pieces, update.optimizer, update.ema)


def test_one_timestep_has_no_phases(mesh: Mesh):
    problem = make_problem(tiny_config(one_timestep=True, **{"objective.name": "direct"}), mesh)
    with pytest.raises(ValueError, match=r"^phases: one_timestep trains after its rollout"):
        _ablations(problem)


def test_each_program_does_more_than_the_one_before(mesh: Mesh):
    """By the matrix products that XLA counts (a scan's body once)."""
    problem = make_problem(tiny_config(), mesh)
    programs = _ablations(problem)
    counts = [
        jax.jit(programs[name]).lower(*problem.update.arguments).cost_analysis()["flops"]
        for name in ("rollout", "teachers", "anchor", "gradients")
    ]
    assert counts == sorted(counts)
    assert counts[1] > 1.5 * counts[0]
    assert counts[2] > 1.2 * counts[1]
    assert counts[3] > 1.2 * counts[2]


def test_random_arguments_are_as_the_update_takes_them(mesh: Mesh):
    update = make_problem(tiny_config(), mesh).update
    arguments = random_arguments(update)
    for found, shape in zip(jax.tree.leaves(arguments), jax.tree.leaves(update.arguments), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (shape.shape, shape.dtype, shape.sharding)
    frozen, state, batch = arguments
    np.testing.assert_array_equal(batch.route, [0, 1, 0, 1])
    assert all(jnp.count_nonzero(leaf) for leaf in jax.tree.leaves((frozen, state.trained, state.ema)))
    assert not any(jnp.count_nonzero(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_a_base_that_is_there_is_taken(mesh: Mesh):
    update = make_problem(tiny_config(), mesh).update
    params = random_arguments(update)[0].variables["params"]
    arguments = random_arguments(update, params)
    assert arguments[0].variables["params"] is params
    assert jax.tree.structure(arguments) == jax.tree.structure(update.arguments)


def test_what_is_held_is_counted_once_each(mesh: Mesh):
    update = make_problem(tiny_config(), mesh).update
    held = held_bytes(update)
    assert held["optimizer"] == 2 * held["trained"] + 8  # two moments and two counters
    assert held["ema"] == held["trained"]
    assert held["bank"] == 3 * held["trained"]  # two teachers and the anchor, all float32
    assert held["total"] == sum(held[name] for name in ("base", "bank", "trained", "optimizer", "ema"))


def test_a_timing_is_of_the_counted_calls():
    calls = []
    timing = time_calls(lambda: calls.append(1), 4, warmup=3)
    assert len(calls) == 7
    assert timing.count == 4
    assert 0 <= timing.minimum <= timing.lower <= timing.median <= timing.upper <= timing.maximum
    assert summarise([1.0, 2.0, 3.0, 4.0, 5.0]) == dataclasses.replace(
        timing, count=5, warmup=0.0, minimum=1.0, lower=2.0, median=3.0, upper=4.0, maximum=5.0
    )


def test_the_matrix_product_is_timed(monkeypatch: pytest.MonkeyPatch):
    from fopd_jax.performance import timing

    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 64})
    peak = matmul_peak(jax.devices()[0])
    assert (peak.dtype, peak.side) == ("float32", 64)
    assert peak.flops_per_second >= peak.median_flops_per_second > 0


def test_utilisation_tells_repeated_work_and_the_datasheets_peak_apart(mesh: Mesh):
    """Two seconds for an update of 4 on a chip of 989 TFLOP/s, with full rematerialisation."""
    problem = make_problem(tiny_config(**{"model.remat": "full"}), mesh)
    found = speed(problem.samples, problem.flops, problem.mesh.size, summarise([2.0]), PEAK, "NVIDIA H200")
    assert found["mfu"]["datasheet"] == pytest.approx(problem.flops.model / 2 / 989e12)
    assert found["hfu"]["matmul"] == pytest.approx(problem.flops.hardware / 2 / PEAK.flops_per_second)
    assert found["hfu"]["matmul"] > found["mfu"]["matmul"]


def test_chips_are_known_by_jaxs_names():
    found = [find_chip(kind) for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "TPU v6 lite", "cpu")]
    assert [chip and chip.peak_flops for chip in found] == [989e12, 312e12, 918e12, None]


# ---- what does not fit


def test_a_program_larger_than_the_memory_is_not_run(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "available_memory", lambda: 10)
    monkeypatch.setattr(module, "random_arguments", lambda update: pytest.fail("weights were made"))
    problem = make_problem(tiny_config(), mesh)
    fields = measure(problem, PEAK, Options())
    assert not fields["fits"]
    assert "GiB" in fields["reason"]
    assert "does not fit" in describe(fields)


def test_the_devices_own_refusal_is_an_answer_and_other_failures_are_not(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    def run(message: str) -> Any:
        def refuse(*_: Any) -> None:
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(module, "_run", refuse)
        return measure(make_problem(tiny_config(), mesh), PEAK, Options())

    assert run("RESOURCE_EXHAUSTED: Out of memory while trying to allocate\nmore")["reason"].endswith("allocate")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run("INTERNAL: broken")


def test_memory_is_checked_against_the_device():
    module.check_memory(Memory(0, 0, 1, 0), jax.devices()[0])
    with pytest.raises(module.OutOfMemory, match=r"needs 1048576\.0 GiB"):
        module.check_memory(Memory(GIB << 20, 0, 0, 0), jax.devices()[0])


# ---- sweeps


def test_batches_double_until_one_does_not_fit(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    def pretend(problem: Problem, matmul: MatmulPeak, options: Options) -> dict[str, Any]:
        fits = problem.samples <= 16
        return {"batch_size": problem.samples, "fits": fits, "steps": options.steps, "reason": "too large"}

    def make(count: int) -> Problem:
        return make_problem(with_batch(tiny_config(), count), mesh)

    monkeypatch.setattr(sweeps, "measure", pretend)
    rows = list(sweeps.sweep_batches(make, 4, PEAK, Options()))
    assert [(each["batch_size"], each["fits"], each["steps"]) for each in rows] == [
        (8, True, 3), (16, True, 3), (32, False, 3),
    ]  # fmt: skip
    assert describe_batches(rows[-1:]).endswith("32  does not fit: too large")


def test_a_config_in_other_sizes_leaves_the_given_one_alone():
    config = tiny_config()
    assert list(with_teachers(config, 3).tasks) == ["task0", "task1", "task2"]
    assert len(with_teachers(config, 1).tasks) == 1
    assert with_batch(config, 8).batch_size == 8
    assert (len(config.tasks), config.batch_size) == (2, 4)


def test_a_stage_without_such_an_update_is_refused(mesh: Mesh):
    with pytest.raises(ValueError, match=r"^stage: found 'flow_matching', expected 'opd'$"):
        make_problem(FlowMatching(), mesh)


def test_a_teacher_more_costs_an_adapter_and_no_arithmetic(mesh: Mesh):
    """From 1 to 8 teachers: the same FLOPs by the formula, at most 5% more by XLA, memory grows by 7 adapters.

    Temporaries may grow by one gather's copy of the bank, in the whole by less than another adapter each.
    """
    few, many = (make_problem(with_teachers(tiny_config(), count), mesh) for count in (1, 8))
    adapter = sum(map(shard_bytes, jax.tree.leaves(few.update.arguments[1].trained)))
    first, last = (each.update.step.lower(*each.update.arguments).compile() for each in (few, many))
    assert many.flops == few.flops
    assert last.cost_analysis()["flops"] <= 1.05 * first.cost_analysis()["flops"]
    before, after = (memory_of(each.memory_analysis()) for each in (first, last))
    assert after.arguments - before.arguments == 7 * adapter
    assert after.temporaries - before.temporaries < 7 * adapter


def test_growth_is_told_a_teacher(measured: tuple[Problem, dict[str, Any]]):
    first = measured[1] | {"teachers": 1}
    last = first | {
        "teachers": 8,
        "step": first["step"] | {"median": 1.02 * first["step"]["median"]},
        "memory": first["memory"] | {"total": first["memory"]["total"] + (7 << 20)},
    }
    assert describe_teachers([first, last]).endswith("from 1 to 8: +2.0% a sample, 1.00 MiB a teacher")


# ---- no compilation and no transfer where there should be none


def test_steps_compile_once_and_move_nothing(mesh: Mesh):
    """Through `jit` itself, as the training loop calls it: three steps, one compilation, none of them a transfer."""
    update = make_problem(tiny_config(), mesh).update
    frozen, state, batch = random_arguments(update)
    step: Any = update.step
    with empty_cache(), cache_use() as use:
        state, metrics = jax.block_until_ready(step(frozen, state, batch))
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, metrics = jax.block_until_ready(step(frozen, state, batch))
        assert use.requests == 1
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert not metrics["skipped"]


def test_a_transfer_between_steps_is_caught():
    with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
        time_calls(lambda: jnp.ones(3) + np.ones(3, np.float32), 1, warmup=1)


def test_the_cache_serves_the_second_compilation_alone(mesh: Mesh):
    update = make_problem(tiny_config(), mesh).update
    before = jax.config.jax_compilation_cache_dir
    with empty_cache():
        with cache_use() as use:
            compiled = compile_twice(update)
        assert (use.requests, use.hits, use.compiled) == (2, 1, 1)
        assert compiled.cached_seconds is not None
        assert jax.config.jax_compilation_cache_dir != before
    assert jax.config.jax_compilation_cache_dir == before
