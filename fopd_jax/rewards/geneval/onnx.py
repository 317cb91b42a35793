"""COCO detectors as ONNX files: what their outputs mean is told from the outputs' shapes.

Four layouts, of b images:
- fastestdet [b, 85, h, w] (dog-qiuqiu/FastestDet): of a cell each objectness, offset, size, 80 class scores.
- yolo [b, 84, m] (YOLOv8, YOLO11): of m boxes centre and size in pixels, 80 class scores.
- end_to_end [b, m, 6] (YOLOv10, and exports that suppress overlaps themselves): of m boxes corners, score, class.
- detr [b, m, classes] and [b, m, 4]: logits; centres and sizes as shares of the image. 80 classes (RT-DETR, D-FINE) and
  91 (Deformable DETR) are sigmoids, 92 (DETR, YOLOS) a softmax whose last class is nothing. 91 and 92 count in COCO's
  own numbers, some of which no class has.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from fopd_jax.exits import naming, need
from fopd_jax.rewards.cores import cores
from fopd_jax.rewards.geneval.boxes import keep_apart
from fopd_jax.rewards.geneval.detections import Detect, Detections

LEAST_SCORE = 0.05
_ROUNDING = 1e-3
"""By which scores may lie outside of 0 to 1."""
MOST_IMAGES = 8
"""At once, by models that take any number."""
_PADDING = 114
"""Grey of a letterbox's edges, as YOLO is trained with."""
_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_STD = np.array((0.229, 0.224, 0.225), np.float32)
_SKIPPED = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""Of COCO's own numbers 0 to 90 those that no class has."""
_COCO = np.array([number for number in range(91) if number not in _SKIPPED])


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """How images are prepared and boxes chosen; "" and 0 stand for what the layout is trained with.

    `size`: pixels a side, for models that take any. `nms`: the overlap from which on the weaker of two boxes of a class
    is dropped. `threads`: at most, and no more than there are cores.
    """

    size: int = 0
    resize: str = ""
    channels: str = ""
    pixels: str = ""
    nms: float = 0.0
    threads: int = 4

    def __post_init__(self) -> None:
        known = {
            "resize": ("stretch", "letterbox"),
            "channels": ("RGB", "BGR"),
            "pixels": ("unit", "imagenet", "bytes"),
        }
        for name, values in known.items():
            if (found := getattr(self, name)) not in ("", *values):
                raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(values)}, or ''")
        for name, least, most in (("size", 0, 4096), ("nms", 0, 1), ("threads", 1, 256)):
            if not least <= (found := getattr(self, name)) <= most:
                raise ValueError(f"{name}: found {found}, expected {least} to {most}")


class Raw(NamedTuple):
    """What a network found in one image: boxes in pixels of its own input."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One kind of output. `decode(outputs of one image, (height, width) of the input)`."""

    name: str
    decode: Callable[[Sequence[np.ndarray], tuple[int, int]], Raw]
    resize: str
    channels: str
    pixels: str
    nms: float


def make_detector(weights: Path, options: OnnxOptions, field: str) -> Detect:
    """A detector that runs on this host's cores; a blank image goes through it first, to see what it gives.

    `field` is the reward's in the config, for messages.

    Raises:
      ValueError: onnxruntime is not there, the file is no model that it can run, or one whose input or outputs are
        none of those above.
    """
    session = _session(weights, options, field)
    name, many, size = _input_of(session, options, weights, field)
    blank = session.run(None, {name: np.zeros((many or 1, 3, *size), np.float32)})
    with naming(f"{field}.weights: {weights}"):
        layout = layout_of([each.shape for each in blank])
        _found([each[0] for each in blank], size, size, layout)
    chosen = {
        each: getattr(options, each) for each in ("resize", "channels", "pixels", "nms") if getattr(options, each)
    }
    layout, step = dataclasses.replace(layout, **chosen), many or MOST_IMAGES

    def detect(images: UInt8[np.ndarray, "b h w 3"]) -> list[Detections]:
        found = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            batch = np.stack([prepare(image, size, layout) for image in part])
            if many:  # it takes just so many
                batch = np.pad(batch, ((0, many - len(part)), (0, 0), (0, 0), (0, 0)))
            outputs = session.run(None, {name: batch})
            for i, image in enumerate(part):
                found.append(_found([each[i] for each in outputs], image.shape[:2], size, layout))
        return found

    return detect


def layout_of(shapes: Sequence[tuple[int, ...]]) -> Layout:
    """What outputs of these shapes mean.

    Raises:
      ValueError: they are of no known layout.
    """
    match [shape[1:] for shape in shapes]:
        case [(85, _, _)]:
            return Layout("fastestdet", _decode_fastestdet, "stretch", "BGR", "unit", 0.45)
        case [(84, _)]:
            return Layout("yolo", _decode_yolo, "letterbox", "RGB", "unit", 0.7)
        case [(_, 6)]:
            return Layout("end_to_end", _decode_end_to_end, "letterbox", "RGB", "unit", 1.0)
        case [(a, 4), (b, 80 | 91 | 92 as classes)] | [(a, 80 | 91 | 92 as classes), (b, 4)] if a == b:
            return Layout("detr", _decode_detr, "stretch", "RGB", "unit" if classes == 80 else "imagenet", 1.0)
    raise ValueError(
        f"found outputs of shapes {', '.join(map(str, shapes))}, expected [b, 85, h, w], [b, 84, m], "
        "[b, m, 6], or [b, m, 80, 91 or 92] and [b, m, 4]"
    )


# ---- images in


class Fit(NamedTuple):
    """Where an image lies within a network's input: pixel x of the image is at x * scale[0] + offset[0]."""

    scale: tuple[float, float]
    offset: tuple[int, int]


def fit(image: tuple[int, int], size: tuple[int, int], resize: str) -> Fit:
    """Of images and inputs (height, width): stretched to all of the input, or whole in its middle."""
    down, across = size[0] / image[0], size[1] / image[1]
    if resize == "stretch":
        return Fit((across, down), (0, 0))
    scale = min(down, across)
    height, width = (max(1, round(side * scale)) for side in image)
    return Fit((width / image[1], height / image[0]), ((size[1] - width) // 2, (size[0] - height) // 2))


def prepare(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], layout: Layout
) -> Float[np.ndarray, "3 height width"]:
    """An image as a network's input; made smaller by the mean over areas, larger linearly, as OpenCV's INTER_AREA."""
    scale, (left, top) = fit(image.shape[:2], size, layout.resize)
    height, width = round(image.shape[0] * scale[1]), round(image.shape[1] * scale[0])
    smaller = height <= image.shape[0] and width <= image.shape[1]
    resized = Image.fromarray(image).resize(
        (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
    )
    whole = np.full((*size, 3), _PADDING, np.uint8)
    whole[top : top + height, left : left + width] = np.asarray(resized)
    if layout.channels == "BGR":
        whole = whole[..., ::-1]
    pixels = whole.astype(np.float32)
    if layout.pixels != "bytes":
        pixels /= 255
    if layout.pixels == "imagenet":
        pixels = (pixels - _MEAN) / _STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


# ---- objects out


def _decode_fastestdet(outputs: Sequence[np.ndarray], size: tuple[int, int]) -> Raw:
    cells = outputs[0].reshape(85, -1).T
    rows, columns = np.indices(outputs[0].shape[1:]).reshape(2, -1)
    grid = np.array(outputs[0].shape[:0:-1])  # (width, height), as x and y
    centre = (np.stack([columns, rows], axis=-1) + np.tanh(cells[:, 1:3])) / grid
    shares = np.concatenate([centre, _sigmoid(cells[:, 3:5])], axis=-1)
    with np.errstate(invalid="ignore"):  # what is below 0 is told by what reads the scores
        scores = cells[:, 0] ** 0.6 * cells[:, 5:].max(axis=-1) ** 0.4
    return Raw(_corners(shares, size), scores, cells[:, 5:].argmax(axis=-1))


def _decode_yolo(outputs: Sequence[np.ndarray], size: tuple[int, int]) -> Raw:
    rows = outputs[0].T
    return Raw(_corners(rows[:, :4], (1, 1)), rows[:, 4:].max(axis=-1), rows[:, 4:].argmax(axis=-1))


def _decode_end_to_end(outputs: Sequence[np.ndarray], size: tuple[int, int]) -> Raw:
    rows = outputs[0]
    return Raw(rows[:, :4], rows[:, 4], np.rint(rows[:, 5]).astype(int))


def _decode_detr(outputs: Sequence[np.ndarray], size: tuple[int, int]) -> Raw:
    """A sigmoid each lets one box be of several classes; of a softmax only the best counts."""
    boxes, logits = sorted(outputs, key=lambda each: each.shape[-1])
    if logits.shape[-1] == 92:
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = (powers / powers.sum(axis=-1, keepdims=True))[:, _COCO]
        which, labels = np.arange(len(scores)), scores.argmax(axis=-1)
    else:
        scores = _sigmoid(logits if logits.shape[-1] == 80 else logits[:, _COCO])
        which, labels = np.nonzero(scores >= LEAST_SCORE)
    return Raw(_corners(boxes, size)[which], scores[which, labels], labels)


def _corners(boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]) -> Float[np.ndarray, "n 4"]:
    """Centres and sizes, as shares of an input of (height, width), to corners in its pixels."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1) * _twice(size[1], size[0])


def _twice(x: int | float, y: int | float) -> Float[np.ndarray, "4"]:
    return np.array((x, y, x, y), np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2


def _found(outputs: Sequence[np.ndarray], image: tuple[int, int], size: tuple[int, int], layout: Layout) -> Detections:
    """Boxes in pixels of the image and within it; of those of a class that overlap, the best."""
    if not all(np.isfinite(each).all() for each in outputs):
        raise ValueError("the detector's outputs are not all finite")
    raw = layout.decode(outputs, size)
    if raw.scores.size and not -_ROUNDING <= raw.scores.min() <= raw.scores.max() <= 1 + _ROUNDING:
        raise ValueError(f"found scores of {raw.scores.min()} to {raw.scores.max()}, expected 0 to 1 in {layout.name}")
    scale, offset = fit(image, size, layout.resize)
    boxes = (raw.boxes - _twice(*offset)) / _twice(*scale)
    boxes = np.clip(boxes, 0, _twice(image[1], image[0]))
    order = np.argsort(-raw.scores, kind="stable")
    order = order[raw.scores[order] >= LEAST_SCORE]
    kept: list[int] = []
    for label in np.unique(raw.labels[order]):
        best = order[raw.labels[order] == label]
        kept += [int(best[i]) for i in keep_apart(boxes[best], layout.nms)]
    return Detections(boxes[kept], raw.scores[kept], raw.labels[kept])


# ---- the runtime


def _session(weights: Path, options: OnnxOptions, field: str) -> Any:
    need(field, "detector", "onnxruntime")
    import onnxruntime

    if not weights.is_file():
        raise ValueError(f"{field}.weights: {weights}: no such file, expected a COCO detector as ONNX")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = min(options.threads, cores())
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would take whole cores
    try:
        return onnxruntime.InferenceSession(str(weights), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own classes
        raise ValueError(f"{field}.weights: {weights}: no model that onnxruntime can run: {error}") from error


def _input_of(session: Any, options: OnnxOptions, weights: Path, field: str) -> tuple[str, int | None, tuple[int, int]]:
    """The input's name, how many images it takes (None: any number), of which (height, width)."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3:
        found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise ValueError(f"{field}.weights: {weights}: found inputs {found}, expected one, tensor(float) [b, 3, h, w]")
    many, _, *sides = (each if isinstance(each, int) else None for each in inputs[0].shape)
    height, width = (side or options.size for side in sides)
    if not (height and width):
        raise ValueError(f"{field}.options.size: found 0, expected the side of images, as {weights} takes any")
    if options.size and (height, width) != (options.size, options.size):
        raise ValueError(f"{field}.options.size: found {options.size}, expected 0: {weights} takes {height} x {width}")
    return inputs[0].name, many, (height, width)
