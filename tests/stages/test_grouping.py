"""What several networks cost: by the share of the samples that is routed to each, as shapes alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from fopd_jax.config.parse import resolve
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.parallel.mesh import AXES
from fopd_jax.performance.weights import held_bytes
from fopd_jax.policy.groups import Slots
from fopd_jax.stages.abstract import abstract_update
from fopd_jax.stages.grouping import asked_by, asked_flops, check_slots, placement, slots_of
from fopd_jax.stages.opd_update import make_spec, update_cost
from tests.configs import load

MESH = AbstractMesh((8, 8, 1), AXES)
LATENT, TEXT, BATCH = (64, 64, 16), 77 + 128, 192
MEDIUM = MMDiT(PRESETS["sd35_medium"])
TASKS = ("geneval", "ocr", "pickscore")


def config_of(*networks: str, **changes: Any) -> Any:
    """Medium's students of three equal tasks, each with a teacher on the named network."""
    config = load("sd35m_large", **{"batch_size": BATCH, "objective.match": "guided", **changes})
    config.networks = {name: TeacherNetwork() for name in sorted(set(networks)) if name}
    for name, network in zip(TASKS, networks, strict=True):
        config.tasks[name] = dataclasses.replace(config.tasks[name], network=network, extrapolation=0.0)
    return resolve(config)


def asked(config: Any) -> dict[str, float]:
    return asked_flops(config, make_spec(config, LATENT, MESH), TEXT, MEDIUM, {})


def test_networks_cost_what_is_routed_to_them_however_many_there_are() -> None:
    """Of 192 samples on 64 devices each has 3, one a task: slots are exact, and K networks cost what one does."""
    one, two, three = asked(config_of(*["a"] * 3)), asked(config_of("a", "b", "b")), asked(config_of("a", "b", "c"))
    assert [len(each) for each in (one, two, three)] == [1, 2, 3]
    assert sum(two.values()) == pytest.approx(one["a"])
    assert sum(three.values()) == pytest.approx(one["a"])
    assert two["b"] == pytest.approx(2 * two["a"])
    share = asked(config_of("a", "", ""))
    assert share["a"] == pytest.approx(one["a"] / 3)
    large, medium = one["a"] / (2 * BATCH), share[""] / (2 * BATCH * 2 / 3)
    print(f"a forward of Large {large / 1e12:.2f} TFLOP, of Medium under an adapter {medium / 1e12:.2f}")
    assert 3 < large / medium < 4


def test_an_update_counts_them() -> None:
    for networks in (("a", "a", "a"), ("a", "b", "")):
        config = config_of(*networks)
        spec = make_spec(config, LATENT, MESH)
        cost = update_cost(config, spec, TEXT, MEDIUM)
        assert cost.teachers == pytest.approx((len(spec.sigmas) - 2) * sum(asked(config).values()))
    plain = update_cost(config_of("", "", ""), make_spec(config_of("", "", ""), LATENT, MESH), TEXT, MEDIUM)
    assert plain.forward == cost.forward


def test_slots_follow_the_tasks_shares_mixes_and_extrapolation() -> None:
    config = load("sd35m_large", batch_size=BATCH)
    config.tasks["geneval"] = dataclasses.replace(config.tasks["geneval"], weight=2.0, network="", extrapolation=0.0)
    config.tasks["ocr"] = dataclasses.replace(config.tasks["ocr"], mix={"ocr": 1.0, "geneval": 1.0})
    config = resolve(config)
    spec = make_spec(config, LATENT, MESH)
    assert spec.members == {"": (0, 4), "large": (1, 2)}
    np.testing.assert_array_equal(asked_by(config, spec), [[1, 0], [2, 1], [1, 1]])
    assert spec.slots == Slots(3, (2 * 1 + 2 + 1, 2)) == slots_of(config, spec, MESH)
    assert placement(config, spec, MESH) is not None
    assert make_spec(config, LATENT).slots is None
    assert slots_of(config_of("", "", ""), make_spec(config_of("", "", ""), LATENT, MESH), MESH) is None


def test_where_prompts_may_go_to_anyone_there_are_slots_for_all_of_them() -> None:
    """A classifier's likeliest teachers, coordinates, and mistakes, beside what tasks say of themselves."""
    cases: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
        "one of three": ({"routing.method": "classifier", "routing.top": 1}, [[1, 1]] * 3),
        "all of them": ({"routing.method": "classifier"}, [[1, 2]] * 3),
        "mistakes": ({"routing.wrong": 0.1}, [[1, 1]] * 3),
        "coordinates and the base": ({"coordinates.rank": 4, "trained": "adapter"}, [[2, 2]] * 3),
        "by task": ({}, [[1, 0], [0, 1], [0, 1]]),
    }
    for name, (changes, expected) in cases.items():
        config = config_of("", "a", "a", **changes)
        spec = make_spec(config, LATENT, MESH)
        np.testing.assert_array_equal(asked_by(config, spec), expected, name)
        assert spec.slots == Slots(3, tuple(min(3 * each, 6) for each in np.max(expected, 0).tolist())) or not changes


def test_networks_are_asked_along_the_teachers_own_steps() -> None:
    config = config_of("a", "b", "", **{"sampler.teacher_steps": 4})
    spec = make_spec(config, LATENT, MESH)
    cost = update_cost(config, spec, TEXT, MEDIUM)
    assert cost.teachers == pytest.approx(4 * (len(spec.sigmas) - 2) * sum(asked(config).values()))


def test_draws_that_were_not_dealt_out_are_refused() -> None:
    config = config_of("a", "b", "")
    spec = make_spec(config, LATENT, MESH)
    check_slots(config, spec, MESH, list(TASKS) * 64)
    with pytest.raises(ValueError, match=r"^tasks: a device is asked .*3.* questions, but has slots for \(1, 1, 1\)$"):
        check_slots(config, spec, MESH, [task for task in TASKS for _ in range(64)])


def test_by_turns_each_network_has_slots_for_a_whole_batch() -> None:
    """Its cost, for whose sake tasks share batches: slots that are not filled are computed all the same."""
    config = config_of("a", "b", "", alternate=1)
    spec = make_spec(config, LATENT, MESH)
    assert spec.slots == Slots(3, (3, 3, 3)) == slots_of(config, spec, MESH)
    for task in TASKS:
        check_slots(config, spec, MESH, [task] * BATCH)
    assert sum(asked(config).values()) == pytest.approx(3 * sum(asked(config_of("a", "b", "")).values()))


@pytest.mark.slow
def test_large_teaches_medium_as_shapes() -> None:
    """8 B beside 2 B, both split over 8 of 64 devices: what a device holds of each."""
    held = {}
    for dtype in ("bfloat16", "float8_e4m3"):
        config = load("sd35m_large", **{"batch_size": 256, "networks.large.dtype": dtype})
        update = abstract_update(resolve(config), MESH)
        held[dtype] = held_bytes(update)
        frozen = update.arguments[0]
        assert sum(leaf.size for leaf in jax.tree.leaves(frozen.networks["large"][0]["params"])) > 8e9
    print(held)
    half = held["float8_e4m3"]["networks"] / held["bfloat16"]["networks"]
    assert 0.5 < half < 0.56
