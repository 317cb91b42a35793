"""The device mesh: axes `data` (batch), `fsdp` (batch and parameters), `tensor` (heads and hidden features)."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Length of each axis; one of them may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """Lengths whose product is the number of devices.

        Raises:
          ValueError: names the field, the lengths and the number of devices.
        """
        lengths = [self.data, self.fsdp, self.tensor]
        if any(length < 1 and length != -1 for length in lengths) or lengths.count(-1) > 1:
            raise ValueError(f"mesh: found {dataclasses.asdict(self)}, expected lengths ≥ 1, at most one of them -1")
        if -1 in lengths:
            lengths[lengths.index(-1)] = devices // math.prod(length for length in lengths if length != -1)
        if math.prod(lengths) != devices:
            raise ValueError(f"mesh: {dataclasses.asdict(self)} does not fill {devices} devices exactly")
        return lengths[0], lengths[1], lengths[2]


def make_mesh(shape: MeshShape) -> Mesh:
    """A mesh over all devices, its axes left to the compiler (GSPMD).

    Raises:
      ValueError: as `MeshShape.resolve`.
    """
    return jax.make_mesh(shape.resolve(jax.device_count()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
