"""What a detector of COCO's objects finds in an image, whichever detector it is."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in COCO's order, as GenEval spells them; labels are places among them."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects of one image: boxes (x0, y0, x1, y1) in pixels, scores in [0, 1], labels, and masks if there are.

    Raises:
      ValueError: their numbers differ.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n h w"] | None = None

    def __post_init__(self) -> None:
        counts = {len(each) for each in (self.boxes, self.scores, self.labels, self.masks) if each is not None}
        if len(counts) != 1:
            raise ValueError(
                f"detections: found {sorted(counts)} boxes, scores, labels, masks, expected as many of each"
            )


Detect = Callable[[UInt8[np.ndarray, "b h w 3"]], list[Detections]]
"""Images, RGB, to what is found in each, in no order; scores below .05 may be left out."""
