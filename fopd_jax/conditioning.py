"""What a prompt becomes: the two text inputs of the network."""

from typing import Any

from flax import struct


@struct.dataclass
class Conditioning:
    """Encoded prompts: `context [B, S, context_dim]` per token (padding included: it is attended), `pooled [B, P]`."""

    context: Any  # float arrays, numpy or jax; Any because tree operations put anything into a leaf
    pooled: Any
