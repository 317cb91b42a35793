"""Which kernels a network uses beside its attention, by name.

- `xla`: none; plain operations, which XLA fuses as it likes. Runs everywhere, and is what the other is held to.
- `pallas`: on TPUs LayerNorm with its modulation (`layer_norm`) and products with low-rank updates (`adapted`) as one
  kernel each, and gelu fenced off from the product that reads it (`models.fences`).
"""

from typing import Literal, get_args

import jax

KernelImpl = Literal["xla", "pallas"]
AUTO = "auto"
LANES = 128
"""Numbers of a register's row; the kernels' widths are multiples of it."""


def resolve_kernels(name: str, width: int, platform: str | None = None) -> KernelImpl:
    """The implementation that a config's `run.kernels` names; `auto` is `pallas` where it can run, else `xla`.

    `platform`: of the devices that the program is for (default: those of the default backend).

    Raises:
      ValueError: there is no such implementation, or it cannot run there. There is no silent fallback.
    """
    if name not in (AUTO, *get_args(KernelImpl)):
        raise ValueError(f"kernels: found {name!r}, expected one of {(AUTO, *get_args(KernelImpl))}")
    refusal = _refusal(width, platform or jax.default_backend())
    if name == "pallas" and refusal:
        raise ValueError(f"kernels: 'pallas' {refusal}; use 'xla' or 'auto'")
    return "xla" if name == "xla" or refusal else "pallas"


def _refusal(width: int, platform: str) -> str:
    """Why the kernels cannot run, or nothing."""
    if platform != "tpu":
        return f"needs a TPU, but the backend is {platform!r}"
    if width % LANES:
        return f"needs a width that is a multiple of {LANES}, but the network's is {width}"
    return ""
