"""Small ONNX models for tests, written as protocol buffers by hand: what they answer is known beforehand.

Each output is a constant plus, with a slope, the mean of the image that goes in.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

FLOAT, INT64 = 1, 7


def write_model(
    path: Path,
    outputs: Sequence[np.ndarray],
    slopes: Sequence[np.ndarray] = (),
    shape: Sequence[int | str] = ("b", 3, 32, 32),
    inputs: int = 1,
    dtype: int = FLOAT,
) -> Path:
    """`outputs`: [1, …] each; of an image of mean m it is `output + m * slope`."""
    nodes, constants = b"", b""
    for i, output in enumerate(outputs):
        slope = slopes[i] if slopes else np.zeros_like(output)
        kept = output.ndim == 4
        # [b, 3, h, w] to [b, 1, 1, 1], or to [b, 3, h] and [b, 1, 1]
        first = [3] if not kept else [1, 2, 3]
        nodes += _node("ReduceMean", ["image"], f"first{i}", axes=first, keepdims=int(kept))
        nodes += _node("ReduceMean", [f"first{i}"], f"mean{i}", axes=[1, 2], keepdims=1)
        nodes += _node("Mul", [f"mean{i}", f"slope{i}"], f"scaled{i}")
        nodes += _node("Add", [f"scaled{i}", f"constant{i}"], f"output{i}")
        constants += _field(5, _tensor(f"slope{i}", slope)) + _field(5, _tensor(f"constant{i}", output))
    graph = nodes + _field(2, b"graph") + constants
    for i in range(inputs):
        graph += _field(11, _value(f"image{i}" if i else "image", shape, dtype))
    for i, output in enumerate(outputs):
        graph += _field(12, _value(f"output{i}", ["b", *output.shape[1:]], FLOAT))
    path.write_bytes(_number(1, 7) + _field(7, graph) + _field(8, _number(2, 11)))
    return path


def _varint(value: int) -> bytes:
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + (_varint(value >> 7) if value > 127 else b"")


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, side) for side in array.shape)
    return dims + _number(2, FLOAT) + _field(8, name.encode()) + _field(9, array.astype("<f4").tobytes())


def _value(name: str, shape: Sequence[int | str], dtype: int) -> bytes:
    sides = b"".join(
        _field(1, _number(1, side) if isinstance(side, int) else _field(2, side.encode())) for side in shape
    )
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, dtype) + _field(2, sides)))


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> bytes:
    content = b"".join(_field(1, each.encode()) for each in inputs) + _field(2, output.encode())
    content += _field(4, kind.encode())
    for name, value in attributes.items():
        if isinstance(value, int):
            content += _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2))
        else:
            content += _field(5, _field(1, name.encode()) + b"".join(_number(8, v) for v in value) + _number(20, 7))
    return _field(1, content)
