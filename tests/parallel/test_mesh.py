"""Mesh shapes: what fills the devices, and what is refused."""

import re

import jax
import pytest
from jax.sharding import AxisType

from fopd_jax.parallel.mesh import AXES, MeshShape, make_mesh


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
    assert shape.resolve(devices) == expected


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
        shape.resolve(devices)


def test_a_mesh_covers_all_devices_and_leaves_its_axes_to_the_compiler():
    mesh = make_mesh(MeshShape())
    assert mesh.axis_names == AXES
    assert mesh.shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
