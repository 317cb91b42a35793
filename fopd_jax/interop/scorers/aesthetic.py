"""The aesthetic predictor's head, `sac+logos+ava1-l14-linearMSE.pth` → one affine map.

It is five dense layers on CLIP-L/14's direction of a picture, with dropout between and no activations.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fopd_jax.interop.files.safetensors import Tree
from fopd_jax.interop.files.tables import check_names

NETWORK = "aesthetic"
_LAYERS = tuple(f"layers.{i}" for i in (0, 2, 4, 6, 7))


def recognises(names: Collection[str]) -> bool:
    """Whether a checkpoint with these tensors is the head."""
    return set(names) >= {f"{_LAYERS[0]}.weight", f"{_LAYERS[-1]}.weight"}


def convert(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> tuple[dict[str, Any], Tree]:
    """The shape `{"width": …}` and the parameters `{"kernel" [D], "bias" []}` of a whole state dict, folded in float64.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen; names it.
    """
    found = {name: tensor.shape for name, tensor in tensors.items()}
    kernel, bias, expected = np.eye(1), np.zeros(1), {}
    for name in reversed(_LAYERS):
        shape = found.get(f"{name}.weight", ())
        outputs, inputs = kernel.shape[1], shape[-1] if shape else 0
        own = {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        check_names({each: found[each] for each in own if each in found}, own)
        expected |= own
        bias = bias + kernel @ tensors[f"{name}.bias"].astype(np.float64)
        kernel = kernel @ tensors[f"{name}.weight"].astype(np.float64)
    check_names(found, expected)
    params = {"kernel": kernel[0].astype(np.float32), "bias": bias[0].astype(np.float32)}
    return {"width": kernel.shape[1]}, params
