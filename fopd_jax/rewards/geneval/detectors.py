"""The detector that a config names."""

from pathlib import Path

from fopd_jax.rewards.custom import import_function
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
        return import_function(f"{field}.options.detector", name)
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
