"""Mesh shapes: what fills the devices, and what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from fopd_jax.config.schema import MeshShape
from fopd_jax.parallel import mesh as module
from fopd_jax.parallel.mesh import AXES, axis_lengths, fold_data, make_mesh


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        (MeshShape(), 1, (1, 1, 1)),
        (MeshShape(), 8, (8, 1, 1)),
        (MeshShape(data=1, fsdp=-1), 8, (1, 8, 1)),
        (MeshShape(tensor=4), 8, (2, 1, 4)),
        (MeshShape(2, -1, 2), 256, (2, 64, 2)),
        (MeshShape(2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_one_axis_may_take_the_devices_that_are_left(shape: MeshShape, devices: int, expected: tuple[int, int, int]):
    assert axis_lengths(shape, devices) == expected


@pytest.mark.parametrize(
    ("shape", "devices", "message"),
    [
        (MeshShape(0, 1, 1), 8, "mesh: found {'data': 0, 'fsdp': 1, 'tensor': 1}, expected lengths ≥ 1"),
        (MeshShape(-2, 1, 1), 8, "mesh: found {'data': -2, 'fsdp': 1, 'tensor': 1}, expected lengths ≥ 1"),
        (MeshShape(-1, -1, 1), 8, "at most one of them -1"),
        (MeshShape(3, 1, 1), 8, "mesh: {'data': 3, 'fsdp': 1, 'tensor': 1} does not fill 8 devices exactly"),
        (MeshShape(-1, 3, 1), 8, "mesh: {'data': -1, 'fsdp': 3, 'tensor': 1} does not fill 8 devices exactly"),
        (MeshShape(-1, 4, 4), 8, "does not fill 8 devices exactly"),
        (MeshShape(2, 2, 1), 8, "does not fill 8 devices exactly"),
    ],
)
def test_a_shape_that_does_not_fill_the_devices_is_refused(shape: MeshShape, devices: int, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        axis_lengths(shape, devices)


def test_a_mesh_covers_all_devices_and_leaves_its_axes_to_the_compiler():
    mesh = make_mesh(MeshShape())
    assert mesh.axis_names == AXES
    assert mesh.shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as meshes look at it."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def _slices(count: int, chips: int) -> list[Chip]:
    return [Chip(id=s * chips + i, slice_index=s, process_index=s) for s in range(count) for i in range(chips)]


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(-1, 4, 1), MeshShape(4, 2, 2), MeshShape(2, -1, 2)])
def test_data_alone_crosses_slices(shape: MeshShape):
    grid = module._hybrid(axis_lengths(shape, 16), _slices(2, 8), 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert grid.shape == axis_lengths(shape, 16)
    assert len({chip.id for chip in grid.ravel()}) == 16
    for row in slices.reshape(len(grid), -1):  # one row of `data` lies in one slice
        assert len(set(row)) == 1
    assert slices.reshape(2, -1).tolist() == [[0] * 8, [1] * 8]


def test_data_has_to_span_the_slices():
    with pytest.raises(ValueError, match=r"mesh\.data: found 3, expected a multiple of the 2 slices"):
        module._hybrid((3, 4, 1), _slices(2, 6), 2)


@pytest.mark.parametrize(
    ("shape", "slices", "expected"),
    [((8, 2, 1), 1, (1, 16, 1)), ((1, 4, 4), 1, (1, 4, 4)), ((8, 2, 1), 2, (2, 8, 1)), ((4, 2, 2), 4, (4, 2, 2))],
)
def test_data_folds_into_fsdp_within_each_slice(shape: tuple[int, ...], slices: int, expected: tuple[int, ...]):
    """In the same order of devices, so that a batch split over both lies where it lay."""
    devices = np.array(_slices(slices, 16 // slices), object).reshape(shape)
    mesh = fold_data(Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == AXES
    assert mesh.devices.ravel().tolist() == devices.ravel().tolist()
    assert all(len({chip.slice_index for chip in row.ravel()}) == 1 for row in mesh.devices)
