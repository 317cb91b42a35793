"""The tests' small network (`tests.steps.opd.network`) in PyTorch, float64, written from its formulas."""

from typing import Any

import numpy as np
import torch

from fopd_jax.conditioning.encoder import Conditioning
from tests.steps.opd.network import STUDENT, WIDTH, prompts, variables

Factors = dict[tuple[str, str], torch.Tensor]


def to_torch(array: Any, requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.float64(array), requires_grad=requires_grad)


def torch_factors(weights: Any, requires_grad: bool = False) -> Factors:
    """By layer and factor."""
    return {
        (layer, factor): to_torch(weights[layer][factor], requires_grad) for layer in weights for factor in ("a", "b")
    }


def _dense(name: str, x: torch.Tensor, factors: Factors | None = None) -> torch.Tensor:
    kernel, bias = (to_torch(variables()["params"][name][each]) for each in ("kernel", "bias"))
    if factors is not None and (name, "a") in factors:
        kernel = kernel + STUDENT.scale * factors[name, "a"] @ factors[name, "b"]
    return x @ kernel + bias


def _forward(factors: Factors, x: torch.Tensor, sigma: torch.Tensor, text: Conditioning) -> torch.Tensor:
    prompt = _dense("pooled", to_torch(text.pooled)) + _dense("context", to_torch(text.context).mean(1))
    condition = (prompt + sigma[:, None]).expand(len(x), WIDTH)[:, None]
    tokens = x.reshape(len(x), -1, x.shape[-1])
    return _dense("down", torch.tanh(_dense("up", tokens, factors) + condition), factors).reshape(x.shape)


def torch_velocity(factors: Factors, x: Any, sigma: Any, text: Conditioning, scale: float = 1.0) -> torch.Tensor:
    """Guided velocity of an adapter's factors at `sigma`, one number or one a sample; the empty prompt as there."""
    x, levels = to_torch(x), torch.as_tensor(np.float64(sigma)).expand(len(x))
    null = _forward(factors, x, levels, prompts(7, 1))
    return null + scale * (_forward(factors, x, levels, text) - null)
