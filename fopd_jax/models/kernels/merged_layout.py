"""What the two kernels of merged attention share: how heads lie in 128 lanes, tokens in slots, and qk-RMSNorm.

Activations stay `[B, T, N·H]`, as a projection writes them. A program works on one row of the batch and one *group*:
the heads that fill the 128 lanes of a register, two of 64. Streams (image, text) are separate operands; in VMEM each
gets a *slot* of whole tiles, one behind the other, zeros behind its real tokens. Scores are kept transposed,
`[keys, queries]`: so sums over keys and factors per query need no lane reduction, and in every product but two the
operand that a matrix unit holds is the large one and what streams through it has 64 rows.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LANES, ROWS = 128, 16  # a register's lanes; tokens are padded to whole tiles of bfloat16
HEAD_DIMS = (16, 32, 64, 128)
EPSILON = 1e-6
_SHORT = 2048  # queries; up to here a multiple of 256 is a length, above it one of 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static facts of one call. `tokens`: real ones of each stream; the first `asking` streams have queries."""

    heads: int
    head_dim: int
    tokens: tuple[int, ...]
    asking: int
    normed: bool
    dtype: Any

    @property
    def lanes(self) -> int:
        return min(LANES, self.heads * self.head_dim)

    @property
    def group(self) -> int:
        """Heads of one program."""
        return self.lanes // self.head_dim

    @property
    def groups(self) -> int:
        return -(-self.heads // self.group)

    @property
    def slots(self) -> tuple[range, ...]:
        """Where each stream lies among all keys, and among all queries."""
        lengths = [-(-length // LANES) * LANES for length in self.tokens]
        return tuple(range(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths)))

    @property
    def keys(self) -> int:
        return self.slots[-1].stop

    @property
    def queries(self) -> int:
        length = self.slots[self.asking - 1].stop
        unit = 256 if length <= _SHORT else 512
        return -(-length // unit) * unit

    def block(self, most: int) -> int:
        """Queries of a block: the most that divide all and whose float32 scores take at most `most` bytes."""
        counts = [n for n in range(256, self.queries + 1, 256) if self.queries % n == 0]
        return max([n for n in counts if 4 * n * self.keys <= most], default=256)

    @property
    def query_scale(self) -> float:
        """1/√H, and log2(e): the kernels' exponentials are powers of two."""
        return self.head_dim**-0.5 * math.log2(math.e)


def dot(a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
    """Matrix product with float32 sums, exact products of whatever the operands hold."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# ---- tokens


def load_slot(ref: Any, stream: int, layout: Layout) -> Float[Array, "slot lanes"]:
    """One stream's rows in float32: zeros behind the real tokens, and in lanes of heads that there are not."""
    x = ref[0].astype(jnp.float32)
    slot, tokens = layout.slots[stream], layout.tokens[stream]
    if tokens < x.shape[0]:
        x = jnp.where(lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < tokens, x, 0.0)
    if layout.heads % layout.group:  # the last group is not whole; what lies beside it in VMEM may be anything
        lane = lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1) + pl.program_id(1) * layout.lanes
        x = jnp.where(lane < layout.heads * layout.head_dim, x, 0.0)
    missing = len(slot) - x.shape[0]
    return jnp.concatenate([x, jnp.zeros((missing, layout.lanes), jnp.float32)]) if missing else x


def fill_pads(x: Float[Array, "keys block"], layout: Layout, value: float) -> Float[Array, "keys block"]:
    """`x` with `value` in the rows of padding; only tiles that hold any are touched."""
    pieces = []
    for slot, tokens in zip(layout.slots, layout.tokens, strict=True):
        whole = slot.start + tokens // ROWS * ROWS
        pieces.append(x[slot.start : whole])
        if whole < slot.stop:
            row = lax.broadcasted_iota(jnp.int32, (slot.stop - whole, 1), 0) + whole
            pieces.append(jnp.where(row < slot.start + tokens, x[whole : slot.stop], value))
    return jnp.concatenate([piece for piece in pieces if piece.shape[0]])


# ---- qk-RMSNorm


def head_means(x: Float[Array, "t lanes"], layout: Layout) -> Float[Array, "t lanes"]:
    """The mean over each head's lanes, in all of its lanes, on the matrix unit, which is idle then.

    A product with a matrix of 1/H (a power of two). Of float32 operands two bfloat16 parts are summed, which hold the
    square of a bfloat16 number exactly; if the network computes in float32, all of it.
    """
    head = [lax.div(lax.broadcasted_iota(jnp.int32, (layout.lanes,) * 2, i), layout.head_dim) for i in range(2)]
    mean = jnp.where(head[0] == head[1], 1 / layout.head_dim, 0.0)
    if layout.dtype == jnp.float32:
        return dot(x, mean)
    mean, high = mean.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    return dot(high, mean) + dot((x - high.astype(jnp.float32)).astype(jnp.bfloat16), mean)


def normalise(x: Float[Array, "t lanes"], scale: Float[Array, "1 lanes"], layout: Layout) -> Float[Array, "t lanes"]:
    """x/rms(x)·scale for each head; without qk-norm x·scale."""
    return x * _inverse_rms(x, layout) * scale if layout.normed else x * scale


def normalise_backward(
    x: Float[Array, "t lanes"], gradient: Float[Array, "t lanes"], scale: Float[Array, "1 lanes"], layout: Layout
) -> tuple[Float[Array, "t lanes"], Float[Array, "1 lanes"]]:
    """Of `normalise`: the gradients of x, and of the scale in each lane."""
    if not layout.normed:
        return gradient * scale, jnp.zeros_like(scale)
    inverse = _inverse_rms(x, layout)
    unit, scaled = x * inverse, gradient * scale
    dx = inverse * (scaled - unit * head_means(scaled * unit, layout))
    return dx, (gradient * unit).sum(0, keepdims=True)


def _inverse_rms(x: Float[Array, "t lanes"], layout: Layout) -> Float[Array, "t lanes"]:
    return lax.rsqrt(head_means(x * x, layout) + EPSILON)


# ---- blocks of operands


def token_spec(length: int, layout: Layout) -> pl.BlockSpec:
    """All tokens of one row of the batch, one group's lanes."""
    return pl.BlockSpec((1, length, layout.lanes), lambda b, g: (b, 0, g))


def group_spec(rows: int, columns: int) -> pl.BlockSpec:
    """What belongs to one program: `[B, groups, rows, columns]`."""
    return pl.BlockSpec((1, 1, rows, columns), lambda b, g: (b, g, 0, 0))


def whole_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda b, g: (0,) * len(shape))


def shapes_of(arrays: tuple[Array, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
