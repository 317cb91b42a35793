"""ONNX detectors: layouts against boxes that are put in, transformers' own decoding, Pillow; and what is refused."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fopd_jax.rewards.geneval.detections import CLASSES, Detect, Detections
from fopd_jax.rewards.geneval.onnx import (
    Layout,
    OnnxOptions,
    fit,
    layout_of,
    make_detector,
    prepare,
)
from tests.rewards.geneval.onnx_files import INT64, write_model

CAT, DOG, TOOTHBRUSH = (CLASSES.index(name) for name in ("cat", "dog", "toothbrush"))
SIDE = 32
PLAIN = OnnxOptions(threads=1)
THINGS = ((4.0, 6.0, 12.0, 26.0, 0.8, CAT), (16.0, 2.0, 30.0, 14.0, 0.6, TOOTHBRUSH))
"""Corners in pixels of the input, score, label."""


def yolo(things=THINGS, boxes: int = 8) -> np.ndarray:
    rows = np.zeros((boxes, 84), np.float32)
    for row, (x0, y0, x1, y1, score, label) in zip(rows, things, strict=False):
        row[:4] = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        row[4 + label] = score
    return rows.T[None]


def end_to_end(things=THINGS) -> np.ndarray:
    return np.array([*things, (0, 0, 0, 0, 0, 0)], np.float32)[None]


def fastestdet(things=THINGS, cells: int = 4) -> np.ndarray:
    """Each in the cell of its centre; score = objectness^.6 * class^.4, with both the score itself."""
    out = np.zeros((1, 85, cells, cells), np.float32)
    for x0, y0, x1, y1, score, label in things:
        x, y = (x0 + x1) / 2 / SIDE * cells, (y0 + y1) / 2 / SIDE * cells
        cell = out[0, :, int(y), int(x)]
        cell[0] = cell[5 + label] = score
        cell[1:3] = math.atanh(x - int(x)), math.atanh(y - int(y))
        cell[3:5] = [math.log(share / (1 - share)) for share in ((x1 - x0) / SIDE, (y1 - y0) / SIDE)]
    return out


COCO_NUMBERS = {CAT: 17, TOOTHBRUSH: 90}


def detr(classes: int, things=THINGS) -> list[np.ndarray]:
    boxes, logits = np.zeros((1, 5, 4), np.float32), np.full((1, 5, classes), -20, np.float32)
    if classes == 92:
        logits[..., -1] = 20
    for i, (x0, y0, x1, y1, score, label) in enumerate(things):
        boxes[0, i] = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / SIDE
        place = label if classes == 80 else COCO_NUMBERS[label]
        logits[0, i, place] = math.log(score / (1 - score))
        if classes == 92:
            logits[0, i, -1] = 0
    return [logits, boxes]


LAYOUTS = {
    "yolo": [yolo()],
    "end_to_end": [end_to_end()],
    "fastestdet": [fastestdet()],
    "detr80": detr(80),
    "detr91": detr(91),
    "detr92": detr(92),
    "detr92 reversed": detr(92)[::-1],
}


def found(detections: Detections) -> list[tuple]:
    """(class, score, corners), best first."""
    order = np.argsort(-detections.scores)
    return [
        (CLASSES[detections.labels[i]], pytest.approx(float(detections.scores[i]), abs=1e-5), detections.boxes[i])
        for i in order
    ]


def detector(tmp_path: Path, outputs: Sequence[np.ndarray], options: OnnxOptions = PLAIN, **more) -> Detect:
    return make_detector(write_model(tmp_path / "model.onnx", outputs, **more), options, "rewards.geneval")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch", ["b", 1, 2])
def test_what_is_put_into_a_layout_comes_out_in_pixels_of_the_image(tmp_path: Path, name: str, batch: int | str):
    """Of square images twice the input's size, so that letterbox and stretching are the same."""
    detect = detector(tmp_path, LAYOUTS[name], shape=(batch, 3, SIDE, SIDE))
    results = detect(np.zeros((3, 2 * SIDE, 2 * SIDE, 3), np.uint8))
    assert len(results) == 3
    for result in results:
        assert result.masks is None
        assert len(result.scores) == len(THINGS)
        for (label, score, box), (*corners, expected, place) in zip(found(result), THINGS, strict=True):
            assert label == CLASSES[place]
            assert expected == score
            np.testing.assert_allclose(box, 2 * np.array(corners), atol=2e-4)


@pytest.mark.parametrize(
    ("resize", "corners"),
    [
        ("letterbox", (16, 8, 48, 56)),  # 64 x 32 pixels are 32 x 16 in the input, 8 below its top
        ("stretch", (16, 8, 48, 28)),
    ],
)
def test_boxes_are_mapped_back(tmp_path: Path, resize: str, corners: tuple[float, ...]):
    things = ((8.0, 8.0, 24.0, 28.0, 0.9, CAT),) if resize == "stretch" else ((8.0, 12.0, 24.0, 36.0, 0.9, CAT),)
    detect = detector(tmp_path, [yolo(things)], OnnxOptions(resize=resize))
    [result] = detect(np.zeros((1, 32, 64, 3), np.uint8))
    expected = np.clip(corners, 0, [64, 32, 64, 32])  # and cut to the image
    np.testing.assert_allclose(result.boxes, [expected], atol=1e-4)


def test_every_image_gets_its_own_answer_in_its_order(tmp_path: Path):
    slope = np.zeros_like(yolo())
    slope[0, 0] = 10.0  # centres move right by 10 pixels from black to white
    for batch in ("b", 1, 4):
        detect = detector(tmp_path, [yolo()], slopes=[slope], shape=(batch, 3, SIDE, SIDE))
        levels = np.linspace(0, 255, 11).astype(np.uint8)
        results = detect(np.broadcast_to(levels[:, None, None, None], (11, SIDE, SIDE, 3)).copy())
        lefts = [each.boxes[each.scores.argmax(), 0] for each in results]
        np.testing.assert_allclose(lefts, 4 + 10 * (levels / 255), atol=1e-4)


def test_overlapping_boxes_of_a_class_are_one_and_weak_ones_none(tmp_path: Path):
    cat = (4.0, 4.0, 24.0, 24.0)
    things = [(*cat, 0.8, CAT), (4.0, 4.0, 24.0, 23.0, 0.7, CAT), (*cat, 0.6, DOG), (20.0, 20.0, 30.0, 30.0, 0.04, CAT)]
    [result] = detector(tmp_path, [yolo(things)])(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert [(name, score) for name, score, _ in found(result)] == [("cat", 0.8), ("dog", 0.6)]
    [result] = detector(tmp_path, [yolo(things)], OnnxOptions(nms=1.0))(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert [(name, score) for name, score, _ in found(result)] == [("cat", 0.8), ("cat", 0.7), ("dog", 0.6)]


def test_an_image_without_objects_is_no_failure(tmp_path: Path):
    [result] = detector(tmp_path, [yolo([])])(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert len(result.scores) == 0
    assert result.boxes.shape == (0, 4)


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path):
    detect = detector(tmp_path, [yolo()], OnnxOptions(pixels="bytes"), slopes=[np.full_like(yolo(), 3e38)])
    with pytest.raises(ValueError, match="not all finite"):
        detect(np.full((1, SIDE, SIDE, 3), 255, np.uint8))


@pytest.mark.parametrize("output", [yolo() - 1, 2 * yolo(), -fastestdet(), 2 * end_to_end()])
def test_scores_that_are_none_are_refused_at_the_start(tmp_path: Path, output: np.ndarray):
    """Such as logits, of an export that left out the last activation."""
    with pytest.raises(ValueError, match=r"rewards\.geneval\.weights: .*model\.onnx: found scores of .* to 1 in"):
        detector(tmp_path, [output])


@pytest.mark.parametrize("classes", [80, 92])
def test_detr_s_outputs_are_read_as_transformers_reads_them(classes: int):
    """Random logits, above .3: its image processors' own `post_process_object_detection`."""
    from transformers import DetrImageProcessorPil, RTDetrImageProcessorPil
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(1, 50, classes), scale=2 if classes == 80 else 4).astype(np.float32)
    logits[..., :80] -= 6 if classes == 80 else 0
    boxes = rng.uniform(0.2, 0.4, (1, 50, 4)).astype(np.float32)
    processor = RTDetrImageProcessorPil() if classes == 80 else DetrImageProcessorPil()
    outputs = DetrObjectDetectionOutput(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes))
    [theirs] = processor.post_process_object_detection(
        outputs, threshold=0.3, target_sizes=torch.tensor([[SIDE, SIDE]])
    )
    numbers = np.arange(80) if classes == 80 else np.array([n for n in range(91) if n not in _SKIPPED])
    kept = np.isin(theirs["labels"].numpy(), numbers)
    expected = sorted(
        (round(float(score), 4), int(np.flatnonzero(numbers == int(label))[0]), *np.round(box.tolist(), 2))
        for score, label, box in zip(*(theirs[each][kept] for each in ("scores", "labels", "boxes")), strict=True)
    )
    layout = layout_of([logits.shape, boxes.shape])
    raw = layout.decode([logits[0], boxes[0]], (SIDE, SIDE))
    above = raw.scores > 0.3
    ours = sorted(
        (round(float(score), 4), int(label), *np.round(box.astype(float), 2))
        for score, label, box in zip(raw.scores[above], raw.labels[above], raw.boxes[above], strict=True)
    )
    assert len(ours) == len(expected) > 10
    np.testing.assert_allclose(ours, expected, atol=0.011)


_SKIPPED = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


# ---- images in


def test_images_are_fitted_by_their_larger_side_or_stretched():
    assert fit((480, 640), (320, 320), "letterbox") == ((0.5, 0.5), (0, 40))
    assert fit((640, 480), (320, 320), "letterbox") == ((0.5, 0.5), (40, 0))
    assert fit((480, 640), (320, 320), "stretch") == ((0.5, 320 / 480), (0, 0))
    assert fit((32, 32), (32, 32), "letterbox") == ((1, 1), (0, 0))


def layout(**changes: str) -> Layout:
    return dataclasses.replace(layout_of([(1, 84, 8)]), **changes)


def test_preparation_by_hand():
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, :2] = 255, 51, 0
    plain = prepare(image, (4, 4), layout())
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain[:, 0, 0], 114 / 255)
    np.testing.assert_allclose(plain[:, 3, 3], 114 / 255)
    np.testing.assert_allclose(plain[:, 1, 0], [1, 0.2, 0])
    np.testing.assert_allclose(plain[:, 2, 3], [0, 0, 0])
    np.testing.assert_allclose(prepare(image, (4, 4), layout(channels="BGR")), plain[::-1])
    np.testing.assert_allclose(prepare(image, (4, 4), layout(pixels="bytes")), plain * 255, rtol=1e-6)
    normalised = prepare(image, (2, 4), layout(pixels="imagenet"))
    np.testing.assert_allclose(
        normalised[:, 0, 0], [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, -0.406 / 0.225], rtol=1e-5
    )


def test_smaller_by_the_mean_over_areas_larger_linearly():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    half = prepare(image, (32, 48), layout(resize="stretch", pixels="bytes"))
    means = image.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(half - means).max() <= 1  # rounded once an axis
    double = prepare(image, (128, 192), layout(resize="stretch", pixels="bytes"))
    theirs = Image.fromarray(image).resize((192, 128), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(double, np.asarray(theirs).transpose(2, 0, 1))


# ---- what is refused


@pytest.mark.parametrize(
    ("outputs", "more", "message"),
    [
        ([np.zeros((1, 116, 8))], {}, "weights: {file}: found outputs of shapes (1, 116, 8), expected [b, 85, h, w]"),
        ([np.zeros((1, 8, 4)), np.zeros((1, 8, 20))], {}, "found outputs of shapes (1, 8, 4), (1, 8, 20)"),
        ([np.zeros((1, 7, 4)), np.zeros((1, 8, 80))], {}, "found outputs of shapes (1, 7, 4), (1, 8, 80)"),
        ([yolo()], {"inputs": 2}, "weights: {file}: found inputs image tensor(float) ['b', 3, 32, 32], image1"),
        ([yolo()], {"shape": ("b", 3, "h", "w")}, "options.size: found 0, expected the side of images, as {file}"),
        ([yolo()], {"options": OnnxOptions(size=64)}, "options.size: found 64, expected 0: {file} takes 32 x 32"),
    ],
)
def test_models_of_other_kinds_are_named(tmp_path: Path, outputs: list[np.ndarray], more: dict, message: str):
    with pytest.raises(ValueError) as error:
        detector(tmp_path, [each.astype(np.float32) for each in outputs], **more)
    assert str(error.value).startswith("rewards.geneval.")
    assert message.format(file=tmp_path / "model.onnx") in str(error.value)


def test_a_model_of_any_size_takes_the_one_that_is_given(tmp_path: Path):
    detect = detector(tmp_path, [yolo()], OnnxOptions(size=SIDE), shape=("b", 3, "h", "w"))
    [result] = detect(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    np.testing.assert_allclose(result.boxes[result.scores.argmax()], THINGS[0][:4], atol=1e-4)


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_files_that_are_no_models_are_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rewards\.eyes\.weights: .*model\.onnx: no (such file|model that)"):
        make_detector(path, OnnxOptions(), "rewards.eyes")


def test_inputs_of_another_type_are_named(tmp_path: Path):
    path = write_model(tmp_path / "model.onnx", [], shape=("b", 3, 8, 8), dtype=INT64)
    with pytest.raises(ValueError, match=r"rewards\.eyes\.weights: "):
        make_detector(path, OnnxOptions(), "rewards.eyes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "crop"}, "resize: found 'crop', expected one of stretch, letterbox, or ''"),
        ({"channels": "rgb"}, "channels: found 'rgb', expected one of RGB, BGR, or ''"),
        ({"pixels": "float"}, "pixels: found 'float', expected one of unit, imagenet, bytes, or ''"),
        ({"size": -1}, "size: found -1, expected 0 to 4096"),
        ({"nms": 1.5}, "nms: found 1.5, expected 0 to 1"),
        ({"threads": 0}, "threads: found 0, expected 1 to 256"),
    ],
)
def test_options_are_checked(options: dict, message: str):
    with pytest.raises(ValueError) as error:
        OnnxOptions(**options)
    assert str(error.value) == message


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"rewards\.eyes: needs onnxruntime: pip install 'fopd_jax\[detector\]'"):
        make_detector(tmp_path / "model.onnx", OnnxOptions(), "rewards.eyes")
