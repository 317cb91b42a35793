"""The device mesh: axes `data` (batch), `fsdp` (batch and parameters), `tensor` (heads and hidden features)."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from fopd_jax.config.schema import MeshShape

AXES = ("data", "fsdp", "tensor")
_ABSENT = ("not in the list of known backends", "cannot open shared object", "no device found", "no supported devices")


def axis_lengths(shape: MeshShape, devices: int) -> tuple[int, int, int]:
    """Lengths of data, fsdp and tensor whose product is the number of devices.

    Raises:
      ValueError: names the field, the lengths and the number of devices.
    """
    lengths = [shape.data, shape.fsdp, shape.tensor]
    if any(length < 1 and length != -1 for length in lengths) or lengths.count(-1) > 1:
        raise ValueError(f"run.mesh: found {dataclasses.asdict(shape)}, expected lengths ≥ 1, at most one of them -1")
    if -1 in lengths:
        lengths[lengths.index(-1)] = devices // math.prod(length for length in lengths if length != -1)
    if math.prod(lengths) != devices:
        raise ValueError(f"run.mesh: {dataclasses.asdict(shape)} does not fill {devices} devices exactly")
    return lengths[0], lengths[1], lengths[2]


def visible_devices() -> list[Any]:
    """All devices of all processes.

    Raises:
      ValueError: JAX_PLATFORMS names what this machine does not have.
      OSError: a device is there, but does not answer, or another process holds it.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a platform's plug-in is not installed
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()) or "its plug-in is not installed"
        wanted = os.environ.get("JAX_PLATFORMS", "")
        message = f"JAX_PLATFORMS: found {wanted!r}, but no such device can be used here: {reason}"
        absent = not str(error) or any(sign in str(error) for sign in _ABSENT)
        raise ValueError(message) if wanted and absent else OSError(message) from None


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, its axes left to the compiler (GSPMD).

    Within a slice (devices joined by fast links) the axes follow the machine's torus. Over several slices, `data`
    alone crosses the slow network between them: nothing but one gradient reduction an update has to.

    Raises:
      ValueError: as `axis_lengths`; or the slices do not divide `data`.
      ValueError, OSError: as `visible_devices`.
    """
    devices = visible_devices() if devices is None else devices
    lengths = axis_lengths(shape, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True)
    else:
        grid = _hybrid(lengths, devices, slices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _hybrid(lengths: tuple[int, int, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    data, *inner = lengths
    if data % slices:
        raise ValueError(
            f"run.mesh.data: found {data}, expected a multiple of the {slices} slices that the devices are in"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def fold_data(mesh: Mesh) -> Mesh:
    """The same devices in the same order, `data` joined to `fsdp` within each slice.

    For parameters that are read once an update: they are split over as many devices as there are, and gathered over
    fast links alone. Batches lie on both meshes alike.
    """
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    devices = mesh.devices.reshape(slices, -1, mesh.shape["tensor"])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
