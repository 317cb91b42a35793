"""Figures of a compilation: what is added up, what is warned of, and what is printed."""

from typing import Any

import pytest

from fopd_jax.performance.compilation import Compilation, Memory
from fopd_jax.performance.flops import Update
from fopd_jax.performance.hlo import Collective
from fopd_jax.performance.report import (
    collective_fields,
    describe,
    flops_fields,
    loop_reductions,
    memory_fields,
    roofline,
)
from fopd_jax.performance.topology import CHIPS, GIB, GPUS

MESH = {"data": 4, "fsdp": 2, "tensor": 1}
ROW, COLUMN = ((0, 1),), ((0, 2, 4, 6),)  # devices along fsdp, along data
UPDATE = Update(teachers=4e15, rollout=0.0, forward=2e15, backward=2e15, recomputed=1e15)


def _collective(kind: str, depth: int, executions: int | None, devices: Any = COLUMN, **changes: Any) -> Collective:
    return Collective(kind, f"{kind}.1", changes.pop("bytes", 1000), True, depth, executions, devices, "", **changes)


def test_collectives_are_added_up_by_kind_axes_and_depth():
    found = [_collective("all-gather", 2, 90, ROW)] * 3 + [_collective("all-reduce", 0, 1)]
    deep, shallow = collective_fields(found, MESH)
    assert deep == {
        "kind": "all-gather", "axes": ["fsdp"], "loop_depth": 2, "count": 3, "bytes": 3000, "executed_bytes": 270000,
    }  # fmt: skip
    assert (shallow["axes"], shallow["executed_bytes"]) == (["data"], 1000)


def test_a_loop_of_unknown_length_makes_the_total_unknown():
    (row,) = collective_fields([_collective("all-gather", 1, None), _collective("all-gather", 1, 9)], MESH)
    assert row["executed_bytes"] is None


def test_only_sums_over_the_batchs_axes_inside_loops_are_warned_of():
    inside = _collective("all-reduce", 1, 9)
    others = [
        _collective("all-reduce", 0, 1),
        _collective("all-gather", 1, 9),
        _collective("all-reduce", 1, 9, ((0, 0),)),  # crosses nothing
        Collective("all-reduce", "route", 8, False, 1, 9, COLUMN, ""),  # integers
    ]
    assert loop_reductions([*others, inside], MESH) == [inside]


def test_roofline_is_the_slower_of_arithmetic_and_network():
    """v6e: 918 TFLOP/s, and 400 GB/s out of a chip; a ring of 4 sends 3/4 of a gather's result, twice for a sum."""
    seconds = roofline(UPDATE, [_collective("all-reduce", 1, 9, bytes=4 * GIB)], MESH, 8, CHIPS["v6e"])
    assert seconds["compute"] == pytest.approx(9e15 / 8 / 918e12)
    assert seconds["network"] == pytest.approx(9 * 4 * GIB * 1.5 / 400e9)
    assert seconds["update"] == max(seconds["compute"], seconds["network"])
    gathered = roofline(UPDATE, [_collective("all-gather", 1, 9, bytes=4 * GIB)], MESH, 8, CHIPS["v6e"])
    assert gathered["network"] == pytest.approx(seconds["network"] / 2)


def test_between_nodes_each_card_sends_its_share():
    """Two nodes of 8 H100: half of a sum's eighth goes twice through a card of 50 GB/s; NVLink bounds the rest."""
    mesh, card = {"data": 2, "fsdp": 8, "tensor": 1}, GPUS["NVIDIA H100 80GB HBM3"]
    everywhere, within, across = (), (tuple(range(8)),), ((0, 8),)
    found = {
        name: roofline(UPDATE, [_collective("all-reduce", 0, 1, devices, bytes=4 * GIB)], mesh, 16, card)["network"]
        for name, devices in (("everywhere", everywhere), ("within", within), ("across", across))
    }
    assert found["within"] == pytest.approx(4 * GIB * 2 * 7 / 8 / 450e9)
    assert found["everywhere"] == max(found["within"], found["across"] / 8)
    assert found["across"] == pytest.approx(4 * GIB * 2 / 2 / 50e9)


def test_a_program_that_its_compiler_does_not_refuse_may_still_not_fit():
    card, memory = GPUS["NVIDIA H100 80GB HBM3"], Memory(5 * GIB, 0, 70 * GIB, 0)
    assert memory_fields(Compilation(1.0, 1.0, memory.total, memory, "text"), card)["fits"]
    larger = Memory(5 * GIB, 0, 75 * GIB, 0)
    fields = memory_fields(Compilation(1.0, 1.0, larger.total, larger, "text"), card)
    assert (fields["fits"], fields["total_bytes"]) == (False, 80 * GIB)


def test_flops_are_per_chip():
    fields = flops_fields(UPDATE, 8)
    assert (fields["model"], fields["hardware"], fields["teachers"]) == (1e15, 9e15 / 8, 5e14)


def _fields(compilation: Compilation) -> dict[str, Any]:
    return {
        "config": "sd35m", "topology": "v6e:2x4", "chips": 8, "mesh": MESH, "batch_size": 32, "per_chip_batch": 4,
        "trained": "adapter", "lower_seconds": 1.0, "compile_seconds": 240.0,
        "memory": memory_fields(compilation, CHIPS["v6e"]), "flops_per_chip": flops_fields(UPDATE, 8),
    }  # fmt: skip


def test_a_program_that_does_not_fit_is_said_to():
    text = describe(_fields(Compilation(1.0, 240.0, 40 * GIB, None, "")))
    assert "does not fit: needs 40.00 GiB of 31.25 GiB a chip" in text
    assert "collectives" not in text


def test_a_program_that_fits_is_told_with_loops_and_trials():
    fields = _fields(Compilation(1.0, 240.0, 11 * GIB, Memory(5 * GIB, 0, 6 * GIB, 0), "text"))
    fields |= {
        "collectives": collective_fields([_collective("all-reduce", 1, 9)], MESH),
        "loop_reductions": {"count": 1, "bytes": 1000, "operations": []},
        "search": {"largest": 4, "trials": [{"per_chip_batch": 4, "fits": True, "total_bytes": 11 * GIB}]},
    }
    text = describe(fields)
    for expected in ("11.00 GiB of 31.25 GiB", "all-reduce", "loops 1", "1 inside loops", "4: 11.00 GiB fits"):
        assert expected in text
