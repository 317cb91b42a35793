"""The detector that a config names."""

import importlib
from pathlib import Path
from typing import cast

from fopd_jax.rewards.geneval import onnx
from fopd_jax.rewards.geneval.detections import Detect

MASK2FORMER, ONNX = "mask2former", "onnx"


def find_detector(name: str, weights: str, options: onnx.OnnxOptions, field: str) -> Detect:
    """GenEval's own, `mask2former`, on the accelerator; `onnx`, on the host; or a `Detect` as package.module:function.

    `field`: the reward's in the config.

    Raises:
      ValueError: there is none of this name, or it cannot be made of these weights; names the field.
    """
    if ":" in name:
        if weights:
            raise ValueError(f"{field}.weights: found {weights!r}, expected '': {name} reads its own")
        return _imported(name, field)
    if name not in (MASK2FORMER, ONNX):
        raise ValueError(
            f"{field}.options.detector: found {name!r}, expected mask2former, onnx or package.module:function"
        )
    if not weights:
        raise ValueError(f"{field}.weights: found '', expected the file of the detector {name}")
    if name == ONNX:
        return onnx.make_detector(Path(weights), options, field)
    from fopd_jax.rewards.geneval import mask2former

    return mask2former.make_detector(Path(weights), f"{field}.weights")


def _imported(name: str, field: str) -> Detect:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # at import anything may go wrong
        raise ValueError(f"{field}.options.detector: cannot import {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"{field}.options.detector: {name}: found {found!r}, expected a function of images")
    return cast(Detect, found)
