"""GenEval's own detector, Mask2Former Swin-S, on this process's accelerators."""

import functools
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from fopd_jax.interop.scorers.mask2former import network_config
from fopd_jax.interop.scorers.weights import load_weights
from fopd_jax.models.instances import Instances, detect
from fopd_jax.models.mask2former import Mask2Former
from fopd_jax.parallel.parts import at_once, in_parts, own_mesh
from fopd_jax.parallel.sharding import replicated
from fopd_jax.rewards.geneval.detections import CLASSES, Detect, Detections

NETWORK = "mask2former"
ROWS = 4
"""Pictures at once on one accelerator: what deformable attention gathers of one takes most of a gigabyte."""
LOWEST_SCORE = 0.05
"""Detections below are left out; GenEval's own limits are far above."""


def make_detector(weights: Path, field: str) -> Detect:
    """The detector of a file of converted weights; `field` is the config's that names it.

    It computes in float32, by products of high precision: thresholds on scores and masks' signs decide. It is compiled
    once a size of pictures.

    Raises:
      ValueError: there is no such file, it is another network's, or its classes are not COCO's; names field and file.
    """
    shape, params = load_weights(weights, NETWORK, field)
    config = network_config(shape)
    if config.decoder.num_classes != len(CLASSES):
        found = config.decoder.num_classes
        raise ValueError(f"{field}: {weights}: found a detector of {found} classes, expected COCO's {len(CLASSES)}")
    mesh = own_mesh()
    params = jax.device_put(params, replicated(mesh))
    program = jax.jit(functools.partial(detect, Mask2Former(config)))

    def find(images: UInt8[np.ndarray, "b h w 3"]) -> list[Detections]:
        with jax.default_matmul_precision("high"):
            found = in_parts(functools.partial(program, params), images, mesh, at_once(mesh, ROWS))
        return [_detections(found, i, images.shape[2]) for i in range(len(images))]

    return find


def _detections(found: Instances, image: int, width: int) -> Detections:
    """Of one image; a mask is unpacked for each detection that is kept."""
    scores, labels, queries, boxes, masks = (np.asarray(each[image]) for each in found)
    keep = np.flatnonzero(scores >= LOWEST_SCORE)
    kept_masks = np.unpackbits(masks[queries[keep]], axis=-1, count=width).astype(bool)
    return Detections(boxes[keep], scores[keep], labels[keep], kept_masks)
