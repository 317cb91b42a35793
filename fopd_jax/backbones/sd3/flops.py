"""FLOPs of an MMDiT by arithmetic: one forward, its gradient, what rematerialisation repeats.

Matrix products alone are counted, two FLOPs a multiply-add; norms, softmax and the like are below 1% of a published
network. XLA's own count sees the body of a scan once, so it does not serve for a scanned network. A gradient costs what
the mathematics needs; what rematerialisation repeats stands apart, so that a utilisation can leave it out (MFU) or
count it (HFU).
"""

import math
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import target_kernels
from fopd_jax.backbones.record import Pass, Tokens
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.sd3.network import TARGETS, parameter_shapes
from fopd_jax.models.mmdit import LAYER_STACKS, MMDiTConfig

Tree = Any
Path = tuple[str, ...]
BLOCKS = (*LAYER_STACKS, "last_block")
_PER_SAMPLE = ("linear", "linear_1", "linear_2")  # adaLN, and the embedding that it reads
_TEXT = ("context_embed", "ff_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # they read a block's input
_ENTRANCES = (("patch_embed",), ("context_embed",), ("time_embed", "linear_1"), ("pooled_embed", "linear_1"))


def forward_flops(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None = None) -> float:
    """One sample through the network, under an adapter or not."""
    dense = sum(_dense(network, tokens).values())
    return dense + _all_attention(network, tokens) + _adapter(network, tokens, lora)


def pass_flops(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None, remat: str) -> Pass:
    """One sample's forward and gradient: of the adapter, or without one (None) of the whole network.

    The adapter is taken to act in every block's joint attention, as `attn` among its targets makes it.
    """
    forward = forward_flops(network, tokens, lora)
    backward = _backward_network(network, tokens) if lora is None else _backward_adapter(network, tokens, lora)
    return Pass(forward, backward, _RECOMPUTED[remat](network, tokens, lora), _all_attention(network, tokens))


def coordinates_backward(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig) -> float:
    """What an adapter's backward is more, of one sample, where the embedding trains with it: through all of adaLN, and
    through what stands before the first block's adapter. The layer itself is nothing beside it, and what else is
    rematerialised of the first block is not counted.
    """
    dense = _dense(network, tokens)
    modulations = sum(flops for path, flops in dense.items() if path[-1] == "linear")
    return modulations + _before_adapter(network, tokens, lora, dense)


# ---- parts


def _dense(network: MMDiTConfig, tokens: Tokens) -> dict[Path, float]:
    """Forward FLOPs of each dense module, over all its layers."""
    shapes: dict[Path, Any] = flatten_dict(parameter_shapes(network))
    return {
        path[:-1]: 2.0 * _rows(path[:-1], tokens) * math.prod(leaf.shape)
        for path, leaf in shapes.items()
        if path[-1] == "kernel"
    }


def _rows(path: Path, tokens: Tokens) -> int:
    if path[-1] in _PER_SAMPLE:
        return 1
    return tokens.text if any(name in _TEXT for name in path) else tokens.image


def _attention(network: MMDiTConfig, tokens: Tokens) -> tuple[float, float]:
    """Scores and weighted values of one block's joint attention, and of a dual block's image-only one.

    All queries count, those of the last block's text too, whose outputs nobody reads.
    """
    return 4.0 * network.width * (tokens.image + tokens.text) ** 2, 4.0 * network.width * tokens.image**2


def _all_attention(network: MMDiTConfig, tokens: Tokens) -> float:
    joint, dual = _attention(network, tokens)
    return network.depth * joint + network.dual_layers * dual


def _adapter(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None, blocks: tuple[str, ...] = BLOCKS) -> float:
    if lora is None:
        return 0.0
    kernels = target_kernels(parameter_shapes(network), lora.targets, TARGETS)
    return sum(
        2.0 * _rows(path, tokens) * math.prod(leaf.shape[:-2]) * lora.rank * sum(leaf.shape[-2:])
        for path, leaf in kernels.items()
        if path[0] in blocks
    )


def _backward_network(network: MMDiTConfig, tokens: Tokens) -> float:
    """To the matrices and to the activations; nothing trains before the entrances."""
    dense = _dense(network, tokens)
    matrices = 2 * sum(dense.values()) - sum(flops for path, flops in dense.items() if path in _ENTRANCES)
    return matrices + 2 * _all_attention(network, tokens)


def _backward_adapter(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig) -> float:
    """To the factors, and through the frozen matrices to the activations, as far as they depend on the adapter."""
    dense = _dense(network, tokens)
    through = sum(flops for path, flops in dense.items() if path[-1] not in _PER_SAMPLE and path not in _ENTRANCES)
    attention = 2 * _all_attention(network, tokens)
    return through + attention + 2 * _adapter(network, tokens, lora) - _before_adapter(network, tokens, lora, dense)


def _before_adapter(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig, dense: dict[Path, float]) -> float:
    """What of the first block's backward nobody needs: its projections' inputs, and an image attention unadapted."""
    first = next(name for name in BLOCKS if name in parameter_shapes(network))
    layers = {"dual_blocks": network.dual_layers, "blocks": network.depth - 1, "last_block": 1}[first]
    constant = _constant_attention(network, lora)
    unneeded = sum(
        flops
        for path, flops in dense.items()
        if path[0] == first and (path[-1] in _PROJECTIONS or (constant and path[1] == "attn2"))
    )
    return unneeded / layers + (2 * _attention(network, tokens)[1] if constant else 0.0)


def _constant_attention(network: MMDiTConfig, lora: LoRAConfig) -> bool:
    """Whether there is an image attention that nothing trains before, the first: no backward passes it."""
    return network.dual_layers > 0 and "attn2" not in lora.targets


# ---- rematerialisation, of all blocks but the last


def _repeat_blocks(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None) -> float:
    """The blocks forward once more; an adapter's gradient does not ask for what the last matrices give."""
    dense = _dense(network, tokens)
    last = ("ff/down", "ff_context/down") if lora is not None else ()
    blocks = sum(flops for path, flops in dense.items() if path[0] in LAYER_STACKS and "/".join(path[-2:]) not in last)
    return blocks + _stacked_attention(network, tokens) + _adapter(network, tokens, lora, LAYER_STACKS)


def _stacked_attention(network: MMDiTConfig, tokens: Tokens) -> float:
    return _all_attention(network, tokens) - _attention(network, tokens)[0]


def _repeat_all_else(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None) -> float:
    """The blocks forward once more but for their attentions: flash kernels keep all that their backward reads.

    An attention without a backward reads nothing, so that its projections are not made again either. XLA's attention
    makes its scores again, which is not counted.
    """
    unneeded = 0.0
    if lora is not None and _constant_attention(network, lora):
        projections = (
            flops
            for path, flops in _dense(network, tokens).items()
            if path[:2] == ("dual_blocks", "attn2") and path[-1] in _PROJECTIONS
        )
        unneeded = sum(projections) / network.dual_layers
    return _repeat_blocks(network, tokens, lora) - _stacked_attention(network, tokens) - unneeded


def _repeat_nothing(network: MMDiTConfig, tokens: Tokens, lora: LoRAConfig | None) -> float:
    """No product; the scores of XLA's attention are not counted here either."""
    return 0.0


_RECOMPUTED: dict[str, Callable[[MMDiTConfig, Tokens, LoRAConfig | None], float]] = {
    "full": _repeat_blocks,
    "attention": _repeat_all_else,
    "dots": _repeat_nothing,
    "none": _repeat_nothing,
}
