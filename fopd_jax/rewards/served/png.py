"""Images as PNG: lossless, RGB, 8 bits a channel, one picture a file.

What comes from outside is taken apart before anything decodes it: sizes are read from the header, the pixels are
inflated to just the size that it states, and Pillow sees a file that was put together here.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")
_COLOURS = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey and alpha", 6: "RGB and alpha"}
_FILTERS = 5
_UP = 2  # the filter of each row: what it is more than the row above


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The file of an image: one filter for all rows and runs alone, a third of the time that Pillow's fastest takes."""
    height, width, _ = image.shape
    rows = image.reshape(height, 3 * width)
    raw = np.full((height, 1 + 3 * width), _UP, np.uint8)
    raw[:1, 1:], raw[1:, 1:] = rows[:1], rows[1:] - rows[:-1]
    stream = zlib.compressobj(1, strategy=zlib.Z_RLE)
    content = stream.compress(raw.tobytes()) + stream.flush()
    return _file(_HEADER.pack(width, height, 8, 2, 0, 0, 0), content)


def png_size(data: bytes, most_pixels: int) -> tuple[int, int]:
    """Height and width that a file states; nothing of it is decoded.

    Raises:
      ValueError: it is no PNG of an RGB picture with 8 bits a channel, or has more pixels than that.
    """
    if not data.startswith(_SIGNATURE):
        raise ValueError("found no PNG, expected one")
    if data[8:16] != struct.pack(">I4s", _HEADER.size, b"IHDR") or len(data) < 16 + _HEADER.size:
        raise ValueError("found a PNG without a header")
    width, height, depth, colour, compression, filtering, interlace = _HEADER.unpack_from(data, 16)
    if (depth, colour) != (8, 2):
        found = _COLOURS.get(colour, f"colour type {colour}")
        raise ValueError(f"found a PNG of {found} with {depth} bits, expected RGB with 8 bits a channel")
    if (compression, filtering, interlace) != (0, 0, 0):
        raise ValueError("found an interlaced PNG, or one of unknown coding, expected a plain one")
    if not 1 <= height * width <= most_pixels:
        raise ValueError(f"found a PNG of {height}x{width} pixels, expected from 1 to {most_pixels} in all")
    return height, width


def decode_png(data: bytes, most_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image of a file.

    Raises:
      ValueError: as `png_size`, it is animated, damaged, or holds more than its picture.
    """
    height, width = png_size(data, most_pixels)
    stride = 1 + 3 * width
    raw = _inflate(b"".join(_picture(data)), height * stride)
    if max(raw[::stride]) >= _FILTERS:
        raise ValueError("found a damaged PNG: a row of unknown filter")
    rebuilt = _file(data[16 : 16 + _HEADER.size], zlib.compress(raw, 0))
    with Image.open(io.BytesIO(rebuilt), formats=["PNG"]) as picture:
        return np.array(picture)


def _picture(data: bytes) -> Iterator[bytes]:
    """What the picture's chunks hold."""
    for kind, content in _chunks(data):
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            raise ValueError("found an animated PNG, expected one picture")
        if kind == b"IDAT":
            yield content


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and contents, up to the end of the file, which must be the end of the picture."""
    at, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("found a PNG that is cut off")
        size, kind = struct.unpack_from(">I4s", data, at)
        content, end = data[at + 8 : at + 8 + size], at + 12 + size
        if end > len(data):
            raise ValueError("found a PNG that is cut off")
        if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError("found a damaged PNG: a checksum is wrong")
        yield kind, content
        at = end
    if at != len(data):
        raise ValueError(f"found {len(data) - at} bytes behind the end of a PNG")


def _inflate(data: bytes, size: int) -> bytes:
    """Inflated data of just this size; no more than that is ever made of it."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"found a damaged PNG: {error}") from error
    if len(raw) > size or stream.unused_data:
        raise ValueError("found a PNG with more data than its picture has")
    if len(raw) < size or not stream.eof:
        raise ValueError("found a PNG with less data than its picture has")
    return raw


def _file(header: bytes, content: bytes) -> bytes:
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
